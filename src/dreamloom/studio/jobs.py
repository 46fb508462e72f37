"""Jobs: each is a folder that says what was asked for, what became of it, and what it said.

What was asked for (``job.json``) is the server's; what became of it (``state.json``) is the
runner's; so neither ever writes over the other. A wish to end a job is a file of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
from pydantic import Field, ValidationError

from dreamloom.core.run_folder import write_text
from dreamloom.core.toml_files import ClosedModel

Outcome = Literal["queued", "running", "done", "failed", "cancelled", "skipped", "vanished"]
"""What a job is: the last five are ends. Skipped is one that waited for another, which failed;
vanished one that ended without a word: its process is gone, and nobody saw how it ended."""

ENDS = ("done", "failed", "cancelled", "skipped", "vanished")

_ASKED, _STATE, _CANCEL, _LOG = "job.json", "state.json", "cancel", "log.txt"
_TAIL_BYTES = 64_000


class Asked(ClosedModel):
    """What was asked for."""

    id: str
    kind: str
    """What it is for, by the command's name: train, generate, evaluate."""
    argv: tuple[str, ...]
    """What ``dreamloom`` is told."""
    run: str = ""
    """The run's folder, below the root; empty where there is none."""
    device: str = "auto"
    """Where it computes; jobs of one device take turns, and auto may be any of them."""
    after: str = ""
    """The job that has to be done before this one starts; empty for none."""
    not_before: float = 0.0
    """When it may start at the earliest, in seconds since 1970."""
    place: float = 0.0
    """Where it stands in the queue: the lowest is next."""
    asked_at: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds")
    )


class Became(ClosedModel):
    """What became of it."""

    outcome: Outcome = "queued"
    pid: int = 0
    pid_started: float = 0.0
    """When the process began, by the system: another process may get its number later."""
    runner_pid: int = 0
    """The runner that watches it, by its number and when it began."""
    runner_started: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    exit_code: int | None = None


class Job:
    """One job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.log_file = folder / _LOG
        """What it said, on both channels."""

    def __repr__(self) -> str:
        return f"Job({str(self.folder)!r})"

    @property
    def asked(self) -> Asked:
        """What was asked for.

        Raises:
            FileNotFoundError: If the job is gone.
        """
        return Asked.model_validate_json((self.folder / _ASKED).read_text(encoding="utf-8"))

    @property
    def became(self) -> Became:
        """What became of it, as the runner wrote it; a live process is not looked for."""
        with suppress(FileNotFoundError, ValidationError):
            return Became.model_validate_json((self.folder / _STATE).read_text(encoding="utf-8"))
        return Became()

    @property
    def outcome(self) -> Outcome:
        """What it is now: one whose process is gone, and whose runner did not see it, vanished."""
        became = self.became
        if became.outcome != "running" or is_alive(became.pid, became.pid_started):
            return became.outcome
        if is_alive(became.runner_pid, became.runner_started):
            return "running"  # its runner is about to write how it ended
        became = self.became
        return "vanished" if became.outcome == "running" else became.outcome

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody wants it to end."""
        return (self.folder / _CANCEL).is_file()

    def write_asked(self, asked: Asked) -> None:
        """Write what is asked for."""
        write_text(self.folder / _ASKED, asked.model_dump_json(indent=2) + "\n")

    def write_became(self, became: Became) -> None:
        """Write what became of it."""
        write_text(self.folder / _STATE, became.model_dump_json(indent=2) + "\n")

    def cancel(self) -> None:
        """Ask the runner to end it, or not to start it."""
        (self.folder / _CANCEL).touch()

    def read_log(self) -> str:
        """Read the end of what it said, at most 64 kB, as a terminal would show it."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        # A bar that is written anew on its line leaves only its last form.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))

    def last_line(self) -> str:
        """Give the last line that says something; empty where there is none."""
        lines = [line.strip() for line in self.read_log().splitlines() if line.strip()]
        return lines[-1] if lines else ""


class JobFolder:
    """All jobs of a root."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Job]:
        """Go through all jobs, in the order in which they were asked for."""
        for file in sorted(self.path.glob(f"*/{_ASKED}")):
            yield Job(file.parent)

    def find(self, job_id: str) -> Job | None:
        """Find a job by its name; None where there is none."""
        return next((job for job in self if job.id == job_id), None)

    def add(
        self,
        kind: str,
        argv: Sequence[str],
        *,
        run: str = "",
        device: str = "auto",
        after: str = "",
        not_before: float = 0.0,
    ) -> Job:
        """Put a job at the end of the queue."""
        places = [job.asked.place for job in self.waiting()]
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        name = f"{stamp}-{secrets.token_hex(2)}"
        job = Job(self.path / name)
        asked = Asked(
            id=name,
            kind=kind,
            argv=tuple(argv),
            run=run,
            device=device,
            after=after,
            not_before=not_before,
            place=max(places, default=0.0) + 1,
        )
        job.write_asked(asked)
        return job

    def waiting(self) -> list[Job]:
        """List the queue, the next one first."""
        queued = [job for job in self if job.outcome == "queued"]
        return sorted(queued, key=lambda job: (job.asked.place, job.id))

    def running(self) -> list[Job]:
        """List what computes now."""
        return [job for job in self if job.outcome == "running"]

    def move(self, job: Job, by: int) -> None:
        """Let a waiting job change places with the one before it (-1) or behind it (+1)."""
        queue = self.waiting()
        ids = [one.id for one in queue]
        if job.id not in ids:
            return
        place = ids.index(job.id)
        other = place + by
        if not 0 <= other < len(queue):
            return
        mine, theirs = job.asked, queue[other].asked
        job.write_asked(mine.model_copy(update={"place": theirs.place}))
        queue[other].write_asked(theirs.model_copy(update={"place": mine.place}))

    def forget(self, job: Job) -> bool:
        """Remove the folder of a job that has ended; False where it has not."""
        if job.outcome not in ENDS:
            return False
        shutil.rmtree(job.folder, ignore_errors=True)
        return True


def is_alive(pid: int, started: float) -> bool:
    """Say whether a process is there, and is the one that began at that time."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError):
        return False


def share_device(one: str, other: str) -> bool:
    """Say whether two jobs may want the same device."""
    return one == other or "auto" in (one, other)


def describe_argv(argv: Sequence[str]) -> str:
    """Write a job's command as one would type it."""
    return shlex.join(["dreamloom", *argv])


def read_json(path: Path) -> object:
    """Read a JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def own_identity() -> tuple[int, float]:
    """Give this process's number and when it began."""
    return os.getpid(), psutil.Process().create_time()
