"""Lines and tables: put together, printed, and turned into text or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

_WIDTH = 100
# A notebook's own font and colours, whatever its theme.
_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'
    "'DejaVu Sans Mono',consolas,'Courier New',monospace\"><code>{code}</code></pre>"
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make a table without lines, its cells in rich's markup."""
    made = Table(*head, box=None)
    for row in rows:
        made.add_row(*row)
    return made


def aside(*texts: str | None) -> Iterator[RenderableType]:
    """Lay out in grey what is worth knowing beside; what is empty is left out."""
    for text in filter(None, texts):
        yield f"[dim]{escape(text)}[/dim]"


def show(things: Iterable[RenderableType]) -> None:
    """Print texts and tables on standard output, as wide as the terminal is."""
    for thing in things:
        Console(highlight=False, emoji=False).print(thing)


def say(text: str) -> None:
    """Print a sentence: broken between words on a terminal, in one line for another program."""
    console = Console(highlight=False, emoji=False)
    console.print(escape(text), soft_wrap=not console.is_terminal)


def to_text(things: Iterable[RenderableType], width: int = _WIDTH) -> str:
    """Write texts and tables as plain text, in lines of at most ``width`` signs."""
    console = Console(file=StringIO(), width=width, highlight=False, emoji=False)
    with console.capture() as written:
        for thing in things:
            console.print(thing)
    return "\n".join(line.rstrip() for line in written.get().splitlines())


def to_html(things: Iterable[RenderableType], width: int = _WIDTH) -> str:
    """Write them as HTML that needs no style sheet; what they say is escaped."""
    console = Console(file=StringIO(), record=True, width=width, highlight=False, emoji=False)
    for thing in things:
        console.print(thing)
    return console.export_html(inline_styles=True, code_format=_HTML)
