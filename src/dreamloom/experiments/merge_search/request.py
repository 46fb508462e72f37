"""What a search is asked for, and everything that can be found out before it draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.data.prompts.packs import PackPrompt, is_person
from dreamloom.evaluation.metrics.measures import names
from dreamloom.experiments.merge_search.candidates import BETWEEN, count_candidates, has_blocks
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.lora.reading import read_adapter
from dreamloom.pipeline.draw import find_pack, pack_prompts
from dreamloom.pipeline.subject import fill_subject, name_subject

_CONTRADICTING = ("style", "class", "unrelated")
"""Kinds of prompts that ask for another style, or not for the subject."""
_MOST_CANDIDATES = 1000


@dataclass(frozen=True)
class SearchRequest:
    """What the user wants searched.

    Args:
        subject: The subject's adapter file.
        style: The style's.
        photos: A folder of the subject's photos.
        out: The search's folder: new, empty, or that of the same search.
        style_photos: A folder of pictures in the style; None takes what its adapter draws.
        prompts: Texts; {subject} stands for the subject's phrase.
        packs: Names of prompt packs; without prompts and packs one that suits is taken.
        trigger: Words that call the style, put before prompts that lack them; None takes what the
            style's adapter says of itself.
        phrase: The subject in prompts; None takes what its adapter says of itself.
        class_noun: What the subject is one of; likewise.
        budget: Pictures to draw, in all.
        by_block: Whether the groups of blocks have weights of their own.
        between: The least and the greatest weight.
        workers: Processes of one thread each; 1 works in this process, with all its threads.
    """

    subject: Path
    style: Path
    photos: Path
    out: Path
    style_photos: Path | None = None
    prompts: tuple[str, ...] = ()
    packs: tuple[str, ...] = ()
    trigger: str | None = None
    phrase: str | None = None
    class_noun: str | None = None
    budget: int = 200
    by_block: bool = False
    between: tuple[float, float] = BETWEEN
    workers: int = 1

    @property
    def files(self) -> tuple[Path, Path]:
        """Both adapter files."""
        return self.subject, self.style

    @property
    def parameters(self) -> int:
        """How many weights are searched for."""
        return 6 if self.by_block else 2


@dataclass(frozen=True)
class Words:
    """What prompts call the subject and the style."""

    phrase: str
    class_noun: str
    trigger: str


def read_parts(request: SearchRequest) -> tuple[Adapter, Adapter]:
    """Read both adapters and check that they can be merged, and searched as is wished.

    Raises:
        AdapterError: If one cannot be read or is no LoRA, or they were made for different bases.
        ConfigError: If the weights to search between are not usable, or blocks are asked for that
            an adapter does not change.
    """
    low, high = request.between
    if not (
        low > 0 and high > low and count_candidates(False, request.between) >= _MOST_CANDIDATES
    ):
        raise ConfigError(
            f"Weights cannot be searched between {low:g} and {high:g}.",
            "Give two numbers above 0, the lower one first, such as 0.3 and 1.5.",
        )
    subject, style = (read_adapter(path) for path in request.files)
    for path, adapter in zip(request.files, (subject, style), strict=True):
        refuse_other_kinds(adapter, str(path), "can be merged")
        if adapter.t_lora_min_rank is not None:
            raise AdapterError(
                f"{path} is a T-LoRA, fewer of whose ranks count in noise; a merge applies all of "
                "them, so what the search draws would not be what it writes.",
                "Draw with both files instead: dreamloom generate --adapter A --adapter B.",
            )
        if request.by_block and not has_blocks(adapter):
            raise ConfigError(
                f"{path} does not change layers in down, mid and up blocks alike.",
                "Leave out --blocks.",
            )
    made_for = [a.metadata.get("dreamloom.base_fingerprint") for a in (subject, style)]
    if None not in made_for and made_for[0] != made_for[1]:
        bases = [a.metadata.get("dreamloom.base", "unknown") for a in (subject, style)]
        raise AdapterError(
            f"The adapters were made for different base models: {request.subject} ({bases[0]}), "
            f"{request.style} ({bases[1]}).",
            "Only adapters of one base model can be merged.",
        )
    return subject, style


def find_words(request: SearchRequest, config: LoomConfig, parts: tuple[Adapter, Adapter]) -> Words:
    """Name the subject and the style as the user does, or else as their adapters do."""
    subject, style = (adapter.metadata for adapter in parts)
    given = config.subject if "subject" in config.model_fields_set else None
    phrase = request.phrase or (given.phrase if given else subject.get("dreamloom.subject", ""))
    if not phrase:
        raise ConfigError(
            f"{request.subject} does not say whom it shows.", 'Give --subject, like "rraj person".'
        )
    noun = request.class_noun or (given.class_noun if given else "")
    if not noun and phrase == subject.get("dreamloom.subject"):
        noun = subject.get("dreamloom.class_noun", "")
    trigger = request.trigger if request.trigger is not None else style.get("dreamloom.subject", "")
    named = name_subject(phrase, noun or None)
    return Words(named.phrase, named.class_noun, trigger)


def list_prompts(request: SearchRequest, words: Words, base: str) -> tuple[list[str], list[str]]:
    """List what is drawn, and why some prompts of the packs are not.

    Returns:
        The prompts, each once, with the style's trigger; and notes.

    Raises:
        ConfigError: If a pack is unknown, or no prompt is left that shows the subject.
    """
    texts = [fill_subject(text, words.phrase) for text in request.prompts]
    notes = []
    packs = request.packs or (() if texts else (_choose_pack(base, words.class_noun),))
    for pack in packs:
        listed = pack_prompts(find_pack(pack).name, words.phrase, words.class_noun)
        fit = [prompt.text for prompt in listed if prompt.category not in _CONTRADICTING]
        texts += fit
        if len(fit) < len(listed):
            notes.append(
                f"{len(listed) - len(fit)} prompts of {pack} ask for another style, or not for "
                f"the subject, and are left out."
            )
    shown = [text for text in dict.fromkeys(texts) if names(text, words.phrase)]
    if not shown:
        raise ConfigError(
            f"No prompt names the subject, {words.phrase}.",
            'Give --prompt "a photo of {subject} in the snow", several of them, or --pack.',
        )
    trigger = words.trigger
    called = [
        text if not trigger or names(text, trigger) else f"{trigger}, {text}" for text in shown
    ]
    return called, notes


def name_class(prompts: Sequence[str], words: Words) -> list[str]:
    """Say prompts of the class instead of the subject, to see whether the one becomes the other.

    Example:
        >>> name_class(["pixel, a photo of rraj person"], Words("rraj person", "person", "pixel"))
        ['pixel, a photo of a person']
    """
    named = re.compile(rf"(?<!\w){re.escape(words.phrase)}(?!\w)", re.IGNORECASE)
    return [
        PackPrompt(text=named.sub("a {class_noun}", text), category="class").fill(
            words.phrase, words.class_noun
        )
        for text in prompts
    ]


def _choose_pack(base: str, class_noun: str) -> str:
    if base == "picturebook":
        return "picturebook-v1"
    return "person-v1" if is_person(class_noun) else "object-v1"


def compare_settings(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Name what makes two searches different, with both values."""
    return [
        f"{name} is {old.get(name)!r} there and {value!r} here"
        for name, value in new.items()
        if old.get(name) != value
    ]
