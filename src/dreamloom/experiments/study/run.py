"""A study: the same thing trained and drawn in several ways, and what comes of each.

A study's file asks a question (`question`). Its work is cut into pieces that arms share
(`work`) and handed to those who do it (`experiments.pool`); what is measured is laid side by side
(`findings`) and summed up in one sentence (`answers`).
"""

from __future__ import annotations

import time
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
from dreamloom.experiments.pool import open_crew
from dreamloom.experiments.study import work
from dreamloom.experiments.study.findings import (
    ArmFindings,
    StudyFindings,
    find_answer,
    list_findings,
    write_page,
)
from dreamloom.experiments.study.question import Study
from dreamloom.experiments.study.work import DrawnSet, Survey
from dreamloom.pipeline.session import check_names

STAGE = "study"


def run_study(
    study: Study, out: Path, on: str = "here", observe: Observer = silent
) -> StudyFindings:
    """Train, draw and score every arm, compare them, and answer the question.

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
    for arm in study.list_arms():
        check_names(study.configure(arm, study.train_seeds[0]))
    run = RunFolder(out.absolute())
    run.refuse_other_folders()
    arms = study.list_arms()
    observe(StageStarted(STAGE, f"{len(arms)} arms × {len(study.train_seeds)} training seeds"))
    with open_crew(study.workers, on) as crew:
        found = crew.do_all(partial(work.survey, run.path), {"": study}, observe, "reading")[""]
        observe = tee(observe, run.observer())
        reported, choosing = _plan_drawings(study, found)
        own = [*reported.values(), *choosing.values()]
        trainings = found.trainings.values()
        class_runs = {t.class_run.path: t for t in trainings if t.class_run}
        crew.do_all(work.draw_class_images, class_runs, observe, "drawing class images")
        crew.do_all(work.train, {t.run.path: t for t in trainings}, observe, "teaching")
        floors = [drawing.floor for drawing in own if drawing.floor]
        pieces = {drawing.run.path: drawing for drawing in (*own, *floors)}
        drawn = crew.do_all(work.draw, pieces, observe, "drawing")
        if study.answer != "weak_spots":
            pieces = {path: piece for path, piece in pieces.items() if piece.adapter}
        cards = crew.do_all(work.score, pieces, observe, "scoring")
    measured = []
    for arm in arms:
        places = [(arm.name, seed) for seed in study.train_seeds]
        pictures = [reported[place].run.path for place in places]
        measured.append(
            ArmFindings(
                name=arm.name,
                cards=tuple(cards[path] for path in pictures),
                runs=tuple(_name(found.trainings[place].run.path) for place in places),
                pictures=tuple(_name(path) for path in pictures),
                seconds_per_picture=sum(drawn[path] for path in pictures) / len(pictures),
                choosing=tuple(cards[choosing[p].run.path] for p in places if p in choosing),
            )
        )
    below = tuple(
        cards[drawing.floor.run.path]
        for drawing in reported.values()
        if study.answer == "weak_spots" and drawing.floor
    )
    exposures = {
        arm: t.config.train.steps
        * t.config.train.batch_photos
        * t.config.train.gradient_accumulation_steps
        for (arm, _), t in found.trainings.items()
    }
    findings = find_answer(study, tuple(measured), below, exposures)
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


_Drawings = dict[tuple[str, int], DrawnSet]
"""What is drawn, by arm and training seed."""


def _plan_drawings(study: Study, found: Survey) -> tuple[_Drawings, _Drawings]:
    """Share out the seeds: those that are reported, and those that choose, if one is chosen."""
    reported: _Drawings = {}
    choosing: _Drawings = {}
    for arm in study.list_arms():
        for seed in study.train_seeds:
            training = found.trainings[arm.name, seed]
            settings = training.config.generate
            first, count = settings.first_seed, settings.images_per_prompt
            half = count // 2 if study.answer == "choose" else 0
            rest = range(first + half, first + count)
            reported[arm.name, seed] = work.plan_drawing(study, found, arm, training, rest)
            if half:
                own = range(first, first + half)
                choosing[arm.name, seed] = work.plan_drawing(study, found, arm, training, own)
    return reported, choosing


def _name(folder: Path) -> str:
    """Name a folder within the study's, which may be moved."""
    return f"{folder.parent.name}/{folder.name}"
