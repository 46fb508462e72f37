"""The form of a training: every setting has its control, and only what was set is passed on."""

import html
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra studio: dreamloom[studio]")

from starlette.testclient import TestClient

from dreamloom.core.config.loading import PRESETS, load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.toml_files import list_fields
from dreamloom.data.examples import examples_folder
from dreamloom.studio.app import make_app
from dreamloom.studio.context import Studio
from dreamloom.studio.forms import find_faults, list_controls, name_changes, read_given, type_value


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    root = tmp_path_factory.mktemp("studio") / "runs"
    made = Studio(root, root.parent)
    photos = made.photo_sets.make("me")
    photos.store((examples_folder() / "rraj" / "IMG_0001.jpg").read_bytes(), "IMG_0001.jpg")
    return made


@pytest.fixture(scope="module")
def client(studio: Studio) -> TestClient:
    return TestClient(make_app(studio), follow_redirects=False)


def fields_of(page: str) -> dict[str, str]:
    """What a browser would send of the form, as it was made."""
    found = dict(re.findall(r'<input[^>]* name="([^"]+)"[^>]* value="([^"]*)"', page))
    for name, inner in re.findall(r'<select[^>]* name="([^"]+)"[^>]*>(.*?)</select>', page, re.S):
        chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', inner)
        found[name] = (chosen[1] or chosen[2]) if chosen else ""
    return {name: html.unescape(value) for name, value in found.items()}


def command_of(page: str) -> list[str]:
    return shlex.split(html.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)[-1]))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_setting_has_one_control_with_the_value_that_holds(preset: str):
    controls = [c for room in list_controls(preset, {}).values() for c in room]
    names = [c.name for c in controls]
    assert sorted(names) == sorted(name for name in list_fields(LoomConfig) if "." in name)
    # What the controls say, typed back, is the preset itself.
    typed = {c.name: c.value for c in controls}
    assert name_changes(preset, typed) == []
    assert load_config(preset, sets=[f"{n}={v}" for n, v in typed.items()]).model_dump() == (
        load_config(preset).model_dump()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_form_as_it_was_made_sets_nothing(client: TestClient, preset: str):
    sent = fields_of(client.get("/teach", params={"preset": preset}).text)
    assert sent["preset"] == preset
    assert read_given(sent, sent["shown"]) == {}


def test_what_was_set_stays_set_when_the_preset_changes(client: TestClient):
    sent = fields_of(client.get("/teach", params={"preset": "quick"}).text)
    sent |= {"train.rank": "5", "preset": "thorough"}
    again = fields_of(client.get("/teach", params=sent).text)
    assert again["train.rank"] == "5"
    assert again["train.steps"] == type_value(load_config("thorough").train.steps)
    assert read_given(again, again["shown"]) == {"train.rank": "5"}


def test_the_command_is_what_the_form_says(client: TestClient, studio: Studio):
    sent = fields_of(client.get("/teach", params={"preset": "quick"}).text)
    sent |= {"subject": "rraj person", "train.rank": "6", "base": "nobody/has-this"}
    words = command_of(client.post("/teach/check", data=sent).text)
    assert words[:2] == ["dreamloom", "train"]
    assert (studio.place / words[2]).resolve() == next(iter(studio.photo_sets)).folder
    assert words[words.index("--subject") + 1] == "rraj person"
    assert [words[at + 1] for at, word in enumerate(words) if word == "--set"] == ["train.rank=6"]
    # Ticked, looks on the way are set as often as the training is long.
    sent["looks"] = "on"
    assert "validation.every=24" in command_of(client.post("/teach/check", data=sent).text)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("subject", "", "subject.phrase"),
        ("subject", "rraj", "One word needs"),
        ("preset", "huge", "quick, standard and thorough"),
        ("prior", "some", "generated, base or none"),
        ("train.rank", "many", "valid integer"),
        ("train.learning_rate", "-1", "greater than"),
        ("photos", "photos-999", "Choose or make a set"),
    ],
)
def test_what_is_not_allowed_is_said_beside_its_field_and_not_begun(
    client: TestClient, studio: Studio, name: str, value: str, said: str
):
    sent = fields_of(client.get("/teach", params={"preset": "quick"}).text) | {name: value}
    checked = client.post("/teach/check", data=sent)
    assert said in html.unescape(checked.text)
    answer = client.post("/teach", data=sent)
    assert answer.status_code == 422
    beside = "class_noun" if said == "One word needs" else name
    place = re.search(rf'data-fault="{re.escape(beside)}">(.*?)</p>', answer.text, re.S)
    if name not in {"preset", "prior"}:
        assert place
        assert said in html.unescape(place[1])
    assert list(studio.jobs) == []


def test_faults_are_found_one_by_one_and_together():
    faults = find_faults("quick", {"train.rank": "x", "train.steps": "y", "priors.count": "4"})
    assert set(faults) == {"train.rank", "train.steps"}
    both = {"train.train_text_encoders": "true", "memory.base_quantization": "nf4"}
    assert all(sentence for sentence in find_faults("quick", both).values())


def test_a_run_is_named_by_its_subject_and_never_takes_a_folder_that_is_there(studio: Studio):
    assert studio.new_run_folder("Rraj  Person!") == "rraj-person"
    Path(studio.root / "rraj-person").mkdir()
    assert studio.new_run_folder("rraj person") == "rraj-person-2"
    assert studio.new_run_folder("../../etc") == "etc"
    assert studio.new_run_folder("…") == "run"


def test_a_training_is_planned_for_what_is_here(client: TestClient, studio: Studio):
    (photos,) = list(studio.photo_sets)
    asked = {"photos": photos.id, "preset": "quick", "prior": "none", "sent": "1"}
    here = client.post("/teach/plan", data=asked | {"device": "cpu"}).text
    assert re.search(r"Memory: [\d.]+ GiB that this \w+ has free", here), here
    assert "Fits:" in here
    gpu = client.post("/teach/plan", data=asked | {"gpu_memory": "16GiB"}).text
    assert "Memory: 16 GiB" in gpu
