"""Each picture is looked at once in a process, and what was said of it never reaches a disk."""

import pytest
import torch
from PIL import Image

from dreamloom.evaluation.encoders import cache
from dreamloom.evaluation.encoders.base import Extractor, FaceExtractor, FaceReading, TextExtractor
from dreamloom.evaluation.encoders.cache import (
    Remembering,
    RememberingFaces,
    RememberingReader,
    hash_picture,
)
from dreamloom.evaluation.encoders.faces import stack_rows


class ValidationSampler:
    """Sees a picture's mean colour, and counts what it is shown."""

    key = "looker@TEST"
    may_miss = False

    def __init__(self):
        self.shown = []

    def embed(self, images):
        self.shown.append(len(images))
        return torch.stack(
            [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) for image in images]
        ).float()

    def embed_texts(self, texts):
        return torch.ones(len(texts), 3)

    def too_long(self, texts):
        return list(texts)


class Finder(ValidationSampler):
    may_miss = True
    width = 2

    def find(self, images):
        self.shown.append(len(images))
        return [
            FaceReading("scored", 1, features=torch.ones(2))
            if image.getpixel((0, 0))[0]
            else FaceReading("no_face", 0)
            for image in images
        ]

    def embed(self, images):
        return stack_rows(self.find(images), 2)


@pytest.fixture(autouse=True)
def forget():
    cache._ROWS.clear()
    cache._READINGS.clear()
    yield
    cache._ROWS.clear()
    cache._READINGS.clear()


def picture(level, size=(8, 6)):
    return Image.new("RGB", size, (level, 2 * level, 0))


def test_a_second_look_runs_nothing():
    inner = ValidationSampler()
    encoder = Remembering(inner)
    first = encoder.embed([picture(1), picture(2)])
    assert torch.equal(encoder.embed([picture(2), picture(1)]), first.flip(0))
    assert inner.shown == [2]
    encoder.embed([picture(1), picture(3)])
    assert inner.shown == [2, 1]
    assert torch.equal(first, ValidationSampler().embed([picture(1), picture(2)]))


def test_a_picture_twice_in_one_call_is_looked_at_once():
    inner = ValidationSampler()
    found = Remembering(inner).embed([picture(1), picture(1), picture(2), picture(1)])
    assert inner.shown == [2]
    assert found[:, 0].tolist() == [1, 1, 2, 1]


def test_another_wrapper_of_the_same_encoder_remembers_too():
    Remembering(ValidationSampler()).embed([picture(1)])
    second = ValidationSampler()
    Remembering(second).embed([picture(1)])
    assert second.shown == []


def test_another_encoder_looks_for_itself():
    Remembering(ValidationSampler()).embed([picture(1)])
    other = ValidationSampler()
    other.key = "other@TEST"
    Remembering(other).embed([picture(1)])
    assert other.shown == [1]


def test_pixels_and_size_make_the_picture():
    same = picture(1)
    same.info["comment"] = "of another file"
    assert hash_picture(same) == hash_picture(picture(1))
    assert hash_picture(picture(1, (8, 6))) != hash_picture(picture(1, (6, 8)))
    changed = picture(1)
    changed.putpixel((3, 3), (0, 0, 0))
    assert hash_picture(changed) != hash_picture(picture(1))


def test_prompts_are_passed_on():
    encoder = RememberingReader(ValidationSampler())
    assert encoder.embed_texts(["a", "b"]).shape == (2, 3)
    assert encoder.too_long(["a"]) == ["a"]
    assert isinstance(encoder, TextExtractor)


def test_faces_are_looked_for_once_and_stay_failures():
    inner = Finder()
    encoder = RememberingFaces(inner)
    found = encoder.embed([picture(0), picture(5)])
    assert found.isnan().all(dim=1).tolist() == [True, False]
    assert [one.status for one in encoder.find([picture(5), picture(0)])] == ["scored", "no_face"]
    assert inner.shown == [2]
    assert encoder.may_miss
    assert isinstance(encoder, Extractor)
    assert not isinstance(Remembering(ValidationSampler()), FaceExtractor)


def test_memory_has_an_end(monkeypatch):
    monkeypatch.setattr("dreamloom.evaluation.encoders.cache._KEPT", 2)
    inner = ValidationSampler()
    encoder = Remembering(inner)
    assert encoder.embed([picture(level) for level in (1, 2, 3)])[:, 0].tolist() == [1, 2, 3]
    encoder.embed([picture(3)])
    assert inner.shown == [3]
    encoder.embed([picture(1)])
    assert inner.shown == [3, 1]


def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DREAMLOOM_MODELS", str(tmp_path))
    RememberingFaces(Finder()).embed([picture(5)])
    assert list(tmp_path.iterdir()) == []
