"""The detectors: colours by published pairs, painted eyes and mouths, and drawings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from dreamloom.evaluation.detectors.colour import colour_difference, to_lab, to_light
from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.detectors.eyes import (
    AHEAD,
    Abstention,
    iris_difference,
    leave_one_out,
    measure_shape,
    read_iris,
)
from dreamloom.evaluation.detectors.false_alarms import MEASURED
from dreamloom.evaluation.detectors.flagging import Shown, flag_pictures
from dreamloom.evaluation.detectors.judges import (
    AT_A_GLANCE,
    DETECTORS,
    PHOTO,
    FaceView,
    Finding,
    Wanted,
    judge_extra_faces,
    judge_eye_colour_of_photos,
    judge_eye_colours,
    judge_eye_shape,
    judge_missing_face,
    judge_teeth,
    learn_reference,
)
from dreamloom.evaluation.detectors.landmarks import Eye, Face, FaceLandmarks, order_faces
from dreamloom.evaluation.detectors.mediapipe_faces import MediaPipeFaces, load_mediapipe
from dreamloom.evaluation.detectors.teeth import measure_teeth
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.picturebook.world import JUDGING_SEED_START, Drawing, sample_drawing
from tools.picturebook.drawing import draw

ROUND = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.column_stack([np.cos(ROUND), np.sin(ROUND)])
BROWN, BLUE, GREEN = (104, 64, 36), (88, 132, 176), (92, 132, 72)
SKIN, LIPS, TOOTH = (214, 170, 140), (150, 60, 62), (240, 236, 224)
NOTHING_LEARNT = learn_reference([])

# Sharma, Wu and Dalal (2005), table 1.
PUBLISHED = """
50 2.6772 -79.7751   50 0 -82.7485   2.0425
50 3.1571 -77.2803   50 0 -82.7485   2.8615
50 2.8361 -74.02   50 0 -82.7485   3.4412
50 -1.3802 -84.2814   50 0 -82.7485   1.0
50 -1.1848 -84.8006   50 0 -82.7485   1.0
50 -0.9009 -85.5211   50 0 -82.7485   1.0
50 0 0   50 -1 2   2.3669
50 -1 2   50 0 0   2.3669
50 2.49 -0.001   50 -2.49 0.0009   7.1792
50 2.49 -0.001   50 -2.49 0.001   7.1792
50 2.49 -0.001   50 -2.49 0.0011   7.2195
50 2.49 -0.001   50 -2.49 0.0012   7.2195
50 -0.001 2.49   50 0.0009 -2.49   4.8045
50 -0.001 2.49   50 0.001 -2.49   4.8045
50 -0.001 2.49   50 0.0011 -2.49   4.7461
50 2.5 0   50 0 -2.5   4.3065
50 2.5 0   73 25 -18   27.1492
50 2.5 0   61 -5 29   22.8977
50 2.5 0   56 -27 -3   31.9030
50 2.5 0   58 24 15   19.4535
50 2.5 0   50 3.1736 0.5854   1.0
50 2.5 0   50 3.2972 0   1.0
50 2.5 0   50 1.8634 0.5757   1.0
50 2.5 0   50 3.2592 0.3350   1.0
60.2574 -34.0099 36.2677   60.4626 -34.1751 39.4387   1.2644
63.0109 -31.0961 -5.8663   62.8187 -29.7946 -4.0864   1.2630
61.2901 3.7196 -5.3901   61.4292 2.2480 -4.9620   1.8731
35.0831 -44.1164 3.7933   35.0232 -40.0716 1.5901   1.8645
22.7233 20.0904 -46.6940   23.0331 14.9730 -42.5619   2.0373
36.4612 47.8580 18.3852   36.2715 50.5065 21.2231   1.4146
90.8027 -2.0831 1.4410   91.1528 -1.6435 0.0447   1.4441
90.9257 -0.5406 -0.9208   88.6381 -0.8985 -0.7239   1.5381
6.7747 -0.2908 -2.4247   5.8714 -0.0985 -2.2286   0.6377
2.0776 0.0795 -1.1350   0.9033 -0.0636 -0.5514   0.9082
""".strip().splitlines()


@pytest.mark.parametrize("line", PUBLISHED)
def test_colour_differences_are_the_published_ones(line):
    numbers = [float(number) for number in line.split()]
    first, second = tuple(numbers[:3]), tuple(numbers[3:6])
    assert colour_difference(first, second) == pytest.approx(numbers[6], abs=5e-5)
    assert colour_difference(second, first) == pytest.approx(numbers[6], abs=5e-5)


def test_lightness_counts_as_much_as_asked():
    dark, light = (40.0, 10.0, 10.0), (60.0, 10.0, 10.0)
    whole = colour_difference(dark, light)
    assert colour_difference(dark, light, 2.0) == pytest.approx(whole / 2)
    assert colour_difference(dark, light, float("inf")) == 0
    with pytest.raises(ValueError, match="above 0, got 0"):
        colour_difference(dark, light, 0.0)


def test_known_colours_have_their_known_coordinates():
    # Bruce Lindbloom's calculator for sRGB and D65, to two digits.
    srgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]) / 255
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(to_lab(to_light(srgb)), expected, atol=0.02)


def make_eye(x: float, y: float = 100, radius: float = 20, *, shift: float = 0, **fields) -> Eye:
    """An eye whose opening is 4 radii wide, its iris moved to the right by ``shift`` radii."""
    centre = np.array([x + shift * radius, y], dtype=float)
    lids = np.array([x, y], dtype=float) + CIRCLE * np.array([2.0, 0.85]) * radius
    return Eye(centre=centre, rim=centre + CIRCLE * radius, lids=lids, **fields)


def make_face(**fields) -> Face:
    """A face of two eyes that look ahead."""
    # The places in the eyes differ by AHEAD, half of it on each side; an eye is 4 radii wide.
    eyes = (make_eye(100, shift=-2 * AHEAD), make_eye(260, shift=2 * AHEAD))
    given = {"box": (40.0, 20.0, 320.0, 330.0), "eyes": eyes, "turn_degrees": (0.0, 0.0, 0.0)}
    return Face(**{**given, **fields})


def paint(image: Image.Image, eye: Eye, iris: tuple[int, int, int]) -> None:
    """Paint an eye with a pupil, lashes and a window mirrored in it."""
    pen = ImageDraw.Draw(image)
    mask = Image.new("1", image.size)
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in eye.lids], fill=1)
    inside = Image.new("RGB", image.size, (232, 228, 222))
    brush = ImageDraw.Draw(inside)
    (x, y), radius = eye.centre, eye.radius_px
    brush.ellipse((x - radius, y - radius, x + radius, y + radius), iris)
    brush.ellipse((x - radius / 3, y - radius / 3, x + radius / 3, y + radius / 3), (12, 12, 14))
    brush.rectangle((x - radius / 2, y - radius / 2, x - radius / 8, y - radius / 8), "white")
    image.paste(inside, mask=mask)
    for lash in range(-3, 4):
        pen.line((x + 5 * lash, y - radius, x + 4 * lash, y - 0.6 * radius), (20, 16, 16), 1)


def make_look(
    left: tuple[int, int, int] = BROWN,
    right: tuple[int, int, int] = BROWN,
    *,
    face: Face | None = None,
    wanted: Wanted = PHOTO,
) -> FaceView:
    """Look at a painted face."""
    face = face or make_face()
    image = Image.new("RGB", (360, 360), SKIN)
    for eye, iris in zip(face.eyes or (), (left, right), strict=False):
        paint(image, eye, iris)
    return FaceView.at(image, FaceLandmarks((360, 360), (face,)), wanted, 12.0)


def test_an_iris_is_read_as_it_was_painted():
    view = make_look(BLUE)
    white = to_light(np.array([232, 228, 222]) / 255)
    expected = tuple(map(float, to_lab(to_light(np.array(BLUE) / 255) * 0.7 / white)))
    assert iris_difference(read_iris(view.pixels, view.found.faces[0].eyes[0]), expected) < 1.0


@pytest.mark.parametrize("light", [(1.0, 0.8, 0.55), (0.6, 0.8, 1.0), (0.5, 0.5, 0.5)])
def test_the_colour_of_the_light_hardly_changes_an_iris(light):
    view = make_look(GREEN)
    eye = view.found.faces[0].eyes[0]
    lit = to_light(view.pixels / 255.0) * light
    srgb = np.where(lit <= 0.0031308, lit * 12.92, 1.055 * lit.clip(1e-9) ** (1 / 2.4) - 0.055)
    pixels = (srgb * 255).round().astype(np.uint8)
    assert iris_difference(read_iris(pixels, eye), read_iris(view.pixels, eye)) < 1.5


def test_equal_eyes_pass_and_one_of_another_colour_is_found():
    same = judge_eye_colours(make_look(BROWN, BROWN), NOTHING_LEARNT)
    other = judge_eye_colours(make_look(BROWN, GREEN), NOTHING_LEARNT)
    swapped = judge_eye_colours(make_look(GREEN, BROWN), NOTHING_LEARNT)
    assert not same.flagged
    assert same.value < 1
    assert other.flagged
    assert swapped.value == pytest.approx(other.value, abs=0.5)


def test_an_iris_of_two_halves_is_not_judged():
    view = make_look()
    eye = view.found.faces[0].eyes[0]
    pixels, x, y = view.pixels.copy(), round(eye.centre[0]), round(eye.centre[1])
    pixels[y - 12 : y + 12, x : x + 20] = BLUE
    assert "not of one colour" in read_iris(pixels, eye).reason


@pytest.mark.parametrize(
    ("fields", "wanted", "reason"),
    [
        ({}, Wanted("art", "yes", frozenset()), "asks for art"),
        ({}, Wanted(None, "yes", frozenset()), "not known what the prompt asks"),
        ({}, Wanted("photo", "partial", frozenset()), "no whole face"),
        ({}, Wanted("photo", "yes", None), "not known what the prompt may change"),
        ({}, Wanted("photo", "yes", frozenset({"eyes"})), "may change eyes"),
        ({}, Wanted("photo", "yes", frozenset({"hat", "glasses"})), "may change glasses"),
        ({"turn_degrees": (26.0, 0.0, 0.0)}, PHOTO, "turned away"),
        ({"turn_degrees": (0.0, 0.0, -50.0)}, PHOTO, "turned away"),
        ({"turn_degrees": None}, PHOTO, "not known how the head is turned"),
        ({"eyes": None}, PHOTO, "no eyes"),
        ({"eyes": (make_eye(100, blink=0.1), make_eye(260, blink=0.4))}, PHOTO, "closed"),
        ({"eyes": (make_eye(100), make_eye(260, radius=5.9))}, PHOTO, "less than 12 px"),
    ],
)
def test_eyes_that_cannot_be_judged_are_neither_good_nor_bad(fields, wanted, reason):
    view = make_look(BROWN, GREEN, face=make_face(**fields), wanted=wanted)
    for judge in (judge_eye_colours, judge_eye_shape):
        verdict = judge(view, NOTHING_LEARNT)
        assert isinstance(verdict, Abstention)
        assert reason in verdict.reason


def test_sunglasses_and_eyes_outside_the_picture_are_not_judged():
    eye = make_eye(100)
    assert "not clearly lighter" in read_iris(np.full((200, 200, 3), 20, np.uint8), eye).reason
    assert "too little" in read_iris(np.full((50, 50, 3), 20, np.uint8), eye).reason


def test_the_photos_say_which_eye_colour_is_right():
    photos = [make_look(brown, brown) for brown in (BROWN, (110, 70, 40), (96, 60, 36))]
    learnt = learn_reference(photos)
    assert learnt.threshold == learnt.pair_threshold == AT_A_GLANCE
    assert not judge_eye_colour_of_photos(make_look(), learnt).flagged
    assert judge_eye_colour_of_photos(make_look(GREEN, GREEN), learnt).flagged
    assert judge_eye_colour_of_photos(make_look(BROWN, GREEN), learnt).flagged


def test_without_steady_photos_no_eye_colour_is_right():
    few = learn_reference([make_look()] * 2)
    assert "2 of 2 photos" in judge_eye_colour_of_photos(make_look(), few).reason
    mixed = learn_reference([make_look(one, one) for one in (BROWN, BLUE, GREEN)])
    assert "scatter" in judge_eye_colour_of_photos(make_look(), mixed).reason


def test_a_subject_whose_eyes_differ_may_have_them_in_pictures():
    learnt = learn_reference([make_look(BROWN, BLUE)])
    assert learnt.pair_threshold > AT_A_GLANCE
    assert not judge_eye_colours(make_look(BROWN, BLUE), learnt).flagged
    assert judge_eye_colours(make_look(BROWN, BLUE), NOTHING_LEARNT).flagged


def test_leaving_one_out_compares_a_photo_with_the_others_only():
    brown, blue = (30.0, 10.0, 15.0), (55.0, -5.0, -20.0)
    apart = leave_one_out([(brown, brown), (brown, brown), (blue, blue)])
    assert apart[2] == pytest.approx(iris_difference(brown, blue))
    assert leave_one_out([(brown, brown)] * 3) == [0, 0, 0]


def test_a_pair_of_round_eyes_is_well_formed():
    shape = measure_shape(*make_face().eyes)
    assert shape.elongation == pytest.approx(1)
    assert shape.size_ratio == pytest.approx(1)
    assert shape.divergence == pytest.approx(AHEAD, abs=1e-6)
    assert shape.overhang == 0
    verdict = judge_eye_shape(make_look(), NOTHING_LEARNT)
    assert not verdict.flagged
    assert verdict.value == pytest.approx(0, abs=1e-6)


FIRST, SECOND = make_face().eyes


@pytest.mark.parametrize(
    "fields",
    [
        {"eyes": (FIRST, replace(SECOND, rim=SECOND.centre + CIRCLE * (12, 24)))},
        {"eyes": (FIRST, make_eye(260, radius=26, shift=2 * AHEAD))},
        {"eyes": (FIRST, make_eye(260, shift=-0.4))},
        {"eyes": (FIRST, make_eye(260, shift=0.8))},
        {"eyes": (FIRST, replace(SECOND, lids=SECOND.lids + np.array([0, 25])))},
        {"unsteadiness": 0.8},
    ],
    ids=["oval", "unequal", "crossed", "apart", "outside its lids", "unsteady"],
)
def test_each_fault_of_shape_is_found(fields):
    assert judge_eye_shape(make_look(face=make_face(**fields)), NOTHING_LEARNT).flagged


def test_shape_depends_on_neither_size_nor_place():
    def move(eye: Eye) -> Eye:
        return Eye(eye.centre * 3 + 50, eye.rim * 3 + 50, eye.lids * 3 + 50)

    eyes = make_eye(100, shift=0.3), make_eye(260, radius=23)
    np.testing.assert_allclose(measure_shape(*eyes), measure_shape(*map(move, eyes)))


MOUTH = np.array([180.0, 280.0]) + CIRCLE * np.array([60, 30])


def paint_mouth(*boxes: tuple[int, int, int, int]) -> FaceView:
    """A dark red open mouth, 120 px wide around (180, 280), with teeth where the boxes are."""
    image = Image.new("RGB", (360, 360), SKIN)
    pen = ImageDraw.Draw(image)
    pen.ellipse((120, 250, 240, 310), (92, 24, 30))
    for box in boxes:
        pen.rectangle(box, TOOTH)
    face = make_face(mouth=MOUTH)
    return FaceView.at(image, FaceLandmarks((360, 360), (face,)), PHOTO, 12.0)


UPPER, LOWER = (140, 258, 220, 270), (145, 292, 215, 302)


@pytest.mark.parametrize(
    ("boxes", "flagged"),
    [
        ([UPPER], False),
        ([UPPER, LOWER], False),
        ([UPPER, LOWER, (140, 276, 220, 286)], True),
        ([(190, 258, 225, 275)], True),
    ],
    ids=["upper", "upper and lower", "three rows", "one side"],
)
def test_teeth_in_three_rows_or_on_one_side_are_found(boxes, flagged):
    assert judge_teeth(paint_mouth(*boxes), NOTHING_LEARNT).flagged is flagged


def test_mouths_that_show_no_teeth_are_not_judged():
    assert "no teeth" in judge_teeth(paint_mouth(), NOTHING_LEARNT).reason
    pixels = paint_mouth(UPPER).pixels
    assert "closed" in measure_teeth(pixels, MOUTH * (1, 0.1) + (0, 250)).reason
    assert "px wide" in measure_teeth(pixels, MOUTH * 0.2).reason
    assert "beyond" in measure_teeth(pixels, MOUTH + 200).reason
    assert "no mouth" in judge_teeth(make_look(), NOTHING_LEARNT).reason


def look_at_faces(*widths: float, face: str = "yes", style: str = "photo") -> FaceView:
    faces = order_faces([Face(box=(0.0, 0.0, float(width), float(width))) for width in widths])
    wanted = Wanted(style, face, frozenset())
    return FaceView.at(Image.new("RGB", (500, 500)), FaceLandmarks((500, 500), faces), wanted, 12.0)


@pytest.mark.parametrize(
    ("widths", "face", "extra"),
    [
        ([200], "yes", False),
        ([], "yes", False),
        ([80, 200], "yes", False),
        ([150, 200], "yes", True),
        ([150, 200], "partial", True),
        ([200], "no", True),
        ([40], "no", False),
        ([], "no", False),
    ],
)
def test_faces_beyond_those_wanted_are_counted_without_bystanders(widths, face, extra):
    assert judge_extra_faces(look_at_faces(*widths, face=face), NOTHING_LEARNT).flagged is extra


def test_a_missing_face_is_found_where_one_must_show():
    assert judge_missing_face(look_at_faces(), NOTHING_LEARNT).flagged
    assert not judge_missing_face(look_at_faces(90), NOTHING_LEARNT).flagged
    for view in (look_at_faces(face="partial"), look_at_faces(face="no")):
        assert "no whole face" in judge_missing_face(view, NOTHING_LEARNT).reason
    for judge in (judge_missing_face, judge_extra_faces):
        assert "art" in judge(look_at_faces(90, 80, style="art"), NOTHING_LEARNT).reason


def draw_from_front(seed: int, **fields) -> Drawing:
    drawing = sample_drawing(JUDGING_SEED_START + 600_000 + seed, "person")
    return replace(drawing, view="front", glasses="none", medium="photo", **fields)


def eyes_of_drawing(drawing: Drawing, size_px: int) -> np.ndarray:
    """Where the irises' centres are, from the recipe in `figures`."""
    unit = size_px / 256
    apart = 24 * (0.5 + 0.5 * drawing.identity.face_width) * drawing.zoom * unit
    x = size_px * (0.5 + drawing.shift_x)
    y = 139 * unit + drawing.shift_y * size_px - 2 * drawing.zoom * unit
    return np.array([[x - apart, y], [x + apart, y]])


def mix_eyes(drawing: Drawing, other: str) -> Image.Image:
    """Draw somebody whose right half has eyes of another colour."""
    image = draw(drawing)
    second = draw(replace(drawing, identity=replace(drawing.identity, eyes=other)))
    middle = round(image.width * (0.5 + drawing.shift_x))
    image.paste(second.crop((middle, 0, image.width, image.height)), (middle, 0))
    return image


def test_drawn_eyes_are_found_where_they_were_drawn():
    found = 0
    for seed in range(20):
        drawing = draw_from_front(seed)
        for face in DrawnFaces().find(draw(drawing)).faces:
            found += 1
            centres = np.array([eye.centre for eye in face.eyes])
            assert np.abs(centres - eyes_of_drawing(drawing, 128)).max() < 1.5
    assert found >= 18


def test_faces_from_the_side_and_behind_sunglasses_are_not_found():
    for seed in range(10):
        drawing = draw_from_front(seed)
        for hidden in (replace(drawing, view="side"), replace(drawing, glasses="sunglasses")):
            assert DrawnFaces().find(draw(hidden)).faces == ()
    assert DrawnFaces().find(Image.new("RGB", (128, 128), "white")).faces == ()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> list[Shown]:
    """Eight drawings with good eyes, four with one of another colour, and one from the side."""
    folder = tmp_path_factory.mktemp("drawings")
    images = [draw(draw_from_front(seed)) for seed in range(8)]
    images += [
        mix_eyes(
            draw_from_front(
                seed,
            ),
            "blue",
        )
        for seed in brown_eyed(4)
    ]
    images += [draw(replace(draw_from_front(0), view="side"))]
    for number, image in enumerate(images):
        image.save(folder / f"{number:02d}.png")
    return [Shown(path.name, path, PHOTO) for path in sorted(folder.iterdir())]


def brown_eyed(count: int) -> list[int]:
    return [s for s in range(100, 200) if draw_from_front(s).identity.eyes == "brown"][:count]


def test_broken_eyes_are_found_among_good_drawings(drawings):
    pair = flag_pictures(drawings, [], DrawnFaces())[0]
    assert pair.detector == "eye_colours"
    broken = {shown.file for shown in drawings[8:12]}
    judged_broken = broken & set(pair.values)
    assert len(judged_broken) >= 2
    assert set(pair.flagged) == judged_broken
    assert pair.rate == len(pair.flagged) / pair.judged
    assert pair.interval[0] < pair.rate < pair.interval[1]
    assert pair.abstained["no face was found"] >= 1


def test_every_picture_is_counted_once(drawings):
    photos = [drawings[0].path] * 3
    for one in flag_pictures(drawings, photos, DrawnFaces(), experimental=True):
        if one.missing:
            assert one.rate is one.interval is None
        else:
            assert one.judged + sum(one.abstained.values()) == one.n == len(drawings)
            assert set(one.flagged) <= set(one.values)


def test_eyes_are_compared_with_the_photos(tmp_path):
    drawing = draw_from_front(brown_eyed(1)[0])
    other = replace(drawing, identity=replace(drawing.identity, eyes="blue"))
    paths = {}
    for name, one in (("photo", drawing), ("right", replace(drawing, hat="cap")), ("wrong", other)):
        paths[name] = tmp_path / f"{name}.png"
        draw(one).save(paths[name])
    pictures = [Shown(name, paths[name], PHOTO) for name in ("right", "wrong")]
    compared = flag_pictures(pictures, [paths["photo"]] * 3, DrawnFaces())[1]
    assert compared.detector == "eye_colour_of_photos"
    assert compared.flagged == ("wrong",)
    alone = flag_pictures(pictures, [paths["photo"]], DrawnFaces())[1]
    assert alone.rate is None
    assert list(alone.abstained) == ["the eye colour can be told in 1 of 1 photos, not in 3"]


def test_without_a_source_nothing_is_measured(drawings):
    results = flag_pictures(drawings, [], Missing("there is no finder"), experimental=True)
    assert [one.detector for one in results] == [one.name for one in DETECTORS]
    for one in results:
        assert one.tell() == "not measured: there is no finder"
        assert (one.n, one.rate, one.interval, one.flagged) == (len(drawings), None, None, ())


def test_of_things_only_extra_faces_are_looked_for(drawings):
    source = DrawnFaces()
    source.cannot = {}
    measured = flag_pictures(drawings[:2], [], source, of_person=False, experimental=True)
    assert [one.detector for one in measured if not one.missing] == ["extra_faces"]


def test_what_is_not_known_to_work_is_left_out_unless_it_is_asked_for(drawings):
    usual = [one.detector for one in flag_pictures(drawings[:1], [], DrawnFaces())]
    every = flag_pictures(drawings[:1], [], DrawnFaces(), experimental=True)
    assert [one.detector for one in every if one.detector not in usual] == ["eye_shape", "teeth"]
    assert all(one.experimental == (one.detector not in usual) for one in every)


def test_no_result_is_told_without_the_detectors_own_mistakes(drawings):
    flagged = flag_pictures(drawings, [], DrawnFaces(), experimental=True)
    told = {one.detector: one.tell() for one in flagged}
    assert "false alarms: " in told["eye_colours"]
    assert "not judged: " in told["eye_colours"]
    assert told["teeth"] == "not measured: drawn mouths have no single teeth"


def test_progress_is_told(drawings):
    steps = []
    flag_pictures(drawings[:3], [], DrawnFaces(), observe=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_stated_mistakes_are_proportions_of_a_known_detector():
    names = {one.name for one in DETECTORS}
    for trials in MEASURED.values():
        assert set(trials) <= names
        for trial in trials.values():
            for tally in (trial.false_alarms, trial.found):
                if tally is not None:
                    assert 0 <= tally.flagged <= tally.n
                    assert tally.interval[0] <= tally.rate + 1e-9
                    assert tally.rate - 1e-9 <= tally.interval[1]


def test_without_package_or_model_the_finder_is_missing(tmp_path):
    found = load_mediapipe(tmp_path / "absent.task")
    assert isinstance(found, Missing)
    assert "not installed" in found.reason or "absent.task" in found.reason


def test_another_model_is_refused(tmp_path, monkeypatch):
    # The check comes before the package is loaded, so that an empty one will do.
    (tmp_path / "mediapipe.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other.task").write_bytes(b"not the model")
    assert "is not the face_landmarker.task" in load_mediapipe(tmp_path / "other.task").reason


def test_mediapipe_finds_a_real_face_and_its_irises():
    source = load_mediapipe()
    if isinstance(source, Missing):
        pytest.skip(source.reason)
    assert isinstance(source, MediaPipeFaces)
    import matplotlib as plots  # MediaPipe needs it; it brings a photo of Grace Hopper

    photo = Path(plots.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = Image.open(photo).convert("RGB")
    (face,) = source.find(image).faces
    (mirrored,) = source.find(ImageOps.mirror(image)).faces
    assert all(12 < 2 * eye.radius_px < 18 for eye in face.eyes)
    assert face.eyes[0].centre[0] < face.eyes[1].centre[0]
    assert abs(face.turn_degrees[0] + mirrored.turn_degrees[0]) < 5
    assert face.unsteadiness < 0.5
    assert source.find(Image.new("RGB", (256, 256), "white")).faces == ()
    view = FaceView.at(image, source.find(image), PHOTO, source.least_iris_px)
    assert isinstance(judge_eye_shape(view, NOTHING_LEARNT), Finding)
