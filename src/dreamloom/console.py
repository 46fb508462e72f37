"""Events as a terminal shows them: a bar for what runs, a line for what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dreamloom import events
from dreamloom.events import Event, Observer, silent


@contextmanager
def watch(quiet: bool = False) -> Iterator[Observer]:
    """Give an observer that draws progress on standard error while the block runs."""
    if quiet:
        yield silent
        return
    console = Console(stderr=True, highlight=False)
    with Progress(
        TextColumn("{task.description}"),
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


class _Screen:
    """Keeps one bar per task and prints a line when a stage ends."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console = console
        self._bars = bars
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def observe(self, event: Event) -> None:
        match event:
            case events.Progress():
                self._move(event)
            case events.StageStarted(stage, detail):
                self._console.print(f"[bold]{_spoken(stage)}[/bold] {detail}", markup=True)
            case events.StageSkipped(stage, detail):
                self._console.print(f"[dim]{_spoken(stage)}: {detail}[/dim]")
            case events.StageDone(stage, seconds, detail):
                self._clear(stage)
                self._console.print(f"  [green]done[/green] in {seconds:.1f} s  {detail}")
            case events.Note(_, text, warning):
                colour = "yellow" if warning else "dim"
                self._console.print(f"  [{colour}]{text}[/{colour}]")
            case _:
                pass

    def _move(self, event: events.Progress) -> None:
        key = (event.stage, event.task)
        values = "  ".join(f"{name} {value:.3g}" for name, value in event.values.items())
        if key not in self._tasks:
            self._clear(event.stage)
            self._tasks[key] = self._bars.add_task(event.task, total=event.total, values=values)
        self._bars.update(self._tasks[key], completed=event.done, total=event.total, values=values)

    def _clear(self, stage: str) -> None:
        for key in [key for key in self._tasks if key[0] == stage]:
            self._bars.remove_task(self._tasks.pop(key))


def _spoken(stage: str) -> str:
    """``generate-with_prior`` reads better as ``generate with_prior``."""
    return stage.replace("-", " ", 1)
