"""Completion: each shell's script, the words that options offer, and how little that loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from dreamloom.cli import words
from dreamloom.cli.main import main
from dreamloom.core.config.loading import PRESETS
from dreamloom.data.prompts.packs import PACK_NAMES
from dreamloom.models.schedulers import SCHEDULERS

SOURCE = Path(__file__).parents[1] / "src"
DPM = ["scheduler=ddim,dpm++", "scheduler=ddim,dpm++karras"]


def complete(*typed: str, shell: str = "zsh") -> list[str]:
    """What is offered for the last of some words."""
    kind = get_completion_class(shell)
    items = kind(main, {}, "dreamloom", "_DREAMLOOM_COMPLETE").get_completions(
        list(typed[:-1]), typed[-1]
    )
    return [item.value for item in items if item.type == "plain"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell):
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_DREAMLOOM_COMPLETE={shell}_complete" in done.output
    assert (
        f"dreamloom completion {shell} >" in CliRunner().invoke(main, ["completion", "-h"]).output
    )


def test_another_shell_is_refused():
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 2


def test_commands_and_options_are_offered():
    assert complete("gen") == ["generate"]
    assert complete("models", "f") == ["fetch"]
    assert "--preset" in complete("train", "--pre")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("train", "x", "--preset", ""), [*PRESETS]),
        (("train", "x", "--format", "koh"), ["kohya", "kohya-diffusers"]),
        (("convert", "x", "--format", "koh"), ["kohya", "kohya-diffusers"]),
        (("train", "x", "--base", ""), ["picturebook", "sdxl"]),
        (("train", "x", "--prior", "g"), ["generated"]),
        (("train", "x", "--device", "c"), ["cpu", "cuda"]),
        (("train", "x", "--set", "train.ran"), ["train.rank="]),
        (("train", "x", "--set", "photos.flip="), ["photos.flip=true", "photos.flip=false"]),
        (("train", "x", "--set", "no.such="), []),
        (("generate", "--pack", ""), [*PACK_NAMES]),
        (("generate", "--scheduler", ""), [*SCHEDULERS]),
        (("generate", "--compose", "k"), ["k-lora"]),
        (("grid", "--x", "s"), ["scheduler=", "steps="]),
        (("grid", "--y", "scheduler=ddim,d"), ["scheduler=ddim,ddpm", *DPM]),
        (("grid", "--y", "steps="), []),
        (("packs", "pixel"), ["pixel-v1"]),
        (("models", "fetch", "clip", "dino"), ["dino", "dinov2"]),
        (("models", "path", ""), ["picturebook"]),
        (("study", "x", "--on", ""), ["here", "ray"]),
        (("ask", "x", "s"), ["sample", "save", "stop"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
    ],
)
def test_words_are_offered(typed, offered):
    assert complete(*typed) == offered


@pytest.mark.parametrize(
    "typed",
    [("merge", "a.saf"), ("diagnose", "a"), ("generate", "--adapter", "a"), ("train", "my-ph")],
)
def test_files_are_left_to_the_shell(typed):
    kind = get_completion_class("fish")
    items = kind(main, {}, "dreamloom", "_DREAMLOOM_COMPLETE").get_completions(
        list(typed[:-1]), typed[-1]
    )
    assert [(item.type, item.value) for item in items] == [("file", typed[-1])]


def test_what_is_only_completed_is_not_fetched(monkeypatch):
    def fetch(text):
        raise AssertionError(f"{text} was looked for")

    monkeypatch.setattr("dreamloom.lora.locating.locate_adapter", fetch)
    assert "--precision" in complete("resize", "somebody/something", "--prec")
    typed = CliRunner().invoke(main, ["inspect", "somebody/something"])
    assert "somebody/something was looked for" in typed.output


def test_an_installation_that_is_broken_offers_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamloom.core.config.settings", None)
    assert complete("train", "x", "--set", "train.") == []


def test_schedulers_are_those_that_there_are():
    assert tuple(SCHEDULERS) == words.SCHEDULERS


@pytest.mark.parametrize("typed", ["--set train.ran", "--pack per", "--scheduler d"])
def test_completing_loads_nothing_heavy(typed):
    code = (
        "import sys\nfrom dreamloom.cli.main import main\n"
        "try:\n    main(prog_name='dreamloom')\nexcept SystemExit:\n    print(*sys.modules)"
    )
    line = f"dreamloom generate {typed}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "_DREAMLOOM_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    *offered, loaded = done.stdout.splitlines()
    assert offered
    assert not {"torch", "numpy", "diffusers", "transformers", "rich"} & set(loaded.split())


def test_in_a_real_bash(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    program = tmp_path / "dreamloom"
    program.write_text(f"#!{sys.executable}\nfrom dreamloom.cli.main import main\nmain()\n")
    program.chmod(0o755)
    # As bash splits what is typed: "=" is a word of its own.
    script = """
        source <(dreamloom completion bash)
        complete -p dreamloom
        offer() {
            COMP_WORDS=("$@") COMP_CWORD=$(( $# - 1 )) COMPREPLY=()
            _dreamloom_completion dreamloom 2> /dev/null
            echo "${COMPREPLY[*]}"
        }
        offer dreamloom inspe
        offer dreamloom train x --set train.ran
        offer dreamloom train x --set photos.flip =
        offer dreamloom train x --set photos.flip = f
        offer dreamloom train x --preset = q
    """
    done = subprocess.run(
        [bash, "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _dreamloom_completion dreamloom",
        "inspect",
        "train.rank=",
        "true false",
        "false",
        "quick",
    ]
