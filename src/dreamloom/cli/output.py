"""What the terminal, a pipe or a file can take: any encoding, a reader that leaves, JSON."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dreamloom.core.events import Event, Note

PRINT = "-"
"""What ``--json`` without a file stands for: standard output."""

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’‚", "'"),
        **dict.fromkeys("–—−‒", "-"),
        **dict.fromkeys("·•", "."),
        **dict.fromkeys("┃│‖", "|"),
        **dict.fromkeys("━─", "-"),
        "…": "...",
        "×": "x",
        "→": "->",
        "▶": ">",
        "≥": ">=",
        "≤": "<=",
        "λ": "lambda",
        "Δ": "Delta",
        "Σ": "sum",
        "ε": "epsilon",
    }
)


def take_any_text() -> None:
    """Let the standard streams write any text: signs that their encoding lacks are spelled out."""
    codecs.register_error("dreamloom", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dreamloom")


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = []
    for sign in error.object[error.start : error.end]:
        plain = sign.translate(_PLAIN)
        if not plain.isascii():
            plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
        if 0xDC80 <= ord(sign) <= 0xDCFF:
            # A byte of a file's name that is not UTF-8.
            plain = f"\\x{ord(sign) - 0xDC00:02x}"
        written.append(plain or sign.encode("ascii", "backslashreplace").decode())
    return "".join(written), error.end


def is_closed(error: OSError) -> bool:
    """Say whether whoever read the output has gone, as ``head`` does."""
    # Windows says EINVAL of a pipe that nobody reads.
    return error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL)


def flush() -> int:
    """Write what is still waiting, and give the exit status: 1 if nobody can take it."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            status = 1
            drop(stream)
            if isinstance(error, OSError) and not is_closed(error) and stream is sys.stdout:
                click.echo(f"Error: the output cannot be written: {error.strerror}.", err=True)
    return status


def drop(stream: Any) -> None:
    """Let a stream lead nowhere, so that Python does not complain of it when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        return


def print_json(value: Any) -> None:
    """Print a value as JSON that any encoding can carry."""
    from dreamloom.core.run_folder import to_json

    plain = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"
    text = to_json(value)
    click.echo(json.dumps(json.loads(text), indent=2) if plain else text)


def deliver(found: Any, show: Callable[[], None], target: str | None) -> None:
    """Show what was found, or print it as JSON, or show it and write it to a file, too.

    Args:
        found: The same for programs.
        show: Shows it in words.
        target: What ``--json`` was given: None for nothing, `PRINT`, or a file's name.
    """
    from dreamloom.core.run_folder import write_json

    if target == PRINT:
        print_json(found)
        return
    if target is not None:
        write_json(Path(target), found)
    show()


def print_note(event: Event) -> None:
    """Print a note on the error output, where no picture of the progress is drawn yet."""
    if isinstance(event, Note):
        click.echo(f"Note: {event.text}.", err=True)


def command_line(*words: object) -> str:
    """Write a command so that it can be pasted into a shell."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)
