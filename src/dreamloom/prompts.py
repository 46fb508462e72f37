"""Prompts that ask for one kind of change each, so that scores can be read by category."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackPrompt:
    """A prompt of a pack; {subject} stands for the subject's phrase."""

    text: str
    category: str


PACKS: dict[str, tuple[PackPrompt, ...]] = {
    "seed-v1": (
        PackPrompt("a photo of {subject}", "photo"),
        PackPrompt("a painting of {subject} at Oktoberfest", "scene"),
        PackPrompt("a painting of {subject} in the style of Van Gogh", "style"),
        PackPrompt("a painting of {subject} with blonde hair", "attribute"),
        PackPrompt("a side view photo of {subject}", "view"),
        PackPrompt("a photo of {subject} with sunglasses", "accessory"),
    ),
    "pixel-v1": (PackPrompt("pixel, a photo of {subject} wearing sunglasses", "merge"),),
}
"""Prompt packs by name. ``seed-v1`` and ``pixel-v1`` are the prompts of the study at
github.com/rajlm10/dreambooth_lora_merging, with its missing word "photo" put back."""
