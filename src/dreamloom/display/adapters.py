"""Adapters as tables and lines: merge methods, ranks, contents, and what two have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from dreamloom.display.layout import aside, table
from dreamloom.merging.diagnose.advice import give_advice
from dreamloom.merging.diagnose.measuring import Diagnosis, group_layers
from dreamloom.merging.method import MergeMethod
from dreamloom.merging.methods import METHODS, find_method


def render_methods() -> Iterator[RenderableType]:
    """Lay out every merge method with what it does and what it needs."""
    rows = [
        (f"[bold]{method.name}[/bold]", escape(method.summary) + _describe_needs(method))
        for method in METHODS.values()
    ]
    yield table(("method", "what it does"), rows)
    yield from aside(
        "'dreamloom merge --methods --method NAME' tells a method's formula, source and settings."
    )


def render_method(name: str) -> Iterator[RenderableType]:
    """Lay out all of one merge method: its formula, where it comes from, and its settings.

    Raises:
        ConfigError: If there is no such method.
    """
    method = find_method(name)
    yield f"[bold]{method.name}[/bold]  {escape(method.summary)}{_describe_needs(method)}"
    yield escape(method.formula)
    yield from aside(method.source)
    if method.options:
        rows = []
        for option in method.options:
            others = [choice for choice in option.choices if choice != option.default]
            cells = (str(option.default), ", ".join(others), option.description)
            rows.append((f"[bold]{option.name}[/bold]", *map(escape, cells)))
        yield table(("--set", "default", "or", "what it is"), rows)


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


def format_ranks(of_layers: Iterable[int]) -> str:
    """Say which rank an adapter's layers have: ``rank 16``, or ``ranks 4 to 58``."""
    ranks = sorted(set(of_layers))
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def render_inspected(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Lay out what an adapter file holds and how it was made."""
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
    yield f"[bold]{escape(found['file'])}[/bold]  {escape('; '.join(facts))}"
    if len(found["components"]) > 1:
        for name, part in found["components"].items():
            share = "" if part["energy"] is None else f", {part['energy']:.1%} of the change"
            yield f"  {name}: {part['layers']} layers{share}"
    if found["readers"]:
        yield f"  for {escape(found['readers'])}"
    if found.get("words"):
        yield f"  new words: {escape(', '.join(found['words']))}"
    if "recipe" in found:
        yield from _render_recipe(found)
    metadata = {key: text for key, text in sorted(found["metadata"].items()) if text}
    width = max(map(len, metadata), default=0)
    for key, text in metadata.items():
        line = escape(" ".join(str(text).split()))
        cut = Text.from_markup(f"  [dim]{escape(key):<{width}}[/dim]  {line}", overflow="ellipsis")
        cut.no_wrap = True
        yield cut
    yield from aside("--json shows all of it, uncut.")


def _render_recipe(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Lay out how a merged file was made, and whether it is still what was made."""
    recipe = found["recipe"]
    if recipe is None:
        yield "  [yellow]merged; its recipe cannot be read[/yellow]"
        return
    settings = "".join(f", {name} {value}" for name, value in recipe.get("options", {}).items())
    yield escape(f"  merged by {recipe['method']}{settings}, rank {recipe['rank']}:")
    for part in recipe["parts"]:
        blocks = ", with weights of blocks" if part.get("blocks") else ""
        yield escape(f"    {part['name']}={part['weight']:g}  ({part['file']}{blocks})")
    yield (
        "  as it was written; 'dreamloom merge --verify' merges again and compares"
        if found["sealed"]
        else "  [yellow]changed since it was merged: its bytes do not fit its seal[/yellow]"
    )
    if found["sealed"] and found["can_be_remixed"]:
        yield "  'dreamloom remix' gives its parts other weights"


def render_diagnosis(found: Diagnosis) -> Iterator[RenderableType]:
    """Lay out what two adapters have to do with each other, block by block, and what to do."""
    one, other = (escape(name) for name in found.names)
    head = ("block", f"‖{one}‖", f"‖{other}‖", "ratio", "cosine", "overlap", "chance")
    blocks = table(head, [])
    blocks.columns[0].no_wrap = True
    together = ("all", found.together)
    for name, told in (*((g.name, g.together) for g in group_layers(found)), together):
        blocks.add_row(
            f"[bold]{name}[/bold]" if name == "all" else escape(name),
            *(f"{norm:.3g}" for norm in told.norms),
            "–" if told.ratio is None else f"{told.ratio:.2f}",
            "–" if told.cosine is None or not told.shared else f"{told.cosine:+.3f}",
            "–" if told.row_overlap is None else f"{told.row_overlap[0]:.0%}",
            "–" if told.row_chance is None else f"{told.row_chance[0]:.0%}",
        )
    yield blocks
    one, other = found.names
    errors = ", ".join(f"{rank}: {error:.1%}" for rank, error in found.together.errors.items())
    yield from aside(
        f"overlap: how much of {one} lies where {other} looks; chance: of unrelated adapters.",
        f"Error of the sum by rank: {errors}",
    )
    for text in give_advice(found):
        yield f"– {escape(text)}"
    yield from aside(
        "This is about weights. Which pictures are better, only pictures tell: dreamloom search."
    )
