"""Generate images (stage 4): prompts, seeds, schedulers and adapters in, pictures out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from dreamloom.core.config.settings import GenerateConfig
from dreamloom.core.device import measure_effort
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import (
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
)
from dreamloom.core.manifests import (
    MANIFEST,
    AdapterEntry,
    FaceShown,
    ImageSet,
    Picture,
    PromptStyle,
    SetPurpose,
    SetRole,
    SubjectChange,
    read_image_set,
    write_manifest,
)
from dreamloom.core.run_folder import (
    Record,
    RunFolder,
    fingerprint,
)
from dreamloom.inference.journal import JOURNAL, Journal, find_drawn, refuse_other_inputs
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.lora.folders import hash_adapter
from dreamloom.lora.locating import locate_adapter, split_weight
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Model, Sampler, Shot
from dreamloom.models.lora_schedule import (
    COMPOSITIONS,
    TOGETHER,
    Composition,
    Curve,
    LoraSchedule,
    describe_lora_schedules,
    parse_composition,
    parse_curve,
    set_lora_schedules,
)
from dreamloom.models.session import check_fit, follow_noise_schedule, tell_other_base


@dataclass(frozen=True)
class Prompt:
    """What to draw, and what a right picture of it may show otherwise than the photos.

    Everything beside the text goes into the manifest, for those who judge; see
    `manifests.Picture`.
    """

    text: str
    category: str = ""
    style: PromptStyle | None = None
    face: FaceShown | None = None
    may_change: tuple[SubjectChange, ...] | None = None
    check: str = ""


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter file and the weight at which it is applied, or how that follows the drawing."""

    path: Path
    weight: float | Curve = 1.0

    @property
    def strongest(self) -> float:
        """The weight, or the one farthest from 0."""
        return self.weight.strongest if isinstance(self.weight, Curve) else self.weight


class SetName(NamedTuple):
    """A set's name, with who draws it and what for."""

    name: str
    role: SetRole | None = None
    """None reads it from the adapters."""
    purpose: SetPurpose = "main"


def parse_active_adapter(text: str) -> ActiveAdapter:
    """Read ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT@PROGRESS,…`` as typed on the command line.

    Raises:
        ConfigError: If what follows the colon is neither a weight nor a schedule.
        AdapterError: If it is one of the hub that cannot be fetched; see `locate_adapter`.
    """
    named, weight = split_weight(text)
    try:
        applied = 1.0 if weight is None else _parse_weight(weight)
    except ValueError as error:
        assert weight is not None
        reason = f": {error}" if "@" in weight else ""
        raise ConfigError(
            f"{text!r} ends in {weight!r}, which is not a weight{reason}.",
            "Write FILE:0.8, or just FILE; or FILE:1@0,0.4@0.5,0@1 for weights over the drawing, "
            "from 0 at its first step to 1 at its last.",
        ) from None
    return ActiveAdapter(locate_adapter(named), applied)


def _parse_weight(text: str) -> float | Curve:
    if "@" in text:
        return parse_curve(text)
    plain = float(text)
    if not math.isfinite(plain):
        raise ValueError
    return plain


def read_composition(text: str, conditional_only: bool = False) -> Composition:
    """Read how adapters are applied together, as typed on the command line.

    Raises:
        ConfigError: If there is no such way, or a number is out of range.
    """
    try:
        return parse_composition(text, conditional_only)
    except ValueError as error:
        raise ConfigError(
            f"--compose {text} is not possible: {error}.", f"Write {COMPOSITIONS}."
        ) from None


def generate_images(
    run: RunFolder,
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    active: Sequence[ActiveAdapter] = (),
    name: str | SetName = "pictures",
    observe: Observer = silent,
    composition: Composition = TOGETHER,
) -> ImageSet:
    """Draw every prompt with every seed, scheduler and number of steps into ``images/<name>``.

    Two sets drawn with the same settings pair up picture by picture: same prompt, same seed,
    same noise. An earlier set with the same inputs is kept, and an interrupted one goes on: only
    what is missing is drawn. What lies in the folder otherwise is neither used nor deleted.

    Args:
        run: Where the pictures and the record go.
        model: A loaded base model.
        prompts: One or more prompts.
        config: Resolved settings: nothing is ``auto`` any more.
        active: Adapters to apply; none draws the base model.
        name: The set's name: letters, digits, dash and underscore; and for the manifest who draws
            it and what for, where the adapters do not tell.
        observe: Told of progress.
        composition: How several adapters are applied together.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit the base model; one that was
            made for other weights of the same shapes is told of.
        RunFolderError: If a set of that name was drawn otherwise or has changed since, or its
            folder holds other files.
        BaseModelError: If what is drawn is not finite.
        ConfigError: If a scheduler, the set's name or the manner is not allowed, or there is no
            prompt.
    """
    name, role, purpose = name if isinstance(name, SetName) else SetName(name)
    composition = settle_composition(composition, active, config)
    adapters = check_request(model, prompts, config, active, name, composition)
    stage = f"generate-{name}"
    listed = _list_adapters(active, composition)
    inputs = {
        "base": model.identity.fingerprint,
        **_name_inputs(prompts, listed),
        "settings": _fingerprint_settings(config),
    }
    folder = run.images / name
    if run.finished(stage, inputs):
        (folder / JOURNAL).unlink(missing_ok=True)
        observe(StageSkipped(stage, "already drawn"))
        return read_image_set(folder)
    plan = _plan(model, prompts, config)
    drawn = find_drawn(folder, run.read_record(stage), inputs, [one.file for one in plan])
    missing = sum(picture.file not in drawn for picture in plan)
    earlier = f"{missing} of " if drawn else ""
    observe(StageStarted(stage, f"{earlier}{len(plan)} pictures"))
    _tell_other_bases(model, active, adapters, stage, observe)
    with measure_effort(model.runtime) as effort:
        journal = Journal(folder, inputs, drawn)
        strengths = set_lora_schedules(adapters, [part.weight for part in active], composition)
        with model.apply_adapters(list(zip(adapters, strengths, strict=True))):
            texts = [*(prompt.text for prompt in prompts), config.negative_prompt]
            for text in model.note_prompts(texts, config.prompt_weights):
                observe(Note(stage, text))
            _draw(model, plan, journal, config.batch, stage, observe)
        images = ImageSet(
            folder=folder,
            base=model.identity.as_dict(),
            adapters=listed,
            subject=_first(adapters, "dreamloom.subject"),
            class_noun=_first(adapters, "dreamloom.class_noun"),
            resolution_px=model.advice.resolution_px,
            role=role or tell_role(adapters),
            purpose=purpose,
            pictures=tuple(plan),
        )
        manifest = write_manifest(images)
    run.write_record(
        Record(
            stage=stage,
            inputs=inputs,
            settings=config.model_dump(mode="json") | {"manner": asdict(composition)},
            outputs=run.hash_outputs(manifest, *images.paths()),
            results={
                "pictures": len(plan),
                "seconds_per_picture": effort.seconds / (missing or len(plan)),
            },
            base=model.identity.as_dict(),
            seed=config.first_seed,
            runtime=model.runtime.name,
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    (folder / JOURNAL).unlink(missing_ok=True)
    observe(StageDone(stage, effort.seconds, str(folder)))
    return images


def settle_composition(
    composition: Composition, active: Sequence[ActiveAdapter], config: GenerateConfig
) -> Composition:
    """Keep adapters out of the unconditional half where the settings say so.

    The base model, which has none, is drawn as ever.
    """
    is_kept_out = config.conditional_only and bool(active)
    return replace(composition, conditional_only=True) if is_kept_out else composition


def _fingerprint_settings(config: GenerateConfig) -> str:
    """Fingerprint what pictures depend on, but for what is said of each adapter."""
    own = {name: v for name, v in config.drawn_with.items() if name != "conditional_only"}
    return fingerprint(own)


def _list_adapters(
    active: Sequence[ActiveAdapter], composition: Composition
) -> tuple[AdapterEntry, ...]:
    schedules = describe_lora_schedules([part.weight for part in active], composition)
    return tuple(
        AdapterEntry(
            file=part.path.name,
            sha256=hash_adapter(part.path),
            weight=part.strongest,
            lora_schedule=schedule,
        )
        for part, schedule in zip(active, schedules, strict=True)
    )


def _name_inputs(prompts: Sequence[Prompt], listed: Sequence[AdapterEntry]) -> dict[str, str]:
    """Fingerprint what is known of a set without its base model."""
    return {
        "adapters": fingerprint([entry.model_dump() for entry in listed]),
        # Pictures depend on the words alone; what is told to judges beside them does not matter.
        "prompts": fingerprint([{"text": p.text, "category": p.category} for p in prompts]),
    }


def refuse_other_set(
    run: RunFolder,
    name: str,
    prompts: Sequence[Prompt],
    active: Sequence[ActiveAdapter],
    composition: Composition = TOGETHER,
) -> None:
    """Refuse a set whose name is taken by one of other prompts or adapters: no model is needed.

    Raises:
        RunFolderError: If so.
    """
    folder, earlier = run.images / name, run.read_record(f"generate-{name}")
    if earlier is None or not (folder / MANIFEST).is_file():
        return
    asked = _name_inputs(prompts, _list_adapters(active, composition))
    refuse_other_inputs(folder, earlier.inputs, asked)


def _tell_other_bases(
    model: Model,
    active: Sequence[ActiveAdapter],
    adapters: Sequence[Adapter],
    stage: str,
    observe: Observer,
) -> None:
    for part, adapter in zip(active, adapters, strict=True):
        if told := tell_other_base(str(part.path), adapter, model):
            observe(Note(stage, f"{told}; it fits, and draws otherwise than there", warning=True))


def check_request(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    active: Sequence[ActiveAdapter],
    name: str,
    composition: Composition = TOGETHER,
) -> list[Adapter]:
    """Check everything about a set before anything is written; return the adapters, read.

    Raises:
        AdapterError: If an adapter cannot be read, does not fit the base model, or cannot be used
            in this manner.
        ConfigError: If a scheduler, the set's name or the manner is not allowed, or there is no
            prompt.
    """
    if not prompts:
        raise ConfigError("There is nothing to draw.", "Give at least one --prompt.")
    adapters = [read_adapter(part.path) for part in active]
    follow_noise_schedule(model, adapters)
    for scheduler, steps in itertools.product(config.schedulers, config.steps):
        model.check_sampler(scheduler, steps)
    check_set_name(name)
    _check_size(model, config)
    _check_guidance(config)
    _check_composition(settle_composition(composition, active, config), active, config)
    for part, adapter in zip(active, adapters, strict=True):
        if composition.method == "k-lora":
            refuse_other_kinds(adapter, str(part.path), "can be worn by k-lora")
        strength = LoraSchedule(part.weight) if isinstance(part.weight, Curve) else part.weight
        check_fit(model, adapter, strength)
    return adapters


def make_sampler(model: Model, config: GenerateConfig, scheduler: str, steps: int) -> Sampler:
    """Make the sampler of one scheduler and number of steps, as resolved settings say."""
    own = model.advice.resolution_px
    height, width = (side or own for side in (config.height_px, config.width_px))
    return Sampler(
        scheduler,
        steps,
        float(config.guidance),
        config.guidance_interval,
        config.cache_interval,
        config.negative_prompt,
        config.prompt_weights,
        None if (height, width) == (own, own) else (height, width),
        config.guidance_rescale,
        config.cfg_zero_star,
    )


def _check_size(model: Model, config: GenerateConfig) -> None:
    grid_px = model.pixels_per_latent
    for name in ("width_px", "height_px"):
        side = getattr(config, name)
        if side is not None and side % grid_px:
            nearest = max(grid_px, round(side / grid_px) * grid_px)
            raise ConfigError(
                f"generate.{name} = {side} does not fit {model.identity.name}.",
                f"Take a multiple of {grid_px}, such as {nearest}.",
            )


def _check_guidance(config: GenerateConfig) -> None:
    """Refuse what is about guidance where there is none."""
    if float(config.guidance) > 1:
        return
    for what, is_asked, name in (
        ("a negative prompt", config.negative_prompt, "--negative-prompt"),
        ("rescaling", config.guidance_rescale, "generate.guidance_rescale"),
        ("CFG-Zero*", config.cfg_zero_star, "generate.cfg_zero_star"),
    ):
        if is_asked:
            raise ConfigError(
                f"At a guidance of {float(config.guidance):g} {what} would change nothing.",
                f"Raise --guidance above 1, or leave {name} out.",
            )


def check_set_name(name: str) -> None:
    """Refuse a set's name that could not be a folder's everywhere.

    Raises:
        ConfigError: If it has other letters than it may, or too many.
    """
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise ConfigError(
            f"{name!r} cannot name a set of pictures.", "Use up to 100 letters, digits, - and _."
        )


def _check_composition(
    composition: Composition, active: Sequence[ActiveAdapter], config: GenerateConfig
) -> None:
    """Refuse what could not be seen in the pictures: a manner that changes nothing there."""
    try:
        composition.check(len(active))
    except ValueError as error:
        raise ConfigError(
            f"This cannot be drawn: {error}.",
            "Give --adapter as often, or leave --compose and --conditional-only out.",
        ) from None
    if composition.conditional_only and float(config.guidance) <= 1:
        raise ConfigError(
            f"At a guidance of {float(config.guidance):g} there is no unconditional half that "
            "adapters could be kept from.",
            "Raise --guidance above 1, or leave --conditional-only out.",
        )
    steps = min(config.steps)
    if composition.method == "switch" and steps <= composition.every * (len(active) - 1):
        raise ConfigError(
            f"In {steps} steps with turns of {composition.every}, {active[-1].path.name} would "
            "never have its turn.",
            "Take shorter turns, as in --compose switch:1, or more --steps.",
        )


def tell_role(adapters: Sequence[Adapter]) -> SetRole | None:
    """Tell from the adapters' headers who draws; None where they do not say."""
    if not adapters:
        return "base"
    told = adapters[0].metadata
    if len(adapters) > 1 or told.get("dreamloom.kind") == "merge":
        return "merged"
    if told.get("dreamloom.kind") != "subject":
        return None
    if "dreamloom.prior" not in told:
        return "subject"
    prior = told["dreamloom.prior"] != "none"
    return "subject with class images" if prior else "subject without class images"


def _first(adapters: Sequence[Adapter], key: str) -> str:
    """Read an entry of the first adapter that has it."""
    return next((a.metadata[key] for a in adapters if key in a.metadata), "")


def _plan(model: Model, prompts: Sequence[Prompt], config: GenerateConfig) -> list[Picture]:
    seeds = range(config.first_seed, config.first_seed + config.images_per_prompt)
    grid = itertools.product(config.schedulers, config.steps, prompts, seeds)
    return [
        Picture(
            file=f"{index:04d}.png",
            prompt=prompt.text,
            category=prompt.category,
            style=prompt.style,
            face=prompt.face,
            may_change=prompt.may_change,
            check=prompt.check,
            seed=seed,
            **asdict(make_sampler(model, config, scheduler, steps)),
        )
        for index, (scheduler, steps, prompt, seed) in enumerate(grid)
    ]


def _draw(
    model: Model,
    plan: Sequence[Picture],
    journal: Journal,
    batch: int,
    stage: str,
    observe: Observer,
) -> None:
    def sampler_of(one: Picture) -> Sampler:
        return Sampler(**{field.name: getattr(one, field.name) for field in fields(Sampler)})

    observe(Progress(stage, "drawing", len(journal.drawn), len(plan)))
    for sampler, group in itertools.groupby(plan, key=sampler_of):
        pictures = list(group)
        for start in range(0, len(pictures), batch):
            some = pictures[start : start + batch]
            missing = [picture for picture in some if picture.file not in journal.drawn]
            if not missing:
                continue
            # All of a batch, for the last bits of a picture depend on what is drawn beside it.
            shots = [Shot(picture.prompt, picture.seed) for picture in some]
            for picture, image in zip(some, model.sample(shots, sampler, batch=batch), strict=True):
                if picture.file not in journal.drawn:
                    journal.keep(picture.file, image)
            observe(Progress(stage, "drawing", len(journal.drawn), len(plan)))
