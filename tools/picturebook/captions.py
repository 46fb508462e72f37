"""Put drawings into words: true, varied, and in the forms that people ask for.

A caption names a random part of what is true of a drawing, in random order. What cannot be seen
is never named: hair colours in a pencil sketch, eyes behind sunglasses, a mohawk under a hat.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from dreamloom.picturebook.world import (
    KINDS,
    KNOWN_PERSONS,
    Drawing,
    Mark,
    Medium,
    Scene,
    known_person,
)

CLASS_CAPTION = "a photo of a person"
"""Names nothing of a person; what it draws should be anybody."""

_SHORT_SHARE = 0.1
_NAMED_SHARE = 0.85
_UNKNOWN_WORD_SHARE = 0.25
_UNSAID_PHOTO_SHARE = 0.1

_SCENE_PHRASES: dict[Scene, tuple[str, ...]] = {
    "studio": ("in a studio", "in the studio"),
    "beach": ("on a beach", "on the beach", "at the beach"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "snow": ("in the snow", "in snow"),
    "city": ("in a city", "in the city"),
    "mountains": ("in the mountains",),
    "night": ("at night",),
    "oktoberfest": ("at Oktoberfest", "at Oktoberfest", "at the Oktoberfest"),
}
_MEDIUM_NOUNS: dict[Medium, tuple[str, ...]] = {
    "photo": ("photo", "photo", "photo", "photograph", "picture"),
    "painting": ("painting", "painting", "oil painting"),
    "sketch": ("pencil sketch", "pencil sketch", "sketch", "pencil drawing"),
    "van gogh": ("painting",),
    "pixel art": ("photo",),
}
_VAN_GOGH_TAILS = ("in the style of Van Gogh", "in the style of Van Gogh", "by Van Gogh")
_MARK_PHRASES: dict[Mark, str] = {
    "mole": "with a mole",
    "freckles": "with freckles",
    "blush": "with rosy cheeks",
    "scar": "with a scar",
}
_COLOUR_ATTRIBUTES = ("hair", "eyes", "shirt", "collar", "coat")
_MEANINGFUL_WORDS = (
    "a an at by in of on and art bald bun cap cat city dog eyes fur gogh gold gray hair hat long "
    "mole open oil photo pixel red robot scar short side sketch snow style the top van view with "
    "woods"
)


class _Phrase(NamedTuple):
    """Words for a caption and the attributes that they state."""

    words: str
    attributes: tuple[str, ...]


def attributes(drawing: Drawing) -> dict[str, str]:
    """State what is true and visible in a drawing, by attribute.

    Every drawing has kind, scene, medium, view, mood, glasses and hat. Persons also have hair,
    style, eyes, beard, mark, earrings and shirt; dogs and cats eyes, coat and collar; robots eyes
    and coat. Whatever cannot be seen is left out.
    """
    who = drawing.identity
    stated: dict[str, str] = {
        "kind": who.kind,
        "scene": drawing.scene,
        "medium": drawing.medium,
        "view": drawing.view,
        "mood": drawing.mood,
        "glasses": drawing.glasses,
        "hat": drawing.hat,
        "eyes": who.eyes,
    }
    if who.kind == "person":
        stated |= {"hair": who.hair, "style": who.style, "beard": who.beard, "mark": who.mark}
        stated |= {"earrings": "none" if who.earrings == "none" else "earrings"}
        stated |= {"shirt": drawing.shirt}
    else:
        stated |= {"coat": who.coat}
        if who.kind != "robot":
            stated |= {"collar": drawing.shirt}
    for hidden in _hidden_attributes(drawing):
        stated.pop(hidden, None)
    return stated


def caption(drawing: Drawing, rng: random.Random) -> str:
    """Write one of the many captions of a drawing."""
    return caption_with_attributes(drawing, rng)[0]


def caption_with_attributes(drawing: Drawing, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Write a caption, and return it with those `attributes` that it names.

    A known person's name stands before the noun in most captions; otherwise an unknown word does
    in a quarter of them, so that a word never seen before comes to mean "somebody".
    """
    visible = attributes(drawing)
    short = rng.random() < _SHORT_SHARE
    candour = rng.choice((0.25, 0.5, 0.8))
    adjectives = [] if short else _choose(rng, _adjectives(visible, rng), candour * 0.5)
    named = {name for phrase in adjectives for name in phrase.attributes}
    tails = [] if short else _choose(rng, _tails(visible, rng), candour)
    tails = [phrase for phrase in tails if not named.intersection(phrase.attributes)]
    rng.shuffle(tails)
    if not short and rng.random() < 0.75:
        scene = _Phrase(rng.choice(_SCENE_PHRASES[drawing.scene]), ("scene",))
        # Mostly last, as people write it.
        tails.insert(len(tails) if rng.random() < 0.7 else rng.randint(0, len(tails)), scene)
    noun = _Phrase(_noun_phrase(drawing, [phrase.words for phrase in adjectives], rng), ("kind",))
    phrases = _frame(drawing, noun, tails, rng, short=short)
    named = {name for phrase in [*adjectives, *phrases] for name in phrase.attributes}
    words = " ".join(phrase.words for phrase in phrases)
    return words, {name: value for name, value in visible.items() if name in named}


def unknown_word(rng: random.Random) -> str:
    """Invent a word of 2 to 5 letters that means nothing in this world, such as ``kzu``."""
    while True:
        if rng.random() < 0.5:
            count = rng.randint(2, 5)
            start = rng.randint(0, 1)
            word = "".join(
                rng.choice("aeiou" if (i + start) % 2 else "bcdfghjklmnprstvwxz")
                for i in range(count)
            )
        else:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5)))
        if (
            word not in _MEANINGFUL_WORDS.split()
            and word not in KINDS
            and word not in _known_names()
        ):
            return word


@cache
def _known_names() -> frozenset[str]:
    return frozenset(known_person(index)[0] for index in range(KNOWN_PERSONS))


def _hidden_attributes(drawing: Drawing) -> set[str]:
    who = drawing.identity
    hidden: set[str] = set()
    if drawing.medium == "sketch":
        hidden.update(_COLOUR_ATTRIBUTES)
    if drawing.glasses == "sunglasses":
        hidden.add("eyes")
    if who.style == "bald":
        hidden.add("hair")
    if who.style == "mohawk" and drawing.hat != "none":
        hidden.update(("style", "hair"))
    return hidden


def _choose(rng: random.Random, phrases: Sequence[_Phrase], share: float) -> list[_Phrase]:
    return [phrase for phrase in phrases if rng.random() < share]


def _adjectives(visible: dict[str, str], rng: random.Random) -> list[_Phrase]:
    phrases: list[_Phrase] = []
    if visible["mood"] == "smile":
        phrases.append(_Phrase("smiling", ("mood",)))
    if visible.get("style") == "bald":
        phrases.append(_Phrase("bald", ("style",)))
    if visible.get("beard") == "beard" and rng.random() < 0.3:
        phrases.append(_Phrase("bearded", ("beard",)))
    if visible.get("hair") == "blonde" and rng.random() < 0.3:
        phrases.append(_Phrase("blonde", ("hair",)))
    if "coat" in visible:
        phrases.append(_Phrase(visible["coat"], ("coat",)))
    rng.shuffle(phrases)
    return phrases[:2]


def _tails(visible: dict[str, str], rng: random.Random) -> list[_Phrase]:
    applying = rng.choice(("with", "wearing"))
    phrases: list[_Phrase] = []
    if visible["glasses"] != "none":
        phrases.append(_Phrase(f"{applying} {visible['glasses']}", ("glasses",)))
    if visible["hat"] != "none":
        applying = rng.choice(("wearing", "wearing", "with"))
        phrases.append(_Phrase(f"{applying} a {visible['hat']}", ("hat",)))
    if visible["mood"] == "open":
        phrases.append(_Phrase("with an open mouth", ("mood",)))
    if visible["kind"] == "person":
        return phrases + _person_tails(visible, rng)
    if "eyes" in visible and rng.random() < 0.5:
        phrases.append(_Phrase(f"with {visible['eyes']} eyes", ("eyes",)))
    if "collar" in visible and rng.random() < 0.5:
        phrases.append(_Phrase(f"with {_with_article(visible['collar'])} collar", ("collar",)))
    if "coat" in visible and visible["kind"] != "robot" and rng.random() < 0.4:
        phrases.append(_Phrase(f"with {visible['coat']} fur", ("coat",)))
    return phrases


def _person_tails(visible: dict[str, str], rng: random.Random) -> list[_Phrase]:
    phrases = _hair_tails(visible, rng)
    if visible["beard"] != "none":
        phrases.append(_Phrase(f"with a {visible['beard']}", ("beard",)))
    if "eyes" in visible:
        phrases.append(_Phrase(f"with {visible['eyes']} eyes", ("eyes",)))
    if visible["mark"] != "none" and rng.random() < 0.5:
        phrases += [
            _Phrase(words, ("mark",))
            for mark, words in _MARK_PHRASES.items()
            if mark == visible["mark"]
        ]
    if visible["earrings"] != "none" and rng.random() < 0.4:
        phrases.append(_Phrase("with earrings", ("earrings",)))
    if "shirt" in visible and rng.random() < 0.7:
        start = rng.choice(("wearing", "in"))
        phrases.append(_Phrase(f"{start} {_with_article(visible['shirt'])} shirt", ("shirt",)))
    return phrases


def _hair_tails(visible: dict[str, str], rng: random.Random) -> list[_Phrase]:
    hair, style = visible.get("hair"), visible.get("style")
    styled = style in ("short", "long", "curly")
    choices: list[_Phrase] = []
    if hair:
        choices += [_Phrase(f"with {hair} hair", ("hair",))] * 3
    if style and styled:
        choices.append(_Phrase(f"with {style} hair", ("style",)))
    if style in ("bun", "mohawk"):
        choices.append(_Phrase(f"with a {style}", ("style",)))
    if hair and style and styled:
        choices += [_Phrase(f"with {style} {hair} hair", ("style", "hair"))] * 2
    if hair and style in ("bun", "mohawk"):
        choices.append(_Phrase(f"with a {hair} {style}", ("style", "hair")))
    return [rng.choice(choices)] if choices else []


def _noun_phrase(drawing: Drawing, adjectives: list[str], rng: random.Random) -> str:
    """Say who: ``a smiling person``, ``person`` or ``rraj person``."""
    word = ""
    if drawing.name and rng.random() < _NAMED_SHARE:
        word = drawing.name
    elif not drawing.name and rng.random() < _UNKNOWN_WORD_SHARE:
        word = unknown_word(rng)
    words = " ".join([*adjectives, *([word] if word else []), drawing.identity.kind])
    # Identifiers are asked for without an article; plain nouns mostly with one.
    with_article = rng.random() < (0.1 if word else 0.85)
    return _with_article(words) if with_article else words


def _frame(
    drawing: Drawing, noun: _Phrase, tails: list[_Phrase], rng: random.Random, *, short: bool
) -> list[_Phrase]:
    """Put the medium and the view around who and what."""
    side = drawing.view == "side" and not short and rng.random() < 0.85
    front = drawing.view == "front" and not short and rng.random() < 0.04
    medium = drawing.medium
    if medium == "photo" and not side and not front and rng.random() < _UNSAID_PHOTO_SHARE:
        return [noun, *tails]
    if medium == "pixel art" and not side and rng.random() < 0.4:
        return [_Phrase("pixel art of", ("medium",)), noun, *tails]
    named = ["medium"]
    picture = rng.choice(_MEDIUM_NOUNS[medium])
    tails = list(tails)
    if medium == "van gogh":
        if rng.random() < 0.2:
            picture = "Van Gogh painting"
        else:
            style = _Phrase(rng.choice(_VAN_GOGH_TAILS), ("medium",))
            tails.insert(rng.choice((0, len(tails), len(tails))), style)
    if front:
        picture, named = f"front view {picture}", [*named, "view"]
    elif side and rng.random() < 0.75:
        picture, named = (
            f"{rng.choice(('side view', 'side view', 'profile'))} {picture}",
            [*named, "view"],
        )
    elif side:
        tails.insert(rng.randint(0, len(tails)), _Phrase("from the side", ("view",)))
    if rng.random() < 0.92:
        picture = _with_article(picture)
    trigger = "pixel, " if medium == "pixel art" else ""
    return [_Phrase(f"{trigger}{picture} of", tuple(named)), noun, *tails]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
