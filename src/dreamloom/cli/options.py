"""Options that several commands share: every setting by name, the file that is written, JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dreamloom.cli.examples import WithExamples
from dreamloom.cli.output import PRINT, print_note
from dreamloom.cli.words import BASE, DEVICE, PRESET, PRIOR, SETTING

if TYPE_CHECKING:
    from dreamloom.core.config.settings import LoomConfig

Callback = Callable[..., Any]


class SizeOption(click.ParamType[tuple[int, int]]):
    """Width and height in pixels, written as 768x512."""

    name = "WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Read ``768x512`` as (768, 512)."""
        if isinstance(value, tuple):
            return value
        sides = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", value.strip(), re.IGNORECASE)
        if sides is None:
            self.fail(f"{value!r} is no width and height, such as 768x512", param, ctx)
        return int(sides[1]), int(sides[2])


SIZE = SizeOption()


class _Path(click.Path):
    """A path that says something: an empty one would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is blank."""
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            self.fail(f"{value!r} names nothing.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number in a range; nan and inf are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is outside, or no number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _Adapter(_Path):
    """An adapter's path; one that the hub has, as user/name, is fetched first."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find where the adapter lies."""
        path = super().convert(value, param, ctx)
        # What is only being completed is not fetched.
        if not isinstance(value, str) or (ctx is not None and ctx.resilient_parsing):
            return path
        from dreamloom.lora.locating import locate_adapter

        return locate_adapter(value)


PATH = _Path(path_type=Path)
ADAPTER = _Adapter(path_type=Path)
"""An adapter that is only read: a file, PEFT's folder, or one of the hub."""


class LoomCommand(WithExamples):
    """A command whose ``--json`` may stand alone, to print, or name a .json file to write."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say which of the two it is, before click reads the words."""
        read: list[str] = []
        for number, word in enumerate(args):
            if word == "--":
                return super().parse_args(ctx, [*read, *args[number:]])
            following = args[number + 1] if number + 1 < len(args) else ""
            alone = word == "--json" and not following.lower().endswith(".json")
            read.append(f"--json={PRINT}" if alone else word)
        return super().parse_args(ctx, read)


class LoomGroup(WithExamples, click.Group):
    """A group of such commands."""

    command_class = LoomCommand


def add_options(*options: Callable[[Callback], Callback]) -> Callable[[Callback], Callback]:
    """Make a decorator that adds several options; the last is listed first."""

    def add(command: Callback) -> Callback:
        for option in options:
            command = option(command)
        return command

    return add


def unused_option(name: str, why: str) -> Callable[[Callback], Callback]:
    """Refuse an option that other commands have and that would change nothing in this one."""

    def refuse(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None:
            raise click.UsageError(f"{name} changes nothing here: {why}", ctx)

    return click.option(
        name, hidden=True, default=None, callback=refuse, expose_value=False, is_eager=True
    )


json_option = click.option(
    "--json",
    "json_target",
    metavar="[FILE.json]",
    help="Print JSON; or write it to FILE.json, and print words.",
)
"""What was found or made, for programs; see `output.deliver`."""

base_option = click.option(
    "--base", type=BASE, help="picturebook, sdxl, a hub id, a folder or a .safetensors file."
)
prior_option = click.option(
    "--prior", type=PRIOR, help="generated, base, none, or a folder of your own class images."
)
device_option = click.option("--device", type=DEVICE, help="auto, cpu, cuda, cuda:1 or mps.")
seed_option = click.option("--seed", type=int, help="Seed of every random draw.")
file_options = add_options(
    click.option("--config", "file", type=PATH, help="A TOML file of settings."),
    click.option(
        "--set", "sets", type=SETTING, multiple=True, metavar="NAME=VALUE", help="Any setting."
    ),
    click.option("--preset", type=PRESET, help="quick, standard (the default) or thorough."),
)

settings_options = add_options(seed_option, device_option, file_options)
"""Every setting can be given by these; see `read_settings`."""

scoring_options = add_options(
    unused_option("--seed", "scoring throws no dice that it would be the seed of."),
    device_option,
    file_options,
)
"""The same for commands that score."""

drawing_options = add_options(
    unused_option(
        "--seed",
        "pictures have the seeds from generate.first_seed on, so write "
        "--set generate.first_seed=NUMBER; --seeds says how many.",
    ),
    device_option,
    file_options,
)
"""The same for commands that draw."""

output_options = add_options(
    click.option("--overwrite", is_flag=True, help="Replace an existing file."),
    click.option("-o", "--out", type=PATH, required=True, help="The file to write."),
)
"""The file that a command writes."""


def read_settings(given: dict[str, Any]) -> LoomConfig:
    """Put a command's options over the preset and the file.

    Raises:
        ConfigError: As `load_config`.
    """
    from dreamloom.core.config.loading import load_config, name_prior

    overrides = {
        "preset": given["preset"],
        "seed": given.get("seed"),
        "device": given["device"],
        "base": given.get("base"),
        "subject.phrase": given.get("subject"),
        "subject.class_noun": given.get("class_noun"),
        "train.init_adapter": given.get("init_adapter"),
        "adapter.format": given.get("file_format"),
        "generate.schedulers": given.get("schedulers") or None,
        "generate.steps": given.get("steps") or None,
        "generate.images_per_prompt": given.get("seeds"),
        "generate.guidance": given.get("guidance"),
        "generate.negative_prompt": given.get("negative_prompt"),
        "generate.prompt_weights": given.get("prompt_weights") or None,
        "generate.width_px": (given.get("size") or (None, None))[0],
        "generate.height_px": (given.get("size") or (None, None))[1],
    }
    if (prior := given.get("prior")) is not None:
        overrides |= name_prior(prior)
    return load_config(
        file=given["file"], sets=given["sets"], overrides=overrides, observe=print_note
    )
