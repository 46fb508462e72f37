"""Many journeys side by side: the same thing done in several ways, and what comes of each.

A study is a file that asks a question (`question`). Its work is cut into pieces that arms share
(`work`) and handed to those who do it (`pool`); what is measured is laid side by side (`findings`)
and summed up in one sentence (`answers`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dreamloom.core.events import Note, Observer, StageDone, StageStarted, silent, tee
from dreamloom.core.run_folder import (
    Record,
    RunFolder,
    fingerprint,
    library_versions,
    write_json,
    write_text,
)
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.experiments.study import work
from dreamloom.experiments.study.findings import (
    ArmFindings,
    StudyFindings,
    find_answer,
    list_findings,
    write_page,
)
from dreamloom.experiments.study.pool import open_crew
from dreamloom.experiments.study.question import Arm, Study
from dreamloom.experiments.study.work import DrawnSet, Survey

STAGE = "study"


def run_study(
    study: Study, out: Path, on: str = "here", observe: Observer = silent
) -> StudyFindings:
    """Teach, draw and score every arm, compare them, and answer the question.

    What arms share is done once. A study that was stopped goes on where it was, and one whose
    file was changed does only what is new.

    Args:
        study: From `read_study`.
        out: The study's folder: new, empty, or that of an earlier study.
        on: Where to work: see `pool.open_crew`.
        observe: Told of progress.

    Returns:
        The findings, which also lie in ``study.json`` and ``study.md``.

    Raises:
        ConfigError: If an arm asks for what the base model or this machine does not know.
        PhotoError: If a photo cannot be read or there is none.
        RunFolderError: If ``out`` holds other files.
        BaseModelError: If the base model cannot be found or read.
    """
    start = time.perf_counter()
    run = RunFolder(out.absolute())
    run.refuse_other_folders()
    arms = study.list_arms()
    observe(StageStarted(STAGE, f"{len(arms)} arms × {len(study.train_seeds)} training seeds"))
    with open_crew(study.workers, on) as crew:
        found = crew.do(partial(work.survey, run.path), study, observe)
        observe = tee(observe, run.observer())
        plan = _make_plan(study, found)
        trainings = found.trainings.values()
        class_runs = {t.class_run.path: t for t in trainings if t.class_run}
        crew.do_all(work.draw_class_images, class_runs, observe, "drawing class images")
        crew.do_all(work.train, {t.run.path: t for t in trainings}, observe, "teaching")
        pieces = {drawing.run.path: drawing for drawing in plan.drawings()}
        drawn = crew.do_all(work.draw, pieces, observe, "drawing")
        if study.answer != "weak_spots":
            pieces = {path: piece for path, piece in pieces.items() if piece.adapter}
        cards = crew.do_all(work.score, pieces, observe, "scoring")
    measured = tuple(_lay_out(arm, study, found, plan, drawn, cards) for arm in arms)
    below = tuple(
        cards[drawing.floor.run.path]
        for drawing in plan.reported.values()
        if study.answer == "weak_spots" and drawing.floor
    )
    findings = find_answer(study, measured, below, _count_exposures(found))
    write_json(run.path / "study.json", list_findings(findings, library_versions()))
    write_text(run.path / "study.md", write_page(findings))
    for note in findings.notes:
        observe(Note(STAGE, note))
    seconds = time.perf_counter() - start
    run.write_record(
        Record(
            stage=STAGE,
            inputs={"study": fingerprint(study), "base": found.base},
            settings=study.model_dump(mode="json"),
            outputs=run.hash_outputs(run.path / "study.json", run.path / "study.md"),
            seconds=seconds,
        )
    )
    observe(StageDone(STAGE, seconds, str(run.path / "study.md")))
    return findings


@dataclass(frozen=True)
class _Plan:
    """A study's pieces of work, by arm and training seed.

    Args:
        reported: What each draws with the seeds that are reported.
        choosing: What each draws with the seeds that choose; empty where nothing is chosen.
    """

    reported: dict[tuple[str, int], DrawnSet]
    choosing: dict[tuple[str, int], DrawnSet]

    def drawings(self) -> list[DrawnSet]:
        """List everything that is drawn, the base model's pictures among it."""
        own = [*self.reported.values(), *self.choosing.values()]
        return [*own, *(drawing.floor for drawing in own if drawing.floor)]


def _make_plan(study: Study, found: Survey) -> _Plan:
    plan = _Plan({}, {})
    for arm in study.list_arms():
        for seed in study.train_seeds:
            training = found.trainings[arm.name, seed]
            settings = training.config.generate
            first, count = settings.first_seed, settings.images_per_prompt
            half = count // 2 if study.answer == "choose" else 0
            rest = range(first + half, first + count)
            plan.reported[arm.name, seed] = work.plan_drawing(study, found, arm, training, rest)
            if half:
                own = range(first, first + half)
                plan.choosing[arm.name, seed] = work.plan_drawing(study, found, arm, training, own)
    return plan


def _count_exposures(found: Survey) -> dict[str, int]:
    """Count how many photos each arm sees in one training."""
    return {
        arm: t.config.train.steps
        * t.config.train.batch_photos
        * t.config.train.gradient_accumulation_steps
        for (arm, _), t in found.trainings.items()
    }


def _lay_out(
    arm: Arm,
    study: Study,
    found: Survey,
    plan: _Plan,
    drawn: dict[Path, float],
    cards: dict[Path, Scorecard],
) -> ArmFindings:
    places = [(arm.name, seed) for seed in study.train_seeds]
    pictures = [plan.reported[place].run.path for place in places]
    choosing = [plan.choosing[place].run.path for place in places if place in plan.choosing]
    return ArmFindings(
        name=arm.name,
        cards=tuple(cards[path] for path in pictures),
        runs=tuple(_name(found.trainings[place].run.path) for place in places),
        pictures=tuple(_name(path) for path in pictures),
        seconds_per_picture=sum(drawn[path] for path in pictures) / len(pictures),
        choosing=tuple(cards[path] for path in choosing),
    )


def _name(folder: Path) -> str:
    """Name a folder within the study's, which may be moved."""
    return f"{folder.parent.name}/{folder.name}"
