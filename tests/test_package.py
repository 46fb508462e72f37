"""The package: what is built holds everything, and nothing else, and works without the checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="building needs hatchling, from the extra 'test'")

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
MOST_MIB = 46


def run(command: Sequence[object], folder: Path, **environment: str) -> str:
    """Run a command outside of the checkout, without what leads back into it."""
    without = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**without, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both, once."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"dreamloom-{VERSION}-py3-none-any.whl"


def test_the_wheel_holds_what_runs_need_and_nothing_else(wheel: Path):
    assert wheel.stat().st_size <= MOST_MIB * 2**20
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dreamloom", f"dreamloom-{VERSION}.dist-info"}
    inside = {name.removeprefix("dreamloom/") for name in names}
    assert inside >= {
        "py.typed",
        "picturebook/weights/model_index.json",
        "examples/rraj/IMG_0001.jpg",
        "data/prompts/person-v1.toml",
        "models/sdxl_configs/NOTICE",
        "recipes/questions/prior.toml",
        "studio/static/vendor/htmx.min.js",
        "studio/static/vendor/htmx.LICENSE",
        "studio/templates/parts/disk.html",
        "studio/languages/en.toml",
    }
    for licence in ("htmx", "htmx-ext-sse", "uplot"):
        end = f"licenses/src/dreamloom/studio/static/vendor/{licence}.LICENSE"
        assert any(name.endswith(end) for name in names)
    assert any(name.startswith("report/") and name.endswith(".html") for name in inside)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".ipynb", ".so"))]


def test_the_source_archive_holds_what_builds_and_tests_it(built: Path):
    with tarfile.open(built / f"dreamloom-{VERSION}.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert names >= {
        "pyproject.toml",
        "Makefile",
        "Dockerfile",
        ".dockerignore",
        "constraints.txt",
        "README.md",
        "src/dreamloom/__init__.py",
        "tests/conftest.py",
        "notebooks/1-train.ipynb",
        "recipes/fair-with-prior.toml",
    }
    assert not [name for name in names if name.startswith(("runs/", ".venv/", "build/"))]


def test_the_wheel_alone_finds_its_model_its_examples_and_its_packs(wheel: Path, tmp_path: Path):
    place, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    zipfile.ZipFile(wheel).extractall(place)
    dreamloom = [sys.executable, "-m", "dreamloom"]
    weights = run([*dreamloom, "models", "path", "picturebook"], away, PYTHONPATH=str(place))
    assert weights.strip().startswith(str(place))
    photos = place / "dreamloom/examples/rraj"
    told = run([*dreamloom, "photos", photos], away, PYTHONPATH=str(place))
    assert "can be used as they are" in told
    assert "person-v1" in run([*dreamloom, "packs"], away, PYTHONPATH=str(place))
    found = run(
        [sys.executable, "-c", "import dreamloom as dl; print(dl.example('pixel-art'))"],
        away,
        PYTHONPATH=str(place),
    )
    assert found.strip() == str(place / "dreamloom/examples/pixel-art")
    asked = "from dreamloom.experiments.study import asked; print(len(asked.list_questions()))"
    found = run([sys.executable, "-c", asked], away, PYTHONPATH=str(place))
    assert found.strip() == "6"


@pytest.mark.slow  # installs everything anew, torch too, and runs the demo
def test_installed_in_a_clean_environment_the_quick_demo_runs(wheel: Path, tmp_path: Path):
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [scripts / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run([*pip, "torch==2.13.0"], tmp_path)
    run([*pip, wheel], tmp_path)
    run([scripts / "dreamloom", "demo", "--preset", "quick", "--out", "demo"], tmp_path)
    assert (tmp_path / "demo/report.html").stat().st_size > 100_000
