"""The command that draws a grid: parse, call the library, show what it says."""

from __future__ import annotations

from typing import Any

import click

from dreamloom.cli.options import (
    PATH,
    LoomCommand,
    Number,
    drawing_options,
    json_option,
    read_settings,
)
from dreamloom.cli.output import deliver
from dreamloom.cli.words import AXIS, BASE, FILE, PACK, SCHEDULER

X_HELP = (
    "What changes from left to right: checkpoint=100,200,final (updates of --run, or files), "
    "weight=0,0.5,1 (of all adapters; weight:2 is the second's), scheduler=ddim,dpm++, "
    "steps=10,20, guidance=3,5 or prompt='A|B'. Given again, its values follow."
)


@click.command(cls=LoomCommand)
@click.option("--base", type=BASE, help="The base model; the adapters' own where they say so.")
@click.option(
    "--adapter", "adapters", type=FILE, multiple=True, metavar="FILE[:W]", help="May be repeated."
)
@click.option("--x", type=AXIS, multiple=True, required=True, metavar="NAME=VALUES", help=X_HELP)
@click.option(
    "--y", type=AXIS, multiple=True, metavar="NAME=VALUES", help="Another one, from top to bottom."
)
@click.option("--prompt", "prompts", multiple=True, help="May be repeated.")
@click.option(
    "--pack", "packs", type=PACK, multiple=True, help="A list of prompts; see 'dreamloom packs'."
)
@click.option("--subject", help="The subject in prompts; the adapter's own where it says so.")
@click.option("--class-noun", help="What it is one of; the adapter's own, or the last word.")
@click.option("--run", type=PATH, help="Whose updates --x checkpoint names; by default --out.")
@click.option("--scheduler", type=SCHEDULER, help="ddim, pndm, euler, dpm++ …")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--seeds", type=int, help="Pictures of each prompt in each cell, of the same seeds.")
@click.option("--guidance", type=Number(min=0), help="Classifier-free guidance.")
@click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.")
@click.option(
    "--photos",
    type=PATH,
    help="The subject's photos, to measure what each cell of weight:1 and weight:2 keeps of it.",
)
@click.option("--style-photos", type=PATH, help="Pictures in the style, to compare with.")
@click.option("--name", default="grid", show_default=True, help="The grid's name.")
@click.option("--out", type=PATH, required=True, help="A run's folder, or a new one.")
@json_option
@drawing_options
@click.pass_obj
def grid(
    quiet: bool,
    /,
    scheduler: str | None,
    steps: int | None,
    json_target: str | None,
    **given: Any,
) -> None:
    """Draw a grid of pictures that changes in one or two ways.

    Every cell has the same seeds and is a set of pictures in OUT/images. OUT/grids/NAME.json lists
    the cells, NAME.png shows the first picture of each. What is there is not drawn again.
    """
    from dataclasses import fields

    from dreamloom.core.device import pick_runtime
    from dreamloom.core.run_folder import RunFolder
    from dreamloom.display.progress import watch
    from dreamloom.experiments.grid.files import grid_file, sheet_file
    from dreamloom.experiments.grid.planning import GridRequest
    from dreamloom.experiments.grid.running import draw_grid

    _refuse_said_twice(given, {"scheduler": scheduler, "steps": steps})
    request = GridRequest(**{one.name: given.pop(one.name) for one in fields(GridRequest)})
    several = {"schedulers": scheduler and (scheduler,), "steps": steps is not None and (steps,)}
    config = read_settings({**given, **several})
    with watch(quiet) as observe:
        found = draw_grid(request, config, pick_runtime(config.device, config.precision), observe)
    run = RunFolder(request.out)

    def show() -> None:
        click.echo(f"The sheet: {sheet_file(run, found.name)}")
        click.echo(f"The grid: {grid_file(run, found.name)}")

    deliver(found, show, json_target)


def _refuse_said_twice(given: dict[str, Any], more: dict[str, Any]) -> None:
    """Refuse an option that an axis would override."""
    changed = {text.partition("=")[0].strip() for text in (*given["x"], *given["y"])}
    for name, value in {"guidance": given["guidance"], **more}.items():
        if value is not None and name in changed:
            raise click.UsageError(
                f"The axis {name} sets what --{name} sets, too: leave --{name} out."
            )
