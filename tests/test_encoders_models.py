"""Models are pinned, compared by hash, put in place whole or not at all, and never replaced."""

import hashlib
import json
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from dreamloom.cli.main import main
from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders import cache as the_cache
from dreamloom.evaluation.encoders import catalogue as the_catalogue
from dreamloom.evaluation.encoders import loading as the_loading
from dreamloom.evaluation.encoders.base import FaceExtractor, TextExtractor
from dreamloom.evaluation.encoders.catalogue import MODELS, READABLE, ModelFile, find_model
from dreamloom.evaluation.encoders.fetching import fetch_model
from dreamloom.evaluation.encoders.loading import load_encoders
from dreamloom.evaluation.encoders.store import (
    LOCK,
    Kept,
    Missing,
    find_kept,
    list_models,
    model_folder,
    models_folder,
)
from test_architecture import loaded_after
from test_encoders_faces import make_sface, make_yunet
from test_encoders_networks import LPIPS_SHAPES, random_weights

BY_NAME = {model.name: model for model in MODELS}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty place for models."""
    monkeypatch.setenv("DREAMLOOM_MODELS", str(tmp_path / "models"))
    the_cache._ROWS.clear()
    the_cache._READINGS.clear()
    return tmp_path / "models"


@pytest.fixture
def lpips_file(tmp_path):
    path = tmp_path / "converted.safetensors"
    save_file(random_weights(LPIPS_SHAPES), path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pin(monkeypatch):
    """Let the catalogue name stand-in files in the place of a model's."""

    def pin_to(name, *paths, **changes):
        files = tuple(ModelFile(path.name, sha256(path), path.stat().st_size) for path in paths)
        stand_in = replace(BY_NAME[name], **({"files": files} | changes))
        others = tuple(stand_in if one.name == name else one for one in the_catalogue.MODELS)
        monkeypatch.setattr(the_catalogue, "MODELS", others)
        monkeypatch.setattr("dreamloom.evaluation.encoders.store.MODELS", others)
        for constant, model in vars(the_loading).items():
            if model is BY_NAME[name]:
                monkeypatch.setattr(the_loading, constant, stand_in)
        return stand_in

    return pin_to


# The list


def test_each_pin_is_whole():
    assert len(BY_NAME) == len(MODELS)
    for model in MODELS:
        assert model.purpose
        assert model.licence
        if model.source == "hub" and model.revision:
            assert len(model.revision) == 40
            int(model.revision, 16)
        # Without a revision only the hashes taken at the first fetch say which bytes it was.
        assert model.source != "hub" or model.files
        for file in model.files:
            assert file.sha256 is None or len(file.sha256) == 64
            assert model.source == "package" or file.name.endswith(READABLE)
        if model.source == "none":
            assert model.note


def test_no_pickle_is_on_the_list():
    pickles = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    assert not any(file.name.endswith(pickles) for model in MODELS for file in model.files)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clipp", "There is no model named 'clipp'"),
        ("insightface", "insightface is not offered: the licence"),
        ("dreamsim", "dreamsim is not offered: its authors publish only pickles"),
        ("picturebook", "picturebook is embedded"),
        (
            "dlib",
            r"dlib comes with a Python package: install it with 'pip install",
        ),
    ],
)
def test_what_cannot_be_fetched_is_told_with_what_can(name, problem):
    with pytest.raises(EvaluationError, match=problem) as caught:
        find_model(name)
    assert caught.value.hint.endswith(": clip, dino, dinov2, yunet, sface, sscd, lpips, csd.")
    assert ("Did you mean clip?" in caught.value.hint) == (name == "clipp")


def test_the_place_can_be_chosen(monkeypatch, tmp_path):
    assert models_folder() == tmp_path / "models"
    monkeypatch.delenv("DREAMLOOM_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "dreamloom" / "models"


# From a folder


def test_a_converted_file_is_taken_in_and_its_hash_is_kept(lpips_file):
    folder = fetch_model("lpips", lpips_file)
    assert folder == model_folder(BY_NAME["lpips"])
    lock = json.loads((folder / LOCK).read_text())
    assert lock["files"]["model.safetensors"]["sha256"] == sha256(lpips_file)
    kept = find_kept(BY_NAME["lpips"])
    assert kept == Kept(folder, f"{BY_NAME['lpips'].repository}@{sha256(lpips_file)[:12]}")
    perceptual = load_encoders("standard").perceptual
    assert perceptual.key.startswith(kept.name)
    assert perceptual.distances([Image.new("RGB", (64, 64))] * 2).sum() == 0


def test_a_fetched_folder_can_be_carried_to_another_machine(lpips_file, monkeypatch, tmp_path):
    carried = fetch_model("lpips", lpips_file)
    monkeypatch.setenv("DREAMLOOM_MODELS", str(tmp_path / "elsewhere"))
    fetch_model("lpips", carried)
    assert isinstance(find_kept(BY_NAME["lpips"]), Kept)


def test_one_changed_byte_is_found_at_the_next_load(lpips_file):
    folder = fetch_model("lpips", lpips_file)
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    found = find_kept(BY_NAME["lpips"])
    assert isinstance(found, Missing)
    assert "has changed since it was fetched (model.safetensors)" in found.reason
    assert isinstance(load_encoders("standard").perceptual, Missing)


def test_files_that_are_not_the_pinned_ones_are_refused_and_nothing_stays(tmp_path, pin, place):
    detector = make_yunet(tmp_path / "yunet.onnx")
    pin("yunet", detector)
    detector.write_bytes(detector.read_bytes()[:-1] + b"!")
    with pytest.raises(EvaluationError, match=r"yunet\.onnx of yunet has the SHA-256 .* not "):
        fetch_model("yunet", tmp_path)
    detector.write_bytes(b"short")
    with pytest.raises(EvaluationError, match="has 5 bytes, not "):
        fetch_model("yunet", tmp_path)
    assert list(place.iterdir()) == []


def test_a_failed_fetch_leaves_the_older_model(lpips_file, tmp_path):
    fetch_model("lpips", lpips_file)
    before = find_kept(BY_NAME["lpips"])
    broken = tmp_path / "broken.safetensors"
    weights = random_weights(LPIPS_SHAPES)
    del weights["lin0.model.1.weight"]
    save_file(weights, broken)
    with pytest.raises(EvaluationError, match=r"lacks 1 of the model's weights: lin0"):
        fetch_model("lpips", broken)
    assert find_kept(BY_NAME["lpips"]) == before


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"alex{suffix}"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(EvaluationError, match="a pickle could run code") as caught:
        fetch_model("lpips", path)
    assert "safetensors" in caught.value.hint


def test_a_folder_without_the_files_is_told_what_it_lacks(tmp_path):
    with pytest.raises(EvaluationError) as caught:
        fetch_model("clip", tmp_path)
    assert caught.value.problem.endswith("does not hold model.safetensors, which clip needs.")
    files = "model.safetensors, config.json, tokenizer.json"
    assert caught.value.hint == f"Name a folder that holds {files}."


def test_what_has_only_a_pickle_is_not_fetched_from_the_hub():
    with pytest.raises(EvaluationError, match="publish only a pickle, which could run code"):
        fetch_model("sscd")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"model.safetensors": 3}}', "\x00"])
def test_a_damaged_lock_counts_as_no_model(lpips_file, text):
    folder = fetch_model("lpips", lpips_file)
    (folder / LOCK).write_text(text)
    assert isinstance(find_kept(BY_NAME["lpips"]), Missing)
    assert {line.model.name: line.state for line in list_models()}["lpips"] == "not here"


# From the hub, for which a server on this machine stands


class Hub(BaseHTTPRequestHandler):
    """Gives files the way the hub does: the commit, the hash and the length in the headers."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "c" * 40
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        type(self).asked.append(self.path)
        body = self.files.get(self.path.rpartition("/")[2])
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_pinned_revision_is_fetched(hub, tmp_path, pin, place):
    detector = make_yunet(tmp_path / "yunet.onnx")
    model = pin("yunet", detector, revision="c" * 40)
    Hub.files = {"yunet.onnx": detector.read_bytes()}
    folder = fetch_model("yunet", endpoint=hub)
    assert all(f"/opencv/face_detection_yunet/resolve/{'c' * 40}/" in path for path in Hub.asked)
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "yunet.onnx"]
    assert find_kept(model) == Kept(folder, f"opencv/face_detection_yunet@{'c' * 12}")


def test_without_a_known_revision_the_commit_is_written_down(hub, lpips_file, pin):
    unpinned = pin("lpips", source="hub", repository="somebody/lpips", files=BY_NAME["lpips"].files)
    Hub.files = {"model.safetensors": lpips_file.read_bytes()}
    folder = fetch_model("lpips", endpoint=hub)
    assert json.loads((folder / LOCK).read_text())["revision"] == Hub.commit
    assert isinstance(find_kept(unpinned), Kept)


def test_other_bytes_under_the_pinned_name_are_refused(hub, tmp_path, pin, place):
    detector = make_yunet(tmp_path / "yunet.onnx")
    pin("yunet", detector)
    Hub.files = {"yunet.onnx": detector.read_bytes() + b"more"}
    with pytest.raises(EvaluationError, match="It is not the file that DreamLoom is pinned to"):
        fetch_model("yunet", endpoint=hub)
    assert list(place.iterdir()) == []


def test_a_file_that_the_hub_does_not_have_is_named(hub, tmp_path, pin):
    pin("yunet", make_yunet(tmp_path / "yunet.onnx"))
    with pytest.raises(EvaluationError, match=r"The hub does not give yunet\.onnx of opencv/"):
        fetch_model("yunet", endpoint=hub)


def test_without_network_there_is_one_clear_sentence(place):
    with pytest.raises(EvaluationError) as caught:
        fetch_model("clip")
    assert caught.value.problem == "clip was not fetched: the hub cannot be reached from here."
    assert "--from FOLDER" in caught.value.hint
    assert list(place.iterdir()) == []


# Loading


def test_standard_encoders_that_are_not_here_say_how_to_fetch_them():
    found = load_encoders("standard")
    for name in ("clip", "dino", "dinov2"):
        assert f"'dreamloom models fetch {name}'" in found.named()[name].reason
    assert "'dreamloom models fetch yunet'" in found.identity.reason
    assert "'dreamloom models fetch sface'" in found.identity.reason
    for encoder, name in (
        (found.copies, "sscd"),
        (found.style, "csd"),
        (found.perceptual, "lpips"),
    ):
        assert f"'dreamloom models fetch {name} --from FILE'" in encoder.reason
    assert all(key.startswith("missing: ") for key in found.keys().values())
    assert set(found.keys()) == {*found.named(), "perceptual"}


def test_the_second_face_model_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    monkeypatch.setattr("dreamloom.evaluation.encoders.store.find_spec", lambda name: None)
    reason = load_encoders("standard", faces="dlib").identity.reason
    assert reason == "dlib is not installed; install it with 'pip install \"dreamloom[dlib]\"'"


@pytest.fixture
def fetched_faces(tmp_path, pin):
    for name, make in (("yunet", make_yunet), ("sface", make_sface)):
        path = make(tmp_path / f"{name}.onnx")
        pin(name, path)
        fetch_model(name, path)


def test_fetched_face_models_become_the_identity_encoder(fetched_faces):
    found = load_encoders("standard").identity
    assert isinstance(found, FaceExtractor)
    assert found.key == (
        f"opencv/face_recognition_sface@{BY_NAME['sface'].revision[:12]}"
        f"+opencv/face_detection_yunet@{BY_NAME['yunet'].revision[:12]}/aligned-112"
    )
    assert found.embed([Image.new("RGB", (200, 200))]).isnan().all()
    assert {line.model.name: line.state for line in list_models()}["sface"] == "here"


def test_face_models_without_opencv_are_missing(fetched_faces, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "dreamloom[faces]" in load_encoders("standard").identity.reason


def test_clip_needs_its_three_files_only(pin, tmp_path):
    from test_encoders import make_clip

    folder = make_clip(tmp_path / "clip")
    files = [folder / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    pin("clip", *files)
    fetch_model("clip", folder)
    clip = load_encoders("standard").clip
    assert isinstance(clip, TextExtractor)
    from dreamloom.evaluation.encoders.clip import ClipEncoder
    from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING

    whole = ClipEncoder(folder, "whole", CLIP_PREPROCESSING)
    texts = ["a dog in the snow", "a photo of a person"]
    assert torch.equal(clip.embed_texts(texts), whole.embed_texts(texts))


# The command line


def run(*words):
    return CliRunner().invoke(main, ["models", *words], catch_exceptions=False)


def test_the_list_tells_licence_size_and_state(lpips_file):
    fetch_model("lpips", lpips_file)
    shown = run("list").output
    assert "clip  not here  MIT; 579 MiB; hashes known" in shown
    assert "lpips  here  BSD-2-Clause; hashes taken when fetched" in shown
    assert "picturebook  embedded" in shown
    assert "insightface  not offered" in shown
    lines = {line["name"]: line for line in json.loads(run("list", "--json").output)}
    assert set(lines) == set(BY_NAME)
    assert lines["clip"]["why"] == "fetch it with 'dreamloom models fetch clip'"
    assert lines["lpips"]["state"] == "here"
    assert lines["dino"]["hashes"] == "taken when fetched"


def test_a_wrong_name_stops_before_anything_is_fetched(lpips_file, place):
    done = run("fetch", "lpips", "clipp", "--from", str(lpips_file))
    assert done.exit_code == 1
    assert "There is no model named 'clipp'" in done.output
    assert not place.exists()


def test_a_model_is_carried_in(lpips_file, place):
    done = run("fetch", "lpips", "--from", str(lpips_file))
    assert done.exit_code == 0
    assert f"lpips: {place / 'lpips'}" in done.output


COMMAND = """
import sys
from dreamloom.cli.main import main
sys.argv = ["dreamloom", "models", {word!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("word", ["--help", "list"])
def test_help_and_list_load_nothing_heavy(word):
    assert loaded_after(COMMAND.format(word=word)) == set()
