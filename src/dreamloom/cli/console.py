"""Events as a terminal shows them: a bar for what runs, a line for what is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from dreamloom.core import events
from dreamloom.core.events import Event, Observer, silent

if TYPE_CHECKING:
    from pathlib import Path

    from dreamloom.data.photos.check import PhotoCheck
    from dreamloom.data.prompts.packs import Pack
    from dreamloom.evaluation.compare import Comparison
    from dreamloom.evaluation.encoders.store import Listed
    from dreamloom.evaluation.metrics.scorecard import Scorecard
    from dreamloom.evaluation.retention import Retention
    from dreamloom.experiments.seed_audit import Audit, AuditScores
    from dreamloom.experiments.study.findings import StudyFindings
    from dreamloom.lora.adapter import Adapter
    from dreamloom.merging.diagnose.measuring import Diagnosis
    from dreamloom.merging.extract import Extracted
    from dreamloom.merging.method import MergeMethod


@contextmanager
def watch(quiet: bool = False) -> Iterator[Observer]:
    """Give an observer that draws progress on standard error while the block runs."""
    if quiet:
        yield silent
        return
    console = Console(stderr=True, highlight=False, emoji=False)
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
        for text in photo.remarks:
            _print(f"  [dim]{escape(text)}[/dim]")
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
    rows = [(name, *score.cells()) for name, score in card.scores.items()]
    _print(_table(("score", *_SCORE_HEAD), rows))
    for name, score in card.scores.items():
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


def show_methods() -> None:
    """Print every merge method with what it does and what it needs."""
    from dreamloom.merging.methods import METHODS

    rows = [
        (f"[bold]{method.name}[/bold]", escape(method.summary) + _describe_needs(method))
        for method in METHODS.values()
    ]
    _print(_table(("method", "what it does"), rows))
    _print_aside(
        "'dreamloom merge --methods --method NAME' tells a method's formula, source and settings."
    )


def show_method(name: str) -> None:
    """Print all of one merge method: its formula, where it comes from, and its settings.

    Raises:
        ConfigError: If there is no such method.
    """
    from dreamloom.merging.methods import find_method

    method = find_method(name)
    _print(f"[bold]{method.name}[/bold]  {escape(method.summary)}{_describe_needs(method)}")
    _print(escape(method.formula))
    _print_aside(method.source)
    if method.options:
        rows = []
        for option in method.options:
            others = [choice for choice in option.choices if choice != option.default]
            cells = (str(option.default), ", ".join(others), option.description)
            rows.append((f"[bold]{option.name}[/bold]", *map(escape, cells)))
        _print(_table(("--set", "default", "or", "what it is"), rows))


def _describe_needs(method: MergeMethod) -> str:
    needs = {
        "activations": "asks the base model: --base",
        "training": "learns with the base model: --base",
    }
    facts = [needs[method.needs]] if method.needs in needs else []
    if method.least > 1 or method.most:
        most = f" to {method.most}" if method.most and method.most > method.least else ""
        more = "" if method.most else " or more"
        facts.append(f"{method.least}{most}{more} adapters")
    return f"  [dim]({'; '.join(facts)})[/dim]" if facts else ""


# From here on an error is more than 0.00%.
_SHOWN = 5e-5


def show_cut(out: Path, adapter: Adapter, error: float, whole: str) -> None:
    """Print what an adapter that was cut to a rank has become, and how far it is off the whole."""
    lost = f"{error:.2%} off {whole}" if error >= _SHOWN else "nothing lost"
    ranks = format_ranks(adapter.ranks.values())
    say(f"The adapter: {out} ({len(adapter.layers)} layers, {ranks}, {lost})")


def format_ranks(of_layers: Iterable[int]) -> str:
    """Say which rank an adapter's layers have: ``rank 16``, or ``ranks 4 to 58``."""
    ranks = sorted(set(of_layers))
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def show_extracted(out: Path, found: Extracted) -> None:
    """Print what of two models' difference an adapter holds."""
    show_cut(out, found.adapter, found.error, "all that differs")
    worst = max(found.errors, key=found.errors.__getitem__)
    if found.errors[worst] >= _SHOWN:
        _print_aside(f"Worst held: {worst}, {found.errors[worst]:.2%} off.")
    if found.others:
        shown = ", ".join(found.others[:3]) + (" …" if len(found.others) > 3 else "")
        _print(
            f"[yellow]{len(found.others)} other tensors differ, too, which no adapter changes: "
            f"{escape(shown)}.[/yellow]"
        )


def show_inspected(found: Mapping[str, Any]) -> None:
    """Print what an adapter file holds and how it was made."""
    stored = ", ".join(
        kind if count == found["layers"] else f"{count} as {kind}"
        for kind, count in found["stored"].items()
    )
    facts = [f"{stored} in the format {found['format']}", f"{found['layers']} layers"]
    if found["ranks"]:
        facts.append(format_ranks(map(int, found["ranks"])))
    facts.append(f"{found['parameters']:,} numbers")
    if found["norm"] is not None:
        facts.append(f"norm {found['norm']:.4g}")
    _print(f"[bold]{escape(found['file'])}[/bold]  {escape('; '.join(facts))}")
    if len(found["components"]) > 1:
        for name, part in found["components"].items():
            share = "" if part["energy"] is None else f", {part['energy']:.1%} of the change"
            _print(f"  {name}: {part['layers']} layers{share}")
    if found.get("words"):
        _print(f"  new words: {escape(', '.join(found['words']))}")
    if "recipe" in found:
        _show_recipe(found)
    metadata = {key: text for key, text in sorted(found["metadata"].items()) if text}
    width = max(map(len, metadata), default=0)
    for key, text in metadata.items():
        line = escape(" ".join(str(text).split()))
        _print(f"  [dim]{escape(key):<{width}}[/dim]  {line}", no_wrap=True, overflow="ellipsis")
    _print_aside("--json shows all of it, uncut.")


def _show_recipe(found: Mapping[str, Any]) -> None:
    """Print how a merged file was made, and whether it is still what was made."""
    recipe = found["recipe"]
    if recipe is None:
        _print("  [yellow]merged; its recipe cannot be read[/yellow]")
        return
    settings = "".join(f", {name} {value}" for name, value in recipe.get("options", {}).items())
    _print(escape(f"  merged by {recipe['method']}{settings}, rank {recipe['rank']}:"))
    for part in recipe["parts"]:
        blocks = ", with weights of blocks" if part.get("blocks") else ""
        _print(escape(f"    {part['name']}={part['weight']:g}  ({part['file']}{blocks})"))
    _print(
        "  as it was written; 'dreamloom merge --verify' merges again and compares"
        if found["sealed"]
        else "  [yellow]changed since it was merged: its bytes do not fit its seal[/yellow]"
    )
    if found["sealed"] and found["can_be_remixed"]:
        _print("  'dreamloom remix' gives its parts other weights")


def show_diagnosis(found: Diagnosis) -> None:
    """Print what two adapters have to do with each other, block by block, and what to do."""
    from dreamloom.merging.diagnose.advice import give_advice
    from dreamloom.merging.diagnose.measuring import group_layers

    one, other = (escape(name) for name in found.names)
    head = ("block", f"‖{one}‖", f"‖{other}‖", "ratio", "cosine", "overlap", "chance")
    table = _table(head, [])
    table.columns[0].no_wrap = True
    together = ("all", found.together)
    for name, told in (*((g.name, g.together) for g in group_layers(found)), together):
        table.add_row(
            f"[bold]{name}[/bold]" if name == "all" else escape(name),
            *(f"{norm:.3g}" for norm in told.norms),
            "–" if told.ratio is None else f"{told.ratio:.2f}",
            "–" if told.cosine is None or not told.shared else f"{told.cosine:+.3f}",
            "–" if told.row_overlap is None else f"{told.row_overlap[0]:.0%}",
            "–" if told.row_chance is None else f"{told.row_chance[0]:.0%}",
        )
    _print(table)
    one, other = found.names
    errors = ", ".join(f"{rank}: {error:.1%}" for rank, error in found.together.errors.items())
    _print_aside(
        f"overlap: how much of {one} lies where {other} looks; chance: of unrelated adapters.",
        f"Error of the sum by rank: {errors}",
    )
    for text in give_advice(found):
        _print(f"– {escape(text)}")
    _print_aside(
        "This is about weights. Which pictures are better, only pictures tell: dreamloom search."
    )
