"""The photo check says what it finds of faces, in drawings and (by a stand-in) in photographs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dreamloom.cli.main import main
from dreamloom.data.photos.faces import judge_faces, list_cut
from dreamloom.evaluation import photo_faces
from dreamloom.evaluation.encoders.catalogue import YUNET
from dreamloom.evaluation.encoders.store import Kept, Missing
from dreamloom.evaluation.photo_faces import (
    FacesInDrawings,
    PhotographedFaces,
    check_photos_and_faces,
    load_face_finder,
)
from dreamloom.picturebook.world import JUDGING_SEED_START, sample_drawing
from test_encoders_faces import make_yunet, scene
from tools.picturebook.drawing import draw_at

SIZES = {"wide": (320, 240), "square": (240, 240), "high": (240, 320)}


def person(seed=0, **fields):
    drawing = sample_drawing(JUDGING_SEED_START + 610_000 + seed, "person")
    return replace(drawing, view="front", glasses="none", medium="photo", **fields)


def drawn_eyes(drawing, width, height):
    """Where the irises' centres are, from the recipe in `tools.picturebook.drawing`."""
    unit = height / 256
    x = width / 2 + drawing.shift_x * (height + 4 * max(0, width - height))
    y = 139 * unit + drawing.shift_y * height - 2 * drawing.zoom * unit
    apart = 24 * (0.5 + 0.5 * drawing.identity.face_width) * drawing.zoom * unit
    return [(x - apart, y), (x + apart, y)]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_drawn_face_s_box_holds_both_eyes(size):
    found = 0
    for seed in range(6):
        drawing = person(seed)
        boxes = FacesInDrawings().find_boxes(draw_at(drawing, *size))
        assert len(boxes) <= 1
        for left, top, right, bottom in boxes:
            found += 1
            for x, y in drawn_eyes(drawing, *size):
                assert left < x < right
                assert top < y < bottom
    assert found >= 5


def test_two_people_beside_each_other_are_two_faces():
    pair = Image.new("RGB", (480, 240))
    pair.paste(draw_at(person(1), 240, 240), (0, 0))
    pair.paste(draw_at(person(2), 240, 240), (240, 0))
    boxes = sorted(FacesInDrawings().find_boxes(pair))
    assert len(boxes) == 2
    assert boxes[0][2] <= 260
    assert boxes[1][0] >= 220


@pytest.fixture
def folder(tmp_path):
    """Drawings: as they should be, from the side, of two, and cut off on the left."""
    drawing = person(1, shift_x=0.0)
    whole = draw_at(drawing, 320, 240)
    whole.save(tmp_path / "front.png")
    draw_at(replace(drawing, view="side"), 320, 240).save(tmp_path / "side.png")
    pair = Image.new("RGB", (480, 240))
    pair.paste(draw_at(person(2), 240, 240), (0, 0))
    pair.paste(draw_at(person(3), 240, 240), (240, 0))
    pair.save(tmp_path / "two.png")
    (first, _y), _ = drawn_eyes(drawing, 320, 240)
    whole.crop((int(first) - 18, 0, 320, 240)).save(tmp_path / "cut.png")
    return tmp_path


def test_the_check_says_what_it_finds_of_faces(folder):
    check = check_photos_and_faces(folder, 128, "picturebook")
    by_name = {photo.file: photo for photo in check.photos}
    assert check.faces_unknown == ""
    assert {name: len(photo.faces) for name, photo in by_name.items()} == {
        "front.png": 1,
        "side.png": 0,
        "two.png": 2,
        "cut.png": 1,
    }
    said = {name: " ".join(photo.issues) for name, photo in by_name.items()}
    assert "face" not in said["front.png"] + said["side.png"]
    assert any("no face seen from the front" in text for text in by_name["side.png"].remarks)
    assert "shows 2 faces: the largest is taken" in said["two.png"]
    assert "cuts its face off at the left" in said["cut.png"]


def test_without_faces_the_check_is_as_before(folder):
    done = CliRunner().invoke(main, ["photos", str(folder), "--json"])
    check = json.loads(done.stdout)
    assert check["faces_unknown"] == ""
    assert all(photo["faces"] is None for photo in check["photos"])
    assert not any("face" in text for photo in check["photos"] for text in photo["issues"])


def test_the_command_tells_boxes_in_words_and_in_json(folder):
    words = ["photos", str(folder), "--faces", "--base", "picturebook"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.output
    assert "face: [" in told.stdout
    assert "faces: [" in told.stdout
    check = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    front = next(photo for photo in check["photos"] if photo["file"] == "front.png")
    (box,) = front["faces"]
    assert all(isinstance(side, int) for side in box)


def test_without_a_finder_the_rest_is_checked_and_one_sentence_says_why(
    folder, monkeypatch, tmp_path_factory
):
    monkeypatch.setenv("DREAMLOOM_MODELS", str(tmp_path_factory.mktemp("none")))
    done = CliRunner().invoke(main, ["photos", str(folder), "--faces", "--base", "sdxl"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "Faces were not looked for: " in told
    assert "'dreamloom models fetch yunet'" in told
    monkeypatch.setattr(photo_faces, "find_spec", lambda name: None)
    check = check_photos_and_faces(folder, 64, "")
    assert "dreamloom models fetch yunet" in check.faces_unknown
    assert 'pip install "dreamloom[faces]"' in check.faces_unknown
    assert all(photo.faces is None for photo in check.photos)


def test_a_base_without_faces_is_refused(folder):
    done = CliRunner().invoke(main, ["photos", str(folder), "--base", "sdxl"])
    assert done.exit_code == 2
    assert "--base belongs to --faces" in done.output


@pytest.fixture(scope="module")
def yunet(tmp_path_factory):
    pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("yunet")
    return make_yunet(folder / YUNET.files[0].name)


def test_photographs_are_looked_at_by_yunet(yunet, monkeypatch, tmp_path):
    monkeypatch.setattr(photo_faces, "find_kept", lambda model: Kept(yunet.parent, "yunet@1"))
    finder = load_face_finder("sdxl")
    assert isinstance(finder, PhotographedFaces)
    # The stand-in's face is three cells of 32 px around the cell's corner, see there.
    assert np.allclose(finder.find_boxes(scene()), [(48, 16, 144, 112)], atol=0.5)
    scene().save(tmp_path / "one.png")
    scene(face=None).save(tmp_path / "none.png")
    check = check_photos_and_faces(tmp_path, 64, "sdxl")
    one, none = sorted(check.photos, key=lambda photo: photo.file, reverse=True)
    assert one.faces == ((48, 16, 144, 112),)
    assert none.faces == ()
    assert any("no face that could be found" in text for text in none.issues)


def test_a_damaged_lock_is_a_reason(monkeypatch):
    monkeypatch.setattr(photo_faces, "find_kept", lambda model: Missing("yunet has changed"))
    assert load_face_finder("sdxl") == Missing("yunet has changed")


def test_small_faces_are_measured_as_they_are_taught():
    size, scaled = (2000, 3000), (1024, 1536)
    (issue,) = judge_faces([(1000, 500, 1200, 700)], size, scaled, 1024)
    assert "small: 102 px wide" in issue
    assert "128 are wanted" in issue
    assert judge_faces([(1000, 500, 1300, 800)], size, scaled, 1024) == []


@pytest.mark.parametrize(
    ("face", "edges"),
    [
        ((10, 10, 60, 60), []),
        ((0, 10, 60, 60), ["left"]),
        ((-5, -5, 60, 60), ["left", "top"]),
        ((40, 40, 100, 81), ["right", "bottom"]),
    ],
)
def test_edges_that_cut_a_face_off_are_named(face, edges):
    assert list_cut(face, (80, 100)) == edges
