"""The demo: the whole journey on the embedded model, with class images, a style and a merge.

The same six photos are trained on twice, with equal exposure; what differs is only whether class
images are seen as well. A pixel-art style is trained apart and merged with the subject. What does
not wait for each other is done side by side: of small models, processes of one thread each get
more out of several cores than one process with several threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamloom.core.config.settings import GenerateConfig, LoomConfig
from dreamloom.core.device import Runtime
from dreamloom.core.events import Observer, silent, tee
from dreamloom.core.manifests import (
    ClassImageSet,
    ImageSet,
    PhotoSet,
    SetPurpose,
    SetRole,
    read_photo_set,
)
from dreamloom.core.run_folder import RunFolder, file_sha256, library_versions, write_json
from dreamloom.data.class_images import make_class_images
from dreamloom.data.examples import examples_folder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.compare import FEWEST_PAIRS
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.retention import MergeSets, Retention
from dreamloom.evaluation.scoring import Floor, pick_encoders
from dreamloom.experiments.pool import open_crew
from dreamloom.inference.generate import ActiveAdapter, Prompt, SetName, generate_images
from dreamloom.merging.files.merge import merge_adapters, record_merge
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.pipeline.draw import pack_prompts
from dreamloom.pipeline.score_merge import evaluate_merge_run
from dreamloom.pipeline.score_set import evaluate_run
from dreamloom.pipeline.session import open_session
from dreamloom.pipeline.train import open_run
from dreamloom.report.answers import find_headline
from dreamloom.report.render import write_report
from dreamloom.report.story import read_story
from dreamloom.training.train import train_adapter

STAGE = "demo"
_MOST_WORKERS = 3  # so many trainings are there
SUBJECT_WEIGHT, STYLE_WEIGHT = 1.0, 1.0
TABLE = {"schedulers": ("ddim", "pndm"), "steps": (50, 80)}
"""The seed study's table: every scheduler with every number of steps."""
QUICK_TABLE = {**TABLE, "steps": (20, 40), "images_per_prompt": 2}
SUBJECT_PROMPTS, CLASS_PROMPTS = 12, 7
"""How many prompts are drawn: prompts, not seeds, are what tests count. With seven of a kind the
smallest p stays below 0.05 corrected for the three scores that class images are asked about."""


def run_demo(out: Path, config: LoomConfig, runtime: Runtime, observe: Observer = silent) -> Path:
    """Run everything and return the path of the report; a stopped demo goes on where it was.

    Raises:
        RunFolderError: If ``out`` holds other files, or a run with other settings.
        TrainingError: If it was stopped while training.
    """
    model, config = open_session(config, runtime, observe=observe)
    root = open_run(out, config)
    observe = tee(observe, root.observer())
    workers, threads = share_cores(runtime, torch.get_num_threads())
    side = model.advice.resolution_px
    photos = load_photos(examples_folder() / "rraj", root, side, observe)
    priors = make_class_images(
        root, model, config.class_prompt(), config.worded_priors(), config.seed, side, observe
    )
    # The style's trigger is the word "pixel", and its pictures have captions.
    subject = config.subject.model_copy(
        update={"phrase": "pixel", "class_noun": "picture", "photo_prompt": "pixel, a photo"}
    )
    pixel_config = config.model_copy(update={"subject": subject})
    pixel_art = examples_folder() / "pixel-art"
    # The longest first, so that none of those who work is left with it alone.
    lessons = {
        "with_prior": Lesson(root, "with_prior", config, runtime, photos, priors),
        "without_prior": Lesson(root, "without_prior", config, runtime, photos),
        "style": Lesson(root, "style", pixel_config, runtime, pixel_art),
    }
    with open_crew(workers, threads=threads) as crew:
        adapters = crew.do_all(teach, lessons, observe, "teaching", STAGE, is_told=True)
        adapters["merged"] = _merge(root, adapters["with_prior"], adapters["style"], observe)
        drawings = _list_drawings(root, config, runtime, adapters)
        sets = crew.do_all(draw_set, drawings, observe, "drawing", STAGE, is_told=True)
    scorecards, retention = _score(root, sets, photos, priors, config, observe)
    _summarise(root, config, scorecards, retention)
    return write_report(out, observe)


def share_cores(runtime: Runtime, threads: int) -> tuple[int, int]:
    """Share a processor's threads out among processes; a GPU is left to one.

    Args:
        runtime: Where is computed.
        threads: How many threads torch would use.

    Returns:
        How many processes, and the threads of each.
    """
    if runtime.device.type != "cpu":
        return 1, threads
    workers = min(_MOST_WORKERS, threads)
    return workers, threads // workers


@dataclass(frozen=True)
class Lesson:
    """A training of the demo.

    Args:
        root: The demo's folder.
        name: The training's folder in it.
        config: Its settings.
        runtime: Where to compute.
        photos: The photos, or a folder of them.
        priors: Class images; None trains without.
    """

    root: RunFolder
    name: str
    config: LoomConfig
    runtime: Runtime
    photos: PhotoSet | Path
    priors: ClassImageSet | None = None


def teach(lesson: Lesson, observe: Observer = silent) -> Path:
    """Train in a folder of its own, which also gets the photos of a folder; return the adapter."""
    config, photos = lesson.config, lesson.photos
    if lesson.priors is None:
        config = config.model_copy(
            update={"priors": config.priors.model_copy(update={"kind": "none"})}
        )
    model, _ = open_session(config, lesson.runtime)
    run = open_run(lesson.root.path / lesson.name, config)
    observe = tee(observe, run.observer())
    if isinstance(photos, Path):
        photos = load_photos(photos, run, model.advice.resolution_px, observe)
    train_adapter(run, model, photos, lesson.priors, config, observe)
    return run.adapter


def _merge(root: RunFolder, subject: Path, style: Path, observe: Observer) -> Path:
    parts = [AdapterPart(subject, SUBJECT_WEIGHT), AdapterPart(style, STYLE_WEIGHT)]
    out = root.path / "merged.safetensors"
    inputs = {f"part{number}": file_sha256(part.path) for number, part in enumerate(parts)}
    if not root.finished("merge", inputs):
        start = time.perf_counter()
        merged = merge_adapters(parts, out, overwrite=True, observe=observe)
        record_merge(root, parts, out, merged, time.perf_counter() - start)
    return out


_SETS: dict[str, tuple[str, str]] = {
    "base": ("seed", ""),
    "without_prior": ("seed", "without_prior"),
    "with_prior": ("seed", "with_prior"),
    "base_merged": ("pixel", ""),
    "with_prior_alone": ("pixel", "with_prior"),
    "style": ("pixel", "style"),
    "merged": ("pixel", "merged"),
    "table_base": ("table", ""),
    "table_without_prior": ("table", "without_prior"),
    "table_with_prior": ("table", "with_prior"),
}
"""Each set of pictures: what is drawn, and the adapter that draws it; without one it is the base
model's, and so the floor of all that draw the same. They share prompts, seeds and samplers."""

_ROLES: dict[str, SetRole] = {
    "": "base",
    "without_prior": "subject without class images",
    "with_prior": "subject with class images",
    "style": "style",
    "merged": "merged",
}
"""Who draws with which adapter."""

_PURPOSES: dict[str, SetPurpose] = {"seed": "main", "pixel": "merge", "table": "table"}

_FLOORS = {what: name for name, (what, adapter) in _SETS.items() if not adapter}


@dataclass(frozen=True)
class Drawing:
    """A set of pictures of the demo.

    Args:
        root: The demo's folder.
        config: Names the base model.
        runtime: Where to compute.
        prompts: What is drawn.
        settings: How.
        active: The adapters that draw.
        named: What the set is called, and what it is for.
    """

    root: RunFolder
    config: LoomConfig
    runtime: Runtime
    prompts: Sequence[Prompt]
    settings: GenerateConfig
    active: Sequence[ActiveAdapter]
    named: SetName

    def count_steps(self) -> int:
        """Count the denoising steps of all pictures."""
        given = self.settings
        of_each = given.images_per_prompt * len(given.schedulers) * sum(given.steps)
        return len(self.prompts) * of_each


def draw_set(drawing: Drawing, observe: Observer = silent) -> ImageSet:
    """Draw a set, unless it was done."""
    model, _ = open_session(drawing.config, drawing.runtime)
    return generate_images(
        drawing.root,
        model,
        drawing.prompts,
        drawing.settings,
        drawing.active,
        drawing.named,
        observe,
    )


def _list_drawings(
    root: RunFolder, config: LoomConfig, runtime: Runtime, adapters: dict[str, Path]
) -> dict[str, Drawing]:
    prompts, seeds = list_prompts(config), config.generate.images_per_prompt
    table = config.generate.model_copy(update=QUICK_TABLE if config.preset == "quick" else TABLE)
    # Many prompts of few seeds tell more than few of many, in the same time.
    few, enough = min(seeds, max(2, 3 * seeds // 8)), max(seeds, FEWEST_PAIRS)
    drawn = {
        "seed": (prompts, config.generate.model_copy(update={"images_per_prompt": few})),
        "pixel": (
            pack_prompts("pixel-v1", config.subject.phrase),
            config.generate.model_copy(update={"images_per_prompt": enough}),
        ),
        "table": (prompts[:1], table),
    }
    drawings = {
        name: Drawing(
            root,
            config,
            runtime,
            *drawn[what],
            [ActiveAdapter(adapters[adapter])] if adapter else [],
            SetName(name, _ROLES[adapter], _PURPOSES[what]),
        )
        for name, (what, adapter) in _SETS.items()
    }
    return dict(sorted(drawings.items(), key=lambda item: -item[1].count_steps()))


def list_prompts(config: LoomConfig) -> list[Prompt]:
    """List the demo's prompts: the seed study's first, and what the embedded model draws besides.

    Whether "a person" is still everybody is seen only in pictures of the class, so these follow.
    """
    phrase, noun = config.subject.phrase, config.subject.class_noun
    packs = [pack_prompts(name, phrase, noun) for name in ("seed-v1", "picturebook-v1")]
    others = [
        Prompt(config.class_prompt(), "class"),
        *pack_prompts("picturebook-class-v1", phrase, noun),
    ]
    return [
        *_first_of([prompt for pack in packs for prompt in pack], SUBJECT_PROMPTS),
        *_first_of(others, CLASS_PROMPTS),
    ]


def _first_of(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Keep the first prompts of different words."""
    different: dict[str, Prompt] = {}
    for prompt in prompts:
        different.setdefault(prompt.text, prompt)
    return list(different.values())[:count]


def _score(
    root: RunFolder,
    sets: dict[str, ImageSet],
    photos: PhotoSet,
    priors: ClassImageSet,
    config: LoomConfig,
    observe: Observer,
) -> tuple[dict[str, Scorecard], Retention]:
    """Score every set, and what the merge has kept of the subject and of the style."""
    encoders = pick_encoders(config.evaluate.encoders, sets["base"].base_name, config.device)
    cards = {}
    for name, (what, adapter) in _SETS.items():
        cards[name] = evaluate_run(
            root,
            sets[name],
            photos,
            floor=Floor(sets[_FLOORS[what]], priors.paths()) if adapter else None,
            config=config.evaluate,
            subject=config.subject,
            encoders=encoders,
            observe=observe,
        )
    compared = MergeSets(
        sets["base_merged"], sets["with_prior_alone"], sets["style"], sets["merged"]
    )
    style_pictures = read_photo_set(RunFolder(root.path / "style").photos)
    return cards, evaluate_merge_run(
        root, compared, photos, style_pictures, config.evaluate, encoders, observe
    )


def _summarise(
    root: RunFolder, config: LoomConfig, scorecards: dict[str, Scorecard], retention: Retention
) -> None:
    """Write what programs read: the main result, scores of the sets, and seconds per stage."""
    story = read_story(root.path)
    scores = {
        name: _list_scores(scorecards[name])
        for name in ("base", "without_prior", "with_prior", "merged")
    }
    headline = find_headline(story)
    write_json(
        root.path / "summary.json",
        {
            "kind": "demo",
            "preset": config.preset,
            "subject": config.subject.phrase,
            "class_noun": config.subject.class_noun,
            "seed": config.seed,
            "headline": None
            if headline is None
            else {
                "set": headline.name,
                "measure": "identity",
                "of": headline.tell_what(),
                "prompts": headline.prompts,
                **headline.score.model_dump(mode="json"),
            },
            **scores,
            "merged": {
                **scores["merged"],
                "identity_retention": retention.identity.model_dump(mode="json"),
                "style_retention": retention.style.model_dump(mode="json"),
            },
            "scores_on": "all prompts of each set, as in scores.json",
            "seconds": collect_seconds(root),
            "versions": library_versions(),
        },
    )


def _list_scores(card: Scorecard) -> dict[str, Any]:
    return {name: score.model_dump(mode="json") for name, score in card.scores.items()}


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
