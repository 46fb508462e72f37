"""Parts that wait in a file where a processor computes."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dreamloom.core.device import Runtime
from dreamloom.core.errors import BaseModelError
from dreamloom.models import offload
from dreamloom.models.base import MemoryOptions, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.offload import CpuOffload, map_weights

CPU = torch.device("cpu")


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()


def test_what_lies_in_a_file_computes_the_same_and_can_be_changed(layers, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.randn(3, 8)
    before, weight = layers(x), layers[0].weight
    map_weights(layers, "layers")
    assert torch.equal(layers(x), before)
    assert layers[0].weight is weight
    # Another process that looks finds nothing: the file is gone, but for whoever holds it.
    assert list(tmp_path.iterdir()) == []
    # An adapter may be added to it for a while, and taken off.
    weight.add_(1)
    assert not torch.equal(layers(x), before)
    weight.sub_(1)
    torch.testing.assert_close(layers(x), before)


def test_the_denoiser_stays_and_the_others_wait_each_written_once(layers, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(offload, "map_weights", lambda module, name: written.append(name))
    parts = {"unet": layers, "vae": nn.Linear(2, 2), "text_encoder": nn.Linear(2, 2)}
    waiting = CpuOffload(parts, CPU, cpu_offload=True)
    for _ in range(2):
        for name in parts:
            waiting.load(name, exclusive=True)
    assert sorted(written) == ["text_encoder", "vae"]


def test_without_offload_nothing_is_written(layers, monkeypatch):
    monkeypatch.setattr(offload, "map_weights", lambda module, name: pytest.fail("written"))
    held = CpuOffload({"unet": layers, "vae": nn.Linear(2, 2)}, CPU)
    held.load("unet", exclusive=True)
    held.unload("vae")


def test_where_there_is_no_room_it_is_said_with_what_to_do(layers, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload, "save_file", refuse)
    with pytest.raises(BaseModelError, match="There is no room in") as caught:
        map_weights(layers, "vae")
    assert "TMPDIR" in caught.value.hint


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
def test_a_base_in_fewer_bits_draws_nearly_the_same_in_float32(
    tiny_sdxl: Path, quantization: str
) -> None:
    runtime = Runtime(CPU, torch.float32)
    drawn = []
    for kind in ("whole", quantization):
        model = load_model(str(tiny_sdxl), runtime, MemoryOptions(kind))  # type: ignore[arg-type]
        (picture,) = model.sample([Shot("a photo", 0)], Sampler("ddim", 2, 1.0))
        drawn.append(torch.tensor(list(picture.tobytes()), dtype=torch.float32))
    assert (drawn[0] - drawn[1]).abs().mean() < 2
