"""The Dockerfile, as far as it can be tried without Docker: its words, and the wheel's build."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

from dreamloom.cli.main import main
from dreamloom.evaluation.encoders.store import FOLDER_VARIABLE

ROOT = Path(__file__).parents[1]
IMAGE = re.compile(r"^[\w./-]+:[\w.-]*\d[\w.-]*$")


class Line(NamedTuple):
    """An instruction, and the stage that it stands in."""

    stage: int
    word: str
    text: str


def read_dockerfile(text: str) -> list[Line]:
    """Read instructions: lines put together, comments left out."""
    kept = "\n".join(one for one in text.splitlines() if not one.startswith("#"))
    lines, stage = [], -1
    for one in kept.replace("\\\n", " ").splitlines():
        if one.strip():
            word, _, rest = one.partition(" ")
            stage += word == "FROM"
            lines.append(Line(stage, word, " ".join(rest.split())))
    return lines


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Say whether .dockerignore leaves a path out: the last pattern that fits it, or a parent."""
    ways = [PurePosixPath(path), *list(PurePosixPath(path).parents)[:-1]]
    ignored = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        whole = plain.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(str(way if whole == plain else way.name), whole) for way in ways
        ):
            ignored = not pattern.startswith("!")
    return ignored


TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = read_dockerfile(TEXT)
LAST = [one for one in LINES if one.stage == LINES[-1].stage]
IGNORE = [
    line
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
ENVIRONMENT = dict(
    word.split("=", 1) for one in LAST if one.word == "ENV" for word in shlex.split(one.text)
)
COPIED = [
    (one.stage, source, shlex.split(one.text)[-1])
    for one in LINES
    if one.word == "COPY" and "--from" not in one.text
    for source in shlex.split(one.text)[:-1]
]


def only(word: str, lines: list[Line] = LAST) -> str:
    [text] = [one.text for one in lines if one.word == word]
    return text


def test_every_stage_stands_on_one_pinned_image():
    images = {one.text.split(" AS ")[0] for one in LINES if one.word == "FROM"}
    [image] = images
    assert IMAGE.match(image)
    assert not IMAGE.match("nvidia/cuda:latest")
    assert not IMAGE.match("nvidia/cuda")


def test_what_is_copied_is_there_and_not_ignored():
    assert len(COPIED) > 4
    for _, source, _ in COPIED:
        assert (ROOT / source).exists(), source
        assert not is_ignored(source, IGNORE), source
    assert not is_ignored("src/dreamloom/picturebook/weights/model_index.json", IGNORE)


@pytest.mark.parametrize(
    "path", ["runs/me/photos/01.jpg", ".git/config", ".venv/bin/python", "src/a/__pycache__/b.pyc"]
)
def test_what_is_nobodys_business_is_not_sent_to_the_builder(path: str):
    assert is_ignored(path, IGNORE)


def test_nothing_runs_as_root_in_the_end():
    users = [one.text for one in LAST if one.word == "USER"]
    assert users
    assert users[-1].split(":")[0] not in {"root", "0"}
    made = [one.text for one in LAST if one.word == "RUN" and "useradd" in one.text]
    assert made[0].split("useradd")[1].split("&&")[0].split()[-1] == users[-1]


def test_volumes_belong_to_the_user_and_hold_what_is_kept():
    volumes, user = json.loads(only("VOLUME")), only("USER")
    owned = re.search(rf"chown {user}:{user} (?P<folders>[^&;\n]+)", TEXT)
    assert owned is not None
    assert set(owned["folders"].split()) == set(volumes)
    kept = {name: value for name, value in ENVIRONMENT.items() if name != "PATH"}
    assert kept.keys() >= {"HF_HOME", FOLDER_VARIABLE, "TORCH_EXTENSIONS_DIR"}
    for name, folder in kept.items():
        assert any(PurePosixPath(folder).is_relative_to(one) for one in volumes), name
    command = json.loads(only("CMD"))
    assert command[command.index("--root") + 1] in volumes
    # So does what a command writes to runs/, where it was not told otherwise.
    assert str(PurePosixPath(only("WORKDIR")) / "runs") in volumes


def test_torch_is_the_version_that_is_tested():
    versions = {
        name: re.findall(r"\btorch==([\d.]+)", (ROOT / name).read_text(encoding="utf-8"))
        for name in ("Dockerfile", "Makefile", "constraints.txt")
    }
    assert all(versions.values()), versions
    assert len({one for found in versions.values() for one in found}) == 1, versions


def test_extras_are_the_packages_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [named] = re.findall(r"\$wheel\[([\w,]+)\]", TEXT)
    extras = set(named.split(","))
    assert "studio" in extras
    assert extras <= project["optional-dependencies"].keys()


def test_the_default_command_is_one_of_ours():
    assert json.loads(only("ENTRYPOINT")) == ["dreamloom"]
    command, *options = json.loads(only("CMD"))
    if command not in main.commands:
        pytest.skip(f"there is no dreamloom {command} yet")
    found = main.commands[command]
    found.make_context(command, list(options))  # refuses what it does not know
    [password] = [one for one in found.params if one.name == "password"]
    assert password.envvar == "DREAMLOOM_PASSWORD"
    assert str(next(one for one in found.params if one.name == "port").default) == only("EXPOSE")


def copy_as_told(stage: int, folder: Path) -> None:
    """Bring into a folder what a stage's COPY brings, and nothing that .dockerignore leaves out."""
    for where, source, target in COPIED:
        if where != stage:
            continue
        start = ROOT / source
        for file in sorted(start.rglob("*")) if start.is_dir() else [start]:
            name = file.relative_to(ROOT).as_posix()
            if file.is_file() and not is_ignored(name, IGNORE):
                inside = file.relative_to(start) if start.is_dir() else file.name
                place = folder / target / inside
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)


@pytest.mark.slow
def test_the_line_that_builds_the_wheel_builds_it_from_what_is_copied(tmp_path: Path):
    pytest.importorskip("hatchling", reason="building needs hatchling, from the extra 'test'")
    [line] = [one for one in LINES if one.word == "RUN" and "hatchling build" in one.text]
    copy_as_told(line.stage, tmp_path)
    words = shlex.split(line.text)
    assert words[0] == "tools/bin/python"
    without = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=without, check=True)
    brought = shlex.split(next(one.text for one in LINES if "--from=" in one.text))
    stage_folder = only("WORKDIR", [one for one in LINES if one.stage == line.stage])
    built = tmp_path / PurePosixPath(brought[1]).relative_to(stage_folder)
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {
        "dreamloom/cli/main.py",
        "dreamloom/examples/rraj/IMG_0001.jpg",
        "dreamloom/picturebook/weights/model_index.json",
    }
