"""The run folder: whole files or none, records that are believed only when they fit."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dreamloom.core.errors import RunFolderError
from dreamloom.core.events import LossLogged, Note, StageStarted
from dreamloom.core.run_folder import (
    Record,
    RunFolder,
    atomic_folder,
    atomic_path,
    file_sha256,
    fingerprint,
    library_versions,
    write_json,
    write_text,
)

# ------------------------------------------------------------------ whole files


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "older"
            raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        write_half()
    assert path.read_text() == "older"
    assert listing(tmp_path) == ["scores.json"]


def test_a_finished_write_replaces_the_older_file(tmp_path):
    path = tmp_path / "new" / "folder" / "scores.json"
    for text in ("first", "second"):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "second"
    assert listing(path.parent) == ["scores.json"]


@pytest.mark.parametrize("name", ["a.safetensors", "b.png", "c.tar.gz", "noending"])
def test_the_temporary_lies_beside_and_keeps_the_ending(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == Path(name).suffix
        assert temporary.name != name


def test_a_temporary_that_its_writer_took_away_is_an_error_without_leftovers(tmp_path):
    def write_nothing():
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.unlink()

    with pytest.raises(FileNotFoundError):
        write_nothing()
    assert listing(tmp_path) == []


def test_a_folder_in_the_way_stays(tmp_path):
    (tmp_path / "a.txt" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "text")
    assert listing(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_any_other_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_a_write_leaves_the_processs_umask_alone(tmp_path, monkeypatch):
    """Another thread would make files that all the world may write to."""

    def refuse(mask):
        raise AssertionError(f"the umask was set to {mask}")

    monkeypatch.setattr(os, "umask", refuse)
    write_text(tmp_path / "a.txt", "text")


@pytest.mark.skipif(os.name != "posix", reason="only POSIX syncs folders")
def test_contents_reach_the_disk_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    seen = []

    def sync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append(("folder" if folder else "file", (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", sync)
    write_text(tmp_path / "a", "text")
    assert seen == [("file", False), ("folder", True)]
    (tmp_path / "a").unlink()
    seen.clear()
    with atomic_folder(tmp_path / "a") as fresh:
        (fresh / "inner").write_text("text")
    assert seen == [("file", False), ("folder", False), ("folder", True)]


def test_json_is_readable_and_keeps_umlauts(tmp_path):
    value = {"subject": "Jürgen", "path": Path("a/b"), "scores": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Jürgen" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {**value, "path": "a/b"}


def test_json_that_cannot_be_written_leaves_the_older_file(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError, match="cannot fingerprint a set"):
        write_json(tmp_path / "a.json", {1, 2})
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert listing(tmp_path) == ["a.json"]


def test_a_files_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The example of FIPS 180-2.
    assert file_sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# ------------------------------------------------------------------ fingerprints

NUMBERS = st.integers() | st.floats(allow_nan=False)
TEXTS = st.text('a1é" ', max_size=3)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def backwards(value):
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@given(PLAIN)
def test_a_fingerprint_does_not_depend_on_the_order_of_names(value):
    assert fingerprint(value) == fingerprint(backwards(value))
    assert len(bytes.fromhex(fingerprint(value))) == 32


@given(PLAIN, PLAIN)
def test_other_values_have_other_fingerprints(first, second):
    # repr tells 1 from True and from 1.0, and 0.0 from -0.0, as a fingerprint must.
    same = repr(sort(first)) == repr(sort(second))
    assert (fingerprint(first) == fingerprint(second)) == same


def sort(value):
    if isinstance(value, dict):
        return {key: sort(value[key]) for key in sorted(value)}
    return [sort(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), ("1",)),
        ((1,), (True,)),
        ((1,), (1.0,)),
        ((None,), ("null",)),
        (([1, 2],), ([2, 1],)),
        (([1], [2]), ([1, 2],)),
        (([[1], 2],), ([[1, 2]],)),
        (("a", "b"), ("ab",)),
        (({},), ([],)),
        ((), (None,)),
    ],
)
def test_what_is_not_the_same_differs(one, other):
    assert fingerprint(*one) != fingerprint(*other)


@dataclasses.dataclass
class Crop:
    top: int
    path: Path


class Settings(BaseModel):
    rank: int = 16
    crop: tuple[int, ...] = (1, 2)


def test_objects_count_by_their_fields():
    assert fingerprint(Crop(1, Path("a"))) == fingerprint(Crop(1, Path("a")))
    assert fingerprint(Crop(1, Path("a"))) != fingerprint(Crop(2, Path("a")))
    assert fingerprint(Settings()) == fingerprint(Settings(rank=16))
    assert fingerprint([Settings()]) != fingerprint([Settings(rank=8)])


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Crop])
def test_what_has_no_plain_form_is_refused(value):
    with pytest.raises(TypeError, match="cannot fingerprint a"):
        fingerprint(value)


# ------------------------------------------------------------------ the folder


def test_claiming_makes_a_folder_that_is_a_run(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    assert not run.is_run()
    run.claim()
    assert run.is_run()
    run.claim()


def test_an_empty_folder_may_become_a_run(tmp_path):
    RunFolder(tmp_path).claim()
    assert RunFolder(tmp_path).is_run()


def test_a_folder_with_settings_alone_is_a_run(tmp_path):
    (tmp_path / "loom.toml").touch()
    (tmp_path / "other.txt").touch()
    RunFolder(tmp_path).refuse_other_folders()


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path).claim()
    assert caught.value.problem == (
        f"{tmp_path} already holds other files and is not a run of DreamLoom."
    )
    assert "--out" in caught.value.hint
    assert listing(tmp_path) == ["thesis.txt"]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(RunFolderError, match="run is a file, not a folder"):
        RunFolder(tmp_path / "run").claim()


def test_looking_does_not_make_the_folder(tmp_path):
    RunFolder(tmp_path / "run").refuse_other_folders()
    assert listing(tmp_path) == []


# ------------------------------------------------------------------ records


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    return run


@pytest.fixture
def trained(run):
    """A run whose training is recorded."""
    run.adapter.write_bytes(b"weights")
    run.write_record(
        Record(
            stage="train",
            inputs={"photos": "a1", "base": "b2"},
            settings={"rank": 16, "learning_rate": 1e-4, "min_snr_gamma": None},
            outputs=run.hash_outputs(run.adapter),
            results={"losses": [0.5, 0.25]},
            base={"name": "picturebook"},
            seed=3,
            runtime="cpu fp32",
            seconds=1.5,
            peak_mib=300.0,
        )
    )
    return run


INPUTS = {"photos": "a1", "base": "b2"}


def test_a_record_comes_back_as_it_was_written(trained):
    record = trained.read_record("train")
    trained.write_record(record)
    assert trained.read_record("train") == record
    assert record.settings == {"rank": 16, "learning_rate": 1e-4, "min_snr_gamma": None}
    assert record.outputs == {"adapter.safetensors": file_sha256(trained.adapter)}
    assert record.versions == library_versions()
    assert {"python", "torch", "diffusers"} <= record.versions.keys()
    assert record.finished_at.endswith("+00:00")


def test_a_stage_is_finished_if_it_was_made_from_the_same(trained):
    assert trained.finished("train", INPUTS) == trained.read_record("train")
    assert trained.finished("train", dict(reversed(INPUTS.items()))) is not None


@pytest.mark.parametrize(
    "inputs", [{"photos": "a1", "base": "b3"}, {"photos": "a1"}, {**INPUTS, "priors": "c"}, {}]
)
def test_a_stage_made_from_others_is_not_finished(trained, inputs):
    assert trained.finished("train", inputs) is None


def test_a_stage_whose_file_is_gone_is_not_finished(trained):
    trained.adapter.unlink()
    assert trained.finished("train", INPUTS) is None


@pytest.mark.parametrize(
    "damaged", [b"", b'{"stage": "tra', b"[]", b'{"stage": 1, "inputs": {}}', b"\xff\xfe{"]
)
def test_a_damaged_record_is_as_good_as_none(trained, damaged):
    trained.record_file("train").write_bytes(damaged)
    assert trained.read_record("train") is None
    assert trained.finished("train", INPUTS) is None


def test_a_field_of_another_version_is_passed_over(trained):
    file, known = trained.record_file("train"), trained.read_record("train")
    file.write_text(json.dumps({**json.loads(file.read_text()), "colour": 1}))
    assert trained.read_record("train") == known
    assert trained.finished("train", INPUTS) == known


@pytest.mark.parametrize("left", [b"", b"weight", b"weighty"])
def test_a_stage_whose_file_has_changed_is_not_finished(trained, left):
    trained.adapter.write_bytes(left)
    assert trained.finished("train", INPUTS) is None
    trained.adapter.write_bytes(b"weights")
    assert trained.finished("train", INPUTS) is not None


def test_a_stage_without_a_record_is_not_finished(run):
    assert run.read_record("train") is None
    assert run.finished("train", {}) is None


def test_outputs_are_named_from_the_runs_own_folder(run):
    picture = run.images / "table" / "a.png"
    write_text(picture, "pixels")
    assert run.hash_outputs(picture) == {"images/table/a.png": file_sha256(picture)}


def test_events_are_appended_a_line_each(run):
    for event in (
        StageStarted("train", "zwölf"),
        LossLogged(1, 0.5, 0.4, None, 1e-4),
        Note("train", "two\nlines", warning=True),
    ):
        run.observer()(event)
    lines = [json.loads(line) for line in run.events_file.read_text().splitlines()]
    assert [line.pop("event") for line in lines] == ["StageStarted", "LossLogged", "Note"]
    assert all(line.pop("at").endswith("+00:00") for line in lines)
    assert lines[0] == {"stage": "train", "detail": "zwölf"}
    assert lines[1]["prior"] is None
    assert lines[2]["text"] == "two\nlines"
