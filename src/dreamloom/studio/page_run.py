"""A run: what goes on in it, how like the subject it has become, and what can be asked of it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.requests import ask as ask_training
from dreamloom.evaluation.looks import Look, recommend_look
from dreamloom.studio.context import Studio, go_to, not_found, read_form, refuse, render, studio_of
from dreamloom.studio.jobs import Job
from dreamloom.studio.live import follow_events
from dreamloom.studio.runs import Run, list_losses, read_events, tell_last
from dreamloom.studio.words import say

_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "font-src data:; frame-ancestors 'self'; sandbox allow-scripts"
)
"""A report is one page with everything in it. In a box of its own it can reach nothing."""

_TAIL_BYTES = 64 * 1024
_MOST_DIGITS = 15


def _find(request: Request) -> Run | None:
    return studio_of(request).find_run(request.path_params["run"])


def show(request: Request) -> Response:
    """A run's page."""
    run = _find(request)
    if run is None:
        return not_found()
    studio = studio_of(request)
    return render(request, "run.html", **_tell_live(studio, run), **_tell_drawn(run))


def show_live(request: Request) -> Response:
    """What changes while it runs: the bar, and what can be asked for."""
    run = _find(request)
    if run is None:
        return not_found()
    return render(request, "parts/run_live.html", **_tell_live(studio_of(request), run))


def show_looks(request: Request) -> Response:
    """What it drew on its way, with scores."""
    run = _find(request)
    if run is None:
        return not_found()
    return render(request, "parts/looks.html", run=run, **_tell_drawn(run))


def _tell_live(studio: Studio, run: Run) -> dict[str, Any]:
    """Tell what changes from second to second: no picture and no score is read for it."""
    file = run.files.events_file
    start = max(0, file.stat().st_size - _TAIL_BYTES) if file.is_file() else 0
    events, end = read_events(file, start)
    return {
        "run": run,
        "job": studio.job_of(run),
        "last_job": _last_job(studio, run),
        "happened": tell_last(events),
        "offset": end,
        "config": run.config,
        "answer": run.answer,
        "is_reported": run.files.report.is_file(),
    }


def _tell_drawn(run: Run) -> dict[str, Any]:
    """Tell what was drawn on the way, and the image sets."""
    looks = run.looks()
    return {
        "looks": looks,
        "best": recommend_look(looks),
        "prompts": _list_prompts(looks),
        "sets": {
            name: images
            for name in run.sets()
            if (images := run.read_set(name)) and images.purpose != "grid"
        },
    }


def _last_job(studio: Studio, run: Run) -> Job | None:
    """The last job of a run that has ended: why it stands still."""
    own = [job for job in studio.jobs if job.asked.run == run.name]
    return own[-1] if own else None


def _list_prompts(looks: list[Look]) -> list[tuple[str, list[tuple[int, list[int]]]]]:
    """List each prompt with the pictures that each look has of it, by their number."""
    table: dict[str, dict[int, list[int]]] = {}
    for look in looks:
        for number, picture in enumerate(look.images.pictures if look.images else ()):
            table.setdefault(picture.prompt, {}).setdefault(look.update, []).append(number)
    return [(prompt, sorted(by_update.items())) for prompt, by_update in table.items()]


async def stream(request: Request) -> Response:
    """Its events, from a byte on, as they happen."""
    run = _find(request)
    if run is None:
        return not_found()
    studio = studio_of(request)
    told = request.headers.get("last-event-id") or request.query_params.get("from", "0")
    start = int(told) if told.isdecimal() and len(told) <= _MOST_DIGITS else 0

    def state() -> str:
        job = studio.job_of(run)
        return f"{job.id} {job.outcome}" if job else ""

    return StreamingResponse(
        follow_events(run.files.events_file, start, state, studio.is_closing),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def curve(request: Request) -> Response:
    """The losses so far, and the byte from which the stream goes on."""
    run = _find(request)
    if run is None:
        return not_found()
    events, end = read_events(run.files.events_file)
    return JSONResponse({"losses": list_losses(events), "offset": end})


def look_picture(request: Request) -> Response:
    """A picture that was drawn on the way."""
    run = _find(request)
    if run is None:
        return not_found()
    looks = {look.update: look.images for look in run.looks()}
    images = looks.get(request.path_params["update"])
    paths = images.paths() if images else []
    number = request.path_params["number"]
    return FileResponse(paths[number]) if number < len(paths) else not_found()


def set_picture(request: Request) -> Response:
    """A picture of an image set."""
    run = _find(request)
    images = run.read_set(request.path_params["set"]) if run else None
    paths = images.paths() if images else []
    number = request.path_params["number"]
    if number >= len(paths) or not paths[number].is_file():
        return not_found()
    return FileResponse(paths[number])


def report(request: Request) -> Response:
    """Its report, in a box of its own."""
    run = _find(request)
    if run is None or not run.files.report.is_file():
        return not_found()
    headers = {"Content-Security-Policy": _REPORT_POLICY}
    return HTMLResponse(run.files.report.read_bytes(), headers=headers)


def adapter(request: Request) -> Response:
    """Its adapter, to keep."""
    run = _find(request)
    if run is None or not run.is_trained:
        return not_found()
    name = run.name.replace("/", "-") + ".safetensors"
    return FileResponse(run.files.adapter, filename=name, media_type="application/octet-stream")


async def ask(request: Request) -> Response:
    """Ask a running training for something: draw now, save now, other prompts."""
    run = _find(request)
    if run is None:
        return not_found()
    form = await read_form(request)
    wanted = form.get("what", "")
    prompts = [line.strip() for line in form.get("prompts", "").splitlines() if line.strip()]
    try:
        ask_training(run.files, wanted, prompts)
    except DreamLoomError as error:
        return refuse(str(error), 409)
    return Response(say("run.asked"), 202)


async def resume(request: Request) -> Response:
    """Go on with a run that was stopped."""
    run = _find(request)
    if run is None:
        return not_found()
    studio = studio_of(request)
    if studio.job_of(run) is None:
        begun = [
            job.id
            for job in studio.jobs
            if job.asked.run == run.name and job.asked.kind in ("train", "study")
        ]
        if not begun:
            # Only its own command knows which photos it was taught from.
            return refuse(say("run.cannot_resume"), 409)
        _ask_again(studio, begun[-1])
    return go_to(f"/runs/{run.id}")


def _ask_again(studio: Studio, job_id: str) -> None:
    """Ask again for a job, and for those that were to follow it."""
    jobs = {job.id: job.asked for job in studio.jobs}
    following = {asked.after: asked for asked in jobs.values() if asked.after}
    asked, after = jobs[job_id], ""
    while True:
        job = studio.add_job(
            asked.kind, asked.argv, run=asked.run, device=asked.device, after=after
        )
        if asked.id not in following:
            return
        after, asked = job.id, following[asked.id]


ROUTES = [
    Route("/runs/{run}", show),
    Route("/runs/{run}/live", show_live),
    Route("/runs/{run}/looks", show_looks),
    Route("/runs/{run}/events", stream),
    Route("/runs/{run}/curve", curve),
    Route("/runs/{run}/looks/{update:int}/{number:int}", look_picture),
    Route("/runs/{run}/sets/{set}/{number:int}", set_picture),
    Route("/runs/{run}/report", report),
    Route("/runs/{run}/adapter", adapter),
    Route("/runs/{run}/ask", ask, methods=["POST"]),
    Route("/runs/{run}/resume", resume, methods=["POST"]),
]
