"""The doctor: what each check says, and that nothing which is missing can stop it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from dreamloom.cli import checks
from dreamloom.cli.checks import EXTRAS, Finding, carry_out, list_checks, look_at_folder
from dreamloom.cli.main import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# For working on DreamLoom itself; and what the studio needs, which nothing uses yet.
NOT_LISTED = {"dev", "docs", "studio", "test", "web"}


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    for remembered in (checks._find_fault, checks._requirements):
        remembered.cache_clear()
    yield
    for remembered in (checks._find_fault, checks._requirements):
        remembered.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """What is installed, as a test says it, beside what pyproject.toml needs."""
    versions = {}
    needs = [*PROJECT["dependencies"]]
    for extra, packages in PROJECT["optional-dependencies"].items():
        needs += [f'{package}; extra == "{extra}"' for package in packages]

    def version(name):
        if name not in versions:
            raise checks.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(checks.metadata, "version", version)
    monkeypatch.setattr(checks.metadata, "requires", lambda name: needs)
    return versions


def run_broken(tmp_path: Path, names: Iterable[str], *words: str):
    """Run the doctor in a process of its own in which some packages cannot be imported."""
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f'raise ImportError("lib{name}.so.1: cannot open shared object file")\n'
        )
    return subprocess.run(
        [sys.executable, "-m", "dreamloom", "doctor", *words],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_says_that_all_works_and_what_could_be_added():
    done = CliRunner().invoke(main, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for part in ("needed", "extras", "machine", "models", "folders"):
        assert f"\n{part}\n" in f"\n{done.output}"
    assert re.search(rf"torch +{re.escape(torch.__version__)}", done.output)
    assert "the processor (" in done.output
    assert "All that is needed works" in done.output


def test_everything_said_is_in_its_json():
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert found["works"] is True
    names = [(one["part"], one["name"]) for one in found["findings"]]
    assert names == [(part, name) for part, name, _ in list_checks()]
    for one in found["findings"]:
        assert set(one) == {"part", "name", "state", "detail", "mend"}
        assert one["detail"]
        assert one["state"] in {"ok", "lacking"}


def test_a_torch_that_cannot_be_imported_is_told_and_ends_with_1(tmp_path):
    done = run_broken(tmp_path, ["torch"])
    assert done.returncode == 1, done.stderr
    assert "cannot be imported: libtorch.so.1: cannot open shared object file" in done.stdout
    assert "https://pytorch.org/get-started/locally/" in done.stdout
    assert re.search(r'to mend it: pip install --force-reinstall "torch==[\d.]+"\n', done.stdout)
    assert "mend torch first" in done.stdout
    assert re.search("device +cannot be told: torch is broken", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("Broken: torch, ")
    assert done.stderr == ""


def test_nothing_that_is_broken_stops_it(tmp_path):
    names = "torch numpy pydantic rich packaging psutil PIL huggingface_hub tokenizers".split()
    done = run_broken(tmp_path, names, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["works"] is False
    assert len(found["findings"]) == len([*list_checks()])
    broken = {one["name"] for one in found["findings"] if one["state"] == "broken"}
    assert {"torch", "diffusers", "transformers", "peft", "own modules"} <= broken


def test_extras_are_those_of_the_package(installed):
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - NOT_LISTED
    for name in EXTRAS:
        lacking = carry_out(name, checks.check_extra)
        assert (lacking.state, lacking.mend) == ("lacking", f'pip install "dreamloom[{name}]"')
    installed |= {"pillow-heif": "1.2.0", "opencv-python-headless": "4.11.0"}
    assert carry_out("heic", checks.check_extra).state == "ok"
    assert "only 4.11.0" in carry_out("faces", checks.check_extra).detail


def test_needed_packages_must_be_there_and_new_enough(installed):
    absent = carry_out("peft", checks.check_package)
    assert absent == Finding("peft", "broken", "is not installed", 'pip install "peft>=0.21"')
    installed["peft"] = "0.1.0"
    old = carry_out("peft", checks.check_package)
    assert old.state == "broken"
    assert old.mend == 'pip install --upgrade "peft>=0.21"'
    installed["peft"] = "99.0"
    assert carry_out("peft", checks.check_package) == Finding("peft", "ok", "99.0")


def test_the_other_needed_packages_are_told_together(installed):
    installed |= {name: "99999" for name in ("accelerate", "click", "filelock")}
    found = carry_out("other packages", checks.check_other_packages)
    assert found.state == "broken"
    assert "pydantic>=2.7 (not installed)" in found.detail
    assert '"pydantic>=2.7"' in found.mend
    assert "accelerate" not in found.mend


def test_a_checkout_that_is_not_installed_is_no_fault(monkeypatch):
    def absent(name):
        raise checks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.metadata, "version", absent)
    monkeypatch.setattr(checks.metadata, "requires", absent)
    found = carry_out("dreamloom", checks.check_dreamloom)
    assert found.state == "lacking"
    assert found.mend == f"pip install -e {ROOT}"
    assert carry_out("heic", checks.check_extra).detail.startswith("cannot be told: ")


def test_whatever_a_check_runs_into_is_a_finding():
    def fail(name):
        raise KeyError("a long story\nwith more lines")

    found = carry_out("something", fail)
    assert (found.name, found.state) == ("something", "lacking")
    assert "\n" not in found.detail


def test_a_device_that_is_not_here_is_broken():
    found = carry_out("device", lambda name: checks.check_device(name, "cuda:99"))
    assert found.state == "broken"
    assert "--device cuda:99 was asked for" in found.detail
    assert "--device cpu" in found.mend


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that torch does not see")
def test_a_driver_without_a_torch_for_it_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = carry_out("device", checks.check_device)
    assert found.state == "lacking"
    assert "built without CUDA, sees no GPU" in found.detail
    assert "pytorch.org" in found.detail
    assert found.mend.endswith(" --index-url INDEX")
    assert carry_out("device", lambda name: checks.check_device(name, "cpu")).state == "ok"


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory_and_precisions():
    found = carry_out("device", lambda name: checks.check_device(name, "cuda"))
    assert found.state == "ok"
    assert torch.cuda.get_device_name() in found.detail
    assert "GiB of which" in found.detail
    assert "fp16" in found.detail
    assert carry_out("torch.compile", checks.check_compiler).state == "ok"


def test_folders_that_are_full_or_closed_are_told(tmp_path, monkeypatch):
    inner = tmp_path / "not" / "yet"
    found = look_at_folder("cache", inner, 0, "set X")
    assert (found.state, found.mend) == ("ok", "")
    assert str(inner) in found.detail
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    full = look_at_folder("cache", inner, 2**30, "set X")
    assert (full.state, full.mend) == ("lacking", "set X, or make room")
    assert "0.5 GiB free, less than the 1.0 GiB" in full.detail
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    closed = look_at_folder("cache", inner, 0, "set X")
    assert (closed.state, closed.mend) == ("lacking", "set X")


def test_encoders_are_told_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMLOOM_MODELS", str(tmp_path))
    found = carry_out("encoders", checks.check_encoders)
    assert found.state == "lacking"
    assert "here: picturebook" in found.detail
    assert found.mend.startswith("dreamloom models fetch clip dino ")
    assert "sscd" not in found.mend  # it cannot be fetched by name


def test_a_model_that_came_along_damaged_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamloom.picturebook.weights_folder", lambda: tmp_path)
    assert "is missing" in carry_out("picturebook", checks.check_picturebook).detail
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").write_text("version https://git-lfs")
    found = carry_out("picturebook", checks.check_picturebook)
    assert found.state == "broken"
    assert "is no weights" in found.detail


def test_little_memory_is_told(monkeypatch):
    from dreamloom.memory.host import HostMemory

    monkeypatch.setattr(
        "dreamloom.memory.host.read_host_memory",
        lambda: HostMemory(2**29, 2**31, is_limited=True),
    )
    found = carry_out("memory", checks.check_memory)
    assert found.state == "lacking"
    assert "0.5 GiB free of the 2.0 GiB that this container may use" in found.detail
