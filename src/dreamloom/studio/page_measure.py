"""Measure: the report, scores between floor and ceiling, sets compared, studies as questions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import ConfigError, DreamLoomError
from dreamloom.evaluation.compare import Comparison, tell_basis, tell_comparison, tell_outcome
from dreamloom.evaluation.metrics.measures import MEANINGS, MEASURE, label_of
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scorecard_files import find_scorecard
from dreamloom.experiments.study.asked import AskedQuestion, list_questions
from dreamloom.studio.context import Studio, go_to, not_found, read_form, refuse, render, studio_of
from dreamloom.studio.jobs import Job, read_json
from dreamloom.studio.photo_sets import PhotoSetFolder
from dreamloom.studio.runs import Answer, Run
from dreamloom.studio.words import say

OWN_PHOTOS = "taught"
"""Stands where a photo set's name would, for the photos that a run was taught from."""

_COMPARISONS = TypeAdapter(tuple[Comparison, ...])


@dataclass(frozen=True)
class ScoredSet:
    """A set of a run that has scores.

    Args:
        run: The run.
        name: The set.
    """

    run: Run
    name: str

    @property
    def id(self) -> str:
        """What a form calls it."""
        return f"{self.run.id}:{self.name}"

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return f"{self.run.name}: {self.name}"


@dataclass(frozen=True)
class Question:
    """A study that can be asked, with what came of it so far.

    Args:
        asked: Its file and its question.
        job: The job that works on it, or waits to; or the last one, if that came to nothing.
        answers: Studies that answered it, the latest first.
    """

    asked: AskedQuestion
    job: Job | None
    answers: Sequence[tuple[Run, Answer]]


def show(request: Request) -> Response:
    """Everything that can be measured; of one run, where one is chosen."""
    studio = studio_of(request)
    return render(request, "measure.html", **_tell(studio, request.query_params.get("run", "")))


def _tell(studio: Studio, chosen: str) -> dict[str, Any]:
    runs = studio.runs()
    run = next((one for one in runs if one.id == chosen), None)
    return {
        "measured": [one for one in runs if is_measurable(one)],
        "run": run,
        "job": studio.job_of(run) if run else None,
        "cards": read_cards(run) if run else {},
        "sets": [name for name in run.sets() if run.read_set(name)] if run else [],
        "photo_sets": [one for one in studio.photo_sets if one.names()],
        "own_photos": OWN_PHOTOS if run and (run.files.photos / "manifest.json").is_file() else "",
        "scored": list_scored(runs),
        "questions": _list_asked(studio, runs),
        "label_of": label_of,
        "meanings": MEANINGS,
        "better": {name: one.better for name, one in MEASURE.items()},
    }


def is_measurable(run: Run) -> bool:
    """Say whether there is something of a run to be looked at or to be scored."""
    return run.files.report.is_file() or run.files.scores.is_file() or bool(run.sets())


def read_cards(run: Run) -> dict[str, Scorecard]:
    """Read the scorecards of a run by set; those that this version cannot read are left out."""
    found = {}
    for name in _list_names(run):
        with suppress(DreamLoomError):
            found[name] = find_scorecard(f"{run.folder}:{name}")
    return found


def _list_names(run: Run) -> list[str]:
    written = read_json(run.files.scores)
    return [name for name in written if name != "scores"] if isinstance(written, dict) else []


def list_scored(runs: Sequence[Run]) -> list[ScoredSet]:
    """List all sets that have scores."""
    return [ScoredSet(run, name) for run in runs for name in _list_names(run)]


async def compare(request: Request) -> Response:
    """Two sets compared in pairs: what changed from the first to the second."""
    studio = studio_of(request)
    scored = list_scored(studio.runs())
    by_id = {one.id: one for one in scored}
    first, second = (by_id.get(request.query_params.get(name, "")) for name in ("first", "second"))
    found, said = await _compare(studio, first, second)
    return render(
        request,
        "compare.html",
        scored=scored,
        first=first,
        second=second,
        found=found,
        said=said,
        label_of=label_of,
        tell_basis=tell_basis,
        tell_comparison=tell_comparison,
        tell_outcome=tell_outcome,
    )


async def _compare(
    studio: Studio, first: ScoredSet | None, second: ScoredSet | None
) -> tuple[tuple[Comparison, ...], str]:
    """Ask for a comparison; what was said stands where there is none."""
    if first is None or second is None:
        return (), say("measure.choose_two")
    if first == second:
        return (), say("measure.choose_other")
    words = [f"{studio.path_of(one.run.name)}:{one.name}" for one in (first, second)]
    because = " ".join(str(_written_at(one.run.files.scores)) for one in (first, second))
    told, said = await studio.ask(["compare", "--json", "--", *words], because)
    if told is None:
        return (), said
    try:
        return _COMPARISONS.validate_python(told), ""
    except ValidationError:
        return (), say("measure.unreadable")


def _written_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def write_report(request: Request) -> Response:
    """Ask for a run's report to be written anew."""
    studio = studio_of(request)
    run = studio.find_run(request.path_params["run"])
    if run is None:
        return not_found()
    job = studio.add_job("report", ["report", "--", studio.path_of(run.name)], run=run.name)
    return go_to(f"/jobs/{job.id}")


async def score(request: Request) -> Response:
    """Ask for a set of a run to be scored against photos, and for the report that tells of it."""
    studio = studio_of(request)
    run = studio.find_run(request.path_params["run"])
    form = await read_form(request)
    if run is None:
        return not_found()
    sets = [name for name in run.sets() if run.read_set(name)]
    name, floor = form.get("set", ""), form.get("floor", "")
    photos = _find_photos(studio, run, form.get("photos", ""))
    if name not in sets or photos is None or floor not in {"", *sets}:
        return refuse(say("measure.choose_set"), 422)
    folder = studio.path_of(run.name)
    config = run.config
    argv = ["evaluate", f"{folder}/images/{name}", "--photos", photos]
    argv += ["--floor", f"{folder}/images/{floor}"] if floor else []
    argv += ["--preset", config.preset] if config else []
    job = studio.add_job("evaluate", argv, run=run.name)
    studio.add_job("report", ["report", "--", folder], run=run.name, after=job.id)
    return go_to(f"/jobs/{job.id}")


def _find_photos(studio: Studio, run: Run, chosen: str) -> str | None:
    """Write a folder of photos as a command is told it; None where there is none of that name."""
    if chosen == OWN_PHOTOS and (run.files.photos / "manifest.json").is_file():
        return f"{studio.path_of(run.name)}/photos"
    found = studio.photo_sets.find(chosen)
    return _path_of_photos(studio, found) if found else None


def _path_of_photos(studio: Studio, photos: PhotoSetFolder) -> str:
    return studio.path_of(photos.folder.relative_to(studio.root).as_posix())


# The studies ---------------------------------------------------------------------------------


def _list_asked(studio: Studio, runs: Sequence[Run]) -> list[Question]:
    jobs = [job for job in studio.jobs if job.asked.kind == "study"]
    answers = [(run, run.answer) for run in runs]
    found = []
    for asked in list_questions():
        own = [(run, one) for run, one in answers if one and one.question == asked.text]
        last = next((job for job in reversed(jobs) if _asks(job, asked)), None)
        found.append(Question(asked, last if last and last.outcome != "done" else None, own))
    return found


def _asks(job: Job, asked: AskedQuestion) -> bool:
    return any(Path(word).name == asked.file.name for word in job.asked.argv)


def show_question(request: Request) -> Response:
    """One question, for a page that is open while a job works on it."""
    studio, name = studio_of(request), request.path_params["question"]
    questions = _list_asked(studio, studio.runs())
    question = next((one for one in questions if one.asked.name == name), None)
    if question is None:
        return not_found()
    photo_sets = [one for one in studio.photo_sets if one.names()]
    return render(request, "parts/question.html", question=question, photo_sets=photo_sets)


async def ask(request: Request) -> Response:
    """Ask a question of a set of photos: a study, at the quick preset."""
    studio = studio_of(request)
    form = await read_form(request)
    asked = {one.name: one for one in list_questions()}.get(request.path_params["question"])
    if asked is None:
        return not_found()
    photos = studio.photo_sets.find(form.get("photos", ""))
    if photos is None or not photos.names():
        return refuse(say("teach.no_photos"), 422)
    subject = form.get("subject", "").strip()
    try:
        load_config("quick", overrides={"subject.phrase": subject})
    except ConfigError as error:
        return refuse(str(error), 422)
    # The same question of the same photos has one folder: what is done there is not done again.
    name = f"study-{asked.name}-{photos.id}"
    argv = [
        *("study", str(asked.file), "--quick", "--photos", _path_of_photos(studio, photos)),
        *("--subject", subject, "--out", studio.path_of(name)),
    ]
    studio.add_job("study", argv, run=name)
    return go_to(f"/measure#question-{asked.name}")


ROUTES = [
    Route("/measure", show),
    Route("/measure/compare", compare),
    Route("/measure/questions/{question}", show_question),
    Route("/measure/questions/{question}", ask, methods=["POST"]),
    Route("/measure/{run}/report", write_report, methods=["POST"]),
    Route("/measure/{run}/score", score, methods=["POST"]),
]
