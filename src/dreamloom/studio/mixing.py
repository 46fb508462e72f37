"""Mixing adapters: pictures drawn ahead by the weights of two, and what a merge is told."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamloom.core.errors import ConfigError
from dreamloom.experiments.grid.files import CellRetention, Grid, list_grids
from dreamloom.merging.blocks import WORDS, parse_blocks
from dreamloom.studio.adapters import SUFFIX, Adapter, list_adapters
from dreamloom.studio.context import Studio
from dreamloom.studio.drawing import MOST_ADAPTERS
from dreamloom.studio.runs import Run
from dreamloom.studio.words import say

WEIGHTS = "0, 0.25, 0.5, 0.75, 1"
"""The weights of the first two adapters that pictures are drawn ahead at, unless told otherwise."""
AXES = ("weight:1", "weight:2")
FORMATS = ("auto", "peft", "kohya", "kohya-diffusers")
PRECISIONS = ("fp32", "fp16", "bf16")
"""Both written out, for reading them where they are made would load torch; a test compares."""
BLOCKS = tuple(word for word in WORDS if not re.match(r"(IN|OUT|MID|BASE)\d*$", word))
"""Words for blocks that a part's weight can be changed in."""
BLOCK_PRESETS = ("content", "style", "style=0", "content=0", "cross-attention", "text=0", "mid=0.5")
"""Weights of blocks that are offered; others can be typed."""
RANKS = ("full", "32", "energy:0.995", "budget:100MB")
"""Ranks that are offered, likewise."""

_RANK = re.compile(
    r"full|[1-9]\d{0,4}|energy:(0?\.\d{1,9}|1)|budget:\d{1,9}(\.\d{1,9})?\s?[kmg]i?b"
)
_WEIGHT = re.compile(r"-?(\d{1,3}(\.\d{0,6})?|\.\d{1,6})", re.ASCII)
_MOST_TEXT = 2000


@dataclass(frozen=True)
class Cell:
    """Pictures of one pair of weights.

    Args:
        weights: Of the first adapter and of the second.
        set: The name of its image set.
        retention: What it keeps of both; None where that was not measured.
        role: What it stands for, where others are measured against it.
    """

    weights: tuple[float, float]
    set: str
    retention: CellRetention | None
    role: str | None

    @property
    def kept(self) -> tuple[float, float] | None:
        """How much it keeps of the subject and of the style; None where it was not measured."""
        if self.retention is None:
            return None
        subject, style = self.retention.subject.value, self.retention.style.value
        return None if subject is None or style is None else (subject, style)


@dataclass(frozen=True)
class Ahead:
    """Pictures of two to four adapters that were drawn ahead, by the weights of the first two.

    Args:
        run: The run that they lie in.
        grid: Their grid.
        adapters: The adapters; none where one of them has gone.
        weights: The weight of each; those of the first two count for nothing, for cells say them.
    """

    run: Run
    grid: Grid
    adapters: tuple[Adapter, ...]
    weights: tuple[str, ...]

    @property
    def key(self) -> str:
        """What addresses call it."""
        return f"{self.run.id}.{self.grid.name}"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All pairs of weights, by the first adapter's and then by the second's."""
        x, y = self.grid.x, self.grid.y
        assert y is not None
        found = []
        for cell in self.grid.cells:
            pair = float(x.values[cell.x]), float(y.values[cell.y])
            first, second = pair if x.name == AXES[0] else pair[::-1]
            found.append(Cell((first, second), cell.set, cell.retention, cell.role))
        return tuple(sorted(found, key=lambda cell: cell.weights))


def list_ahead(studio: Studio) -> list[Ahead]:
    """List all grids of the first two adapters' weights, those of the last run first."""
    adapters = list_adapters(studio.root)
    found = []
    for run in studio.runs():
        for grid in list_grids(run.files)[::-1]:
            if {axis.name for axis in (grid.x, grid.y) if axis} == {*AXES}:
                worn = find_worn(studio, grid, adapters)
                there = tuple(adapter for adapter, _ in worn if adapter is not None)
                is_whole = len(there) == len(worn) <= MOST_ADAPTERS
                weights = tuple(weight for _, weight in worn)
                found.append(Ahead(run, grid, there if is_whole else (), weights))
    return found


def find_worn(
    studio: Studio, grid: Grid, adapters: Sequence[Adapter]
) -> list[tuple[Adapter | None, str]]:
    """Find the adapters that a grid was drawn with, in its order; None for one that has gone.

    The grid's command names their files; the grid itself has but the last names of these, which
    are the same for most runs.

    Returns:
        Each with its weight, which is 1 where the command gives it none.
    """
    try:
        words = shlex.split(grid.command)
    except ValueError:
        return []
    known = {adapter.path.resolve(): adapter for adapter in adapters}
    named = [word for option, word in itertools.pairwise(words) if option == "--adapter"]
    worn = []
    for word in named:
        file, colon, weight = word.rpartition(":")
        if not colon or not _WEIGHT.fullmatch(weight):
            file, weight = word, "1"
        if "\0" not in file:
            worn.append((known.get((studio.place / file).resolve()), weight))
    return worn


def label_axes(studio: Studio, grid: Grid) -> tuple[str, str]:
    """Name a grid's axes for readers: a weight by the run or file of its adapter."""
    worn = find_worn(studio, grid, list_adapters(studio.root))
    labels = []
    for axis in (grid.x, grid.y):
        number = axis.name.removeprefix("weight:") if axis else ""
        part = worn[int(number) - 1][0] if number.isdigit() and int(number) <= len(worn) else None
        # With checkpoints on an axis, adapters are counted from these.
        named = part is not None and len(worn) == len(grid.adapters)
        own = axis.label if axis else ""
        labels.append(say("mix.weight_of", name=part.label) if part and named else own)
    return labels[0], labels[1]


def find_nearest(cells: Sequence[Cell], weights: tuple[float, float]) -> int:
    """Find the cell whose weights are nearest to some, by its place; of two, the first."""
    far = [math.dist(cell.weights, weights) for cell in cells]
    return far.index(min(far))


@dataclass(frozen=True)
class Plot:
    """Where cells lie by what they keep: to the right the style, upward the subject.

    Args:
        points: By the cell's place: its position in the drawing.
        ticks: Values and their positions, across and down.
        size: The sides of the drawing.
        margin: What is left for labels.
    """

    points: dict[int, tuple[float, float]]
    ticks: tuple[tuple[str, float, float], ...]
    size: int = 340
    margin: int = 46


def plot_retention(cells: Sequence[Cell]) -> Plot | None:
    """Lay out what cells keep; None where nothing was measured."""
    kept = {place: cell.kept for place, cell in enumerate(cells)}
    known = {place: pair for place, pair in kept.items() if pair is not None}
    if not known:
        return None
    values = [value for pair in known.values() for value in pair]
    low, high = min(0.0, *values) - 0.06, max(1.0, *values) + 0.06
    size, margin = Plot.size, Plot.margin

    def place(value: float) -> float:
        return round((value - low) / (high - low) * (size - 2 * margin), 1)

    points = {
        number: (margin + place(style), size - margin - place(subject))
        for number, (subject, style) in known.items()
    }
    ticks = tuple(
        (f"{value:g}", margin + place(value), size - margin - place(value))
        for value in (0.0, 0.5, 1.0)
    )
    return Plot(points, ticks)


@dataclass(frozen=True)
class WantedMerge:
    """What the form of a merge asks for, as it was typed.

    Args:
        adapters: Two to four adapters' names in forms, with their weights.
        method: How they are merged.
        options: The method's settings, by name; empty for the usual ones.
        blocks: Weights of each part's blocks; empty for 1 everywhere.
        prompts: What the base model is asked for each, by methods that ask.
        rank: full, a number, energy:… or budget:….
        format: Whose names the file has.
        precision: Of its numbers.
        title: What the file shall be called.
    """

    adapters: tuple[tuple[str, str], ...] = ()
    method: str = "sum"
    options: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ("",) * MOST_ADAPTERS
    prompts: tuple[str, ...] = ("",) * MOST_ADAPTERS
    rank: str = "full"
    format: str = "auto"
    precision: str = "fp32"
    title: str = ""

    def find_adapters(self, studio: Studio) -> list[Adapter]:
        """Find the files of all."""
        known = {adapter.id: adapter for adapter in list_adapters(studio.root)}
        return [known[one] for one, _ in self.adapters if one in known]

    def find_faults(self, studio: Studio, methods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Say what is wrong, by the control's name.

        Args:
            studio: Where the adapters lie.
            methods: Those that merge so many, with their settings, as the command line lists them.
        """
        found = {}
        if not are_several(self.find_adapters(studio), self.adapters):
            found["adapter1"] = say("mix.several", most=MOST_ADAPTERS)
        for place, (_, weight) in enumerate(self.adapters, start=1):
            if not _WEIGHT.fullmatch(weight):
                found[f"weight{place}"] = say("draw.no_weight", weight=weight)
        for place, text in enumerate(self.blocks, start=1):
            try:
                parse_blocks(text[:_MOST_TEXT])
            except ConfigError as error:
                found[f"blocks{place}"] = str(error)
        for place, text in enumerate(self.prompts, start=1):
            if len(text) > _MOST_TEXT:
                found[f"prompt{place}"] = say("draw.long", most=_MOST_TEXT)
        if not _RANK.fullmatch(self.rank.lower()):
            found["rank"] = say("mix.no_rank", rank=self.rank)
        for name, value, known in (
            ("format", self.format, FORMATS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                found[name] = say("mix.no_word", word=value, known=", ".join(known))
        method = next((one for one in methods if one["name"] == self.method), None)
        if method is None:
            found["method"] = say("mix.no_method", method=self.method, n=len(self.adapters))
        return found | (find_option_faults(method, self.options) if method else {})

    def write_command(
        self, studio: Studio, methods: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[str]]:
        """Write the command; return the file that it writes, below the root, with it."""
        adapters = self.find_adapters(studio)
        names = name_parts(adapters)
        file = name_file(studio, self.title or "-".join(names))
        method: Mapping[str, Any] = next(
            (one for one in methods if one["name"] == self.method), {"options": ()}
        )
        usual = {option["name"]: option["default"] for option in method["options"]}
        parts = [
            f"{name}={studio.path_of(adapter.name)}:{weight}"
            for name, adapter, (_, weight) in zip(names, adapters, self.adapters, strict=False)
        ]
        changed = {
            name: value
            for name, value in self.options.items()
            if value and name in usual and value != spell_default(usual[name])
        }
        asks = method.get("needs") in ("activations", "training")
        return file, [
            *("merge", *parts, f"--out={studio.path_of(file)}", f"--method={self.method}"),
            *(f"--set={name}={value}" for name, value in changed.items()),
            *(
                f"--blocks={name}:{text}"
                for name, text in zip(names, self.blocks, strict=False)
                if text
            ),
            *(
                f"--prompt={name}:{text}"
                for name, text in zip(names, self.prompts, strict=False)
                if text and asks
            ),
            *(f"--rank={self.rank}", f"--format={self.format}", f"--precision={self.precision}"),
            "--verify",
        ]


def are_several(found: Sequence[Adapter], asked: Sequence[object]) -> bool:
    """Say whether all that was asked for was found, and is two adapters or more, each once."""
    return len({adapter.id for adapter in found}) == len(asked) and len(asked) > 1


def read_merge(form: Mapping[str, str]) -> WantedMerge:
    """Read the form of a merge."""
    plain = WantedMerge()

    def one(name: str, usual: str = "") -> str:
        text = form.get(name, usual)
        return "".join(letter for letter in text if letter.isprintable()).strip() or usual

    places = [n for n in range(1, MOST_ADAPTERS + 1) if one(f"adapter{n}")]
    return WantedMerge(
        adapters=tuple((one(f"adapter{n}"), one(f"weight{n}", "1")) for n in places),
        method=one("method", plain.method),
        options={name[4:]: one(name) for name in form if name.startswith("opt-")},
        blocks=tuple(one(f"blocks{n}") for n in places),
        prompts=tuple(one(f"prompt{n}") for n in places),
        rank=one("rank", plain.rank),
        format=one("format", plain.format),
        precision=one("precision", plain.precision),
        title=one("title"),
    )


def spell_default(value: object) -> str:
    """Write a setting's usual value as one types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def find_option_faults(method: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Say what is wrong with a method's settings, by the control's name."""
    found = {}
    for option in method["options"]:
        name, value = option["name"], given.get(option["name"], "")
        if value and not _is_allowed(option, value):
            found[f"opt-{name}"] = say("mix.no_option", name=name, value=value)
    return found


def _is_allowed(option: Mapping[str, Any], value: str) -> bool:
    if option["choices"]:
        return value in option["choices"]
    if isinstance(option["default"], bool):
        return value in ("true", "false")
    if isinstance(option["default"], str):
        return True
    try:
        number = int(value) if isinstance(option["default"], int) else float(value)
    except ValueError:
        return False
    low, high = option["low"], option["high"]
    return (
        math.isfinite(number)
        and (low is None or number >= low)
        and (high is None or number <= high)
    )


def name_parts(adapters: Sequence[Adapter]) -> list[str]:
    """Name the parts of a merge by their runs or files, each otherwise than the others."""
    names: list[str] = []
    for adapter in adapters:
        own = slug(adapter.run.name if adapter.run else adapter.label) or "part"
        own += "" if adapter.update is None else f"-{adapter.update}"
        names.append(own if own not in names else f"{own}-{len(names) + 1}")
    return names


def slug(text: str) -> str:
    """Make a name of a text that can be a file's everywhere."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")


def name_file(studio: Studio, wanted: str) -> str:
    """Name a file that is not there yet, nor about to be written, below the root."""
    stem, number = slug(wanted) or "merged", 1
    taken = {
        word.rpartition("/")[2].rpartition("\\")[2].removeprefix("--out=")
        for job in studio.jobs
        if job.outcome in ("queued", "running")
        for word in job.asked.argv
    }
    name = stem
    while (studio.root / f"{name}{SUFFIX}").exists() or f"{name}{SUFFIX}" in taken:
        number += 1
        name = f"{stem}-{number}"
    return f"{name}{SUFFIX}"


def list_heat(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay a diagnosis out as a heat map: a row for each block, a level from 0 to 5 for each value.

    Strengths count against the strongest block of the same adapter.
    """
    blocks = diagnosis["blocks"]
    strongest = [max((b["norms"][n] for b in blocks), default=0.0) or 1.0 for n in (0, 1)]
    rows = []
    for block in blocks:
        overlap = block["row_overlap"][0] if block["row_overlap"] else None
        chance = block["row_chance"][0] if block["row_chance"] else None
        cosine = block["cosine"] if block["shared"] else None
        shares = [block["norms"][n] / strongest[n] for n in (0, 1)]
        values = [
            *((f"{block['norms'][n]:.3g}", _level(shares[n])) for n in (0, 1)),
            ("–" if cosine is None else f"{cosine:+.2f}", _level(abs(cosine or 0.0))),
            ("–" if overlap is None else f"{overlap:.0%}", _level(overlap or 0.0)),
            ("–" if chance is None else f"{chance:.0%}", _level(chance or 0.0)),
        ]
        rows.append({"block": block["block"], "values": values})
    return rows


def _level(share: float) -> int:
    return min(5, max(0, math.ceil(5 * share - 0.5)))
