"""The photos stage: every issue and message, copies that are upright and bare, all or nothing."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFilter

from dreamloom.core.errors import PhotoError
from dreamloom.core.events import Note, Progress, StageDone, StageSkipped, StageStarted
from dreamloom.core.manifests import read_class_image_set, read_photo_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data import image_io, picture_files
from dreamloom.data.class_images import load_class_images
from dreamloom.data.image_io import open_upright
from dreamloom.data.photos.check import check_photos, judge_captions
from dreamloom.data.photos.companions import find_companions
from dreamloom.data.photos.metadata import tidy_lines
from dreamloom.data.photos.prepare import fingerprint_photos, load_photos

EXAMPLES = Path(__file__).parent.parent / "examples"


def scene(seed, width=240, height=180):
    """A picture with edges everywhere, unlike that of every other seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def exif(orientation=1, located=False):
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    if located:
        data.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 7.0, 52.9)
    return data


@pytest.fixture
def folder(tmp_path):
    """Six good photos."""
    path = tmp_path / "me"
    path.mkdir()
    for number in range(6):
        scene(number).save(path / f"IMG_{number}.jpg", quality=90)
    return path


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def load(folder, run, resolution_px=128):
    events = []
    return load_photos(folder, run, resolution_px, events.append), events


def texts(events, warning=None):
    return [e.text for e in events if isinstance(e, Note) and warning in (None, e.warning)]


def issues_of(image, folder, resolution_px=128):
    image.save(folder / "odd.png")
    rows = {row.file: row for row in check_photos(folder, resolution_px).photos}
    return rows["odd.png"].issues


def state(run):
    return {
        str(path.relative_to(run.path)): path.read_bytes() if path.is_file() else None
        for path in run.path.rglob("*")
    }


# Good photos


def test_good_photos_are_prepared_without_a_word(folder, run):
    photos, events = load(folder, run)
    assert [p.source for p in photos.photos] == [f"IMG_{n}.jpg" for n in range(6)]
    assert [p.file for p in photos.photos] == [f"0{n}.png" for n in range(6)]
    assert {p.original_px for p in photos.photos} == {(180, 240)}
    assert {p.scaled_px for p in photos.photos} == {(128, 171)}
    assert not texts(events)
    assert not any(p.issues for p in photos.photos)
    assert photos.folder == run.photos
    for photo, path in zip(photos.photos, photos.paths(), strict=True):
        with Image.open(path) as copy:
            assert (copy.format, copy.mode, copy.size) == ("PNG", "RGB", photo.scaled_px[::-1])
        original = (folder / photo.source).read_bytes()
        assert photo.source_sha256 == sha256(original).hexdigest()


def test_events_tell_the_story(folder, run):
    _, events = load(folder, run)
    assert events[0] == StageStarted("photos", f"6 photos in {folder}")
    assert [e.done for e in events if isinstance(e, Progress)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], StageDone)
    assert events[-1].detail == "6 photos, 0 with issues"


def test_the_record_and_the_manifest_say_what_was_done(folder, run):
    photos, _ = load(folder, run)
    assert read_photo_set(run.photos) == photos
    record = run.read_record("photos")
    assert record.inputs["photo IMG_0.jpg"] == photos.photos[0].source_sha256
    assert record.inputs["resolution_px"] == "128"
    assert set(record.outputs) == {"photos/manifest.json", *(f"photos/0{n}.png" for n in range(6))}
    assert record.results == {"photos": 6, "issues": {}, "notes": []}
    assert record.settings == {"resolution_px": 128, "shape": "square"}


def test_every_format_is_taken_in_order_of_name(tmp_path, run):
    names = ["a.JPG", "b.jpeg", "c.png", "d.webp", "e.bmp", "f.tif", "g.tiff", "h.gif"]
    for number, name in enumerate(reversed(names)):
        scene(number).save(tmp_path / name)
    photos, _ = load(tmp_path, run)
    assert [p.source for p in photos.photos] == names


def test_heic_is_taken(folder, run):
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: dreamloom[heic]")
    heif.from_pillow(scene(9)).save(folder / "IMG_9.HEIC", quality=95)
    assert load(folder, run)[0].photos[-1].source == "IMG_9.HEIC"


# What is not ideal about one photo


def test_a_small_photo(folder):
    assert issues_of(scene(9, 320, 100), folder) == (
        "is small (320 × 100 pixels): it will be enlarged to 128, "
        "and learned as soft as that looks",
        "is very wide (3.2 to 1): only squares of it are seen at a time, so cut out the part with "
        "the subject",
    )


def test_a_small_photo_is_enlarged(tmp_path, run):
    scene(1, 64, 48).save(tmp_path / "a.png")
    assert load(tmp_path, run)[0].photos[0].scaled_px == (128, 171)


def test_a_high_photo(folder):
    (issue,) = issues_of(scene(9, 128, 384), folder)
    assert issue.startswith("is very high (3.0 to 1): ")


def test_twice_as_wide_as_high_is_not_called_wide(folder):
    assert issues_of(scene(9, 256, 128), folder) == ()


def test_a_blurred_photo(folder):
    (issue,) = issues_of(scene(9).filter(ImageFilter.GaussianBlur(6)), folder)
    assert issue.startswith("is blurred (sharpness ")
    assert issue.endswith(
        ", where 25 is the least and 100 or more usual): take it again, or leave it out"
    )


def test_a_shaken_photo_is_blurred(folder):
    pixels = np.asarray(scene(9, 600, 512), dtype=float)
    shaken = sum(np.roll(pixels, step, axis=1) for step in range(40)) / 40
    (issue,) = issues_of(Image.fromarray(shaken[:, 40:].astype(np.uint8)), folder)
    assert issue.startswith("is blurred")


def test_a_sharp_subject_before_a_soft_background_is_not_blurred(folder):
    photo = scene(9, 512, 512).filter(ImageFilter.GaussianBlur(20))
    photo.paste(scene(9, 512, 512).crop((180, 180, 340, 340)), (180, 180))
    assert issues_of(photo, folder) == ()


def test_a_dark_photo(folder):
    assert issues_of(scene(9).point(lambda value: value // 6), folder) == (
        "is very dark: take it again in more light, or leave it out",
    )


def test_an_overexposed_photo(folder):
    assert issues_of(scene(9).point(lambda value: min(255, 150 + 3 * value)), folder) == (
        "is overexposed, with large parts plain white: take it again in less light",
    )


def test_a_white_background_is_not_overexposed(folder):
    photo = Image.new("RGB", (240, 180), "white")
    photo.paste(scene(9, 120, 90).point(lambda value: value // 2), (60, 45))
    assert issues_of(photo, folder) == ()


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_flat_photo_is_not_called_blurred_as_well(folder, grey):
    (issue,) = issues_of(Image.new("RGB", (200, 200), (grey,) * 3), folder)
    assert issue.startswith(
        {0: "is very dark", 128: "is flat, with hardly any light and shade", 255: "is overexposed"}[
            grey
        ]
    )


@pytest.mark.parametrize(
    ("orientation", "remark"),
    [
        (1, None),
        (2, "was stored as in a mirror; it is used the right way round"),
        (3, "was stored upside down; it is used upright"),
        (4, "was stored upside down; it is used upright"),
        (5, "was stored lying on its side; it is used upright"),
        (6, "was stored lying on its side; it is used upright"),
        (7, "was stored lying on its side; it is used upright"),
        (8, "was stored lying on its side; it is used upright"),
    ],
)
def test_a_turned_photo_is_remarked_upon_and_used_upright(tmp_path, run, orientation, remark):
    scene(1).save(tmp_path / "a.jpg", exif=exif(orientation))
    (row,) = check_photos(tmp_path, 128).photos
    assert row.issues == ()
    assert row.remarks == ((remark,) if remark else ())
    assert row.stored_upright is (orientation == 1)
    photos, events = load(tmp_path, run)
    assert photos.photos[0].issues == row.remarks
    assert photos.photos[0].original_px == ((240, 180) if orientation >= 5 else (180, 240))
    assert texts(events, warning=False) == ([f"a.jpg {remark}"] if remark else [])


def test_location_is_remarked_upon_and_never_copied(folder, run):
    scene(7).save(folder / "IMG_7.jpg", exif=exif(located=True))
    photos, events = load(folder, run)
    remark = "says where it was taken; that is left out of everything DreamLoom writes"
    assert photos.photos[-1].issues == (remark,)
    assert texts(events) == [f"IMG_7.jpg {remark}"]
    assert check_photos(folder, 128).photos[-1].has_location
    for path in photos.paths():
        content = path.read_bytes()
        chunks = {content[at - 4 : at] for at in range(16, len(content)) if _is_chunk(content, at)}
        assert chunks == {b"IHDR", b"IDAT", b"IEND"}


def _is_chunk(content, at):
    """Walk the PNG's chunks up to ``at``."""
    place = 8
    while place + 8 < at:
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return place + 8 == at


def test_issues_are_noted_as_warnings(folder, run):
    scene(9).filter(ImageFilter.GaussianBlur(6)).save(folder / "soft.png")
    _, events = load(folder, run)
    (text,) = texts(events, warning=True)
    assert text.startswith("soft.png is blurred")
    assert events[-1].detail == "7 photos, 1 with issues"
    assert list(run.read_record("photos").results["issues"]) == ["soft.png"]


# What holds for the set


def test_copies_of_a_file_are_named(folder):
    shutil.copy(folder / "IMG_1.jpg", folder / "IMG_1 (1).jpg")
    shutil.copy(folder / "IMG_1.jpg", folder / "kopie.jpg")
    assert check_photos(folder, 128).notes == (
        "IMG_1 (1).jpg, IMG_1.jpg, kopie.jpg are the same file: keep one of them",
    )


def test_nearly_the_same_pictures_are_named(folder):
    scene(1).resize((480, 360)).save(folder / "larger.png")
    scene(1).point(lambda value: round(value * 0.9)).save(folder / "darker.jpg", quality=50)
    scene(1).crop((3, 2, 238, 178)).save(folder / "cropped.png")
    assert check_photos(folder, 128).notes == (
        "IMG_1.jpg, cropped.png, darker.jpg, larger.png are nearly the same picture: "
        "keep the best of them",
    )


@pytest.mark.parametrize(
    ("count", "note"),
    [
        (1, "1 photo is few: 4 to 30 are usual, and about 6 good ones do well"),
        (3, "3 photos are few: 4 to 30 are usual, and about 6 good ones do well"),
        (4, None),
        (30, None),
        (
            31,
            "31 photos are many: 4 to 30 are usual; choose the best, or raise train.steps",
        ),
    ],
)
def test_few_and_many_photos(tmp_path, count, note):
    for number in range(count):
        scene(number, 64, 64).save(tmp_path / f"{number:02d}.png")
    assert check_photos(tmp_path, 64).notes == ((note,) if note else ())


def test_what_to_add(folder):
    assert check_photos(folder, 128).to_add == ()
    shutil.copy(folder / "IMG_1.jpg", folder / "copy.jpg")
    (folder / "IMG_2.jpg").unlink()
    kinds = "other places, other light, other sides, and one from close by"
    assert check_photos(folder, 128).to_add == (f"add 1 more good photo: {kinds}",)
    scene(3).resize((400, 300)).save(folder / "IMG_4.jpg")
    assert check_photos(folder, 128).to_add == (f"add 2 more good photos: {kinds}",)


def test_other_files_are_ignored_and_named(folder, run):
    for name in ("notes.txt", ".DS_Store", "Thumbs.db", "._IMG_1.jpg", "._IMG_1.mask.png"):
        (folder / name).write_text("other things")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "raw").mkdir()
    scene(8).save(folder / "raw" / "IMG_8.jpg")
    photos, events = load(folder, run)
    assert len(photos.photos) == 6
    assert list(photos.notes) == texts(events, warning=False)
    assert photos.notes == (
        "ignored 2 files that are not pictures: .DS_Store, Thumbs.db",
        "ignored 1 text that belongs to no picture: notes.txt",
        "ignored 2 hidden files: ._IMG_1.jpg, ._IMG_1.mask.png",
        "did not look into 2 folders: .ipynb_checkpoints, raw",
    )


def test_only_a_few_ignored_files_are_named(folder):
    for number in range(8):
        (folder / f"{number}.txt").touch()
    assert check_photos(folder, 128).notes == (
        "ignored 8 texts that belong to no picture: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more",
    )


# What is no set of photos


def test_no_folder(tmp_path, run):
    with pytest.raises(PhotoError, match=r"^There is no folder .*nowhere\. Check the path\.$"):
        load(tmp_path / "nowhere", run)


def test_a_file_in_place_of_a_folder(folder, run):
    with pytest.raises(PhotoError, match=r"IMG_0\.jpg is a file, not a folder\. Name the folder"):
        load(folder / "IMG_0.jpg", run)


def test_no_photos(tmp_path, run):
    with pytest.raises(PhotoError, match=r"^There is no photo in .*\.$") as error:
        load(tmp_path, run)
    assert error.value.hint == (
        "Put about 6 photos of the subject there; "
        "DreamLoom reads AVIF, BMP, GIF, HEIC, JPEG, PNG, TIFF and WebP."
    )
    (tmp_path / "IMG_1.dng").touch()
    with pytest.raises(
        PhotoError, match=r"\(left out 1 picture, of a format that is not read: IMG_1"
    ):
        load(tmp_path, run)


def test_a_run_does_not_take_its_own_copies_for_originals(folder, run):
    load(folder, run)
    load_class(folder, run)
    before = state(run)
    with pytest.raises(PhotoError, match="is where the run keeps its own copies"):
        load(run.photos, run)
    with pytest.raises(PhotoError, match="is where the run keeps its own copies"):
        load_class(run.path / "photos" / ".." / "priors", run)
    assert state(run) == before


def test_a_folder_that_may_not_be_read(folder, run, monkeypatch):
    def locked(_path):
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(PhotoError, match="may not be read"):
        load(folder, run)


def test_a_file_that_may_not_be_read(folder, run, monkeypatch):
    def locked(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dreamloom.data.photos.listing.file_sha256", locked)
    with pytest.raises(PhotoError, match=r"IMG_0\.jpg cannot be read: Permission denied\."):
        load(folder, run)


def spoil(folder, name):
    """Put a file there that has a picture's name and is none."""
    content = {
        "cut.jpg": (folder / "IMG_0.jpg").read_bytes()[:2000],
        "empty.jpg": b"",
        "text.jpg": b"Dear diary",
    }
    (folder / name).write_bytes(content[name])


@pytest.mark.parametrize("name", ["cut.jpg", "empty.jpg", "text.jpg"])
def test_an_unreadable_photo_is_named_and_nothing_is_written(folder, run, name):
    spoil(folder, name)
    with pytest.raises(PhotoError, match=name) as error:
        load(folder, run)
    assert "copy it again" in error.value.hint or "Remove it" in error.value.hint
    assert state(run) == {}


def test_all_unreadable_photos_are_named_at_once(folder, run):
    for name in ("cut.jpg", "empty.jpg", "text.jpg"):
        spoil(folder, name)
    with pytest.raises(PhotoError, match=r"^3 of 9 pictures cannot be used: ") as error:
        load(folder, run)
    assert all(name in error.value.problem for name in ("cut.jpg", "empty.jpg", "text.jpg"))
    assert error.value.hint.count("save it again as JPEG or PNG") == 1


@pytest.mark.parametrize(
    ("size", "problem", "hint"),
    [
        ((200, 20), "has 200 × 20 pixels, but each side must have 32 or more.", "Replace it"),
        ((500, 40), "has 500 × 40 pixels, more than 10 times as long as wide.", "Cut out"),
    ],
)
def test_a_sliver_is_refused(folder, run, size, problem, hint):
    scene(9, *size).save(folder / "sliver.png")
    with pytest.raises(PhotoError) as error:
        load(folder, run)
    assert error.value.problem.endswith(problem)
    assert error.value.hint.startswith(hint)


# The check, which writes nothing


def test_the_check_has_a_row_for_what_cannot_be_read(folder):
    spoil(folder, "text.jpg")
    check = check_photos(folder, 128)
    row = check.photos[-1]
    assert row.file == "text.jpg"
    assert "text.jpg is not a picture that can be read. Remove it" in row.unreadable
    assert (row.original_px, row.sharpness, row.issues) == (None, None, ())
    assert not check.usable


def test_the_check_says_what_loading_says_and_writes_nothing(folder, run):
    scene(9, 100, 300).filter(ImageFilter.GaussianBlur(9)).save(folder / "odd.jpg", exif=exif(6))
    shutil.copy(folder / "IMG_1.jpg", folder / "copy.jpg")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    progress = []
    check = check_photos(folder, 128, progress.append)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [event.done for event in progress] == list(range(1, 9))
    photos, _ = load(folder, run)
    assert check.usable
    assert check.notes == photos.notes
    assert [row.file for row in check.photos] == [p.source for p in photos.photos]
    assert [row.issues + row.remarks for row in check.photos] == [p.issues for p in photos.photos]
    assert [row.original_px for row in check.photos] == [p.original_px for p in photos.photos]


def test_the_check_is_plain_json(folder):
    row = json.loads(check_photos(folder, 128).model_dump_json())["photos"][0]
    assert row["sharpness"] > 100
    assert row == {
        "file": "IMG_0.jpg",
        "faces": None,
        "original_px": [180, 240],
        "stored_upright": True,
        "has_location": False,
        "sharpness": row["sharpness"],
        "caption": "",
        "has_box": False,
        "mask": "",
        "unreadable": "",
        "issues": [],
        "remarks": [],
    }


# Again, and interrupted


def test_the_same_photos_are_prepared_once(folder, run):
    first, _ = load(folder, run)
    before = state(run)
    again, events = load(folder, run)
    assert again == first
    assert state(run) == before
    assert events == [StageSkipped("photos", "the 6 photos are prepared already")]


def change_photo(folder, _run):
    scene(77).save(folder / "IMG_3.jpg")


def remove_photo(folder, _run):
    (folder / "IMG_3.jpg").unlink()


def rename_photo(folder, _run):
    (folder / "IMG_3.jpg").rename(folder / "IMG_9.jpg")


def lose_copy(_folder, run):
    (run.photos / "03.png").unlink()


def damage_copy(_folder, run):
    (run.photos / "03.png").write_bytes(b"no picture")


def damage_manifest(_folder, run):
    (run.photos / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [change_photo, remove_photo, rename_photo, lose_copy, damage_copy, damage_manifest],
)
def test_whatever_changed_is_prepared_again(folder, run, change):
    load(folder, run)
    change(folder, run)
    photos, events = load(folder, run)
    assert isinstance(events[-1], StageDone)
    assert [p.source for p in photos.photos] == sorted(path.name for path in folder.iterdir())
    assert {path.name for path in run.photos.iterdir()} == {
        "manifest.json",
        *(p.file for p in photos.photos),
    }
    for photo, path in zip(photos.photos, photos.paths(), strict=True):
        assert open_upright(path).size == photo.scaled_px[::-1]


def test_another_resolution_is_prepared_again(folder, run):
    load(folder, run)
    assert load(folder, run, 96)[0].photos[0].scaled_px == (96, 128)


def test_what_was_prepared_stays_when_new_photos_cannot_be(folder, run):
    load(folder, run)
    before = state(run)
    spoil(folder, "cut.jpg")
    with pytest.raises(PhotoError):
        load(folder, run)
    assert state(run) == before


def test_an_interruption_leaves_nothing_behind(folder, run):
    def interrupt(event):
        if isinstance(event, Progress) and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_photos(folder, run, 128, interrupt)
    assert state(run) == {}


# Class images


def load_class(folder, run, resolution_px=64, prompt="a photo of a dog"):
    events = []
    return load_class_images(folder, run, resolution_px, prompt, events.append), events


def test_class_images_become_centred_squares(folder, run):
    lying = scene(9).transpose(Image.Transpose.ROTATE_90)
    lying.save(folder / "IMG_9.png", exif=exif(6))
    priors, events = load_class(folder, run)
    assert priors.folder == run.priors
    assert priors.prompt == "a photo of a dog"
    assert priors.files == tuple(f"0{n}.png" for n in range(7))
    for path in priors.paths():
        with Image.open(path) as image:
            assert (image.size, image.mode, image.info) == ((64, 64), "RGB", {})
    middle = scene(9).crop((30, 0, 210, 180)).resize((64, 64), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(open_upright(priors.paths()[-1]), float) - np.asarray(middle))
    assert difference.mean() < 2
    assert read_class_image_set(run.priors) == priors
    assert not texts(events)
    record = run.read_record("priors")
    assert record.inputs["class_images"] == priors.made_from
    assert record.results == {"class_images": 7, "notes": []}
    assert len(record.outputs) == 8


def test_small_class_images_are_enlarged_and_named(folder, run):
    (folder / "notes.txt").touch()
    scene(9, 60, 40).save(folder / "small.png")
    priors, events = load_class(folder, run)
    assert open_upright(priors.paths()[-1]).size == (64, 64)
    assert texts(events) == [
        "ignored 1 text that belongs to no picture: notes.txt",
        "enlarged 1 class image smaller than 64 pixels: small.png",
    ]


def test_a_hundred_and_one_images_get_three_digits(tmp_path, run):
    for number in range(101):
        scene(number, 32, 32).save(tmp_path / f"{number:03d}.bmp")
    assert load_class(tmp_path, run, 32)[0].files[-1] == "100.png"


def test_class_images_are_prepared_once(folder, run):
    first, _ = load_class(folder, run)
    again, events = load_class(folder, run)
    assert again == first
    assert events == [StageSkipped("priors", "the 6 class images are prepared already")]
    other, events = load_class(folder, run, prompt="a photo of a cat")
    assert other.prompt == "a photo of a cat"
    assert isinstance(events[-1], StageDone)
    change_photo(folder, run)
    assert load_class(folder, run)[0].made_from != first.made_from


def test_an_unreadable_class_image_is_named_and_nothing_is_written(folder, run):
    spoil(folder, "cut.jpg")
    with pytest.raises(PhotoError, match=r"cut\.jpg cannot be read"):
        load_class(folder, run)
    assert state(run) == {}


# The examples


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("make_examples")


def test_the_example_photos_are_good_and_one_lies_on_its_side():
    check = check_photos(EXAMPLES / "rraj", 128)
    assert [row.file for row in check.photos] == [f"IMG_000{n}.jpg" for n in range(1, 7)]
    assert not any(row.issues for row in check.photos)
    assert (check.notes, check.to_add) == ((), ())
    assert [row.stored_upright for row in check.photos].count(False) == 1
    assert [row.has_location for row in check.photos].count(True) == 1
    assert sum(path.stat().st_size for path in (EXAMPLES / "rraj").iterdir()) < 1_500_000


def test_an_example_photo_is_drawn_to_the_same_bytes_again(maker, tmp_path):
    (tmp_path / "again").mkdir()
    first = maker.write_shot(3, tmp_path)
    again = maker.write_shot(3, tmp_path / "again")
    assert sha256(first.read_bytes()).digest() == sha256(again.read_bytes()).digest()
    # Another version of Pillow may compress a little differently.
    committed = np.asarray(open_upright(EXAMPLES / "rraj" / "IMG_0003.jpg"), dtype=float)
    assert np.abs(np.asarray(open_upright(first), dtype=float) - committed).mean() < 1


def test_the_example_style_is_crisp_captioned_and_as_drawn(maker):
    folder = EXAMPLES / "pixel-art"
    pictures = sorted(folder.glob("*.png"))
    assert [path.name for path in pictures] == [f"{n:02d}.png" for n in range(1, 13)]
    for number, path in enumerate(pictures, start=1):
        image, caption = maker.draw_style_picture(number)
        stored = open_upright(path)
        pixels = np.asarray(stored)
        assert pixels.shape == (512, 512, 3)
        assert (pixels == np.asarray(image)).all()
        assert (pixels == pixels[::32, ::32].repeat(32, axis=0).repeat(32, axis=1)).all()
        assert len(stored.getcolors()) <= 14
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == caption + "\n"
        assert caption.startswith("pixel, a photo of a ")


def test_a_text_beside_a_photo_is_its_caption(folder, run):
    (folder / "IMG_1.txt").write_text("pixel, a photo\n  of a dog\n", encoding="utf-8")
    (folder / "notes.txt").write_text("of no picture", encoding="utf-8")
    photos = load_photos(folder, run, 64)
    assert [photo.caption for photo in photos.photos] == [
        *("", "pixel, a photo of a dog"),
        *("", "", "", ""),
    ]
    assert any("notes.txt" in note for note in photos.notes)
    assert not any("IMG_1.txt" in note for note in photos.notes)
    (folder / "IMG_1.txt").write_text("pixel, a photo of a cat", encoding="utf-8")
    again = load_photos(folder, run, 64)
    assert again.photos[1].caption == "pixel, a photo of a cat"
    assert again.fingerprint != photos.fingerprint
    (folder / "IMG_1.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PhotoError, match=r"IMG_1\.txt cannot be read as text"):
        load_photos(folder, run, 64)
    with pytest.raises(PhotoError, match=r"IMG_1\.txt cannot be read as text"):
        fingerprint_photos(folder, 64)


@pytest.mark.parametrize("inside", ["file", "metadata"])
def test_lines_of_a_caption_are_joined_unless_each_is_one(folder, run, inside):
    text = "pixel,  a dog\n\n a dog, pixel \n"
    if inside == "file":
        (folder / "IMG_1.txt").write_text(text, encoding="utf-8")
    else:
        tell(folder, {"file_name": "IMG_1.jpg", "text": text})
    (folder / "IMG_2.txt").write_text(" one   line\n", encoding="utf-8")
    joined = load_photos(folder, run, 64)
    captions = [photo.caption for photo in joined.photos]
    assert captions[1:3] == ["pixel, a dog a dog, pixel", "one line"]
    told = any(note.startswith("1 caption has several lines") for note in joined.notes)
    assert told == (inside == "file")
    kept = load_photos(folder, run, 64, keep_lines=True)
    assert [photo.caption for photo in kept.photos][1:3] == [
        *("pixel, a dog\na dog, pixel", "one line")
    ]
    assert not any("several lines" in note for note in kept.notes)
    assert kept.fingerprint == fingerprint_photos(folder, 64, keep_lines=True)
    assert joined.fingerprint == fingerprint_photos(folder, 64) != kept.fingerprint


def test_of_captions_of_one_line_the_fingerprint_is_always_the_same(folder, run):
    """So that a run is known again."""
    (folder / "IMG_1.txt").write_text("pixel, a dog\n", encoding="utf-8")
    assert fingerprint_photos(folder, 64) == fingerprint_photos(folder, 64, keep_lines=True)


@given(st.text("ab \t\n\r\x0b\x0c\x1c\x85\u2028", max_size=12))
def test_joined_lines_are_the_words_with_spaces_between(text):
    """As captions were always read."""
    assert " ".join(tidy_lines(text).splitlines()) == " ".join(text.split())


# Shapes


def buckets(folder, run, resolution_px=64, step_px=8):
    return load_photos(folder, run, resolution_px, shape="buckets", step_px=step_px)


def test_squares_are_cut_unless_buckets_are_asked_for(folder, run):
    assert {p.bucket_px for p in load(folder, run)[0].photos} == {(128, 128)}


def test_each_photo_gets_the_bucket_of_its_shape_and_just_covers_it(folder, run):
    scene(8, 180, 300).save(folder / "high.png")
    scene(9, 200, 200).save(folder / "square.png")
    photos = buckets(folder, run)
    assert (photos.shape, photos.step_px) == ("buckets", 8)
    shapes = {p.source: (p.bucket_px, p.scaled_px) for p in photos.photos}
    assert shapes["IMG_0.jpg"] == ((56, 72), (56, 75))
    assert shapes["high.png"] == ((80, 48), (80, 48))
    assert shapes["square.png"] == ((64, 64), (64, 64))
    for photo, path in zip(photos.photos, photos.paths(), strict=True):
        assert open_upright(path).size == photo.scaled_px[::-1]
    assert read_photo_set(run.photos) == photos


def test_a_photo_that_a_bucket_shows_whole_is_not_called_wide_or_small(tmp_path):
    scene(1, 200, 100).save(tmp_path / "wide.png")
    scene(2, 75, 60).save(tmp_path / "near.png")
    squares = {row.file: row.issues for row in check_photos(tmp_path, 72).photos}
    assert [len(squares[name]) for name in ("near.png", "wide.png")] == [1, 0]
    check = check_photos(tmp_path, 64, shape="buckets", step_px=8)
    assert {row.issues for row in check.photos} == {()}
    scene(1, 700, 100).save(tmp_path / "wide.png")
    (issue,) = check_photos(tmp_path, 64, shape="buckets", step_px=8).photos[1].issues
    assert issue == (
        "is very wide (7.0 to 1): only parts of 80 × 48 of it are seen at a time, so cut out the "
        "part with the subject"
    )
    scene(1, 70, 50).save(tmp_path / "wide.png")
    (issue,) = check_photos(tmp_path, 64, shape="buckets", step_px=8).photos[1].issues
    assert issue.startswith("is small (70 × 50 pixels): it will be enlarged to 72 × 56, ")


# metadata.jsonl


def tell(folder, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def by_source(photos):
    return {photo.source: photo for photo in photos.photos}


def test_metadata_gives_captions_boxes_and_masks(folder, run):
    disc(240, 180).save(folder / "cut-out.png")
    tell(
        folder,
        {"file_name": "IMG_0.jpg", "text": "rraj person\n in  the snow"},
        "",
        {"file_name": "IMG_3.jpg", "box": [30, 40.5, 130, 140]},
        {"file_name": "IMG_4.jpg", "mask": "cut-out.png", "text": None, "box": None},
    )
    photos, events = load(folder, run, 90)
    found = by_source(photos)
    assert len(found) == 6
    assert found["IMG_0.jpg"].caption == "rraj person in the snow"
    assert found["IMG_1.jpg"].caption == ""
    assert found["IMG_3.jpg"].given_box == (30, 40.5, 130, 140)
    assert found["IMG_3.jpg"].box_px == (20, 15, 70, 65)
    assert found["IMG_4.jpg"].mask == "04.mask.png"
    assert not texts(events)
    assert read_photo_set(run.photos) == photos
    assert check_photos(folder, 90).usable


def test_a_text_beside_a_photo_goes_before_metadata_which_is_noted(folder, run):
    (folder / "IMG_0.txt").write_text("from the text")
    (folder / "IMG_1.txt").write_text("the same")
    (folder / "IMG_2.txt").write_text(" \n")
    disc(240, 180).save(folder / "IMG_3.mask.png")
    Image.new("L", (240, 180), 255).save(folder / "other.png")
    tell(
        folder,
        {"file_name": "IMG_0.jpg", "text": "from metadata"},
        {"file_name": "IMG_1.jpg", "text": "the same"},
        {"file_name": "IMG_2.jpg", "text": "for an empty text"},
        {"file_name": "IMG_3.jpg", "mask": "other.png"},
    )
    photos, events = load(folder, run)
    assert [p.caption for p in photos.photos[:3]] == [
        "from the text",
        "the same",
        "for an empty text",
    ]
    assert texts(events) == [
        "IMG_0.jpg: IMG_0.txt goes before the text in metadata.jsonl",
        "IMG_3.jpg: IMG_3.mask.png goes before the mask in metadata.jsonl",
    ]
    assert (
        photos.photos[3].mask_sha256 == sha256((folder / "IMG_3.mask.png").read_bytes()).hexdigest()
    )


def test_fields_that_mean_nothing_here_are_named(folder, run):
    tell(folder, {"file_name": "IMG_0.jpg", "tags": "a dog", "label": 3})
    photos, _ = load(folder, run)
    assert photos.notes == ("metadata.jsonl: ignored 2 fields: tags, label",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{half", r"this is not JSON: Expecting property name .*\. Mend that line"),
        ("[1, 2]", "this is not a JSON object"),
        ('{"text": "a dog"}', "file_name is missing"),
        ('{"file_name": 3}', "file_name is missing"),
        ('{"file_name": "gone.jpg"}', r"gone\.jpg is no photo in this folder"),
        ('{"file_name": "raw/IMG_1.jpg"}', r"raw/IMG_1\.jpg is no photo in this folder"),
        ('{"file_name": "IMG_1.jpg"}', r"IMG_1\.jpg was described by an earlier line already"),
        ('{"file_name": "IMG_0.jpg", "text": ["a"]}', r'text must be text, but is \["a"\]'),
        (
            '{"file_name": "IMG_0.jpg", "box": [1, 2, 3]}',
            r"box must be four numbers, .*\[1, 2, 3\]",
        ),
        ('{"file_name": "IMG_0.jpg", "box": [9, 2, 3, 4]}', "box must be .* with left < right"),
        ('{"file_name": "IMG_0.jpg", "box": [1, 2, true, 4]}', "box must be four numbers"),
        ('{"file_name": "IMG_0.jpg", "box": [NaN, 2, 3, 4]}', "box must be four numbers"),
        ('{"file_name": "IMG_0.jpg", "box": "all"}', "box must be four numbers"),
        ('{"file_name": "IMG_0.jpg", "mask": "gone.png"}', r"there is no mask gone\.png"),
        ('{"file_name": "IMG_0.jpg", "mask": 1}', "mask must name a file, but is 1"),
        ('{"file_name": "IMG_0.jpg", "mask": "../run"}', r"the mask \.\./run lies outside of"),
        ('{"file_name": "IMG_0.jpg", "mask": "IMG_0.jpg"}', r"IMG_0\.jpg is named as a mask"),
    ],
)
def test_a_line_that_cannot_be_meant_is_named_with_its_number(folder, run, line, message):
    tell(folder, {"file_name": "IMG_1.jpg", "text": "a dog"}, "", line)
    for read in (
        load,
        lambda *_: check_photos(folder, 64),
        lambda *_: fingerprint_photos(folder, 64),
    ):
        with pytest.raises(PhotoError, match=rf"metadata\.jsonl, line 3: {message}") as error:
            read(folder, run)
        assert error.value.hint
    assert state(run) == {}


def test_metadata_that_is_no_text_is_refused(folder, run):
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(
        PhotoError, match=r"metadata\.jsonl cannot be read as text\. Save it as UTF-8"
    ):
        load(folder, run)


def test_a_box_outside_of_its_photo_is_named_with_its_line(folder, run):
    tell(folder, {"file_name": "IMG_2.jpg", "box": [10, 10, 180, 200]})
    with pytest.raises(PhotoError) as error:
        load(folder, run)
    assert error.value.problem == (
        f"{folder / 'metadata.jsonl'}, line 1: the box [10, 10, 180, 200] does not lie inside "
        "IMG_2.jpg, which has 240 × 180 pixels."
    )
    row = check_photos(folder, 64).photos[2]
    assert "line 1: the box [10, 10, 180, 200]" in row.unreadable


def test_a_box_is_of_the_upright_photo(tmp_path, run):
    scene(1).save(tmp_path / "a.jpg", exif=exif(6))
    tell(tmp_path, {"file_name": "a.jpg", "box": [0, 200, 180, 240]})
    assert load(tmp_path, run, 90)[0].photos[0].box_px == (100, 0, 120, 90)


def test_a_subject_larger_than_a_crop_is_remarked_upon(folder, run):
    tell(folder, {"file_name": "IMG_2.jpg", "box": [0, 0, 240, 100]})
    photos, _ = load(folder, run)
    assert photos.photos[2].issues == (
        "has a subject larger than a crop; the middle of its box is kept",
    )


# Masks


def disc(width, height, box=(60, 30, 140, 110)):
    """A mask whose subject fills a box: left, top, right and bottom."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def test_a_mask_beside_a_photo_is_scaled_with_it_and_gives_its_box(folder, run):
    disc(240, 180).save(folder / "IMG_1.mask.png")
    photos, events = load(folder, run, 90)
    assert [p.source for p in photos.photos] == [f"IMG_{n}.jpg" for n in range(6)]
    masked = photos.photos[1]
    assert masked.box_px == (15, 30, 55, 70)
    assert [photo.mask for photo in photos.photos] == ["", "01.mask.png", "", "", "", ""]
    with Image.open(photos.folder / "01.mask.png") as mask:
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (120, 90))
        assert mask.getpixel((50, 35)) == 255
        assert mask.getpixel((10, 5)) == mask.getpixel((80, 35)) == 0
    assert not texts(events)
    assert run.read_record("photos").inputs["mask IMG_1.jpg"] == masked.mask_sha256
    assert "photos/01.mask.png" in run.read_record("photos").outputs


def test_a_box_that_is_told_goes_before_the_one_around_the_mask(folder, run):
    disc(240, 180).save(folder / "IMG_1.mask.png")
    tell(folder, {"file_name": "IMG_1.jpg", "box": [0, 0, 80, 80]})
    assert load(folder, run, 90)[0].photos[1].box_px == (0, 0, 40, 40)


def test_masks_may_lie_in_a_folder_of_their_own(folder, run):
    (folder / "masks").mkdir()
    disc(240, 180).save(folder / "masks" / "one.png")
    tell(folder, {"file_name": "IMG_1.jpg", "mask": "masks/../masks/one.png"})
    photos, _ = load(folder, run)
    assert photos.photos[1].mask == "01.mask.png"
    assert photos.notes == ()


def test_a_mask_without_a_photo_is_ignored_and_named(folder, run):
    disc(240, 180).save(folder / "IMG_9.mask.png")
    photos, _ = load(folder, run)
    assert len(photos.photos) == 6
    assert photos.notes == ("ignored 1 mask without a photo: IMG_9.mask.png",)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_mask_of_the_upright_size_is_upright(tmp_path, run, orientation):
    scene(1).save(tmp_path / "a.jpg", exif=exif(orientation))
    size = (180, 240) if orientation >= 5 else (240, 180)
    disc(*size, (0, 0, 40, 30)).save(tmp_path / "a.mask.png")
    assert load(tmp_path, run, 90)[0].photos[0].box_px == (0, 0, 15, 20)


@pytest.mark.parametrize(
    ("orientation", "box"),
    [
        (5, (0, 0, 20, 15)),
        (6, (0, 75, 20, 90)),
        (7, (100, 75, 120, 90)),
        (8, (100, 0, 120, 15)),
    ],
)
def test_a_mask_of_the_stored_size_is_turned_with_its_photo(tmp_path, run, orientation, box):
    scene(1).save(tmp_path / "a.jpg", exif=exif(orientation))
    disc(240, 180, (0, 0, 40, 30)).save(tmp_path / "a.mask.png")
    assert load(tmp_path, run, 90)[0].photos[0].box_px == box


@pytest.mark.parametrize(
    ("mask", "problem", "hint"),
    [
        (
            Image.new("L", (120, 90), 255),
            "has 120 × 90 pixels, but its photo has 240 × 180.",
            "Save the mask in the size",
        ),
        (
            Image.new("L", (180, 240), 255),
            "has 180 × 240 pixels, but its photo has 240 × 180.",
            "Save the mask in the size",
        ),
        (
            Image.new("L", (240, 180)),
            "marks nothing: nowhere is it lighter than middle grey.",
            "Paint the subject white",
        ),
        (Image.new("L", (240, 180), 1), "marks nothing", "Paint the subject white"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(folder, run, mask, problem, hint):
    mask.save(folder / "IMG_1.mask.png")
    with pytest.raises(PhotoError) as error:
        load(folder, run)
    assert problem in error.value.problem
    assert "IMG_1.mask.png" in error.value.problem
    assert error.value.hint.startswith(hint)
    assert problem in check_photos(folder, 64).photos[1].unreadable
    assert state(run) == {}


def test_an_unreadable_mask_is_named(folder, run):
    (folder / "IMG_1.mask.png").write_bytes(b"Dear diary")
    with pytest.raises(PhotoError, match=r"IMG_1\.mask\.png is not a picture that can be read"):
        load(folder, run)


def test_class_images_have_neither_captions_nor_masks(folder, run):
    (folder / "IMG_0.txt").write_text("a dog")
    disc(240, 180).save(folder / "IMG_1.mask.png")
    tell(folder, "{half")
    priors, events = load_class(folder, run)
    assert len(priors.files) == 6
    assert texts(events) == [
        "ignored 1 text that belongs to no picture: metadata.jsonl",
        "ignored 2 files beside class images, which have one prompt and no masks: "
        "IMG_0.txt, IMG_1.mask.png",
    ]


# Cut out of the background


def cut_out(number, box=(60, 30, 140, 110), size=(240, 180)):
    image = scene(number, *size).convert("RGBA")
    image.putalpha(disc(*size, box))
    return image


def test_a_photo_that_is_cut_out_has_its_alpha_for_a_mask(folder, run):
    cut_out(1).save(folder / "IMG_1.png")
    (folder / "IMG_1.jpg").unlink()
    photos, events = load(folder, run, 90)
    cut = photos.photos[1]
    assert (cut.mask, cut.box_px, cut.mask_sha256) == ("01.mask.png", (15, 30, 55, 70), "")
    with Image.open(photos.folder / "01.mask.png") as mask:
        assert mask.getpixel((50, 35)) == 255
        assert mask.getpixel((10, 5)) == 0
    assert texts(events, warning=True) == []
    (note,) = texts(events)
    assert note.startswith("IMG_1.png is cut out of its background: ")
    assert "objective.background_weight" in note
    assert photos.fingerprint == fingerprint_photos(folder, 90)
    assert check_photos(folder, 90).photos[1].mask == "its own transparency"


def test_a_mask_beside_a_photo_goes_before_its_alpha(folder, run):
    cut_out(1).save(folder / "a.png")
    disc(240, 180, (0, 0, 80, 80)).save(folder / "a.mask.png")
    photos, events = load(folder, run, 90)
    assert photos.photos[-1].box_px == (0, 0, 40, 40)
    assert texts(events) == ["a.png is transparent in places, which show white"]


def test_what_is_hardly_transparent_has_no_mask(folder, run):
    image = scene(9).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 250))
    image.save(folder / "a.png")
    photos, events = load(folder, run, 90)
    assert photos.photos[-1].mask == ""
    assert texts(events) == ["a.png is transparent in places, which show white"]


def test_a_photo_that_is_transparent_everywhere_is_refused(folder, run):
    cut_out(1, (0, 0, 0, 0)).save(folder / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png is transparent everywhere"):
        load(folder, run)


def test_a_cut_out_photo_is_judged_by_what_is_opaque(folder):
    small = (90, 60, 130, 110)
    assert issues_of(cut_out(9, small), folder) == ()
    dark = cut_out(9, small).convert("RGBA")
    dark = Image.merge(
        "RGBA", [*(b.point(lambda v: v // 6) for b in dark.split()[:3]), dark.getchannel("A")]
    )
    (issue,) = issues_of(dark, folder)
    assert issue.startswith("is very dark")
    soft = scene(9, 480, 360).filter(ImageFilter.GaussianBlur(8)).convert("RGBA")
    soft.putalpha(disc(480, 360, (120, 60, 280, 220)))
    (issue,) = issues_of(soft, folder)
    assert issue.startswith("is blurred")


@pytest.mark.parametrize("upright", [True, False])
def test_black_bars_are_named_and_no_darkness(folder, upright):
    photo = Image.new("RGB", (600, 300) if upright else (300, 600))
    photo.paste(scene(9, 300, 300).point(lambda v: v // 2), (150, 0) if upright else (0, 150))
    assert issues_of(photo, folder) == (
        "has black bars at its edges, which would be learned as part of it: cut them off",
    )


def test_a_night_sky_is_no_bar(folder):
    photo = scene(9)
    photo.paste(0, (0, 0, 240, 60))
    assert issues_of(photo, folder) == ()


# Very large


def test_a_very_large_photo_is_read_smaller_with_its_box_and_mask(folder, run, monkeypatch):
    scene(1, 960, 720).save(folder / "IMG_1.jpg", quality=95, exif=exif(3))
    scene(2, 960, 720).save(folder / "IMG_2.jpg", quality=95)
    disc(960, 720, (240, 120, 560, 440)).save(folder / "IMG_1.mask.png")
    tell(folder, {"file_name": "IMG_2.jpg", "box": [240, 120, 560, 440]})
    whole, _ = load(folder, RunFolder(run.path.with_name("whole")), 90)
    monkeypatch.setattr(picture_files, "MOST_BYTES", 960 * 720 * 7)
    photos, _ = load(folder, run, 90)
    for large, small in zip(whole.photos[1:3], photos.photos[1:3], strict=True):
        said = "is very large; it is read at 480 × 360 pixels"
        assert small == large.model_copy(update={"issues": small.issues})
        assert (said in large.issues, said in small.issues) == (False, True)
        both = [
            np.asarray(open_upright(each.folder / small.file), float) for each in (whole, photos)
        ]
        assert np.abs(both[0] - both[1]).mean() < 3
    assert photos.photos[1].box_px == photos.photos[2].box_px == (15, 30, 55, 70)
    assert photos.fingerprint == whole.fingerprint == fingerprint_photos(folder, 90)


# Masks and captions in others' spelling


SPELLINGS = [
    "IMG_1-masklabel.png",
    "IMG_1_mask.png",
    "IMG_1-mask.png",
    "IMG_1.mask.jpg",
    "IMG_1.MASK.PNG",
    "img_1 Mask.webp",
    "IMG_1.jpg.mask.png",
    "mask_IMG_1.png",
    "IMG_1_masks.tif",
]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_mask_in_others_spelling_is_a_mask(folder, run, name):
    disc(240, 180).save(folder / name)
    photos, events = load(folder, run, 90)
    assert [p.source for p in photos.photos] == [f"IMG_{n}.jpg" for n in range(6)]
    assert photos.photos[1].mask == "01.mask.png"
    assert photos.photos[1].box_px == (15, 30, 55, 70)
    assert not texts(events)
    assert check_photos(folder, 90).photos[1].mask == name


def test_our_own_spelling_of_a_mask_goes_before_others(folder, run):
    disc(240, 180).save(folder / "IMG_1.mask.png")
    disc(240, 180, (0, 0, 40, 40)).save(folder / "IMG_1-mask.png")
    photos, _ = load(folder, run, 90)
    assert photos.photos[1].box_px == (15, 30, 55, 70)
    assert photos.notes == ("ignored 1 mask without a photo: IMG_1-mask.png",)


def test_a_photo_of_a_mask_is_a_photo_and_that_is_said(folder, run):
    scene(8).save(folder / "wooden_mask.jpg")
    photos, _ = load(folder, run)
    assert len(photos.photos) == 7
    assert photos.notes == (
        "took for a photo what is called a mask, as it is of no other photo: wooden_mask.jpg",
    )
    disc(240, 180).save(folder / "wooden_mask_mask.png")
    again = load(folder, run)[0]
    assert by_source(again)["wooden_mask.jpg"].mask == "06.mask.png"


def test_among_masks_of_one_spelling_one_without_a_photo_is_no_photo(folder, run):
    disc(240, 180).save(folder / "IMG_1-mask.png")
    disc(240, 180).save(folder / "IMG_9-mask.png")
    disc(240, 180).save(folder / "IMG_8-masklabel.png")
    photos, _ = load(folder, run)
    assert len(photos.photos) == 6
    assert photos.notes == ("ignored 2 masks without a photo: IMG_8-masklabel.png, IMG_9-mask.png",)


def test_a_coloured_picture_that_is_called_a_mask_is_refused_by_name(folder, run):
    scene(8).save(folder / "IMG_1_mask.jpg")
    with pytest.raises(PhotoError, match=r"IMG_1_mask\.jpg .* is in colour") as error:
        load(folder, run)
    assert "IMG_1.mask.png" in error.value.hint
    assert state(run) == {}


@pytest.mark.parametrize(
    "name", ["IMG_1.txt", "IMG_1.TXT", "img_1.txt", "IMG_1.caption", "IMG_1.jpg.txt"]
)
def test_a_caption_in_others_spelling_is_a_caption(folder, run, name):
    (folder / name).write_text("a photo of rraj person")
    photos, events = load(folder, run)
    assert [p.caption for p in photos.photos] == ["", "a photo of rraj person", *[""] * 4]
    assert not texts(events)
    row = check_photos(folder, 128).photos[1]
    assert row.caption == "a photo of rraj person"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_are_composed_otherwise_are_the_same(folder, run, forms):
    one, other = (unicodedata.normalize(form, "José") for form in forms)
    (folder / "IMG_1.jpg").rename(folder / f"{one}.jpg")
    (folder / f"{other}.txt").write_text("a photo of rraj person")
    disc(240, 180).save(folder / f"{other}-mask.png")
    tell(folder, {"file_name": f"{other}.jpg", "box": [0, 0, 80, 80]})
    photos, events = load(folder, run, 90)
    last = photos.photos[-1]
    assert (last.caption, last.mask) == ("a photo of rraj person", "05.mask.png")
    assert last.box_px == (0, 0, 40, 40)
    assert not texts(events)


def test_where_two_photos_differ_in_case_each_has_its_own(tmp_path):
    if not (tmp_path / "x").touch() and (tmp_path / "X").exists():
        pytest.skip("this file system knows no case")
    found = find_companions(
        [tmp_path / name for name in ("a.jpg", "A.jpg", "a-mask.png", "A-mask.png")],
        {tmp_path / name for name in ("a.txt", "A.txt")},
    )
    assert {path.name: text.name for path, text in found.captions.items()} == {
        "a.jpg": "a.txt",
        "A.jpg": "A.txt",
    }
    assert {path.name: mask.name for path, mask in found.masks.items()} == {
        "a.jpg": "a-mask.png",
        "A.jpg": "A-mask.png",
    }


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_gives_captions_boxes_and_masks(folder, run, delimiter):
    disc(240, 180).save(folder / "cut-out.png")
    rows = [
        ["file_name", "text", "box", "mask", "label"],
        ["IMG_0.jpg", '"rraj person,\n; ""smiling"""', "", "", "x"],
        ["IMG_1.jpg", "", '"[30, 40.5, 130, 140]"', "cut-out.png", ""],
    ]
    (folder / "metadata.csv").write_text(
        "\ufeff" + "\r\n".join(map(delimiter.join, rows)) + "\r\n", encoding="utf-8", newline=""
    )
    photos, _ = load(folder, run, 90)
    assert photos.photos[0].caption == 'rraj person, ; "smiling"'
    assert photos.photos[1].given_box == (30, 40.5, 130, 140)
    assert photos.photos[1].mask == "01.mask.png"
    assert len(photos.photos) == 6
    assert photos.notes == ("metadata.csv: ignored 1 field: label",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gone.jpg,a dog", r"line 3: gone\.jpg is no photo in this folder"),
        (",a dog", "line 3: file_name is missing"),
        ('IMG_0.jpg,,"[1, 2"', "line 3: box must be four numbers"),
        ("IMG_1.jpg,a dog", "line 3: .* was described by an earlier line already"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named_with_its_number(folder, run, row, message):
    (folder / "metadata.csv").write_text(f"file_name,text,box\nIMG_1.jpg,a dog,\n{row}\n")
    with pytest.raises(PhotoError, match=rf"metadata\.csv, {message}") as error:
        load(folder, run)
    assert error.value.hint


def test_a_table_of_other_things_is_named_and_so_is_one_beside_metadata_jsonl(folder, run):
    (folder / "metadata.csv").write_text("name,age\nme,3\n")
    note = ("ignored 1 text that belongs to no picture: metadata.csv",)
    assert load(folder, run)[0].notes == note
    tell(folder, {"file_name": "IMG_0.jpg", "caption": "a dog"})
    photos, _ = load(folder, run)
    assert photos.notes == note
    assert photos.photos[0].caption == "a dog"


def test_a_dead_link_and_a_picture_of_another_format_are_named(folder, run):
    (folder / "IMG_6.png").symlink_to(folder / "nowhere.png")
    for name in ("IMG_7.jxl", "IMG_8.CR2"):
        (folder / name).write_bytes(b"any")
    photos, _ = load(folder, run)
    assert photos.notes == (
        "left out 2 pictures, of formats that are not read: IMG_7.jxl, IMG_8.CR2; "
        "save as JPEG or PNG",
        "1 link leads nowhere: IMG_6.png",
    )


def test_a_name_that_is_not_utf8_is_written_out_and_prepared_once(folder, run):
    try:
        (folder / "IMG_1.jpg").rename(folder / os.fsdecode(b"Ren\xe9.jpg"))
    except OSError:
        pytest.skip("this file system takes no such names")
    (folder / os.fsdecode(b"Ren\xe9.txt")).write_text("a photo of rraj person")
    photos, _ = load(folder, run)
    found = by_source(photos)["Ren\\xe9.jpg"]
    assert found.caption == "a photo of rraj person"
    assert read_photo_set(run.photos) == photos
    assert isinstance(load(folder, run)[1][-1], StageSkipped)
    assert check_photos(folder, 64).model_dump_json()
    observe = run.observer()
    observe(Note("photos", str(folder / os.fsdecode(b"Ren\xe9.jpg"))))
    assert json.loads(run.events_file.read_text())["event"] == "Note"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_the_terminal_cannot_show_is_shown_escaped(folder, encoding):
    (folder / "IMG_1.jpg").rename(folder / "写真.jpg")
    done = subprocess.run(
        [sys.executable, "-m", "dreamloom", "photos", folder, "--resolution", "64"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u5199\\u771f.jpg" in done.stdout


def test_what_was_understood_is_told(folder, run):
    for number in (0, 1):
        (folder / f"IMG_{number}.txt").write_text("[trigger] in the snow")
    disc(240, 180).save(folder / "IMG_1.mask.png")
    tell(folder, {"file_name": "IMG_2.jpg", "box": [0, 0, 80, 80]})
    check = check_photos(folder, 64)
    assert check.understood == "6 photos: 2 with a caption, 1 with a mask, 1 with a box"
    assert check.photos[2].has_box
    _, events = load(folder, run, 64)
    assert events[-1].detail.endswith(", 2 with a caption, 1 with a mask, 1 with a box")
    assert check.notes == (
        "2 captions hold [trigger], which is taken as it stands: write the subject's words there",
    )


@pytest.mark.parametrize(
    ("captions", "unnamed"),
    [
        (["a photo of rraj person", "RRAJ, smiling", ""], 0),
        (["", ""], 0),
        (["a person", "a photo of rraj person"], 1),
        (["rrajesh in the snow", "[trigger]"], 2),
        # Each line of several is a caption.
        (["a photo of rraj person\na person"], 1),
    ],
)
def test_captions_that_never_name_the_subject_are_counted(captions, unnamed):
    found = judge_captions(captions, "rraj person", ["rraj"])
    if unnamed:
        assert found[0].startswith(f"{unnamed} of 2 captions never name the subject, rraj person")
    assert len(found) == bool(unnamed)


# Several pictures in a file


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_pictures_in_a_file_the_first_is_used_and_that_is_remarked(folder, run, suffix):
    frames = [scene(number, 120, 90) for number in (20, 21, 22)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    photos, _ = load(folder, run, 90)
    found = by_source(photos)[f"a.{suffix}"]
    assert found.issues == ("holds more than one picture; the first is used",)
    shown = np.asarray(open_upright(run.photos / found.file), float)
    assert np.abs(shown - np.asarray(frames[0], float)).mean() < 12


def test_a_file_of_one_picture_is_not_remarked_upon(folder):
    assert issues_of(scene(9), folder) == ()
    scene(10).save(folder / "one.gif")
    assert not any(row.remarks for row in check_photos(folder, 128).photos)


# The fingerprint


def caption_it(folder):
    (folder / "IMG_1.txt").write_text("a dog")


def tell_text(folder):
    tell(folder, {"file_name": "IMG_1.jpg", "text": "a dog"})


def tell_box(folder):
    tell(folder, {"file_name": "IMG_1.jpg", "box": [1, 1, 99, 99]})


def mask_it(folder):
    disc(240, 180).save(folder / "IMG_1.mask.png")


def swap_photo(folder):
    scene(77).save(folder / "IMG_1.jpg")


@pytest.mark.parametrize("change", [caption_it, tell_text, tell_box, mask_it, swap_photo])
def test_the_fingerprint_changes_with_all_that_is_told_and_so_does_the_set(folder, run, change):
    before = load(folder, run, 64)[0].fingerprint
    assert before == fingerprint_photos(folder, 64)
    change(folder)
    after, events = load(folder, run, 64)
    assert isinstance(events[-1], StageDone)
    assert after.fingerprint == fingerprint_photos(folder, 64) != before
    assert read_photo_set(run.photos).fingerprint == after.fingerprint


def test_another_mask_or_box_is_another_set(folder, run):
    mask_it(folder)
    first = load(folder, run, 64)[0].fingerprint
    disc(240, 180, (0, 0, 50, 50)).save(folder / "IMG_1.mask.png")
    second = load(folder, run, 64)[0].fingerprint
    tell(folder, {"file_name": "IMG_1.jpg", "box": [0, 0, 50, 50]})
    assert len({first, second, load(folder, run, 64)[0].fingerprint}) == 3


def test_the_fingerprint_changes_with_shape_and_step(folder, run):
    squares = load(folder, run, 64)[0]
    some = buckets(folder, run)
    coarse = buckets(folder, run, step_px=16)
    assert [s.fingerprint for s in (squares, some, coarse)] == [
        fingerprint_photos(folder, 64),
        fingerprint_photos(folder, 64, "buckets", 8),
        fingerprint_photos(folder, 64, "buckets", 16),
    ]
    assert len({s.fingerprint for s in (squares, some, coarse)}) == 3
    assert fingerprint_photos(folder, 64, step_px=8) == squares.fingerprint
    assert fingerprint_photos(folder, 32) != squares.fingerprint


def test_the_fingerprint_is_told_without_decoding(folder, monkeypatch):
    monkeypatch.setattr(image_io, "open_picture", lambda *_: pytest.fail("decoded"))
    mask_it_raw = folder / "IMG_1.mask.png"
    mask_it_raw.write_bytes(b"any bytes")
    assert len(fingerprint_photos(folder, 64)) == 64


def test_what_lies_beside_photos_is_prepared_once_too(folder, run):
    mask_it(folder)
    tell(folder, {"file_name": "IMG_2.jpg", "box": [1, 1, 99, 99], "text": "a dog"})
    first = buckets(folder, run)
    before = state(run)
    events = []
    again = load_photos(folder, run, 64, events.append, shape="buckets", step_px=8)
    assert again == first
    assert state(run) == before
    assert isinstance(events[-1], StageSkipped)
