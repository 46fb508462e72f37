"""Several processes that teach together do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamloom.core.device import pick_runtime
from dreamloom.core.distributed import Processes, join_processes
from dreamloom.models.base import AdapterSpec
from dreamloom.models.families import load_model
from dreamloom.training.step import share_update
from studio_set import compute_loss, make_lesson, make_photos, make_sets, small_config

SPEC = AdapterSpec(2, 2.0, "attention", 0)

_COMMON = [
    *("--preset", "quick", "--subject", "sks dog", "--device", "cpu"),
    *("--set", "train.steps=1", "--set", "train.rank=2", "--set", "train.warmup_steps=0"),
    *(
        "--set",
        "priors.count=4",
        "--set",
        "priors.steps=2",
        "--set",
        "train.target_modules=attention",
    ),
    # AdamW's first step has full length however small a number's gradient: rounding alone would
    # turn the sign of the smallest ones. Adafactor divides by a mean over rows and columns.
    *("--set", "train.optimizer=adafactor"),
]


def run(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# What is drawn for each image, and what counts once an update; the first update has no change yet.
_NOISY = ["--set", "train.log_gradient_noise=true"]
_REGULARISED = [
    *("--set", "train.steps=2", "--set", "train.update_penalty=1"),
    *("--set", "train.scale_weight_norms=0.02", "--set", "adapter.t_lora_min_rank=1"),
    *("--set", "adapter.dropout=0.1", "--set", "adapter.rank_dropout=0.2"),
    *("--set", "adapter.module_dropout=0.2"),
]


@pytest.mark.parametrize(
    "settings",
    [_NOISY, pytest.param(_REGULARISED, marks=pytest.mark.slow)],
    ids=["plain", "bounded"],
)
def test_two_processes_at_half_the_batch_do_the_update_of_one(
    tiny_sdxl: Path, tmp_path: Path, settings: list[str]
) -> None:
    folder = tmp_path
    make_photos(folder / "photos", count=4)
    train = ["train", str(folder / "photos"), "--base", str(tiny_sdxl), *_COMMON, *settings]
    # On processors accelerate's own launcher starts one process only; torch's starts them all.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "dreamloom"]
    half = ["--set", "train.batch_photos=2", "--set", "train.batch_priors=2"]
    run([*launch, *train, *half, "--out", str(folder / "two")])
    run([sys.executable, "-m", "dreamloom", *train, "--out", str(folder / "one")])
    one = load_file(folder / "one" / "adapter.safetensors")
    two = load_file(folder / "two" / "adapter.safetensors")
    assert one.keys() == two.keys()
    moved = 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
        moved += int(tensor.abs().max() > 0 and name.endswith("lora_up.weight"))
    assert moved > 10
    # The optimizer hides a wrong scale; the losses do not. One process writes: each is told once.
    for alone, together in zip(*(losses(folder / name) for name in ("one", "two")), strict=True):
        for term in ("total", "subject", "prior"):
            assert together[term] == pytest.approx(alone[term], rel=1e-5)
    # The two processes' gradients tell their noise at once; one gradient alone does not.
    if settings is _NOISY:
        assert losses(folder / "one", "GradientNoiseMeasured") == []
        (noise,) = losses(folder / "two", "GradientNoiseMeasured")
        assert noise["signal_to_noise"] >= 0


def losses(run: Path, event: str = "LossLogged") -> list[dict[str, float]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [one for one in lines if one["event"] == event]


def test_the_gradients_of_shares_add_up_to_that_of_the_whole(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    config = small_config(model, train__batch_photos=4, train__batch_priors=4)
    batches = make_lesson(model, *make_sets(model, tmp_path), config)
    half = small_config(model)
    weights = [p for one in model.attach_adapter(SPEC) for p in one.parameters]
    try:
        compute_loss(model, batches, 0, config).total.backward()
        whole = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        for index in range(2):
            share = share_update(half, batches, 2, index)
            compute_loss(model, batches, 0, half, share).total.backward()
        for weight, expected in zip(weights, whole, strict=True):
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-6)
    finally:
        model.detach_adapter()


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
