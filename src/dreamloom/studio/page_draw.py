"""Draw: prompts, schedulers, seeds and adapters with weights; and galleries of what was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from dreamloom.core.config.loading import PRESETS
from dreamloom.core.manifests import ImageSet
from dreamloom.data.prompts.packs import PACK_NAMES
from dreamloom.studio import page_grid
from dreamloom.studio.adapters import list_adapters
from dreamloom.studio.context import Studio, go_to, not_found, read_form, refuse, render, studio_of
from dreamloom.studio.drawing import (
    DEVICES,
    MOST_ADAPTERS,
    SCHEDULERS,
    Drawing,
    begin_drawing,
    name_anew,
    read_drawing,
    read_option,
)
from dreamloom.studio.gallery import (
    FILTERS,
    HIDDEN,
    KEPT,
    MARKS,
    lay_out,
    name_file,
    name_zip,
    read_marks,
    write_mark,
    zip_files,
)
from dreamloom.studio.jobs import Job
from dreamloom.studio.runs import Run

_PREFIX = "drawn"
_BASE = "_base"
"""What the name of the base model's set ends in."""


def show_form(request: Request) -> Response:
    """The form, and what was drawn in the run that it is for."""
    studio, asked = studio_of(request), request.query_params
    run = studio.find_run(asked.get("run", ""))
    adapters = list_adapters(studio.root)
    if run is None and "adapter" not in asked:
        run = next((one for one in studio.runs() if one.is_trained), None)
    chosen = next((one for one in adapters if one.id == asked.get("adapter")), None)
    own = next((one for one in adapters if run and one.run == run), None)
    drawing = begin_drawing(run, chosen or own)
    return _render_form(request, drawing, {})


def _render_form(
    request: Request, drawing: Drawing, faults: Mapping[str, str], status: int = 200
) -> Response:
    studio = studio_of(request)
    run = studio.find_run(drawing.run)
    return render(
        request,
        "draw.html",
        status,
        faults=faults,
        sets=list_sets(run) if run else {},
        argv=write_command(studio, drawing)[1] if drawing.adapters else (),
        **list_choices(studio, drawing),
    )


def list_choices(studio: Studio, drawing: Drawing) -> dict[str, Any]:
    """List what a form of drawing offers."""
    return {
        "drawing": drawing,
        "run": studio.find_run(drawing.run),
        "runs": studio.runs(),
        "adapters": list_adapters(studio.root),
        "most_adapters": MOST_ADAPTERS,
        "packs": PACK_NAMES,
        "schedulers": SCHEDULERS,
        "presets": tuple(PRESETS),
        "devices": DEVICES,
    }


def list_sets(run: Run) -> dict[str, ImageSet]:
    """Read a run's image sets, the last one first.

    Cells of grids have their own page, and what the base model drew stands beside the others.
    """
    folders = run.sets()
    found = {
        name: images
        for name in folders
        if (name.removesuffix(_BASE) == name or name.removesuffix(_BASE) not in folders)
        and (images := run.read_set(name)) is not None
        and images.purpose != "grid"
    }
    latest = sorted(found, key=lambda name: folders[name].stat().st_mtime, reverse=True)
    return {name: found[name] for name in latest}


def write_command(studio: Studio, drawing: Drawing) -> tuple[str, list[str]]:
    """Write the command that draws what the form asks for.

    Returns:
        The run's folder below the root, and what ``dreamloom`` is told.
    """
    folder = drawing.find_folder(studio, _PREFIX)
    return folder, [
        "generate",
        *drawing.spell_adapters(studio),
        *drawing.spell_prompts(),
        *_spell_size(drawing),
        *(["--floor"] if drawing.floor else []),
        f"--name={name_anew(studio, folder, _PREFIX)}",
        f"--out={studio.path_of(folder)}",
    ]


def _spell_size(drawing: Drawing) -> list[str]:
    """Write the rest of the options, width and height as one."""
    width, height = drawing.numbers.get("width"), drawing.numbers.get("height")
    plain = [word for word in drawing.spell_rest() if "_px=" not in word.partition(".")[2]]
    return [*plain, f"--size={width}x{height}"] if width and height else plain


async def show_command(request: Request) -> Response:
    """The command that the form stands for as it is, and what is wrong with it."""
    studio, drawing = studio_of(request), read_drawing(await read_form(request))
    faults = drawing.find_faults(studio)
    argv = write_command(studio, drawing)[1]
    return render(request, "parts/command.html", faults=faults, argv=argv)


async def start(request: Request) -> Response:
    """Put the drawing into the queue."""
    studio, drawing = studio_of(request), read_drawing(await read_form(request))
    if faults := drawing.find_faults(studio):
        return _render_form(request, drawing, faults, 422)
    folder, argv = write_command(studio, drawing)
    job = studio.add_job("generate", argv, run=folder, device=drawing.device)
    return go_to(f"/draw/jobs/{job.id}")


def _find_made(studio: Studio, job: Job) -> str:
    """Give the address of what a job has drawn; empty as long as it is not there."""
    asked = job.asked
    if asked.kind in ("merge", "convert") and job.outcome == "done":
        return "/mix#files"
    run = next((one for one in studio.runs() if one.name == asked.run), None)
    name = read_option(asked.argv, "name")
    if run is None or job.outcome != "done":
        return ""
    if asked.kind == "grid":
        return (
            f"/mix?grid={run.id}.{name}" if name[:4] == "mix-" else f"/draw/grids/{run.id}/{name}"
        )
    return f"/draw/sets/{run.id}/{name}"


def show_job(request: Request) -> Response:
    """A drawing while it is drawn; then what came of it."""
    studio = studio_of(request)
    job = studio.jobs.find(request.path_params["job"])
    if job is None:
        return not_found()
    made = _find_made(studio, job)
    return go_to(made) if made else render(request, "drawing.html", job=job, kind=job.asked.kind)


def show_job_state(request: Request) -> Response:
    """How far a drawing is, for a page that is open; the page goes on when it is done."""
    studio = studio_of(request)
    job = studio.jobs.find(request.path_params["job"])
    if job is None:
        return not_found()
    answer = render(request, "parts/drawing_state.html", job=job)
    if made := _find_made(studio, job):
        answer.headers["HX-Redirect"] = made
    return answer


def _find_set(request: Request) -> tuple[Run, str, ImageSet] | None:
    run = studio_of(request).find_run(request.path_params["run"])
    name = request.path_params["set"]
    images = run.read_set(name) if run else None
    return (run, name, images) if run and images else None


def show_set(request: Request) -> Response:
    """An image set by prompt and seed, with the base model's pictures beside."""
    found = _find_set(request)
    if found is None:
        return not_found()
    which = request.query_params.get("which", FILTERS[0])
    which = which if which in FILTERS else FILTERS[0]
    return render(request, "gallery.html", **_tell_set(request, *found, which))


def _tell_set(
    request: Request, run: Run, name: str, images: ImageSet, which: str
) -> dict[str, Any]:
    base = run.read_set(name + _BASE)
    marks = read_marks(studio_of(request).own / "kept", run, name)
    names = [name_file(run, name, n, one) for n, one in enumerate(images.pictures)]
    return {
        "run": run,
        "name": name,
        "base_name": name + _BASE,
        "images": images,
        "which": which,
        "filters": FILTERS,
        "gallery": lay_out(images, base, marks, which),
        "names": names,
    }


async def mark_picture(request: Request) -> Response:
    """Keep a picture, hide it, or neither."""
    found = _find_set(request)
    number = request.path_params["number"]
    if found is None or number >= len(found[2].pictures):
        return not_found()
    run, name, images = found
    mark = (await read_form(request)).get("mark", "")
    if mark not in MARKS:
        return refuse("", 422)
    write_mark(studio_of(request).own / "kept", run, name, images.pictures[number].file, mark)
    if "hx-request" not in request.headers:
        return go_to(f"/draw/sets/{run.id}/{name}")
    told = _tell_set(request, run, name, images, HIDDEN if mark == HIDDEN else FILTERS[0])
    rows = (row for _, _, row in told["gallery"].rows)
    shown = next(one for row in rows for one in row.values() if one.number == number)
    return render(request, "parts/picture.html", shown=shown, **told)


def download_picture(request: Request) -> Response:
    """A picture, to keep."""
    found = _find_set(request)
    number = request.path_params["number"]
    paths = found[2].paths() if found else []
    if found is None or number >= len(paths) or not paths[number].is_file():
        return not_found()
    run, name, images = found
    file = name_file(run, name, number, images.pictures[number])
    return FileResponse(paths[number], filename=file, media_type="image/png")


def download_kept(request: Request) -> Response:
    """All pictures of a set that were kept, in one file."""
    found = _find_set(request)
    if found is None:
        return not_found()
    run, name, images = found
    marks = read_marks(studio_of(request).own / "kept", run, name)
    wanted = [
        (name_file(run, name, number, picture), images.paths()[number])
        for number, picture in enumerate(images.pictures)
        if marks.get(picture.file) == KEPT
    ]
    if not wanted:
        return not_found()
    headers = {"Content-Disposition": f'attachment; filename="{name_zip(run, name)}"'}
    return StreamingResponse(zip_files(wanted), media_type="application/zip", headers=headers)


ROUTES = [
    Route("/draw", show_form),
    Route("/draw", start, methods=["POST"]),
    Route("/draw/command", show_command, methods=["POST"]),
    Route("/draw/jobs/{job}", show_job),
    Route("/draw/jobs/{job}/state", show_job_state),
    Route("/draw/sets/{run}/{set}", show_set),
    Route("/draw/sets/{run}/{set}/kept.zip", download_kept),
    Route("/draw/sets/{run}/{set}/{number:int}", download_picture),
    Route("/draw/sets/{run}/{set}/{number:int}/mark", mark_picture, methods=["POST"]),
    *page_grid.ROUTES,
]
