"""The command that pushes an adapter to the hub: parse, call the library, show what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dreamloom.cli.options import PATH, LoomCommand, json_option
from dreamloom.cli.output import deliver, print_note


@click.command(cls=LoomCommand)
@click.argument("run", type=PATH)
@click.argument("name")
@click.option("--public", is_flag=True, help="Let everybody see it; else only you can.")
@click.option("--yes", is_flag=True, help="Replace what is on the hub without asking.")
@click.option("--pictures", metavar="SET", help="The set that sample pictures are from.")
@click.option(
    "--samples",
    type=click.IntRange(0, 50),
    default=8,
    show_default=True,
    help="Sample pictures at most; 0 for none.",
)
@click.option(
    "--licence",
    "--license",
    default="",
    metavar="NAME",
    help="As the hub calls it: openrail++, cc-by-nc-4.0, other …  [default: SDXL's own, on SDXL]",
)
@click.option("--out", type=PATH, help="Write the files here instead, to look at them.")
@json_option
@click.pass_obj
def push(
    quiet: bool,
    /,
    public: bool,
    yes: bool,
    out: Path | None,
    json_target: str | None,
    **given: Any,
) -> None:
    """Push the adapter of RUN to the Hugging Face hub, as NAME or USER/NAME.

    Beside the adapter goes a model card with settings, scores and a few drawn pictures; nothing
    else: no photos, captions, paths or states of the optimizer. It is private without --public.
    """
    from dreamloom.core.events import silent
    from dreamloom.display.layout import say
    from dreamloom.hub.push import push_run
    from dreamloom.hub.upload import UploadRequest, write_upload

    request = UploadRequest(**given)
    if out is not None:
        if public or yes:
            raise click.UsageError("--out pushes nothing: --public and --yes change nothing there.")
        upload = write_upload(request, out)
        told = {"folder": out, "files": upload.files, "notes": upload.notes}

        def show_files() -> None:
            for text in upload.notes:
                say(f"Note: {text}.")
            click.echo(f"What would be pushed, {len(upload.files)} files: {out}")

        return deliver(told, show_files, json_target)

    def ask(sentence: str) -> bool:
        # Without a terminal nobody would answer.
        return yes or (sys.stdin.isatty() and click.confirm(f"{sentence}. Push?", err=True))

    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    pushed = push_run(request, public, ask, silent if quiet else print_note)

    def show() -> None:
        seen = "only you can see it" if pushed.private else "everybody can see it"
        say(f"On the hub: {pushed.url} ({len(pushed.files)} files; {seen})")
        click.echo(f"To draw with it: dreamloom generate --adapter {pushed.repository}")

    deliver(pushed, show, json_target)
