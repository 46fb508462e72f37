"""The commands for adapter files: parse, call one function of the library, show what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dreamloom.cli.options import ADAPTER, PATH, LoomCommand, json_option, output_options
from dreamloom.cli.output import deliver
from dreamloom.cli.words import BASE, DEVICE, FILE

if TYPE_CHECKING:
    from dreamloom.merging.files.recipe import Recipe

RANK_HELP = "full, a number such as 32, energy:0.995 or budget:100MB."
# Written out, for reading them from the library would load it; a test compares.
FORMATS = click.Choice(["auto", "peft", "kohya", "kohya-diffusers"])
PRECISIONS = click.Choice(["fp32", "fp16", "bf16"])
FORMAT_HELP = (
    "Whose names: kohya (SDXL's own blocks), which every program reads, kohya-diffusers (any "
    "blocks), peft for diffusers alone; auto is kohya where that can be."
)

format_option = click.option(
    "--format",
    type=FORMATS,
    default="auto",
    show_default=True,
    help=FORMAT_HELP,
)


@click.command(cls=LoomCommand)
@click.argument("parts", type=FILE, nargs=-1, metavar="[NAME=]FILE[:W]... | RECIPE.toml")
@click.option("-o", "--out", type=PATH, help="The merged .safetensors file.")
@click.option("--method", help="How they are merged; see --methods.  [default: sum]")
@click.option(
    "--set", "options", multiple=True, metavar="NAME=VALUE", help="A setting of the method; repeat."
)
@click.option("--rank", help=f"{RANK_HELP}  [default: full]")
@click.option(
    "--blocks",
    multiple=True,
    metavar="[NAME:]WEIGHTS",
    help="Weights of blocks, for one part or all: 'style=1.2, mid=0', or a list of numbers.",
)
@click.option("--format", type=FORMATS, help=f"{FORMAT_HELP}  [default: auto]")
@click.option("--precision", type=PRECISIONS, help="Of the numbers in the file.  [default: fp32]")
@click.option("--seed", type=int, help="Of methods that throw dice.  [default: 0]")
@click.option(
    "--base",
    type=BASE,
    help="The base model, for methods that ask it.  [default: as the adapters say]",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="NAME:TEXT",
    help="What the base model is asked for the part NAME; repeat.",
)
@click.option(
    "--joint-prompt",
    "joint",
    multiple=True,
    metavar="TEXT",
    help="What it is asked for all parts at once; repeat.",
)
@click.option("--device", type=DEVICE, help="Where the base model computes.  [default: auto]")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option(
    "--verify",
    is_flag=True,
    help="Merge again and compare; with a merged FILE and no -o, check that one.",
)
@click.option(
    "--inputs", type=PATH, help="Where --verify finds the inputs.  [default: beside the file]"
)
@click.option(
    "--methods",
    "list_methods",
    is_flag=True,
    help="List the methods and stop; with --method, tell all of that one.",
)
@json_option
@click.pass_obj
def merge(
    quiet: bool,
    /,
    parts: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    verify: bool,
    inputs: Path | None,
    list_methods: bool,
    json_target: str | None,
    **given: Any,
) -> None:
    """Merge adapters into one file that can be loaded alone.

    Each FILE may have a weight W, 1 if not, and a name, by which its weight can be changed later
    with 'dreamloom remix'. A FILE may be one of the hub, as user/name. A RECIPE.toml says all of it
    instead: the parts and how.
    """
    from dreamloom.display.adapters import format_ranks, render_method, render_methods
    from dreamloom.display.layout import say, show
    from dreamloom.display.progress import watch

    if list_methods:
        named = given["method"]
        rendered = render_method(named) if named else render_methods()
        return deliver(_list_methods(named), lambda: show(rendered), json_target)
    if verify and out is None and len(parts) == 1:
        return _verify(quiet, Path(parts[0]), inputs, given, json_target)
    if not parts or out is None:
        raise click.UsageError("Name adapters or a recipe, and the merged file with -o.")
    if inputs and not verify:
        raise click.UsageError("--inputs belongs to --verify.")
    from dreamloom.lora.readers import name_readers, tell_readers
    from dreamloom.merging.files.merge import carry_out
    from dreamloom.merging.files.verify import verify_merge

    recipe = _read_recipe(parts, given)
    with watch(quiet) as observe:
        combined = carry_out(recipe, out, overwrite, observe)
        files = [part.path for part in recipe.parts]
        verified = verify_merge(out, inputs, files, observe=observe) if verify else None

    def tell() -> None:
        adapter = combined.adapter
        what = f"{len(adapter.layers)} layers, {format_ranks(adapter.ranks.values())}"
        lost = f", {combined.error:.2%} off the uncut merge" if combined.error > 0 else ""
        say(f"The merged adapter: {out} ({what}{lost})")
        if verified:
            say(str(verified))
        say(tell_readers(out))

    made = {
        "adapter": out,
        "layers": len(combined.adapter.layers),
        "ranks": sorted(set(combined.adapter.ranks.values())),
        "error": combined.error,
        "verified": str(verified) if verified else None,
        "readers": name_readers(out),
    }
    deliver(made, tell, json_target)


def _list_methods(named: str | None) -> list[dict[str, Any]]:
    """List the merge methods, or the one that is named, with their settings."""
    from dreamloom.merging.methods import METHODS, find_method

    told = ("name", "summary", "formula", "source", "needs", "least", "most", "throws_dice")
    return [
        {name: getattr(method, name) for name in told}
        | {"options": [vars(option) for option in method.options]}
        for method in ([find_method(named)] if named else METHODS.values())
    ]


def _read_recipe(parts: tuple[str, ...], given: dict[str, Any]) -> Recipe:
    """Make a recipe of what was typed, or read it from its file."""
    from dreamloom.merging.files.recipe import (
        Recipe,
        name_parts,
        parse_options,
        parse_part,
        read_recipe,
        share_blocks,
        share_prompts,
    )
    from dreamloom.merging.ranks import parse_rank

    if len(parts) == 1 and parts[0].lower().endswith(".toml"):
        typed = [name for name, value in given.items() if value not in (None, ())]
        if typed:
            option = {"options": "set", "prompts": "prompt"}
            raise click.UsageError(
                f"The recipe says how to merge; write {option.get(typed[0], typed[0])} in it."
            )
        return read_recipe(Path(parts[0]))
    named = name_parts([parse_part(part) for part in parts])
    named = share_prompts(share_blocks(named, given["blocks"]), given["prompts"])
    method = given["method"] or "sum"
    _refuse_unused(method, given)
    rest = ("seed", "format", "precision", "base", "joint", "device")
    return Recipe(
        named,
        method,
        parse_options(method, given["options"]),
        parse_rank(given["rank"] or "full"),
        **{name: given[name] for name in rest if given[name]},
    )


def _refuse_unused(method: str, given: dict[str, Any]) -> None:
    """Refuse options that change nothing of what the method does."""
    from dreamloom.core.errors import ConfigError
    from dreamloom.merging.files.base_model import asks_base
    from dreamloom.merging.methods import find_method

    asks = asks_base(method)
    why = f"The method {method} asks no base model"
    unused = [] if asks else [("--base", given["base"]), ("--device", given["device"])]
    if not asks and not find_method(method).throws_dice:
        why = why if any(value for _, value in unused) else f"The method {method} throws no dice"
        unused.append(("--seed", given["seed"]))
    for option, value in unused:
        if value is not None:
            raise ConfigError(f"{why}, so {option} changes nothing.", "Leave it out.")


def _verify(
    quiet: bool,
    file: Path,
    inputs: Path | None,
    given: dict[str, Any],
    json_target: str | None,
) -> None:
    from dreamloom.display.layout import say
    from dreamloom.display.progress import watch
    from dreamloom.merging.files.base_model import Question
    from dreamloom.merging.files.verify import verify_merge

    question = Question(given.pop("base") or "", given.pop("device") or "auto")
    if any(value not in (None, ()) for value in given.values()):
        raise click.UsageError("--verify takes how a file was merged from the file itself.")
    with watch(quiet) as observe:
        verified = verify_merge(file, inputs, question=question, observe=observe)
    told = {"adapter": file, "verified": str(verified)}
    deliver(told, lambda: say(str(verified)), json_target)


@click.command(cls=LoomCommand)
@click.argument("merged", type=PATH, metavar="FILE")
@click.argument("weights", nargs=-1, metavar="[NAME=WEIGHT]...")
@click.option("-o", "--out", type=PATH, help="The file to write; without it, FILE is changed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@json_option
@click.pass_obj
def remix(
    quiet: bool,
    /,
    merged: Path,
    weights: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    json_target: str | None,
) -> None:
    """Give the parts of a merged FILE other weights.

    The files it was made from are not needed. Works where the merge was a plain sum at full rank.
    A weight of 0 takes a part out for good. Without weights, lists the parts.
    """
    from dreamloom.display.layout import say
    from dreamloom.display.progress import watch
    from dreamloom.lora.readers import name_readers, tell_readers
    from dreamloom.merging.files.reweight import list_parts, parse_changes, remix_merge

    if not weights:
        parts, obstacle = list_parts(merged)

        def show_parts() -> None:
            for part in parts:
                click.echo(f"{part.name}={part.weight:g}  ({part.file})")
            if obstacle:
                say(f"Their weights cannot be changed. {obstacle}")

        told = [{"name": one.name, "weight": one.weight, "file": one.file} for one in parts]
        return deliver({"parts": told, "obstacle": obstacle}, show_parts, json_target)
    changes = parse_changes(weights)
    with watch(quiet) as observe:
        remixed = remix_merge(merged, changes, out, overwrite, observe)
    made, layers = out or merged, len(remixed.layers)
    text = f"The merged adapter: {made} ({layers} layers)"
    written = {"adapter": made, "layers": layers, "readers": name_readers(made)}
    deliver(written, lambda: say(f"{text}\n{tell_readers(made)}"), json_target)


@click.command(cls=LoomCommand)
@click.argument("file", type=ADAPTER)
@click.option("--rank", required=True, help=RANK_HELP)
@format_option
@click.option("--precision", type=PRECISIONS, help="Of the numbers; as FILE if absent.")
@json_option
@output_options
@click.pass_obj
def resize(
    quiet: bool, /, file: Path, rank: str, out: Path, json_target: str | None, **given: Any
) -> None:
    """Cut an adapter to another rank, as near to FILE as there is."""
    from dreamloom.cli.sentences import show_cut
    from dreamloom.display.progress import watch
    from dreamloom.lora.readers import name_readers
    from dreamloom.merging.files.convert import resize_adapter
    from dreamloom.merging.ranks import parse_rank

    request = parse_rank(rank)
    with watch(quiet) as observe:
        combined = resize_adapter(file, out, request, observe=observe, **given)
    told = {"adapter": out, "layers": len(combined.adapter.layers), "error": combined.error}
    deliver(
        {**told, "readers": name_readers(out)},
        lambda: show_cut(out, combined.adapter, combined.error, str(file)),
        json_target,
    )


@click.command(cls=LoomCommand)
@click.argument("file", type=ADAPTER)
@format_option
@click.option("--precision", type=PRECISIONS, help="Of the numbers; as FILE if absent.")
@click.option(
    "--base", type=BASE, default="", help="The base model, for a DoRA or a base other than SDXL."
)
@click.option("--rank", help="Write a DoRA as the nearest LoRA: 32, or energy:0.99.")
@click.option(
    "--equal-ranks",
    "has_equal_ranks",
    is_flag=True,
    help="Fill all ranks up to the highest, for diffusers before 0.35.",
)
@click.option("--thumbnail", type=PATH, help="A picture that other programs show beside the file.")
@json_option
@output_options
@click.pass_obj
def convert(
    quiet: bool,
    /,
    file: Path,
    rank: str | None,
    out: Path,
    base: str,
    overwrite: bool,
    json_target: str | None,
    **given: Any,
) -> None:
    """Write an adapter in another format, with the same change."""
    from dreamloom.display.layout import say
    from dreamloom.display.progress import watch
    from dreamloom.lora.readers import name_readers, tell_readers
    from dreamloom.merging.files.convert import FileForm, convert_file
    from dreamloom.merging.ranks import parse_rank

    request = parse_rank(rank) if rank else None
    with watch(quiet) as observe:
        adapter = convert_file(file, out, FileForm(**given), base, request, overwrite, observe)
    approximated = adapter.metadata.get("dreamloom.approximation") if request else None
    error = json.loads(approximated)["relative_error"] if approximated else 0.0
    lost = f", {error:.2%} off" if approximated else ""
    layers = len(adapter.layer_names)
    deliver(
        {"adapter": out, "layers": layers, "error": error, "readers": name_readers(out)},
        lambda: say(f"The adapter: {out} ({layers} layers{lost})\n{tell_readers(out)}"),
        json_target,
    )


@click.command(cls=LoomCommand)
@click.argument("tuned", type=BASE)
@click.option("--base", type=BASE, required=True, help="The model that TUNED was made from.")
@click.option("--rank", required=True, help=RANK_HELP)
@format_option
@click.option(
    "--precision", type=PRECISIONS, default="fp16", show_default=True, help="Of the numbers."
)
@json_option
@output_options
@click.pass_obj
def extract(
    quiet: bool,
    /,
    tuned: str,
    base: str,
    rank: str,
    out: Path,
    json_target: str | None,
    **given: Any,
) -> None:
    """Make an adapter of what TUNED has changed of its base.

    Both are models: a name such as sdxl, a folder in diffusers' layout, or a checkpoint.
    """
    from dreamloom.cli.sentences import show_extracted
    from dreamloom.display.progress import watch
    from dreamloom.lora.readers import name_readers
    from dreamloom.merging.files.convert import extract_file
    from dreamloom.merging.ranks import parse_rank

    request = parse_rank(rank)
    with watch(quiet) as observe:
        found = extract_file((tuned, base), out, request, observe=observe, **given)
    told = {"error": found.error, "layers": found.errors, "readers": name_readers(out)}
    deliver(told, lambda: show_extracted(out, found), json_target)


@click.command(cls=LoomCommand)
@click.argument("parts", type=FILE, nargs=-1, required=True, metavar="FILE[:W]...")
@click.option(
    "--base", type=BASE, required=True, help="A name such as sdxl, a folder, or a checkpoint."
)
@click.option("-o", "--out", type=PATH, required=True, help="The folder or file to write.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@json_option
@click.pass_obj
def bake(
    quiet: bool,
    /,
    parts: tuple[str, ...],
    base: str,
    out: Path,
    overwrite: bool,
    json_target: str | None,
) -> None:
    """Write a base model with adapters of any kind added, as one model.

    It is laid out as the base: a folder if that is one, otherwise a .safetensors file. Each FILE
    may have a weight W, 1 if not.
    """
    from dreamloom.display.layout import say
    from dreamloom.display.progress import watch
    from dreamloom.merging.files.fuse import fuse_into_checkpoint
    from dreamloom.merging.files.recipe import parse_part

    parsed = [parse_part(part) for part in parts]
    with watch(quiet) as observe:
        fused = fuse_into_checkpoint(parsed, base, out, overwrite, observe)
    text = (
        f"The model: {out} ({fused.layers} layers changed; rounding to its precision lost "
        f"{fused.rounding:.2%} of the change)"
    )
    made = {"model": out, "layers": fused.layers, "rounding": fused.rounding}
    deliver(made, lambda: say(text), json_target)


@click.command(cls=LoomCommand)
@click.argument("one", type=FILE, metavar="A[:W]")
@click.argument("other", type=FILE, metavar="B[:W]")
@json_option
@click.option("--picture", type=PATH, help="Draw heat maps there, as .png.")
@click.pass_obj
def diagnose(
    quiet: bool, /, one: str, other: str, json_target: str | None, picture: Path | None
) -> None:
    """Say what adapters A and B have in common, and how to merge."""
    from dreamloom.core.run_folder import atomic_path
    from dreamloom.display.adapters import render_diagnosis
    from dreamloom.display.layout import show
    from dreamloom.display.progress import watch
    from dreamloom.merging.diagnose.advice import give_advice
    from dreamloom.merging.diagnose.picture import draw_diagnosis
    from dreamloom.merging.files.inspect import diagnose_files
    from dreamloom.merging.files.recipe import parse_part

    if picture and picture.suffix.lower() != ".png":
        raise click.UsageError("--picture writes .png.")
    with watch(quiet) as observe:
        found = diagnose_files(parse_part(one), parse_part(other), observe)
    if picture:
        with atomic_path(picture) as temporary:
            draw_diagnosis(found).save(temporary)
    told = found.as_json() | {"advice": give_advice(found)}
    deliver(told, lambda: show(render_diagnosis(found)), json_target)


@click.command(cls=LoomCommand)
@click.argument("file", type=ADAPTER)
@json_option
def inspect(file: Path, json_target: str | None) -> None:
    """Tell what an adapter file holds and how it was made."""
    from dreamloom.display.adapters import render_inspected
    from dreamloom.display.layout import show
    from dreamloom.merging.files.inspect import inspect_file

    found = inspect_file(file)
    deliver(found, lambda: show(render_inspected(found)), json_target)


ADAPTER_COMMANDS = (merge, remix, inspect, diagnose, resize, convert, extract, bake)
