"""Worker pools for a study: this process, several of one thread each, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, ParamSpec, TypeVar

from dreamloom.core.device import prepare_threads
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer, Progress
from dreamloom.core.toml_files import offer

PLACES = ("here", "ray")
_P = ParamSpec("_P")
_Name = TypeVar("_Name")
_Done = TypeVar("_Done")


@dataclass(frozen=True)
class Crew:
    """Does pieces of work; without an executor, one after the other in this process."""

    executor: Executor | None = None

    def do_all(
        self,
        work: Callable[..., _Done],
        items: Mapping[_Name, object],
        observe: Observer,
        task: str,
    ) -> dict[_Name, _Done]:
        """Do one thing to every item, and give the results by the items' names.

        Args:
            work: Called with an item, and here in this process with the observer as well.
            items: What is worked on.
            observe: Told how many are done.
            task: What is done, for the observer.
        """
        done: dict[_Name, _Done] = {}
        observe(Progress("study", task, 0, len(items)))
        if self.executor is None:
            for name, item in items.items():
                done[name] = work(item, observe)
                observe(Progress("study", task, len(done), len(items)))
            return done
        futures = {self.executor.submit(work, item): name for name, item in items.items()}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            observe(Progress("study", task, len(done), len(items)))
        return done


@contextmanager
def open_crew(workers: int, on: str = "here") -> Iterator[Crew]:
    """Give those who work; when the block fails or is stopped, they end at once.

    Args:
        workers: Processes of one thread each; 1 works in this process.
        on: ``here``, or ``ray``: so many tasks at a time on the cluster that Ray finds, or on a
            new one on this machine. Its machines must share the study's folder.

    Raises:
        ConfigError: If Ray is asked for and not installed, or the name is unknown.
    """
    if on not in PLACES:
        raise ConfigError(f"--on {on} is no place to work.", offer(on, PLACES))
    place: AbstractContextManager[Executor | None] = nullcontext()
    if on == "ray":
        place = _open_ray(workers)
    elif workers > 1:
        place = open_pool(workers)
    with place as executor:
        yield Crew(executor)


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
def open_pool(processes: int) -> Iterator[Executor]:
    """Give processes of one thread each; if the block fails, they end at once, and no others."""
    own = _OwnProcesses()
    pool = ProcessPoolExecutor(
        processes, mp_context=own, initializer=prepare_threads, initargs=(1,)
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
