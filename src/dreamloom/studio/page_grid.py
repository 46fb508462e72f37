"""Grids: the same prompts and seeds, changed in one way across and in another one down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.core.config.loading import PRESETS
from dreamloom.core.errors import ConfigError
from dreamloom.data.prompts.packs import PACK_NAMES
from dreamloom.experiments.grid.axes import Axis, check_adapters, read_axes
from dreamloom.experiments.grid.files import Grid, list_grids
from dreamloom.studio.adapters import list_adapters
from dreamloom.studio.context import Studio, go_to, not_found, read_form, render, studio_of
from dreamloom.studio.drawing import (
    DEVICES,
    MOST_ADAPTERS,
    SCHEDULERS,
    Drawing,
    begin_drawing,
    name_anew,
    read_drawing,
    read_lines,
)
from dreamloom.studio.mixing import label_axes
from dreamloom.studio.runs import Run
from dreamloom.studio.words import say

KINDS = (
    *("weight", "weight:1", "weight:2", "checkpoint"),
    *("scheduler", "steps", "guidance", "prompt"),
)
_PREFIX = "grid"


@dataclass(frozen=True)
class WantedGrid:
    """What the form of a grid asks for.

    Args:
        drawing: What all cells share.
        x: The first axis: its name, and its values as they were typed.
        y: The second; its name is empty where there is none.
    """

    drawing: Drawing
    x: tuple[str, str]
    y: tuple[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The axes' names."""
        return tuple(name for name, _ in (self.x, self.y) if name)

    def spell(self) -> tuple[list[str], list[str]]:
        """Write both axes as the command takes them."""
        return [_spell_axis(*self.x)], [_spell_axis(*self.y)] if self.y[0] else []

    def find_faults(self, studio: Studio) -> dict[str, str]:
        """Say what is wrong, by the control's name."""
        without = {*self.names}
        without |= {"prompts"} if "prompt" in self.names else set()
        without |= (
            {"adapters"} if "checkpoint" in self.names and not self.drawing.adapters else set()
        )
        found = self.drawing.find_faults(studio, without)
        if any(name not in KINDS for name in self.names):
            return found | {"x": say("grid.no_axis")}
        try:
            axes = [axis for axis in read_axes(*self.spell()) if axis is not None]
            for axis in axes:
                check_adapters(axis, len(self.drawing.adapters) + ("checkpoint" in self.names))
        except ConfigError as error:
            text = str(error)
            return found | {"y" if "--y" in text and "--x" not in text else "x": text}
        return found | dict(self._find_value_faults(studio, axes))

    def _find_value_faults(self, studio: Studio, axes: list[Axis]) -> list[tuple[str, str]]:
        """Refuse checkpoints that the run does not keep, and schedulers that are not there."""
        run = studio.find_run(self.drawing.run)
        kept = list_updates(run) if run else []
        found = []
        for place, axis in zip("xy", axes, strict=False):
            known = {"checkpoint": kept, "scheduler": list(SCHEDULERS)}.get(axis.kind)
            unknown = [str(one) for one in axis.values if known is not None and one not in known]
            if unknown:
                text = say(
                    f"grid.no_{axis.kind}", value=unknown[0], known=", ".join(known or []) or "–"
                )
                found.append((place, text))
        return found

    def write_command(self, studio: Studio) -> tuple[str, list[str]]:
        """Write the command; return the run's folder below the root with it."""
        drawing, names = self.drawing, self.names
        folder = drawing.find_folder(studio, _PREFIX)
        before = "checkpoint" in names
        places = range(1, MOST_ADAPTERS + 1)
        weighed = [n for n in places if {"weight", f"weight:{n + before}"} & {*names}]
        x, y = self.spell()
        return folder, [
            "grid",
            *drawing.spell_adapters(studio, weighed),
            *([] if "prompt" in names else drawing.spell_prompts()),
            *(f"--x={text}" for text in x),
            *(f"--y={text}" for text in y),
            *drawing.spell_rest(names),
            f"--name={name_anew(studio, folder, _PREFIX)}",
            f"--out={studio.path_of(folder)}",
        ]


def _spell_axis(name: str, typed: str) -> str:
    """Write an axis; values may stand in lines of their own."""
    mark = "|" if name == "prompt" else ","
    typed = mark.join(line.rstrip(mark) for line in read_lines(typed))
    return f"{name}={mark.join(value.strip() for value in typed.split(mark))}"


def list_updates(run: Run) -> list[str]:
    """List the checkpoints that a run keeps adapters of, as an axis names them."""
    adapters = run.files.validation_samples.glob(f"[0-9]*/{run.files.adapter.name}")
    numbers = sorted(int(path.parent.name) for path in adapters if path.parent.name.isdigit())
    return [*map(str, numbers), *(["final"] if run.is_trained else [])]


def _read_wanted(form: Mapping[str, str]) -> WantedGrid:
    x, y = ((form.get(place, ""), form.get(f"{place}-values", "")) for place in "xy")
    return WantedGrid(read_drawing(form), x, y)


def show_form(request: Request) -> Response:
    """The form, and the grids of the run that it is for."""
    studio = studio_of(request)
    run = studio.find_run(request.query_params.get("run", ""))
    run = run or next((one for one in studio.runs() if one.is_trained), None)
    adapters = list_adapters(studio.root)
    own = next((one for one in adapters if run and one.run == run), None)
    wanted = WantedGrid(begin_drawing(run, own), ("weight", "0, 0.5, 1"), ("guidance", "2, 4, 6"))
    return _render_form(request, wanted, {})


def _render_form(
    request: Request, wanted: WantedGrid, faults: Mapping[str, str], status: int = 200
) -> Response:
    studio, drawing = studio_of(request), wanted.drawing
    run = studio.find_run(drawing.run)
    return render(
        request,
        "grid.html",
        status,
        wanted=wanted,
        drawing=drawing,
        faults=faults,
        kinds=KINDS,
        run=run,
        updates=list_updates(run) if run else [],
        grids=list_grids(run.files) if run else [],
        runs=studio.runs(),
        adapters=list_adapters(studio.root),
        most_adapters=MOST_ADAPTERS,
        packs=PACK_NAMES,
        schedulers=SCHEDULERS,
        presets=tuple(PRESETS),
        devices=DEVICES,
        argv=wanted.write_command(studio)[1] if drawing.adapters else (),
    )


async def show_command(request: Request) -> Response:
    """The command that the form stands for, and what is wrong with it."""
    studio, wanted = studio_of(request), _read_wanted(await read_form(request))
    faults, argv = wanted.find_faults(studio), wanted.write_command(studio)[1]
    return render(request, "parts/command.html", faults=faults, argv=argv)


async def start(request: Request) -> Response:
    """Put the grid into the queue."""
    studio, wanted = studio_of(request), _read_wanted(await read_form(request))
    if faults := wanted.find_faults(studio):
        return _render_form(request, wanted, faults, 422)
    folder, argv = wanted.write_command(studio)
    job = studio.add_job("grid", argv, run=folder, device=wanted.drawing.device)
    return go_to(f"/draw/jobs/{job.id}")


def find_grid(studio: Studio, run_id: str, name: str) -> tuple[Run, Grid] | None:
    """Find a grid by its run and its name."""
    run = studio.find_run(run_id)
    grids = list_grids(run.files) if run else []
    grid = next((one for one in grids if one.name == name), None)
    return (run, grid) if run and grid else None


def show_grid(request: Request) -> Response:
    """A grid's cells, all with the picture of one prompt and seed."""
    found = find_grid(studio_of(request), request.path_params["run"], request.path_params["grid"])
    if found is None:
        return not_found()
    run, grid = found
    asked = request.query_params.get("picture", "0")
    sets = {cell.set: run.read_set(cell.set) for cell in grid.cells}
    first = sets[grid.cells[0].set]
    pictures = first.pictures if first else ()
    number = int(asked) if asked.isdigit() and int(asked) < len(pictures) else 0
    return render(
        request,
        "grid_cells.html",
        run=run,
        grid=grid,
        sets=sets,
        pictures=pictures,
        number=number,
        labels=label_axes(studio_of(request), grid),
        has_own_prompts="prompt" in [axis.name for axis in (grid.x, grid.y) if axis],
    )


ROUTES = [
    Route("/draw/grid", show_form),
    Route("/draw/grid", start, methods=["POST"]),
    Route("/draw/grid/command", show_command, methods=["POST"]),
    Route("/draw/grids/{run}/{grid}", show_grid),
]
