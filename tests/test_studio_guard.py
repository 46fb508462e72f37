"""The guard: who may ask, from where, and what a browser is told of every answer."""

import asyncio
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("starlette", reason="the studio needs the extra 'studio'")

from dreamloom.cli.main import main
from dreamloom.studio import context
from dreamloom.studio.guard import OPEN_PATHS, read_secret
from studio_case import (
    enter,
    fill_path,
    fill_words,
    list_routes,
    make_jpeg,
    make_run,
    method_of,
    open_studio,
)

SCRIPT = '"><script>alert(1)</script>'
ESCAPED = "&lt;script&gt;alert(1)"
TRAVERSALS = (
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "%2fetc%2fpasswd",
    "..%5c..%5cwin.ini",
    "x%00.png",
    "x" * 10_000,
)


@pytest.fixture
def root(tmp_path):
    make_run(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def studio(root, monkeypatch):
    with open_studio(root, monkeypatch) as (client, studio, _):
        yield client, studio


def test_without_the_cookie_every_route_is_closed(studio):
    client, own = studio
    routes = list_routes(own)
    assert len(routes) > 40
    for route in routes:
        path = fill_path(route)
        answer = client.request(method_of(route), path)
        if path.startswith(OPEN_PATHS):
            assert answer.status_code in {200, 403, 404}, path
        else:
            assert answer.status_code == 401, path
            assert "token" in answer.text
    run = own.runs()[0]
    for path in (f"/runs/{run.id}/sets/pictures/0", f"/runs/{run.id}/adapter", "/nothing"):
        assert client.get(path).status_code == 401
        assert client.head(path).status_code == 401


def test_a_wrong_token_is_refused_and_the_right_one_gives_a_strict_cookie(studio):
    client, own = studio
    for token in ("", "x", read_secret(own.own)[:-1], "%ff%00"):
        assert client.get(f"/?token={token}").status_code == 401
    secret = read_secret(own.own)
    assert client.post(f"/?token={secret}").status_code == 401
    answer = client.get("/disk", params={"token": secret})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/disk"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert "secure" not in cookie.lower()  # it is served without TLS
    assert secret not in cookie
    assert client.get("/disk").status_code == 200
    assert (own.own / "secret").stat().st_mode & 0o077 == 0


def test_the_token_never_leads_to_another_site(studio):
    client, own = studio
    secret = read_secret(own.own)
    answer = client.get(f"http://localhost:8787//evil.example/x?token={secret}")
    assert answer.headers.get("location") == "/evil.example/x"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.1.2.3", "[::", ""])
def test_a_foreign_host_is_refused(studio, host):
    client, own = studio
    enter(client, own)
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert "--allow-host" in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:8787", "[::1]:8787", "LOCALHOST", "127.0.0.2"])
def test_its_own_names_are_known(studio, host):
    client, _ = studio
    assert client.get("/", headers={"Host": host}).status_code == 401


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:9999", "http://[::", "http://localhost"],
)
def test_a_foreign_origin_is_refused_for_reading_and_for_writing(studio, origin):
    client, own = studio
    enter(client, own)
    for method, path in (("GET", "/"), ("POST", "/photos"), ("PUT", "/photos/x/files")):
        answer = client.request(method, path, headers={"Origin": origin})
        assert answer.status_code == 403
        assert "Another site" in answer.text
    assert not list(own.photo_sets)


def test_a_write_that_another_site_began_is_refused(studio):
    client, own = studio
    enter(client, own)
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 303)):
        headers = {"Sec-Fetch-Site": site}
        assert client.post("/photos", data={"title": "a"}, headers=headers).status_code == status
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
    own_origin = {"Origin": "http://localhost:8787"}
    assert client.post("/photos", data={"title": "b"}, headers=own_origin).status_code == 303


def test_every_answer_bears_the_headers(studio):
    client, own = studio
    for path in ("/", "/login", "/static/studio.css"):
        _check_headers(client.get(path))
    _check_headers(client.get("/", headers={"Host": "evil.example"}))
    enter(client, own)
    for route in list_routes(own):
        if not route.path.endswith("/events"):
            _check_headers(client.request(method_of(route), fill_path(route)))
    _check_headers(client.get("/nothing"))
    _check_headers(client.delete("/"))


def _check_headers(answer):
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy or "default-src 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers
    assert "unsafe" not in policy


def test_a_fault_of_ours_is_one_sentence_with_the_headers(studio, monkeypatch):
    client, own = studio
    enter(client, own)

    def fail(self):
        raise RuntimeError("inner words")

    monkeypatch.setattr(context.Studio, "runs", fail)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "inner words" not in answer.text
    _check_headers(answer)


def test_the_report_stands_in_a_box_of_its_own(studio):
    client, own = studio
    enter(client, own)
    answer = client.get(f"/runs/{own.runs()[0].id}/report")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox allow-scripts" in policy
    assert "allow-same-origin" not in policy


# Paths and words --------------------------------------------------------------------------------


def test_no_word_of_an_address_leads_out_of_it(studio, root):
    client, own = studio
    enter(client, own)
    (root.parent / "secret.txt").write_text("root:x:0:0")
    outside = str(root.parent / "secret.txt").replace("/", "%2f")
    words = [*TRAVERSALS, "..%2f..%2fsecret.txt", outside]
    for route in list_routes(own):
        if "{" not in route.path:
            continue
        for word in words:
            for number in ("0", "9" * 5000) if ":int" in route.path else ("0",):
                answer = client.request(method_of(route), fill_path(route, word, number))
                assert 300 <= answer.status_code < 500, (route.path, word[:40])
                assert "root:x" not in answer.text
                assert str(root) not in answer.text
                if 300 <= answer.status_code < 400:
                    assert answer.headers["location"].startswith("/jobs")


@pytest.mark.parametrize("name", ["../studio.py", "..%2fguard.py", "%2e%2e/app.py", "vendor", ""])
def test_only_what_comes_with_it_is_static(studio, name):
    client, _ = studio
    assert client.get(f"/static/{name}").status_code in {401, 404}


def test_a_script_is_text_wherever_it_is_shown(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    make_run(root, 'x"><script>alert(1)<', prompt=SCRIPT)
    with open_studio(root, monkeypatch) as (client, own, _):
        enter(client, own)
        photos = own.photo_sets.make(SCRIPT)
        name = photos.store(make_jpeg(), "../<script>alert(1)<script>.jpg")
        photos.write_caption(name, SCRIPT)
        subject = "rraj <script>alert(1)</script>"
        own.jobs.add("train", ["train", "--subject", subject], run=own.runs()[0].name)
        run = own.runs()[0]
        query = {"subject": SCRIPT, "base": SCRIPT, "photos": SCRIPT}
        shown = [
            client.get(path)
            for path in (
                "/",
                "/photos",
                f"/photos/{photos.id}",
                f"/photos/{photos.id}/check",
                f"/photos/{photos.id}/{name[:-4]}",
                f"/runs/{run.id}",
                f"/runs/{run.id}/looks",
                f"/runs/{run.id}/live",
                "/jobs",
                f"/jobs/{next(iter(own.jobs)).id}",
                "/measure",
                f"/measure?run={run.id}",
                "/measure/compare?first=<script>&second=<script>",
                "/disk",
            )
        ]
        shown += [client.get("/teach", params=query), client.post("/teach/check", data=query)]
        for answer in shown:
            assert answer.status_code == 200, answer.url
            assert "<script>alert" not in answer.text, answer.url
        assert sum(ESCAPED in answer.text for answer in shown) >= 10


BAD_FORMS = (
    b"title=%00",
    b"title=%ff%fe",
    b"\xff\xfe=\x00",
    b"no form",
    b"title=" + b"x" * 2**21,
    b"&".join(b"a%d=1" % n for n in range(2000)),
)


@pytest.mark.parametrize("body", BAD_FORMS, ids=range(len(BAD_FORMS)))
def test_a_form_that_cannot_be_read_is_refused_in_one_sentence(studio, body):
    client, own = studio
    enter(client, own)
    for path in ("/photos", "/teach", "/teach/check", "/disk/delete", "/disk/undo"):
        answer = client.post(path, content=body)
        assert answer.status_code == 400
        assert "codec" not in answer.text
        assert answer.text.endswith(".")
    assert not list(own.photo_sets)


def test_long_and_odd_words_in_forms_are_never_a_fault_of_ours(studio):
    client, own = studio
    enter(client, own)
    job = own.jobs.add("report", ["report", "me"], run="me")
    odd = ["x" * 10_000, "--help", "nan", "1e999", "-5", "²", "\u202e", "../..", "{subject}", "%s"]
    for route in list_routes(own):
        if method_of(route) != "POST" or route.path in {"/jobs/{job}/again", "/photos/example"}:
            continue
        path = route.path.replace("{job}", job.id).replace("{run}", own.runs()[0].id)
        for word in odd:
            names = ("title", "subject", "photos", "minutes", "by", "what", "prompts", "item")
            names += ("deleted", "set", "floor", "train.steps", "preset", "base", "prior")
            answer = client.post(fill_words(path), data=dict.fromkeys(names, word))
            assert answer.status_code < 500, (route.path, word[:20])


def test_odd_bodies_are_never_a_fault_of_ours(studio):
    client, own = studio
    enter(client, own)
    photos = own.photo_sets.make("a")
    name = photos.store(make_jpeg(), "a.jpg")
    place = f"/photos/{photos.id}/{name[:-4]}"
    bodies = (b"\x00", b"\xff\xfe", b"[" * 90_000, b"[1,2]", b"[0,0,1e999,5]", b'"abcd"', b"{}")
    for body in (*bodies, b"[NaN,0,9,9]", b"[0,0," + b"9" * 4000 + b",9]", b"5"):
        assert client.put(f"{place}/box", content=body).status_code == 422
        assert client.put(f"{place}/mask", content=body).status_code == 422
    assert client.put(f"{place}/caption", content=b"a\x00b").status_code == 422
    assert client.put(f"{place}/caption", content=b"x" * 5000).status_code == 422
    assert photos.caption(name) == ""
    for told in ("\\u0000", "%00", "%ff", "x" * 9000):
        headers = {"X-File-Name": told}
        answer = client.put(f"/photos/{photos.id}/files", content=make_jpeg(), headers=headers)
        assert answer.status_code == 201


def test_a_folder_whose_name_is_no_text_is_shown(root, studio):
    client, own = studio
    enter(client, own)
    make_run(root, "me\udcff")
    for path in ("/", "/disk", "/measure", "/jobs"):
        assert client.get(path).status_code == 200


def test_a_byte_of_the_stream_that_no_file_has_is_none(studio):
    client, own = studio
    enter(client, own)
    # The stream itself does not end; its beginning is read from a run that is not there.
    for start in ("9" * 400, "²", "-1", "x"):
        assert client.get(f"/runs/none/events?from={start}").status_code == 404


# Another address --------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.7.7", "::"])
def test_another_address_wants_a_password(tmp_path, address, monkeypatch):
    monkeypatch.delenv("DREAMLOOM_PASSWORD", raising=False)
    done = CliRunner().invoke(main, ["studio", "--listen", address, "--root", str(tmp_path / "r")])
    told = f"{done.output}{done.exception}"
    assert done.exit_code != 0
    assert "--password" in told
    assert not (tmp_path / "r").exists()


def test_the_password_lets_in_and_a_wrong_one_costs_time(root, monkeypatch):
    with open_studio(root, monkeypatch, password="loom") as (client, own, _):
        monkeypatch.setattr(context, "WRONG_PASSWORD_SECONDS", 0.2)
        token = read_secret(own.own)
        assert client.get("/", params={"token": token}).status_code == 401
        page = client.get("/", headers={"Accept": "text/html"})
        assert page.headers["location"] == "/login"
        began = time.monotonic()
        for wrong in ("", "loom ", "LOOM", "\x01"):
            answer = client.post("/login", data={"password": wrong})
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers
            assert "not the password" in answer.text
        assert time.monotonic() - began >= 0.8
        assert client.post("/login", content=b"password=%00").status_code == 400
        answer = client.post("/login", data={"password": "loom"})
        assert answer.status_code == 303
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert client.get("/").status_code == 200


def test_guesses_wait_for_each_other(root, monkeypatch):
    with open_studio(root, monkeypatch, password="loom") as (_, own, guard):
        monkeypatch.setattr(context, "WRONG_PASSWORD_SECONDS", 0.1)

        async def guess() -> list[object]:
            tries = [own.may_enter("no") for _ in range(12)]
            return await asyncio.gather(*tries, return_exceptions=True)

        began = time.monotonic()
        found = asyncio.run(guess())
        assert time.monotonic() - began >= 1.0
        assert found.count(False) == 10
        assert sum("Too many" in str(one) for one in found) == 2
        assert guard.is_right("loom")


def test_the_secret_stays_and_is_nobody_elses(tmp_path: Path):
    first = read_secret(tmp_path / "own")
    assert read_secret(tmp_path / "own") == first
    assert len(first) >= 40
    assert read_secret(tmp_path / "other") != first
