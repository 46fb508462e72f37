"""The command line: parse, call one function of the library, show what it says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dreamloom.cli.adapters import ADAPTER_COMMANDS, FORMAT_HELP
from dreamloom.cli.ask import ask
from dreamloom.cli.commands import Commands
from dreamloom.cli.completion import completion
from dreamloom.cli.doctor import doctor
from dreamloom.cli.grid import grid
from dreamloom.cli.models import models
from dreamloom.cli.options import (
    PATH,
    SIZE,
    Number,
    base_option,
    device_option,
    drawing_options,
    file_options,
    json_option,
    prior_option,
    read_settings,
    scoring_options,
    settings_options,
    unused_option,
)
from dreamloom.cli.output import command_line, deliver
from dreamloom.cli.push import push
from dreamloom.cli.search import search
from dreamloom.cli.studio import studio
from dreamloom.cli.tokens import token
from dreamloom.cli.words import (
    ADAPTER_FORMAT,
    BASE,
    COMPOSE,
    FILE,
    PACK,
    SCHEDULER,
    WORKPLACE,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dreamloom.core.config.settings import LoomConfig
    from dreamloom.core.device import Runtime

# Written out, for reading the packs' own list would slow every --help down; a test compares.
PACKS_HELP = (
    "A list of prompts, may be repeated: person-v1, object-v1, live-v1, class-v1, unrelated-v1, "
    "seed-v1, pixel-v1, picturebook-v1, picturebook-class-v1. 'dreamloom packs NAME' shows one."
)

ADAPTER_HELP = (
    "May be repeated. W is its weight, 1 if not given; FILE:1@0,0.4@0.5,0@1 has weights that "
    "follow the drawing, from its first step (0) to its last (1). FILE may be one of the hub: "
    "user/name[@revision][:file.safetensors]."
)
COMPOSE_HELP = (
    "How several adapters share a drawing: sum, switch[:STEPS] (they take turns) or "
    "k-lora[:ALPHA,BETA] (each layer goes over from the first to the second)."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dreamloom")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def main(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """Weave yourself into a diffusion model: teach, draw, measure, merge."""
    ctx.obj = quiet


@main.command()
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True)
@json_option
@settings_options
@click.pass_obj
def demo(quiet: bool, /, out: Path, json_target: str | None, **given: Any) -> None:
    """Run the whole journey on the embedded model, without a GPU."""
    from dreamloom.display.progress import watch
    from dreamloom.experiments.demo import run_demo

    config = read_settings(given)
    with watch(quiet) as observe:
        report = run_demo(out, config, _runtime(config), observe)
    _tell("The report", {"report": report}, json_target)


@main.command()
@click.argument("folder", type=PATH)
@click.option(
    "--resolution",
    type=click.IntRange(8, 16384),
    default=1024,
    show_default=True,
    help="Side in pixels to train at.",
)
@click.option("--faces", is_flag=True, help="Look for faces, too: none, several, small, cut off.")
@click.option(
    "--base", type=BASE, help="With --faces: picturebook for drawings; others for photographs."
)
@json_option
def photos(
    folder: Path, resolution: int, faces: bool, base: str | None, json_target: str | None
) -> None:
    """Check photos: what is usable, what is not ideal, what to add."""
    from dreamloom.data.photos.check import check_photos
    from dreamloom.display.layout import show
    from dreamloom.display.tables import render_photo_check

    if base is not None and not faces:
        raise click.UsageError("--base belongs to --faces.")
    if faces:
        from dreamloom.evaluation.photo_faces import check_photos_and_faces

        check = check_photos_and_faces(folder, resolution, base or "")
    else:
        check = check_photos(folder, resolution)
    deliver(check, lambda: show(render_photo_check(check)), json_target)
    if not check.usable:
        click.get_current_context().exit(1)


@main.command()
@click.argument("folder", type=PATH)
@click.option("--subject", help='A rare word and the class noun, like "rraj person".')
@click.option("--class-noun", help="What the subject is one of: person, dog, backpack.")
@base_option
@click.option("--out", type=PATH, help="The run's folder; by default runs/ and the subject.")
@prior_option
@click.option("--format", "file_format", type=ADAPTER_FORMAT, help=FORMAT_HELP)
@click.option(
    "--from", "init_adapter", type=FILE, metavar="FILE", help="Begin from this LoRA's weights."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out; it must exist.")
@json_option
@settings_options
@click.pass_obj
def train(
    quiet: bool,
    /,
    folder: Path,
    out: Path | None,
    resume: bool,
    json_target: str | None,
    **given: Any,
) -> None:
    """Teach a base model one subject from the photos in FOLDER."""
    from dreamloom.display.progress import watch
    from dreamloom.lora.readers import name_readers, tell_readers
    from dreamloom.pipeline.train import train_folder

    config = read_settings(given)
    # Of several processes that a launcher started, the first alone talks.
    is_first = os.environ.get("RANK", "0") == "0"
    with watch(quiet or not is_first) as observe:
        run, config, _ = train_folder(folder, config, out, resume, observe)
    if not is_first:
        return
    # Adapters name their base, but not where a folder or a file of it lies.
    base = ("--base", config.base) if Path(config.base).exists() else ()
    words = ("--adapter", run.adapter, *base, "--pack", "seed-v1", "--seeds", 1)
    following = command_line("dreamloom", "generate", *words, "--name", "first", "--out", run.path)
    readers = name_readers(run.adapter)
    made = {"adapter": run.adapter, "run": out, "next": following, "readers": readers}

    def show() -> None:
        click.echo(f"The adapter: {run.adapter}")
        click.echo(tell_readers(run.adapter))
        click.echo(f"Next: {following}")

    deliver(made, show, json_target)


@main.command()
@base_option
@click.option("--gpu-memory", metavar="SIZE", help="Such as 12GiB; by default this GPU's own.")
@click.option(
    "--gpu-rate",
    type=Number(min=0, min_open=True),
    metavar="TFLOPS",
    help="Of matrix products, for the time.",
)
@click.option(
    "--photos", type=click.IntRange(min=1), default=6, show_default=True, help="How many there are."
)
@prior_option
@json_option
@unused_option("--seed", "nothing is drawn.")
@device_option
@file_options
def plan(
    gpu_memory: str | None,
    gpu_rate: float | None,
    photos: int,
    json_target: str | None,
    **given: Any,
) -> None:
    """Predict a training's memory and time, and pick the fastest settings that fit.

    Needs no GPU. Sizes are read as 12GiB (2^30 bytes each) or 12GB (10^9 bytes each).
    """
    from dreamloom.memory.device_memory import find_memory
    from dreamloom.memory.plan import plan_run

    config = read_settings(given)
    memory = find_memory(gpu_memory, config)
    planned = plan_run(
        config,
        memory,
        photos=photos,
        rate_tflops=gpu_rate,
        on_count=lambda case: click.echo(f"counting: {case}", err=True),
    )
    deliver(planned.as_dict(), lambda: click.echo("\n".join(planned.lines())), json_target)


@main.command()
@click.option("--base", type=BASE, help="The base model; the adapter's own where it says so.")
@click.option(
    "--adapter", "adapters", type=FILE, multiple=True, metavar="FILE[:W]", help=ADAPTER_HELP
)
@click.option("--compose", type=COMPOSE, default="sum", show_default=True, help=COMPOSE_HELP)
@click.option(
    "--conditional-only", is_flag=True, help="Keep adapters out of guidance's other half."
)
@click.option("--prompt", "prompts", multiple=True, help="May be repeated.")
@click.option("--pack", "packs", type=PACK, multiple=True, help=PACKS_HELP)
@click.option("--subject", help="The subject in prompts; the adapter's own where it says so.")
@click.option("--class-noun", help="What it is one of; the adapter's own, or the last word.")
@click.option(
    "--scheduler", "schedulers", type=SCHEDULER, multiple=True, help="ddim, pndm, euler, dpm++ …"
)
@click.option("--steps", multiple=True, type=int, help="Denoising steps; may be repeated.")
@click.option("--seeds", type=int, help="Pictures of each prompt.")
@click.option("--guidance", type=Number(min=0), help="Classifier-free guidance.")
@click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.")
@click.option("--prompt-weights", is_flag=True, help="Read (word:1.2), (word) and [word].")
@click.option("--size", type=SIZE, help="Width and height, such as 768x512; by default the base's.")
@click.option("--floor", is_flag=True, help="Draw the same with the base model, to compare.")
@click.option("--name", default="pictures", show_default=True, help="The set's name.")
@click.option("--out", type=PATH, required=True, help="A run's folder, or a new one.")
@json_option
@drawing_options
@click.pass_obj
def generate(quiet: bool, /, json_target: str | None, **given: Any) -> None:
    """Draw prompts with adapters, seeds and schedulers."""
    from dataclasses import fields

    from dreamloom.display.progress import watch
    from dreamloom.pipeline.draw import GenerateRequest, draw

    request = GenerateRequest(
        **{field.name: given.pop(field.name) for field in fields(GenerateRequest)}
    )
    config = read_settings(given)
    with watch(quiet) as observe:
        folders = draw(request, config, _runtime(config), observe)

    def show() -> None:
        for folder in folders:
            click.echo(f"The pictures: {folder}")

    deliver({"pictures": folders}, show, json_target)


@main.command()
@click.argument("name", type=PACK, required=False)
@json_option
def packs(name: str | None, json_target: str | None) -> None:
    """List prompt packs, or the prompts of the pack NAME.

    Each prompt stands with what it may change.
    """
    from dreamloom.data.prompts.packs import PACK_NAMES
    from dreamloom.display.layout import show
    from dreamloom.display.tables import render_pack, render_packs
    from dreamloom.pipeline.draw import find_pack

    found = [find_pack(one) for one in ([name] if name else PACK_NAMES)]
    deliver(
        found, lambda: show(render_pack(found[0]) if name else render_packs(found)), json_target
    )


@main.command()
@click.argument("images", type=PATH)
@click.option("--photos", "photos_folder", type=PATH, required=True, help="The subject's photos.")
@click.option("--floor", type=PATH, help="The base model's pictures of the same prompts and seeds.")
@click.option("--strangers", type=PATH, help="Others of the class; the run's class images if not.")
@click.option("--subject", help='The subject\'s phrase in the prompts: "rraj person".')
@click.option("--class-noun", help="What stands for it when prompts are scored.")
@json_option
@click.option("--as-seed", is_flag=True, help="Show what a faulty script says, by fault.")
@click.option("--target-text", metavar="TEXT", help="The text that the script was given.")
@scoring_options
@click.pass_obj
def evaluate(quiet: bool, /, images: Path, json_target: str | None, **given: Any) -> None:
    """Score the pictures in IMAGES against the subject's photos."""
    from dreamloom.display.layout import show
    from dreamloom.display.progress import watch
    from dreamloom.display.tables import render_audit, render_scorecard
    from dreamloom.experiments.seed_audit_files import score_as_seed
    from dreamloom.pipeline.score import score

    photos, floor, target = given["photos_folder"], given["floor"], given["target_text"]
    if target and not given["as_seed"]:
        raise click.UsageError("--target-text belongs to --as-seed.")
    config = read_settings(given)
    found: Any
    told: Iterable[RenderableType]
    with watch(quiet) as observe:
        if given["as_seed"]:
            found = score_as_seed(images, photos, config, target, floor, observe)
            told = render_audit(found)
        else:
            others = given["strangers"]
            found = score(images, photos, config, floor, others, observe)
            told = render_scorecard(found)
    deliver(found, lambda: show(told), json_target)


@main.command()
@click.argument("first", type=FILE, metavar="A")
@click.argument("second", type=FILE, metavar="B")
@click.option("--score", "measures", multiple=True, metavar="NAME", help="This one only; repeat.")
@json_option
def compare(first: str, second: str, measures: tuple[str, ...], json_target: str | None) -> None:
    """Say what changed from A to B, pair by pair.

    A and B are files that 'evaluate --json FILE.json' wrote, or RUN:SET, a run and a set of its
    pictures.
    """
    from dreamloom.display.layout import show
    from dreamloom.display.tables import render_comparisons
    from dreamloom.evaluation.compare import compare_cards
    from dreamloom.evaluation.scorecard_files import find_scorecard

    compared = compare_cards(find_scorecard(first), find_scorecard(second), measures or None)
    deliver(compared, lambda: show(render_comparisons(compared)), json_target)


@main.command()
@click.argument("merged", type=PATH)
@click.option("--base", "base_images", type=PATH, required=True, help="Drawn without adapters.")
@click.option("--subject", "subject_images", type=PATH, required=True, help="By its adapter alone.")
@click.option("--style", "style_images", type=PATH, required=True, help="By its adapter alone.")
@click.option("--photos", "photos_folder", type=PATH, required=True, help="The subject's photos.")
@click.option("--style-photos", type=PATH, help="Pictures in the style, to compare with.")
@json_option
@scoring_options
@click.pass_obj
def retention(quiet: bool, /, merged: Path, json_target: str | None, **given: Any) -> None:
    """Say what the pictures in MERGED have kept of subject and style.

    All four folders must hold the same prompts and seeds.
    """
    from dreamloom.display.layout import show
    from dreamloom.display.progress import watch
    from dreamloom.display.tables import render_retention
    from dreamloom.pipeline.score_merge import score_merge

    folders = {name: given[f"{name}_images"] for name in ("base", "subject", "style")}
    folders["merged"] = merged
    config = read_settings(given)
    with watch(quiet) as observe:
        found = score_merge(folders, given["photos_folder"], given["style_photos"], config, observe)
    deliver(found, lambda: show(render_retention(found)), json_target)


@main.command()
@click.argument("run", type=PATH)
@json_option
@click.pass_obj
def report(quiet: bool, /, run: Path, json_target: str | None) -> None:
    """Write RUN/report.html from the run's records."""
    from dreamloom.display.progress import watch
    from dreamloom.report.render import write_report

    with watch(quiet) as observe:
        path = write_report(run, observe)
    _tell("The report", {"report": path}, json_target)


@main.command()
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, help="The study's folder; by default runs/study- and the file.")
@click.option("--quick", is_flag=True, help="The quick preset, for what the file leaves open.")
@click.option("--base", type=BASE, help="Another base model than the file's.")
@click.option("--photos", type=PATH, help="Another folder of photos.")
@click.option("--subject", help='Another subject, like "rraj person".')
@click.option(
    "--pack", "packs", type=PACK, multiple=True, help="Other prompt packs, instead of the file's."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes of one thread each.")
@click.option(
    "--on", type=WORKPLACE, default="here", show_default=True, help="Where to work: here or ray."
)
@json_option
@click.pass_obj
def study(
    quiet: bool, /, file: Path, out: Path | None, on: str, json_target: str | None, **given: Any
) -> None:
    """Answer the question in FILE by doing one thing in several ways."""
    from dreamloom.display.layout import show
    from dreamloom.display.progress import watch
    from dreamloom.display.tables import render_findings
    from dreamloom.experiments.study.question import Changes, read_study
    from dreamloom.experiments.study.run import run_study

    asked = read_study(file, Changes(**given))
    out = out or Path("runs") / f"study-{file.stem}"
    with watch(quiet) as observe:
        findings = run_study(asked, out, on, observe)

    def tell() -> None:
        show(render_findings(findings))
        click.echo(f"Everything: {out / 'study.md'}")

    deliver(findings, tell, json_target)


@main.command()
@json_option
def settings(json_target: str | None) -> None:
    """List every setting with its default and its meaning."""
    from dreamloom.core.config.settings import LoomConfig
    from dreamloom.core.toml_files import describe_fields

    rows = describe_fields(LoomConfig)

    def show() -> None:
        for name, default, description in rows:
            click.echo(f"{click.style(name, bold=True)} = {default}\n    {description}")

    named = ("name", "default", "description")
    deliver([dict(zip(named, row, strict=True)) for row in rows], show, json_target)


def _tell(what: str, made: dict[str, Path], json_target: str | None) -> None:
    """Say where the one thing lies that a command made."""
    (path,) = made.values()
    deliver(made, lambda: click.echo(f"{what}: {path}"), json_target)


def _runtime(config: LoomConfig) -> Runtime:
    from dreamloom.core.device import pick_runtime

    return pick_runtime(config.device, config.precision)


_LATER = (ask, grid, models, search, push, studio, token, doctor, completion)
for command in (*_LATER, *ADAPTER_COMMANDS):
    main.add_command(command)
