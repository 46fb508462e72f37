"""README followed to the letter, from an empty directory: every command in its `sh` blocks runs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.evaluation.encoders.catalogue import find_model
from dreamloom.pipeline.draw import pack_prompts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# As little work as each command can do; everything else is as it stands in the README.
SMALL = {
    "train": (
        *("train.steps=2", "train.rank=2", "train.batch_photos=1", "train.batch_priors=1"),
        *("priors.count=2", "priors.steps=1"),
    ),
    "generate": ("generate.steps=1", "generate.images_per_prompt=1"),
    "evaluate": ("evaluate.resamples=100",),
}


def read_commands() -> list[list[str]]:
    """Every line of the sh blocks, as a shell would split it."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_commands_are_those_of_the_project():
    commands = read_commands()
    assert {words[0] for words in commands} == {"make", "pip", "dreamloom"}
    assert all(words[1] in main.commands for words in commands if words[0] == "dreamloom")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile


def test_it_says_how_many_pictures_the_first_drawing_is():
    packs = [
        words[place + 1]
        for words in read_commands()
        if words[:2] == ["dreamloom", "generate"]
        for place, word in enumerate(words)
        if word == "--pack"
    ]
    prompts = sum(len(pack_prompts(pack, "rraj person")) for pack in packs)
    assert f"{prompts * 8 * 2} pictures here: {prompts} prompts with 8 seeds" in README
    assert f"`--seeds 2` makes it {prompts * 2 * 2}" in README


def test_models_are_fetched_before_they_are_asked():
    commands = [words[1:] for words in read_commands() if words[0] == "dreamloom"]
    fetch = next(place for place, words in enumerate(commands) if words[:2] == ["models", "fetch"])
    assert fetch < next(place for place, words in enumerate(commands) if words[0] == "evaluate")
    for name in commands[fetch][2:]:
        assert find_model(name).source == "hub"  # the others cannot be fetched by name


def test_the_demo_installs_the_package_alone():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    dry = subprocess.run(
        ["make", "-n", "-B", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "pip install --disable-pip-version-check -e . " in dry
    assert "[dev" not in dry
    assert "activate" in dry


@pytest.mark.slow
def test_every_command_works_when_they_are_followed_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree("examples/rraj", "my-photos")
    for words in read_commands():
        if words[0] != "dreamloom" or words[1] == "models":
            continue  # what installs is not run here, and there is no network
        words = ["picturebook" if word == "sdxl" else word for word in words[1:]]
        words += [word for setting in SMALL.get(words[0], ()) for word in ("--set", setting)]
        done = CliRunner().invoke(main, ["--quiet", *words])
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
    assert Path("runs/me/report.html").is_file()
    assert len([*Path("runs/me/images/in-pixels").glob("*.png")]) == 1
