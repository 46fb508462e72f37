"""The studio shows the faces that were found, and the crops beside them."""

import json

import pytest
from PIL import Image
from starlette.testclient import TestClient

from dreamloom.studio.app import make_app
from dreamloom.studio.context import Studio
from dreamloom.studio.photo_faces import PhotoFaces, _read_faces

PHOTO = "/photos/photos-001/photo-001"


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A studio with one set of two photos; what the command would answer is given."""
    made = Studio(tmp_path / "runs", tmp_path)
    photos = made.photo_sets.make("mine")
    for colour in ("white", "gray"):
        file = tmp_path / f"{colour}.png"
        Image.new("RGB", (400, 300), colour).save(file)
        photos.store(file.read_bytes(), file.name)
    asked = []

    async def ask(self, argv, because=""):
        asked.append((argv, because))
        return asked_answer, ""

    asked_answer = {
        "faces_unknown": "",
        "photos": [
            {"file": "photo-001.png", "original_px": [300, 400], "faces": [[100, 50, 200, 150]]},
            {"file": "photo-002.png", "original_px": [300, 400], "faces": []},
        ],
    }
    monkeypatch.setattr(Studio, "ask", ask)
    made.asked, made.answer = asked, asked_answer
    return made


@pytest.fixture
def client(studio):
    return TestClient(make_app(studio))


def test_the_first_look_asks_for_no_faces_and_the_second_shows_them(client, studio):
    studio.photo_sets.find("photos-001").write_box("photo-001.png", (10, 20, 110, 220))
    first = client.get("/photos/photos-001/check").text
    assert studio.asked == []
    assert "check?base=sdxl&amp;faces=1" in first
    assert '<rect class="crop" x="10" y="20" width="100" height="200"/>' in first
    second = client.get("/photos/photos-001/check?faces=1").text
    assert '<rect class="face" x="100" y="50" width="100" height="100"/>' in second
    assert "shows no face that could be found" in second
    assert "faces=1" not in second
    assert "style=" not in first + second


def test_the_editor_offers_a_crop_around_the_face(client, studio):
    page = client.get(PHOTO).text
    assert f'hx-get="{PHOTO}/face"' in page
    assert studio.asked == []
    part = client.get(f"{PHOTO}/face").text
    assert 'data-face="100 50 200 150"' in part
    assert "Crop around the face" in part
    other = client.get("/photos/photos-001/photo-002/face").text
    assert "data-face" not in other
    assert "This photo shows no face" in other
    saved = client.put(f"{PHOTO}/box", content=json.dumps([55, 5, 245, 195]))
    assert saved.status_code == 204
    assert studio.photo_sets.find("photos-001").boxes() == {"photo-001.png": (55, 5, 245, 195)}


def test_why_faces_were_not_looked_for_is_said(client, studio):
    studio.answer["faces_unknown"] = "yunet is not on this machine"
    sentence = "Faces were not looked for: yunet is not on this machine."
    assert sentence in client.get("/photos/photos-001/check?faces=1").text
    assert sentence in client.get(f"{PHOTO}/face").text


def test_an_answer_is_kept_until_a_photo_changes(client, studio, tmp_path):
    client.get(f"{PHOTO}/face")
    client.get(f"{PHOTO}/face")
    studio.photo_sets.find("photos-001").store((tmp_path / "gray.png").read_bytes(), "third.png")
    client.get(f"{PHOTO}/face")
    first, second, third = (because for _, because in studio.asked)
    assert first == second != third


def test_drawings_are_looked_at_as_drawings(client, studio):
    photos = studio.photo_sets.find("photos-001")
    assert photos.base == "sdxl"
    photos.note_drawn()
    assert (photos.base, photos.title) == ("picturebook", "mine")
    assert "no face seen from the front" in client.get("/photos/photos-001/photo-002/face").text
    client.get(f"{PHOTO}/face?base=sdxl")
    bases = [argv[argv.index("--base") + 1] for argv, _ in studio.asked]
    assert bases == ["picturebook", "sdxl"]


def test_what_is_said_of_faces_is_what_the_check_says():
    row = {"original_px": [2000, 3000], "faces": [[1000, 500, 1200, 700]]}
    told = _read_faces(row, "photographs", 1024)
    assert isinstance(told, PhotoFaces)
    assert "small: 102 px wide" in told.issues[0]
