"""What no score shows: the class before and after, and pictures off in colour or sharpness."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreamloom.core.manifests import read_image_set, write_manifest
from dreamloom.report.class_change import find_class_change
from dreamloom.report.off_pictures import find_off_pictures
from dreamloom.report.render import write_report
from dreamloom.report.samples import find_failures
from dreamloom.report.story import read_story
from test_report import Folder, pictures_in, section, visible

SUBJECT = [(f"a photo of rraj person in place {number}", "scene") for number in range(8)]
CLASS = [(f"a photo of a person in place {number}", "class") for number in range(7)]
SEEDS = 3


def base_picture(prompt: str, seed: int) -> Image.Image:
    """Large soft fields, their colours of the prompt, and a little of the seed."""
    of_prompt = np.random.default_rng(zlib.crc32(prompt.encode()))
    of_seed = np.random.default_rng([zlib.crc32(prompt.encode()), seed])
    fields = of_prompt.uniform(60, 190, (8, 8, 3)) + of_seed.normal(0, 12, (8, 8, 3))
    return Image.fromarray(fields.clip(0, 255).astype(np.uint8)).resize((64, 64), 0)


def tint(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * [0.6, 0.8, 1.0]).astype(np.uint8))


def retouch(image: Image.Image, prompt: str, seed: int) -> Image.Image:
    """Change a picture as any other drawing of the same thing would."""
    rng = np.random.default_rng([zlib.crc32(prompt.encode()), seed, 1])
    return Image.fromarray((np.asarray(image) + rng.normal(0, 4, 3)).clip(0, 255).astype(np.uint8))


def build(
    path: Path,
    change=lambda image, prompt, seed: image,
    *,
    prompts=None,
    seeds=SEEDS,
    base=base_picture,
):
    """Write a run where `change` says what the adapter makes of the base model's pictures."""

    def paint(name: str, prompt: str, seed: int) -> Image.Image:
        image = base(prompt, seed)
        return image if name.startswith("base") else change(image, prompt, seed)

    run = Folder(path, paint, seeds)
    run.settings()
    prompts = prompts or [*SUBJECT, *CLASS]
    for name, role in (("base", "base"), ("pictures", "subject")):
        images = run.pictures(name, prompts).model_copy(update={"role": role})
        write_manifest(images)
    return path


def test_a_class_that_turned_blue_is_told_as_bluer(tmp_path: Path):
    run = build(
        tmp_path, lambda image, prompt, seed: tint(image) if "a person" in prompt else image
    )
    change = find_class_change(read_story(run))
    (row,) = change.rows
    assert row.label == "pictures"
    assert "bluer by" in row.colour[1]
    assert "darker by" in row.colour[1]
    assert "yellower" not in row.colour[1]
    assert row.pairs == "21 of 7 prompts"
    html = write_report(run).read_text()
    assert "The class before and after" in visible(section(html, "pictures"))
    assert "bluer by" in visible(html)


def test_a_class_that_became_soft_is_told_as_less_sharp(tmp_path: Path):
    run = build(tmp_path, lambda image, prompt, seed: image.filter(ImageFilter.GaussianBlur(2)))
    (row,) = find_class_change(read_story(run)).rows
    assert row.sharpness[0] < "× 0.5"
    assert row.sharpness[1].endswith(": less sharp")


@pytest.mark.parametrize("change", [lambda image, *_: image, retouch])
def test_of_an_unchanged_class_and_subject_nothing_is_told(tmp_path: Path, change):
    story = read_story(build(tmp_path, change))
    (row,) = find_class_change(story).rows
    assert row.colour[1].endswith((": no shift detected", ": less than can be seen"))
    assert row.sharpness[1].endswith(": no change detected")
    off = find_off_pictures(story)
    assert off.reasons == {}
    assert "none of 24 pictures is off" in off.note


def test_the_pictures_of_the_class_stand_beside_the_base_models(tmp_path: Path):
    run = build(tmp_path)
    gallery = find_class_change(read_story(run)).gallery
    assert [column.label for column in gallery.columns] == ["base model", "pictures"]
    ((_, rows),) = gallery.groups
    assert [row.prompt for row in rows] == [prompt for prompt, _ in CLASS[:6]]
    assert all([shot.seed for shot in cell] == [0, 1] for row in rows for cell in row.cells)
    html = write_report(run).read_text()
    block = html[html.index('id="gallery-class"') : html.index('id="gallery0"')]
    assert len(pictures_in(block)) == 6 * 2 * 2
    assert "Shown are the first 6 of 7 prompts, 2 of 3 seeds; all stand further below." in visible(
        html
    )


def test_with_few_pictures_no_direction_is_told(tmp_path: Path):
    run = build(tmp_path, lambda image, *_: tint(image), prompts=[*SUBJECT, *CLASS[:2]])
    (row,) = find_class_change(read_story(run)).rows
    assert row.pairs == "6 of 2 prompts"
    assert row.colour[1].endswith(": too few pictures to tell")
    assert row.sharpness[1].endswith(": too few pictures to tell")


def test_a_run_that_drew_no_class_has_no_such_block(tmp_path: Path):
    run = build(tmp_path, prompts=SUBJECT)
    assert find_class_change(read_story(run)) is None
    assert "The class before and after" not in write_report(run).read_text()


def other_seeds(run: Path):
    images = read_image_set(run / "images" / "base")
    moved = tuple(p.model_copy(update={"seed": p.seed + 100}) for p in images.pictures)
    write_manifest(images.model_copy(update={"pictures": moved}))


def other_base(run: Path):
    images = read_image_set(run / "images" / "base")
    write_manifest(images.model_copy(update={"base": {"name": "x", "fingerprint": "a" * 64}}))


def no_base(run: Path):
    (run / "images" / "base" / "manifest.json").unlink()


@pytest.mark.parametrize("remove", [no_base, other_seeds, other_base])
def test_without_the_base_models_pictures_nothing_is_claimed(tmp_path: Path, remove):
    run = build(tmp_path, lambda image, *_: tint(image))
    remove(run)
    story = read_story(run)
    change, off = find_class_change(story), find_off_pictures(story)
    assert change.rows == []
    assert change.gallery is None
    assert "cannot be told" in change.note
    assert off.reasons == {}
    assert "cannot be told" in off.note
    text = visible(write_report(run).read_text())
    assert "What became of the class cannot be told" in text
    assert "bluer" not in text


def test_with_one_seed_no_picture_is_called_off(tmp_path: Path):
    run = build(tmp_path, lambda image, *_: tint(image), seeds=1)
    off = find_off_pictures(read_story(run))
    assert off.reasons == {}
    assert "cannot be told: it takes four prompts of three seeds" in off.note


def spoil_two(image: Image.Image, prompt: str, seed: int) -> Image.Image:
    if (prompt, seed) == (SUBJECT[2][0], 1):
        return image.filter(ImageFilter.GaussianBlur(3))
    if (prompt, seed) == (SUBJECT[4][0], 0):
        return Image.fromarray((np.asarray(image) * [0.2, 0.4, 1]).astype(np.uint8))
    return retouch(image, prompt, seed)


def test_a_blurred_and_a_blue_picture_are_listed_as_off(tmp_path: Path):
    run = build(tmp_path, spoil_two)
    story = read_story(run)
    off = find_off_pictures(story)
    files = {(p.prompt, p.seed): p.file for p in story.sets["pictures"].pictures}
    blurred, blue = files[SUBJECT[2][0], 1], files[SUBJECT[4][0], 0]
    assert set(off.reasons) == {blurred, blue}
    assert off.reasons[blurred] == "far less sharp than the base model’s"
    assert "much bluer" in off.reasons[blue]
    assert "2 of 24 pictures are off" in off.note
    shown = {shot.alt: why for shot, why in find_failures(story, off)}
    assert shown[f"{SUBJECT[2][0]}, seed 1, drawn by pictures"] == off.reasons[blurred]
    first = section(write_report(run).read_text(), "pictures")
    first = first[: first.index("The class before and after")]
    assert "far less sharp than the base model’s" in first


def test_a_damaged_picture_is_left_out(tmp_path: Path):
    run = build(tmp_path)
    images = read_image_set(run / "images" / "pictures")
    (images.folder / images.pictures[-1].file).write_bytes(b"no picture")
    (row,) = find_class_change(read_story(run)).rows
    assert row.pairs == "20 of 7 prompts"


def test_pictures_of_the_class_in_a_set_of_their_own_are_no_subjects(tmp_path: Path):
    """In such a set no prompt names the subject; the folder's others do."""
    run = build(tmp_path, prompts=SUBJECT)
    folder = Folder(tmp_path, lambda name, prompt, seed: base_picture(prompt, seed), SEEDS)
    for name, role in (("class_base", "base"), ("class_drawn", "subject")):
        write_manifest(folder.pictures(name, CLASS).model_copy(update={"role": role}))
    (row,) = find_class_change(read_story(run)).rows
    assert row.label == "class drawn"
    assert row.pairs == "21 of 7 prompts"


def test_of_many_adapters_each_has_its_figures_and_a_few_their_pictures(tmp_path: Path):
    run = build(tmp_path)
    folder = Folder(tmp_path, lambda name, prompt, seed: base_picture(prompt, seed), SEEDS)
    write_manifest(folder.pictures("z_base", CLASS).model_copy(update={"role": "base"}))
    for number in range(5):
        images = folder.pictures(f"arm{number}", CLASS)
        write_manifest(images.model_copy(update={"role": "subject"}))
    change = find_class_change(read_story(run))
    assert [row.label for row in change.rows] == [*(f"arm{k}" for k in range(5)), "pictures"]
    # What the base model drew twice stands there once.
    columns = [column.label for column in change.gallery.columns]
    assert columns == ["base model", "arm0", "arm1", "arm2", "arm3"]
    assert "4 of 6 adapters" in change.note


def lit(prompt: str, seed: int) -> Image.Image:
    """Light or dark by the seed, as where it is day or night."""
    light = np.random.default_rng([zlib.crc32(prompt.encode()), seed, 2]).normal(1, 0.2)
    pixels = np.asarray(base_picture(prompt, seed)) * light
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_base_models_pictures_of_other_seeds_are_not_off(tmp_path: Path):
    def change(image: Image.Image, prompt: str, seed: int) -> Image.Image:
        other = lit(prompt, seed + 50)
        return other if (prompt, seed) != (SUBJECT[0][0], 0) else Image.new("RGB", (64, 64), "blue")

    run = build(tmp_path, change, base=lit)
    (reason,) = find_off_pictures(read_story(run)).reasons.values()
    assert "much bluer" in reason
