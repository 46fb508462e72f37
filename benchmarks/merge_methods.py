"""What every merge method keeps of a subject, of a style and of the prompts, on picturebook.

One subject and one style, both at weight 1, merged by every method with its default options; the
same prompts and seeds for all, drawn by DDIM. The adapters are those of a finished demo, or are
taught here first. What lies in the folder is not done again: a stopped table goes on.

    python benchmarks/merge_methods.py --run runs/demo [--out DIR] [--method NAME]…
        [--prompts 9] [--seeds 4] [--steps 25] [--workers 2] [--json FILE]

Retention is that of `dreamloom retention`; "against the sum" is the change of the harmonic mean of
all three shares, prompt by prompt, with the interval of that one comparison.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from dreamloom.experiments.study.pool import open_crew

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import DreamLoomError
from dreamloom.core.manifests import ImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder, file_sha256, library_versions, write_json
from dreamloom.data.examples import examples_folder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.compare import Comparison
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.retention import MergeSets, evaluate_merge
from dreamloom.evaluation.scoring import evaluate_images, pick_encoders
from dreamloom.experiments.merge_search.embeddings import MeasuredImage, PictureJudge, References
from dreamloom.experiments.merge_search.findings import format_score, table
from dreamloom.experiments.merge_search.retention import Ends
from dreamloom.experiments.merge_search.summarise import (
    compare_retention,
    decide_together,
    join_retention,
)
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.models.base import Model
from dreamloom.models.families import load_model
from dreamloom.models.lora_schedule import Composition
from dreamloom.pipeline.draw import pack_prompts
from dreamloom.pipeline.score_set import evaluation_options
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import prepare_run, train_subject

SUBJECT, TRIGGER = "rraj person", "pixel"
WHILE_DRAWING = {"switch": Composition("switch"), "k-lora": Composition("k-lora")}
"""Ways to wear both that make no file."""

ENDS = {"base": "base model", "subject": "subject alone", "style": "style alone"}


@dataclass(frozen=True)
class Task:
    """One way to merge, or one end: what to draw, and where."""

    out: Path
    name: str
    files: tuple[Path, Path]
    prompts: int
    seeds: int
    steps: int


@dataclass(frozen=True)
class Done:
    """What came of it: the set of pictures, or why there is none."""

    images: ImageSet | None = None
    skipped: str = ""
    seconds: float = 0.0
    rank: int = 0
    lost: float = 0.0


@dataclass(frozen=True)
class Row:
    """What one way to merge, or an end, has kept."""

    name: str
    identity: Score
    style: Score
    prompt: Score
    clip_t: Score
    together: float | None
    against_sum: Comparison | None
    copies: int
    alarms: tuple[str, ...]
    seconds: float
    rank: int
    lost: float

    @property
    def is_end(self) -> bool:
        """Whether it is no merge."""
        return self.name in ENDS


def list_prompts(count: int) -> list[Prompt]:
    """The seed study's merge prompt, and the same in scenes; the style is called in each."""
    scenes = [
        replace(prompt, text=f"{TRIGGER}, {prompt.text}", category="merge", style="art")
        for prompt in pack_prompts("picturebook-v1", SUBJECT)
        if prompt.category in {"photo", "scene"} and prompt.style == "photo"
    ]
    return [*pack_prompts("pixel-v1", SUBJECT), *scenes][:count]


def settings(task: Task) -> LoomConfig:
    """Settings of drawing and scoring, settled for picturebook."""
    drawn = {"steps": (task.steps,), "images_per_prompt": task.seeds, "schedulers": ("ddim",)}
    overrides = {f"generate.{name}": value for name, value in drawn.items()}
    return resolve_defaults(
        load_config(overrides={**overrides, "evaluate.detectors": False}), load()
    )


@cache
def load() -> Model:
    """Load picturebook once per process."""
    return load_model("picturebook", pick_runtime("cpu"))


def do_task(task: Task, observe: object = None) -> Done:
    """Merge and draw; an error that a user could meet is the reason why it is left out."""
    del observe
    try:
        return draw(task)
    except DreamLoomError as error:
        return Done(skipped=str(error))


def draw(task: Task) -> Done:
    """Merge, unless it was done, and draw what is missing."""
    run, config = RunFolder(task.out), settings(task)
    active, done, composition = list_worn(task)
    if done.skipped:
        return done
    key = "" if composition else "-" + file_sha256(active[0].path)[:8] if active else ""
    images = generate_images(
        run,
        load(),
        list_prompts(task.prompts),
        config.generate,
        active,
        f"{task.name}{key}",
        composition=composition or Composition(),
    )
    return replace(done, images=images)


def list_worn(task: Task) -> tuple[list[ActiveAdapter], Done, Composition | None]:
    """Say what is worn for one way to merge, or for an end."""
    if task.name == "base":
        return [], Done(), None
    if task.name in {"subject", "style"}:
        return [ActiveAdapter(task.files[task.name == "style"])], Done(), None
    if task.name in WHILE_DRAWING:
        return [ActiveAdapter(path) for path in task.files], Done(), WHILE_DRAWING[task.name]
    path, done = merge(task)
    return [ActiveAdapter(path)], done, None


def merge(task: Task) -> tuple[Path, Done]:
    """Merge by one method, or read what an earlier call has merged."""
    path = task.out / "adapters" / f"{task.name}.safetensors"
    told = path.with_suffix(".json")
    hashes = [file_sha256(file) for file in task.files]
    if path.is_file() and told.is_file():
        known = json.loads(told.read_text(encoding="utf-8"))
        if known["parts"] == hashes:
            return path, Done(seconds=known["seconds"], rank=known["rank"], lost=known["lost"])
    adapters = [read_adapter(file) for file in task.files]
    request = MergeRequest([1.0, 1.0], task.name)
    prepared = None
    start = time.perf_counter()
    if METHODS[task.name].needs in {"activations", "training"}:
        try:
            from dreamloom.merging.activations.prepare import prepare_merge
        except ImportError:
            return path, Done(skipped="it needs the base model, which cannot be asked yet")
        preparation = prepare_merge(load(), adapters, request)
        prepared = preparation.layers if preparation else None
    combined = combine(adapters, request, prepared)
    seconds = time.perf_counter() - start
    metadata = {
        name: text
        for name, text in adapters[0].metadata.items()
        if name in {"dreamloom.base", "dreamloom.base_fingerprint", "dreamloom.subject"}
    }
    write_adapter(path, replace(combined.adapter, metadata=metadata))
    ranks = [report.rank for report in combined.reports.values()]
    done = Done(seconds=seconds, rank=max(ranks), lost=combined.error)
    write_json(told, {"seconds": seconds, "rank": done.rank, "lost": done.lost, "parts": hashes})
    return path, done


def teach_parts(out: Path) -> tuple[Path, Path]:
    """Teach the subject and the style as the demo does."""
    wishes = {
        "with_prior": ("rraj", {}),
        "style": (
            "pixel-art",
            {
                "subject.phrase": TRIGGER,
                "subject.class_noun": "picture",
                "subject.photo_prompt": f"{TRIGGER}, a photo",
                "priors.kind": "none",
            },
        ),
    }
    for name, (photos, overrides) in wishes.items():
        folder = examples_folder() / photos
        config = load_config(overrides=overrides)
        run, model, config = prepare_run(out / name, config, pick_runtime("cpu"), folder)
        train_subject(run, model, folder, config)
    return find_parts(out)


def find_parts(run: Path) -> tuple[Path, Path]:
    """Name the two adapters of a demo's folder."""
    return run / "with_prior" / "adapter.safetensors", run / "style" / "adapter.safetensors"


def score(done: dict[str, Done], out: Path, config: LoomConfig) -> list[Row]:
    """Score every way that could be drawn, beside the ends."""
    sets = {name: one.images for name, one in done.items() if one.images is not None}
    photos, style = (
        load_photos(examples_folder() / folder, claim(out / folder), 128)
        for folder in ("rraj", "pixel-art")
    )
    options = evaluation_options(config.evaluate)
    encoders = pick_encoders(config.evaluate.encoders, sets["base"].base_name)
    judge = PictureJudge(encoders, refer(photos, style))
    looks = {name: judge.look(images) for name, images in sets.items()}
    prompts = [picture.prompt for picture in sets["base"].pictures]
    ends = Ends(prompts, looks["base"], looks["subject"], looks["style"])
    rows = []
    for name, images in sets.items():
        parts = (sets["base"], sets["subject"], sets["style"])
        kept = evaluate_merge(MergeSets(*parts, images), photos, style, encoders, options)
        card = evaluate_images(
            images,
            photos,
            floor=sets["base"],
            subject=SubjectWords(config.subject.phrase, config.subject.class_noun),
            options=options,
            encoders=encoders,
        )
        shares = ends.score(looks[name], {}, config.evaluate.resamples, config.evaluate.confidence)
        rows.append(
            Row(
                name=name,
                identity=kept.identity,
                style=kept.style,
                prompt=shares["prompt"],
                clip_t=card.scores["clip_t"],
                together=join_retention(ends.keep(looks[name])),
                against_sum=compare(ends, looks, name),
                copies=sum(one.copies_photo or one.copies_style for one in looks[name]),
                alarms=card.alarms,
                seconds=round(done[name].seconds, 2),
                rank=done[name].rank,
                lost=done[name].lost,
            )
        )
    return rows


def refer(photos: PhotoSet, style: PhotoSet) -> References:
    """What pictures are compared with; every prompt is drawn with all others."""
    prompts = tuple(prompt.text for prompt in list_prompts(100))
    return References(photos, style, None, (prompts,), SUBJECT, "person")


def compare(ends: Ends, looks: dict[str, list[MeasuredImage]], name: str) -> Comparison | None:
    """Compare a way to merge with the plain sum."""
    if name == "sum" or name in ENDS or "sum" not in looks:
        return None
    return decide_together({name: compare_retention(ends, looks["sum"], looks[name])})[name]


def claim(path: Path) -> RunFolder:
    """Make a folder for prepared photos."""
    run = RunFolder(path)
    run.claim()
    return run


def print_table(rows: Sequence[Row]) -> None:
    """Print the methods, the ends last; the best by the harmonic mean of all shares first."""
    head = [
        *("method", "identity kept", "style kept", "prompts kept", "together", "CLIP-T"),
        *("against the sum", "rank", "cut off", "merging, s"),
    ]
    ordered = sorted(rows, key=lambda row: (row.is_end, -(row.together or 0)))
    print("\n".join(table(head, [tell_row(row) for row in ordered])))


def tell_row(row: Row) -> list[str]:
    """One line of the table."""
    identity, style, prompt, clip_t = map(
        format_score, (row.identity, row.style, row.prompt, row.clip_t)
    )
    against = "–"
    if row.against_sum is not None and row.against_sum.difference is not None:
        against = f"{row.against_sum.difference:+.2f}"
        if row.against_sum.interval is not None:
            against += " ({:+.2f} to {:+.2f})".format(*row.against_sum.interval)
    made = [str(row.rank), f"{row.lost:.1%}", f"{row.seconds:.1f}"] if row.rank else ["–"] * 3
    together = "–" if row.together is None else f"{row.together:.2f}"
    name = ENDS.get(row.name, row.name)
    return [name, identity, style, prompt, together, clip_t, against.replace("-", "−"), *made]


def main() -> None:
    """Merge, draw, score, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="A finished demo; without one both are taught.")
    parser.add_argument("--out", type=Path, default=Path("runs/merge-methods"))
    parser.add_argument("--method", action="append", help="This one only; may be repeated.")
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    start = time.perf_counter()
    RunFolder(given.out).claim()
    files = find_parts(given.run) if given.run else teach_parts(given.out / "taught")
    ways = given.method or [*METHODS, *WHILE_DRAWING]
    shape = (files, given.prompts, given.seeds, given.steps)
    tasks = {
        name: Task(given.out.absolute(), name, *shape)
        for name in ("base", "subject", "style", *dict.fromkeys(("sum", *ways)))
    }
    with open_crew(given.workers) as crew:
        found = crew.do_all(do_task, tasks, show, "ways to merge")
    done = {name: found[name] for name in tasks}
    rows = score(done, given.out, settings(next(iter(tasks.values()))))
    print_table(rows)
    skipped = {name: one.skipped for name, one in done.items() if one.skipped}
    for name, why in skipped.items():
        print(f"{name} is left out: {why}")
    seconds = time.perf_counter() - start
    pictures = given.prompts * given.seeds
    print(f"{pictures} pictures of each; {seconds:.0f} s in {given.workers} processes")
    if given.json:
        told = {"rows": rows, "skipped": skipped, "pictures": pictures, "seconds": seconds}
        how = {"steps": given.steps, "seeds": given.seeds}
        prompts = [prompt.text for prompt in list_prompts(given.prompts)]
        hashes = {str(file): file_sha256(file) for file in files}
        base = load().identity.as_dict()
        write_json(
            given.json,
            {**told, **how, "prompts": prompts, "adapters": hashes, "base": base}
            | {"versions": library_versions()},
        )


def show(event: object) -> None:
    """Say how far it is, on standard error."""
    done, total = getattr(event, "done", None), getattr(event, "total", None)
    if done:
        print(f"{done} of {total}", file=sys.stderr)


if __name__ == "__main__":
    main()
