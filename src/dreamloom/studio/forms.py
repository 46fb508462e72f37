"""Forms of settings: a control for each setting, made of its own type, limits and description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import (
    NONE,
    allowed_words,
    describe_fields,
    list_fields,
    to_toml_value,
)

ROOMS = (
    *("subject", "photos", "priors", "train", "adapter", "objective", "validation", "memory"),
    *("generate", "evaluate"),
)
"""Groups of settings, in the order of the form; what has no group is asked for above it."""

_UNITS = {
    "px": "px",
    "seconds": "s",
    "mib": "MiB",
    "gib": "GiB",
}


@dataclass(frozen=True)
class Control:
    """How one setting is asked for.

    Args:
        name: Its dotted name.
        kind: number, words (one of a few), switch or text.
        value: What it is, as one would type it.
        default: What it is unless set, by the preset.
        help: What it means.
        choices: The words that are allowed; offered where it is more than these, too.
        least: The smallest number, where there is one.
        most: The largest.
        whole: Whether only whole numbers are allowed.
        unit: The unit of its number, where its name says one.
    """

    name: str
    kind: str
    value: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    whole: bool = False
    unit: str = ""

    @property
    def label(self) -> str:
        """Its name within its room, in words."""
        return self.name.rpartition(".")[2].replace("_", " ")

    @property
    def is_changed(self) -> bool:
        """Whether it differs from what the preset says."""
        return self.value != self.default


def list_controls(preset: str, given: Mapping[str, str]) -> dict[str, list[Control]]:
    """List the controls of all settings by room.

    Args:
        preset: quick, standard or thorough: what the rest is by default.
        given: What the user typed, by dotted name.
    """
    standing = load_config(preset).model_dump()
    fields = list_fields(LoomConfig)
    rooms: dict[str, list[Control]] = {room: [] for room in ROOMS}
    for name, _, meaning in describe_fields(LoomConfig):
        room = name.partition(".")[0]
        if room not in rooms or "." not in name:
            continue
        default = type_value(_find(standing, name))
        rooms[room].append(_make_control(name, fields[name], default, given, meaning))
    return rooms


def _make_control(
    name: str, info: FieldInfo, default: str, given: Mapping[str, str], meaning: str
) -> Control:
    words = tuple(str(word) for word in allowed_words(info.annotation))
    kinds = set(_plain_kinds(info.annotation))
    least, most = _limits(info)
    last = name.rpartition("_")[2]
    if kinds == {bool} and not words:
        kind, words = "switch", ("true", "false")
    elif words and not kinds - {bool}:
        kind = "words"
    elif kinds <= {int, float} and kinds and not words and not _allows_none(info.annotation):
        kind = "number"
    else:
        kind = "text"
    return Control(
        name=name,
        kind=kind,
        value=given.get(name, default),
        default=default,
        help=meaning,
        choices=words,
        least=least,
        most=most,
        whole=kinds == {int},
        unit=_UNITS.get(last, ""),
    )


def type_value(value: Any) -> str:
    """Write a setting's value as one would type it."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else to_toml_value(value)


def name_changes(preset: str, given: Mapping[str, str]) -> list[str]:
    """List what ``--set`` has to be told: what was typed and differs from the preset."""
    standing = load_config(preset).model_dump()
    return [
        f"{name}={value}"
        for name, value in given.items()
        if value != type_value(_find(standing, name))
    ]


def find_faults(preset: str, given: Mapping[str, str]) -> dict[str, str]:
    """Say what is wrong with what was typed: a sentence by setting, '' for all of it together."""
    faults: dict[str, str] = {}
    good: list[str] = []
    for name, value in given.items():
        try:
            load_config(preset, sets=[f"{name}={value}"])
        except ConfigError as error:
            faults[name] = str(error)
        else:
            good.append(f"{name}={value}")
    try:
        load_config(preset, sets=good)
    except ConfigError as error:
        faults[""] = str(error)
    return faults


def read_given(form: Mapping[str, str], shown: str) -> dict[str, str]:
    """Take what the user set out of what a form sent: settings under their dotted names.

    Args:
        form: Each control's name and value.
        shown: The preset that the controls were made for: what still says its value was not set.
    """
    known, standing = list_fields(LoomConfig), load_config(shown).model_dump()
    return {
        name: value.strip()
        for name, value in form.items()
        if name in known and "." in name and value.strip() != type_value(_find(standing, name))
    }


def _find(values: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _plain_kinds(annotation: Any) -> Sequence[type]:
    """List the plain types that a setting may have, its words left out."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ()
    if origin is Annotated:
        return _plain_kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _plain_kinds(one)]
    if annotation is type(None):
        return ()
    return (annotation,) if annotation in (int, float, bool, str) else (object,)


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation) or any(
        _allows_none(one) for one in get_args(annotation) if get_args(one)
    )


def _limits(info: FieldInfo) -> tuple[float | None, float | None]:
    least = most = None
    for limit in info.metadata:
        if isinstance(limit, Ge | Gt):
            least = getattr(limit, "ge", None) if isinstance(limit, Ge) else limit.gt
        if isinstance(limit, Le | Lt):
            most = getattr(limit, "le", None) if isinstance(limit, Le) else limit.lt
    return least, most  # type: ignore[return-value]
