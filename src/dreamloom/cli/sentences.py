"""What a command wrote, in sentences: an adapter cut to a rank, or taken out of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from dreamloom.display.layout import aside, say, show

if TYPE_CHECKING:
    from pathlib import Path

    from dreamloom.lora.adapter import Adapter
    from dreamloom.merging.extract import Extracted

# From here on an error is more than 0.00%.
_SHOWN = 5e-5


def show_cut(out: Path, adapter: Adapter, error: float, whole: str) -> None:
    """Print what an adapter that was cut to a rank has become, and how far it is off the whole."""
    from dreamloom.display.adapters import format_ranks
    from dreamloom.lora.readers import tell_readers

    lost = f"{error:.2%} off {whole}" if error >= _SHOWN else "nothing lost"
    ranks = format_ranks(adapter.ranks.values())
    say(f"The adapter: {out} ({len(adapter.layers)} layers, {ranks}, {lost})")
    say(tell_readers(out))


def show_extracted(out: Path, found: Extracted) -> None:
    """Print what of two models' difference an adapter holds."""
    show_cut(out, found.adapter, found.error, "all that differs")
    worst = max(found.errors, key=found.errors.__getitem__)
    if found.errors[worst] >= _SHOWN:
        show(aside(f"Worst held: {worst}, {found.errors[worst]:.2%} off."))
    if found.others:
        shown = ", ".join(found.others[:3]) + (" …" if len(found.others) > 3 else "")
        what = f"{len(found.others)} other tensors differ, too, which no adapter changes: {shown}."
        show([f"[yellow]{escape(what)}[/yellow]"])
