"""The command line: parse, call one function of the library, show what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dreamloom.cli.adapters import ADAPTER_COMMANDS
from dreamloom.cli.options import PATH, read_settings, settings_options
from dreamloom.cli.search import search

if TYPE_CHECKING:
    from dreamloom.core.config.settings import LoomConfig
    from dreamloom.core.device import Runtime

# The libraries below us greet every import with advice that is not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# Written out, for reading the packs' own list would slow every --help down; a test compares.
PACKS_HELP = (
    "A list of prompts, may be repeated: person-v1, object-v1, live-v1, class-v1, unrelated-v1, "
    "seed-v1, pixel-v1, picturebook-v1, picturebook-class-v1. 'dreamloom packs NAME' shows one."
)

ADAPTER_HELP = (
    "May be repeated. W is its weight, 1 if not given; FILE:1@0,0.4@0.5,0@1 has weights that "
    "follow the drawing, from its first step (0) to its last (1)."
)
COMPOSE_HELP = (
    "How several adapters share a drawing: sum, switch[:STEPS] (they take turns) or "
    "k-lora[:ALPHA,BETA] (each layer goes over from the first to the second)."
)


class Commands(click.Group):
    """Shows what a user can mend as two plain lines, and the traceback only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn a known problem into its message and exit code."""
        from dreamloom.core.errors import DreamLoomError

        try:
            return super().invoke(ctx)
        except DreamLoomError as error:
            if ctx.params.get("debug"):
                raise
            click.secho(f"Error: {error.problem}", fg="red", err=True)
            if error.hint:
                click.echo(error.hint, err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            click.echo("What is finished is kept: mend that and run the command again.", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Stopped. What is finished is kept: run the command again.", err=True)
            ctx.exit(1)


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
@settings_options
@click.pass_obj
def demo(quiet: bool, /, out: Path, **given: Any) -> None:
    """Run the whole journey on the embedded model, without a GPU."""
    from dreamloom.cli.console import watch
    from dreamloom.experiments.demo import run_demo

    config = read_settings(given)
    with watch(quiet) as observe:
        report = run_demo(out, config, _runtime(config), observe)
    click.echo(f"The report: {report}")


@main.command()
@click.argument("folder", type=PATH)
@click.option("--resolution", default=1024, show_default=True, help="Side in pixels to train at.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def photos(folder: Path, resolution: int, as_json: bool) -> None:
    """Check photos: what is usable, what is not ideal, what to add."""
    from dreamloom.cli.console import show_photo_check
    from dreamloom.data.photos.check import check_photos

    check = check_photos(folder, resolution)
    if as_json:
        click.echo(check.model_dump_json(indent=2))
    else:
        show_photo_check(check)
    if not check.usable:
        click.get_current_context().exit(1)


@main.command()
@click.argument("folder", type=PATH)
@click.option("--subject", help='A rare word and the class noun, like "rraj person".')
@click.option("--class-noun", help="What the subject is one of: person, dog, backpack.")
@click.option("--base", help="picturebook, sdxl, a hub id, a folder or a .safetensors file.")
@click.option("--out", type=PATH, help="The run's folder; by default runs/ and the subject.")
@click.option("--prior", help="generated, base, none, or a folder of your own class images.")
@click.option("--format", "file_format", help="peft, or kohya: also for ComfyUI and A1111.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; it must exist.")
@settings_options
@click.pass_obj
def train(quiet: bool, /, folder: Path, out: Path | None, resume: bool, **given: Any) -> None:
    """Teach a base model one subject from the photos in FOLDER."""
    from dreamloom.cli.console import watch
    from dreamloom.pipeline.subject import require_subject
    from dreamloom.pipeline.train import name_folder, prepare_run, train_subject

    config = read_settings(given)
    if not resume:
        require_subject(config)
    out = out or name_folder(config)
    # Of several processes that a launcher started, the first alone talks.
    is_first = os.environ.get("RANK", "0") == "0"
    with watch(quiet or not is_first) as observe:
        run, model, config = prepare_run(out, config, _runtime(config), folder, resume, observe)
        train_subject(run, model, folder, config, observe)
    if not is_first:
        return
    click.echo(f"The adapter: {run.adapter}")
    click.echo(f"Next: dreamloom generate --adapter {run.adapter} --pack seed-v1 --out {out}")


@main.command()
@click.option("--base", help="picturebook, sdxl, a hub id, a folder or a .safetensors file.")
@click.option("--gpu-memory", metavar="SIZE", help="Such as 12GiB; by default this GPU's own.")
@click.option("--gpu-rate", type=float, metavar="TFLOPS", help="Of matrix products, for the time.")
@click.option("--photos", type=int, default=6, show_default=True, help="How many there are.")
@click.option("--prior", help="generated, base, none, or a folder of your own class images.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options
def plan(
    gpu_memory: str | None, gpu_rate: float | None, photos: int, as_json: bool, **given: Any
) -> None:
    """Predict a training's memory and time, and pick the fastest settings that fit.

    Needs no GPU. Sizes are read as 12GiB (2^30 bytes each) or 12GB (10^9 bytes each).
    """
    from dreamloom.memory.plan import find_memory, plan_run

    config = read_settings(given)
    memory = find_memory(gpu_memory, config)
    planned = plan_run(
        config,
        memory,
        photos=photos,
        rate_tflops=gpu_rate,
        on_count=lambda case: click.echo(f"counting: {case}", err=True),
    )
    if as_json:
        click.echo(json.dumps(planned.as_dict(), indent=2))
    else:
        click.echo("\n".join(planned.lines()))


@main.command()
@click.option("--base", help="The base model; the adapter's own where it says so.")
@click.option("--adapter", "adapters", multiple=True, metavar="FILE[:W]", help=ADAPTER_HELP)
@click.option("--compose", default="sum", show_default=True, help=COMPOSE_HELP)
@click.option(
    "--conditional-only", is_flag=True, help="Keep adapters out of guidance's other half."
)
@click.option("--prompt", "prompts", multiple=True, help="May be repeated.")
@click.option("--pack", "packs", multiple=True, help=PACKS_HELP)
@click.option("--subject", help="The subject in prompts; the adapter's own where it says so.")
@click.option("--class-noun", help="What it is one of; the adapter's own, or the last word.")
@click.option("--scheduler", "schedulers", multiple=True, help="ddim, pndm, euler, dpm++ …")
@click.option("--steps", multiple=True, type=int, help="Denoising steps; may be repeated.")
@click.option("--seeds", type=int, help="Pictures of each prompt.")
@click.option("--guidance", type=float, help="Classifier-free guidance.")
@click.option("--floor", is_flag=True, help="Draw the same with the base model, to compare.")
@click.option("--name", default="pictures", show_default=True, help="The set's name.")
@click.option("--out", type=PATH, required=True, help="A run's folder, or a new one.")
@settings_options
@click.pass_obj
def generate(quiet: bool, /, **given: Any) -> None:
    """Draw prompts with adapters, seeds and schedulers."""
    from dataclasses import fields

    from dreamloom.cli.console import watch
    from dreamloom.pipeline.draw import GenerateRequest, draw

    request = GenerateRequest(
        **{field.name: given.pop(field.name) for field in fields(GenerateRequest)}
    )
    config = read_settings(given)
    with watch(quiet) as observe:
        folders = draw(request, config, _runtime(config), observe)
    for folder in folders:
        click.echo(f"The pictures: {folder}")


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def packs(name: str | None, as_json: bool) -> None:
    """List prompt packs, or the prompts of the pack NAME.

    Each prompt stands with what it may change.
    """
    from dreamloom.cli.console import show_pack, show_packs
    from dreamloom.data.prompts.packs import PACK_NAMES
    from dreamloom.pipeline.draw import find_pack

    found = [find_pack(one) for one in ([name] if name else PACK_NAMES)]
    if as_json:
        click.echo(json.dumps([pack.model_dump() for pack in found], indent=2))
    elif name:
        show_pack(found[0])
    else:
        show_packs(found)


@main.command()
@click.argument("images", type=PATH)
@click.option("--photos", "photos_folder", type=PATH, required=True, help="The subject's photos.")
@click.option("--floor", type=PATH, help="The base model's pictures of the same prompts and seeds.")
@click.option("--strangers", type=PATH, help="Others of the class; the run's class images if not.")
@click.option("--subject", help='The subject\'s phrase in the prompts: "rraj person".')
@click.option("--class-noun", help="What stands for it when prompts are scored.")
@click.option("--json", "json_file", type=PATH, help="Write the scores there.")
@click.option("--as-seed", is_flag=True, help="Show what a faulty script says, by fault.")
@click.option("--target-text", metavar="TEXT", help="The text that the script was given.")
@settings_options
@click.pass_obj
def evaluate(quiet: bool, /, images: Path, json_file: Path | None, **given: Any) -> None:
    """Score the pictures in IMAGES against the subject's photos."""
    from dreamloom.cli.console import show_audit, show_scorecard, watch
    from dreamloom.experiments.seed_audit_files import score_as_seed
    from dreamloom.pipeline.score import score

    photos, floor, target = given["photos_folder"], given["floor"], given["target_text"]
    if target and not given["as_seed"]:
        raise click.UsageError("--target-text belongs to --as-seed.")
    config = read_settings(given)
    found: Any
    show: Callable[[Any], None]
    with watch(quiet) as observe:
        if given["as_seed"]:
            show, found = show_audit, score_as_seed(images, photos, config, target, floor, observe)
        else:
            others = given["strangers"]
            show, found = show_scorecard, score(images, photos, config, floor, others, observe)
    _deliver(found, show, json_file)


@main.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--score", "measures", multiple=True, metavar="NAME", help="This one only; repeat.")
@click.option("--json", "json_file", type=PATH, help="Write the comparisons there.")
def compare(first: str, second: str, measures: tuple[str, ...], json_file: Path | None) -> None:
    """Say what changed from A to B, pair by pair.

    A and B are files that 'evaluate --json' wrote, or RUN:SET, a run and a set of its pictures.
    """
    from dreamloom.cli.console import show_comparisons
    from dreamloom.evaluation.compare import compare_cards
    from dreamloom.evaluation.scorecard_files import find_scorecard

    compared = compare_cards(find_scorecard(first), find_scorecard(second), measures or None)
    _deliver(compared, show_comparisons, json_file)


@main.command()
@click.argument("merged", type=PATH)
@click.option("--base", "base_images", type=PATH, required=True, help="Drawn without adapters.")
@click.option("--subject", "subject_images", type=PATH, required=True, help="By its adapter alone.")
@click.option("--style", "style_images", type=PATH, required=True, help="By its adapter alone.")
@click.option("--photos", "photos_folder", type=PATH, required=True, help="The subject's photos.")
@click.option("--style-photos", type=PATH, help="Pictures in the style, to compare with.")
@click.option("--json", "json_file", type=PATH, help="Write the scores there.")
@settings_options
@click.pass_obj
def retention(quiet: bool, /, merged: Path, json_file: Path | None, **given: Any) -> None:
    """Say what the pictures in MERGED have kept of subject and style.

    All four folders must hold the same prompts and seeds.
    """
    from dreamloom.cli.console import show_retention, watch
    from dreamloom.pipeline.score_merge import score_merge

    folders = {name: given[f"{name}_images"] for name in ("base", "subject", "style")}
    folders["merged"] = merged
    config = read_settings(given)
    with watch(quiet) as observe:
        found = score_merge(folders, given["photos_folder"], given["style_photos"], config, observe)
    _deliver(found, show_retention, json_file)


@main.command()
@click.argument("run", type=PATH)
@click.pass_obj
def report(quiet: bool, /, run: Path) -> None:
    """Write RUN/report.html from the run's records."""
    from dreamloom.cli.console import watch
    from dreamloom.report.render import write_report

    with watch(quiet) as observe:
        path = write_report(run, observe)
    click.echo(f"The report: {path}")


@main.command()
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, help="The study's folder; by default runs/study- and the file.")
@click.option("--quick", is_flag=True, help="The quick preset, for what the file leaves open.")
@click.option("--base", help="Another base model than the file's.")
@click.option("--photos", type=PATH, help="Another folder of photos.")
@click.option("--subject", help='Another subject, like "rraj person".')
@click.option("--pack", "packs", multiple=True, help="Other prompt packs, instead of the file's.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of one thread each.")
@click.option("--on", default="here", show_default=True, help="Where to work: here or ray.")
@click.pass_obj
def study(quiet: bool, /, file: Path, out: Path | None, on: str, **given: Any) -> None:
    """Answer the question in FILE by doing one thing in several ways."""
    from dreamloom.cli.console import show_findings, watch
    from dreamloom.experiments.study.question import Changes, read_study
    from dreamloom.experiments.study.run import run_study

    asked = read_study(file, Changes(**given))
    out = out or Path("runs") / f"study-{file.stem}"
    with watch(quiet) as observe:
        findings = run_study(asked, out, on, observe)
    show_findings(findings)
    click.echo(f"Everything: {out / 'study.md'}")


@main.command()
def settings() -> None:
    """List every setting with its default and its meaning."""
    from dreamloom.core.config.settings import LoomConfig
    from dreamloom.core.toml_files import describe_fields

    for name, default, description in describe_fields(LoomConfig):
        click.echo(f"{click.style(name, bold=True)} = {default}\n    {description}")


@main.group()
def models() -> None:
    """List, fetch and find the models that evaluation uses."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models_list(as_json: bool) -> None:
    """List the models: what for, licence, size, and whether they are here."""
    from dreamloom.cli.console import show_models
    from dreamloom.evaluation.encoders.store import list_models

    listed = list_models()
    if as_json:
        click.echo(json.dumps([line.as_json() for line in listed], indent=2))
    else:
        show_models(listed)


@models.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
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
@click.argument("name")
def models_path(name: str) -> None:
    """Print the folder of an embedded model in diffusers' layout: picturebook."""
    from dreamloom.core.errors import BaseModelError
    from dreamloom.picturebook import weights_folder

    if name != "picturebook":
        raise BaseModelError(f"{name} is not embedded.", "The embedded model is picturebook.")
    click.echo(weights_folder())


def _deliver(found: Any, show: Callable[[Any], None], json_file: Path | None) -> None:
    """Show what was found and, where a file is named, write it as JSON."""
    from dreamloom.core.run_folder import write_json

    if json_file:
        write_json(json_file, found)
    show(found)


def _runtime(config: LoomConfig) -> Runtime:
    from dreamloom.core.device import pick_runtime

    return pick_runtime(config.device, config.precision)


for command in (*ADAPTER_COMMANDS, search):
    main.add_command(command)
