"""What an adapter tells of the base model that it was made for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import BaseModelError
from dreamloom.core.run_folder import Record, RunFolder
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.base_names import publish_base
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.families import load_model


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("picturebook", "picturebook"),
        ("sdxl", "sdxl"),
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"),
        ("/home/someone/my-sdxl", "my-sdxl"),
        ("/home/someone/my-sdxl/", "my-sdxl"),
        ("~/models/my.safetensors", "my.safetensors"),
        ("someone/my.safetensors", "my.safetensors"),
        ("../someone/my-sdxl", "my-sdxl"),
        (r"C:\Users\someone\my-sdxl", "my-sdxl"),
        ("", ""),
    ],
)
def test_only_the_last_part_of_a_place_is_told(base: str, told: str) -> None:
    assert publish_base(base) == told


def test_a_folder_that_is_here_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "my-sdxl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert publish_base("someone/my-sdxl") == "my-sdxl"
    monkeypatch.chdir("someone/my-sdxl")
    assert publish_base(".") == "my-sdxl"


def make_adapter(base: Path) -> Adapter:
    rng = torch.Generator().manual_seed(0)
    layer = Layer(torch.randn(2, 8, generator=rng), torch.randn(8, 2, generator=rng))
    told = {"dreamloom.base": str(base), "dreamloom.base_fingerprint": "abc"}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return Adapter({name: layer}, told)


def test_a_file_keeps_the_place_to_itself_and_its_run_still_knows_it(tmp_path: Path) -> None:
    base = tmp_path / "someone" / "my-sdxl"
    base.mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    run.claim()
    look = run.validation_samples / "000100" / "adapter.safetensors"
    for file in (run.adapter, look, tmp_path / "gone.safetensors"):
        write_adapter(file, make_adapter(base))
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["dreamloom.base"] == "my-sdxl"
        assert b"someone" not in file.read_bytes()
    for fingerprint, told in (("other", "my-sdxl"), ("abc", str(base))):
        run.write_record(
            Record(stage="train", base={"name": str(base), "fingerprint": fingerprint})
        )
        for file in (run.adapter, look):
            assert read_adapter(file).metadata["dreamloom.base"] == told
    assert read_adapter(tmp_path / "gone.safetensors").metadata["dreamloom.base"] == "my-sdxl"


@pytest.mark.parametrize("name", ["my-sdxl", "my-sdxl.safetensors"])
def test_a_base_of_which_only_the_name_is_known_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=name) as caught:
        load_model(name, pick_runtime("cpu"))
    assert "--base" in caught.value.hint
