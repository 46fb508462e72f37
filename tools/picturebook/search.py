"""The search for picturebook's advice: a designed study of settings on the trial's yardstick.

``python -m tools.picturebook.search --work FOLDER`` teaches the trial's first persons with each
run of `search_design`, draws with every adapter in several ways, and measures obedience, likeness,
looks and what became of the class. It takes hours, and goes on from what lies in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from jaxtyping import Float

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig, Preset
from dreamloom.core.errors import DreamLoomError
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.core.manifests import ImageSet, read_class_image_set, read_image_set
from dreamloom.core.run_folder import RunFolder, write_json, write_text
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.display.progress import watch
from dreamloom.experiments.pool import open_pool
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import open_run
from dreamloom.training.train import train_adapter
from tools.picturebook.search_design import (
    Effect,
    Factor,
    estimate_effects,
    make_design,
    settings_of,
)
from tools.picturebook.search_plot import draw_effects
from tools.picturebook.trial import MOST_SUBJECTS, load_base
from tools.picturebook.trial_appearance import judge_appearance
from tools.picturebook.trial_judging import Subject
from tools.picturebook.trial_measures import (
    judge_class,
    judge_obedience,
    measure_lift,
    open_all,
    pair_up,
)
from tools.picturebook.trial_people import choose_people, draw_photos
from tools.picturebook.trial_prompts import (
    ASKED,
    CLASS_ASKED,
    PLAIN,
    Ask,
    contradicting_anybody,
)

FACTORS = (
    Factor("rate", ("train.learning_rate=1e-3",), ("train.learning_rate=2e-3",)),
    Factor("updates", ("train.steps=200",), ("train.steps=400",)),
    Factor("rank", ("train.rank=4",), ("train.rank=16",)),
    Factor("target modules", ("train.target_modules=attention",), ("train.target_modules=all",)),
    Factor("weighting", ("objective.weighting=min_snr",), ("objective.weighting=debiased",)),
    Factor("caption dropout", ("train.caption_dropout=0",), ("train.caption_dropout=0.15",)),
    Factor("prior target", ("train.prior_target=images",), ("train.prior_target=base_prediction",)),
    Factor("prior weight", ("train.prior_weight=1",), ("train.prior_weight=2",)),
    Factor("class images", ("priors.count=48",), ("priors.count=96",)),
    Factor("class prompts", ("priors.prompts=[]",), ()),
)
"""What is tried; the design's last column is left, and says who is taught."""

MEASURES = ("identity", "lost", "contradicted", "kept", "colour", "sharpness", "spread", "distance")
"""What is measured, in the table's order; `measure` says what each is."""


@dataclass(frozen=True)
class Way:
    """A way of drawing with an adapter: guidance, how much it is rescaled, the adapter's weight."""

    guidance: float = 4.0
    weight: float = 1.0
    rescale: float = 0.0

    @property
    def name(self) -> str:
        """The end of the names of its sets: all three in hundredths."""
        shares = (self.guidance, self.weight, self.rescale)
        return "-".join(f"{round(100 * share)}" for share in shares)

    @property
    def words(self) -> str:
        """What the table says."""
        rescale = f", rescale {self.rescale:g}" if self.rescale else ""
        return f"guidance {self.guidance:g}, weight {self.weight:g}{rescale}"


WAYS = (
    Way(),
    Way(weight=0.7),
    Way(guidance=2.5),
    Way(weight=0.7, rescale=0.7),
)
"""How each adapter draws; effects of settings are told for the first."""

UNSCALED = ("train.final_scale=1",)
"""Set in all runs: an adapter's weight is a way of drawing here."""

_RESULT = "measured.json"
_PHOTOS, _HELD_OUT, _STEPS = 6, 24, 15
_EACH = {"portrait": 6, "asked": 1, "contradicting": 2, "class": 8, "class-asked": 2}


@dataclass(frozen=True)
class SearchPlan:
    """What is tried.

    Args:
        preset: The preset that all runs begin from.
        design: Levels of each run; see `search_design`.
        pairs: Of how many pairs of persons each run teaches one.
        ways: How each adapter draws.
        sets: What ``--set`` is given in all runs, above the factors.
    """

    preset: Preset
    design: tuple[tuple[int, ...], ...]
    pairs: int
    ways: tuple[Way, ...] = WAYS
    sets: tuple[str, ...] = ()

    @property
    def persons(self) -> int:
        """How many there are in all."""
        return 2 * self.pairs

    def taught_by(self, row: Sequence[int]) -> range:
        """Say whom one run teaches: of each pair the one that its last column says.

        So half of the runs teach each, and every setting is high as often as low among them.
        """
        return range(int(row[-1] > 0), self.persons, 2)

    def config(self, row: Sequence[int] = ()) -> LoomConfig:
        """Settings of one run, or of none, resolved."""
        given = load_config(self.preset, sets=[*settings_of(row, FACTORS), *self.sets])
        return resolve_defaults(given, load_base(given.base))


def run_search(pool: Executor, work: Path, plan: SearchPlan, observe: Observer = silent) -> None:
    """Teach, draw and measure whatever does not lie in the folder yet.

    Args:
        pool: Processes to work in, each limited to one thread.
        work: Where everything lies.
        plan: What is tried.
        observe: Told of progress.
    """
    people = choose_people(plan.persons)
    for number, person in enumerate(people):
        draw_photos(person, number, _PHOTOS, work / "photos" / str(number))
    shared = {_class_folder(work, plan.config(row)): row for row in plan.design}
    jobs = [pool.submit(draw_class_images, work, plan, row) for row in shared.values()]
    jobs.append(pool.submit(draw_base, work, plan))
    for job in jobs:
        job.result()
    jobs = [
        pool.submit(try_settings, work, plan, row, person)
        for row in plan.design
        for person in plan.taught_by(row)
    ]
    for done, job in enumerate(as_completed(jobs), start=1):
        job.result()
        observe(Progress("search", "teaching and drawing", done, len(jobs)))


def draw_class_images(work: Path, plan: SearchPlan, row: Sequence[int]) -> None:
    """Draw the class images of all runs that share their settings with one."""
    config = plan.config(row)
    model, run = load_base(config.base), RunFolder(_class_folder(work, config))
    run.claim()
    side = model.advice.resolution_px
    make_class_images(run, model, config.class_prompt(), config.worded_priors(), config.seed, side)


def draw_base(work: Path, plan: SearchPlan) -> None:
    """Draw with the base model what any adapter draws, once for each guidance and rescale."""
    asks = contradicting_anybody(choose_people(plan.persons))
    for way in {replace(way, weight=1.0): None for way in plan.ways}:
        draw_sets(open_run(work / "base", plan.config()), plan, way, asks, None)


def try_settings(work: Path, plan: SearchPlan, row: Sequence[int], person: int) -> None:
    """Teach one person with one run's settings, draw in every way and measure."""
    folder = _run_folder(work, row, person)
    if (folder / _RESULT).is_file():
        return
    config = plan.config(row)
    model, run = load_base(config.base), open_run(folder, config)
    photos = load_photos(work / "photos" / str(person), run, model.advice.resolution_px)
    priors = read_class_image_set(RunFolder(_class_folder(work, config)).priors)
    train_adapter(run, model, photos, priors, config)
    subject = Subject(choose_people(plan.persons)[person], config.subject.phrase, [], _HELD_OUT)
    found = {}
    for way in plan.ways:
        own = draw_sets(run, plan, way, subject.asks, run.adapter)
        below = replace(way, weight=1.0).name
        base = {name: _read(work / "base", f"{name}-{below}") for name in own}
        found[way.name] = measure(subject, own, base)
    write_json(folder / _RESULT, found)


def draw_sets(
    run: RunFolder, plan: SearchPlan, way: Way, asks: Sequence[Ask], adapter: Path | None
) -> dict[str, ImageSet]:
    """Draw everything that is measured, with an adapter or with the base model."""
    config = plan.config()
    model = load_base(config.base)
    texts = {
        "portrait": [PLAIN.text],
        "asked": [ask.text for ask in ASKED],
        "contradicting": [ask.text for ask in asks],
        "class": [config.class_prompt()],
        "class-asked": list(CLASS_ASKED),
    }
    words = {"subject": config.subject.phrase, "class_noun": config.subject.class_noun}
    active = [ActiveAdapter(adapter, way.weight)] if adapter else []
    for name, prompts in texts.items():
        settings = config.generate.model_copy(
            update={
                "guidance": way.guidance,
                "guidance_rescale": way.rescale,
                "steps": (_STEPS,),
                "images_per_prompt": _EACH[name],
            }
        )
        wanted = [Prompt(text.format(**words)) for text in prompts]
        generate_images(run, model, wanted, settings, active, f"{name}-{way.name}")
    return {name: _read(run.path, f"{name}-{way.name}") for name in texts}


def measure(
    subject: Subject, own: Mapping[str, ImageSet], base: Mapping[str, ImageSet]
) -> dict[str, float]:
    """Measure what one adapter drew in one way, beside the base model drawing in that way.

    Returns:
        By `MEASURES`: the identity lift of portraits and prompts that contradict nothing; the share
        of their attributes that is lost; the share of contradicting attributes that is obeyed; the
        identity lift there; ΔE of the portraits' colour, as a multiple of drawings' own spread;
        log2 of their sharpness beside drawings'; the class's spread and distance from the base's.
    """
    shown = {name: pair_up(own[name], base[name]) for name in own}
    asked = {subject.word(ask): ask.wanted for ask in ASKED}
    against = {
        subject.word(ask): {ask.contradicts: ask.changed[ask.contradicts]} for ask in subject.asks
    }
    obeyed = judge_obedience(own["asked"], shown["asked"], asked)
    odd = judge_obedience(own["contradicting"], shown["contradicting"], against)
    looks = judge_appearance(
        subject.person, open_all(own["portrait"]), open_all(own["portrait"]), subject.draw(PLAIN)
    ).off
    of_class = judge_class(
        (own["class"], own["class-asked"]), (shown["class"], shown["class-asked"])
    )
    pairs = [(own[name], shown[name]) for name in ("portrait", "asked")]
    return {
        "identity": measure_lift([a for a, _ in pairs], [b for _, b in pairs], subject.drawings),
        "lost": float(np.mean(obeyed.shares_below) - np.mean(obeyed.shares)),
        "contradicted": float(np.mean(odd.shares)),
        "kept": measure_lift([own["contradicting"]], [shown["contradicting"]], subject.drawings),
        "colour": looks.colour / looks.colour_limit,
        "sharpness": looks.sharpness,
        "spread": of_class.spread - of_class.spread_below,
        "distance": float(np.mean(of_class.distances)),
    }


def read_results(work: Path, plan: SearchPlan) -> Float[np.ndarray, "runs persons ways measures"]:
    """Read what was measured; not a number where a run does not teach somebody, or not yet."""
    shape = (len(plan.design), plan.persons, len(plan.ways), len(MEASURES))
    values = np.full(shape, np.nan)
    for run, row in enumerate(plan.design):
        for person in plan.taught_by(row):
            file = _run_folder(work, row, person) / _RESULT
            if file.is_file():
                found = json.loads(file.read_text())
                values[run, person] = [
                    [found[way.name][name] for name in MEASURES] for way in plan.ways
                ]
    return values


def write_results(file: Path, plan: SearchPlan, work: Path) -> None:
    """Write what was measured as JSON, rounded: what the page's table and picture are made of."""
    runs = []
    for row in plan.design:
        for person in plan.taught_by(row):
            measured = _run_folder(work, row, person) / _RESULT
            if measured.is_file():
                found = json.loads(measured.read_text())
                rounded = {
                    way: {name: round(value, 4) for name, value in values.items()}
                    for way, values in found.items()
                }
                runs.append({"levels": _name_levels(row), "person": person, "measured": rounded})
    head = {
        "factors": [factor.name for factor in FACTORS],
        "ways": {way.name: way.words for way in plan.ways},
    }
    # One run a line, so that a look at what changed shows which.
    lines = ",\n  ".join(json.dumps(run) for run in runs)
    write_text(file, f'{json.dumps(head)[:-1]},\n "runs": [\n  {lines}\n ]}}\n')


def draw_results(plan: SearchPlan, values: Float[np.ndarray, "runs persons ways measures"]) -> str:
    """Draw the effects on likeness and on what contradicts somebody, as an SVG."""
    done = (~np.isnan(values)).all(axis=(2, 3)).sum(axis=1) == plan.pairs
    names = [factor.name for factor in FACTORS]
    shown = {"identity": "identity lift", "contradicted": "contradicting attributes obeyed"}
    return draw_effects(
        {
            words: estimate_effects(
                np.array(plan.design)[done], values[done][:, :, 0, MEASURES.index(name)], names
            )
            for name, words in shown.items()
        }
    )


def tell_results(plan: SearchPlan, values: Float[np.ndarray, "runs persons ways measures"]) -> str:
    """Write the table of effects, those of the ways of drawing, and every run, in Markdown."""
    taught = (~np.isnan(values)).all(axis=(2, 3)).sum(axis=1)
    done = taught == plan.pairs
    design, values = np.array(plan.design)[done], values[done]
    names = [factor.name for factor in FACTORS]
    lines = [f"{len(design)} of {len(done)} runs, each of {plan.pairs} of {plan.persons} persons."]
    lines.append("")
    lines += _start_table("from low to high")
    by_measure = [
        estimate_effects(design, values[:, :, 0, place], names) for place in range(len(MEASURES))
    ]
    lines += [_row(name, [_tell(effects[name]) for effects in by_measure]) for name in names]
    lines += ["", *_start_table("way of drawing")]
    for place, way in enumerate(plan.ways):
        means = np.nanmean(values[:, :, place], axis=(0, 1))
        lines.append(_row(way.words, _round(means)))
    lines += ["", *_start_table("run: what is high")]
    for row, found in zip(design, np.nanmean(values[:, :, 0], axis=1), strict=True):
        high = [name for name, level in zip(names, row, strict=False) if level > 0]
        lines.append(_row(", ".join(high) or "nothing", _round(found)))
    return "\n".join(lines)


def _start_table(first: str) -> list[str]:
    return [_row(first, MEASURES), "|" + "---|" * (len(MEASURES) + 1)]


def _row(first: str, others: Sequence[str]) -> str:
    return f"| {first} | " + " | ".join(others) + " |"


def _round(values: Sequence[float] | Float[np.ndarray, " n"]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _tell(effect: Effect) -> str:
    mark = "**" if effect.is_clear else ""
    return f"{mark}{effect.value:+.2f}{mark} ± {effect.margin:.2f}"


def _read(run: Path, name: str) -> ImageSet:
    return read_image_set(run / "images" / name)


def _run_folder(work: Path, row: Sequence[int], person: int) -> Path:
    return work / "runs" / _name_levels(row) / str(person)


def _name_levels(row: Sequence[int]) -> str:
    return "".join("1" if level > 0 else "0" for level in row)


def _class_folder(work: Path, config: LoomConfig) -> Path:
    prompts = "several" if config.priors.prompts else "one"
    return work / f"class-images-{config.priors.count}-{prompts}"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where it lies.")
@click.option(
    "--pairs",
    type=click.IntRange(1, MOST_SUBJECTS // 2),
    default=1,
    show_default=True,
    help="Each run teaches one person of each.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--tell", is_flag=True, help="Only write the table of what lies there.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write it here.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the effects, as SVG.")
def main(
    work: Path, pairs: int, threads: int, tell: bool, file: Path | None, picture: Path | None
) -> None:
    """Search for settings by a designed study, and write its table."""
    design = tuple(tuple(row) for row in make_design().tolist())
    plan = SearchPlan("standard", design, pairs, sets=UNSCALED)
    try:
        if not tell:
            with watch() as observe, open_pool(threads) as pool:
                run_search(pool, work, plan, observe)
        values = read_results(work, plan)
        click.echo(tell_results(plan, values))
        if file:
            write_results(file, plan, work)
        if picture:
            write_text(picture, draw_results(plan, values))
    except DreamLoomError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
