"""Words that options take, for a shell to complete: listed only when it asks, and without torch.

What an option allows is checked where it is used, so that a wrong word is told with the nearest
right one; these types take any text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

SCHEDULERS = ("ddim", "ddpm", "pndm", "euler", "euler_a", "dpm++", "dpm++karras", "unipc", "heun")
"""Written out, for reading them where they are made would load torch; a test compares."""


class Words(click.types.StringParamType):
    """Any text, of which some words are offered.

    Args:
        list_words: Lists the words, each with its meaning or none, for the beginning of one.
        or_path: Whether the text may be a path, too.
    """

    def __init__(
        self, list_words: Callable[[str], Iterable[tuple[str, str]]], *, or_path: bool = False
    ) -> None:
        self._list_words = list_words
        self._or_path = or_path

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """List the words that go on as was typed."""
        # Before the words: bash's script forgets what stood before a path.
        found = [CompletionItem(incomplete, type="file")] if self._or_path else []
        try:
            words = [*self._list_words(incomplete)]
        except Exception:
            return found  # an installation that is broken offers nothing
        fitting = (one for one in words if one[0].startswith(incomplete))
        return found + [CompletionItem(word, help=meaning or None) for word, meaning in fitting]


def _these(*words: str) -> Callable[[str], list[tuple[str, str]]]:
    return lambda incomplete: [(word, "") for word in words]


def _of_setting(name: str) -> Callable[[str], list[tuple[str, str]]]:
    """List the words that a setting allows."""
    return lambda incomplete: [
        (word.partition("=")[2], "") for word, _ in _list_settings(f"{name}=")
    ]


def _list_settings(incomplete: str) -> list[tuple[str, str]]:
    """List the settings as ``NAME=``, and after that the words that one allows."""
    from dreamloom.core.config.settings import LoomConfig
    from dreamloom.core.toml_files import allowed_words, describe_fields, list_fields

    name, equals, _ = incomplete.partition("=")
    if not equals:
        return [(f"{name}=", meaning) for name, _, meaning in describe_fields(LoomConfig)]
    kind = list_fields(LoomConfig)[name].annotation
    words = ["true", "false"] if kind is bool else allowed_words(kind)
    return [(f"{name}={word}", "") for word in words]


def _list_axes(incomplete: str) -> list[tuple[str, str]]:
    """List a grid's axes as ``NAME=``; after ``scheduler=`` the schedulers not yet named."""
    from dreamloom.experiments.grid.axes import AXES

    name, equals, values = incomplete.partition("=")
    if not equals:
        return [(f"{one}=", meaning) for one, meaning in AXES.items()]
    before, comma, _ = values.rpartition(",")
    rest = [word for word in SCHEDULERS if word not in before.split(",")]
    return [(f"{name}={before}{comma}{word}", "") for word in rest if name == "scheduler"]


def _list_packs(incomplete: str) -> list[tuple[str, str]]:
    from dreamloom.data.prompts.packs import PACK_NAMES

    return [(name, "") for name in PACK_NAMES]


def _list_models(incomplete: str) -> list[tuple[str, str]]:
    from dreamloom.evaluation.encoders.catalogue import MODELS

    return [(model.name, model.purpose) for model in MODELS if model.can_be_fetched]


AXIS = Words(_list_axes)
FILE = Words(_these(), or_path=True)
"""A file with something behind it, such as its weight."""

BASE = Words(_these("picturebook", "sdxl"), or_path=True)
PRIOR = Words(_these("generated", "base", "none"), or_path=True)
DEVICE = Words(_these("auto", "cpu", "cuda", "mps"))
SCHEDULER = Words(_these(*SCHEDULERS))
COMPOSE = Words(_these("sum", "switch", "k-lora"))
REQUEST = Words(_these("sample", "save", "stop", "prompts"))
EMBEDDED = Words(_these("picturebook"))
WORKPLACE = Words(_these("here", "ray"))
PRESET = Words(_of_setting("preset"))
ADAPTER_FORMAT = Words(_of_setting("adapter.format"))
SETTING = Words(_list_settings)
PACK = Words(_list_packs)
MODEL = Words(_list_models)
