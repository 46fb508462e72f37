"""What leaves the command line: JSON one way, commands to paste, lines that say how far."""

import json
import shlex
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.cli.output import command_line
from dreamloom.core.events import Progress, StageStarted
from dreamloom.display import progress
from dreamloom.display.progress_lines import ProgressLines, say_seconds
from dreamloom.lora.writing import write_adapter
from merges import random_adapter
from studio_set import make_photos

# These print a path or a script alone, or are only a group of commands.
WITHOUT_JSON = {"completion", "models", "models fetch", "models path", "studio"}


def run(*words: object):
    done = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def adapter(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("one.safetensors"), random_adapter(0, {"linear": 2}))
    return Path("one.safetensors")


def commands(group: click.Group = main, above: str = ""):
    for name, command in group.commands.items():
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


def test_every_command_that_finds_or_makes_something_can_say_it_in_json():
    lacking = {
        name
        for name, command in commands()
        if not any(param.name == "json_target" for param in command.params)
    }
    assert lacking == WITHOUT_JSON


def test_json_is_printed_or_written_in_one_way_everywhere(adapter):
    printed = run("inspect", adapter, "--json")
    assert json.loads(printed)["layers"] == 1
    assert run("inspect", "--json", adapter) == printed
    for words in (("--json", "told.json"), ("--json=told",)):
        assert "layers" in run("inspect", adapter, *words)  # words are shown, too
        assert json.loads(Path(words[-1].removeprefix("--json=")).read_text()) == json.loads(
            printed
        )


def test_what_was_made_is_said_in_json(adapter):
    made = json.loads(run("merge", adapter, "-o", "sum.safetensors", "--verify", "--json"))
    assert made["adapter"] == "sum.safetensors"
    assert made["ranks"] == [2]
    assert "holds" in made["verified"]
    assert json.loads(run("remix", "sum.safetensors", "--json"))["parts"][0]["name"] == "one"
    cut = json.loads(run("resize", adapter, "--rank", 1, "-o", "cut.safetensors", "--json"))
    assert cut["error"] > 0
    assert json.loads(run("settings", "--json"))[0]["name"] == "preset"
    photos = make_photos(Path("photos"))
    assert len(json.loads(run("photos", photos, "--json"))["photos"]) == 3


def test_commands_to_paste_are_quoted():
    words = ("dreamloom", "generate", "--adapter", Path("my run/it's.safetensors"), "--seeds", 1)
    assert shlex.split(command_line(*words)) == [str(word) for word in words]


def test_the_next_command_works_when_pasted(tiny_sdxl, tmp_path):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "my run"
    small = ("train.steps=1", "train.rank=2", "train.batch_photos=1", "priors.kind=none")
    taught = run(
        *("train", photos, "--subject", "sks dog", "--base", tiny_sdxl, "--out", out),
        *("--device", "cpu", *(word for setting in small for word in ("--set", setting))),
    )
    (line,) = [line for line in taught.splitlines() if line.startswith("Next: ")]
    words = shlex.split(line.removeprefix("Next: "))
    assert words[0] == "dreamloom"
    run(*words[1:], "--device", "cpu", "--steps", 1)
    # It takes a name of its own, so that the usual one is still free.
    again = ("generate", "--adapter", out / "adapter.safetensors", "--base", tiny_sdxl)
    run(*again, "--prompt", "x", "--seeds", 1, "--steps", 1, "--device", "cpu", "--out", out)
    assert {path.name for path in (out / "images").iterdir()} == {"first", "pictures"}


def test_a_set_that_is_there_is_refused_before_the_model_is_loaded(tiny_sdxl, tmp_path):
    drawn = ("generate", "--seeds", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "run")
    run(*drawn, "--prompt", "x", "--base", tiny_sdxl)
    words = [str(word) for word in (*drawn, "--prompt", "y", "--base", "nowhere/at-all")]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "already holds pictures" in refused.output


@pytest.mark.parametrize("command", ["generate", "evaluate", "retention", "plan"])
def test_an_option_that_changes_nothing_is_refused(command):
    refused = CliRunner().invoke(main, [command, "--seed", "1"])
    assert refused.exit_code == 2
    assert "--seed changes nothing here" in refused.output


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--seed", "1"), "--seed"),
        (("--base", "sdxl"), "--base"),
        (("--device", "cpu"), "--device"),
        (("--method", "dare", "--device", "cpu"), "--device"),
    ],
)
def test_a_merge_refuses_what_its_method_does_not_use(adapter, words, option):
    merge = ["merge", str(adapter), str(adapter), "-o", "sum.safetensors", *words]
    refused = CliRunner().invoke(main, merge)
    assert refused.exit_code == 2
    assert f"{option} changes nothing" in refused.output
    assert not Path("sum.safetensors").exists()


def test_dice_take_a_seed(adapter):
    run("merge", adapter, adapter, "-o", "sum.safetensors", "--method", "dare", "--seed", 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_says_how_far_and_how_long():
    clock = Clock()
    lines = ProgressLines(clock)
    told = {}
    for done in range(301):
        clock.now = 2.0 * done
        if line := lines.tell(Progress("train", "updates", done, 300, {"loss": 0.0123})):
            told[done] = line
    assert list(told) == list(range(15, 300, 15))  # each half minute
    assert told[150] == "updates: 150 of 300, loss 0.0123; 5 min 0 s, about 5 min 0 s left"


def test_a_tenth_is_told_of_sooner_and_quick_tasks_not_at_all():
    clock = Clock()
    lines = ProgressLines(clock)
    for done in range(101):
        clock.now = 0.01 * done
        assert lines.tell(Progress("merge", "layers", done, 100)) is None
    told = []
    for done in range(101):
        clock.now = 10 + 0.6 * done
        told.append(lines.tell(Progress("merge", "other layers", done, 100)))
    assert sum(line is not None for line in told) == 9


def test_what_goes_on_is_timed_without_what_was_done_before():
    clock = Clock()
    lines = ProgressLines(clock)
    lines.tell(Progress("train", "updates", 200, 300))
    clock.now = 30.0
    assert lines.tell(Progress("train", "updates", 250, 300)).endswith("30 s, about 30 s left")


def test_what_says_nothing_for_long_is_told_of_too():
    clock = Clock()
    lines = ProgressLines(clock)
    assert lines.remind() is None
    lines.tell(Progress("study", "trainings", 0, 4))
    clock.now = 31.0
    assert lines.remind() == "trainings: 0 of 4; 31 s"
    assert lines.remind() is None
    lines.forget("study")
    clock.now = 99.0
    assert lines.remind() is None


def test_times_have_two_units():
    assert [say_seconds(s) for s in (0.4, 59, 61, 3660, 90061)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 1 min",
        "25 h 1 min",
    ]


def test_the_teller_ends_with_the_work(capsys):
    before = threading.active_count()
    with progress.watch() as observe:
        observe(StageStarted("train", "300 updates"))
    assert threading.active_count() == before
    assert capsys.readouterr().err == "train 300 updates\n"


def test_work_goes_on_when_nobody_reads_of_it(tmp_path):
    class Closed:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    screen = progress._Screen(progress._Patient(file=Closed()), None)
    for _ in range(2):
        screen.observe(StageStarted("train", "300 updates"))
