"""Options that functions of the door share: presets, settings by name, device, progress."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, cast

from dreamloom.core.config.loading import load_config, name_prior
from dreamloom.core.config.settings import LoomConfig, Preset
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Event, Note, Observer
from dreamloom.display.notebook import find_notebook, watch_in_notebook
from dreamloom.display.progress import watch
from dreamloom.lora.locating import locate_adapter

PathLike: TypeAlias = "str | os.PathLike[str]"
AdapterLike: TypeAlias = "PathLike | tuple[PathLike, float]"
"""A file, or a file and its weight; results that are adapters are files, too. One of the hub is
``user/name``."""


class Options(TypedDict, total=False):
    """What most functions take beside what they are about.

    Attributes:
        preset: ``quick``, ``standard`` (the default) or ``thorough``.
        config: A TOML file of settings, as ``--config`` takes.
        settings: Any setting by its name, such as ``{"train.steps": 600}``; ``dreamloom settings``
            lists them. As ``--set`` they go before the function's own arguments, which go before
            the file, which goes before the preset.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        progress: Whether to show what goes on, as a bar in a notebook or on a terminal; or a
            function that is told of each event (`dreamloom.core.events`). Where nothing is shown,
            what asks for attention is a Python warning.
    """

    preset: Preset
    config: PathLike
    settings: Mapping[str, Any]
    device: str
    progress: bool | Observer


def load_settings(options: Mapping[str, Any], given: Mapping[str, Any]) -> LoomConfig:
    """Put together the settings that a call means.

    Args:
        options: What the call was given of `Options`.
        given: What its own arguments say, by the settings' names; None says nothing. ``prior`` is
            what ``--prior`` takes.

    Raises:
        ConfigError: If a name is unknown or a value not allowed.
    """
    refuse_unknown(options, Options, "; any setting goes into settings={'name': value}")
    own = {name: _to_plain(value) for name, value in given.items() if value is not None}
    prior, file = own.pop("prior", None), options.get("config")
    overrides = {
        "preset": options.get("preset"),
        "device": options.get("device"),
        **own,
        **(name_prior(prior) if prior is not None else {}),
        **{name: _to_plain(value) for name, value in options.get("settings", {}).items()},
    }
    return load_config(
        file=Path(file) if file is not None else None, overrides=overrides, observe=warn
    )


def refuse_unknown(given: Iterable[str], known: type[Any], more: str = "") -> None:
    """Refuse names of arguments that a function does not have.

    Args:
        given: The names.
        known: The typed dictionary of those that it has beside its own.
        more: What else to say of them.

    Raises:
        ConfigError: If one is unknown.
    """
    names = known.__annotations__
    unknown = sorted({*given} - {*names})
    if unknown:
        raise ConfigError(
            f"There is no argument {unknown[0]!r}.",
            f"Beside its own, a function takes {', '.join(sorted(names))}{more}.",
        )


@contextmanager
def show_progress(options: Mapping[str, Any]) -> Iterator[Observer]:
    """Give the observer that the call asks for."""
    asked = options.get("progress", True)
    if callable(asked):
        yield cast("Observer", asked)
    elif not asked:
        yield warn
    elif (display := find_notebook()) is not None:
        with watch_in_notebook(display) as observe:
            yield observe
    else:
        with watch() as observe:
            yield observe


def split_adapter(given: AdapterLike) -> tuple[Path, float]:
    """Read an adapter as its file and its weight, 1 where none is said.

    Raises:
        AdapterError: If it is one of the hub that cannot be fetched; see `locate_adapter`.
        ConfigError: If it is neither a file nor a pair.
    """
    path, weight = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
    if not isinstance(path, (str, os.PathLike)) or not isinstance(weight, (int, float)):
        raise ConfigError(
            f"{given!r} is no adapter.", "Give a file, or a pair of a file and its weight."
        )
    return locate_adapter(os.fspath(path)), float(weight)


def list_adapters(given: AdapterLike | Sequence[AdapterLike]) -> list[tuple[Path, float]]:
    """Read one adapter or several, each with its weight.

    Raises:
        ConfigError: If something else is among them.
    """
    is_pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], (int, float))
    several = [given] if is_pair or isinstance(given, (str, os.PathLike)) else given
    return [split_adapter(one) for one in several]  # type: ignore[arg-type]


def list_texts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Read one text or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def warn(event: Event) -> None:
    """Tell what asks for attention as a Python warning, and nothing else."""
    if isinstance(event, Note) and event.warning:
        warnings.warn(event.text, stacklevel=2)


def _to_plain(value: Any) -> Any:
    """Write paths as text, which is what settings hold."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value
