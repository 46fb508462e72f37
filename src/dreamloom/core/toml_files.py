"""TOML files of settings, recipes and studies: read, checked with every fault told, described.

What such a file may hold is a `Section`; whatever is wrong with it is told at once, in the same
words everywhere.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dreamloom.core.errors import ConfigError

# TOML has no word for nothing; "none" is ours, in files and in --set.
NONE = "none"

_Kind = TypeVar("_Kind", bound="Section")

_REASONS = {
    "model_type": "it is a group of settings, such as train.rank",
    "tuple_type": "input should be a list, such as [25, 50]",
}


class ClosedModel(BaseModel):
    """A frozen record that knows no other fields than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _write_out_bytes(cls, given: Any) -> Any:
        return write_out_bytes(given)


def write_out_bytes(value: Any) -> Any:
    r"""Write out the bytes of file names that are no UTF-8, also in lists and dictionaries.

    Python keeps such bytes as lone surrogates, which no JSON and no terminal takes.

    Example:
        >>> write_out_bytes("Ren\udce9.png")
        'Ren\\xe9.png'
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if type(value) is dict:
        return {write_out_bytes(name): write_out_bytes(one) for name, one in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(write_out_bytes, value))
    return value


class Section(ClosedModel):
    """A closed, frozen group of settings; a field's docstring is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _take_one_as_a_list(cls, given: Any) -> Any:
        """Take ``steps = 6`` as ``steps = [6]``, wherever a list of plain values is asked for."""
        if not isinstance(given, Mapping):
            return given
        lists = {name for name, info in cls.model_fields.items() if _is_list(info)}
        return {
            name: (value,) if name in lists and isinstance(value, str | int | float) else value
            for name, value in given.items()
        }

    def model_copy(
        self: _Kind, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> _Kind:
        """Copy with some settings changed.

        Raises:
            ValueError: If there is no setting of such a name, which pydantic would let pass.
        """
        unknown = set(update or ()) - set(type(self).model_fields)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        file: The file.
        what: What kind of file is missing, if it is: ``settings file``, ``recipe``.

    Raises:
        ConfigError: If it is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no {what} {file}.", "Check the path.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.", "Name a file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.", "Mend that line.") from None


def check_section(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    """Make a section of nested values.

    Raises:
        ConfigError: If a name is unknown (with the nearest known ones), missing, or its value not
            allowed; every fault is told, with what the setting means.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explain(kind, error) from None


def list_fields(kind: type[Section], above: str = "") -> dict[str, FieldInfo]:
    """List a section's settings by dotted name, those of its groups and lists of tables, too."""
    fields: dict[str, FieldInfo] = {}
    for name, info in kind.model_fields.items():
        inner, is_list = _find_section(info)
        if inner is None or is_list:
            fields[f"{above}{name}"] = info
        if inner is not None:
            fields |= list_fields(inner, f"{above}{name}.")
    return fields


def _is_list(info: FieldInfo) -> bool:
    """Say whether a field is a list of plain values, of any length."""
    items = get_args(info.annotation) if get_origin(info.annotation) is tuple else ()
    return items[1:] == (Ellipsis,) and _find_section(info)[0] is None


def _find_section(info: FieldInfo) -> tuple[type[Section] | None, bool]:
    """Find the section that a field is, or is a list of; and whether it is a list."""
    kinds = get_args(info.annotation) or (info.annotation,)
    inner = kinds[0]
    if isinstance(inner, type) and issubclass(inner, Section):
        return inner, get_origin(info.annotation) is tuple
    return None, False


def describe_fields(kind: type[Section]) -> list[tuple[str, str, str]]:
    """Describe every setting: its dotted name, its default as one would type it, its meaning."""
    rows = []
    for name, info in list_fields(kind).items():
        default = "" if info.is_required() else info.get_default(call_default_factory=True)
        typed = NONE if default is None else default
        typed = typed if isinstance(typed, str) else to_toml_value(typed)
        rows.append((name, typed, _describe(info)))
    return rows


def _describe(info: FieldInfo) -> str:
    text = " ".join((info.description or "").split())
    words = allowed_words(info.annotation)
    if words and (words != ["auto"] or "auto" not in text):
        text += f" {'Or' if words == ['auto'] else 'One of'}: {', '.join(words)}."
    return text


def allowed_words(annotation: Any) -> list[str]:
    """List the words that a setting's type allows by name: ``auto`` and what else it spells out."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inner = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else ()
    words = [word for one in inner for word in allowed_words(one)]
    # Words beside true and false are not all that is allowed.
    return ["true", "false", *words] if bool in inner and words != ["auto"] else words


def _explain(kind: type[Section], error: ValidationError) -> ConfigError:
    """Turn pydantic's findings into one sentence per setting, all at once."""
    fields = list_fields(kind)
    unknown: list[str] = []
    missing: list[str] = []
    given: dict[str, Any] = {}
    reasons: dict[str, dict[str, None]] = {}
    findings = error.errors()
    # A list of which an item is refused counts as too short as well.
    lists = {finding["loc"][:end] for finding in findings for end in range(len(finding["loc"]))}
    for finding in findings:
        if finding["type"] == "too_short" and finding["loc"] in lists:
            continue
        if finding["type"] == "extra_forbidden":
            unknown += _leaves(_spell(finding["loc"]), finding["input"])
            continue
        name = _spell(_cut_to_field(finding["loc"], fields))
        if finding["type"] == "missing":
            missing.append(name)
            continue
        reason = _REASONS.get(finding["type"], finding["msg"].removeprefix("Value error, "))
        if finding["type"] in _REASONS and name in fields and _find_section(fields[name])[1]:
            reason = f"it is a list of tables, each of which begins with [[{name}]]"
        given.setdefault(name, finding["input"])
        reasons.setdefault(name, {})[reason[0].lower() + reason[1:]] = None
    problems = [
        f"{name} is not allowed: {', or '.join(reasons[name])}."
        # What contradicts within a group needs no listing of the whole group.
        if isinstance(value, Mapping) and name not in fields
        else f"{name} = {value!r} is not allowed: {', or '.join(reasons[name])}."
        for name, value in given.items()
    ]
    problems += [f"{name} is missing." for name in missing]
    problems += [f"There is no setting {name!r}." for name in unknown]
    meant = {name: fields.get(_without_numbers(name)) for name in (*given, *missing)}
    hints = [f"{name}: {_describe(info)}" for name, info in meant.items() if info]
    hints += dict.fromkeys(suggest(_without_numbers(name), fields) for name in unknown)
    return ConfigError(" ".join(problems), " ".join(hints))


def _cut_to_field(
    place: tuple[int | str, ...], fields: Mapping[str, FieldInfo]
) -> tuple[int | str, ...]:
    """Cut off what pydantic names behind a setting: the alternative or the item it tried."""
    for end in range(len(place), 0, -1):
        names = [part for part in place[:end] if isinstance(part, str)]
        if isinstance(place[end - 1], str) and ".".join(names) in fields:
            return place[:end]
    return place


def _spell(place: Iterable[int | str]) -> str:
    """Write a place as a dotted name; tables are counted from 1."""
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in place)


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def _leaves(name: str, value: Any) -> list[str]:
    """Name what was typed: ``trian.rank`` where only the group ``trian`` is unknown."""
    if not isinstance(value, Mapping) or not value:
        return [name]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known setting an unknown name may mean: the nearest ones, or all."""
    names = list(known)
    group, _, last = name.rpartition(".")
    same_last = [known for known in names if known.rpartition(".")[2] == last]
    close = same_last or difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if not close:
        # A bare name is compared with bare names: "lerning_rate" is near "train.learning_rate".
        near = difflib.get_close_matches(last, [known.rpartition(".")[2] for known in names], n=2)
        close = [known for known in names if known.rpartition(".")[2] in near]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    siblings = [known for known in names if group and known.startswith(f"{group}.")]
    return f"Known are: {', '.join(siblings or names)}."


def offer(name: str, known: Iterable[str]) -> str:
    """Say which of a few names may be meant, and list all of them."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"{f'Did you mean {close[0]}? ' if close else ''}Choose one of: {', '.join(names)}."


def to_toml_value(value: Any) -> str:
    """Write a value as TOML does; nothing is the word "none"."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, save that they want DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml_value, value)) + "]"
    if isinstance(value, dict):
        items = (f"{to_toml_value(key)} = {to_toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    return repr(value)
