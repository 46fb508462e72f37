"""Events as a terminal shows them: a bar for what runs, a line for what is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dreamloom.core import events
from dreamloom.core.events import Event, Observer, silent
from dreamloom.display.progress_lines import EVERY_S, ProgressLines, say_request


@contextmanager
def watch(quiet: bool = False) -> Iterator[Observer]:
    """Give an observer that draws progress on standard error while the block runs."""
    if quiet:
        yield silent
        return
    console = _Patient(stderr=True, highlight=False, emoji=False)
    if not console.is_terminal:
        with _telling_now_and_then(screen := _Screen(console, None)):
            yield screen.observe
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bars:
        yield _Screen(console, bars).observe


class _Patient(Console):
    """Work goes on when nobody reads of it any more."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Break lines for a terminal only: in a file, a path stays whole."""
        super().print(*objects, **{"soft_wrap": not self.is_terminal, **how})

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True


@contextmanager
def _telling_now_and_then(screen: _Screen) -> Iterator[None]:
    """Let a screen without bars tell of tasks that say nothing by themselves for long."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(EVERY_S / 3):
            screen.remind()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


class _Screen:
    """Keeps one bar per task, or tells of it in lines, and prints a line when a stage ends."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console = console
        self._bars = bars
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._lines = ProgressLines()

    def remind(self) -> None:
        """Tell of what is still going on, if nothing was told for long."""
        if text := self._lines.remind():
            self._say(text)

    def observe(self, event: Event) -> None:
        match event:
            case events.Progress():
                self._move(event)
            case events.StageStarted(stage, detail):
                self._lines.forget(stage)
                self._console.print(f"[bold]{_spoken(stage)}[/bold] {escape(detail)}")
            case events.StageSkipped(stage, detail):
                self._console.print(f"[dim]{_spoken(stage)}: {escape(detail)}[/dim]")
            case events.StageDone(stage, seconds, detail):
                self._clear(stage)
                self._console.print(f"  [green]done[/green] in {seconds:.1f} s  {escape(detail)}")
            case events.Note(_, text, warning):
                colour = "yellow" if warning else "dim"
                self._console.print(f"  [{colour}]{escape(text)}[/{colour}]")
            case events.Validated(update, loss, held_out):
                photos = "held-out photos" if held_out else "the photos, with fixed noise"
                self._say(f"after {update} updates: loss {loss:.4f} on {photos}")
            case events.ValidationSampled(update, folder, scores):
                found = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
                self._say(f"after {update} updates: {found or 'pictures'} in {folder}")
            case events.RequestTaken() | events.AdapterSaved():
                self._say(say_request(event))
            case _:
                pass

    def _say(self, text: str) -> None:
        self._console.print(f"  [dim]{escape(text)}[/dim]")

    def _move(self, event: events.Progress) -> None:
        if self._bars is None:
            if text := self._lines.tell(event):
                self._say(text)
            return
        key = (event.stage, event.task)
        values = "  ".join(f"{name} {value:.3g}" for name, value in event.values.items())
        if key not in self._tasks:
            self._clear(event.stage)
            self._tasks[key] = self._bars.add_task(event.task, total=event.total, values=values)
        self._bars.update(self._tasks[key], completed=event.done, total=event.total, values=values)

    def _clear(self, stage: str) -> None:
        self._lines.forget(stage)
        if self._bars is None:
            return
        for key in [key for key in self._tasks if key[0] == stage]:
            self._bars.remove_task(self._tasks.pop(key))


def _spoken(stage: str) -> str:
    """``generate-with_prior`` reads better as ``generate with_prior``."""
    return escape(stage.replace("-", " ", 1))
