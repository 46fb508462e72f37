"""Merge recipes: which adapters and how, typed as words or written as a TOML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import Section, check_section, read_toml
from dreamloom.lora.locating import locate_adapter, split_weight
from dreamloom.lora.writing import FileFormat
from dreamloom.merging.blocks import read_blocks
from dreamloom.merging.method import Value
from dreamloom.merging.methods import find_method
from dreamloom.merging.ranks import FULL, RankRequest, parse_rank

FilePrecision = Literal["fp32", "fp16", "bf16"]
"""Of the numbers in the file; what is computed is computed in float32 and float64."""


GivenBlocks = str | Sequence[float] | Mapping[str, Any]

BYTES: Mapping[FilePrecision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
# What DreamLoom, PEFT and diffusers call every adapter.
_GENERIC = {"adapter", "adapter-kohya", "adapter_model", "pytorch_lora_weights"}
_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class AdapterPart:
    """One adapter of a merge, and how strongly it goes in.

    Args:
        path: Its file.
        weight: Any finite number; negative ones subtract, 0 leaves out.
        name: As in `PartForm`, like all that follows.
        blocks: See `dreamloom.merging.blocks.read_blocks`; empty is 1 everywhere.
    """

    path: Path
    weight: float = 1.0
    name: str = ""
    blocks: GivenBlocks = ""
    sha256: str = ""
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Which adapters are merged, and how; `RecipeForm` says what each field means.

    Args:
        parts: The adapters, in an order that matters to some methods.
        method: The name of a method; see `dreamloom.merging.methods.METHODS`.
        options: The method's own settings; what is absent is its default.
    """

    parts: tuple[AdapterPart, ...]
    method: str = "sum"
    options: Mapping[str, Value] = field(default_factory=dict)
    rank: RankRequest = FULL
    seed: int = 0
    format: FileFormat = "auto"
    precision: FilePrecision = "fp32"
    base: str = ""
    joint: tuple[str, ...] = ()
    device: str = "auto"


def parse_part(text: str) -> AdapterPart:
    """Read ``FILE``, ``FILE:WEIGHT`` or ``NAME=FILE:WEIGHT`` as typed on the command line.

    Raises:
        ConfigError: If what follows the colon is not a number.
        AdapterError: If it is one of the hub that cannot be fetched; see `locate_adapter`.
    """
    named = _NAMED.fullmatch(text)
    if named and not Path(text).is_file() and not Path(text.rpartition(":")[0]).is_file():
        return replace(_parse_unnamed(named[2]), name=named[1])
    return _parse_unnamed(text)


def _parse_unnamed(text: str) -> AdapterPart:
    named, weight = split_weight(text)
    try:
        plain = 1.0 if weight is None else float(weight)
    except ValueError:
        raise ConfigError(
            f"{text!r} ends in {weight!r}, which is not a weight.", "Write FILE:0.8, or just FILE."
        ) from None
    return AdapterPart(locate_adapter(named), plain)


def name_parts(parts: Sequence[AdapterPart]) -> tuple[AdapterPart, ...]:
    """Give every part a name of its own: the user's, or the file's, numbered where it is shared.

    Files that training wrote are all called alike; they are named by their metadata's subject.

    Raises:
        ConfigError: If the user gave one name twice.
    """
    given = [part.name for part in parts if part.name]
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise ConfigError(f"Two parts are called {twice[0]!r}.", "Give each a name of its own.")
    taken = set(given)
    named = []
    for part in parts:
        name = part.name
        if not name:
            own, number = _name_file(part.path), 1
            name = own
            while name in taken:
                number += 1
                name = f"{own}-{number}"
            taken.add(name)
        named.append(replace(part, name=name))
    return tuple(named)


def _name_file(path: Path) -> str:
    if path.stem not in _GENERIC:
        return path.stem
    try:
        with safe_open(path, framework="pt") as file:
            subject = (file.metadata() or {}).get("dreamloom.subject", "")
    except (SafetensorError, OSError):
        # What is wrong with the file is told when it is read.
        subject = ""
    return re.sub(r"[^\w.+]+", "-", subject).strip("-") or path.stem


def parse_options(method: str, texts: Iterable[str]) -> dict[str, Value]:
    """Read ``NAME=VALUE`` words as the options of a method; its own defaults are left out.

    Raises:
        ConfigError: If one has no equals sign, is unknown to the method or not allowed there.
    """
    given: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} sets nothing.", "Write NAME=VALUE, such as mu=0.5.")
        given[name.strip()] = value.strip()
    complete = find_method(method).read_options(given)
    return {name: complete[name] for name in given}


def share_prompts(parts: Sequence[AdapterPart], texts: Iterable[str]) -> tuple[AdapterPart, ...]:
    """Give parts their prompts, each typed as ``NAME: PROMPT``.

    Args:
        parts: Named parts; see `name_parts`.
        texts: As typed.

    Raises:
        ConfigError: If one names no part.
    """
    prompts: dict[str, list[str]] = {part.name: list(part.prompts) for part in parts}
    for text in texts:
        name, colon, prompt = (piece.strip() for piece in text.partition(":"))
        if not colon or name not in prompts:
            raise ConfigError(
                f"The prompt {text!r} names no part.",
                f"Write NAME: PROMPT; the parts are {', '.join(prompts)}.",
            )
        prompts[name].append(prompt)
    return tuple(replace(part, prompts=tuple(prompts[part.name])) for part in parts)


def share_blocks(parts: Sequence[AdapterPart], texts: Iterable[str]) -> tuple[AdapterPart, ...]:
    """Give parts their block weights: ``NAME: WEIGHTS`` to one of them, ``WEIGHTS`` to all.

    Args:
        parts: Named parts; see `name_parts`.
        texts: As typed.
    """
    blocks = {part.name: part.blocks for part in parts}
    for text in texts:
        name, colon, weights = (piece.strip() for piece in text.partition(":"))
        if colon and name in blocks:
            blocks[name] = weights
        else:
            blocks = dict.fromkeys(blocks, text)
    return tuple(replace(part, blocks=blocks[part.name]) for part in parts)


class PartForm(Section):
    """A part as a recipe's file names it, in ``[[parts]]``."""

    file: str = Field(min_length=1)
    """The adapter's file, from where the recipe lies; or of the hub, as user/name."""
    weight: float = 1.0
    """How strongly it goes in; negative subtracts."""
    name: str = ""
    """What the merged file calls it; without one, the file's name."""
    blocks: Any = ""
    """Weights of single blocks: as --blocks takes them, a list of numbers, or a table."""
    sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    """The file's SHA-256, 64 hex digits: another file is refused."""
    prompts: tuple[str, ...] = ()
    """What the base model is asked for it, by methods that ask; else what the adapter says."""


class RecipeForm(Section):
    """A recipe as a file: the words at its top."""

    parts: tuple[PartForm, ...] = Field(min_length=1)
    """The adapters, each in a [[parts]] of its own."""
    method: str = "sum"
    """How they are merged; dreamloom merge --methods lists the ways."""
    options: dict[str, Value] = Field(default_factory=dict)
    """The method's own settings."""
    rank: str | int = "full"
    """full, a number, energy:0.995 or budget:100MB."""
    seed: int = 0
    """Of methods that throw dice."""
    format: FileFormat = "auto"
    """Of the merged file."""
    precision: FilePrecision = "fp32"
    """Of the numbers in it."""
    base: str = ""
    """The base model, for methods that ask it; without one, the adapters' own."""
    joint: tuple[str, ...] = ()
    """What it is asked for all adapters at once; without any, made from the adapters' prompts."""
    device: str = "auto"
    """Where it computes: auto, cpu, cuda, cuda:1 or mps."""


def read_recipe(file: Path) -> Recipe:
    """Read a recipe's TOML file; the paths in it start where it lies.

    Raises:
        AdapterError: If a part is one of the hub that cannot be fetched; see `locate_adapter`.
        ConfigError: If it cannot be read, a name is unknown (with the nearest known one), or a
            value is not allowed.
    """
    form = check_section(RecipeForm, read_toml(file, "recipe"))
    parts = [
        AdapterPart(_find_beside(file, part.file), **_fields(part, "file")) for part in form.parts
    ]
    find_method(form.method).read_options(form.options)
    for part in parts:
        read_blocks(part.blocks)
    rest = _fields(form, "parts", "rank")
    return Recipe(name_parts(parts), rank=parse_rank(str(form.rank)), **rest)


def _find_beside(recipe: Path, named: str) -> Path:
    """Find an adapter from where its recipe lies, or else on the hub."""
    path = recipe.parent / named
    if path.exists():
        return path
    found = locate_adapter(named)
    return path if found == Path(named) else found


def _fields(form: Section, *without: str) -> dict[str, Any]:
    return {name: value for name, value in form if name not in without}
