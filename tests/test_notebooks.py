"""The notebooks: each runs whole on the built-in model, one after the other, as a reader would."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra 'notebooks'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra 'notebooks'")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_it_printed(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert 'os.environ.get("DREAMLOOM_BASE", "sdxl")' in "".join(cell.source for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stays_at_the_door(path: Path):
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert "import dreamloom as dl" in source
    assert "from dreamloom" not in source
    assert "import torch" not in source


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory):
    """Run all of them in their order, in one folder: later ones go on with earlier runs."""
    folder = tmp_path_factory.mktemp("notebooks")
    environment = {**os.environ, "DREAMLOOM_BASE": "picturebook", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    done = {}
    for path in NOTEBOOKS:
        client = nbclient.NotebookClient(
            read(path), timeout=600, resources={"metadata": {"path": str(folder)}}
        )
        done[path.stem] = client.execute(env=environment)
    return folder, done


def shown(notebook) -> str:
    """All that its cells show: text, HTML and errors."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            parts.append(output.get("text", ""))
            parts += [str(text) for text in output.get("data", {}).values()]
    return "\n".join(parts)


def test_the_notebooks_leave_the_adapters_the_tables_and_the_merge(executed):
    folder, done = executed
    assert (folder / "runs/me-in-pixels.safetensors").is_file()
    assert (folder / "runs/me/report.html").is_file()
    assert {*done} == {"1-train", "2-look", "3-measure", "4-merge"}
    said = {name: shown(notebook) for name, notebook in done.items()}
    assert said["1-train"].count("<img ") == 12
    assert said["2-look"].count("<img ") == 36
    assert "dpm++, 12 steps" in said["3-measure"]
    assert "one fault mended after the other" in said["3-measure"]
    assert "both together, by their harmonic mean" in said["4-merge"]


def test_progress_is_one_bar_that_is_written_anew(executed):
    _, done = executed
    training = next(
        cell for cell in done["1-train"].cells if "with_prior = dl.train" in cell.source
    )
    boards = [one for one in training.outputs if "<b>train</b>" in str(one.get("data", ""))]
    assert len(boards) == 1
    assert "done in" in str(boards[0].data)


def test_a_notebook_goes_on_with_what_the_one_before_taught(executed):
    _, done = executed
    assert "<b>train</b>" not in shown(done["2-look"])
