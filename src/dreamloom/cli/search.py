"""The command that searches for merge weights: parse, call the library, show what it says."""

from __future__ import annotations

from typing import Any

import click

from dreamloom.cli.options import (
    ADAPTER,
    PATH,
    LoomCommand,
    Number,
    json_option,
    read_settings,
    settings_options,
)
from dreamloom.cli.output import deliver
from dreamloom.cli.words import BASE, PACK


@click.command(cls=LoomCommand)
@click.argument("subject", type=ADAPTER, metavar="A")
@click.argument("style", type=ADAPTER, metavar="B")
@click.option("--base", type=BASE, help="The base model; the adapters' own where they say so.")
@click.option("--photos", type=PATH, required=True, help="The subject's photos.")
@click.option("--style-photos", type=PATH, help="Pictures in the style, to compare with.")
@click.option(
    "--prompt", "prompts", multiple=True, help="{subject} stands for the subject; repeat."
)
@click.option(
    "--pack", "packs", type=PACK, multiple=True, help="A list of prompts; see 'dreamloom packs'."
)
@click.option("--trigger", help="Words that call the style; B's own where it says so.")
@click.option("--subject", "phrase", help="The subject in prompts; A's own where it says so.")
@click.option("--class-noun", help="What the subject is one of; A's own, or the last word.")
@click.option("--budget", default=200, show_default=True, help="Pictures to draw, in all.")
@click.option(
    "--blocks", "by_block", is_flag=True, help="Search weights of blocks: down, mid and up."
)
@click.option(
    "--between",
    type=Number(min=0),
    nargs=2,
    default=(0.3, 1.5),
    show_default=True,
    metavar="LOW HIGH",
    help="Search weights from LOW to HIGH.",
)
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes of one thread.")
@click.option("--out", type=PATH, required=True, help="The search's folder, or a new one.")
@json_option
@settings_options
@click.pass_obj
def search(quiet: bool, /, steps: int | None, json_target: str | None, **given: Any) -> None:
    """Find weights for merging subject A with style B.

    Draws candidates on the same prompts and seeds, keeps the better half again and again, and
    compares the winner with the plain sum and with 0.8 and 1.0 on prompts and seeds held out.
    """
    from dataclasses import fields

    from dreamloom.display.layout import say
    from dreamloom.display.progress import watch
    from dreamloom.experiments.merge_search.request import SearchRequest
    from dreamloom.experiments.merge_search.running import run_search

    asked = {field.name: given.pop(field.name) for field in fields(SearchRequest)}
    config = read_settings({**given, "steps": (steps,) if steps else None})
    with watch(quiet) as observe:
        found = run_search(SearchRequest(**asked), config, observe)

    def show() -> None:
        say(found.verdict)
        click.echo(f"To merge with the winner's weights: {found.command}")
        click.echo(f"Everything: {asked['out'] / 'search.md'}")

    deliver(found, show, json_target)
