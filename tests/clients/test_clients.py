"""Files of every kind in other programs, and theirs here: `make test-clients`.

Nothing is fetched. ComfyUI, sd-scripts and OneTrainer run from checkouts that COMFYUI, SD_SCRIPTS
and ONETRAINER name, LyCORIS from LYCORIS or as it is installed; what is not there is skipped. Each
program runs in a process of its own (`clients/__main__.py`), on a random SDXL of the true blocks
and depths, and tiny widths.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.clients


@dataclass(frozen=True)
class Program:
    """A program of others.

    Args:
        module: Which of this folder's modules runs it.
        variable: Which variable of the environment names its checkout.
        package: The installed package that will do instead.
        named: What `name_readers` calls it.
        needs: A package that it cannot do without.
    """

    module: str
    variable: str = ""
    package: str = ""
    named: str = ""
    needs: str = ""

    def find(self):
        """The path of the checkout, empty for an installed package; skip if there is neither."""
        path = os.environ.get(self.variable, "") if self.variable else ""
        if path:
            assert Path(path).is_dir(), f"{self.variable}={path} is no folder"
        elif not self.package or find_spec(self.package) is None:
            pytest.skip(f"no checkout: name one, make test-clients {self.variable}=/path/to/it")
        if self.needs and find_spec(self.needs) is None:
            pytest.skip(f"it needs the package {self.needs}: pip install {self.needs}")
        return str(Path(path).resolve()) if path else ""


PROGRAMS = {
    "diffusers": Program("diffusers_pipeline", package="diffusers", named="diffusers"),
    "ComfyUI": Program("comfyui", "COMFYUI", named="ComfyUI"),
    "sd-scripts": Program("sd_scripts", "SD_SCRIPTS", named="kohya's sd-scripts"),
    "sdxl_merge_lora.py": Program("sd_scripts_merge", "SD_SCRIPTS", named="kohya's sd-scripts"),
    "LyCORIS": Program("lycoris_kohya", "LYCORIS", "lycoris"),
    "OneTrainer": Program("onetrainer", "ONETRAINER", named="OneTrainer", needs="parse"),
    "PEFT": Program("peft_itself", package="peft", named="PEFT"),
}
WRITERS = [name for name in PROGRAMS if name not in ("ComfyUI", "sdxl_merge_lora.py")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The small base, and every file of ours beside it."""
    from clients.ours import write_ours
    from clients.small_base import save_base

    folder = tmp_path_factory.mktemp("clients")
    (folder / "ours.json").write_text(json.dumps(write_ours(folder, save_base(folder))))
    return folder


def run_program(program, task, folder):
    """Let a program do a task in a process of its own; return what it found."""
    checkout = program.find()
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path[1:]])
    command = [sys.executable, "-m", "clients", program.module, task, str(folder)]
    done = subprocess.run(
        [*command, *([checkout] if checkout else [])],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{task}-{program.module}.json").read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_applies_what_is_said_to_be_for_it(folder, measured, name):
    from clients.tables import is_exact
    from dreamloom.lora.readers import name_readers

    program = PROGRAMS[name]
    found = run_program(program, "read", folder)
    measured["read"][name] = found
    files = json.loads((folder / "ours.json").read_text())
    wrong = []
    for key, result in found.items():
        case, _, format = key.partition("|")
        told, _, without = name_readers(Path(files[case][format])).partition("; ")
        if program.named and program.named in told and not is_exact(case, result):
            wrong.append(f"{key} is said to be for {name}: {_shorten(result)}")
        if program.named and f"not {program.named}" in without and is_exact(case, result):
            wrong.append(f"{key} is said not to be for {name}, which applies all of it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_program_writes_is_read_whole_or_refused(folder, measured, name):
    from clients.small_base import load_base
    from clients.tables import is_exact
    from clients.theirs import read_theirs

    program = PROGRAMS[name]
    weights = load_base(folder)
    results = {
        case: made
        if "failed" in made
        else read_theirs(Path(made["file"]), Path(made["changes"]), weights)
        for case, made in run_program(program, "write", folder).items()
    }
    measured["write"][name] = results
    assert not {case for case, found in results.items() if "failed" in found}
    refused = {case for case, found in results.items() if "refused" in found}
    assert refused == set(import_module(f"clients.{program.module}").REFUSED)
    partly = [c for c, f in results.items() if c not in refused and not is_exact(c, f)]
    assert not partly, {case: _shorten(results[case]) for case in partly}


def test_the_versions_are_those_of_the_table():
    """What the tables of docs/formats.md were measured with is what is installed here."""
    told = (ROOT / "docs" / "formats.md").read_text()
    for package in ("diffusers", "peft", "transformers", "torch"):
        assert metadata.version(package).partition("+")[0] in told


def _shorten(found):
    return {key: value[:2] if isinstance(value, list) else value for key, value in found.items()}
