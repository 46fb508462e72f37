"""What every page has at hand: the folders, the words, the templates, and short answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.run_folder import write_json
from dreamloom.studio.guard import Guard
from dreamloom.studio.jobs import Job, JobFolder, describe_argv, read_json
from dreamloom.studio.photo_sets import PhotoSets
from dreamloom.studio.runner import start_runner
from dreamloom.studio.runs import Run, find_run, list_runs
from dreamloom.studio.words import count, say

FOLDER = ".studio"
"""Where the studio keeps its own, below the root."""

_ANSWER_SECONDS = 120
WRONG_PASSWORD_SECONDS = 1.0
_MOST_TRYING = 10


@dataclass
class Studio:
    """A studio over one root.

    Args:
        root: Where all runs lie.
        place: Where commands are run from.
        guard: What stands before its app.
        is_closing: Says whether the server is about to end; what follows something stops then.
    """

    root: Path
    place: Path
    guard: Guard | None = None
    is_closing: Callable[[], bool] = lambda: False
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _answering: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    _entering: asyncio.Lock = field(default_factory=asyncio.Lock)
    _trying: int = 0

    @property
    def own(self) -> Path:
        """The studio's own folder."""
        return self.root / FOLDER

    @property
    def jobs(self) -> JobFolder:
        """All jobs."""
        return JobFolder(self.own / "jobs")

    @property
    def photo_sets(self) -> PhotoSets:
        """All sets of photos."""
        return PhotoSets(self.own / "photos")

    def runs(self) -> list[Run]:
        """All runs, the one that changed last first."""
        return list_runs(self.root)

    def find_run(self, run_id: str) -> Run | None:
        """Find a run by what addresses call it."""
        return find_run(self.root, run_id)

    def new_run_folder(self, wanted: str) -> str:
        """Give the name of a run's folder that is not there yet, like the one that is wanted."""
        plain = "".join(c if c.isalnum() and c.isascii() else "-" for c in wanted.lower())
        plain = "-".join(part for part in plain.split("-") if part)[:40] or "run"
        name, number = plain, 1
        taken = {job.asked.run for job in self.jobs}
        while (self.root / name).exists() or name in taken:
            number += 1
            name = f"{plain}-{number}"
        return name

    def path_of(self, run: str) -> str:
        """Write a run's folder as a command is told it."""
        path = os.path.relpath(self.root / run, self.place)
        # A name that begins like an option would be read as one.
        return path if not path.startswith("-") else f"./{path}"

    def add_job(self, kind: str, argv: Sequence[str], **more: Any) -> Job:
        """Put a job into the queue, and see to it that somebody works that off."""
        job = self.jobs.add(kind, argv, **more)
        self.wake_runner()
        return job

    def wake_runner(self) -> None:
        """Start a runner where there is something to do."""
        if self.jobs.waiting() or self.jobs.running():
            self.own.mkdir(parents=True, exist_ok=True)
            start_runner(self.own, self.place)

    def job_of(self, run: Run) -> Job | None:
        """Find the job that works on a run now, or waits to; the running one first."""
        jobs = [*self.jobs.running(), *self.jobs.waiting()]
        return next((job for job in jobs if job.asked.run == run.name), None)

    async def may_enter(self, password: str) -> bool:
        """Say whether a password lets one in; each wrong one costs a second, one after the other.

        Raises:
            DreamLoomError: If too many try at once.
        """
        if self._trying >= _MOST_TRYING:
            raise DreamLoomError(say("login.many"))
        self._trying += 1
        try:
            async with self._entering:
                is_right = self.guard is not None and self.guard.is_right(password)
                if not is_right:
                    await asyncio.sleep(WRONG_PASSWORD_SECONDS)
                return is_right
        finally:
            self._trying -= 1

    async def ask(
        self, argv: Sequence[str], because: str = "", instead: str = ""
    ) -> tuple[Any, str]:
        """Ask a command that answers in seconds and changes nothing; its answer is kept.

        Args:
            argv: What ``dreamloom`` is told; its answer is JSON.
            because: What else the answer depends on, such as when a file was written.
            instead: What it is the latest of: an earlier question of that name that is still
                being answered is dropped, for nobody waits for its answer.

        Returns:
            The answer, and what the command said where there is none.
        """
        key = hashlib.sha256(json.dumps([*argv, because]).encode()).hexdigest()[:24]
        file = self.own / "answers" / f"{key}.json"
        if (known := read_json(file)) is not None:
            return known, ""
        if instead and (earlier := self._answering.get(instead)) is not None:
            with suppress(ProcessLookupError):
                earlier.kill()
        async with self._asking:  # one at a time: each may load a model's libraries
            if (known := read_json(file)) is not None:
                return known, ""
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dreamloom", *argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self.place,
            )
            self._answering[instead] = child
            try:
                out, said = await asyncio.wait_for(child.communicate(), _ANSWER_SECONDS)
            except TimeoutError:
                return None, say("ask.too_slow", command=describe_argv(argv))
            finally:
                self._answering.pop(instead, None)
                with suppress(ProcessLookupError):
                    child.kill()
        try:
            answer = json.loads(out)
        except ValueError:
            lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
            return None, "\n".join(lines[-4:])
        write_json(file, answer)
        return answer, ""


def studio_of(request: Request) -> Studio:
    """The studio that a request is made to."""
    studio: Studio = request.app.state.studio
    return studio


def _make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dreamloom.studio", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"say": say, "count": count, "describe_argv": describe_argv}
    environment.filters |= {"ago": tell_ago, "bytes": tell_bytes, "seconds": tell_seconds}
    return environment


def tell_ago(moment: float) -> str:
    """Say how long ago something was."""
    return say("time.ago", time=tell_seconds(max(0.0, time.time() - moment)))


def tell_seconds(seconds: float) -> str:
    """Write a span of time with one or two units."""
    whole = round(seconds)
    for size, unit, below in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if whole >= size:
            smaller = {"h": 3600, "min": 60, "s": 1}[below]
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {below}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def tell_bytes(size: float) -> str:
    """Write a number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


_ENVIRONMENT = _make_environment()


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Make a page."""
    studio = studio_of(request)
    page = _ENVIRONMENT.get_template(template).render(
        request=request, path=request.url.path, running=studio.jobs.running(), **values
    )
    # A folder's name may hold bytes that are no text.
    return HTMLResponse(page.encode("utf-8", "replace"), status)


def go_to(path: str) -> RedirectResponse:
    """Send the browser to another page."""
    return RedirectResponse(path, 303)


def not_found() -> Response:
    """Say that there is no such thing."""
    return PlainTextResponse(say("error.not_found"), 404)


def refuse(sentence: str, status: int = 400) -> Response:
    """Refuse something, with the reason in one sentence."""
    return PlainTextResponse(sentence.encode("utf-8", "replace"), status)


MOST_FORM_BYTES = 2**20
_MOST_FIELDS = 500
_MOST_DRAINED_BYTES = 2**30


async def read_form(request: Request) -> dict[str, str]:
    """Read what a form sent (``application/x-www-form-urlencoded``); each name's last value.

    Raises:
        DreamLoomError: If it is too large, or no such form.
    """
    body = await read_body(request, MOST_FORM_BYTES)
    if body is None:
        raise DreamLoomError(say("error.form_large"))
    try:
        pairs = parse_qsl(
            body.decode("utf-8"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    except ValueError:
        raise DreamLoomError(say("error.form_unreadable")) from None
    # No setting, prompt or name holds a NUL, and no command can be told one.
    if any("\0" in text for pair in pairs for text in pair):
        raise DreamLoomError(say("error.form_unreadable"))
    return dict(pairs)


async def read_body(request: Request, most: int) -> bytes | None:
    """Read a request's body; None where it is larger than allowed, of which nothing is kept."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            # A browser hears the answer only once it was listened to.
            parts.clear()
            if size > _MOST_DRAINED_BYTES:
                break
        else:
            parts.append(part)
    return b"".join(parts) if size <= most else None
