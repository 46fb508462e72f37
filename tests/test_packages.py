"""Needed packages that are missing: the door and the command line say so, and how to mend it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dreamloom.core.errors import DreamLoomError, PackageError
from dreamloom.core.packages import explain_missing

ROOT = Path(__file__).parents[1]


def run_bare(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that has the standard library, this package and some folders."""
    paths = [str(ROOT / "src"), *map(str, folders)]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {paths}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def say_needs(folder: Path, *needs: str) -> Path:
    """Write down, as pip does, what an installed DreamLoom needs."""
    lines = ["Metadata-Version: 2.4", "Name: dreamloom", "Version: 0"]
    written = folder / "dreamloom-0.dist-info"
    written.mkdir()
    written.joinpath("METADATA").write_text("\n".join([*lines, *needs]) + "\n")
    return folder


@pytest.mark.parametrize("code", ["dreamloom.train('photos')", "from dreamloom import merge"])
def test_a_kernel_without_our_packages_ends_in_one_sentence(code: str):
    done = run_bare(f"import dreamloom\n{code}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dreamloom.core.errors.PackageError: The Python that runs here, ")
    assert f"{sys.executable}, has no " in last
    assert f"'{sys.executable} -m pip install -e {ROOT}'" in last
    assert "in a notebook: the kernel" in last
    assert "During handling" not in done.stderr
    assert "/api/" not in done.stderr


def test_what_is_installed_without_what_it_needs_names_only_that(tmp_path: Path):
    needs = ["rich>=14.0", 'torch>=2.11; python_version > "3"', 'gradio; extra == "studio"']
    folder = say_needs(tmp_path, *(f"Requires-Dist: {one}" for one in needs))
    done = run_bare("import dreamloom\ndreamloom.train('photos')", folder)
    assert '-m pip install "rich>=14.0" "torch>=2.11"\'' in done.stderr
    assert "gradio" not in done.stderr


def test_it_is_an_import_error_too_so_that_programs_may_go_without_us():
    done = run_bare("try: from dreamloom import train\nexcept ImportError: print('without')")
    assert done.stdout == "without\n"
    assert issubclass(PackageError, DreamLoomError)


def test_where_all_that_is_needed_is_there_the_fault_is_not_of_the_installation(monkeypatch):
    monkeypatch.setattr("dreamloom.core.packages.metadata.requires", lambda name: ["rich>=1"])
    assert explain_missing(ModuleNotFoundError(name="cv2")) is None
    monkeypatch.setattr("dreamloom.core.packages.metadata.requires", lambda name: ["no-such>=1"])
    assert explain_missing(ModuleNotFoundError(name="dreamloom.nowhere")) is None
    assert '"no-such>=1"' in str(explain_missing(ModuleNotFoundError(name="no_such.part")))


def import_what_is_missing(**given: object) -> None:
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_a_command_says_it_instead_of_blaming_dreamloom(monkeypatch):
    from click.testing import CliRunner

    from dreamloom.cli.main import main

    monkeypatch.setattr("dreamloom.core.packages.metadata.requires", lambda name: ["no-such>=1"])
    monkeypatch.setattr("dreamloom.cli.main.photos.callback", import_what_is_missing)
    done = CliRunner().invoke(main, ["photos", str(ROOT / "examples/rraj")])
    assert done.exit_code == 1
    assert "has no torch, which DreamLoom needs" in done.output
    assert "fault of its own" not in done.output
