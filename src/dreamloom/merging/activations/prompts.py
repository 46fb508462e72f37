"""Prompts on which the base model's activations are gathered, for each LoRA and for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import Adapter

PLACES = (
    "",
    " in a studio",
    " on a beach",
    " in a forest",
    " in the snow",
    " in a city",
    " in the mountains",
    " at night",
)
MOTIFS = (" of a person", " of a dog", " of a cat", " of a house", " of a tree", " of a car")
_MEDIA = frozenset("photo picture image drawing painting illustration sketch art style".split())


@dataclass(frozen=True)
class MergePrompts:
    """What is asked while a merge is prepared.

    Args:
        each: The prompts of every adapter, in the adapters' order; as many for each.
        joint: Prompts that ask for all adapters at once.
    """

    each: tuple[tuple[str, ...], ...]
    joint: tuple[str, ...]


def find_prompts(
    adapters: Sequence[Adapter],
    count: int,
    given: Sequence[Sequence[str]] = (),
    joint: Sequence[str] = (),
) -> MergePrompts:
    """Find prompts for the adapters of a merge.

    An adapter tells what it was taught with: the prompt of its photos, or the words that stand for
    what it knows. That prompt is asked in different places, and if it names nobody, as a style's
    "pixel, a photo" does, of different motifs. Joint prompts put the words of the others before
    the first adapter's prompts. What is given is taken as it is.

    Args:
        adapters: In the user's order.
        count: How many prompts each adapter shall have; given ones are repeated or cut.
        given: Prompts for each adapter; an empty list means that it shall tell. None at all means
            that all shall.
        joint: Prompts that ask for all at once; found if there are none.

    Raises:
        ConfigError: If an adapter does not say what it was taught with, and nothing is given.
    """
    given = given or [()] * len(adapters)
    if len(given) != len(adapters):
        raise ConfigError(
            f"Prompts are given for {len(given)} adapters, but there are {len(adapters)}.",
            "Give each adapter its own, or none.",
        )
    each = [
        tuple(own) or _vary(_find_prompt(adapter, number), count)
        for number, (adapter, own) in enumerate(zip(adapters, given, strict=True), 1)
    ]
    each = [_repeat(prompts, count) for prompts in each]
    if not joint:
        words = [_find_words(adapter) for adapter in adapters[1:]]
        before = ", ".join(word for word in words if word)
        joint = [f"{before}, {prompt}" if before else prompt for prompt in each[0]]
    return MergePrompts(tuple(each), _repeat(tuple(joint), count))


def _find_prompt(adapter: Adapter, number: int) -> str:
    named = adapter.metadata.get("dreamloom.photo_prompt", "").strip()
    words = _find_words(adapter)
    if named or words:
        return named or f"a photo of {words}"
    raise ConfigError(
        f"Adapter {number} does not say what it was taught with, so the base model cannot be "
        "asked for it.",
        'Give a prompt for it, such as "a photo of sks dog".',
    )


def _find_words(adapter: Adapter) -> str:
    for key in ("dreamloom.subject", "modelspec.trigger_phrase"):
        words = adapter.metadata.get(key, "").strip()
        if words:
            return words
    return ""


def _vary(prompt: str, count: int) -> tuple[str, ...]:
    names_nobody = prompt.lower().split()[-1].strip(".,") in _MEDIA
    motifs = MOTIFS if names_nobody else ("",)
    return tuple(
        f"{prompt}{motifs[i % len(motifs)]}{PLACES[i % len(PLACES)]}" for i in range(count)
    )


def _repeat(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(prompts[i % len(prompts)] for i in range(count))
