"""The command that asks a running training for samples, a file, a stop or other prompts."""

from __future__ import annotations

from pathlib import Path

import click

from dreamloom.cli.options import PATH, LoomCommand, json_option
from dreamloom.cli.output import deliver
from dreamloom.cli.words import REQUEST

_DOES = {
    "sample": "draws validation samples",
    "save": "writes a checkpoint and the adapter",
    "stop": "writes a checkpoint and stops",
    "prompts": "draws these prompts from the next validation samples on",
}


@click.command(cls=LoomCommand)
@click.argument("run", type=PATH)
@click.argument("what", type=REQUEST)
@click.option("--prompt", "prompts", multiple=True, help="A new prompt; may be repeated.")
@json_option
def ask(run: Path, what: str, prompts: tuple[str, ...], json_target: str | None) -> None:
    """Ask the training that runs in RUN for something.

    WHAT is sample (draw validation samples now, into RUN/looks), save (write a checkpoint, and the
    adapter as it is now into RUN/saved), stop (as Ctrl-C does) or prompts (draw those of --prompt
    from now on; {subject} stands for the phrase). It is done after the update that is being
    computed, and changes nothing of what is learned.
    """
    from dreamloom.core import requests

    if prompts and what != "prompts":
        raise click.UsageError(f"--prompt belongs to prompts; {what} takes none.")
    if what == "prompts" and not prompts:
        raise click.UsageError("prompts wants at least one --prompt.")
    request = requests.ask(run, what, prompts)

    def show() -> None:
        click.echo(f"Asked: after the update that it is at, the training {_DOES[what]}.")

    deliver({"asked": what, "prompts": prompts, "request": request}, show, json_target)
