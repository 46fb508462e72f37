"""The drawn world: the same seed is the same picture, and an identity survives variation."""

import random
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamloom.picturebook import world
from dreamloom.picturebook.world import (
    JUDGING_SEED_START,
    KNOWN_PERSONS,
    Drawing,
    Identity,
    known_person,
    sample_drawing,
    sample_identity,
    vary,
)
from tools.picturebook.drawing import draw, draw_at

ANYBODY = Identity(kind="person")


def pixels(drawing: Drawing, size_px: int = 64) -> np.ndarray:
    return np.asarray(draw(drawing, size_px), dtype=np.float32)


def difference(first: Drawing, second: Drawing) -> float:
    """Mean absolute difference of two drawings' pixels, 0 to 255."""
    return float(np.abs(pixels(first) - pixels(second)).mean())


# -- Sampling ------------------------------------------------------------------------------------


def test_a_world_seed_always_gives_the_same_record():
    assert sample_drawing(12_345) == sample_drawing(12_345)
    assert len({sample_drawing(seed) for seed in range(200)}) == 200


def test_the_first_record_stays_what_the_embedded_model_was_trained_on():
    drawing = sample_drawing(0)
    record = (drawing.name, drawing.scene, drawing.medium, drawing.hat)
    assert record == ("felvi", "snow", "van gogh", "party hat")


def test_a_negative_world_seed_is_refused():
    with pytest.raises(ValueError, match=r"must be 0 or more, got -1"):
        sample_drawing(-1)


def test_fixing_one_field_leaves_the_others_alone():
    for seed in range(30):
        free = sample_drawing(seed)
        assert sample_drawing(seed, scene="night") == replace(free, scene="night")


def test_fixing_the_kind_leaves_the_circumstances_alone():
    drawing, free = sample_drawing(3, kind="dog"), sample_drawing(3)
    assert drawing.identity.kind == "dog"
    assert drawing == replace(free, identity=drawing.identity, name=drawing.name)


def test_a_fixed_identity_is_nobody_known():
    drawings = [sample_drawing(seed, identity=ANYBODY) for seed in range(40)]
    assert {(drawing.identity, drawing.name) for drawing in drawings} == {(ANYBODY, "")}


def test_training_never_samples_pixel_art():
    assert "pixel art" not in world.TRAINED_MEDIA
    media = {sample_drawing(seed).medium for seed in range(300)}
    assert media == set(world.TRAINED_MEDIA)
    assert sample_drawing(0, medium="pixel art").medium == "pixel art"


def test_two_of_three_drawings_show_persons_and_a_quarter_of_those_are_known():
    drawings = [sample_drawing(seed) for seed in range(2000)]
    persons = [drawing for drawing in drawings if drawing.identity.kind == "person"]
    known = [drawing for drawing in persons if drawing.name]
    assert 0.60 < len(persons) / len(drawings) < 0.70
    assert 0.20 < len(known) / len(persons) < 0.30
    assert all(not drawing.name for drawing in drawings if drawing.identity.kind != "person")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("skin", world.SKINS),
        ("hair", world.HAIR_COLOURS),
        ("style", world.HAIR_STYLES),
        ("eyes", world.EYE_COLOURS),
        ("beard", world.BEARDS),
        ("brows", world.BROWS),
        ("mark", world.MARKS),
        ("earrings", world.EARRINGS),
    ],
)
def test_no_look_of_a_person_is_rare(field: str, values: tuple[str, ...]):
    rng = random.Random(0)
    counts = Counter(getattr(sample_identity(rng, "person"), field) for _ in range(1000))
    assert set(counts) == set(values)
    assert min(counts.values()) > 1000 * 0.07


def test_judging_seeds_lie_beyond_training_and_draw_the_same_world():
    assert JUDGING_SEED_START == 9_000_000
    training = {sample_drawing(seed) for seed in range(300)}
    judging = {sample_drawing(JUDGING_SEED_START + seed) for seed in range(300)}
    assert not training & judging
    assert {drawing.medium for drawing in judging} == set(world.TRAINED_MEDIA)


# -- Identity ------------------------------------------------------------------------------------


def test_vary_keeps_the_identity_and_the_name():
    rng = random.Random(7)
    for seed in range(40):
        first = sample_drawing(seed)
        second = vary(first, rng)
        assert (second.identity, second.name) == (first.identity, first.name)
        assert second != first


def test_vary_takes_an_identity_and_fixed_fields():
    drawing = vary(ANYBODY, random.Random(1), view="side", medium="pixel art")
    assert (drawing.identity, drawing.name) == (ANYBODY, "")
    assert (drawing.view, drawing.medium) == ("side", "pixel art")


def test_known_persons_have_distinct_names_and_looks():
    people = [known_person(index) for index in range(KNOWN_PERSONS)]
    assert len({name for name, _ in people}) == KNOWN_PERSONS == 300
    assert len({identity for _, identity in people}) == KNOWN_PERSONS
    assert all(name.isalpha() and name.islower() and len(name) == 5 for name, _ in people)
    assert known_person(17) == people[17]


@pytest.mark.parametrize("index", [-1, 300])
def test_an_unknown_index_is_refused(index: int):
    with pytest.raises(ValueError, match=rf"0 to 299, got {index}"):
        known_person(index)


@pytest.mark.parametrize("view", world.VIEWS)
def test_two_persons_differ_more_than_two_moods_of_one(view: world.View):
    rng = random.Random(3)
    for index in range(0, 24, 2):
        base = Drawing(known_person(index)[1], view=view)
        other = replace(base, identity=known_person(index + 1)[1])
        moody = replace(base, mood=rng.choice(("neutral", "open")))
        assert difference(base, other) > difference(base, moody)


# -- Drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", world.MEDIA)
def test_the_same_record_gives_the_same_bytes(medium: world.Medium):
    drawing = sample_drawing(5, medium=medium)
    assert draw(drawing).tobytes() == draw(drawing).tobytes()


@pytest.mark.parametrize(("width_px", "height_px"), [(128, 128), (96, 72), (160, 90), (51, 67)])
def test_a_picture_has_the_size_asked_for(width_px: int, height_px: int):
    for medium in world.MEDIA:
        picture = draw_at(sample_drawing(1, medium=medium), width_px, height_px)
        assert (picture.mode, picture.size) == ("RGB", (width_px, height_px))


def test_draw_is_square():
    drawing = sample_drawing(2)
    assert draw(drawing).size == (128, 128)
    assert draw(drawing, 40).tobytes() == draw_at(drawing, 40, 40).tobytes()


def test_a_picture_too_small_to_show_anything_is_refused():
    with pytest.raises(ValueError, match=r"16 px or more, got 128x8"):
        draw_at(sample_drawing(0), 128, 8)


def test_a_wide_canvas_places_the_figure_off_centre():
    base = Drawing(ANYBODY, shirt="red", scene="snow")
    left, right = (
        np.asarray(draw_at(replace(base, shift_x=shift), 160, 90), dtype=np.int16)
        for shift in (-0.05, 0.05)
    )

    def shirt_column(picture: np.ndarray) -> float:
        red = (picture[..., 0] - picture[..., 1] > 90) & (picture[..., 0] - picture[..., 2] > 90)
        return float(np.nonzero(red[70:])[1].mean())

    assert shirt_column(right) - shirt_column(left) > 25


def values_of(record: type) -> list[tuple[str, Any]]:
    """Every value that a field with a closed choice may have."""
    hints = record.__annotations__
    return [
        (field.name, value)
        for field in fields(record)
        for value in getattr(hints[field.name], "__args__", ())
    ]


@pytest.mark.parametrize(("name", "value"), values_of(Drawing))
def test_every_value_of_a_drawing_is_drawn(name: str, value: Any):
    for kind in world.KINDS:
        drawing = replace(Drawing(Identity(kind=kind)), **{name: value})
        others = {getattr(Drawing(ANYBODY), name)} - {value}
        assert pixels(drawing).std() > 5
        assert all(difference(drawing, replace(drawing, **{name: o})) > 0 for o in others)


@pytest.mark.parametrize("view", world.VIEWS)
@pytest.mark.parametrize(("name", "value"), values_of(Identity))
def test_every_value_of_an_identity_is_drawn(name: str, value: Any, view: world.View):
    for kind in world.KINDS:
        identity = replace(Identity(kind=kind), **{name: value})
        assert draw(Drawing(identity, view=view), 32).getcolors(maxcolors=1) is None


@pytest.mark.parametrize("scene", world.SCENES)
def test_backdrops_of_a_scene_differ(scene: world.Scene):
    variants = [Drawing(ANYBODY, scene=scene, backdrop=i) for i in range(world.BACKDROPS)]
    assert all(
        difference(first, second) > 2 for i, first in enumerate(variants) for second in variants[:i]
    )


@pytest.mark.parametrize("style", world.HAIR_STYLES)
@pytest.mark.parametrize("hat", world.HATS)
@pytest.mark.parametrize("view", world.VIEWS)
def test_hats_and_hair_go_together(style: world.HairStyle, hat: world.Hat, view: world.View):
    identity = replace(ANYBODY, style=style, beard="beard", mark="scar", earrings="gold")
    assert draw(Drawing(identity, hat=hat, view=view), 32).size == (32, 32)


def test_sketches_are_gray_and_pixel_art_is_made_of_blocks():
    sketch = pixels(sample_drawing(4, medium="sketch"))
    assert (sketch.max(axis=2) - sketch.min(axis=2)).max() < 30
    picture = draw(sample_drawing(4, medium="pixel art"), 240)
    blocks = picture.resize((24, 24), Image.Resampling.NEAREST)
    assert blocks.resize((240, 240), Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    assert len(blocks.getcolors() or []) <= 16


@pytest.mark.parametrize("medium", ["painting", "van gogh"])
def test_strokes_leave_the_face_recognisable(medium: world.Medium):
    """A painted face stays nearer to its own photo than to most other persons' photos."""
    photos = [pixels(Drawing(known_person(i)[1]))[16:56, 16:48].reshape(-1, 3) for i in range(12)]
    hits = 0
    for i in range(12):
        painted = pixels(Drawing(known_person(i)[1], medium=medium))[16:56, 16:48].reshape(-1, 3)
        distances = [float(np.abs(painted - photo).mean()) for photo in photos]
        hits += int(np.argmin(distances)) == i
    assert hits >= 10
