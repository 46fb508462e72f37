"""Stage 7: a folder's records in, one page out that tells its story offline.

Start at `write_report`. It reads a `Story` (`story.py`), lays it out (`page.py`, with the pictures
in `gallery.py`) in words that follow from the numbers (`verdicts.py`) and small drawings
(`plots.py`), and fills the template in ``templates/``.
"""

from __future__ import annotations

import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dreamloom.events import Observer, StageDone, StageStarted, silent
from dreamloom.report.page import lay_out
from dreamloom.report.story import Story, read_story
from dreamloom.report.verdicts import tell
from dreamloom.rundir import RunDir, write_text

__all__ = ["render", "write_report"]

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
    path = RunDir(folder).report
    write_text(path, render(read_story(folder)))
    observe(StageDone("report", time.monotonic() - started, str(path)))
    return path


def render(story: Story) -> str:
    """Fill the page's template; every text from outside is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["tell"] = tell
    return environment.get_template("page.html").render(
        page=lay_out(story), css=_read("page.css"), js=_read("page.js")
    )


def _read(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
