"""Events as a terminal shows them: a bar for what runs, a line for what is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
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
from rich.table import Table

from dreamloom.core import events
from dreamloom.core.events import Event, Observer, silent

if TYPE_CHECKING:
    from pathlib import Path

    from dreamloom.data.photos.check import PhotoCheck
    from dreamloom.data.prompts.packs import Pack
    from dreamloom.evaluation.compare import Comparison
    from dreamloom.evaluation.encoders.store import Listed
    from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
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
                told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
                self._say(f"after {update} updates: {told or 'pictures'} in {folder}")
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


def show_photo_check(check: PhotoCheck) -> None:
    """Print what was found about a folder of photos."""
    console = Console(highlight=False, emoji=False)
    for photo in check.photos:
        size = "{1} × {0}".format(*photo.original_px) if photo.original_px else "unreadable"
        console.print(f"[bold]{escape(photo.file)}[/bold]  {size}")
        for text in filter(None, (photo.unreadable, *photo.issues)):
            console.print(f"  [yellow]{escape(text)}[/yellow]")
        for text in photo.remarks:
            console.print(f"  [dim]{escape(text)}[/dim]")
    for text in check.notes:
        console.print(escape(text))
    for text in check.to_add:
        console.print(f"[bold]To do:[/bold] {escape(text)}")
    if check.usable and not check.to_add:
        console.print("[green]These photos can be used as they are.[/green]")


def show_models(listed: Sequence[Listed]) -> None:
    """Print the models that evaluation uses, and what to do about those that are not here."""
    console = Console(highlight=False, emoji=False)
    for line in listed:
        model = line.model
        facts = [model.licence]
        if model.size_mib:
            facts.append(f"{model.size_mib:.0f} MiB" if model.size_mib >= 1 else "under 1 MiB")
        if model.files:
            facts.append("hashes known" if model.hashes_known else "hashes taken when fetched")
        colour = "green" if line.state in {"here", "embedded"} else "yellow"
        told = escape("; ".join(facts))
        console.print(f"[bold]{model.name}[/bold]  [{colour}]{line.state}[/{colour}]  {told}")
        for text in dict.fromkeys(filter(None, (model.purpose, line.why, model.note))):
            console.print(f"    [dim]{escape(text)}[/dim]")


def show_packs(packs: Sequence[Pack]) -> None:
    """Print what each prompt pack is for."""
    console = Console(highlight=False, emoji=False)
    table = Table("pack", "prompts", "what for", box=None)
    for pack in packs:
        table.add_row(pack.name, str(len(pack.prompts)), escape(pack.about))
    console.print(table)
    console.print("[dim]'dreamloom packs NAME' shows a pack's prompts.[/dim]")


def show_pack(pack: Pack) -> None:
    """Print a pack's prompts with what each may change, and whose work they are."""
    console = Console(highlight=False, emoji=False)
    console.print(f"[bold]{pack.name}[/bold]  {escape(pack.about)}")
    table = Table("prompt", "category", "style", "face", "may change", box=None)
    for prompt in pack.prompts:
        text = f"{prompt.text} (persons only)" if prompt.for_persons else prompt.text
        asked = f"\n[dim]{escape(prompt.check)}[/dim]" if prompt.check else ""
        may_change = ", ".join(prompt.may_change) or "–"
        table.add_row(escape(text) + asked, prompt.category, prompt.style, prompt.face, may_change)
    console.print(table)
    if pack.attribution:
        console.print(f"[dim]{escape(pack.attribution)}[/dim]")


def show_scorecard(card: Scorecard) -> None:
    """Print the scores with everything that belongs beside them."""
    console = Console(highlight=False, emoji=False)
    if card.warning:
        console.print(f"[bold yellow]{escape(card.warning)}[/bold yellow]")
    for text in card.alarms:
        console.print(f"[yellow]{escape(text)}[/yellow]")
    for text in card.findings:
        console.print(escape(text))
    table = Table("score", "value", "n", "interval", "floor", "ceiling", "lift", box=None)
    for name, score in card.scores.items():
        table.add_row(name, *_cells(score))
    console.print(table)
    for name, score in card.scores.items():
        if score.value is None and score.note:
            told = escape(score.note.removeprefix("not measured: "))
            console.print(f"[dim]{name} is not measured: {told}[/dim]")
        elif score.note:
            console.print(f"[dim]{name}: {escape(score.note)}[/dim]")
    for flags in card.flags.values():
        console.print(f"[bold]{escape(flags.label)}[/bold]: {escape(flags.told)}")
    for key in sorted({score.key for score in card.scores.values() if score.key}):
        console.print(f"[dim]{escape(key)}[/dim]")
    for text in card.notes:
        console.print(f"[dim]{escape(text)}[/dim]")


def show_findings(findings: StudyFindings) -> None:
    """Print each arm's measures and, last, the answer to what was asked."""
    console = Console(highlight=False, emoji=False)
    table = Table("arm", "score", "value", "n", "interval", "floor", "ceiling", "lift", box=None)
    for arm in findings.arms:
        for name, score in arm.measures().items():
            table.add_row(escape(arm.name), name, *_cells(score))
    console.print(table)
    for text in findings.notes:
        console.print(f"[dim]{escape(text)}[/dim]")
    console.print(f"[bold]{escape(findings.study.question)}[/bold] {escape(findings.answer)}")


def show_comparisons(compared: Sequence[Comparison]) -> None:
    """Print what changed in each score, and a sentence each on what that rests on."""
    from dreamloom.evaluation.compare import tell_comparison

    console = Console(highlight=False, emoji=False)
    table = Table("score", "B against A", "difference", "95 % interval", "p", "pairs", box=None)
    for one in compared:
        gap = "–" if one.difference is None else f"{one.difference:+.3f}"
        between = "–" if one.interval is None else "{:+.3f} to {:+.3f}".format(*one.interval)
        p = "–" if one.p_corrected is None else f"{one.p_corrected:.3f}"
        table.add_row(one.measure, one.outcome, gap, between, p, str(one.pairs))
    console.print(table)
    for one in compared:
        console.print(escape(tell_comparison(one)))
    for key in sorted({one.key for one in compared if one.key}):
        console.print(f"[dim]{escape(key)}[/dim]")


def show_audit(audit: Audit) -> None:
    """Print what faults do to CLIP-I and CLIP-T: mended one after the other, and each alone."""
    console = Console(highlight=False, emoji=False)
    if audit.warning:
        console.print(f"[bold yellow]{escape(audit.warning)}[/bold yellow]")
    first, last = audit.rows[0].scores, audit.rows[-1].scores
    console.print(
        f"{audit.pictures} pictures against {audit.photos} photos, as the script would print it: "
        f"CLIP-I {first.clip_i:.4f}, CLIP-T {first.clip_t:.4f}"
    )
    names = ("CLIP-I", "CLIP-T", "photos", "mosaics", *(["floor"] if audit.has_floor else []))
    table = Table("one fault mended after the other", *names, box=None)
    for row in audit.rows:
        table.add_row(row.says, *(_number(row.scores, name) for name in names))
    console.print(table)
    alone = Table("each fault alone, against the right way", "CLIP-I", "CLIP-T", box=None)
    for row in audit.alone:
        own = row.scores
        changes = own.clip_i - last.clip_i, own.clip_t - last.clip_t
        alone.add_row(row.says, *(f"{change:+.4f}" for change in changes))
    console.print(alone)
    console.print(escape(audit.verdict))
    texts = "; ".join(audit.right_texts[:3]) + (" …" if len(audit.right_texts) > 3 else "")
    for text in (
        "photos: the photos among themselves, none with itself. mosaics: pictures of nothing, "
        "against the photos.",
        f"The faulty text: {audit.faulty_text}. The right one: {texts}",
        audit.key,
    ):
        console.print(f"[dim]{escape(text)}[/dim]")


def _number(scores: AuditScores, column: str) -> str:
    value = getattr(scores, column.lower().replace("-", "_"))
    return "–" if value is None else f"{value:.3f}"


def show_retention(found: Retention) -> None:
    """Print what a merge has kept of its parts."""
    console = Console(highlight=False, emoji=False)
    table = Table("kept", "value", "n", "interval", box=None)
    for name, score in (("subject", found.identity), ("style", found.style)):
        table.add_row(name, *_cells(score)[:3])
    console.print(table)
    if found.both is not None:
        console.print(f"both together, by their harmonic mean: {found.both:.3f}")
    console.print(f"[dim]style is compared with {escape(found.style_reference)}[/dim]")
    for score in (found.identity, found.style):
        for text in filter(None, (score.note, score.key)):
            console.print(f"[dim]{escape(text)}[/dim]")


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

    console = Console(highlight=False, emoji=False)
    table = Table("method", "what it does", box=None)
    for method in METHODS.values():
        needs = _tell_needs(method)
        told = f"  [dim]({needs})[/dim]" if needs else ""
        table.add_row(f"[bold]{method.name}[/bold]", escape(method.summary) + told)
    console.print(table)
    console.print(
        "[dim]'dreamloom merge --methods --method NAME' tells a method's formula, source and "
        "settings.[/dim]"
    )


def show_method(name: str) -> None:
    """Print all of one merge method: its formula, where it comes from, and its settings.

    Raises:
        ConfigError: If there is no such method.
    """
    from dreamloom.merging.methods import find_method

    console = Console(highlight=False, emoji=False)
    method = find_method(name)
    needs = _tell_needs(method)
    told = f"  [dim]({needs})[/dim]" if needs else ""
    console.print(f"[bold]{method.name}[/bold]  {escape(method.summary)}{told}")
    console.print(escape(method.formula))
    console.print(f"[dim]{escape(method.source)}[/dim]")
    if method.options:
        table = Table("--set", "default", "or", "what it is", box=None)
        for option in method.options:
            others = [choice for choice in option.choices if choice != option.default]
            cells = (str(option.default), ", ".join(others), option.description)
            table.add_row(f"[bold]{option.name}[/bold]", *map(escape, cells))
        console.print(table)


def _tell_needs(method: MergeMethod) -> str:
    needs = {
        "activations": "asks the base model: --base",
        "training": "learns with the base model: --base",
    }
    facts = [needs[method.needs]] if method.needs in needs else []
    if method.least > 1 or method.most:
        most = f" to {method.most}" if method.most and method.most > method.least else ""
        more = "" if method.most else " or more"
        facts.append(f"{method.least}{most}{more} adapters")
    return "; ".join(facts)


# From here on an error is more than 0.00%.
_SHOWN = 5e-5


def show_cut(out: Path, adapter: Adapter, error: float, whole: str) -> None:
    """Print what an adapter that was cut to a rank has become, and how far it is off the whole."""
    lost = f"{error:.2%} off {whole}" if error >= _SHOWN else "nothing lost"
    told = tell_ranks(adapter.ranks.values())
    say(f"The adapter: {out} ({len(adapter.layers)} layers, {told}, {lost})")


def tell_ranks(of_layers: Iterable[int]) -> str:
    """Say which rank an adapter's layers have: ``rank 16``, or ``ranks 4 to 58``."""
    ranks = sorted(set(of_layers))
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def show_extracted(out: Path, found: Extracted) -> None:
    """Print what of two models' difference an adapter holds."""
    show_cut(out, found.adapter, found.error, "all that differs")
    console = Console(highlight=False, emoji=False)
    worst = max(found.errors, key=found.errors.__getitem__)
    if found.errors[worst] >= _SHOWN:
        console.print(f"[dim]Worst held: {worst}, {found.errors[worst]:.2%} off.[/dim]")
    if found.others:
        shown = ", ".join(found.others[:3]) + (" …" if len(found.others) > 3 else "")
        console.print(
            f"[yellow]{len(found.others)} other tensors differ, too, which no adapter changes: "
            f"{escape(shown)}.[/yellow]"
        )


def show_inspected(told: Mapping[str, Any]) -> None:
    """Print what an adapter file holds and how it was made."""
    console = Console(highlight=False, emoji=False)
    stored = ", ".join(
        kind if count == told["layers"] else f"{count} as {kind}"
        for kind, count in told["stored"].items()
    )
    facts = [f"{stored} in the format {told['format']}", f"{told['layers']} layers"]
    if told["ranks"]:
        facts.append(tell_ranks(map(int, told["ranks"])))
    facts.append(f"{told['parameters']:,} numbers")
    if told["norm"] is not None:
        facts.append(f"norm {told['norm']:.4g}")
    console.print(f"[bold]{escape(told['file'])}[/bold]  {escape('; '.join(facts))}")
    if len(told["components"]) > 1:
        for name, part in told["components"].items():
            share = "" if part["energy"] is None else f", {part['energy']:.1%} of the change"
            console.print(f"  {name}: {part['layers']} layers{share}")
    if told.get("words"):
        console.print(f"  new words: {escape(', '.join(told['words']))}")
    if "recipe" in told:
        _show_recipe(console, told)
    story = {key: text for key, text in sorted(told["metadata"].items()) if text}
    width = max(map(len, story), default=0)
    for key, text in story.items():
        line = escape(" ".join(str(text).split()))
        console.print(
            f"  [dim]{escape(key):<{width}}[/dim]  {line}", no_wrap=True, overflow="ellipsis"
        )
    console.print("[dim]--json shows all of it, uncut.[/dim]")


def _show_recipe(console: Console, told: Mapping[str, Any]) -> None:
    """Print how a merged file was made, and whether it is still what was made."""
    recipe = told["recipe"]
    if recipe is None:
        console.print("  [yellow]merged; its recipe cannot be read[/yellow]")
        return
    settings = "".join(f", {name} {value}" for name, value in recipe.get("options", {}).items())
    console.print(escape(f"  merged by {recipe['method']}{settings}, rank {recipe['rank']}:"))
    for part in recipe["parts"]:
        blocks = ", with weights of blocks" if part.get("blocks") else ""
        console.print(escape(f"    {part['name']}={part['weight']:g}  ({part['file']}{blocks})"))
    console.print(
        "  as it was written; 'dreamloom merge --verify' merges again and compares"
        if told["sealed"]
        else "  [yellow]changed since it was merged: its bytes do not fit its seal[/yellow]"
    )
    if told["sealed"] and told["can_be_remixed"]:
        console.print("  'dreamloom remix' gives its parts other weights")


def show_diagnosis(found: Diagnosis) -> None:
    """Print what two adapters have to do with each other, block by block, and what to do."""
    from dreamloom.merging.diagnose.advice import give_advice
    from dreamloom.merging.diagnose.groups import group_layers

    console = Console(highlight=False, emoji=False)
    one, other = (escape(name) for name in found.names)
    table = Table(
        "block", f"‖{one}‖", f"‖{other}‖", "ratio", "cosine", "overlap", "chance", box=None
    )
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
    console.print(table)
    console.print(
        f"[dim]overlap: how much of {one} lies where {other} looks; chance: of unrelated "
        "adapters.[/dim]"
    )
    errors = ", ".join(f"{rank}: {error:.1%}" for rank, error in found.together.errors.items())
    console.print(f"[dim]Error of the sum by rank: {errors}[/dim]")
    for text in give_advice(found):
        console.print(f"– {escape(text)}")
    console.print(
        "[dim]This is about weights. Which pictures are better, only pictures tell: "
        "dreamloom search.[/dim]"
    )


def _cells(score: Score) -> list[str]:
    if score.value is None:
        return ["not measured", "", "", "", "", ""]
    numbers = [score.value, score.floor, score.ceiling, score.lift]
    value, floor, ceiling, lift = ("–" if n is None else f"{n:.3f}" for n in numbers)
    between = "–" if score.interval is None else "{:.3f} to {:.3f}".format(*score.interval)
    return [value, str(score.n), between, floor, ceiling, lift]
