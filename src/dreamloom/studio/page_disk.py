"""Disk and device: what runs take, what is deleted and comes back, and what the machine has."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.requests import find_training
from dreamloom.core.run_folder import RunFolder
from dreamloom.studio.context import Studio, read_body, read_form, refuse, render, studio_of
from dreamloom.studio.device import look_at_device
from dreamloom.studio.disk import (
    Item,
    Usage,
    is_outermost,
    list_merged,
    measure_photos,
    measure_run,
    size_of,
)
from dreamloom.studio.runs import list_runs
from dreamloom.studio.trash import Trash
from dreamloom.studio.words import say

_PAGE = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Taken:
    """All that lies below the root.

    Args:
        runs: The runs, the largest first; those inside others belong to these.
        photos: The sets of photos.
        merged: Adapter files outside of runs.
        own_bytes: What the studio keeps beside photos and what was deleted.
    """

    runs: tuple[Usage, ...]
    photos: tuple[Item, ...]
    merged: tuple[Item, ...]
    own_bytes: int

    def items(self) -> Iterator[Item]:
        """Go through all that may be deleted."""
        for usage in self.runs:
            yield usage.whole
            yield from (part for part in usage.parts if part.can_go)
        yield from self.photos
        yield from self.merged

    @property
    def total_bytes(self) -> int:
        """How much all of it takes."""
        wholes = [usage.whole for usage in self.runs]
        return self.own_bytes + sum(one.size_bytes for one in (*wholes, *self.photos, *self.merged))


def _trash(studio: Studio) -> Trash:
    return Trash(studio.root, studio.own / "trash")


def _measure(studio: Studio) -> Taken:
    runs = studio.runs()
    usages = [measure_run(run) for run in runs if is_outermost(run, runs)]
    own = sum(size_of(studio.own / name) for name in ("jobs", "answers"))
    return Taken(
        runs=tuple(sorted(usages, key=lambda usage: -usage.whole.size_bytes)),
        photos=tuple(measure_photos(studio.root, one) for one in studio.photo_sets),
        merged=tuple(list_merged(studio.root, runs)),
        own_bytes=own,
    )


def show(request: Request) -> Response:
    """What takes room, and what the machine has; what was deleted long ago goes for good."""
    studio = studio_of(request)
    _trash(studio).empty()
    return _render(request, "disk.html", secrets.token_hex(8))


def _render(request: Request, template: str, page: str, done: str = "") -> Response:
    studio = studio_of(request)
    return render(
        request,
        template,
        root=studio.root.name,
        taken=_measure(studio),
        free=shutil.disk_usage(studio.root).free,
        deleted=list(_trash(studio)),
        page=page,
        done=done,
        # Whoever deletes by keyboard goes on at the button that brings it back.
        is_fresh=template.startswith("parts/"),
    )


async def delete(request: Request) -> Response:
    """Move something aside, and show what is left."""
    studio = studio_of(request)
    form = await read_form(request)
    wanted, page = form.get("item", ""), _read_page(form.get("page", ""))
    taken = await asyncio.to_thread(_measure, studio)
    item = next((one for one in taken.items() if one.id == wanted), None)
    if item is None:
        return refuse(say("disk.gone"), 404)
    if is_needed(studio, item):
        return refuse(say("disk.busy", name=item.name), 409)
    try:
        _trash(studio).put(item, page)
    except DreamLoomError as error:
        return refuse(str(error), 409)
    return await asyncio.to_thread(_render, request, "parts/disk.html", page)


async def undo(request: Request) -> Response:
    """Move something back."""
    studio = studio_of(request)
    form = await read_form(request)
    record = _trash(studio).find(form.get("deleted", ""))
    if record is None:
        return refuse(say("disk.gone"), 404)
    try:
        _trash(studio).bring_back(record)
    except DreamLoomError as error:
        return refuse(str(error), 409)
    page, done = _read_page(form.get("page", "")), say("disk.undone", name=record.name)
    return await asyncio.to_thread(_render, request, "parts/disk.html", page, done)


async def empty(request: Request) -> Response:
    """Remove for good what a page has deleted: it was left."""
    body = await read_body(request, 100)
    page = _read_page((body or b"").decode("ascii", "replace"))
    if page:
        await asyncio.to_thread(_trash(studio_of(request)).empty, page)
    return Response(status_code=204)


def _read_page(told: str) -> str:
    return told if _PAGE.fullmatch(told) else ""


def is_needed(studio: Studio, item: Item) -> bool:
    """Say whether a job that runs or waits works on something, or a training of any kind does."""
    words = [
        word
        for job in (*studio.jobs.running(), *studio.jobs.waiting())
        for word in (*job.asked.argv, studio.path_of(job.asked.run))
    ]
    for place in item.places:
        path = studio.path_of(place)
        if any(word == path or word.startswith((f"{path}/", f"{path}:")) for word in words):
            return True
    # A part of a run is needed by whatever works on the run.
    runs = [run for run in list_runs(studio.root, of_studies=True) if _touches(run.name, item)]
    return any(studio.job_of(run) or find_training(RunFolder(run.folder)) for run in runs)


def _touches(run: str, item: Item) -> bool:
    return any(
        place == run or place.startswith(f"{run}/") or run.startswith(f"{place}/")
        for place in item.places
    )


async def show_device(request: Request) -> Response:
    """What the machine has, for a page that is open."""
    device = await asyncio.to_thread(look_at_device, studio_of(request).root)
    return render(request, "parts/device.html", device=device)


ROUTES = [
    Route("/disk", show),
    Route("/disk/device", show_device),
    Route("/disk/delete", delete, methods=["POST"]),
    Route("/disk/undo", undo, methods=["POST"]),
    Route("/disk/empty", empty, methods=["POST"]),
]
