"""Options that several commands share: every setting by name, and the file that is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dreamloom.core.config.settings import LoomConfig

PATH = click.Path(path_type=Path)
Command = Callable[..., Any]


class Size(click.ParamType[tuple[int, int]]):
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


SIZE = Size()


def add_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make a decorator that adds several options; the last is listed first."""

    def add(command: Command) -> Command:
        for option in options:
            command = option(command)
        return command

    return add


settings_options = add_options(
    click.option("--seed", type=int, help="Seed of every random draw."),
    click.option("--device", help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--config", "file", type=PATH, help="A TOML file of settings."),
    click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Any setting."),
    click.option("--preset", help="quick, standard (the default) or thorough."),
)
"""Every setting can be given by these; see `read_settings`."""

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
    from dreamloom.cli.console import print_note
    from dreamloom.core.config.loading import load_config

    overrides = {
        "preset": given["preset"],
        "seed": given["seed"],
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
    prior = given.get("prior")
    if prior in {"generated", "base", "none"}:
        overrides["priors.kind"] = prior
    elif prior:
        overrides |= {"priors.kind": "folder", "priors.folder": prior}
    return load_config(
        file=given["file"], sets=given["sets"], overrides=overrides, observe=print_note
    )
