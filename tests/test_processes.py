"""Several processes that teach together do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamloom.processes import Processes, join_processes
from studio_set import make_photos

_COMMON = [
    *("--preset", "quick", "--subject", "sks dog", "--device", "cpu"),
    *("--set", "train.updates=1", "--set", "train.rank=2", "--set", "train.warmup_updates=0"),
    *("--set", "priors.count=4", "--set", "priors.steps=2", "--set", "train.reach=attention"),
    # AdamW's first step has full length however small the gradient: rounding alone would turn
    # the sign of the smallest ones. Adafactor's steps grow with the gradient.
    *("--set", "train.optimizer=adafactor"),
]


def run(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    make_photos(folder / "photos", count=4)
    return folder


def test_two_processes_at_half_the_batch_do_the_update_of_one(
    folder: Path, tiny_sdxl: Path
) -> None:
    train = ["train", str(folder / "photos"), "--base", str(tiny_sdxl), *_COMMON]
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "-m", "dreamloom"),
    ]
    half = ["--set", "train.batch_photos=2", "--set", "train.batch_priors=2"]
    run([*launch, *train, *half, "--out", str(folder / "two")])
    run([sys.executable, "-m", "dreamloom", *train, "--out", str(folder / "one")])
    one = load_file(folder / "one" / "adapter.safetensors")
    two = load_file(folder / "two" / "adapter.safetensors")
    assert one.keys() == two.keys()
    moved = 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
        moved += int(tensor.abs().max() > 0 and name.endswith("lora_B.weight"))
    assert moved > 10
    # One process writes: each event is told once.
    assert (folder / "two" / "events.jsonl").read_text().count("LossLogged") == 1


def test_one_process_is_alone_and_adds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes()
    assert alone == Processes(1, 0)
    assert alone.is_main
    numbers = torch.tensor([1.0, 2.0])
    alone.add_up([numbers])
    assert numbers.tolist() == [1.0, 2.0]
    assert alone.any_says(True, torch.device("cpu"))
    assert not alone.any_says(False, torch.device("cpu"))
    with alone.main_first():
        pass
