"""The queue: what computes, what waits, what came of the rest; and what can be done with each."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.studio.context import go_to, not_found, read_form, render, studio_of
from dreamloom.studio.jobs import ENDS, Job


def _find(request: Request) -> Job | None:
    return studio_of(request).jobs.find(request.path_params["job"])


def queue(request: Request) -> Response:
    """All jobs."""
    return render(request, "jobs.html", **_list(request))


def queue_rows(request: Request) -> Response:
    """The same without the page around it, for a page that is open."""
    return render(request, "parts/jobs.html", **_list(request))


def _list(request: Request) -> dict[str, Any]:
    jobs = studio_of(request).jobs
    ended = [job for job in jobs if job.outcome in ENDS]
    runs = {run.name: run for run in studio_of(request).runs()}
    return {"waiting": jobs.waiting(), "ended": ended[::-1], "runs": runs, "now": time.time()}


def show(request: Request) -> Response:
    """One job: its command, what became of it, and what it said."""
    job = _find(request)
    if job is None:
        return not_found()
    runs = {run.name: run for run in studio_of(request).runs()}
    return render(request, "job.html", job=job, runs=runs, now=time.time())


def show_log(request: Request) -> Response:
    """What became of a job and what it said, for a page that is open."""
    job = _find(request)
    if job is None:
        return not_found()
    return render(request, "parts/job.html", job=job, now=time.time())


def cancel(request: Request) -> Response:
    """Ask a job to end."""
    job = _find(request)
    if job is None:
        return not_found()
    job.cancel()
    studio_of(request).wake_runner()
    return go_to(f"/jobs/{job.id}")


async def move(request: Request) -> Response:
    """Move a waiting job forward or back."""
    job = _find(request)
    if job is None:
        return not_found()
    by = -1 if (await read_form(request)).get("by") == "-1" else 1
    studio_of(request).jobs.move(job, by)
    return go_to("/jobs")


def again(request: Request) -> Response:
    """Ask for the same once more: a training goes on from its last checkpoint."""
    job = _find(request)
    if job is None:
        return not_found()
    asked = job.asked
    studio_of(request).add_job(asked.kind, asked.argv, run=asked.run, device=asked.device)
    return go_to("/jobs")


async def set_time(request: Request) -> Response:
    """Let a waiting job begin later, or now."""
    job = _find(request)
    if job is None:
        return not_found()
    minutes = float((await read_form(request)).get("minutes") or 0)
    if job.outcome == "queued" and 0 <= minutes <= 7 * 24 * 60:
        job.write_asked(job.asked.model_copy(update={"not_before": time.time() + 60 * minutes}))
    studio_of(request).wake_runner()
    return go_to("/jobs")


def forget(request: Request) -> Response:
    """Take a job that has ended off the list; its run stays."""
    job = _find(request)
    if job is None:
        return not_found()
    studio_of(request).jobs.forget(job)
    return go_to("/jobs")


ROUTES = [
    Route("/jobs", queue),
    Route("/jobs/rows", queue_rows),
    Route("/jobs/{job}", show),
    Route("/jobs/{job}/log", show_log),
    Route("/jobs/{job}/cancel", cancel, methods=["POST"]),
    Route("/jobs/{job}/move", move, methods=["POST"]),
    Route("/jobs/{job}/again", again, methods=["POST"]),
    Route("/jobs/{job}/later", set_time, methods=["POST"]),
    Route("/jobs/{job}/forget", forget, methods=["POST"]),
]
