"""Mix: adapters, what they share, their weights over pictures drawn ahead, and one file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from dreamloom.core.config.loading import PRESETS
from dreamloom.core.errors import ConfigError
from dreamloom.core.manifests import MANIFEST
from dreamloom.experiments.grid.axes import read_axes
from dreamloom.studio.adapters import SUFFIX, Adapter, find_adapter, list_adapters
from dreamloom.studio.context import Studio, go_to, not_found, read_form, refuse, render, studio_of
from dreamloom.studio.drawing import (
    DEVICES,
    MOST_ADAPTERS,
    SCHEDULERS,
    Drawing,
    name_anew,
    read_drawing,
)
from dreamloom.studio.mixing import (
    AXES,
    BLOCK_PRESETS,
    BLOCKS,
    FORMATS,
    PRECISIONS,
    RANKS,
    WEIGHTS,
    Ahead,
    WantedMerge,
    are_several,
    find_nearest,
    list_ahead,
    list_heat,
    name_file,
    plot_retention,
    read_merge,
    spell_default,
)
from dreamloom.studio.words import say

_PREFIX = "mix"
_PLACES = ("first", "second", "third", "fourth")
"""What addresses call the adapters that are chosen."""
_SUM: Mapping[str, Any] = {"name": "sum", "summary": "", "needs": "factors", "options": ()}


def show(request: Request) -> Response:
    """The page: which adapters, what they share, the pictures, the merge, and the files."""
    asked = request.query_params
    chosen = [asked.get(place, "") for place in _PLACES]
    return _render(request, chosen, asked.get("grid", ""), {})


def _render(
    request: Request,
    chosen: Sequence[str],
    grid: str,
    faults: Mapping[str, str],
    status: int = 200,
    *,
    drawing: Drawing | None = None,
    wanted: WantedMerge | None = None,
    form: Mapping[str, str] | None = None,
) -> Response:
    studio, form = studio_of(request), form or {}
    every = list_ahead(studio)
    parts = [one for text in chosen if (one := _find(studio, text)) is not None]
    ahead = next((one for one in every if one.key == grid and one.adapters), None)
    if ahead and not parts:
        parts = list(ahead.adapters)
    if ahead is None or list(ahead.adapters) != parts:
        ahead = next((one for one in every if parts and list(one.adapters) == parts), None)
    weights = ahead.weights if ahead else ("1",) * len(parts)
    wanted = wanted or WantedMerge(
        tuple((one.id, weight) for one, weight in zip(parts, weights, strict=True))
    )
    return render(
        request,
        "mix.html",
        status,
        faults=faults,
        parts=parts,
        pairs=list(itertools.combinations(parts, 2)),
        places=_PLACES,
        adapters=list_adapters(studio.root),
        every=every,
        drawing=drawing or _begin(parts),
        photo_choices=_list_photos(studio),
        photos=form.get("photos", _own_photos(parts, 0)),
        style=form.get("style", _own_photos(parts, 1)),
        values=form.get("values", WEIGHTS),
        merge=wanted,
        files=[one for one in list_adapters(studio.root) if one.run is None],
        blocks=BLOCKS,
        block_presets=BLOCK_PRESETS,
        ranks=RANKS,
        formats=FORMATS,
        precisions=PRECISIONS,
        schedulers=SCHEDULERS,
        presets=tuple(PRESETS),
        devices=DEVICES,
        **_tell_ahead(request, ahead, wanted),
    )


def _find(studio: Studio, text: str) -> Adapter | None:
    """Find an adapter by its own name in forms, or by its run's."""
    adapters = list_adapters(studio.root)
    runs = (one for one in adapters if one.run and one.run.id == text and one.update is None)
    return next((one for one in adapters if one.id == text), None) or next(runs, None)


def _list_chosen(form: Mapping[str, str]) -> list[str]:
    return [form.get(f"adapter{n}", "") for n in range(1, MOST_ADAPTERS + 1)]


def _begin(parts: list[Adapter]) -> Drawing:
    config = parts[0].run.config if parts and parts[0].run else None
    return Drawing(
        run=parts[0].run.id if parts and parts[0].run else "",
        adapters=tuple((one.id, "1") for one in parts),
        prompts=("a photo of {subject}",),
        numbers={"seeds": "4"},
        preset=config.preset if config else "standard",
    )


def _tell_ahead(request: Request, ahead: Ahead | None, wanted: WantedMerge) -> dict[str, Any]:
    """Tell what the pictures drawn ahead are, and which of them is shown first."""
    if ahead is None:
        return {"ahead": None, "cells": (), "sets": {}, "plot": None, "nearest": 0, "prompt": 0}
    cells = ahead.cells
    prompt = request.query_params.get("prompt", "0")
    number = int(prompt) if prompt.isdigit() and int(prompt) < len(ahead.grid.prompts) else 0
    sets = {cell.set: ahead.run.read_set(cell.set) for cell in cells}
    weights = [_number(weight) for _, weight in wanted.adapters]
    return {
        "ahead": ahead,
        "cells": cells,
        "sets": sets,
        "plot": plot_retention(cells),
        "nearest": find_nearest(cells, (weights[0], weights[1])),
        "prompt": number,
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def _list_photos(studio: Studio) -> dict[str, tuple[str, str]]:
    """List folders of pictures to measure with, by what forms call them.

    Returns:
        What each is called on pages, and where it lies below the root.
    """
    sets = {
        f"set-{one.id}": (one.title, one.folder.relative_to(studio.root).as_posix())
        for one in studio.photo_sets
        if one.names()
    }
    runs = {
        f"run-{run.id}": (
            say("mix.photos_of", run=run.name),
            run.files.photos.relative_to(studio.root).as_posix(),
        )
        for run in studio.runs()
        if (run.files.photos / MANIFEST).is_file()
    }
    return sets | runs


def _own_photos(parts: list[Adapter], place: int) -> str:
    """Name the photos that one of them was taught with, where they are there."""
    run = parts[place].run if place < len(parts) else None
    return f"run-{run.id}" if run and (run.files.photos / MANIFEST).is_file() else ""


async def diagnose(request: Request) -> Response:
    """What two adapters have in common, block by block."""
    studio, asked = studio_of(request), request.query_params
    pair = [find_adapter(studio.root, asked.get(name, "")) for name in ("first", "second")]
    if pair[0] is None or pair[1] is None:
        return not_found()
    files = [studio.path_of(one.name) for one in pair if one]
    because = " ".join(one.version for one in pair if one)
    told, said = await studio.ask(["diagnose", "--json", "--", *files], because=because)
    rows = list_heat(told) if told else []
    return render(request, "parts/diagnosis.html", told=told, said=said, rows=rows, pair=pair)


def _write_ahead(studio: Studio, form: Mapping[str, str]) -> tuple[str, list[str], dict[str, str]]:
    """Write the command that draws ahead; return the run's folder, it, and what is wrong."""
    drawing = read_drawing(form)
    faults = drawing.find_faults(studio)
    adapters = [adapter for adapter, _ in drawing.find_adapters(studio)]
    if not are_several(adapters, drawing.adapters):
        faults["adapter1"] = say("mix.several", most=MOST_ADAPTERS)
    weights = ",".join(value.strip() for value in form.get("values", WEIGHTS).split(","))
    x, y = (f"{axis}={weights}" for axis in AXES)
    try:
        read_axes([x], [y])
    except ConfigError as error:
        faults["values"] = str(error)
    known, chosen = _list_photos(studio), []
    for name, option in (("photos", "photos"), ("style", "style-photos")):
        one = form.get(name, "")
        if one and one not in known:
            faults[name] = say("mix.no_photos")
        # What pictures keep is measured of a subject and a style, not of three.
        elif one and len(adapters) == 2 and (name == "photos" or form.get("photos", "")):
            chosen.append(f"--{option}={studio.path_of(known[one][1])}")
    folder = drawing.find_folder(studio, _PREFIX)
    argv = [
        "grid",
        *drawing.spell_adapters(studio, (1, 2)),
        *drawing.spell_prompts(),
        *(f"--x={x}", f"--y={y}"),
        *chosen,
        *drawing.spell_rest(),
        f"--name={name_anew(studio, folder, _PREFIX)}",
        f"--out={studio.path_of(folder)}",
    ]
    return folder, argv, faults


async def show_ahead_command(request: Request) -> Response:
    """The command that draws ahead as the form is, and what is wrong with it."""
    _, argv, faults = _write_ahead(studio_of(request), await read_form(request))
    return render(request, "parts/command.html", faults=faults, argv=argv)


async def draw_ahead(request: Request) -> Response:
    """Put the pictures that are drawn ahead into the queue."""
    studio, form = studio_of(request), await read_form(request)
    folder, argv, faults = _write_ahead(studio, form)
    drawing = read_drawing(form)
    if faults:
        return _render(request, _list_chosen(form), "", faults, 422, drawing=drawing, form=form)
    job = studio.add_job("grid", argv, run=folder, device=drawing.device)
    return go_to(f"/draw/jobs/{job.id}")


async def _list_methods(studio: Studio, parts: int) -> tuple[list[Mapping[str, Any]], str]:
    """List the methods that can merge so many; and what was said where there is no list."""
    told, said = await studio.ask(["merge", "--methods", "--json"])
    fitting = [
        one
        for one in told or [_SUM]
        if one.get("least", 1) <= parts <= (one.get("most") or MOST_ADAPTERS)
    ]
    return fitting, said


async def show_method(request: Request) -> Response:
    """All methods to choose from, and the settings of the one that is chosen."""
    asked = request.query_params
    wanted, told = asked.get("method", "sum"), asked.get("parts", "")
    parts = int(told) if told in ("3", "4") else 2
    methods, said = await _list_methods(studio_of(request), parts)
    method = next((one for one in methods if one["name"] == wanted), methods[0])
    return render(
        request,
        "parts/method.html",
        methods=methods,
        method=method,
        parts=parts,
        said=said,
        spell_default=spell_default,
    )


async def show_merge_command(request: Request) -> Response:
    """The command that merges as the form is, and what is wrong with it."""
    studio, wanted = studio_of(request), read_merge(await read_form(request))
    methods, _ = await _list_methods(studio, len(wanted.adapters))
    faults, (_, argv) = wanted.find_faults(studio, methods), wanted.write_command(studio, methods)
    return render(request, "parts/merge_command.html", faults=faults, argv=argv)


async def merge(request: Request) -> Response:
    """Put the merge into the queue."""
    studio, form = studio_of(request), await read_form(request)
    wanted = read_merge(form)
    methods, _ = await _list_methods(studio, len(wanted.adapters))
    if faults := wanted.find_faults(studio, methods):
        chosen, grid = _list_chosen(form), form.get("grid", "")
        return _render(request, chosen, grid, faults, 422, wanted=wanted)
    _, argv = wanted.write_command(studio, methods)
    job = studio.add_job("merge", argv, device="cpu")
    return go_to(f"/draw/jobs/{job.id}")


def _find_file(request: Request) -> Adapter | None:
    return find_adapter(studio_of(request).root, request.path_params["file"])


async def show_file(request: Request) -> Response:
    """How a file was made, in a sentence."""
    studio, file = studio_of(request), _find_file(request)
    if file is None:
        return not_found()
    argv = ["inspect", "--json", "--", studio.path_of(file.name)]
    told, said = await studio.ask(argv, because=file.version)
    return render(request, "parts/adapter_file.html", file=file, told=told, said=said)


async def verify_file(request: Request) -> Response:
    """Merge a file's parts again, and say whether it is what its recipe says."""
    studio, file = studio_of(request), _find_file(request)
    if file is None:
        return not_found()
    argv = ["merge", "--verify", f"--inputs={studio.path_of('.')}", "--json"]
    told, said = await studio.ask([*argv, "--", studio.path_of(file.name)], because=file.version)
    return render(request, "parts/verified.html", told=told, said=said)


async def convert_file(request: Request) -> Response:
    """Write a file once more in another form."""
    studio, file = studio_of(request), _find_file(request)
    if file is None:
        return not_found()
    form = await read_form(request)
    names, precision = form.get("format", ""), form.get("precision", "")
    for word, known in ((names, FORMATS), (precision, PRECISIONS)):
        if word not in known:
            return refuse(say("mix.no_word", word=word, known=", ".join(known)), 422)
    stem = file.path.name.removesuffix(SUFFIX) if file.run is None else file.label
    out = name_file(studio, f"{stem}-{names}-{precision}")
    argv = ["convert", f"--format={names}", f"--precision={precision}"]
    argv += [f"--out={studio.path_of(out)}", "--", studio.path_of(file.name)]
    job = studio.add_job("convert", argv, device="cpu")
    return go_to(f"/draw/jobs/{job.id}")


def download_file(request: Request) -> Response:
    """An adapter's file, to keep."""
    file = _find_file(request)
    if file is None:
        return not_found()
    return FileResponse(
        file.path,
        filename=file.label.replace("/", "-") + SUFFIX,
        media_type="application/octet-stream",
    )


ROUTES = [
    Route("/mix", show),
    Route("/mix/diagnosis", diagnose),
    Route("/mix/ahead", draw_ahead, methods=["POST"]),
    Route("/mix/ahead/command", show_ahead_command, methods=["POST"]),
    Route("/mix/method", show_method),
    Route("/mix/merge", merge, methods=["POST"]),
    Route("/mix/merge/command", show_merge_command, methods=["POST"]),
    Route("/mix/files/{file}", download_file),
    Route("/mix/files/{file}/about", show_file),
    Route("/mix/files/{file}/verify", verify_file, methods=["POST"]),
    Route("/mix/files/{file}/convert", convert_file, methods=["POST"]),
]
