"""The terminal: what happens is told on standard error, in the words that were given."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TextColumn

from dreamloom.core.events import (
    LossLogged,
    Note,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    Validated,
    ValidationSampled,
)
from dreamloom.display import progress
from dreamloom.display.progress import watch


def heard(capsys, *events, quiet=False):
    """Show events as the command line does; return what stood on standard error."""
    with watch(quiet) as observe:
        for event in events:
            observe(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture(autouse=True)
def wide_and_plain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_a_stage_is_told_from_start_to_end(capsys):
    text = heard(
        capsys,
        StageStarted("train", "300 updates"),
        LossLogged(1, 0.5, 0.5, None, 1e-4),
        Note("train", "goes on after update 100"),
        StageDone("train", 12.34, "runs/a"),
    )
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert lines[:3] == [
        "train 300 updates",
        "  goes on after update 100",
        "  done in 12.3 s  runs/a",
    ]


def test_looks_are_told_with_what_they_found(capsys):
    text = heard(
        capsys,
        Validated(100, 0.01234, held_out=True),
        Validated(200, 0.02, held_out=False),
        ValidationSampled(100, "runs/a/looks/000100", {"identity": 0.5}),
        ValidationSampled(200, "runs/a/looks/000200"),
    )
    assert "after 100 updates: loss 0.0123 on held-out photos" in text
    assert "after 200 updates: loss 0.0200 on the photos, with fixed noise" in text
    assert "after 100 updates: identity 0.500 in runs/a/looks/000100" in text
    assert "after 200 updates: pictures in runs/a/looks/000200" in text


def test_a_stage_of_a_picture_set_reads_as_two_words(capsys):
    text = heard(capsys, StageSkipped("generate-with_prior-2", "already drawn"))
    assert "generate with_prior-2: already drawn" in text


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_silent(capsys, quiet):
    events = [StageStarted("train"), Progress("train", "updates", 1, 2), Note("train", "x", True)]
    assert (heard(capsys, *events, quiet=quiet) == "") == quiet


@pytest.mark.parametrize(
    "name", ["photo [red].jpg", "[/bold]", "[bold]", "a[/dim]b", "C:\\[x]\\", ":dog:", "[link=x]"]
)
def test_names_are_shown_as_they_are(capsys, name):
    """Brackets are markup to the library that draws; here they are just part of a name."""
    text = heard(
        capsys,
        StageStarted("photos", name),
        StageSkipped("priors", name),
        Note("photos", name),
        Note("photos", name, warning=True),
        Progress("photos", name, 1, 2),
        StageDone("photos", 0.1, name),
    )
    assert text.count(name) >= 5


@pytest.fixture
def screen():
    """A screen of our own, so that its bars can be looked at."""
    bars = Bars(TextColumn("{task.description}"), console=Console(file=io.StringIO()))
    return progress._Screen(bars.console, bars), bars


def test_one_bar_moves_per_task(screen):
    shown, bars = screen
    for done in (1, 2, 3):
        shown.observe(Progress("train", "updates", done, 4, {"loss": 0.123456}))
    (task,) = bars.tasks
    assert (task.description, task.completed, task.total) == ("updates", 3, 4)
    assert task.fields["values"] == "loss 0.123"


def test_the_next_task_of_a_stage_takes_the_place_of_the_last(screen):
    shown, bars = screen
    shown.observe(Progress("train", "reading photos", 6, 6))
    shown.observe(Progress("train", "updates", 1, 300))
    shown.observe(Progress("generate", "pictures", 1, 8))
    assert [task.description for task in bars.tasks] == ["updates", "pictures"]


def test_a_finished_stage_takes_its_bar_along(screen):
    shown, bars = screen
    shown.observe(Progress("train", "updates", 300, 300))
    shown.observe(Progress("generate", "pictures", 1, 8))
    shown.observe(StageDone("train", 1.0))
    assert [task.description for task in bars.tasks] == ["pictures"]
    # A second run of the same stage begins with a fresh bar.
    shown.observe(Progress("train", "updates", 1, 5))
    assert [task.total for task in bars.tasks] == [8, 5]
