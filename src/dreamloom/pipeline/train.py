"""The stages in order: start reading here.

photos → priors → train → generate → evaluate → report
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dreamloom.core.config.aliases import is_as_before
from dreamloom.core.config.loading import load_run_settings, to_toml
from dreamloom.core.config.settings import NOT_TRAINED, LoomConfig, PriorsConfig
from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.distributed import join_processes
from dreamloom.core.errors import ConfigError, RunFolderError
from dreamloom.core.events import Note, Observer, silent, tee
from dreamloom.core.manifests import (
    MANIFEST,
    ClassImageSet,
    CropShape,
    ImageSet,
    PhotoSet,
    read_photo_set,
)
from dreamloom.core.run_folder import Record, RunFolder, write_text
from dreamloom.core.toml_files import Section
from dreamloom.data.buckets import suggest_step
from dreamloom.data.class_images import draw_class_images, load_class_images, make_class_images
from dreamloom.data.photos.check import judge_captions
from dreamloom.data.photos.prepare import fingerprint_photos, load_photos
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scoring import Floor, PartedPhotos, evaluate_images, pick_encoders
from dreamloom.memory.fit import fit_training
from dreamloom.models.base import Model
from dreamloom.pipeline.score import _list_class_images
from dreamloom.pipeline.score_set import evaluation_options, name_held_out
from dreamloom.pipeline.session import check_names, open_session, resolve_defaults
from dreamloom.pipeline.subject import (
    check_class_images,
    check_held_out,
    describe_reading,
    describe_words,
    require_subject,
    warn_of_photographs,
)
from dreamloom.training.trackers import NONE, choose_tracker, track
from dreamloom.training.train import check_training, train_adapter
from dreamloom.training.validation_samples import ScoreImages

_GLANCE_PX = 32


def name_folder(config: LoomConfig) -> Path:
    """Name the folder of a run that was given none: ``runs/sks-dog``."""
    return Path("runs") / (re.sub(r"\W+", "-", config.subject.phrase.lower()).strip("-") or "run")


def open_run(out: Path, config: LoomConfig) -> RunFolder:
    """Claim a run's folder and write its settings, or go on with a run of the same settings.

    Raises:
        RunFolderError: If the folder holds other files, or a run whose settings differ.
    """
    run = RunFolder(out)
    run.claim()
    if run.settings_file.is_file():
        differing = name_differences(load_run_settings(run.settings_file), config)
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
        if before.get(name) != after[name]
        and not name.startswith(NOT_TRAINED)
        # A run that was begun before there was such a setting does not name it.
        and not (is_as_before(name, before) and is_as_before(name, after))
    ]


def take_up(run: RunFolder, given: LoomConfig) -> LoomConfig:
    """Take a run's own settings, with those of the given ones that change nothing of it.

    Where to compute, memory, checkpoints, drawing and scoring may differ from the beginning.

    Raises:
        RunFolderError: If a setting was given that the run was begun without.
    """
    own, asked = load_run_settings(run.settings_file), given.flat()
    before = own.flat()
    told = [name for name in _list_given(given) if asked[name] != "auto"]
    differing = [
        f"{name} is {before[name]!r} there and {asked[name]!r} here"
        for name in told
        if asked[name] != before[name]
        and not name.startswith(NOT_TRAINED)
        and not (name == "base" and _is_same_place(asked[name], before[name]))
    ]
    if differing:
        hint = "Leave these options out to go on as it was begun, or name another --out."
        if run.adapter.is_file() and asked["train.steps"] > before["train.steps"]:
            hint = f"To train it longer, begin from it: --from {run.adapter} --out another folder."
        raise RunFolderError(
            f"{run.path} was begun with other settings: {'; '.join(differing[:4])}.", hint
        )
    for name in told:
        section, _, key = name.rpartition(".")
        if name.startswith(NOT_TRAINED) and name != "preset":
            inner = getattr(own, section).model_copy(update={key: asked[name]}) if section else None
            own = own.model_copy(update={section: inner} if section else {key: asked[name]})
    return own


def _list_given(config: LoomConfig) -> list[str]:
    """Name the settings that a preset, a file or an option gave."""
    names = []
    for name in sorted(config.model_fields_set):
        section = getattr(config, name)
        if isinstance(section, Section):
            names += [f"{name}.{key}" for key in sorted(section.model_fields_set)]
        else:
            names.append(name)
    return names


def _is_same_place(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def prepare_run(
    out: Path,
    config: LoomConfig,
    runtime: Runtime,
    photos_folder: Path,
    resume: bool = False,
    observe: Observer = silent,
) -> tuple[RunFolder, Model, LoomConfig]:
    """Check everything that can be checked, load the base model, and only then make the folder.

    Args:
        out: The run's folder: new, empty, or a run with the same photos and settings.
        config: Settings as given.
        runtime: Where to compute; a run that is resumed elsewhere computes where it says.
        photos_folder: The photos; all of them are read once here.
        resume: Whether ``out`` must be a run already; see `take_up`.
        observe: Told what was planned.

    Returns:
        The claimed run, the model, and the settings without any ``auto``.

    Raises:
        PhotoError: If a photo cannot be read or there is none.
        ConfigError: If these settings cannot train this base model.
        RunFolderError: If ``out`` holds something else, or is no run although ``resume`` is asked.
        BaseModelError: If the base model cannot be found or read.
    """
    run = RunFolder(out)
    if resume:
        if not run.settings_file.is_file():
            raise RunFolderError(
                f"There is no run in {out} to go on with.", "Leave out --resume to start one."
            )
        given, config = config, take_up(run, config)
        if (given.device, given.precision) != (config.device, config.precision):
            runtime = pick_runtime(config.device, config.precision)
    run.refuse_other_folders()
    check_names(config)
    captions = _read_captions(run, photos_folder, config)
    check_class_images(photos_folder, config)
    check_held_out(photos_folder, config)
    for note in describe_words(config):
        observe(note)
    fitted = fit_training(config, runtime, len(captions), run)
    for line in fitted.lines:
        observe(Note("train", line))
    model, config = open_session(fitted.config, fitted.runtime, fitted.memory_options)
    _refuse_other_photos(run, photos_folder, config, model)
    for note in (*describe_reading(model, config), *warn_of_photographs(model, photos_folder)):
        observe(note)
    if not run.adapter.is_file():
        if config.train.compile == "blocks":
            observe(Note("train", "blocks are compiled, which takes a while for the first time"))
        check_training(model, captions, config)
        _check_judged(config, model)
    with join_processes().main_first():
        return open_run(out, resolve_defaults(fitted.lasting, model)), model, config


def _check_judged(config: LoomConfig, model: Model) -> None:
    """Refuse to end a training by scores whose encoder is not on this machine.

    Raises:
        ConfigError: If it is not.
    """
    if config.validation.patience is None:
        return
    name = model.identity.name
    encoder = pick_encoders(config.evaluate.encoders, name, config.device).identity
    if isinstance(encoder, Missing):
        raise ConfigError(
            f"validation.patience = {config.validation.patience} ends a training by the scores, "
            f"but nothing here can tell who is shown: {encoder.reason}.",
            "'dreamloom models list' shows the encoders and how to get them; or set "
            "validation.patience=none.",
        )


def _read_captions(run: RunFolder, folder: Path, config: LoomConfig) -> list[str]:
    """Read every photo of a new run through to its end, before anything is made of it."""
    if (run.photos / MANIFEST).is_file():
        return [photo.caption for photo in read_photo_set(run.photos).photos]
    with TemporaryDirectory() as scratch:
        keep_lines = config.photos.chooses_lines
        glance = load_photos(folder, RunFolder(scratch), _GLANCE_PX, keep_lines=keep_lines)
        return [photo.caption for photo in glance.photos]


def _refuse_other_photos(run: RunFolder, folder: Path, config: LoomConfig, model: Model) -> None:
    if not (run.photos / MANIFEST).is_file():
        return
    # As the run reads captions; another reading is named with the other settings that differ.
    known = load_run_settings(run.settings_file) if run.settings_file.is_file() else config
    keep_lines = known.photos.chooses_lines
    new = fingerprint_photos(folder, *_name_crops(config, model), keep_lines=keep_lines)
    if read_photo_set(run.photos).fingerprint != new:
        raise RunFolderError(
            f"{run.path} already holds another run: its photos are not those in {folder}.",
            "Name another --out; the finished run stays as it is.",
        )


def train_folder(
    photos_folder: Path,
    config: LoomConfig,
    out: Path | None = None,
    resume: bool = False,
    observe: Observer = silent,
) -> tuple[RunFolder, LoomConfig, Record]:
    """Go from a folder of photos and settings as given to an adapter; see `prepare_run`.

    Args:
        photos_folder: The photos.
        config: Settings as given.
        out: The run's folder; None names it after the subject.
        resume: Whether ``out`` must be a run already.
        observe: Told of progress.

    Returns:
        The run, its settings without any ``auto``, and the record of its training.

    Raises:
        ConfigError: If nobody named the subject, too.
    """
    if not resume:
        require_subject(config)
    runtime, out = pick_runtime(config.device, config.precision), out or name_folder(config)
    run, model, config = prepare_run(out, config, runtime, photos_folder, resume, observe)
    return run, config, train_subject(run, model, photos_folder, config, observe)


def train_subject(
    run: RunFolder,
    model: Model,
    photos_folder: Path,
    config: LoomConfig,
    observe: Observer = silent,
) -> Record:
    """Go from a folder of photos to an adapter: photos, class images, training."""
    processes = join_processes()
    tracker = choose_tracker(config.validation.tracker) if processes.is_main else NONE
    observe = tee(observe, run.observer()) if processes.is_main else silent
    for text in getattr(model, "notes", ()):
        observe(Note("train", text))
    if config.precision == "fp16" and model.runtime.dtype == torch.float32:
        note = f"computes in fp32: {model.runtime.device.type} has no use for fp16"
        observe(Note("train", note, warning=True))
    with track(tracker, "training", run.path / "logs", config.flat()) as told:
        # The first process prepares; the others then find everything done.
        with processes.main_first():
            side_px, shape, step_px = _name_crops(config, model)
            photos = load_photos(
                photos_folder,
                run,
                side_px,
                observe,
                shape=shape,
                step_px=step_px,
                keep_lines=config.photos.chooses_lines,
            )
        captions = [photo.caption for photo in photos.photos]
        for text in judge_captions(captions, config.subject.phrase, config.taught_words()):
            observe(Note("photos", text, warning=True))
        drawn = config.priors.kind == "generated" and config.train.prior_weight > 0
        if drawn and processes.count > 1:
            share = (processes.index, processes.count)
            draw_class_images(*_class_image_request(run, model, config), observe, share=share)
            processes.wait()
        with processes.main_first():
            priors = find_class_images(run, model, config, observe)
        # Samples may be asked for where none are due; encoders are loaded when they are needed.
        judge = make_judge(photos, config, run) if config.validation.scores else None
        return train_adapter(run, model, photos, priors, config, tee(observe, told), judge)


def make_judge(photos: PhotoSet, config: LoomConfig, run: RunFolder) -> ScoreImages:
    """Make what scores the pictures that are drawn while a training of the run goes on."""
    encoders: Encoders | None = None
    held_out = name_held_out(photos, config.validation.held_out_photos)

    def judge(images: ImageSet, floor: ImageSet | None) -> Scorecard:
        nonlocal encoders
        # Encoders are loaded when they are first needed, and then stay.
        if encoders is None:
            encoders = pick_encoders(config.evaluate.encoders, images.base_name, config.device)
        return evaluate_images(
            images,
            PartedPhotos(photos, held_out),
            floor=Floor(floor, _list_class_images(run)) if floor else None,
            subject=SubjectWords(config.subject.phrase, config.subject.class_noun),
            options=evaluation_options(config.evaluate),
            encoders=encoders,
        )

    return judge


def find_class_images(
    run: RunFolder, model: Model, config: LoomConfig, observe: Observer = silent
) -> ClassImageSet | None:
    """Draw, read or do without class images, as ``priors.kind`` says."""
    if config.train.prior_weight == 0:
        return None
    if config.priors.kind == "generated":
        return make_class_images(*_class_image_request(run, model, config), observe)
    if config.priors.kind == "folder":
        return load_class_images(
            Path(config.priors.folder),
            run,
            _name_crops(config, model)[0],
            config.class_prompt(),
            observe,
        )
    return None


def _class_image_request(
    run: RunFolder, model: Model, config: LoomConfig
) -> tuple[RunFolder, Model, str, PriorsConfig, int, int]:
    side_px = _name_crops(config, model)[0]
    return run, model, config.class_prompt(), config.worded_priors(), config.seed, side_px


def _name_crops(config: LoomConfig, model: Model) -> tuple[int, CropShape, int]:
    """Name the crops of resolved settings: their side, their shape, and the buckets' step."""
    side_px, shape = config.photos.resolution_px, config.photos.shape
    if side_px == "auto" or shape == "auto":
        raise ValueError("settings must be resolved first")
    return side_px, shape, suggest_step(side_px, model.pixels_per_latent)
