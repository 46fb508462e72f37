"""The axes of a grid, as they are typed: ``steps=10,20``, ``weight:2=0,0.5,1``, ``prompt=a|b``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer

AxisValue: TypeAlias = int | float | str

AXES = {
    "checkpoint": "updates of a run whose adapters were kept, final, or adapter files",
    "weight": "the weight of all adapters; weight:N is that of the N-th alone",
    "scheduler": "schedulers",
    "steps": "numbers of denoising steps",
    "guidance": "strengths of classifier-free guidance",
    "prompt": "prompts, parted by |",
}
"""What can change along an axis, each with what its values are."""

MOST_CELLS = 400
_MOST_STEPS = 1000
_EXAMPLES = {
    "checkpoint": "checkpoint=100,200,final",
    "weight": "weight=0,0.5,1",
    "scheduler": "scheduler=ddim,dpm++",
    "steps": "steps=10,20,30",
    "guidance": "guidance=3,5,7.5",
    "prompt": 'prompt="a photo of {subject}|a painting of {subject}"',
}


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a grid.

    Args:
        kind: One of `AXES`.
        values: One or more, all different.
        adapter: For weights: which adapter's, from 1; None for all.
    """

    kind: str
    values: tuple[AxisValue, ...]
    adapter: int | None = None

    @property
    def name(self) -> str:
        """As it is typed before the equals sign."""
        return self.kind if self.adapter is None else f"{self.kind}:{self.adapter}"


def read_axes(x: Sequence[str], y: Sequence[str] = ()) -> tuple[Axis, Axis | None]:
    """Read both axes as they were typed; the second is None where nothing was.

    Args:
        x: One or more ``NAME=VALUES`` of the same name; their values follow each other.
        y: The same.

    Raises:
        ConfigError: If an axis is unknown or says nothing, a value is not allowed or comes twice,
            both change the same thing, or there are too many cells.
    """
    across, down = parse_axis("--x", x), parse_axis("--y", y) if y else None
    if down is not None:
        _refuse_same(across, down)
    rows = len(down.values) if down else 1
    cells = len(across.values) * rows
    if cells > MOST_CELLS:
        raise ConfigError(
            f"{len(across.values)} × {rows} are {cells} cells.",
            f"A grid has at most {MOST_CELLS}: give fewer values, or draw several grids.",
        )
    return across, down


def parse_axis(option: str, texts: Sequence[str]) -> Axis:
    """Read one axis.

    Args:
        option: What it was given by, for messages.
        texts: One or more ``NAME=VALUES`` of the same name.

    Raises:
        ConfigError: As `read_axes`.
    """
    values: list[AxisValue] = []
    names: list[str] = []
    for text in texts:
        name, equals, typed = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"{option} {text!r} has no {'name' if equals else 'values'}.",
                f"Write it as NAME=VALUES, like {_EXAMPLES.get(name, _EXAMPLES['steps'])}.",
            )
        names.append(name)
        kind, adapter = _split_name(option, name)
        values += [_read_value(option, kind, one) for one in _split_values(kind, typed)]
    if len(set(names)) > 1:
        raise ConfigError(
            f"{option} is given {' and '.join(dict.fromkeys(names))}.",
            "An axis changes one thing; give the other one with --y.",
        )
    if not names:
        raise ConfigError(f"{option} says nothing.", f"Write {option} {_EXAMPLES['steps']}.")
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise ConfigError(f"{option} {names[0]} names {twice[0]} twice.", "Give each value once.")
    return Axis(kind, tuple(values), adapter)


def check_adapters(axis: Axis, adapters: int) -> None:
    """Refuse weights of adapters that are not there.

    Args:
        axis: The axis.
        adapters: How many are worn; that of a checkpoint counts, and is the first.

    Raises:
        ConfigError: If there is no such adapter.
    """
    if axis.kind != "weight":
        return
    if adapters == 0:
        raise ConfigError(
            f"The axis {axis.name} has no adapter to weigh.", "Give --adapter FILE at least once."
        )
    if axis.adapter is not None and axis.adapter > adapters:
        there = "there is 1" if adapters == 1 else f"there are {adapters}"
        raise ConfigError(
            f"The axis {axis.name} is about adapter {axis.adapter}, but {there}.",
            "They are counted from 1, in the order in which --adapter names them.",
        )


def _refuse_same(x: Axis, y: Axis) -> None:
    if x.name == y.name:
        raise ConfigError(
            f"--x and --y are both {x.name}.", "Let them change two different things."
        )
    if x.kind == y.kind and None in (x.adapter, y.adapter):
        raise ConfigError(
            f"--x {x.name} and --y {y.name} set the weight of the same adapter.",
            "Write weight:1 and weight:2 for the weights of two adapters.",
        )


def _split_name(option: str, name: str) -> tuple[str, int | None]:
    """Split ``weight:2`` into the kind and the adapter's number."""
    kind, colon, number = name.partition(":")
    if kind not in AXES or (colon and kind != "weight"):
        raise ConfigError(f"{option}: there is no axis {name!r}.", offer(name, AXES))
    if not colon:
        return kind, None
    if not re.fullmatch(r"[1-9]\d{0,3}", number, re.ASCII):
        raise ConfigError(
            f"{option}: {name!r} does not say which adapter's weight.",
            "Write weight:1 for that of the first --adapter, or weight for that of all.",
        )
    return kind, int(number)


def _split_values(kind: str, typed: str) -> list[str]:
    """Part values by commas; prompts, and what has a bar in it, by bars."""
    mark = "|" if kind == "prompt" or "|" in typed else ","
    return [value.strip() for value in typed.split(mark)]


def _read_value(option: str, kind: str, text: str) -> AxisValue:
    if not text:
        raise ConfigError(
            f"{option} {kind} has an empty value.", f"Write it like {_EXAMPLES[kind]}."
        )
    if kind not in ("weight", "steps", "guidance"):
        return text
    allowed = {
        "weight": "a finite number",
        "steps": f"a whole number from 1 to {_MOST_STEPS}",
        "guidance": "a finite number, at least 0",
    }[kind]
    try:
        number = int(text) if kind == "steps" else float(text)
    except ValueError:
        number = math.nan
    lowest = {"weight": -math.inf, "steps": 1, "guidance": 0}[kind]
    is_allowed = math.isfinite(number) and number >= lowest
    if not is_allowed or (kind == "steps" and number > _MOST_STEPS):
        raise ConfigError(
            f"{option} {kind}: {text!r} is not {allowed}.", f"Write it like {_EXAMPLES[kind]}."
        )
    return int(number) if number == int(number) else number
