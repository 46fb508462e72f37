"""Photos that are dropped: what is refused, and that nothing of where they were taken is stored."""

import asyncio
import io
import json
import time
import tracemalloc
import zlib

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the studio needs the extra 'studio'")

from starlette.requests import Request

from dreamloom.studio import photo_sets
from dreamloom.studio.context import read_body
from dreamloom.studio.photo_sets import MOST_PHOTOS, PhotoSets
from studio_case import enter, make_jpeg, open_studio

MIB = 2**20


@pytest.fixture
def asked(tmp_path, monkeypatch):
    with open_studio(tmp_path / "runs", monkeypatch) as (client, studio, _):
        enter(client, studio)
        yield client, studio.photo_sets.make("me")


def put(client, photos, body, name="a.jpg"):
    headers = {"X-File-Name": name}
    return client.put(f"/photos/{photos.id}/files", content=body, headers=headers)


def make_huge_png(side: int) -> bytes:
    """Make a black and white PNG of any size in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        summed = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + summed.to_bytes(4, "big")

    packer, rows = zlib.compressobj(1), b""
    row = bytes(1 + -(-side // 8))
    for _ in range(side):
        rows += packer.compress(row)
    rows += packer.flush()
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def make_located_jpeg(orientation: int = 6) -> bytes:
    """Make a photo that lies on its side and says where it was taken."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "A camera of mine"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 14.5), 3: "E", 4: (11.0, 34.0, 31.0)})
    image = Image.new("RGB", (96, 48), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 48, 48))
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, quality=95, comment=b"at home")
    return stream.getvalue()


def test_a_photo_is_stored_upright_and_without_where_it_was_taken(asked, tmp_path):
    client, photos = asked
    given = make_located_jpeg()
    assert b"A camera of mine" in given
    assert 0x8825 in Image.open(io.BytesIO(given)).getexif()
    answer = put(client, photos, given, "IMG%201.jpg")
    assert answer.status_code == 201
    name = answer.json()["name"]
    with Image.open(photos.folder / name) as stored:
        assert stored.size == (48, 96)
        assert stored.getpixel((24, 5))[2] > 200  # the blue left side is the top now
        assert not dict(stored.getexif())
        assert not {"exif", "comment", "xmp", "gps"} & {key.lower() for key in stored.info}
    assert photos.told_name(name) == "IMG 1.jpg"
    everything = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    for file in everything:
        assert b"A camera of mine" not in file.read_bytes()
        assert b"at home" not in file.read_bytes()
    for address in ("thumb", "whole"):
        shown = client.get(f"/photos/{photos.id}/{name[:-4]}/{address}")
        assert not dict(Image.open(io.BytesIO(shown.content)).getexif())


def test_heic_is_read_too(asked):
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs the extra 'heic'")
    stream = io.BytesIO()
    image = Image.new("RGB", (96, 64), (10, 200, 30))
    heif.from_pillow(image).save(stream, quality=90)
    client, photos = asked
    answer = put(client, photos, stream.getvalue(), "IMG_1.HEIC")
    assert answer.status_code == 201
    assert photos.size(answer.json()["name"]) == (96, 64)


def test_a_file_of_60_mb_is_refused(asked):
    client, photos = asked
    answer = put(client, photos, b"\xff\xd8" + bytes(60 * MIB))
    assert answer.status_code == 413
    assert "50 MB" in answer.text
    assert photos.names() == []


@pytest.mark.parametrize("tells_its_length", [True, False])
def test_a_body_that_is_too_large_is_listened_to_and_not_kept(tells_its_length):
    sent = 0

    async def receive():
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": bytes(MIB), "more_body": sent < 200}

    told = [(b"content-length", b"209715200")] if tells_its_length else []
    request = Request({"type": "http", "method": "PUT", "headers": told}, receive)
    tracemalloc.start()
    assert asyncio.run(read_body(request, 10 * MIB)) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent == 200  # else the browser would meet a closed door instead of the sentence
    assert peak < 14 * MIB


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"just words", "words.jpg"),
        (b"", "empty.jpg"),
        (make_jpeg()[:300], "cut.jpg"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "a.svg"),
        (b"%PDF-1.4", "a.pdf"),
        (b"GIF89a" + b"\xff" * 10, "a.gif"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_picture_is_refused_by_the_name_that_it_was_given(asked, tmp_path, body, name):
    client, photos = asked
    answer = put(client, photos, body, name)
    assert answer.status_code == 422
    assert name in answer.text
    assert str(tmp_path) not in answer.text
    assert ".studio" not in answer.text
    assert photos.names() == []
    assert not list(photos.folder.parent.rglob("upload-*"))


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("../../x.png", "x.png"),
        ("..%2F..%2Fx.png", "x.png"),
        ("C:%5CUsers%5Cme%5Cx.png", "x.png"),
        ("/etc/passwd", "passwd"),
        ("%00%1b%5B31mx.png", "[31mx.png"),
        ("%E2%80%AEgnp.x", "gnp.x"),
        ("", "a photo"),
        ("x" * 10_000, "x" * 120),
    ],
)
def test_a_name_with_a_path_names_nothing_here(asked, tmp_path, told, shown):
    client, photos = asked
    before = {file for file in tmp_path.rglob("*") if ".studio" not in file.parts}
    answer = put(client, photos, make_jpeg(), told)
    assert answer.json() == {"name": "photo-001.png"}
    assert photos.told_name("photo-001.png") == shown
    assert {file for file in tmp_path.rglob("*") if ".studio" not in file.parts} == before


def test_a_picture_of_20000_pixels_is_refused_by_its_header(asked):
    client, photos = asked
    bomb = make_huge_png(20_000)
    assert len(bomb) < MIB
    tracemalloc.start()
    began = time.monotonic()
    answer = put(client, photos, bomb, "huge.png")
    seconds = time.monotonic() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code == 422
    assert "20000" in answer.text
    assert "huge.png" in answer.text
    assert seconds < 2
    assert peak < 20 * MIB
    assert photos.names() == []


def test_a_set_takes_so_many_photos_and_says_so(asked, monkeypatch):
    client, photos = asked
    monkeypatch.setattr(photo_sets, "MOST_PHOTOS", 3)
    answers = [put(client, photos, make_jpeg()) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [201, 201, 201, 422, 422]
    assert "at most 3 photos" in answers[-1].text
    assert len(photos.names()) == 3
    assert MOST_PHOTOS <= 200


@pytest.mark.slow  # stores 200 photos
def test_of_300_files_a_set_takes_200(asked):
    client, photos = asked
    codes = [put(client, photos, make_jpeg()).status_code for _ in range(300)]
    assert (codes.count(201), codes.count(422)) == (200, 100)


def test_photos_that_come_at_once_get_names_of_their_own(asked):
    from concurrent.futures import ThreadPoolExecutor

    _, photos = asked
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda n: photos.store(make_jpeg(), f"{n}.jpg"), range(16)))
    assert len(set(names)) == 16
    assert photos.names() == sorted(names)
    assert {photos.told_name(name) for name in names} == {f"{n}.jpg" for n in range(16)}


def test_a_set_goes_with_everything_beside_it(asked, tmp_path):
    client, photos = asked
    name = put(client, photos, make_jpeg()).json()["name"]
    stem = f"/photos/{photos.id}/{name[:-4]}"
    assert client.put(f"{stem}/box", content=b"[0,0,50,50]").status_code == 204
    assert client.put(f"{stem}/caption", content="rraj auf dem Öl".encode()).status_code == 204
    mask = io.BytesIO()
    Image.new("L", (96, 72), 255).save(mask, "PNG")
    assert client.put(f"{stem}/mask", content=mask.getvalue()).status_code == 204
    assert client.get(f"{stem}/mask").status_code == 200
    row = json.loads((photos.folder / "metadata.jsonl").read_text())
    assert row == {"file_name": name, "box": [0.0, 0.0, 50.0, 50.0]}
    assert client.delete(stem).status_code == 204
    assert not [file for file in photos.folder.iterdir()]
    assert client.post(f"/photos/{photos.id}/delete").status_code == 303
    assert not list(PhotoSets(photos.folder.parent))
    assert not list(photos.folder.parent.iterdir())


def test_every_page_of_a_set_can_be_shown(asked):
    client, photos = asked
    assert client.get(f"/photos/{photos.id}").status_code == 200
    name = put(client, photos, make_jpeg()).json()["name"]
    for path in ("", "/check", "/check?base=picturebook", f"/{name[:-4]}", f"/{name[:-4]}/thumb"):
        assert client.get(f"/photos/{photos.id}{path}").status_code == 200


def test_a_folder_of_another_name_among_the_sets_does_no_harm(asked):
    client, photos = asked
    (photos.folder.parent / "photos-of-mine").mkdir()
    assert client.post("/photos", data={"title": "next"}).status_code == 303
    assert client.get("/photos").status_code == 200
