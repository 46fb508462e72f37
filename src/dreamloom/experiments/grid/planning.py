"""The plan of a grid: what each cell is drawn from, and what is refused before anything is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreamloom.core.config.settings import GenerateConfig, LoomConfig
from dreamloom.core.errors import ConfigError, DreamLoomError, RunFolderError
from dreamloom.core.run_folder import RunFolder
from dreamloom.experiments.grid.axes import Axis, AxisValue, check_adapters, read_axes
from dreamloom.experiments.grid.files import grid_file, read_grid, sheet_file
from dreamloom.inference.generate import ActiveAdapter, Prompt, parse_active_adapter
from dreamloom.lora.locating import locate_adapter, split_weight
from dreamloom.lora.reading import read_adapter
from dreamloom.pipeline.draw import GenerateRequest, fill_prompts


@dataclass(frozen=True)
class GridRequest:
    """What the user wants drawn.

    Args:
        x: ``NAME=VALUES`` of the first axis, once or more often; see `axes`.
        y: The same of the second; empty for a grid of one row.
        adapters: ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT@PROGRESS,…``, as in drawing.
        prompts: Texts; {subject} stands for the subject's phrase.
        out: The run's folder, or a new one.
        name: The grid's name.
        packs: The names of prompt packs.
        subject: The phrase; None takes what the first adapter says of itself.
        class_noun: What the subject is one of; None takes what that adapter says.
        run: The run whose checkpoints are named; None takes the one of ``out``.
        photos: The subject's photos, to measure retention with.
        style_photos: Pictures in the style, likewise; None takes what the style's adapter draws.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    out: Path
    name: str = "grid"
    packs: tuple[str, ...] = ()
    subject: str | None = None
    class_noun: str | None = None
    run: Path | None = None
    photos: Path | None = None
    style_photos: Path | None = None


@dataclass(frozen=True)
class CellPlan:
    """What one cell is drawn from.

    Args:
        x: The place of its value on the first axis, from 0.
        y: The same on the second.
        set: The name of its set of pictures.
        prompts: What it shows.
        active: The adapters that are worn; one at weight 0 is not.
        changes: Settings of drawing that differ from the grid's own.
    """

    x: int
    y: int
    set: str
    prompts: tuple[Prompt, ...]
    active: tuple[ActiveAdapter, ...]
    changes: dict[str, Any]

    def settle(self, config: GenerateConfig) -> GenerateConfig:
        """Give the settings that the cell is drawn with."""
        return config.model_copy(update=self.changes)


@dataclass(frozen=True)
class GridPlan:
    """All of a grid, before it is drawn.

    Args:
        x: The first axis.
        y: The second, if there is one.
        cells: Row by row.
        adapters: The adapters as they are named, at the weights that no axis changes.
        checkpoints: Files that take turns before these; empty without such an axis.
        headers: What the adapters say of themselves.
    """

    x: Axis
    y: Axis | None
    cells: tuple[CellPlan, ...]
    adapters: tuple[ActiveAdapter, ...]
    checkpoints: tuple[Path, ...]
    headers: tuple[dict[str, str], ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Both axes, or the only one."""
        return (self.x,) if self.y is None else (self.x, self.y)

    def sets_of_adapters(self) -> list[tuple[ActiveAdapter, ...]]:
        """List the adapters that are worn together, once for each checkpoint."""
        if not self.checkpoints:
            return [self.adapters]
        return [(ActiveAdapter(path), *self.adapters) for path in self.checkpoints]

    def widen(self, config: LoomConfig) -> LoomConfig:
        """Give settings that hold every scheduler and number of steps, and the least guidance.

        What these allow, every cell's own settings allow, too.
        """
        changes: dict[str, Any] = {}
        for axis in self.axes:
            if axis.kind in ("scheduler", "steps"):
                changes[{"scheduler": "schedulers"}.get(axis.kind, axis.kind)] = axis.values
            elif axis.kind == "guidance":
                changes["guidance"] = min(map(float, axis.values))
        generate = config.generate.model_copy(update=changes)
        return config.model_copy(update={"generate": generate})


def plan_grid(request: GridRequest, config: LoomConfig) -> GridPlan:
    """Settle what each cell is drawn from; nothing is loaded but the adapters.

    Raises:
        ConfigError: If an axis is not allowed, or something is said twice.
        AdapterError: If an adapter cannot be read.
    """
    x, y = read_axes(request.x, request.y)
    axes = [x] if y is None else [x, y]
    has_checkpoints = any(axis.kind == "checkpoint" for axis in axes)
    for axis in axes:
        check_adapters(axis, len(request.adapters) + has_checkpoints)
    _refuse_said_twice(request, axes, has_checkpoints)
    adapters = tuple(parse_active_adapter(text) for text in request.adapters)
    home = RunFolder(request.run or request.out)
    checkpoints = {
        str(value): find_checkpoint(str(value), home)
        for axis in axes
        if axis.kind == "checkpoint"
        for value in axis.values
    }
    paths = [*checkpoints.values(), *(part.path for part in adapters)]
    headers = tuple(dict(read_adapter(path).metadata) for path in paths)
    prompts = _fill(request, config, axes, headers)
    cells = []
    for (row, down), (column, across) in itertools.product(
        enumerate(y.values if y else (None,)), enumerate(x.values)
    ):
        given = {x: across} | ({y: down} if y is not None and down is not None else {})
        cells.append(
            CellPlan(
                x=column,
                y=row,
                set=f"{request.name}-x{column}-y{row}",
                prompts=_choose_prompts(given, prompts),
                active=_weigh(given, adapters, checkpoints),
                changes=_change_settings(given),
            )
        )
    return GridPlan(x, y, tuple(cells), adapters, tuple(checkpoints.values()), headers)


def find_checkpoint(value: str, run: RunFolder) -> Path:
    """Find the adapter that a value of the axis ``checkpoint`` means.

    Args:
        value: An update's number, ``final``, or an adapter as `locate_adapter` takes it.
        run: Whose updates are meant.

    Raises:
        ConfigError: If the run keeps no such adapter.
    """
    if value == "final":
        if not run.adapter.is_file():
            raise ConfigError(
                f"{run.path} has no {run.adapter.name}, so there is no final checkpoint.",
                "Name the run with --run, or finish its training.",
            )
        return run.adapter
    if not (value.isascii() and value.isdigit()):
        return locate_adapter(value)
    path = run.validation_samples / f"{int(value):06d}" / run.adapter.name
    if not path.is_file():
        kept = sorted(
            int(found.parent.name)
            for found in run.validation_samples.glob(f"[0-9]*/{run.adapter.name}")
        )
        listed = ", ".join(map(str, kept))
        raise ConfigError(
            f"{run.path} keeps no adapter of update {value}.",
            f"It keeps those of {listed}."
            if kept
            else "Name the run with --run; 'train' keeps adapters with --set validation.every=100.",
        )
    return path


def refuse_other_grid(run: RunFolder, name: str, plan: GridPlan) -> None:
    """Refuse a grid whose name is taken by one with other axes, or by files of the user's.

    Values may be added to an axis: the cells that are there stay where they are.

    Raises:
        RunFolderError: If so.
    """
    file, sheet = grid_file(run, name), sheet_file(run, name)
    elsewhere = "Give this grid another --name, or draw into another --out."
    if not file.exists():
        if sheet.exists():
            raise RunFolderError(f"{sheet} is there, and no grid that it would be of.", elsewhere)
        return
    try:
        earlier = read_grid(file)
    except DreamLoomError as error:
        raise RunFolderError(error.problem, elsewhere) from None
    for option, axis, old in (("--x", plan.x, earlier.x), ("--y", plan.y, earlier.y)):
        if axis is None or old is None:
            continue
        pairs = zip(axis.values, old.values, strict=False)
        if axis.name != old.name or any(new != known for new, known in pairs):
            values = ",".join(map(str, old.values))
            raise RunFolderError(
                f"{file} is a grid with {option} {old.name}={values}.",
                f"{elsewhere} More values may be added behind those.",
            )


def _refuse_said_twice(request: GridRequest, axes: Sequence[Axis], has_checkpoints: bool) -> None:
    """Refuse what an axis changes and an option says, too."""
    for axis in axes:
        if axis.kind == "prompt" and (request.prompts or request.packs):
            raise ConfigError(
                "The prompts are those of the axis prompt, so --prompt and --pack change nothing.",
                "Leave them out, or add them to the axis.",
            )
        if axis.kind != "weight":
            continue
        for number, text in enumerate(request.adapters, start=1 + has_checkpoints):
            adapter, weight = split_weight(text)
            if weight is not None and axis.adapter in (None, number):
                raise ConfigError(
                    f"--adapter {text} has a weight, and the axis {axis.name} sets it, too.",
                    f"Write --adapter {adapter}.",
                )
    if request.style_photos and not request.photos:
        raise ConfigError(
            "--style-photos are there to measure retention, which takes --photos, too.",
            "Give the subject's photos with --photos.",
        )


def _fill(
    request: GridRequest,
    config: LoomConfig,
    axes: Sequence[Axis],
    headers: Sequence[dict[str, str]],
) -> dict[AxisValue | None, tuple[Prompt, ...]]:
    """Fill prompts in: those of every cell under None, or one for each value of the axis."""
    own = next((axis.values for axis in axes if axis.kind == "prompt"), None)
    wanted = {None: request.prompts} if own is None else {one: (str(one),) for one in own}
    asked = GenerateRequest(
        adapters=request.adapters,
        prompts=(),
        packs=request.packs,
        subject=request.subject,
        floor=False,
        name=request.name,
        out=request.out,
        class_noun=request.class_noun,
    )
    return {
        value: tuple(fill_prompts(replace(asked, prompts=texts), config, headers))
        for value, texts in wanted.items()
    }


def _choose_prompts(
    given: dict[Axis, AxisValue], prompts: dict[AxisValue | None, tuple[Prompt, ...]]
) -> tuple[Prompt, ...]:
    own = next((value for axis, value in given.items() if axis.kind == "prompt"), None)
    return prompts[own]


def _weigh(
    given: dict[Axis, AxisValue],
    adapters: Sequence[ActiveAdapter],
    checkpoints: dict[str, Path],
) -> tuple[ActiveAdapter, ...]:
    """Give a cell's adapters their weights; those at 0 are left out: they would change nothing."""
    own = next((str(value) for axis, value in given.items() if axis.kind == "checkpoint"), None)
    worn = [*([] if own is None else [ActiveAdapter(checkpoints[own])]), *adapters]
    for axis, value in given.items():
        if axis.kind == "weight":
            worn = [
                replace(part, weight=float(value)) if axis.adapter in (None, number) else part
                for number, part in enumerate(worn, start=1)
            ]
    return tuple(part for part in worn if part.strongest != 0)


def _change_settings(given: dict[Axis, AxisValue]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for axis, value in given.items():
        match axis.kind:
            case "scheduler":
                changes["schedulers"] = (value,)
            case "steps":
                changes["steps"] = (value,)
            case "guidance":
                changes["guidance"] = float(value)
    return changes
