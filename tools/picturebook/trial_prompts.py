"""What the adapters on trial are asked for: by category, the class and other classes beside.

Prompts of most categories leave alone who somebody is. Those that contradict it ask for another
colour of hair than the person's, one that class prompts teach and one that they leave out, and
for another beard: an adapter that only knows one face cannot draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dreamloom.picturebook.world import Identity

PORTRAIT = "a photo of {subject}"
"""The prompt whose pictures are compared with drawings and photos of the subject."""

Category = Literal[
    "portrait", "scene", "medium", "view", "accessory", "combination", "contradiction"
]


@dataclass(frozen=True)
class Ask:
    """One prompt of the subject, and what a picture that obeys it shows.

    Args:
        text: The prompt, with ``{subject}``.
        category: What kind of change it asks for.
        shown: What it asks for beside who somebody is, by the reader's attributes.
        changed: Fields of `Identity` that it contradicts, with what it asks for instead.
        contradicts: The one attribute of ``changed`` that the reader is asked about; empty where
            nothing is contradicted.
        left_out: Whether class prompts never ask for it.
    """

    text: str
    category: Category
    shown: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    contradicts: str = ""
    left_out: bool = False

    @property
    def wanted(self) -> dict[str, str]:
        """All attributes that a picture should show."""
        asked = {self.contradicts: self.changed[self.contradicts]} if self.contradicts else {}
        return self.shown | asked


_PHOTO, _PAINTING, _SKETCH = {"medium": "photo"}, {"medium": "painting"}, {"medium": "sketch"}

PLAIN = Ask(PORTRAIT, "portrait", _PHOTO)
"""The portrait's prompt, which asks for nothing more."""

ASKED: tuple[Ask, ...] = (
    Ask("a photo of {subject} in the snow", "scene", _PHOTO | {"scene": "snow"}),
    Ask("a photo of {subject} at night", "scene", _PHOTO | {"scene": "night"}),
    Ask("a photo of {subject} on a beach", "scene", _PHOTO | {"scene": "beach"}),
    Ask("a painting of {subject}", "medium", _PAINTING),
    Ask("a pencil sketch of {subject}", "medium", _SKETCH),
    Ask("a painting of {subject} in the style of Van Gogh", "medium", {"medium": "van gogh"}),
    Ask("a side view photo of {subject}", "view", _PHOTO | {"view": "side"}),
    Ask("a photo of {subject} wearing sunglasses", "accessory", _PHOTO | {"glasses": "sunglasses"}),
    Ask("a photo of {subject} with glasses", "accessory", _PHOTO | {"glasses": "glasses"}),
    Ask("a photo of {subject} wearing a top hat", "accessory", _PHOTO | {"hat": "top hat"}),
    Ask("a photo of {subject} wearing a cap", "accessory", _PHOTO | {"hat": "cap"}, left_out=True),
    Ask(
        "a painting of {subject} at Oktoberfest",
        "combination",
        _PAINTING | {"scene": "oktoberfest"},
    ),
    Ask("a pencil sketch of {subject} in a city", "combination", _SKETCH | {"scene": "city"}),
    Ask(
        "a photo of {subject} with glasses in a forest",
        "combination",
        _PHOTO | {"glasses": "glasses", "scene": "forest"},
    ),
    Ask(
        "a photo of {subject} wearing a cap in the mountains",
        "combination",
        _PHOTO | {"hat": "cap", "scene": "mountains"},
        left_out=True,
    ),
    Ask(
        "a side view photo of {subject} at night",
        "combination",
        _PHOTO | {"view": "side", "scene": "night"},
    ),
)
"""Prompts none of which contradicts who somebody is."""

CLASS_ASKED = (
    "a painting of a {class_noun}",
    "a photo of a {class_noun} with blonde hair",
    "a photo of a {class_noun} in the snow",
)
"""Prompts of the class beside the plain one."""

OTHERS = {"dog": "a photo of a dog", "robot": "a photo of a robot"}
"""Prompts of other classes, by the kind that a picture should show."""

_LEFT_OUT_HAIR = "blue"
_TAUGHT_HAIR = ("blonde", "black", "red")


def contradicting(person: Identity) -> list[Ask]:
    """Ask for what somebody does not look like, always in as many prompts."""
    colours = [colour for colour in _TAUGHT_HAIR if colour != person.hair]
    # Whoever has the colour that is left out is asked for a further one of the others.
    odd = _LEFT_OUT_HAIR if person.hair != _LEFT_OUT_HAIR else colours[2]
    first, second = colours[:2]
    return [
        _ask_for_hair(person, first),
        _ask_for_hair(person, first, "a painting of {subject}", shown=_PAINTING),
        _ask_for_hair(person, second, place=" in the snow", shown=_PHOTO | {"scene": "snow"}),
        _ask_for_hair(person, odd),
        _ask_for_beard(person),
    ]


def contradicting_anybody(people: Sequence[Identity]) -> list[Ask]:
    """Gather what contradicts any of several persons, each prompt once."""
    asked = {ask.text: ask for person in people for ask in contradicting(person)}
    return list(asked.values())


def _ask_for_hair(
    person: Identity,
    colour: str,
    start: str = PORTRAIT,
    place: str = "",
    shown: dict[str, str] = _PHOTO,
) -> Ask:
    changed = {"hair": colour}
    words = f"{colour} hair"
    if person.style == "bald":
        # Hair that cannot be seen has no colour: it must be asked for as well.
        changed["style"] = "short"
        words = f"short {words}"
    return Ask(
        f"{start} with {words}{place}",
        "contradiction",
        shown,
        changed,
        contradicts="hair",
        left_out=colour == _LEFT_OUT_HAIR,
    )


def _ask_for_beard(person: Identity) -> Ask:
    # No caption has words for no beard.
    beard = "beard" if person.beard != "beard" else "mustache"
    return Ask(
        f"{PORTRAIT} with a {beard}",
        "contradiction",
        _PHOTO,
        {"beard": beard},
        contradicts="beard",
        left_out=True,
    )
