"""The drawn world: who and what its pictures show.

A picture is a record of plain values, a `Drawing`, whose `Identity` says who is drawn. The same
record always gives the same picture (`drawing.draw`) and states what is true of it
(`captions.attributes`), so training data and judgements come from one source. Records are sampled
from *world seeds*: seeds from ``JUDGING_SEED_START`` on are for judging and never trained on.
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypedDict, TypeVar, Unpack, get_args

SubjectKind = Literal["person", "dog", "cat", "robot"]
Skin = Literal["porcelain", "fair", "tan", "bronze", "brown", "dark"]
Hair = Literal["black", "brown", "blonde", "red", "gray", "blue"]
HairStyle = Literal["short", "long", "curly", "bald", "bun", "mohawk"]
Eyes = Literal["brown", "blue", "green", "gray"]
Beard = Literal["none", "beard", "mustache"]
Brows = Literal["thin", "thick", "arched"]
Mark = Literal["none", "mole", "freckles", "blush", "scar"]
Earrings = Literal["none", "gold", "pearl", "turquoise"]
Coat = Literal[
    "black", "brown", "golden", "ginger", "gray", "white", "silver", "red", "blue", "green"
]
Patch = Literal["none", "eye patch", "blaze", "cheeks"]
Ears = Literal["floppy", "pointed", "round"]
Glasses = Literal["none", "glasses", "sunglasses"]
Hat = Literal["none", "cap", "top hat", "party hat"]
Mood = Literal["smile", "neutral", "open"]
Shirt = Literal["red", "blue", "green", "yellow", "white", "purple", "orange", "black"]
View = Literal["front", "side"]
Scene = Literal["studio", "beach", "forest", "snow", "city", "mountains", "night", "oktoberfest"]
Medium = Literal["photo", "painting", "sketch", "van gogh", "pixel art"]

KINDS: tuple[SubjectKind, ...] = get_args(SubjectKind)
SKINS: tuple[Skin, ...] = get_args(Skin)
HAIR_COLOURS: tuple[Hair, ...] = get_args(Hair)
HAIR_STYLES: tuple[HairStyle, ...] = get_args(HairStyle)
EYE_COLOURS: tuple[Eyes, ...] = get_args(Eyes)
BEARDS: tuple[Beard, ...] = get_args(Beard)
BROWS: tuple[Brows, ...] = get_args(Brows)
MARKS: tuple[Mark, ...] = get_args(Mark)
EARRINGS: tuple[Earrings, ...] = get_args(Earrings)
FUR_COLOURS: tuple[Coat, ...] = ("black", "brown", "golden", "ginger", "gray", "white")
METAL_COLOURS: tuple[Coat, ...] = ("silver", "golden", "red", "blue", "green")
PATCHES: tuple[Patch, ...] = get_args(Patch)
EAR_SHAPES: tuple[Ears, ...] = get_args(Ears)
GLASSES: tuple[Glasses, ...] = get_args(Glasses)
HATS: tuple[Hat, ...] = get_args(Hat)
MOODS: tuple[Mood, ...] = get_args(Mood)
SHIRT_COLOURS: tuple[Shirt, ...] = get_args(Shirt)
VIEWS: tuple[View, ...] = get_args(View)
SCENES: tuple[Scene, ...] = get_args(Scene)
MEDIA: tuple[Medium, ...] = get_args(Medium)
# Pixel art is held back, so that a second adapter has a style to teach the base model.
TRAINED_MEDIA: tuple[Medium, ...] = ("photo", "painting", "sketch", "van gogh")
BACKDROPS = 4
KNOWN_PERSONS = 300
JUDGING_SEED_START = 9_000_000

_KNOWN_SHARE = 0.25
# Words and well-known names that the syllables below could spell.
_TAKEN_NAMES = (
    "bambi banbi banjo bilbo bingo bombe bongo cargo dildo dingo dumbo forge fungi garbo gorge "
    "gumbo kendo large limbo linda mambo mango marge marko merge milfo pongo purge rambo rondo "
    "rumba salvo serge serve solve sumvo tango tempo turbo valve verge verdi vulvi vulvo vulvu "
    "zombi zorbo"
)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Identity:
    """Everything that makes somebody who they are; fields of other kinds keep their default.

    ``face_width`` is the head's width relative to the average, 0.84 to 1.16; ``nose`` is the
    nose's size relative to the average, 0.6 to 1.6. Dogs, cats and robots have a ``coat`` (fur
    or metal), a ``patch`` of another shade and ``ears`` (a robot's antennas) instead of a
    person's skin, hair, beard, brows, mark and earrings.
    """

    kind: SubjectKind
    eyes: Eyes = "brown"
    face_width: float = 1.0
    nose: float = 1.0
    skin: Skin = "fair"
    hair: Hair = "brown"
    style: HairStyle = "short"
    beard: Beard = "none"
    brows: Brows = "thin"
    mark: Mark = "none"
    earrings: Earrings = "none"
    coat: Coat = "gray"
    patch: Patch = "none"
    ears: Ears = "pointed"


@dataclass(frozen=True)
class Drawing:
    """One picture: who is in it, what they wear today, and where and how they are drawn.

    ``shift_x`` and ``shift_y`` move the figure by fractions of the picture's height (right and
    down), ``zoom`` is its size relative to the usual, ``backdrop`` picks one of the scene's
    ``BACKDROPS`` variants, ``stroke_seed`` seeds everything irregular. Side views look left.
    ``name`` is a known person's name, else empty.
    """

    identity: Identity
    glasses: Glasses = "none"
    hat: Hat = "none"
    mood: Mood = "smile"
    shirt: Shirt = "blue"
    view: View = "front"
    scene: Scene = "studio"
    medium: Medium = "photo"
    shift_x: float = 0.0
    shift_y: float = 0.0
    zoom: float = 1.0
    backdrop: int = 0
    stroke_seed: int = 0
    name: str = ""


class DrawingFields(TypedDict, total=False):
    """The fields of a `Drawing` that a caller may fix while the rest is sampled."""

    identity: Identity
    glasses: Glasses
    hat: Hat
    mood: Mood
    shirt: Shirt
    view: View
    scene: Scene
    medium: Medium
    shift_x: float
    shift_y: float
    zoom: float
    backdrop: int
    stroke_seed: int
    name: str


def sample_identity(rng: random.Random, kind: SubjectKind | None = None) -> Identity:
    """Invent somebody: a person in about two of three cases, unless ``kind`` says what."""
    chosen: SubjectKind = _pick(rng, KINDS, (65, 13, 13, 9)) if kind is None else kind
    eyes = rng.choice(EYE_COLOURS)
    face_width = round(rng.uniform(0.84, 1.16), 3)
    nose = round(rng.uniform(0.6, 1.6), 3)
    if chosen != "person":
        return Identity(
            kind=chosen,
            eyes=eyes,
            face_width=face_width,
            nose=nose,
            coat=rng.choice(METAL_COLOURS if chosen == "robot" else FUR_COLOURS),
            patch=rng.choice(PATCHES),
            # Round ears make a bear of a dog or a cat.
            ears=rng.choice(EAR_SHAPES if chosen == "robot" else EAR_SHAPES[:2]),
        )
    return Identity(
        kind=chosen,
        eyes=eyes,
        face_width=face_width,
        nose=nose,
        skin=rng.choice(SKINS),
        hair=rng.choice(HAIR_COLOURS),
        style=_pick(rng, HAIR_STYLES, (20, 20, 18, 10, 16, 16)),
        beard=_pick(rng, BEARDS, (64, 20, 16)),
        brows=rng.choice(BROWS),
        mark=_pick(rng, MARKS, (40, 15, 15, 15, 15)),
        earrings=_pick(rng, EARRINGS, (55, 15, 15, 15)),
    )


def sample_drawing(
    seed: int, kind: SubjectKind | None = None, **fixed: Unpack[DrawingFields]
) -> Drawing:
    """Sample the picture of one world seed.

    A quarter of the persons are known ones, with ``name`` set. Fixing fields leaves all other
    fields of that seed as they were, except that fixing ``kind`` or ``identity`` changes who it
    is. The medium is a trained one unless fixed.

    Args:
        seed: World seed, 0 or more; from ``JUDGING_SEED_START`` on it is for judging only.
        kind: The kind of figure; None for a mixture, about 65 % of it persons.
        fixed: Fields of `Drawing` to set.

    Raises:
        ValueError: If the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"a world seed must be 0 or more, got {seed}")
    # Who and how come from separate streams, so that fixing one leaves the other alone.
    who = random.Random(f"who {seed}")
    identity, name = sample_identity(who, kind), ""
    if identity.kind == "person" and who.random() < _KNOWN_SHARE:
        name, identity = known_person(who.randrange(KNOWN_PERSONS))
    if "identity" in fixed:
        identity, name = fixed["identity"], ""
    drawing = _sample_circumstances(random.Random(f"how {seed}"), identity, name)
    return replace(drawing, **fixed)


def vary(
    subject: Drawing | Identity, rng: random.Random, **fixed: Unpack[DrawingFields]
) -> Drawing:
    """Sample another picture of the same identity (and, given a drawing, the same name)."""
    if isinstance(subject, Drawing):
        identity, name = subject.identity, subject.name
    else:
        identity, name = subject, ""
    return replace(_sample_circumstances(rng, identity, name), **fixed)


def known_person(index: int) -> tuple[str, Identity]:
    """Look up the name and the looks of one of the persons whom training names.

    Raises:
        ValueError: If ``index`` is not in 0 to ``KNOWN_PERSONS`` - 1.
    """
    if not 0 <= index < KNOWN_PERSONS:
        raise ValueError(f"a known person's index is 0 to {KNOWN_PERSONS - 1}, got {index}")
    name = _known_names()[index]
    return name, sample_identity(random.Random(f"known person {name}"), "person")


def _sample_circumstances(rng: random.Random, identity: Identity, name: str) -> Drawing:
    return Drawing(
        identity=identity,
        glasses=_pick(rng, GLASSES, (60, 20, 20)),
        hat=_pick(rng, HATS, (55, 15, 15, 15)),
        mood=rng.choice(MOODS),
        shirt=rng.choice(SHIRT_COLOURS),
        view=_pick(rng, VIEWS, (75, 25)),
        scene=rng.choice(SCENES),
        medium=_pick(rng, TRAINED_MEDIA, (49, 17, 17, 17)),
        shift_x=round(rng.uniform(-0.06, 0.06), 4),
        shift_y=round(rng.uniform(-0.02, 0.04), 4),
        zoom=round(rng.uniform(0.86, 1.1), 4),
        backdrop=rng.randrange(BACKDROPS),
        stroke_seed=rng.randrange(2**31),
        name=name,
    )


def _pick(rng: random.Random, values: tuple[_Value, ...], weights: tuple[int, ...]) -> _Value:
    return rng.choices(values, weights)[0]


@cache
def _known_names() -> tuple[str, ...]:
    rng = random.Random("names of the known persons")
    names: dict[str, None] = {}
    while len(names) < KNOWN_PERSONS:
        letters = ("bdfgklmnprstvz", "aeiou", "lmnr", "bdfgkpvz", "eiou")
        name = "".join(rng.choice(choices) for choices in letters)
        if name not in _TAKEN_NAMES.split():
            names[name] = None
    return tuple(names)
