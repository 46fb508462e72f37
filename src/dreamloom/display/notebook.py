"""Progress in a notebook: one cell's output that is written anew, without any widget library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from dreamloom.core import events
from dreamloom.core.events import Event, Observer
from dreamloom.display.progress_lines import (
    estimate_rest_s,
    say_progress,
    say_request,
    say_seconds,
)

# A notebook in a browser far away takes no more without falling behind.
_BETWEEN_S = 0.25


def find_notebook() -> Callable[..., Any] | None:
    """Give the function that shows something in this notebook; None outside of one."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    shell = get_ipython()
    # A shell on a terminal has no kernel, and shows progress as any terminal does.
    return display if getattr(shell, "kernel", None) is not None else None


@contextmanager
def watch_in_notebook(display: Callable[..., Any]) -> Iterator[Observer]:
    """Give an observer that shows stages and a bar in a notebook while the block runs.

    Args:
        display: From `find_notebook`.
    """
    board = _Board()
    handle = display(board, display_id=True)
    told = 0.0

    def observe(event: Event) -> None:
        nonlocal told
        board.observe(event)
        now = time.monotonic()
        if now - told >= _BETWEEN_S or not isinstance(event, events.Progress):
            told = now
            handle.update(board)

    try:
        yield observe
    finally:
        board.end()
        handle.update(board)


class _Board:
    """What the cell shows: a line for each stage, and a bar for what runs."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._task: events.Progress | None = None
        self._began, self._done_before = 0.0, 0

    def observe(self, event: Event) -> None:
        match event:
            case events.Progress():
                self._move(event)
            case events.StageStarted(stage, detail):
                self._add(f"<b>{escape(stage)}</b> {escape(detail)}")
            case events.StageSkipped(stage, detail):
                self._add(f"{escape(stage)}: {escape(detail)}")
            case events.StageDone(_, seconds, detail):
                self._add(f"&emsp;done in {say_seconds(seconds)} {escape(detail)}")
            case events.Note(_, text, warning):
                self._lines.append(f"&emsp;{'⚠ ' if warning else ''}{escape(text)}")
            case events.ValidationSampled(update, folder, scores):
                found = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
                where = escape(found or f"pictures in {folder}")
                self._lines.append(f"&emsp;after {update} updates: {where}")
            case events.RequestTaken() | events.AdapterSaved():
                self._lines.append(f"&emsp;{escape(say_request(event))}")
            case _:
                pass

    def end(self) -> None:
        """Take the bar away."""
        self._task = None

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._task = None

    def _move(self, event: events.Progress) -> None:
        before = self._task
        if before is None or (before.stage, before.task) != (event.stage, event.task):
            self._began, self._done_before = time.monotonic(), event.done
        self._task = event

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{line}</div>" for line in self._lines)
        return f'<div style="font-size:90%">{lines}{self._bar()}</div>'

    def _bar(self) -> str:
        task = self._task
        if task is None:
            return ""
        rest = estimate_rest_s(task, self._done_before, time.monotonic() - self._began)
        left = "" if rest is None else f", {say_seconds(rest)} left"
        said = f"{escape(say_progress(task))}{left}"
        bar = f'<progress value="{task.done}" max="{max(task.total, 1)}"></progress>'
        return f"<div>{bar} {said}</div>"
