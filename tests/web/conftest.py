"""A studio that really runs, and a browser that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from dreamloom.studio.context import FOLDER
from dreamloom.studio.jobs import Job, JobFolder

# Another checkout may be the one that is installed; what is started is this one's.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    "PYTHONUNBUFFERED": "1",
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass
class RunningStudio:
    """A studio's server process.

    Args:
        root: Where its runs lie.
        port: Where it listens; the same after it was started again.
    """

    root: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None
    door: str = ""
    started_s: float = 0.0

    def start(self) -> None:
        """Start it, and wait until it says where it is."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "dreamloom", "studio", "--root", str(self.root)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.root.parent,
            env=ENVIRONMENT,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\S*", line)
        assert found, line
        self.started_s = time.perf_counter() - began
        self.door, self.port = found[0], int(found[1])

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def jobs(self) -> JobFolder:
        return JobFolder(self.root / FOLDER / "jobs")

    def kill(self) -> None:
        """End the server as a crash would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def memory_mb(self) -> float:
        assert self.process is not None
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def wait_for(self, what: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until something is the case, and give it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.2)
        told = "\n".join(f"{job.id} {job.outcome}: {job.last_line()}" for job in self.jobs)
        pytest.fail(f"not so after {seconds:g} s; jobs:\n{told}")

    def wait_until_idle(self, seconds: float) -> list[Job]:
        """Wait until nothing runs or waits; give the jobs."""
        # In this order: what begins between the two looks is seen by the second.
        self.wait_for(lambda: not self.jobs.waiting() and not self.jobs.running(), seconds)
        return list(self.jobs)


@dataclass
class Watch:
    """What a browser asked for and complained about."""

    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def on(self, page: Any) -> Any:
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note)
        return page

    def _note(self, line: Any) -> None:
        # What a page drops itself, because its form has changed or is left, htmx logs as an error;
        # that a server did not answer, it logs as htmx:sendError.
        dropped = ("htmx:afterRequest", "htmx:sendAbort")
        if line.type == "error" and not line.text.startswith(dropped):
            self.errors.append(line.text)


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[RunningStudio]:
    """An empty studio; what it started ends with it."""
    running = RunningStudio(tmp_path / "runs")
    running.start()
    yield running
    if running.process and running.process.poll() is None:
        running.kill()
    for job in running.jobs:
        job.cancel()
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in " ".join(process.info["cmdline"] or ()):
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra web: dreamloom[web]"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium was not found")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
