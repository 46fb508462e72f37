"""Sets of pictures: a manifest beside them says what they are, and comes back whole."""

import json

import pytest

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.manifests import (
    MANIFEST,
    AdapterEntry,
    ClassImageSet,
    DrawnClassImage,
    ImageSet,
    Photo,
    PhotoSet,
    Picture,
    image_files,
    read_class_image_set,
    read_image_set,
    read_photo_set,
    write_manifest,
)


def picture(file, **changes):
    drawn = {"prompt": "a photo of rraj person", "seed": 1, "scheduler": "ddim", "steps": 25}
    return Picture(file=file, **{**drawn, "guidance": 4.0, **changes})


@pytest.fixture
def images(tmp_path):
    pictures = [picture("0.png"), picture("1.png", seed=2), picture("2.png", steps=50)]
    for number, one in enumerate(pictures):
        (tmp_path / one.file).write_bytes(bytes([number]))
    return ImageSet(
        folder=tmp_path,
        base={"name": "picturebook"},
        adapters=(AdapterEntry(file="a.safetensors", sha256="00", weight=-0.5),),
        resolution_px=64,
        pictures=tuple(pictures),
    )


def test_an_adapter_at_a_plain_weight_is_written_without_a_schedule(tmp_path, images):
    written = json.loads(write_manifest(images).read_text())
    assert written["adapters"] == [{"file": "a.safetensors", "sha256": "00", "weight": -0.5}]
    scheduled = AdapterEntry(file="b.safetensors", sha256="00", weight=1, lora_schedule="1@0,0@1")
    scheduled = images.model_copy(update={"adapters": (*images.adapters, scheduled)})
    # By the name that it has always had in files, so that sets drawn before are known again.
    written = json.loads(write_manifest(scheduled).read_text())
    assert written["adapters"][1]["pace"] == "1@0,0@1"
    assert read_image_set(tmp_path) == scheduled
    assert scheduled.fingerprint != images.fingerprint
    told = ["a.safetensors × -0.5", "b.safetensors × 1 (1@0,0@1)"]
    assert [str(active) for active in scheduled.adapters] == told


def photo(**changes):
    known = {"file": "0.png", "source": "a.jpg", "source_sha256": "ab", "original_px": (9, 8)}
    return Photo(**{**known, "scaled_px": (64, 64), **changes})


def test_sets_come_back_as_they_were(tmp_path, images):
    assert write_manifest(images) == tmp_path / MANIFEST
    assert read_image_set(tmp_path) == images
    photos = PhotoSet(
        folder=tmp_path / "photos",
        resolution_px=64,
        photos=(photo(issues=("It is dark.",)),),
        notes=("Only 1 photo.",),
    )
    write_manifest(photos)
    assert read_photo_set(photos.folder) == photos
    priors = ClassImageSet(
        folder=tmp_path / "priors",
        prompt="a person",
        resolution_px=64,
        files=("0000.png",),
        made_from="cd",
        recipe={"scheduler": "ddim", "steps": 25, "guidance": 4.0},
        drawn=(DrawnClassImage(file="0000.png", seed=2**62, sha256="ef"),),
    )
    write_manifest(priors)
    again = read_class_image_set(priors.folder)
    assert again == priors
    assert [type(value) for value in again.recipe.values()] == [str, int, float]


def test_a_photo_set_comes_back_with_its_buckets_boxes_and_masks(tmp_path):
    told = {"given_box": (1, 2.5, 30, 40), "box_px": (3, 1, 41, 31), "mask": "0.mask.png"}
    shown = photo(scaled_px=(64, 90), bucket_px=(64, 80), mask_sha256="cd", **told)
    photos = PhotoSet(
        folder=tmp_path,
        resolution_px=64,
        shape="buckets",
        step_px=8,
        photos=(shown, photo()),
    )
    write_manifest(photos)
    again = read_photo_set(tmp_path)
    assert again == photos
    assert again.fingerprint == photos.fingerprint
    assert [one.mask for one in again.photos] == ["0.mask.png", ""]


def test_a_photo_of_no_told_bucket_is_cut_to_squares():
    assert photo(scaled_px=(64, 90)).bucket_px == (64, 64)
    assert photo(scaled_px=(64, 90), bucket_px=(64, 80)).bucket_px == (64, 80)


def test_a_set_may_be_moved(tmp_path, images):
    write_manifest(images)
    assert str(tmp_path) not in (tmp_path / MANIFEST).read_text()
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert read_image_set(moved).paths() == [moved / f"{n}.png" for n in range(3)]
    assert (
        read_image_set(moved).fingerprint == images.model_copy(update={"folder": moved}).fingerprint
    )


def test_a_folder_without_a_manifest_is_told_as_such(tmp_path):
    with pytest.raises(DreamLoomError, match=f"has no {MANIFEST}") as caught:
        read_image_set(tmp_path)
    assert str(tmp_path) in caught.value.problem


@pytest.mark.parametrize(
    "damaged", ["", "{half", "3", "[]", "{}", '{"colour": 1}', '{"pictures": 3}', "[1, 2]"]
)
@pytest.mark.parametrize("read", [read_image_set, read_photo_set, read_class_image_set])
def test_a_damaged_manifest_is_told_as_such(tmp_path, damaged, read):
    (tmp_path / MANIFEST).write_text(damaged)
    with pytest.raises(DreamLoomError, match="is damaged"):
        read(tmp_path)


def test_pictures_are_selected_by_their_fields(images):
    assert [p.file for p in images.select(steps=25).pictures] == ["0.png", "1.png"]
    assert [p.file for p in images.select(steps=25, seed=2).pictures] == ["1.png"]
    assert images.select().pictures == images.pictures
    assert images.select(seed=9).pictures == ()


def test_the_fingerprint_of_pictures_depends_on_manifest_and_bytes(images):
    before = images.fingerprint
    assert images.select(seed=2).fingerprint != before
    assert images.model_copy(update={"adapters": ()}).fingerprint != before
    images.paths()[0].write_bytes(b"another")
    assert images.fingerprint != before


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"source_sha256": "cd"}, False),
        ({"caption": "a photo at night"}, False),
        ({"given_box": (0, 0, 8, 9)}, False),
        ({"mask_sha256": "cd"}, False),
        ({"source": "renamed.jpg"}, True),
        ({"issues": ("It is dark.",)}, True),
    ],
)
def test_the_fingerprint_of_photos_depends_on_what_training_sees(tmp_path, changes, same):
    def of(one, resolution_px=64, **cut):
        photos = PhotoSet(folder=tmp_path, resolution_px=resolution_px, photos=(one,), **cut)
        return photos.fingerprint

    assert (of(photo(**changes)) == of(photo())) == same
    assert of(photo(), 128) != of(photo())
    some, coarse = (of(photo(), shape="buckets", step_px=step) for step in (8, 16))
    assert len({some, coarse, of(photo())}) == 3
    assert of(photo(), step_px=8) == of(photo(), step_px=16)


def test_files_are_found_by_their_ending_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", "a.jpg.part"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_files(tmp_path, (".png", ".jpg"))] == ["a.png", "b.JPG"]


def test_what_a_prompt_may_change_comes_back_and_may_be_absent(tmp_path, images):
    told = {"style": "art", "face": "partial", "may_change": ("eyes", "hair"), "check": "Is it?"}
    write_manifest(images.model_copy(update={"pictures": (picture("0.png", **told),)}))
    assert read_image_set(tmp_path).pictures == (picture("0.png", **told),)
    # A manifest of an earlier version knows none of these.
    path = tmp_path / MANIFEST
    listed = json.loads(path.read_text())
    for name in told:
        del listed["pictures"][0][name]
    path.write_text(json.dumps(listed))
    (old,) = read_image_set(tmp_path).pictures
    assert (old.style, old.face, old.may_change, old.check) == (None, None, None, "")
    listed["pictures"][0]["may_change"] = ["nose"]
    path.write_text(json.dumps(listed))
    with pytest.raises(DreamLoomError, match="damaged"):
        read_image_set(tmp_path)
