"""The commands for models that evaluation uses, and for the embedded one: list, fetch, find."""

from __future__ import annotations

from pathlib import Path

import click

from dreamloom.cli.options import PATH, LoomGroup, json_option
from dreamloom.cli.output import deliver
from dreamloom.cli.words import EMBEDDED, MODEL


@click.group(cls=LoomGroup)
def models() -> None:
    """List, fetch and find the models that evaluation uses."""


@models.command("list")
@json_option
def models_list(json_target: str | None) -> None:
    """List the models: what for, licence, size, and whether they are here."""
    from dreamloom.display.layout import show
    from dreamloom.display.tables import render_models
    from dreamloom.evaluation.encoders.store import list_models

    listed = list_models()
    found = [line.as_json() for line in listed]
    deliver(found, lambda: show(render_models(listed)), json_target)


@models.command("fetch")
@click.argument("names", type=MODEL, nargs=-1, required=True, metavar="NAME...")
@click.option("--from", "source", type=PATH, help="Take them from a folder or file instead.")
def models_fetch(names: tuple[str, ...], source: Path | None) -> None:
    """Fetch models, pinned and compared by hash; or carry them in with --from."""
    from dreamloom.evaluation.encoders.catalogue import find_model

    for name in names:
        find_model(name)  # a wrong name is told before anything is fetched
    from dreamloom.evaluation.encoders.fetching import fetch_model

    for name in names:
        click.echo(f"{name}: {fetch_model(name, source)}")


@models.command("path")
@click.argument("name", type=EMBEDDED)
def models_path(name: str) -> None:
    """Print the folder of an embedded model in diffusers' layout: picturebook."""
    from dreamloom.core.errors import BaseModelError
    from dreamloom.picturebook import weights_folder

    if name != "picturebook":
        raise BaseModelError(f"{name} is not embedded.", "The embedded model is picturebook.")
    click.echo(weights_folder())
