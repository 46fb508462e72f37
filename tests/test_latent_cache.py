"""Encoded crops on disk: found by what they are, checked when read, gone when all is done."""

from pathlib import Path

import pytest
import torch

from dreamloom.core.events import Event, LossLogged, Note
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.models.base import Latents, Model
from dreamloom.training.latent_cache import LatentStore
from dreamloom.training.train import train_adapter
from studio_set import claimed, small_config

PIXELS = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)


def make(folder: Path, *made_by: str) -> tuple[LatentStore, list[str]]:
    told: list[str] = []
    return LatentStore(folder, made_by or ("a base", "cpu fp32"), told.append), told


def latents(seed: int = 0) -> Latents:
    rng = torch.Generator().manual_seed(seed)
    return Latents(*(torch.randn(1, 4, 2, 2, generator=rng) for _ in range(2)))


def test_what_is_kept_is_found_bit_for_bit_by_its_pixels_and_its_maker(tmp_path: Path) -> None:
    store, told = make(tmp_path / "latents")
    assert store.find(PIXELS) is None
    store.keep(PIXELS, latents())
    again, _ = make(tmp_path / "latents")
    found = again.find(PIXELS)
    assert found is not None
    assert torch.equal(found.mean, latents().mean)
    assert torch.equal(found.deviation, latents().deviation)
    other = PIXELS.clone()
    other[2, 3, 3] += 1
    assert store.find(other) is None
    assert store.find(PIXELS.view(3, 2, 8)) is None
    # A mirrored crop is another crop.
    assert store.find(PIXELS.flip(-1)) is None
    assert make(tmp_path / "latents", "another base", "cpu fp32")[0].find(PIXELS) is None
    assert told == []
    store.clear()
    assert not store.folder.exists()


@pytest.mark.parametrize("place", [-1, -40, 20, 4])
def test_a_damaged_file_is_not_believed_and_told_of_once(tmp_path: Path, place: int) -> None:
    store, told = make(tmp_path)
    for pixels in (PIXELS, PIXELS + 1):
        store.keep(pixels, latents())
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[place] ^= 0x40
        file.write_bytes(bytes(data))
    assert store.find(PIXELS) is None
    assert store.find(PIXELS + 1) is None
    assert len(told) == 1
    assert "encoded again" in told[0]


def test_a_full_disk_stops_the_keeping_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = make(tmp_path)
    tried: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamloom.training.latent_cache.save_file", refuse)
    store.keep(PIXELS, latents())
    store.keep(PIXELS + 1, latents())
    assert len(told) == len(tried) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_goes_on_encodes_nothing_twice(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = claimed(tmp_path), small_config(model)
    encode, encoded = model.encode_images, []

    def count(pixels: torch.Tensor) -> Latents:
        encoded.append(1)
        return encode(pixels)

    def stop(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "encode_images", count)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(run, model, *sets, config, stop)
    first = len(encoded)
    assert first >= 6
    assert len(list(run.latents.iterdir())) == first
    file = sorted(run.latents.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1])
    told: list[Event] = []
    train_adapter(run, model, *sets, config, told.append)
    assert len(encoded) == first + 1
    notes = [one.text for one in told if isinstance(one, Note)]
    assert sum("encoded again" in text for text in notes) == 1
    assert not run.latents.exists()
