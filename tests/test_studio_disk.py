"""The disk page: sizes by kind, deleting with undo, and nothing outside of the root touched."""

import json
import os
import platform
import sys
import time

import pytest

pytest.importorskip("starlette", reason="the studio needs the extra 'studio'")

from dreamloom.studio import device, page_disk, trash
from dreamloom.studio.device import read_gpus
from dreamloom.studio.disk import measure_run, size_of
from dreamloom.studio.jobs import Became, own_identity
from studio_case import enter, make_jpeg, make_run, open_studio

PAGE = "0123456789abcdef"
OTHER = "fedcba9876543210"


@pytest.fixture
def studio(tmp_path, monkeypatch):
    make_run(tmp_path / "runs")
    with open_studio(tmp_path / "runs", monkeypatch) as (client, own, _):
        yield enter(client, own), own


def find(own, kind):
    return next(item for item in page_disk._measure(own).items() if item.kind == kind)


def delete(client, item, page=PAGE):
    return client.post("/disk/delete", data={"item": item.id, "page": page})


def deleted(own):
    return list(page_disk._trash(own))


def undo(client, record):
    return client.post("/disk/undo", data={"deleted": record.id, "page": PAGE})


def snapshot(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_run_is_told_by_kind(studio):
    _, own = studio
    usage = measure_run(own.runs()[0])
    sizes = {part.kind: part.size_bytes for part in usage.parts}
    assert sizes["checkpoints"] == 5000
    assert sizes["adapter"] == 3000
    assert usage.whole.size_bytes == sum(sizes.values()) == size_of(own.root / "me")
    assert {part.kind for part in usage.parts if part.can_go} == {"checkpoints", "set"}


@pytest.mark.parametrize("kind", ["run", "checkpoints", "set", "photo_set", "merged"])
def test_what_is_deleted_comes_back_byte_for_byte(studio, kind):
    client, own = studio
    photos = own.photo_sets.make("holiday")
    photos.store(make_jpeg(), "a.jpg")
    (own.root / "mixes").mkdir()
    (own.root / "mixes" / "both.safetensors").write_bytes(b"m" * 700)
    before, item = snapshot(own.root), find(own, kind)
    answer = delete(client, item)
    assert answer.status_code == 200
    assert "Undo" in answer.text
    for place in item.places:
        assert not (own.root / place).exists()
    assert item.id not in {one.id for one in page_disk._measure(own).items()}
    [record] = deleted(own)
    assert (record.name, record.page) == (item.name, PAGE)
    assert undo(client, record).status_code == 200
    assert snapshot(own.root) == before
    assert deleted(own) == []
    assert undo(client, record).status_code == 404


def test_leaving_the_page_removes_for_good_what_it_deleted(studio):
    client, own = studio
    delete(client, find(own, "checkpoints"))
    delete(client, find(own, "set"), OTHER)
    headers = {"Origin": "http://localhost:8787", "Sec-Fetch-Site": "same-origin"}
    headers["Content-Type"] = "text/plain;charset=UTF-8"  # as navigator.sendBeacon sends it
    foreign = client.post("/disk/empty", content=PAGE, headers={"Origin": "http://evil.example"})
    assert (foreign.status_code, len(deleted(own))) == (403, 2)
    for nobody in ("", "../..", "x" * 500, PAGE.upper()):
        assert client.post("/disk/empty", content=nobody, headers=headers).status_code == 204
    assert len(deleted(own)) == 2
    assert client.post("/disk/empty", content=PAGE, headers=headers).status_code == 204
    assert [record.kind for record in deleted(own)] == ["set"]
    assert (own.root / "me" / "loom.toml").is_file()


def test_opening_the_page_removes_what_has_waited_long(studio, monkeypatch):
    client, own = studio
    delete(client, find(own, "checkpoints"))
    assert "Undo" in client.get("/disk").text
    monkeypatch.setattr(trash, "KEEP_SECONDS", -1)
    assert ">Undo<" not in client.get("/disk").text
    assert deleted(own) == []
    assert not list((own.own / "trash").iterdir())


def test_a_run_that_a_job_needs_is_kept(studio):
    client, own = studio
    run = own.runs()[0]
    photos = own.photo_sets.make("a")
    photos.store(make_jpeg(), "a.jpg")
    argv = ["train", own.path_of(photos.folder.relative_to(own.root).as_posix())]
    job = own.jobs.add("train", argv, run=run.name)
    for kind in ("run", "checkpoints", "set", "photo_set"):
        answer = delete(client, find(own, kind))
        assert answer.status_code == 409
        assert "Stop or drop that job first" in answer.text
    pid, began = own_identity()
    job.write_became(Became(outcome="running", pid=pid, pid_started=began))
    assert delete(client, find(own, "run")).status_code == 409
    job.write_became(Became(outcome="done"))
    assert delete(client, find(own, "run")).status_code == 200


def test_a_run_that_the_command_line_trains_is_kept(studio):
    client, own = studio
    pid, began = own_identity()
    training = {"pid": pid, "started_s": began, "host": platform.node()}
    (own.root / "me" / "training.json").write_text(json.dumps(training))
    assert delete(client, find(own, "checkpoints")).status_code == 409


def test_another_run_of_a_longer_name_is_no_matter(studio):
    client, own = studio
    make_run(own.root, "me-2")
    own.jobs.add("train", ["train", "x", "--out", own.path_of("me-2")], run="me-2")
    names = {item.name: item for item in page_disk._measure(own).items() if item.kind == "run"}
    assert delete(client, names["me"]).status_code == 200


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_neither_counted_nor_followed(studio, tmp_path):
    client, own = studio
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.safetensors").write_bytes(b"p" * 9000)
    run = own.root / "me"
    before = size_of(run)
    (run / "looks").mkdir()
    os.symlink(outside, run / "looks" / "away")
    os.symlink(outside, own.root / "linked")
    os.symlink(outside / "precious.safetensors", own.root / "p.safetensors")
    assert size_of(run) - before < 200
    kinds = [item.kind for item in page_disk._measure(own).items()]
    assert "merged" not in kinds
    assert delete(client, find(own, "run")).status_code == 200
    client.post("/disk/empty", content=PAGE)
    assert not run.exists()
    assert (outside / "precious.safetensors").read_bytes() == b"p" * 9000


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_what_a_link_leads_to_is_never_moved(studio, tmp_path):
    client, own = studio
    item = find(own, "checkpoints")
    outside = tmp_path / "elsewhere"
    (own.root / "me" / "checkpoints").rename(outside)
    os.symlink(outside, own.root / "me" / "checkpoints")
    assert delete(client, item).status_code in {404, 409}
    assert (outside / "000010" / "state.safetensors").is_file()
    assert deleted(own) == []


def test_a_record_that_leads_out_of_the_root_brings_nothing_there(studio, tmp_path):
    client, own = studio
    delete(client, find(own, "set"))
    [record] = deleted(own)
    file = own.own / "trash" / record.id / "record.json"
    for place in ("../../evil", str(tmp_path / "evil")):
        bad = record.model_copy(update={"places": (place,)})
        file.write_text(bad.model_dump_json())
        assert undo(client, record).status_code == 409
    assert not (tmp_path / "evil").exists()
    assert not list(tmp_path.parent.glob("evil"))


def test_nothing_is_written_over_what_has_come_since(studio):
    client, own = studio
    delete(client, find(own, "checkpoints"))
    (own.root / "me" / "checkpoints").mkdir()
    [record] = deleted(own)
    answer = undo(client, record)
    assert answer.status_code == 409
    assert "something else in its place" in answer.text
    assert len(deleted(own)) == 1


def test_what_is_not_there_any_more_is_told(studio):
    client, _ = studio
    for wanted in ("", "x", "../me", "0" * 16):
        assert client.post("/disk/delete", data={"item": wanted}).status_code == 404


# The machine -----------------------------------------------------------------------------------


def test_the_machine_is_told_without_a_gpu(studio, monkeypatch):
    client, _ = studio
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    text = client.get("/disk/device").text
    assert "No GPU found." in text
    assert "in use" in text


def test_gpus_are_read_from_what_their_program_says(studio, tmp_path, monkeypatch):
    client, _ = studio
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 1024, 143771, 37'\necho 'A, B, 1, 2, [N/A]'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(device.shutil, "which", lambda name: str(program))
    text = client.get("/disk/device").text
    assert "NVIDIA H200: 1.07 GB of 151 GB in use, 37 % busy" in text
    [first, second] = read_gpus("NVIDIA H200, 1024, 143771, 37\nA, B, 1, 2, [N/A]\n")
    assert first.load_percent == 37
    assert (second.name, second.load_percent) == ("A, B", None)
    assert read_gpus("No devices were found\n") == ()
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "No GPU found." in client.get("/disk/device").text


def test_a_gpu_that_does_not_answer_keeps_no_page_waiting(studio, tmp_path, monkeypatch):
    client, _ = studio
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setattr(device.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(device, "_WAIT_SECONDS", 0.3)
    began = time.monotonic()
    assert "No GPU found." in client.get("/disk/device").text
    assert time.monotonic() - began < 5
