"""Progress in lines, for output that is no terminal: what is done, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dreamloom.core.events import AdapterSaved, Progress, RequestTaken

EVERY_S = 30.0
# What is quick is not worth a line, however much of the task it is.
_LEAST_S, _SHARE = 5.0, 0.1


@dataclass
class _Task:
    """A task's beginning: when, and how much was done before; and when it was last told of."""

    event: Progress
    began: float
    done_before: int
    told_done: int
    told: float


class ProgressLines:
    """Tells of a task after each tenth of it, or each half minute, whichever comes first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tasks: dict[tuple[str, str], _Task] = {}

    def tell(self, event: Progress) -> str | None:
        """Take note of progress; give a line if it is time for one."""
        now, key = self._clock(), (event.stage, event.task)
        task = self._tasks.get(key)
        if task is None:
            # A stage has one task at a time; other stages may run beside it.
            self.forget(event.stage)
            self._tasks[key] = _Task(event, now, event.done, event.done, now)
            return None
        task.event = event
        passed = now - task.told
        much = event.done - task.told_done >= _SHARE * event.total and passed >= _LEAST_S
        if event.done >= event.total or not (much or passed >= EVERY_S):
            return None
        return self._say(task, now)

    def remind(self) -> str | None:
        """Give a line if nothing was told for long, though nothing has come of it yet."""
        now = self._clock()
        late = [
            task
            for task in self._tasks.values()
            if now - task.told >= EVERY_S and task.event.done < task.event.total
        ]
        return self._say(late[0], now) if late else None

    def forget(self, stage: str) -> None:
        """A stage has begun or ended: what was told of it is over."""
        self._tasks = {key: task for key, task in self._tasks.items() if key[0] != stage}

    def _say(self, task: _Task, now: float) -> str:
        event = task.event
        task.told, task.told_done = now, event.done
        so_far = now - task.began
        rest = estimate_rest_s(event, task.done_before, so_far)
        left = "" if rest is None else f", about {say_seconds(rest)} left"
        return f"{say_progress(event)}; {say_seconds(so_far)}{left}"


def say_progress(event: Progress) -> str:
    """Say how much of a task is done, with the figures worth showing beside it."""
    values = "".join(f", {name} {value:.3g}" for name, value in event.values.items())
    return f"{event.task}: {event.done} of {event.total}{values}"


def say_request(event: RequestTaken | AdapterSaved) -> str:
    """Say what a running training was asked for, or wrote because of that."""
    when = f"after {event.update} updates"
    if isinstance(event, AdapterSaved):
        return f"{when}: the adapter as it is now is {event.file}"
    if event.kind == "prompts":
        return f"{when}: asked to draw from now on {', '.join(f'“{one}”' for one in event.prompts)}"
    return f"{when}: asked to {event.kind}"


def estimate_rest_s(event: Progress, done_before: int, so_far_s: float) -> float | None:
    """Estimate how long the rest of a task takes, in seconds; None where nothing tells."""
    fresh, rest = event.done - done_before, event.total - event.done
    return so_far_s / fresh * rest if fresh > 0 and rest > 0 else None


def say_seconds(seconds: float) -> str:
    """Say a time in two units at most: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
