"""The whole journey on the embedded model: with and without class images, a style, a merge.

The same six photos are taught twice, with equal exposure; what differs is only whether class
images are seen as well. A pixel-art style is taught apart and merged with the subject.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime
from dreamloom.core.errors import DreamLoomError
from dreamloom.core.events import Observer, silent, tee
from dreamloom.core.manifests import ClassImageSet, ImageSet, PhotoSet, read_photo_set
from dreamloom.core.run_folder import RunFolder, file_sha256, library_versions, write_json
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.retention import MergeSets, Retention
from dreamloom.evaluation.scoring import Floor, pick_encoders
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.merging.files.merge import merge_adapters
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.merging.files.record import record_merge
from dreamloom.models.base import Model
from dreamloom.models.families import load_model
from dreamloom.pipeline.draw import pack_prompts
from dreamloom.pipeline.score_merge import evaluate_merge_run
from dreamloom.pipeline.score_set import evaluate_run
from dreamloom.pipeline.train import open_run, resolve_defaults
from dreamloom.report.render import write_report
from dreamloom.training.train import train_adapter

SUBJECT_WEIGHT, STYLE_WEIGHT = 1.0, 1.0
TABLE = {"schedulers": ("ddim", "pndm"), "steps": (50, 80)}
"""The seed study's table: every scheduler with every number of steps."""
QUICK_TABLE = {**TABLE, "steps": (20, 40)}


def examples_folder() -> Path:
    """Return the folder of the example photos: in the package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "examples"
    beside = Path(__file__).parents[3] / "examples"
    for folder in (inside, beside):
        if folder.is_dir():
            return folder
    raise DreamLoomError(
        f"The example photos are missing: neither {inside} nor {beside} is there.",
        "Install DreamLoom again.",
    )


def run_demo(out: Path, config: LoomConfig, runtime: Runtime, observe: Observer = silent) -> Path:
    """Run everything and return the path of the report; a stopped demo goes on where it was.

    Raises:
        RunFolderError: If ``out`` holds other files, or a run with other settings.
        TrainingError: If it was stopped while teaching.
    """
    model = load_model(config.base, runtime)
    config = resolve_defaults(config, model)
    root = open_run(out, config)
    observe = tee(observe, root.observer())
    side = model.advice.resolution_px
    photos = load_photos(examples_folder() / "rraj", root, side, observe)
    priors = make_class_images(
        root, model, config.class_prompt(), config.priors, config.seed, side, observe
    )
    without = _train(root, "without_prior", model, photos, None, config, observe)
    with_prior = _train(root, "with_prior", model, photos, priors, config, observe)
    style = _train_style(root, model, config, observe)
    merged = _merge(root, with_prior, style, observe)
    sets = _draw(root, model, config, (without, with_prior, style, merged), observe)
    scorecards = _score(root, sets, photos, priors, config, observe)
    kept = _score_merge(root, sets, photos, read_photo_set(style.photos), config, observe)
    _summarise(root, config, scorecards, kept)
    return write_report(out, observe)


def _train(
    root: RunFolder,
    name: str,
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    observe: Observer,
) -> RunFolder:
    if priors is None:
        config = config.model_copy(
            update={"priors": config.priors.model_copy(update={"kind": "none"})}
        )
    run = open_run(root.path / name, config)
    train_adapter(run, model, photos, priors, config, tee(observe, run.observer()))
    return run


def _train_style(root: RunFolder, model: Model, config: LoomConfig, observe: Observer) -> RunFolder:
    """Teach pixel art from captioned pictures; its trigger is the word ``pixel``."""
    subject = config.subject.model_copy(
        update={"phrase": "pixel", "class_noun": "picture", "photo_prompt": "pixel, a photo"}
    )
    config = config.model_copy(
        update={
            "subject": subject,
            "priors": config.priors.model_copy(update={"kind": "none"}),
        }
    )
    run = open_run(root.path / "style", config)
    observe = tee(observe, run.observer())
    folder = examples_folder() / "pixel-art"
    pictures = load_photos(folder, run, model.advice.resolution_px, observe)
    train_adapter(run, model, pictures, None, config, observe)
    return run


def _merge(root: RunFolder, subject: RunFolder, style: RunFolder, observe: Observer) -> Path:
    parts = [AdapterPart(subject.adapter, SUBJECT_WEIGHT), AdapterPart(style.adapter, STYLE_WEIGHT)]
    out = root.path / "merged.safetensors"
    inputs = {f"part{number}": file_sha256(part.path) for number, part in enumerate(parts)}
    if not root.finished("merge", inputs):
        start = time.perf_counter()
        merged = merge_adapters(parts, out, overwrite=True, observe=observe)
        record_merge(root, parts, out, merged, time.perf_counter() - start)
    return out


def _draw(
    root: RunFolder,
    model: Model,
    config: LoomConfig,
    adapters: tuple[RunFolder, RunFolder, RunFolder, Path],
    observe: Observer,
) -> dict[str, ImageSet]:
    """Draw every set; sets that are compared share prompts, seeds and samplers."""
    without, with_prior, style, merged = adapters
    phrase = config.subject.phrase
    # Whether "a person" is still everybody is seen only in pictures of the class.
    prompts = [*pack_prompts("seed-v1", phrase), Prompt(config.class_prompt(), "class")]
    pixel = pack_prompts("pixel-v1", phrase)
    table = config.generate.model_copy(update=QUICK_TABLE if config.preset == "quick" else TABLE)
    wanted: dict[str, tuple[list[Prompt], Any, list[ActiveAdapter]]] = {
        "base": (prompts, config.generate, []),
        "without_prior": (prompts, config.generate, [ActiveAdapter(without.adapter)]),
        "with_prior": (prompts, config.generate, [ActiveAdapter(with_prior.adapter)]),
        "base_merged": (pixel, config.generate, []),
        "with_prior_alone": (pixel, config.generate, [ActiveAdapter(with_prior.adapter)]),
        "style": (pixel, config.generate, [ActiveAdapter(style.adapter)]),
        "merged": (pixel, config.generate, [ActiveAdapter(merged)]),
        "table_base": (prompts[:1], table, []),
        "table_without_prior": (prompts[:1], table, [ActiveAdapter(without.adapter)]),
        "table_with_prior": (prompts[:1], table, [ActiveAdapter(with_prior.adapter)]),
    }
    return {
        name: generate_images(root, model, texts, settings, active, name, observe)
        for name, (texts, settings, active) in wanted.items()
    }


_FLOORS = {
    "without_prior": "base",
    "with_prior": "base",
    "with_prior_alone": "base_merged",
    "style": "base_merged",
    "merged": "base_merged",
    "table_without_prior": "table_base",
    "table_with_prior": "table_base",
}
"""Which of the base model's sets each set is compared with."""


def _score(
    root: RunFolder,
    sets: dict[str, ImageSet],
    photos: PhotoSet,
    priors: ClassImageSet,
    config: LoomConfig,
    observe: Observer,
) -> dict[str, Scorecard]:
    encoders = pick_encoders(config.evaluate.encoders, sets["base"], config.device)
    return {
        name: evaluate_run(
            root,
            images,
            photos,
            floor=Floor(sets[_FLOORS[name]], priors.paths()) if name in _FLOORS else None,
            config=config.evaluate,
            subject=config.subject,
            encoders=encoders,
            observe=observe,
        )
        for name, images in sets.items()
    }


def _score_merge(
    root: RunFolder,
    sets: dict[str, ImageSet],
    photos: PhotoSet,
    style_pictures: PhotoSet,
    config: LoomConfig,
    observe: Observer,
) -> Retention:
    """Say what the merge has kept of the subject and of the style."""
    beside = MergeSets(
        base=sets["base_merged"],
        subject=sets["with_prior_alone"],
        style=sets["style"],
        merged=sets["merged"],
    )
    encoders = pick_encoders(config.evaluate.encoders, sets["base"], config.device)
    return evaluate_merge_run(
        root, beside, photos, style_pictures, config.evaluate, encoders, observe
    )


def _summarise(
    root: RunFolder, config: LoomConfig, scorecards: dict[str, Scorecard], kept: Retention
) -> None:
    """Write what programs read: scores of the headline prompt, and seconds per stage."""
    headline = pack_prompts("seed-v1", config.subject.phrase)[0].text
    merged = pack_prompts("pixel-v1", config.subject.phrase)[0].text
    scores = {
        name: _prompt_scores(scorecards[name], headline)
        for name in ("base", "without_prior", "with_prior")
    }
    write_json(
        root.path / "summary.json",
        {
            "kind": "demo",
            "preset": config.preset,
            "subject": config.subject.phrase,
            "class_noun": config.subject.class_noun,
            "seed": config.seed,
            **scores,
            "merged": {
                **_prompt_scores(scorecards["merged"], merged),
                "identity_retention": kept.identity.model_dump(mode="json"),
                "style_retention": kept.style.model_dump(mode="json"),
            },
            "scores_on": {"merged": merged, "base, without_prior, with_prior": headline},
            "seconds": collect_seconds(root),
            "versions": library_versions(),
        },
    )


def _prompt_scores(card: Scorecard, prompt: str) -> dict[str, Any]:
    group = next(group for group in card.by_prompt if group.prompt == prompt)
    return {name: score.model_dump(mode="json") for name, score in group.scores.items()}


def collect_seconds(root: RunFolder) -> dict[str, float]:
    """Read how long each stage took from the records of the demo and its runs."""
    seconds: dict[str, float] = {}
    for run, suffix in [(root, "")] + [
        (RunFolder(root.path / name), f"-{name}")
        for name in ("without_prior", "with_prior", "style")
    ]:
        for path in sorted(run.records.glob("*.json")):
            record = run.read_record(path.stem)
            if record:
                seconds[record.stage + suffix] = round(record.seconds, 2)
    return seconds
