"""Adapters by name: what is a path, what is of the hub, and what is fetched from there.

The hub's own client talks to a server on this machine that answers as the hub does.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file

from dreamloom.api.options import list_adapters
from dreamloom.cli.main import main
from dreamloom.core.errors import AdapterError
from dreamloom.inference.generate import ActiveAdapter, parse_active_adapter
from dreamloom.lora.locating import DIFFUSERS_NAME, locate_adapter, split_weight
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.recipe import parse_part, read_recipe
from hub_server import TOKEN, Hub, Repository
from merges import random_adapter
from studio_set import make_photos


def succeed(*words: object) -> str:
    done = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def fail(*words: object) -> str:
    done = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert done.exit_code == 1, done.output
    return " ".join(done.stderr.splitlines())


def safetensors_of(folder: Path, seed: int = 0, **how: str) -> bytes:
    file = folder / f"{seed}.safetensors"
    write_adapter(file, random_adapter(seed, {"linear": 2}), **how)
    return file.read_bytes()


@pytest.fixture
def stocked(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with a few repositories of adapters."""
    one, two = safetensors_of(tmp_path), safetensors_of(tmp_path, 1)
    stock = {
        "user/one": {"me.safetensors": one, "optimizer.bin": b"no", "README.md": b"#"},
        "user/usual": {DIFFUSERS_NAME: one, "other.safetensors": two},
        "user/several": {"a.safetensors": one, "sub/b.safetensors": two},
        "user/pickles": {"pytorch_lora_weights.bin": b"no"},
        "user/nothing": {"README.md": b"#"},
    }
    for name, files in stock.items():
        hub.repositories[name] = Repository(private=False)
        hub.repositories[name].commit(files)
    return hub


def downloads(hub: Hub) -> set[str]:
    found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", one) for one in hub.requests)
    return {one[1] for one in found if one}


def test_a_name_of_the_hub_is_fetched_as_safetensors_alone(stocked: Hub, tmp_path: Path):
    own = read_adapter(tmp_path / "0.safetensors").layers["unet.linear"]
    for text in ("user/one", "user/one@main", "user/one:me.safetensors", "user/usual"):
        path = locate_adapter(text)
        assert torch.equal(read_adapter(path).layers["unet.linear"].down, own.down)
    first = stocked.repositories["user/usual"].head
    stocked.repositories["user/usual"].commit({DIFFUSERS_NAME: safetensors_of(tmp_path, 2)})
    newest = locate_adapter("user/usual").read_bytes()
    assert newest == (tmp_path / "2.safetensors").read_bytes()
    assert locate_adapter(f"user/usual@{first}").read_bytes() != newest
    assert locate_adapter("user/several:sub/b.safetensors").name == "b.safetensors"
    assert downloads(stocked) == {"me.safetensors", DIFFUSERS_NAME, "sub/b.safetensors"}


def test_what_was_fetched_is_there_without_network(stocked: Hub, monkeypatch: pytest.MonkeyPatch):
    before = [locate_adapter(text) for text in ("user/one", "user/several:sub/b.safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [locate_adapter(t) for t in ("user/one", "user/several:sub/b.safetensors")] == before
    with pytest.raises(AdapterError, match="not in the hub's cache, and the hub cannot be reached"):
        locate_adapter("user/usual")


def test_a_folder_of_peft_comes_with_its_configuration(hub: Hub, tmp_path: Path):
    layer = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(2, 1280),
        f"{layer}.lora_B.weight": torch.ones(1280, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    hub.repositories["user/peft"] = Repository(private=False)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    hub.repositories["user/peft"].commit(
        {
            "adapter_model.safetensors": (tmp_path / "x.safetensors").read_bytes(),
            "adapter_config.json": json.dumps(config).encode(),
            "training_args.bin": b"no",
        }
    )
    adapter = read_adapter(locate_adapter("user/peft"))
    (found,) = adapter.layers.values()
    assert torch.allclose(found.up @ found.down, torch.full((1280, 1280), 6.0))
    assert downloads(hub) == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "user/several",
            r"holds several adapters: a\.safetensors, sub/b\.safetensors\. Name one, as",
        ),
        ("user/several:c.safetensors", r"holds no c\.safetensors\. Name one of these: a\.safe"),
        ("user/pickles", r"holds no \.safetensors file, but pickles, which could run code"),
        ("user/nothing", r"holds no \.safetensors file\. DreamLoom fetches nothing else"),
        ("user/one:optimizer.bin", r"optimizer\.bin of user/one is not fetched"),
        ("user/one@v9", "user/one on the hub has no revision v9"),
        ("user/gone", "There is no adapter at user/gone, neither here nor on the hub"),
        ("user/secret", "There is no adapter at user/secret, neither here nor on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_a_sentence(
    stocked: Hub, text: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    stocked.repositories["user/secret"] = Repository(private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match=says):
        locate_adapter(text)
    assert downloads(stocked) == set()


def test_a_path_is_never_asked_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/it").mkdir(parents=True)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/one").write_bytes(safetensors_of(tmp_path))
    for text in (
        *("me.safetensors", "runs/me.safetensors", "runs/me/adapter.safetensors", "runs/it"),
        *("./me", "../me", "/me", "~/me", "runs/me/", "a--b/c", "user/one", "C:/x/me", "me", ""),
    ):
        assert locate_adapter(text) == Path(text)
    with pytest.raises(
        AdapterError, match=r"There is no adapter at runs/me\. Check the path; .*@main"
    ):
        locate_adapter("runs/me")
    assert hub.requests == []
    said = fail("inspect", "runs/me.safetensors")
    assert said == "Error: There is no adapter at runs/me.safetensors. Check the path."


@pytest.mark.parametrize(
    ("text", "named", "weight"),
    [
        ("user/one", "user/one", None),
        ("user/one:0.8", "user/one", "0.8"),
        ("user/one:-1", "user/one", "-1"),
        ("user/one:1@0,0.4@0.5", "user/one", "1@0,0.4@0.5"),
        ("user/one@v1", "user/one@v1", None),
        ("user/one@v1:1@0,0@1", "user/one@v1", "1@0,0@1"),
        ("user/one@refs/pr/1:0.5", "user/one@refs/pr/1", "0.5"),
        ("user/one:me.safetensors", "user/one:me.safetensors", None),
        ("user/one@v1:sub/me.safetensors:0.8", "user/one@v1:sub/me.safetensors", "0.8"),
        ("user/one:me.bin", "user/one:me.bin", None),
    ],
)
def test_weights_follow_a_name_of_the_hub(text: str, named: str, weight: str | None):
    assert split_weight(text) == (named, weight)


def test_every_command_that_reads_an_adapter_takes_a_name_of_the_hub(
    stocked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = locate_adapter("user/one")
    assert parse_active_adapter("user/one:0.5") == ActiveAdapter(path, 0.5)
    assert parse_part("x=user/one:0.5").path == path
    assert list_adapters(["user/one", ("user/one@main", 0.5)]) == [(path, 1.0), (path, 0.5)]
    assert json.loads(succeed("inspect", "user/one", "--json"))["layers"] == 1
    succeed("resize", "user/one", "--rank", 1, "-o", "cut.safetensors")
    succeed("convert", "user/one@main", "-o", "same.safetensors")
    succeed("diagnose", "user/one", "user/usual:other.safetensors:0.5")
    succeed("merge", "user/one", "user/usual:0.5", "-o", "sum.safetensors", "--verify")
    with safe_open("sum.safetensors", "pt") as file:
        assert str(tmp_path) not in json.dumps(file.metadata())
    Path("r.toml").write_text('[[parts]]\nfile = "user/one"\n[[parts]]\nfile = "cut.safetensors"\n')
    assert [part.path for part in read_recipe(Path("r.toml")).parts] == [
        path,
        Path("cut.safetensors"),
    ]


def test_a_training_may_begin_from_an_adapter_of_the_hub(tiny_sdxl: Path, hub: Hub, tmp_path: Path):
    words = ("--subject", "sks dog", "--base", tiny_sdxl, "--device", "cpu")
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "it"
    said = fail("train", photos, *words, "--from", "user/gone", "--out", out)
    assert "no adapter at user/gone, neither here nor on the hub" in said


def test_the_installed_command_asks_the_hub_that_the_environment_names(
    stocked: Hub, tmp_path: Path
):
    environment = {name: text for name, text in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": stocked.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "dreamloom", "inspect", "user/one", "--json"],
        env=environment | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 1
