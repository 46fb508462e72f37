"""Stage 7: a folder's records in, one page out that tells its story offline.

Start at `write_report`. It reads a `Story` (`story.py`), lays it out (`page.py`, with pictures in
`gallery.py`, scores in `tables.py`, and how it was made in `making.py`) in words that follow from
the numbers (`verdicts.py`) and with small drawings (`plots.py`), and fills the
template in ``templates/``.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dreamloom.core.events import Observer, StageDone, StageStarted, silent
from dreamloom.core.run_folder import RunFolder, write_text
from dreamloom.report.page import lay_out
from dreamloom.report.plots import Bar, score_bars
from dreamloom.report.story import Story, read_story
from dreamloom.report.verdicts import Verdict, is_from_strangers, tell

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, observe: Observer = silent) -> Path:
    """Write ``report.html`` into a run's or a demo's folder.

    Reads the folder's files and nothing else. The page is one file that loads nothing: styles,
    script, drawings and pictures lie inside it, and the pictures carry no metadata. The same
    folder gives the same page. Whatever is absent is called not measured, or left out.

    Args:
        folder: A run, or a folder with a ``summary.json`` and runs inside.
        observe: Told when it starts and when it is done.

    Returns:
        The page's path.

    Raises:
        RunFolderError: If there is no such folder, or it is neither a run nor a demo.
    """
    started = time.monotonic()
    observe(StageStarted("report", str(folder)))
    path = RunFolder(folder).report
    write_text(path, render(read_story(folder)))
    observe(StageDone("report", time.monotonic() - started, str(path)))
    return path


def render(story: Story) -> str:
    """Fill the page's template; every text from outside is escaped."""
    return (
        _environment()
        .get_template("page.html")
        .render(page=lay_out(story), css=_read("page.css"), js=_read("page.js"))
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        tell=tell, bars=_draw_bars, minus=lambda number: number.replace("-", "−")
    )
    return environment


def _draw_bars(verdict: Verdict) -> Markup:
    """Draw a verdict's scores between floor and ceiling; the last one's own are marked."""
    bars = [
        Bar(label, score.value, score.interval, f"k-{kind}")
        for label, kind, score in verdict.bars
        if score.value is not None
    ]
    last = verdict.bars[-1][2]
    floor = "anybody" if is_from_strangers(last) else "base model"
    return Markup(
        score_bars(bars, last.floor, last.ceiling, floor_label=floor, ceiling_label="photos")
    )


def _read(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
