"""What passes between stages survives the way to disk and back."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dreamloom.errors import DreamLoomError
from dreamloom.pictures import (
    ImageSet,
    Photo,
    PhotoSet,
    Picture,
    PriorSet,
    WornAdapter,
    image_files,
    read_image_set,
    read_photo_set,
    read_prior_set,
    write_manifest,
)


def photo_set(folder: Path) -> PhotoSet:
    photo = Photo(
        file="00.png",
        source="Grüße an Mama.jpg",
        source_sha256="ab" * 32,
        original_px=(3024, 4032),
        scaled_px=(768, 1024),
        issues=("is blurred",),
    )
    return PhotoSet(folder=folder, resolution_px=768, photos=(photo,), notes=("1 photo is few",))


def prior_set(folder: Path) -> PriorSet:
    files = ("0000.png", "0001.png")
    return PriorSet(
        folder=folder, prompt="a photo of a dog", resolution_px=64, files=files, made_from="cd" * 32
    )


def image_set(folder: Path) -> ImageSet:
    pictures = tuple(
        Picture(
            file=f"{seed}-{steps}.png",
            prompt="a photo of rraj person",
            category="photo",
            seed=seed,
            scheduler="ddim",
            steps=steps,
            guidance=5.0,
        )
        for seed in (0, 1)
        for steps in (25, 50)
    )
    return ImageSet(
        folder=folder,
        base={"name": "picturebook"},
        adapters=(WornAdapter(file="a.safetensors", sha256="ef" * 32, weight=0.7),),
        resolution_px=64,
        pictures=pictures,
    )


@pytest.mark.parametrize(
    ("make", "read"),
    [(photo_set, read_photo_set), (prior_set, read_prior_set), (image_set, read_image_set)],
)
def test_a_set_survives_the_disk(tmp_path, make, read):
    written = make(tmp_path)
    path = write_manifest(written)
    assert read(tmp_path) == written
    assert "folder" not in json.loads(path.read_text(encoding="utf-8"))


def test_a_set_may_be_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_manifest(photo_set(old))
    old.rename(new)
    assert read_photo_set(new).paths() == [new / "00.png"]


def test_paths_are_in_order(tmp_path):
    assert prior_set(tmp_path).paths() == [tmp_path / "0000.png", tmp_path / "0001.png"]
    assert image_set(tmp_path).paths()[1] == tmp_path / "0-50.png"


def test_a_photo_set_is_known_by_its_originals_and_resolution(tmp_path):
    here, there = photo_set(tmp_path / "here"), photo_set(tmp_path / "there")
    assert here.fingerprint == there.fingerprint
    assert here.fingerprint != here.model_copy(update={"resolution_px": 512}).fingerprint
    other = here.photos[0].model_copy(update={"source_sha256": "00" * 32})
    assert here.fingerprint != here.model_copy(update={"photos": (other,)}).fingerprint


def test_an_image_set_is_known_by_its_manifest_and_pixels(tmp_path):
    images = image_set(tmp_path)
    for path in images.paths():
        Image.new("RGB", (4, 4)).save(path)
    first = images.fingerprint
    assert images.fingerprint == first
    assert images.model_copy(update={"adapters": ()}).fingerprint != first
    Image.new("RGB", (4, 4), "red").save(images.paths()[0])
    assert images.fingerprint != first


def test_select_keeps_what_equals_everything_asked_for(tmp_path):
    images = image_set(tmp_path)
    assert [p.file for p in images.select(steps=50).pictures] == ["0-50.png", "1-50.png"]
    assert [p.file for p in images.select(steps=50, seed=1).pictures] == ["1-50.png"]
    assert images.select(scheduler="pndm").pictures == ()
    assert images.select() == images


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DreamLoomError, match=r"has no manifest\.json") as error:
        read_image_set(tmp_path)
    assert error.value.hint


def test_a_damaged_manifest_is_refused(tmp_path):
    path = write_manifest(image_set(tmp_path))
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(DreamLoomError, match=r"manifest\.json is damaged"):
        read_image_set(tmp_path)


def test_image_files_are_sorted_and_chosen_by_suffix(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert [path.name for path in image_files(tmp_path, (".png", ".jpg"))] == ["a.jpg", "b.PNG"]
