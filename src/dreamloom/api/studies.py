"""Plans, studies and reports: what a run needs, what several answer, and what there is to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rich.markup import escape

from dreamloom.api.options import Options, PathLike, load_settings, show_progress
from dreamloom.api.results import FileResult, Result
from dreamloom.core.events import Observer
from dreamloom.display.tables import render_findings
from dreamloom.experiments.study.findings import StudyFindings
from dreamloom.experiments.study.question import Changes, read_study
from dreamloom.experiments.study.run import run_study
from dreamloom.memory.device_memory import find_memory
from dreamloom.memory.plan import MemoryPlan, plan_run
from dreamloom.report.render import write_report as write_page

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """What a training needs of a GPU's memory, and the fastest settings that fit.

    Attributes:
        found: All of it; ``found.as_dict()`` is for programs.
    """

    found: MemoryPlan

    @property
    def fits(self) -> bool:
        """Whether anything fits at all."""
        return self.found.choice.fits

    def _render(self) -> Iterator[RenderableType]:
        return map(escape, self.found.lines())


def plan(
    base: str | None = None,
    *,
    gpu_memory: str | None = None,
    gpu_rate_tflops: float | None = None,
    photos: int = 6,
    prior: PathLike | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Predict a training's memory and time, and pick the fastest settings that fit; needs no GPU.

    Args:
        base: The base model.
        gpu_memory: Such as ``"12GiB"`` (2^30 bytes each) or ``"12GB"`` (10^9 bytes each); by
            default this machine's own GPU.
        gpu_rate_tflops: Of its matrix products, in 10^12 operations a second, for the time.
        photos: How many there are.
        prior: As for `train`.
        **options: See `Options`.

    Raises:
        ConfigError: If a size cannot be read, or none was named and there is no GPU.
    """
    config = load_settings(options, {"base": base, "prior": prior})
    memory = find_memory(gpu_memory, config)
    return Plan(plan_run(config, memory, photos=photos, rate_tflops=gpu_rate_tflops))


@dataclass(frozen=True, repr=False)
class StudyAnswer(Result):
    """What a study found: an answer in one sentence, and each arm's scores.

    Attributes:
        findings: Arms, contrasts, notes.
        folder: The study's folder; ``study.md`` in it says everything.
    """

    findings: StudyFindings
    folder: Path

    @property
    def answer(self) -> str:
        """The answer to what was asked."""
        return self.findings.answer

    def _render(self) -> Iterator[RenderableType]:
        return render_findings(self.findings)


def study(
    file: PathLike,
    *,
    out: PathLike | None = None,
    quick: bool = False,
    base: str | None = None,
    photos: PathLike | None = None,
    subject: str | None = None,
    packs: Sequence[str] = (),
    progress: bool | Observer = True,
) -> StudyAnswer:
    """Answer the question in a file by doing one thing in several ways.

    A study that was stopped goes on where it was.

    Args:
        file: A TOML file, such as those in ``recipes/questions``.
        out: The study's folder; None takes ``runs/study-`` and the file's name.
        quick: The quick preset, for what the file leaves open.
        base: Another base model than the file's.
        photos: Another folder of photos.
        subject: Another subject.
        packs: Other prompt packs, instead of the file's.
        progress: As in `Options`.

    Raises:
        ConfigError: If the file cannot be read, or asks for what cannot be done.
        RunFolderError: If ``out`` holds something else.
    """
    at = None if photos is None else Path(photos)
    changes = Changes(base=base, photos=at, subject=subject, packs=tuple(packs), quick=quick)
    asked = read_study(Path(file), changes)
    folder = Path("runs") / f"study-{Path(file).stem}" if out is None else Path(out)
    with show_progress({"progress": progress}) as observe:
        return StudyAnswer(run_study(asked, folder, "here", observe), folder)


@dataclass(frozen=True, repr=False)
class Report(FileResult):
    """A page that needs no network; it stands for its path."""

    page: Path

    @property
    def path(self) -> Path:
        """The .html file."""
        return self.page

    def _render(self) -> Iterator[RenderableType]:
        yield f"[bold]The report:[/bold] {escape(str(self.page))}"

    def _repr_html_(self) -> str:
        shown = escape_html(str(self.page))
        return f'The report: <a href="{shown}" target="_blank">{shown}</a>'


def write_report(run: PathLike, *, progress: bool | Observer = True) -> Report:
    """Write ``report.html`` into a run's folder, from its records and nothing else.

    Args:
        run: The run's folder, or a result that lies in it.
        progress: As in `Options`.

    Raises:
        RunFolderError: If there is no run.
    """
    folder = Path(run)
    with show_progress({"progress": progress}) as observe:
        return Report(write_page(folder.parent if folder.is_file() else folder, observe))
