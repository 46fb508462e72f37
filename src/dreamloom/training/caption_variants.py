"""Caption variants: a photo's prompt with a line chosen, tags shuffled and tags left out.

A photo has a fixed number of variants, made before training begins: frozen text encoders encode
them once. Which of them a photo is trained with is a function of its round, as its crop is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from dreamloom.core.device import seed_for
from dreamloom.data.photos.check import compile_words

VARIANTS = 16
"""Variants of a photo's prompt where it varies, or the next multiple of its lines."""


@dataclass(frozen=True)
class CaptionPlan:
    """How photos' prompts are varied; by default not at all.

    Args:
        choose_line: Whether each line is a caption of its own.
        shuffle: Whether tags, which commas part, are put in another order.
        keep_tokens: How many first tags are neither moved nor left out, 0 or more.
        tag_dropout: The share of the other tags that is left out, 0 to 1.
        words: The words that are taught: a tag that holds one is never left out.
    """

    choose_line: bool = False
    shuffle: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    words: tuple[str, ...] = ()

    @property
    def varies_tags(self) -> bool:
        """Whether anything happens to tags."""
        return self.shuffle or self.tag_dropout > 0


AS_WRITTEN = CaptionPlan()
"""Nothing is varied."""


def list_lines(caption: str, plan: CaptionPlan) -> list[str]:
    """List the captions among which one is chosen: one, or one a line."""
    return (caption.splitlines() if plan.choose_line else []) or [caption]


def list_variants(caption: str, plan: CaptionPlan, seed: int, photo: int) -> tuple[str, ...]:
    """List what a photo is trained with in its rounds, over and over: at round r the r-th.

    Each line is chosen equally often. What does not vary is there once, as it was written.

    Args:
        caption: The photo's prompt.
        plan: How it is varied.
        seed: The run's seed.
        photo: The photo's number.
    """
    lines = list_lines(caption, plan)
    if len(lines) == 1 and not plan.varies_tags:
        return (caption,)
    variants = []
    for variant in range(-(-VARIANTS // len(lines)) * len(lines)):
        pack, place = divmod(variant, len(lines))
        order = list(range(len(lines)))
        random.Random(seed_for(seed, "caption line", photo, pack)).shuffle(order)
        rng = random.Random(seed_for(seed, "caption tags", photo, variant))
        variants.append(vary_tags(lines[order[place]], plan, rng))
    return tuple(variants)


def vary_tags(caption: str, plan: CaptionPlan, rng: random.Random) -> str:
    """Shuffle a caption's tags and leave some out; at least one stays.

    Args:
        caption: Tags with commas between them; blank ones go.
        plan: How they are varied; if not at all, the caption stays as it was written.
        rng: Decides.
    """
    if not plan.varies_tags:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, others = tags[: plan.keep_tokens], tags[plan.keep_tokens :]
    if plan.shuffle:
        rng.shuffle(others)
    taught = compile_words(plan.words)
    # Drawn for every tag, so that one that always stays does not decide about the next.
    stays = [rng.random() >= plan.tag_dropout for _ in others]
    left = [tag for tag, stay in zip(others, stays, strict=True) if stay or taught.search(tag)]
    return ", ".join([*first, *left] or others[:1])
