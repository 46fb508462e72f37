"""Draw a grid: every cell a set of pictures, in one process, and the list of all of them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import GenerateConfig, LoomConfig
from dreamloom.core.device import Runtime
from dreamloom.core.events import (
    Note,
    Observer,
    Progress,
    StageDone,
    StageStarted,
    silent,
    tee,
)
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder
from dreamloom.core.toml_files import to_toml_value
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.scoring import pick_encoders
from dreamloom.experiments.grid.axes import Axis
from dreamloom.experiments.grid.files import (
    CellRetention,
    Grid,
    GridAxis,
    GridCell,
    GridReference,
    sheet_file,
    write_grid,
)
from dreamloom.experiments.grid.planning import (
    GridPlan,
    GridRequest,
    plan_grid,
    refuse_other_grid,
)
from dreamloom.experiments.grid.retention import Ends, find_ends, measure_cells
from dreamloom.experiments.grid.sheet import write_sheet
from dreamloom.inference.generate import (
    SetName,
    check_request,
    check_set_name,
    generate_images,
    refuse_other_set,
    settle_composition,
)
from dreamloom.models.base import Model
from dreamloom.models.lora_schedule import TOGETHER
from dreamloom.pipeline.session import check_names, choose_base, open_session, resolve_defaults


def draw_grid(
    request: GridRequest, config: LoomConfig, runtime: Runtime, observe: Observer = silent
) -> Grid:
    """Draw a grid into ``out``: its cells as sets of pictures, a contact sheet, and their list.

    A cell that is there is not drawn again, and one that was begun goes on. The list is written
    when all of it is there. The base model is the one that the adapters were made for, unless the
    settings name another.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit the base.
        ConfigError: If an axis is not allowed, nothing is to be drawn, or it cannot be drawn so.
        PhotoError: If retention is asked for, and a photo cannot be read or there is none.
        RunFolderError: If ``out`` holds other files, or a grid of that name drawn otherwise.
    """
    plan = plan_grid(request, config)
    check_set_name(request.name)
    check_set_name(plan.cells[-1].set)
    check_names(plan.widen(config))
    ends = find_ends(request, plan)
    run = RunFolder(request.out)
    run.refuse_other_folders()
    refuse_other_grid(run, request.name, plan)
    for cell in plan.cells:
        manner = settle_composition(TOGETHER, cell.active, config.generate)
        refuse_other_set(run, cell.set, cell.prompts, cell.active, manner)
    command = write_command(request, config)
    config = choose_base(config, plan.headers)
    model, widened = open_session(plan.widen(config), runtime, work="drawing", observe=observe)
    prompts = [prompt for cell in plan.cells for prompt in cell.prompts]
    for active in plan.sets_of_adapters():
        check_request(model, prompts, widened.generate, active, request.name)
    settings = resolve_defaults(config, model).generate
    stage, began = f"grid-{request.name}", time.monotonic()
    with ExitStack() as stack:
        known = None
        if isinstance(ends, Ends):
            scratch = Path(stack.enter_context(TemporaryDirectory()))
            known = _load_references(request, model, scratch, observe)
        run.claim()
        observe = tee(observe, run.observer())
        pictures = settings.images_per_prompt * len(plan.cells[0].prompts)
        observe(StageStarted(stage, f"{len(plan.cells)} cells of {pictures} pictures"))
        if isinstance(ends, str) and request.photos:
            observe(Note(stage, f"retention is not measured: {ends}", warning=True))
        sets = _draw_cells(run, model, plan, settings, stage, observe)
        kept: dict[str, CellRetention] = {}
        compared = ""
        if known is not None and isinstance(ends, Ends):
            encoders = pick_encoders(config.evaluate.encoders, model.identity.name, config.device)
            kept, compared = measure_cells(
                ends,
                sets,
                *known,
                config.evaluate,
                encoders,
                lambda done, total: observe(Progress(stage, "measuring", done, total)),
            )
    grid = _describe(request, plan, model, settings, command, ends, kept, compared)
    firsts = [sets[cell.set].paths()[0] for cell in plan.cells]
    write_sheet(sheet_file(run, request.name), grid.x, grid.y, firsts)
    path = write_grid(run, grid)
    observe(StageDone(stage, time.monotonic() - began, str(path)))
    return grid


def _load_references(
    request: GridRequest, model: Model, scratch: Path, observe: Observer
) -> tuple[PhotoSet, PhotoSet | None]:
    """Read the subject's photos and the pictures in the style, before anything is drawn."""
    side = model.advice.resolution_px
    assert request.photos is not None
    photos = load_photos(request.photos, RunFolder(scratch / "subject"), side, observe)
    if request.style_photos is None:
        return photos, None
    return photos, load_photos(request.style_photos, RunFolder(scratch / "style"), side, observe)


def _draw_cells(
    run: RunFolder,
    model: Model,
    plan: GridPlan,
    settings: GenerateConfig,
    stage: str,
    observe: Observer,
) -> dict[str, ImageSet]:
    """Draw what is missing; give all cells' pictures by the set's name."""
    sets: dict[str, ImageSet] = {}
    observe(Progress(stage, "cells", 0, len(plan.cells)))
    for cell in plan.cells:
        sets[cell.set] = generate_images(
            run,
            model,
            cell.prompts,
            cell.settle(settings),
            cell.active,
            SetName(cell.set, purpose="grid"),
            observe,
        )
        observe(Progress(stage, "cells", len(sets), len(plan.cells)))
    return sets


def _describe(
    request: GridRequest,
    plan: GridPlan,
    model: Model,
    settings: GenerateConfig,
    command: str,
    ends: Ends | str,
    kept: Mapping[str, CellRetention],
    compared: str,
) -> Grid:
    names = [*(["checkpoint"] if plan.checkpoints else []), *(p.path.name for p in plan.adapters)]
    roles = {} if isinstance(ends, str) else {name: role for role, name in ends.sets.items()}
    first = settings.first_seed
    return Grid(
        name=request.name,
        command=command,
        base=model.identity.as_dict(),
        adapters=tuple(names),
        prompts=tuple(dict.fromkeys(one.text for cell in plan.cells for one in cell.prompts)),
        seeds=tuple(range(first, first + settings.images_per_prompt)),
        x=_describe_axis(plan.x, names),
        y=_describe_axis(plan.y, names) if plan.y else None,
        cells=tuple(
            GridCell(
                x=cell.x,
                y=cell.y,
                set=cell.set,
                role=roles.get(cell.set),
                retention=kept.get(cell.set),
            )
            for cell in plan.cells
        ),
        reference=None
        if isinstance(ends, str)
        else GridReference(
            **{str(role): name for role, name in ends.sets.items()},
            subject_weight=ends.weights[0],
            style_weight=ends.weights[1],
            style_pictures=compared,
        ),
        reason=ends if isinstance(ends, str) else "",
        sheet=sheet_file(RunFolder(request.out), request.name).name,
    )


def _describe_axis(axis: Axis, adapters: list[str]) -> GridAxis:
    label = axis.kind
    if axis.kind == "weight" and axis.adapter is not None:
        label = f"weight of {Path(adapters[axis.adapter - 1]).stem}"
    return GridAxis(name=axis.name, label=label, values=axis.values)


def write_command(request: GridRequest, config: LoomConfig) -> str:
    """Write a command that draws the grid: what was asked for, and every setting of drawing."""
    words = ["dreamloom", "grid"]
    words += ["--base", config.base] if "base" in config.model_fields_set else []
    for option, texts in (
        ("--adapter", request.adapters),
        ("--prompt", request.prompts),
        ("--pack", request.packs),
        ("--x", request.x),
        ("--y", request.y),
    ):
        words += [word for text in texts for word in (option, text)]
    for option, given in (
        ("--subject", request.subject),
        ("--class-noun", request.class_noun),
        ("--run", request.run),
        ("--photos", request.photos),
        ("--style-photos", request.style_photos),
    ):
        words += [option, str(given)] if given is not None else []
    # The batch changes no picture.
    plain = config.generate.model_dump(mode="json", exclude_defaults=True, exclude={"batch"})
    changed = {axis.partition("=")[0].strip() for axis in (*request.x, *request.y)}
    changed = {{"scheduler": "schedulers"}.get(name, name) for name in changed}
    for name, value in plain.items():
        if name not in changed:
            words += ["--set", f"generate.{name}={to_toml_value(value)}"]
    return shlex.join([*words, "--name", request.name, "--out", str(request.out)])
