"""Measure the picturebook: ``python -m tools.picturebook.score [--json FILE]``.

The table's rows are also written as ``{"rows": [{"name", "value", "goal", "holds", …}]}``. This
program may call everything, and nothing may import it.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.events import Observer
from dreamloom.core.run_folder import library_versions, write_json
from dreamloom.display.progress import watch
from dreamloom.experiments.pool import open_pool
from tools.picturebook.measurements import Row, score_model
from tools.picturebook.trial import (
    MOST_SUBJECTS,
    TrialPlan,
    quick_plan,
    run_trial,
    standard_plan,
)
from tools.picturebook.trial_judging import Outcome
from tools.picturebook.trial_rows import trial_rows

GROUPS = ("model", "dreambooth")


@dataclass(frozen=True)
class Found:
    """What one group measured, and how long it took."""

    rows: list[Row]
    seconds: float
    outcomes: list[Outcome]


def score_groups(
    groups: tuple[str, ...], processes: int, quick: bool, work: Path | None, plan: TrialPlan
) -> dict[str, Found]:
    """Measure the groups, one after the other; see `main`."""
    found: dict[str, Found] = {}
    keep = nullcontext(str(work)) if work else TemporaryDirectory()
    with keep as folder, watch() as observe, open_pool(processes) as pool:
        measures: dict[str, Callable[[], tuple[list[Row], list[Outcome]]]] = {
            "model": lambda: (score_model(pool, quick), []),
            "dreambooth": partial(_try_dreambooth, pool, Path(folder), plan, observe),
        }
        for group in groups:
            start = time.perf_counter()
            rows, outcomes = measures[group]()
            found[group] = Found(rows, round(time.perf_counter() - start, 1), outcomes)
    return found


def _try_dreambooth(
    pool: Executor, work: Path, plan: TrialPlan, observe: Observer
) -> tuple[list[Row], list[Outcome]]:
    outcomes = run_trial(pool, work, plan, observe)
    return trial_rows(outcomes), outcomes


def describe_row(row: Row) -> str:
    """Write a row of the table: value, goal, number, interval and what else should be known."""
    value = "        –" if row.value is None else f"{row.value:9.4f}"
    held = "holds" if row.holds else "missed"
    notes = [f"n = {row.n}"] if row.n is not None else []
    notes += ["{:.4f} to {:.4f}".format(*row.interval)] if row.interval else []
    notes += [row.note] if row.note else []
    return f"{row.name:60} {value}   goal {row.goal:<6g} {held:6} {'; '.join(notes)}".rstrip()


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write here.")
@click.option("--quick", is_flag=True, help="Fewer pictures: a minute or two, wide errors.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many cores to use: as many processes, one thread each.",
)
@click.option(
    "--only",
    type=click.Choice(GROUPS),
    help="Measure the model and its judges alone, or DreamBooth alone.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Keep the DreamBooth runs here, and go on with those that are there.",
)
@click.option(
    "--subjects",
    type=click.IntRange(1, MOST_SUBJECTS),
    help="How many persons DreamBooth is tried on; 8 unless told, with --quick 2.",
)
@click.option(
    "--set", "sets", multiple=True, metavar="NAME=VALUE", help="A setting of the DreamBooth runs."
)
@click.option(
    "--front",
    is_flag=True,
    help="Try each adapter at several weights, and one without class images beside each.",
)
def main(
    json_file: Path | None,
    quick: bool,
    threads: int,
    only: str | None,
    work: Path | None,
    subjects: int | None,
    sets: tuple[str, ...],
    front: bool,
) -> None:
    """Measure the embedded base model, its judges, and how well DreamBooth works on it."""
    try:
        planned = quick_plan if quick else standard_plan
        plan = planned(subjects or (2 if quick else 8), sets, front)
        found = score_groups((only,) if only else GROUPS, threads, quick, work, plan)
    except DreamLoomError as error:
        raise click.ClickException(str(error)) from None
    for group, part in found.items():
        click.echo(f"{group}: {part.seconds:.0f} s")
        for row in part.rows:
            click.echo(describe_row(row))
    if json_file is not None:
        write_json(
            json_file,
            {
                "rows": [asdict(row) for part in found.values() for row in part.rows],
                "seconds": {group: part.seconds for group, part in found.items()},
                "subjects": [one for part in found.values() for one in part.outcomes],
                "versions": library_versions(),
            },
        )


if __name__ == "__main__":
    main()
