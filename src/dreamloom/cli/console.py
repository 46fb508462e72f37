"""Events as a terminal shows them: a bar for what runs, a line for what is done."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, RenderableType
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
from rich.table import Table

from dreamloom.cli.progress_lines import EVERY_S, ProgressLines
from dreamloom.core import events
from dreamloom.core.events import Event, Observer, silent

if TYPE_CHECKING:
    from dreamloom.data.photos.check import PhotoCheck
    from dreamloom.data.prompts.packs import Pack
    from dreamloom.evaluation.compare import Comparison
    from dreamloom.evaluation.encoders.store import Listed
    from dreamloom.evaluation.metrics.scorecard import Scorecard
    from dreamloom.evaluation.retention import Retention
    from dreamloom.experiments.seed_audit import Audit, AuditScores
    from dreamloom.experiments.study.findings import StudyFindings


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
                self._lines.forget()
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
        self._lines.forget()
        if self._bars is None:
            return
        for key in [key for key in self._tasks if key[0] == stage]:
            self._bars.remove_task(self._tasks.pop(key))


def _spoken(stage: str) -> str:
    """``generate-with_prior`` reads better as ``generate with_prior``."""
    return escape(stage.replace("-", " ", 1))


_SCORE_HEAD = ("value", "n", "interval", "floor", "ceiling", "lift")


def _print(*things: RenderableType, **how: Any) -> None:
    """Print texts and tables on standard output, as wide as the terminal is."""
    Console(highlight=False, emoji=False).print(*things, **how)


def _print_aside(*texts: str | None) -> None:
    """Print in grey what is worth knowing beside; what is empty is left out."""
    for text in filter(None, texts):
        _print(f"[dim]{escape(text)}[/dim]")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    return table


def show_photo_check(check: PhotoCheck) -> None:
    """Print what was found about a folder of photos."""
    for photo in check.photos:
        size = "{1} × {0}".format(*photo.original_px) if photo.original_px else "unreadable"
        _print(f"[bold]{escape(photo.file)}[/bold]  {size}")
        for text in filter(None, (photo.unreadable, *photo.issues)):
            _print(f"  [yellow]{escape(text)}[/yellow]")
        beside = [f"caption: {photo.caption}"] if photo.caption else []
        beside += [f"mask: {photo.mask}"] if photo.mask else []
        beside += ["box: in metadata"] if photo.has_box else []
        for text in (*photo.remarks, *beside):
            _print(f"  [dim]{escape(text)}[/dim]")
    _print(f"{escape(check.understood)}.")
    for text in check.notes:
        _print(escape(text))
    for text in check.to_add:
        _print(f"[bold]To do:[/bold] {escape(text)}")
    if check.usable and not check.to_add:
        _print("[green]These photos can be used as they are.[/green]")


def show_models(listed: Sequence[Listed]) -> None:
    """Print the models that evaluation uses, and what to do about those that are not here."""
    for line in listed:
        model = line.model
        facts = [model.licence]
        if model.size_mib:
            facts.append(f"{model.size_mib:.0f} MiB" if model.size_mib >= 1 else "under 1 MiB")
        if model.files:
            facts.append("hashes known" if model.hashes_known else "hashes taken when fetched")
        colour = "green" if line.state in {"here", "embedded"} else "yellow"
        known = escape("; ".join(facts))
        _print(f"[bold]{model.name}[/bold]  [{colour}]{line.state}[/{colour}]  {known}")
        for text in dict.fromkeys(filter(None, (model.purpose, line.why, model.note))):
            _print(f"    [dim]{escape(text)}[/dim]")


def show_packs(packs: Sequence[Pack]) -> None:
    """Print what each prompt pack is for."""
    rows = [(pack.name, str(len(pack.prompts)), escape(pack.about)) for pack in packs]
    _print(_table(("pack", "prompts", "what for"), rows))
    _print_aside("'dreamloom packs NAME' shows a pack's prompts.")


def show_pack(pack: Pack) -> None:
    """Print a pack's prompts with what each may change, and whose work they are."""
    _print(f"[bold]{pack.name}[/bold]  {escape(pack.about)}")
    rows = []
    for prompt in pack.prompts:
        text = f"{prompt.text} (persons only)" if prompt.for_persons else prompt.text
        asked = f"\n[dim]{escape(prompt.check)}[/dim]" if prompt.check else ""
        may_change = ", ".join(prompt.may_change) or "–"
        cells = (prompt.category, prompt.style, prompt.face, may_change)
        rows.append((escape(text) + asked, *cells))
    _print(_table(("prompt", "category", "style", "face", "may change"), rows))
    _print_aside(pack.attribution)


def show_scorecard(card: Scorecard) -> None:
    """Print the scores with everything that belongs beside them."""
    if card.warning:
        _print(f"[bold yellow]{escape(card.warning)}[/bold yellow]")
    for text in card.alarms:
        _print(f"[yellow]{escape(text)}[/yellow]")
    for text in card.findings:
        _print(escape(text))
    rows = [(name, *score.cells()) for name, score in card.all_scores.items()]
    _print(_table(("score", *_SCORE_HEAD), rows))
    for name, score in card.all_scores.items():
        if score.value is None and score.note:
            _print_aside(f"{name} is not measured: {score.note.removeprefix('not measured: ')}")
        elif score.note:
            _print_aside(f"{name}: {score.note}")
    for flags in card.flags.values():
        _print(f"[bold]{escape(flags.label)}[/bold]: {escape(flags.told)}")
    keys = sorted({score.key for score in card.scores.values() if score.key})
    _print_aside(*keys, *card.notes)


def show_findings(findings: StudyFindings) -> None:
    """Print each arm's measures and, last, the answer to what was asked."""
    rows = [
        (escape(arm.name), name, *score.cells())
        for arm in findings.arms
        for name, score in arm.measures().items()
    ]
    _print(_table(("arm", "score", *_SCORE_HEAD), rows))
    _print_aside(*findings.notes)
    _print(f"[bold]{escape(findings.study.question)}[/bold] {escape(findings.answer)}")


def show_comparisons(compared: Sequence[Comparison]) -> None:
    """Print what changed in each score, and a sentence each on what that rests on."""
    from dreamloom.evaluation.compare import tell_comparison, tell_outcome

    rows = []
    for one in compared:
        gap = "–" if one.difference is None else f"{one.difference:+.3f}"
        between = "–" if one.interval is None else "{:+.3f} to {:+.3f}".format(*one.interval)
        p = "–" if one.p_corrected is None else f"{one.p_corrected:.3f}"
        rows.append((one.measure, tell_outcome(one), gap, between, p, str(one.pairs)))
    head = ("score", "B against A", "difference", "95 % interval", "p", "pairs")
    _print(_table(head, rows))
    for one in compared:
        _print(escape(tell_comparison(one)))
    _print_aside(*sorted({one.key for one in compared if one.key}))


def show_audit(audit: Audit) -> None:
    """Print what faults do to CLIP-I and CLIP-T: mended one after the other, and each alone."""
    if audit.warning:
        _print(f"[bold yellow]{escape(audit.warning)}[/bold yellow]")
    first, last = audit.rows[0].scores, audit.rows[-1].scores
    _print(
        f"{audit.pictures} pictures against {audit.photos} photos, as the script would print it: "
        f"CLIP-I {first.clip_i:.4f}, CLIP-T {first.clip_t:.4f}"
    )
    names = ("CLIP-I", "CLIP-T", "photos", "mosaics", *(["floor"] if audit.has_floor else []))
    rows = [(row.says, *(_number(row.scores, name) for name in names)) for row in audit.rows]
    _print(_table(("one fault mended after the other", *names), rows))
    alone = []
    for row in audit.alone:
        changes = row.scores.clip_i - last.clip_i, row.scores.clip_t - last.clip_t
        alone.append((row.says, *(f"{change:+.4f}" for change in changes)))
    _print(_table(("each fault alone, against the right way", "CLIP-I", "CLIP-T"), alone))
    _print(escape(audit.verdict))
    texts = "; ".join(audit.right_texts[:3]) + (" …" if len(audit.right_texts) > 3 else "")
    _print_aside(
        "photos: the photos among themselves, none with itself. mosaics: pictures of nothing, "
        "against the photos.",
        f"The faulty text: {audit.faulty_text}. The right one: {texts}",
        audit.key,
    )


def _number(scores: AuditScores, column: str) -> str:
    value = getattr(scores, column.lower().replace("-", "_"))
    return "–" if value is None else f"{value:.3f}"


def show_retention(found: Retention) -> None:
    """Print what a merge has kept of its parts."""
    parts = (("subject", found.identity), ("style", found.style))
    rows = [(name, *score.cells()[:3]) for name, score in parts]
    _print(_table(("kept", *_SCORE_HEAD[:3]), rows))
    if found.both is not None:
        _print(f"both together, by their harmonic mean: {found.both:.3f}")
    _print_aside(f"style is compared with {found.style_reference}")
    for score in (found.identity, found.style):
        _print_aside(score.note, score.key)


def print_note(event: events.Event) -> None:
    """Print a note on the error output, where no picture of the progress is drawn yet."""
    if isinstance(event, events.Note):
        click.echo(f"Note: {event.text}.", err=True)


def say(text: str) -> None:
    """Print a sentence: broken between words on a terminal, in one line for another program."""
    console = Console(highlight=False, emoji=False)
    console.print(escape(text), soft_wrap=not console.is_terminal)
