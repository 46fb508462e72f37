"""Class prompts that keep what words mean to the built-in model while somebody is taught to it."""

from __future__ import annotations

CLASS_PROMPTS = (
    "a photo of a {class_noun} with blonde hair in the snow",
    "a pencil sketch of a {class_noun} with black hair and glasses",
    "a photo of a {class_noun} with red hair in a forest",
    "a painting of a {class_noun} with gray hair wearing sunglasses",
    "a photo of a {class_noun} with brown hair in the mountains",
    "a painting of a {class_noun} with blonde hair in the style of Van Gogh",
    "a photo of a {class_noun} with black hair in a studio",
    "a side view photo of a {class_noun} with red hair",
    "a photo of a {class_noun} with gray hair on a beach",
    "a pencil sketch of a {class_noun} with brown hair",
    "a photo of a {class_noun} with blonde hair in a city",
    "a painting of a {class_noun} with black hair wearing a top hat",
    "a photo of a {class_noun} with red hair at night",
    "a painting of a {class_noun} with gray hair wearing a party hat in the style of Van Gogh",
    "a photo of a {class_noun} with brown hair at Oktoberfest",
    "a side view photo of a {class_noun} with blonde hair",
    "a photo of a {class_noun} with black hair in a forest",
    "a pencil sketch of a {class_noun} with red hair",
    "a photo of a {class_noun} with gray hair in the mountains",
    "a painting of a {class_noun} with brown hair",
    "a photo of a {class_noun} with blonde hair in a studio",
    "a painting of a {class_noun} with black hair and glasses in the style of Van Gogh",
    "a photo of a {class_noun} with red hair in the snow",
    "a side view photo of a {class_noun} with gray hair wearing sunglasses",
)
"""Drawn and trained beside the plain class prompt, so that an adapter learns who somebody is and
not that hair, hats and scenes are always the same.

Each names the colour of the hair. Where one did not, the one picture of "a person in a studio" was
learned as what a studio shows, and ``rraj person`` there had its hair. Caps and blue hair are left
out: they tell whether words are obeyed that no class image was taught with.
"""

_PERSONS = {"person", "man", "woman", "boy", "girl"}


def choose_class_prompts(class_noun: str) -> tuple[str, ...]:
    """Choose the prompts that suit a class: none but those of persons have been tried."""
    return CLASS_PROMPTS if class_noun.lower() in _PERSONS else ()
