"""The commands for adapter files: parse, call one function of the library, show what it says."""

from __future__ import annotations

import json
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("parts", nargs=-1, required=True, metavar="FILE[:W]...")
@click.option("-o", "--out", type=PATH, required=True, help="The merged .safetensors file.")
@click.option("--method", default="sum", show_default=True, help="sum: the exact weighted sum.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.pass_obj
def merge(quiet: bool, /, parts: tuple[str, ...], out: Path, method: str, overwrite: bool) -> None:
    """Merge adapters into one file that can be loaded alone."""
    from dreamloom.console import watch
    from dreamloom.merge import merge_adapters, parse_part

    with watch(quiet) as observe:
        parsed = [parse_part(part) for part in parts]
        merged = merge_adapters(parsed, out, method, overwrite, observe)
    ranks = sorted(set(merged.ranks.values()))
    click.echo(f"The merged adapter: {out} ({len(merged.layers)} layers, rank {ranks[-1]})")


@click.command()
@click.argument("file", type=PATH)
def inspect(file: Path) -> None:
    """Tell what an adapter file holds and how it was made."""
    from dreamloom.adapters import describe_adapter

    click.echo(json.dumps(describe_adapter(file), indent=2))


ADAPTER_COMMANDS = (merge, inspect)
