"""The runner: a process of its own that works the queue off, whether or not a page is open.

``python -m dreamloom.studio.runner ROOT`` starts the next job when its device is free, watches
what runs, and ends when nothing waits. It outlives the server that started it; a new runner takes
over what an earlier one left running. It loads nothing heavy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from dreamloom.studio.jobs import (
    ENDS,
    Became,
    Job,
    JobFolder,
    is_alive,
    own_identity,
    share_device,
)

KILL_AFTER_SECONDS = 4.5
"""How long a job has to end by itself, with a checkpoint, once it is asked to."""

DREAMLOOM = (sys.executable, "-m", "dreamloom")

_TICK_SECONDS = 0.2
# A page that asks for several jobs asks for one after the other.
_LINGER_SECONDS = 1.0
_LOCK, _WORDS = "runner.lock", "runner.log"


@dataclass
class _Watched:
    """A job that runs.

    Args:
        job: The job.
        child: Its process, where this runner started it.
        asked_to_end: When it was asked to end, by the clock that never goes back.
    """

    job: Job
    child: subprocess.Popen[bytes] | None = None
    asked_to_end: float | None = None


class Runner:
    """Starts, watches and ends the jobs of one folder.

    Args:
        jobs: The jobs.
        place: Where commands are run: paths that users type are meant from there.
        program: What is told a job's words; another than ``dreamloom`` in tests alone.
    """

    def __init__(self, jobs: JobFolder, place: Path, program: Sequence[str] = DREAMLOOM) -> None:
        self.jobs = jobs
        self.place = place
        self._program = tuple(program)
        self._pid, self._began = own_identity()
        self._watched = [_Watched(job) for job in jobs if job.became.outcome == "running"]
        for one in self._watched:
            one.job.write_became(self._sign(one.job.became))

    def tick(self) -> bool:
        """Look at everything once.

        Returns:
            Whether anything runs or waits.
        """
        self._watched = [one for one in self._watched if not self._look_at(one)]
        waiting = False
        for job in self.jobs.waiting():
            waiting |= not self._decide(job)
        return bool(self._watched) or waiting

    def _look_at(self, watched: _Watched) -> bool:
        """Ask a running job to end where somebody wants it; say whether it has ended."""
        job, became = watched.job, watched.job.became
        code = watched.child.poll() if watched.child else None
        if code is None and is_alive(became.pid, became.pid_started):
            if job.is_cancelled:
                self._end(watched, became.pid)
            return False
        if code is None and watched.child:
            code = watched.child.wait()
        outcome = "vanished" if code is None else "done" if code == 0 else "failed"
        if job.is_cancelled and outcome != "done":
            outcome = "cancelled"
        ended = {"outcome": outcome, "exit_code": code, "ended_at": time.time()}
        with suppress(FileNotFoundError):  # the job may have been removed
            job.write_became(became.model_copy(update=ended))
        return True

    def _end(self, watched: _Watched, pid: int) -> None:
        now = time.monotonic()
        if watched.asked_to_end is None:
            watched.asked_to_end = now
            _interrupt(pid)
        elif now - watched.asked_to_end > KILL_AFTER_SECONDS:
            _kill_all(pid)

    def _decide(self, job: Job) -> bool:
        """Start a waiting job if it may; say whether it waits no longer."""
        asked = job.asked
        if job.is_cancelled:
            job.write_became(Became(outcome="cancelled", ended_at=time.time()))
            return True
        if asked.after:
            before = self.jobs.find(asked.after)
            # As a runner wrote it: one that ends just now is not written down yet.
            outcome = before.became.outcome if before else "done"
            if outcome in ENDS and outcome != "done":
                job.write_became(Became(outcome="skipped", ended_at=time.time()))
                return True
            if outcome != "done":
                return False
        busy = any(share_device(one.job.asked.device, asked.device) for one in self._watched)
        if busy or time.time() < asked.not_before:
            return False
        self._start(job)
        return True

    def _start(self, job: Job) -> None:
        argv = [*self._program, *job.asked.argv]
        _let_jobs_hear_ctrl_c()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with job.log_file.open("ab") as log:
            try:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.place,
                    env=environment,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                # One job that no system can start must not hold up those behind it.
                log.write(f"{error}\n".encode("utf-8", "replace"))
                job.write_became(Became(outcome="failed", ended_at=time.time()))
                return
        try:
            began = psutil.Process(child.pid).create_time()
        except psutil.Error:
            began = time.time()
        state = Became(outcome="running", pid=child.pid, pid_started=began, started_at=time.time())
        job.write_became(self._sign(state))
        self._watched.append(_Watched(job, child))

    def _sign(self, became: Became) -> Became:
        """Say that this runner watches it."""
        own = {"runner_pid": self._pid, "runner_started": self._began}
        return became.model_copy(update=own)


def _let_jobs_hear_ctrl_c() -> None:
    """Listen for SIGINT where a shell told this process not to, as it does behind ``&``.

    What is ignored, the programs that are started ignore as well; what is listened for, they do
    not inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(pid: int) -> None:
    """Send what Ctrl-C sends, to the process alone: it ends its own children."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT if os.name == "posix" else signal.SIGTERM)


def _kill_all(pid: int) -> None:
    """Kill a process and what it has started."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.Error):
                one.kill()


def run_queue(studio: Path, place: Path, program: Sequence[str] = DREAMLOOM) -> bool:
    """Work the queue of a studio's folder off; return at once where another runner does.

    Args:
        studio: The studio's own folder.
        place: Where commands are run.
        program: What is told a job's words.

    Returns:
        Whether this was the runner.
    """
    try:
        with FileLock(studio / _LOCK, timeout=0):
            runner = Runner(JobFolder(studio / "jobs"), place, program)
            quiet_since = time.monotonic()
            while time.monotonic() - quiet_since < _LINGER_SECONDS:
                if runner.tick():
                    quiet_since = time.monotonic()
                time.sleep(_TICK_SECONDS)
    except Timeout:
        return False
    return True


def start_runner(studio: Path, place: Path) -> None:
    """Start a runner that outlives this process; where one is at work, it ends at once."""
    with (studio / _WORDS).open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "dreamloom.studio.runner", str(studio), str(place)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def main() -> None:
    """Work off the queue of the folder that the first argument names, from the second."""
    # A job that was asked for while another runner was about to end is seen by the second try.
    for _ in range(2):
        if run_queue(Path(sys.argv[1]), Path(sys.argv[2])):
            return
        time.sleep(2 * _LINGER_SECONDS)


if __name__ == "__main__":
    main()
