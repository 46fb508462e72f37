"""The stages in order: start reading here.

photos → priors → train → generate → evaluate → report
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dreamloom.adapters import read_adapter
from dreamloom.config import (
    NOT_TAUGHT,
    LoomConfig,
    PriorsConfig,
    SubjectConfig,
    load_config,
    to_toml,
)
from dreamloom.crops import suggest_step
from dreamloom.errors import ConfigError, RunFolderError
from dreamloom.evaluate import (
    Floor,
    evaluate_images,
    evaluate_run,
    list_pictures,
    pick_encoders,
    read_pictures,
    refuse_drawn_photos,
)
from dreamloom.events import Note, Observer, silent, tee
from dreamloom.families import load_model
from dreamloom.families.base import Model
from dreamloom.features import Encoders
from dreamloom.fitting import fit_drawing, fit_run
from dreamloom.generate import Prompt, check_wish, generate_images, parse_compose, parse_worn
from dreamloom.metrics import Scorecard
from dreamloom.optimizers import ONE_RATE_OPTIMIZERS, usual_rate
from dreamloom.photos import fingerprint_photos, load_class_images, load_photos
from dreamloom.pictures import (
    MANIFEST,
    ImageSet,
    PhotoSet,
    PriorSet,
    Shape,
    read_photo_set,
    read_prior_set,
)
from dreamloom.priors import draw_priors, make_priors
from dreamloom.processes import join_processes
from dreamloom.prompts import PACK_NAMES, Pack, read_pack
from dreamloom.rundir import Record, RunDir, write_text
from dreamloom.runtime import Runtime
from dreamloom.trackers import NONE, choose_tracker, track
from dreamloom.train import Judge, check_training, train_adapter

# Pictures of unknown size are compared with photos of this size.
PHOTO_SIDE_PX = 512
_GLANCE_PX = 32


def settle(config: LoomConfig, model: Model) -> LoomConfig:
    """Replace every ``auto`` by what suits the base model, and check names that it must know.

    Raises:
        ConfigError: If a scheduler, optimizer or tracker is unknown or not installed.
    """
    choose_tracker(config.watch.tracker)
    for name in (config.priors.scheduler, *config.generate.schedulers):
        if name not in model.schedulers:
            raise ConfigError(
                f"There is no scheduler {name!r}.", f"Choose from: {', '.join(model.schedulers)}."
            )
    advice = vars(model.advice)
    rate = usual_rate(config.train.optimizer, advice["learning_rate"])
    if config.train.optimizer in ONE_RATE_OPTIMIZERS:
        advice = {**advice, "text_rate_share": 1.0, "token_rate_share": 1.0}
    return config.resolve({**advice, "learning_rate": rate})


def name_folder(config: LoomConfig) -> Path:
    """Name the folder of a run that was given none: ``runs/sks-dog``."""
    return Path("runs") / (re.sub(r"\W+", "-", config.subject.phrase.lower()).strip("-") or "run")


def open_run(out: Path, config: LoomConfig) -> RunDir:
    """Claim a run's folder and write its settings, or go on with a run of the same settings.

    Raises:
        RunFolderError: If the folder holds other files, or a run whose settings differ.
    """
    run = RunDir(out)
    run.claim()
    if run.settings_file.is_file():
        differing = name_differences(load_config(file=run.settings_file), config)
        if differing:
            raise RunFolderError(
                f"{out} already holds another run: {'; '.join(differing[:4])}.",
                "Name another --out, or give the same settings to go on with that run.",
            )
        return run
    write_text(run.settings_file, to_toml(config))
    return run


def name_differences(old: LoomConfig, new: LoomConfig) -> list[str]:
    """Name the settings that make two runs different, with both values."""
    before, after = old.flat(), new.flat()
    return [
        f"{name} is {before[name]!r} there and {after[name]!r} here"
        for name in after
        if before.get(name) != after[name] and not name.startswith(NOT_TAUGHT)
    ]


def prepare_run(
    out: Path,
    config: LoomConfig,
    runtime: Runtime,
    photos_folder: Path,
    resume: bool = False,
    observe: Observer = silent,
) -> tuple[RunDir, Model, LoomConfig]:
    """Check everything that can be checked, load the base model, and only then make the folder.

    Args:
        out: The run's folder: new, empty, or a run with the same photos and settings.
        config: Settings as given.
        runtime: Where to compute.
        photos_folder: The photos; all of them are read once here.
        resume: Whether ``out`` must be a run already; its own settings are then taken.
        observe: Told what was planned.

    Returns:
        The claimed run, the model, and the settings without any ``auto``.

    Raises:
        PhotoError: If a photo cannot be read or there is none.
        ConfigError: If these settings cannot train this base model.
        RunFolderError: If ``out`` holds something else, or is no run although ``resume`` is asked.
        BaseModelError: If the base model cannot be found or read.
    """
    run = RunDir(out)
    if resume:
        if not run.settings_file.is_file():
            raise RunFolderError(
                f"There is no run in {out} to go on with.", "Leave out --resume to start one."
            )
        config = load_config(file=run.settings_file)
    run.refuse_strangers()
    captions = _read_captions(run, photos_folder)
    _try_class_images(config)
    fitted = fit_run(run, config, runtime, len(captions))
    for line in fitted.lines:
        observe(Note("train", line))
    model = load_model(config.base, runtime, fitted.thrift)
    config = settle(fitted.config, model)
    _refuse_other_photos(run, photos_folder, config, model)
    if not run.adapter.is_file():
        if config.train.compile == "blocks":
            observe(Note("train", "blocks are compiled, which takes a while for the first time"))
        check_training(model, captions, config)
    with join_processes().main_first():
        return open_run(out, settle(fitted.lasting, model)), model, config


def _read_captions(run: RunDir, folder: Path) -> list[str]:
    """Read every photo of a new run through to its end, before anything is made of it."""
    if (run.photos / MANIFEST).is_file():
        return [photo.caption for photo in read_photo_set(run.photos).photos]
    with TemporaryDirectory() as scratch:
        return [photo.caption for photo in load_photos(folder, RunDir(scratch), _GLANCE_PX).photos]


def _try_class_images(config: LoomConfig) -> None:
    """Read the user's class images through, before anything is made of them."""
    if config.priors.kind != "folder":
        return
    if not config.priors.folder:
        raise ConfigError("priors.kind is 'folder' but no folder is named.", "Use --prior DIR.")
    with TemporaryDirectory() as scratch:
        load_class_images(Path(config.priors.folder), RunDir(scratch), _GLANCE_PX, "")


def _refuse_other_photos(run: RunDir, folder: Path, config: LoomConfig, model: Model) -> None:
    if not (run.photos / MANIFEST).is_file():
        return
    shape, step_px = _shape(config), _step(config, model)
    new = fingerprint_photos(folder, _resolution(config), shape, step_px)
    if read_photo_set(run.photos).fingerprint != new:
        raise RunFolderError(
            f"{run.path} already holds another run: its photos are not those in {folder}.",
            "Name another --out; the finished run stays as it is.",
        )


def teach(
    run: RunDir, model: Model, photos_folder: Path, config: LoomConfig, observe: Observer = silent
) -> Record:
    """Go from a folder of photos to an adapter: photos, class images, training."""
    processes = join_processes()
    tracker = choose_tracker(config.watch.tracker) if processes.is_main else NONE
    observe = tee(observe, run.observer()) if processes.is_main else silent
    for text in getattr(model, "notes", ()):
        observe(Note("train", text))
    if config.precision == "fp16" and model.runtime.dtype == torch.float32:
        note = f"computes in fp32: {model.runtime.device.type} has no use for fp16"
        observe(Note("train", note, warning=True))
    with track(tracker, "training", run.path / "logs", config.flat()) as told:
        # The first process prepares; the others then find everything done.
        with processes.main_first():
            photos = load_photos(
                photos_folder,
                run,
                _resolution(config),
                observe,
                shape=_shape(config),
                step_px=_step(config, model),
            )
        drawn = config.priors.kind == "generated" and config.train.prior_weight > 0
        if drawn and processes.count > 1:
            share = (processes.index, processes.count)
            draw_priors(*_ask_priors(run, model, config), observe, share=share)
            processes.wait()
        with processes.main_first():
            priors = find_priors(run, model, config, observe)
        judge = (
            make_judge(photos, config, run) if config.watch.every and config.watch.scores else None
        )
        return train_adapter(run, model, photos, priors, config, tee(observe, told), judge)


def make_judge(photos: PhotoSet, config: LoomConfig, run: RunDir) -> Judge:
    """Make what scores the pictures that are drawn while a training of the run goes on."""
    encoders: Encoders | None = None

    def judge(images: ImageSet, floor: ImageSet | None) -> Scorecard:
        nonlocal encoders
        # Encoders are loaded when they are first needed, and then stay.
        if encoders is None:
            encoders = pick_encoders(config.evaluate, images, config.device)
        return evaluate_images(
            images,
            photos,
            floor=Floor(floor, _list_class_images(run)) if floor else None,
            config=config.evaluate,
            subject=config.subject,
            encoders=encoders,
        )

    return judge


def find_priors(
    run: RunDir, model: Model, config: LoomConfig, observe: Observer = silent
) -> PriorSet | None:
    """Draw, read or do without class images, as ``priors.kind`` says."""
    if config.train.prior_weight == 0:
        return None
    if config.priors.kind == "generated":
        return make_priors(*_ask_priors(run, model, config), observe)
    if config.priors.kind == "folder":
        return load_class_images(
            Path(config.priors.folder), run, _resolution(config), config.class_prompt(), observe
        )
    return None


def _ask_priors(
    run: RunDir, model: Model, config: LoomConfig
) -> tuple[RunDir, Model, str, PriorsConfig, int, int]:
    return run, model, config.class_prompt(), config.priors, config.seed, _resolution(config)


def _resolution(config: LoomConfig) -> int:
    if config.photos.resolution_px == "auto":
        raise ValueError("settings must be resolved first")
    return config.photos.resolution_px


def _shape(config: LoomConfig) -> Shape:
    if config.photos.shape == "auto":
        raise ValueError("settings must be resolved first")
    return config.photos.shape


def _step(config: LoomConfig, model: Model) -> int:
    return suggest_step(_resolution(config), model.pixels_per_latent)


def pack_prompts(pack: str, subject: str, class_noun: str | None = None) -> list[Prompt]:
    """Fill a prompt pack with the subject's phrase and class noun.

    Prompts that make no sense for that class are left out; see `prompts.PackPrompt.suits`.

    Args:
        pack: The pack's name.
        subject: The phrase that names the subject.
        class_noun: What the subject is one of; None takes the phrase's last word.

    Raises:
        ConfigError: If there is no pack of that name.
    """
    noun = class_noun or subject.split()[-1]
    filled = [
        Prompt(p.fill(subject, noun), p.category, p.style, p.face, p.may_change, p.check)
        for p in find_pack(pack).select(noun)
    ]
    return _drop_repeats(filled)


def find_pack(name: str) -> Pack:
    """Read a prompt pack.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PACK_NAMES:
        raise ConfigError(
            f"There is no prompt pack {name!r}.", f"Choose from: {', '.join(PACK_NAMES)}."
        )
    return read_pack(name)


def _drop_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep one of the prompts with the same words: they would give the same pictures.

    It is the last of them, for packs come last and know more of their prompts.
    """
    return list({prompt.text: prompt for prompt in prompts}.values())


@dataclass(frozen=True)
class Wish:
    """What the user wants drawn.

    Args:
        adapters: ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT@PROGRESS,…``.
        prompts: Texts; {subject} stands for the subject's phrase.
        packs: The names of prompt packs.
        subject: The phrase; None takes what the first adapter says of itself.
        floor: Whether the base model draws the same, too.
        name: The set's name.
        out: A run's folder, or a new one.
        class_noun: What the subject is one of; None takes what that adapter says, or else the
            phrase's last word.
        compose: How the adapters are worn together; see `pace.MANNERS`.
        conditional_only: Whether the unconditional half of guidance sees the base model.
    """

    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    packs: tuple[str, ...]
    subject: str | None
    floor: bool
    name: str
    out: Path
    class_noun: str | None = None
    compose: str = "sum"
    conditional_only: bool = False


def draw(
    wish: Wish, config: LoomConfig, runtime: Runtime, observe: Observer = silent
) -> list[Path]:
    """Draw what is wished into ``out/images``; return the folders of the sets.

    The base model is the one that the adapters were made for, unless the settings name another.

    Raises:
        AdapterError: If an adapter cannot be read or was made for another base.
        ConfigError: If nothing is to be drawn, a name is unknown, or adapters cannot be worn so.
        RunFolderError: If ``out`` holds other files, or a set of that name drawn otherwise.
    """
    worn = [parse_worn(text) for text in wish.adapters]
    manner = parse_compose(wish.compose, wish.conditional_only)
    stories = [read_adapter(part.path).metadata for part in worn]
    prompts = _ask(wish, config, stories)
    run = RunDir(wish.out)
    run.refuse_strangers()
    base = _choose_base(config, stories)
    model = load_model(base, runtime, fit_drawing(config, base, runtime))
    config = settle(config, model)
    settings, name = config.generate, wish.name
    check_wish(model, prompts, settings, worn, name, manner)
    run.claim()
    observe = tee(observe, run.observer())
    sets = [generate_images(run, model, prompts, settings, worn, name, observe, manner)]
    if wish.floor and worn:
        sets.append(generate_images(run, model, prompts, settings, (), f"{name}_base", observe))
    return [images.folder for images in sets]


def _ask(wish: Wish, config: LoomConfig, stories: Sequence[Mapping[str, str]]) -> list[Prompt]:
    """Put the subject's words into the wished prompts and packs."""
    told = next((story for story in stories if "dreamloom.subject" in story), {})
    subject = wish.subject or told.get("dreamloom.subject")
    noun = wish.class_noun
    if not subject:
        noun = noun or config.subject.class_noun
    elif subject == told.get("dreamloom.subject"):
        noun = noun or told.get("dreamloom.class_noun")
    prompts = _fill(wish.prompts, subject)
    for pack in wish.packs:
        prompts += pack_prompts(pack, subject or config.subject.phrase, noun)
    if not prompts:
        raise ConfigError("There is nothing to draw.", "Give --prompt or --pack.")
    return _drop_repeats(prompts)


def _fill(texts: Sequence[str], subject: str | None) -> list[Prompt]:
    if subject is None and any("{subject}" in text for text in texts):
        raise ConfigError("A prompt says {subject}, but nobody is named.", "Give --subject.")
    return [Prompt(text.replace("{subject}", subject or "")) for text in texts]


def _choose_base(config: LoomConfig, stories: Sequence[Mapping[str, str]]) -> str:
    """The base that was asked for, or else the one that the adapters name."""
    told = [story["dreamloom.base"] for story in stories if "dreamloom.base" in story]
    if "base" in config.model_fields_set or not told:
        return config.base
    return told[0]


def score(
    images: Path,
    photos_folder: Path,
    config: LoomConfig,
    floor: Path | None = None,
    strangers: Path | None = None,
    observe: Observer = silent,
) -> Scorecard:
    """Score a folder of pictures against a folder of photos.

    Strangers are others of the class; a run's own class images if no folder is named. The scores of
    a set that lies in a run are kept there, for its report. Where the settings do not name the
    subject, the pictures' own manifest does.

    Raises:
        EvaluationError: If a folder holds no picture.
        PhotoError: If a photo cannot be read or there is none.
    """
    refuse_drawn_photos(photos_folder)
    pictures = read_pictures(images)
    subject = find_subject(config, pictures)
    settings = config.evaluate
    encoders = pick_encoders(settings, pictures, config.device)
    run = RunDir(images.parent.parent)
    in_run = images.parent == run.images and run.is_run()
    if strangers:
        others = list_pictures(strangers).paths()
    else:
        others = _list_class_images(run) if in_run else []
    beneath = Floor(read_pictures(floor), others) if floor else None
    with TemporaryDirectory() as scratch:
        side = pictures.resolution_px or PHOTO_SIDE_PX
        photos = load_photos(photos_folder, RunDir(scratch), side, observe)
        if in_run:
            return evaluate_run(
                run,
                pictures,
                photos,
                floor=beneath,
                config=settings,
                subject=subject,
                encoders=encoders,
                observe=tee(observe, run.observer()),
            )
        return evaluate_images(
            pictures,
            photos,
            floor=beneath,
            config=settings,
            subject=subject,
            encoders=encoders,
            observe=observe,
        )


def _list_class_images(run: RunDir) -> list[Path]:
    """List a run's class images: they show as many strangers; none where it has none."""
    if not (run.priors / MANIFEST).is_file():
        return []
    return read_prior_set(run.priors).paths()


def find_subject(config: LoomConfig, pictures: ImageSet) -> SubjectConfig:
    """Name the subject: as the settings do, or else as the pictures' manifest does."""
    if "subject" not in config.model_fields_set and pictures.subject:
        return SubjectConfig(phrase=pictures.subject, class_noun=pictures.class_noun)
    return config.subject
