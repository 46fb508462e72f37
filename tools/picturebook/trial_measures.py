"""What is measured of pictures on trial: who is seen, what was obeyed, what else has changed.

Each measure takes pictures and their partners, the base model's of the same prompts and seeds, so
that it can be shown pictures of any other origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from dreamloom.core.manifests import ImageSet
from dreamloom.data.image_io import open_upright
from dreamloom.data.tensors import to_tensor
from dreamloom.picturebook.judges import load_attribute_reader, load_identity_encoder
from tools.picturebook.trial_appearance import mean_of_pairs, measure_colour_change


@dataclass(frozen=True)
class Obedience:
    """What of the asked attributes is seen, picture by picture.

    Args:
        prompts: The number of each picture's prompt.
        shares: The share of what was asked for.
        shares_below: The same for the base model's partners.
    """

    prompts: list[int]
    shares: list[float]
    shares_below: list[float]


@dataclass(frozen=True)
class ClassChange:
    """What an adapter does to its class.

    Args:
        spread: The mean cosine of pairs of identities of the plain prompt.
        spread_below: The same for the base model.
        prompts: The number of the prompt of each picture of the class.
        distances: For each of these, 1 − cosine to who its partner shows: whatever the direction.
        colours: For each, ΔE of its mean colour and its partner's.
        hair: The colour of hair that is read in each picture of the plain prompt; "unseen" too.
        hair_below: The same for the base model.
    """

    spread: float
    spread_below: float
    prompts: list[int]
    distances: list[float]
    colours: list[float]
    hair: list[str]
    hair_below: list[str]


@dataclass(frozen=True)
class OthersChange:
    """What an adapter does to other classes: whether each kind is read, and ΔE to its partner."""

    read: list[bool]
    colours: list[float]


def open_all(*sets: ImageSet) -> list[Image.Image]:
    """Open the pictures of sets, one after the other."""
    return [open_upright(path) for images in sets for path in images.paths()]


def pair_up(own: ImageSet, base: ImageSet) -> ImageSet:
    """Select the partners of pictures: of the same prompts and seeds, in the same order."""
    there = {(picture.prompt, picture.seed): picture for picture in base.pictures}
    partners = tuple(there[picture.prompt, picture.seed] for picture in own.pictures)
    return base.model_copy(update={"pictures": partners})


def number_prompts(images: ImageSet) -> list[int]:
    """Number the prompts of pictures in their order."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(picture.prompt, len(numbers)) for picture in images.pictures]


def embed(images: Sequence[Image.Image]) -> Float[np.ndarray, "n d"]:
    """Turn pictures into the identity encoder's unit vectors."""
    return load_identity_encoder().embed(to_tensor(images)).double().numpy()


def mean_likeness(
    vectors: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, " n"]:
    """Give each picture's mean cosine to some drawings."""
    likeness: Float[np.ndarray, " n"] = (vectors @ others.T).mean(axis=1)
    return likeness


def measure_lift(
    own: Sequence[ImageSet],
    base: Sequence[ImageSet],
    drawings: Mapping[str, Float[np.ndarray, "_ d"]],
) -> float:
    """Place pictures between the base model (0) and drawings of what was asked for (1).

    Their mean likeness to the drawings of their prompts is compared with the base model's and with
    that of the drawings to each other. Means are taken before they are divided: a single prompt's
    base pictures may by chance resemble anybody.

    Args:
        own: Sets of pictures.
        base: Their partners.
        drawings: For each prompt, vectors of drawings that obey it.
    """
    prompts = [picture.prompt for images in own for picture in images.pictures]
    above, below = (embed(open_all(*sets)) for sets in (own, base))

    def compare(vectors: Float[np.ndarray, "n d"]) -> float:
        pairs = zip(vectors, prompts, strict=True)
        return float(np.mean([(drawings[prompt] @ vector).mean() for vector, prompt in pairs]))

    ceiling = float(np.mean([mean_of_pairs(drawings[prompt]) for prompt in prompts]))
    return lift(compare(above), compare(below), ceiling)


def lift(value: float, floor: float, ceiling: float) -> float:
    """Place a value on the way from a floor (0) to a ceiling (1).

    Where the ceiling is not above the floor there is no way to go, and nothing was lifted.
    """
    return (value - floor) / (ceiling - floor) if ceiling > floor else 0.0


def read_obedience(images: ImageSet, wanted: Mapping[str, Mapping[str, str]]) -> list[float]:
    """Read pictures; give the share of what their prompts ask for that each shows.

    Args:
        images: The pictures.
        wanted: For each prompt, the attributes that it asks for.
    """
    readings = load_attribute_reader().read(to_tensor(open_all(images)))
    return [
        float(np.mean([seen.get(name) == value for name, value in wanted[one.prompt].items()]))
        for one, seen in zip(images.pictures, readings, strict=True)
    ]


def judge_obedience(
    own: ImageSet, base: ImageSet, wanted: Mapping[str, Mapping[str, str]]
) -> Obedience:
    """Read pictures and their partners; see `read_obedience`."""
    shares = [read_obedience(images, wanted) for images in (own, base)]
    return Obedience(number_prompts(own), *shares)


def judge_class(own: tuple[ImageSet, ImageSet], base: tuple[ImageSet, ImageSet]) -> ClassChange:
    """Compare pictures of the class with their partners.

    Args:
        own: Of the plain class prompt, and of other prompts of the class.
        base: Their partners.
    """
    plain, plain_below = embed(open_all(own[0])), embed(open_all(base[0]))
    shown, shown_below = open_all(*own), open_all(*base)
    cosines = (embed(shown) * embed(shown_below)).sum(axis=1)
    prompts = [picture.prompt for images in own for picture in images.pictures]
    return ClassChange(
        spread=mean_of_pairs(plain),
        spread_below=mean_of_pairs(plain_below),
        prompts=[[*dict.fromkeys(prompts)].index(prompt) for prompt in prompts],
        distances=(1 - cosines).tolist(),
        colours=measure_colour_change(shown, shown_below).tolist(),
        hair=_read_hair(own[0]),
        hair_below=_read_hair(base[0]),
    )


def _read_hair(images: ImageSet) -> list[str]:
    readings = load_attribute_reader().read(to_tensor(open_all(images)))
    return [seen.get("hair", "unseen") for seen in readings]


def judge_others(own: ImageSet, base: ImageSet, kinds: Mapping[str, str]) -> OthersChange:
    """Compare pictures of other classes with their partners.

    Args:
        own: The pictures.
        base: Their partners.
        kinds: For each prompt, the kind of figure that it asks for.
    """
    shown = open_all(own)
    readings = load_attribute_reader().read(to_tensor(shown))
    return OthersChange(
        read=[
            seen["kind"] == kinds[one.prompt]
            for one, seen in zip(own.pictures, readings, strict=True)
        ],
        colours=measure_colour_change(shown, open_all(base)).tolist(),
    )
