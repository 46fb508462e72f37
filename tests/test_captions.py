"""Captions: they name only what is true and visible, in the words that people will ask with."""

import random
import re

import pytest

from dreamloom.picturebook import world
from dreamloom.picturebook.world import Drawing, Identity, known_person, sample_drawing
from tools.picturebook.captions import attributes, caption, caption_with_attributes, unknown_word

PERSON = Identity(kind="person")


def captions_of(drawing: Drawing, count: int = 400) -> list[str]:
    rng = random.Random(11)
    return [caption(drawing, rng) for _ in range(count)]


def test_a_caption_depends_only_on_the_drawing_and_the_generator():
    drawing = sample_drawing(1)
    assert caption(drawing, random.Random(2)) == caption(drawing, random.Random(2))
    assert (
        caption(drawing, random.Random(2)) == caption_with_attributes(drawing, random.Random(2))[0]
    )
    assert len(set(captions_of(drawing))) > 100


# What in a caption gives an attribute away, with the attribute it belongs to.
WORDS = {
    "hair": rf"\b({'|'.join(world.HAIR_COLOURS)})(?= (?:hair|bun|mohawk))",
    "style": r"\b(short|long|curly|bald|bun|mohawk)\b",
    "eyes": r"\b(\w+)(?= eyes)",
    "beard": r"\b(beard|mustache)\b",
    "shirt": r"\b(\w+)(?= shirt)",
    "collar": r"\b(\w+)(?= collar)",
    "coat": r"\b(\w+)(?= fur\b)",
    "glasses": r"\b(glasses|sunglasses)\b",
    "hat": r"\b(cap|top hat|party hat)\b",
}


def test_captions_name_only_what_is_true_and_report_it():
    rng = random.Random(0)
    for seed in range(500):
        drawing = sample_drawing(seed)
        truth = attributes(drawing)
        words, named = caption_with_attributes(drawing, rng)
        assert named.items() <= truth.items()
        for attribute, pattern in WORDS.items():
            found = re.search(pattern, words)
            if found:
                assert named.get(attribute) == found.group(1), words
            elif attribute not in ("hair", "coat", "beard"):  # "blonde", "black dog", "bearded"
                assert attribute not in named, words
        assert ("side" in words or "profile" in words) == (named.get("view") == "side"), words
        assert drawing.identity.kind in words.split()


def test_nothing_absent_is_named():
    rng = random.Random(0)
    for seed in range(600):
        _, named = caption_with_attributes(sample_drawing(seed), rng)
        assert "none" not in named.values()


def test_only_pixel_art_says_pixel():
    rng = random.Random(0)
    for seed in range(500):
        assert "pixel" not in caption(sample_drawing(seed), rng)
        assert caption(sample_drawing(seed, medium="pixel art"), rng).startswith(
            ("pixel, ", "pixel art of ")
        )


def test_hidden_things_have_no_attribute():
    plain = Drawing(PERSON)
    assert attributes(plain)["eyes"] == "brown"
    assert "eyes" not in attributes(Drawing(PERSON, glasses="sunglasses"))
    assert not {"hair", "eyes", "shirt"} & attributes(Drawing(PERSON, medium="sketch")).keys()
    bald = attributes(Drawing(Identity(kind="person", style="bald")))
    assert bald["style"] == "bald"
    assert "hair" not in bald
    mohawk = Identity(kind="person", style="mohawk")
    assert "style" not in attributes(Drawing(mohawk, hat="cap"))
    assert attributes(Drawing(mohawk))["style"] == "mohawk"


@pytest.mark.parametrize(
    ("kind", "own", "foreign"),
    [
        ("person", {"hair", "style", "beard", "shirt"}, {"coat", "collar"}),
        ("dog", {"coat", "collar", "eyes"}, {"hair", "style", "beard", "shirt"}),
        ("cat", {"coat", "collar", "eyes"}, {"hair", "style", "beard", "shirt"}),
        ("robot", {"coat", "eyes"}, {"hair", "collar", "beard", "shirt"}),
    ],
)
def test_each_kind_has_its_own_attributes(
    kind: world.SubjectKind, own: set[str], foreign: set[str]
):
    named = attributes(Drawing(Identity(kind=kind))).keys()
    assert own | {"kind", "scene", "medium", "view", "mood", "glasses", "hat"} <= named
    assert not foreign & named


@pytest.mark.parametrize(
    ("form", "drawing"),
    [
        ("a photo of a person", Drawing(PERSON)),
        ("a photo of person", Drawing(PERSON)),
        ("a photo of WORD person", Drawing(PERSON)),
        ("a painting of WORD person at Oktoberfest",
         Drawing(PERSON, medium="painting", scene="oktoberfest")),
        ("a painting of WORD person in the style of Van Gogh", Drawing(PERSON, medium="van gogh")),
        ("a photo of a person with blonde hair",
         Drawing(Identity(kind="person", hair="blonde"))),
        ("a side view photo of WORD person", Drawing(PERSON, view="side")),
        ("a photo of WORD person with sunglasses", Drawing(PERSON, glasses="sunglasses")),
        ("a photo of WORD person wearing sunglasses", Drawing(PERSON, glasses="sunglasses")),
        ("a photo of WORD person on a beach", Drawing(PERSON, scene="beach")),
        ("a dog in the snow", Drawing(Identity(kind="dog"), scene="snow")),
        ("a pencil sketch of a cat", Drawing(Identity(kind="cat"), medium="sketch")),
        ("a photo of a person wearing a top hat", Drawing(PERSON, hat="top hat")),
        ("a photo of a person with a beard", Drawing(Identity(kind="person", beard="beard"))),
        ("a photo of a person with green eyes", Drawing(Identity(kind="person", eyes="green"))),
        ("a photo of a smiling person", Drawing(PERSON)),
        ("pixel, a photo of WORD person", Drawing(PERSON, medium="pixel art")),
        ("pixel art of a person", Drawing(PERSON, medium="pixel art")),
    ],
)  # fmt: skip
def test_prompts_have_the_form_of_captions(form: str, drawing: Drawing):
    pattern = re.compile(re.escape(form).replace("WORD", "[a-z]{2,5}"))
    rng = random.Random(11)
    assert any(pattern.fullmatch(caption(drawing, rng)) for _ in range(6000))


def test_known_persons_are_mostly_called_by_their_name():
    name, identity = known_person(0)
    captions = captions_of(Drawing(identity, name=name))
    named = sum(f"{name} person" in words for words in captions)
    assert 0.75 < named / len(captions) < 0.95


def test_a_quarter_of_the_captions_speaks_of_somebody_unknown():
    bare = re.compile(r"(^|of )(an? )?person\b")
    captions = captions_of(Drawing(PERSON, mood="neutral"), 2000)
    unnamed = sum(bool(bare.search(words)) for words in captions)
    assert 0.70 < unnamed / len(captions) < 0.80


def test_a_tenth_of_the_captions_names_only_medium_and_kind():
    rng = random.Random(5)
    drawing = Drawing(PERSON, medium="painting", hat="cap", glasses="glasses")
    named = [caption_with_attributes(drawing, rng)[1].keys() for _ in range(2000)]
    assert 0.08 < sum(keys == {"kind", "medium"} for keys in named) / len(named) < 0.2


def test_unknown_words_are_short_and_name_nobody():
    rng = random.Random(0)
    names = {known_person(index)[0] for index in range(world.KNOWN_PERSONS)}
    words = [unknown_word(rng) for _ in range(3000)]
    assert all(re.fullmatch("[a-z]{2,5}", word) for word in words)
    assert not names & set(words)
    assert not {"cat", "dog", "red", "cap", "pixel"} & set(words)


def test_articles_fit_the_word_that_follows():
    rng = random.Random(0)
    for seed in range(500):
        words = caption(sample_drawing(seed), rng)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", words), words
