"""Run a search for merge weights from beginning to end; a stopped one goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import seed_for
from dreamloom.core.errors import EvaluationError
from dreamloom.core.events import (
    Event,
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
    tee,
)
from dreamloom.core.manifests import ImageSet, read_photo_set
from dreamloom.core.run_folder import Record, RunFolder, write_json, write_text
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scoring import evaluate_images
from dreamloom.experiments.merge_search import work
from dreamloom.experiments.merge_search.candidates import MergeWeights, draw_design
from dreamloom.experiments.merge_search.embeddings import MeasuredImage
from dreamloom.experiments.merge_search.findings import SearchFindings, write_page
from dreamloom.experiments.merge_search.job import Job, resolve_job, settings_file
from dreamloom.experiments.merge_search.plan import Ranked, Round, halve
from dreamloom.experiments.merge_search.plot import draw_front
from dreamloom.experiments.merge_search.request import SearchRequest
from dreamloom.experiments.merge_search.retention import NO_ROOM, Ends
from dreamloom.experiments.merge_search.summarise import WINNER, Searched, summarise_search
from dreamloom.experiments.pool import Crew, open_crew
from dreamloom.models.base import Shot
from dreamloom.pipeline.score_set import evaluation_options

STAGE = "search"


def run_search(
    request: SearchRequest, config: LoomConfig, observe: Observer = silent
) -> SearchFindings:
    """Find weights by which two adapters merge best, and say whether that was worth it.

    Candidates are worn, not merged, which draws the same. All of a round draw the same prompts
    and seeds. The winner is then compared with the plain sum and with 0.8 and 1.0 on prompts and
    seeds that the search has not seen. A search that was stopped goes on where it was.

    Args:
        request: What is searched.
        config: Settings of drawing and scoring: the first of ``generate.schedulers`` and of
            ``generate.steps`` count.
        observe: Told of progress.

    Returns:
        The findings, which also lie in ``search.json``, ``search.md`` and ``search.svg``.

    Raises:
        ConfigError: If the budget is too small, or a setting is not usable.
        AdapterError: If an adapter cannot be read, or they belong to different bases.
        PhotoError: If a photo cannot be read or there is none.
        EvaluationError: If nothing can tell the subject or the style, or an adapter alone shows
            no more of its own than pictures without it.
        RunFolderError: If the folder holds other files, or another search.
        BaseModelError: If the base model cannot be found or read.
    """
    start = time.perf_counter()
    run = RunFolder(request.out.absolute())
    run.refuse_other_folders()
    job = resolve_job(request, config, run)
    if run.finished(STAGE, job.inputs):
        observe(StageSkipped(STAGE, "already done"))
        return SearchFindings.model_validate_json((run.path / "search.json").read_text("utf-8"))
    run.claim()
    write_json(settings_file(run), job.settings)
    observe = tee(observe, run.observer())
    observe(StageStarted(STAGE, f"{job.plan.pictures} pictures at most, of {request.budget}"))
    for text in job.notes:
        observe(Note(STAGE, text))
    job = replace(job, notes=(*job.notes, *_load_photos(job, run, observe)))
    with open_crew(request.workers) as crew:
        findings = summarise_search(_Search(job, crew, observe).run())
    paths = [run.path / f"search.{suffix}" for suffix in ("json", "md", "svg")]
    names = {candidate.name: name for name, candidate in job.rivals.items()}
    write_json(paths[0], findings)
    write_text(paths[1], write_page(findings))
    tried, winner = findings.compared_on.candidates, findings.winner.name
    write_text(paths[2], draw_front(tried, findings.front, winner, names))
    seconds = time.perf_counter() - start
    run.write_record(
        Record(
            stage=STAGE,
            inputs=job.inputs,
            settings=dict(job.settings),
            outputs=run.hash_outputs(*paths),
            results={"verdict": findings.verdict, "pictures": findings.pictures},
            base=dict(job.base),
            seed=job.config.seed,
            seconds=seconds,
        )
    )
    observe(StageDone(STAGE, seconds, str(run.path / "search.md")))
    return findings


def _load_photos(job: Job, run: RunFolder, observe: Observer) -> list[str]:
    """Prepare photos and pictures in the style; return what is wrong with their number."""
    counts = []
    for folder, name in (
        (job.request.photos, work.SUBJECT_PHOTOS),
        (job.request.style_photos, work.STYLE_PHOTOS),
    ):
        if folder is not None:
            place = RunFolder(run.path / name)
            place.claim()
            counts.append(len(load_photos(folder, place, job.side_px, observe).photos))
    if counts[1:] == [1]:
        return ["There is one picture in the style only: what it shows may count as its style."]
    return []


@dataclass
class _Search:
    """Does the work of a search, in order."""

    job: Job
    crew: Crew
    observe: Observer

    def run(self) -> Searched:
        """Draw the ends, halve the candidates, and compare the winner on what was held out."""
        job = self.job
        self._draw_style()
        scale, notes = self._check_ends()

        def measure(
            candidates: Sequence[MergeWeights], one: Round
        ) -> Mapping[MergeWeights, Mapping[str, float]]:
            ends, measured_images = self._look(candidates, job.plan.shots[: one.shots], one.steps)
            on_scale = replace(ends, scale=scale)
            return {candidate: on_scale.keep(seen) for candidate, seen in measured_images.items()}

        design = draw_design(
            job.plan.rounds[0].candidates,
            job.request.by_block,
            job.request.between,
            seed_for(job.config.seed, "search design"),
            list(job.rivals.values()),
        )
        ranked = halve(design, job.plan.rounds, measure, job.request.between, job.config.seed)
        return self._hold_out(ranked, scale, notes)

    def _draw_style(self) -> None:
        """Draw what stands for the style where no pictures were given, before anybody looks."""
        table, plan = self.job.table, self.job.plan
        if table.has_style_photos:
            return
        steps = plan.rounds[-1].steps
        piece = work.Piece(table, work.ENDS["style"], "style", plan.shots, steps, measured=False)
        self._do([piece], "drawing the style")
        self.job = replace(self.job, table=replace(table, drawn=tuple(piece.files)))

    def _check_ends(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Say how far it is from nothing kept to everything, and what is doubtful about it.

        Raises:
            EvaluationError: If the subject's or the style's adapter alone shows nothing of its own.
        """
        plan, evaluate = self.job.plan, self.job.config.evaluate
        ends, _ = self._look([], plan.shots, plan.rounds[-1].steps)
        rooms, notes = ends.rooms(), []
        for aim in ("identity", "style"):
            if aim not in rooms:
                raise EvaluationError(
                    f"There is nothing that a merge could keep: {NO_ROOM[aim]}.",
                    "Train that adapter longer, or give prompts that call what it has learned.",
                )
        if "prompt" not in rooms:
            why = NO_ROOM["prompt"] if ends.bounds("prompt") else "it needs two prompts"
            notes.append(f"What is kept of the prompts is not measured: {why}.")
        scores = ends.score(ends.subject, {}, evaluate.resamples, evaluate.confidence)
        for aim in rooms:
            if scores[aim].value is None:
                notes.append(
                    f"On the {len(plan.shots)} pictures of the search it is not clear that {aim} "
                    f"can be kept or lost at all."
                )
        return rooms, tuple(notes)

    def _look(
        self, candidates: Sequence[MergeWeights], shots: Sequence[Shot], steps: int
    ) -> tuple[Ends, dict[MergeWeights, list[MeasuredImage]]]:
        """Draw and look at some candidates, and the ends beside them."""
        named = {**{one.name: one for one in candidates}, **work.ENDS}
        pieces = [
            work.Piece(self.job.table, candidate, name, tuple(shots), steps)
            for name, candidate in named.items()
        ]
        found = self._do(pieces, f"{len(shots)} pictures each of {steps} steps")
        prompts = [shot.prompt for shot in shots]
        ends = Ends(prompts, found["base"], found["subject"], found["style"])
        return ends, {candidate: found[candidate.name] for candidate in candidates}

    def _do(self, pieces: Sequence[work.Piece], task: str) -> dict[str, list[MeasuredImage]]:
        def observe(event: Event) -> None:
            # The crew's progress is the search's own.
            self.observe(replace(event, stage=STAGE) if isinstance(event, Progress) else event)

        return self.crew.do_all(
            work.do_piece, {piece.name: piece for piece in pieces}, observe, task
        )

    def _hold_out(
        self, ranked: list[Ranked], scale: Mapping[str, float], notes: tuple[str, ...]
    ) -> Searched:
        winner = ranked[-1].candidates[0]
        plan, steps = self.job.plan, self.job.plan.rounds[-1].steps
        sides = {WINNER: winner}
        sides |= {name: one for name, one in self.job.rivals.items() if one != winner}
        ends, measured_images = self._look(list(sides.values()), plan.held_out, steps)
        leaks = [
            work.Piece(self.job.table, candidate, name, plan.leaks, steps, measured=False)
            for name, candidate in [
                ("base", work.ENDS["base"]),
                *((one.name, one) for one in sides.values()),
            ]
        ]
        self._do(leaks, "the class alone")
        return Searched(
            job=self.job,
            ranked=ranked,
            sides=sides,
            ends=replace(ends, scale={**scale, **ends.rooms()}),
            measured_images={name: measured_images[candidate] for name, candidate in sides.items()},
            cards={name: self._evaluate(candidate) for name, candidate in sides.items()},
            pictures=work.count_pictures(self.job.table),
            notes=(*self.job.notes, *notes),
        )

    def _evaluate(self, candidate: MergeWeights) -> Scorecard:
        """Score what was held out as `dreamloom evaluate` does, with the base model's as floor."""
        job, steps = self.job, self.job.plan.rounds[-1].steps
        shots = (*job.plan.held_out, *job.plan.leaks)

        def select(name: str) -> ImageSet:
            return work.select_pictures(job.table, name, shots, steps)

        return evaluate_images(
            select(candidate.name),
            read_photo_set(RunFolder(job.table.root / work.SUBJECT_PHOTOS).photos),
            floor=select("base"),
            subject=SubjectWords(job.config.subject.phrase, job.config.subject.class_noun),
            options=replace(evaluation_options(job.config.evaluate), detectors=False),
            encoders=job.encoders,
            stage=STAGE,
        )
