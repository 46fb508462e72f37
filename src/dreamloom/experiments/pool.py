"""Worker pools: this process, several beside each other, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, ParamSpec, TypeVar

from dreamloom.core.device import prepare_threads
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import (
    Event,
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
)
from dreamloom.core.toml_files import offer

PLACES = ("here", "ray")
_P = ParamSpec("_P")
_Name = TypeVar("_Name")
_Done = TypeVar("_Done")

_TOLD = (Note, Progress, StageDone, StageSkipped, StageStarted)
_LISTEN_S = 0.5
# In a process of a pool, the queue that it tells on.
_told: list[Any] = []


@dataclass(frozen=True)
class Crew:
    """Does pieces of work; without an executor, one after the other in this process.

    Args:
        executor: Processes that work.
        events: What these processes tell, in the order in which they do.
    """

    executor: Executor | None = None
    events: Any = None

    def do_all(
        self,
        work: Callable[..., _Done],
        items: Mapping[_Name, object],
        observe: Observer,
        task: str,
        stage: str = "study",
        is_told: bool = False,
    ) -> dict[_Name, _Done]:
        """Do one thing to every item, and give the results by the items' names.

        Args:
            work: Called with an item, and here in this process with the observer as well.
            items: What is worked on.
            observe: Told how many are done.
            task: What is done, for the observer.
            stage: Of what, for the observer.
            is_told: Whether it is also told what happens in other processes, by items' names.
        """
        done: dict[_Name, _Done] = {}
        observe(Progress(stage, task, 0, len(items)))
        if self.executor is None:
            for name, item in items.items():
                done[name] = work(item, observe)
                observe(Progress(stage, task, len(done), len(items)))
            return done
        is_told = is_told and self.events is not None
        futures: dict[Future[_Done], _Name] = {}
        for name, item in items.items():
            more = (_Teller(str(name)),) if is_told else ()
            futures[self.executor.submit(work, item, *more)] = name
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, _LISTEN_S, FIRST_COMPLETED)
            if is_told:
                self._listen(observe)
            for future in ended:
                done[futures[future]] = future.result()
                observe(Progress(stage, task, len(done), len(items)))
        return {name: done[name] for name in items}

    def _listen(self, observe: Observer) -> None:
        """Pass on what was told since."""
        while not self.events.empty():
            observe(self.events.get())


@dataclass(frozen=True)
class _Teller:
    """Tells, in a process of a pool, what happens to one piece of work."""

    name: str

    def __call__(self, event: Event) -> None:
        if not isinstance(event, _TOLD):
            return
        if self.name not in event.stage:
            event = replace(event, stage=f"{event.stage}-{self.name}")
        if isinstance(event, Progress):
            event = replace(event, task=f"{self.name}: {event.task}")
        _told[0].put(event)


@contextmanager
def open_crew(workers: int, on: str = "here", threads: int = 1) -> Iterator[Crew]:
    """Give those who work; when the block fails or is stopped, they end at once.

    Args:
        workers: How many processes; 1 works in this process.
        threads: Of each of several.
        on: ``here``, or ``ray``: so many tasks at a time on the cluster that Ray finds, or on a
            new one on this machine. Its machines must share the study's folder.

    Raises:
        ConfigError: If Ray is asked for and not installed, or the name is unknown.
    """
    if on not in PLACES:
        raise ConfigError(f"--on {on} is no place to work.", offer(on, PLACES))
    # A queue with a thread of its own would tell the last things after the work is known as done.
    events = SpawnContext().SimpleQueue() if workers > 1 and on == "here" else None
    place: AbstractContextManager[Executor | None] = nullcontext()
    if on == "ray":
        place = _open_ray(workers)
    elif workers > 1:
        place = open_pool(workers, threads, events)
    with place as executor:
        yield Crew(executor, events)


class _OwnProcesses(SpawnContext):
    """Starts processes anew, and knows which it started."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        """Make one, as a pool asks for it."""
        self.started.append(SpawnProcess(*args, **kwargs))
        return self.started[-1]


@contextmanager
def open_pool(processes: int, threads: int = 1, events: Any = None) -> Iterator[Executor]:
    """Give processes of some threads; if the block fails, they end at once, and no others.

    Args:
        processes: How many.
        threads: Of each.
        events: A queue that they tell on.
    """
    own = _OwnProcesses()
    pool = ProcessPoolExecutor(
        processes, mp_context=own, initializer=_prepare, initargs=(threads, events)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        # A stopped training keeps a checkpoint, but its process would begin what is queued next.
        while working := [one for one in own.started if one.pid and one.is_alive()]:
            for process in working:
                process.terminate()
                process.join(1.0)
        raise
    pool.shutdown()


def _prepare(threads: int, events: Any) -> None:
    """Make a process of a pool ready."""
    prepare_threads(threads)
    _told[:] = [events]


@contextmanager
def _open_ray(workers: int) -> Iterator[Executor]:
    try:
        ray = import_module("ray")
    except ImportError:
        raise ConfigError(
            "--on ray needs Ray, which is not installed.",
            'Run pip install "dreamloom[cluster]", or leave out --on.',
        ) from None
    started = not ray.is_initialized()
    if started:
        # A cluster that was there before knows its own size.
        size = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(log_to_driver=False, **size)
    executor = _RayExecutor(ray)
    try:
        yield executor
    except BaseException:
        executor.cancel()
        raise
    finally:
        if started:
            ray.shutdown()


class _RayExecutor(Executor):
    """Hands each piece of work to a Ray task of one processor, and of one GPU if there are any."""

    def __init__(self, ray: Any) -> None:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        self._ray = ray
        self._options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}
        self._tasks: list[Any] = []

    def submit(
        self, fn: Callable[_P, _Done], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_Done]:
        """Begin one piece of work as soon as the cluster has room for it."""
        task = self._ray.remote(**self._options)(_call).remote(fn, *args, **kwargs)
        self._tasks.append(task)
        future: Future[_Done] = task.future()
        return future

    def cancel(self) -> None:
        """Stop whatever works or waits."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)


def _call(fn: Callable[_P, _Done], *args: _P.args, **kwargs: _P.kwargs) -> _Done:
    """Call something callable: Ray itself takes plain functions only."""
    return fn(*args, **kwargs)
