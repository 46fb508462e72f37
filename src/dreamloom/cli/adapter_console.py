"""Adapter files as a terminal shows them: methods, ranks, contents, and what two have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from dreamloom.cli.console import _print, _print_aside, _table, say

if TYPE_CHECKING:
    from pathlib import Path

    from dreamloom.lora.adapter import Adapter
    from dreamloom.merging.diagnose.measuring import Diagnosis
    from dreamloom.merging.extract import Extracted
    from dreamloom.merging.method import MergeMethod


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
    from dreamloom.lora.readers import tell_readers

    lost = f"{error:.2%} off {whole}" if error >= _SHOWN else "nothing lost"
    ranks = format_ranks(adapter.ranks.values())
    say(f"The adapter: {out} ({len(adapter.layers)} layers, {ranks}, {lost})")
    say(tell_readers(out))


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
    if found["readers"]:
        _print(f"  for {escape(found['readers'])}")
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
