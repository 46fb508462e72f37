"""Requests to a running training (sample, save, stop, prompts), as files in its run folder.

Any process may ask, on any system, and without loading torch; the training looks for requests after
each update and removes what it takes. What is asked while no training runs is refused, and what
was left behind is dropped when the next one begins.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import psutil

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError, DreamLoomError, RunFolderError, TrainingError
from dreamloom.core.run_folder import RunFolder, explain_write_errors, write_json
from dreamloom.core.toml_files import check_section, offer

RequestKind: TypeAlias = Literal["sample", "save", "stop", "prompts"]
"""What a training can be asked for: to draw validation samples, to write a checkpoint and the
adapter, to stop with a checkpoint, or to draw other prompts from now on."""

REQUEST_KINDS: tuple[str, ...] = get_args(RequestKind)

# Systems tell when a process began to a hundredth of a second, but may set their clock meanwhile.
_SAME_START_S = 2.0


@dataclass(frozen=True)
class Request:
    """One thing that was asked for.

    Args:
        kind: One of `REQUEST_KINDS`.
        prompts: The new prompts, as in ``validation.prompts``; none for the other kinds.
    """

    kind: str
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunningTraining:
    """The process that trains, as it says in ``training.json``.

    Args:
        pid: Its number.
        started_s: When it began, in seconds since 1970, for numbers are used again.
        host: The name of its machine.
    """

    pid: int
    started_s: float
    host: str


def ask(run: RunFolder | Path | str, kind: str, prompts: Sequence[str] = ()) -> Path:
    """Ask the training that runs in a folder for something.

    Args:
        run: The run's folder.
        kind: One of `REQUEST_KINDS`.
        prompts: For ``prompts``: what is drawn from the next validation samples on; ``{subject}``
            stands for the phrase.

    Returns:
        The request's file. It is gone once the training has taken it.

    Raises:
        ConfigError: If nothing of that kind can be asked, or a prompt is not allowed.
        RunFolderError: If there is no run, or its folder cannot be written to.
        TrainingError: If no training runs there.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(run)
    request = _check({"kind": kind, "prompts": prompts})
    if not run.is_run():
        raise RunFolderError(f"There is no run in {run.path}.", "Name the folder of a run.")
    _require_training(run)
    # By the time, so that they are taken in the order in which they were asked.
    path = run.requests / f"{time.time_ns():020}-{secrets.token_hex(4)}.json"
    with explain_write_errors(path):
        write_json(path, request)
    try:
        _require_training(run)  # it may have ended meanwhile
    except TrainingError:
        path.unlink(missing_ok=True)
        raise
    return path


def take_requests(run: RunFolder, warn: Callable[[str], None]) -> list[Request]:
    """Take what was asked since the last time, in order; each is taken once.

    Args:
        run: The run that is trained.
        warn: Told of each file that is no request; it is removed, too.
    """
    try:
        names = os.listdir(run.requests)
    except OSError:
        # Nobody has asked yet. A drive that cannot be reached for a moment is asked again.
        return []
    found = []
    for name in sorted(name for name in names if name.endswith(".json") and name[0] != "."):
        path = run.requests / name
        try:
            written = path.read_bytes()
            # What cannot be removed would be obeyed after each update.
            path.unlink()
        except OSError:
            continue
        try:
            found.append(_check(json.loads(written)))
        except DreamLoomError as error:
            warn(f"the request {name} is left out: {error.problem}")
        except (ValueError, RecursionError):
            warn(f"the request {name} is left out: it is not JSON")
    return found


@contextmanager
def announce_training(run: RunFolder, is_main: bool = True) -> Iterator[None]:
    """Say in ``training.json`` that this process trains, for the time of a block.

    Requests that are there before are dropped, and so are those that come too late.

    Args:
        run: The run that is trained.
        is_main: Whether this is the process that writes; the others say nothing.

    Raises:
        RunFolderError: If the folder cannot be written to.
    """
    if not is_main:
        yield
        return
    _drop_requests(run)
    known = RunningTraining(os.getpid(), psutil.Process().create_time(), platform.node())
    with explain_write_errors(run.training_file):
        write_json(run.training_file, known)
    try:
        yield
    finally:
        with suppress(OSError):
            run.training_file.unlink()
        _drop_requests(run)


def find_training(run: RunFolder) -> RunningTraining | None:
    """Find the process that trains in a run; None where none does, or it was killed.

    One on another machine is believed to go on, for it cannot be seen from here.
    """
    try:
        known = json.loads(run.training_file.read_text(encoding="utf-8"))
        found = RunningTraining(int(known["pid"]), float(known["started_s"]), str(known["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.host != platform.node() or _lives(found) else None


def _lives(training: RunningTraining) -> bool:
    try:
        process = psutil.Process(training.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() - training.started_s) < _SAME_START_S)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False


def _require_training(run: RunFolder) -> None:
    if find_training(run) is not None:
        return
    if run.adapter.is_file():
        raise TrainingError(
            f"No training runs in {run.path}, for it is finished.",
            f"The adapter is {run.adapter}; 'dreamloom generate' draws with it.",
        )
    raise TrainingError(
        f"No training runs in {run.path}, so nothing is asked.",
        "Start it first; one that was stopped goes on with the same command.",
    )


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """Check prompts of validation samples, whoever wrote them, as ``validation.prompts`` are.

    Raises:
        ConfigError: If there is none, or one is not allowed.
    """
    given = {"validation": {"prompts": prompts}}
    return check_section(LoomConfig, given).validation.prompts


def _check(given: Any) -> Request:
    """Read a request, whoever wrote it.

    Raises:
        ConfigError: If it asks for what cannot be asked.
    """
    kind, prompts = (
        (given.get("kind"), given.get("prompts", ())) if isinstance(given, dict) else (given, ())
    )
    if kind not in REQUEST_KINDS:
        raise ConfigError(
            f"A training cannot be asked for {kind!r}.", offer(str(kind), REQUEST_KINDS)
        )
    if kind == "prompts":
        return Request(kind, check_prompts(prompts))
    if prompts:
        raise ConfigError(
            f"Asked for {kind}, a training takes no prompts.", "Ask for prompts to change them."
        )
    return Request(kind)


def _drop_requests(run: RunFolder) -> None:
    """Remove all requests, and their folder."""
    with suppress(OSError):
        for path in run.requests.iterdir():
            path.unlink(missing_ok=True)
        run.requests.rmdir()
