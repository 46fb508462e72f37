"""Class prompts that keep what words mean to the built-in model while somebody is taught to it."""

from __future__ import annotations

CLASS_PROMPTS = (
    "a photo of a {class_noun} with blonde hair",
    "a painting of a {class_noun} at Oktoberfest",
    "a photo of a {class_noun} wearing sunglasses on a beach",
    "a pencil sketch of a {class_noun} in a city",
    "a side view photo of a {class_noun} in the snow",
    "a painting of a {class_noun} with black hair",
    "a photo of a {class_noun} wearing a top hat",
    "a photo of a {class_noun} with red hair at night",
    "a painting of a {class_noun} in the style of Van Gogh",
    "a photo of a {class_noun} with glasses in a forest",
    "a photo of a {class_noun} with gray hair in the mountains",
    "a pencil sketch of a {class_noun} wearing a party hat",
    "a side view photo of a {class_noun} with brown hair",
    "a photo of a {class_noun} in a studio",
    "a painting of a {class_noun} in the snow",
    "a photo of a {class_noun} wearing sunglasses at night",
    "a painting of a {class_noun} with blonde hair in a city",
    "a photo of a {class_noun} with glasses in the mountains",
    "a side view photo of a {class_noun} at Oktoberfest",
    "a photo of a {class_noun} with black hair on a beach",
    "a painting of a {class_noun} with glasses",
    "a painting of a {class_noun} with red hair in the style of Van Gogh",
    "a photo of a {class_noun} wearing a top hat in a forest",
    "a pencil sketch of a {class_noun} with gray hair",
)
"""Drawn and trained beside the plain class prompt, so that an adapter learns who somebody is and
not that hair, hats and scenes are always the same. Caps and blue hair are left out: they tell
whether words are obeyed that no class image was taught with."""

_OF_PERSONS_ALONE = "hair"
_PERSONS = {"person", "man", "woman", "boy", "girl"}


def choose_class_prompts(class_noun: str) -> tuple[str, ...]:
    """Choose the prompts that suit a class: hair has colours for persons alone."""
    if class_noun.lower() in _PERSONS:
        return CLASS_PROMPTS
    return tuple(text for text in CLASS_PROMPTS if _OF_PERSONS_ALONE not in text)
