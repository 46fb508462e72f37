"""A studio to be asked in tests: its app behind the guard, without a server and without jobs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from dreamloom.studio import context
from dreamloom.studio.app import make_app
from dreamloom.studio.context import Studio
from dreamloom.studio.guard import Guard, read_secret
from dreamloom.studio.serve import make_guarded

HOME = "http://localhost:8787"


@contextmanager
def open_studio(
    root: Path, patch: pytest.MonkeyPatch, password: str = ""
) -> Iterator[tuple[TestClient, Studio, Guard]]:
    """Open a studio over a root; no cookie is given yet, and no command is started."""
    patch.setattr(context, "start_runner", lambda studio, place: None)
    patch.setattr(context, "WRONG_PASSWORD_SECONDS", 0.0)
    patch.setattr(Studio, "ask", _answer_nothing)
    patch.chdir(root.parent)
    guard, studio = make_guarded(root, "127.0.0.1", 8787, password)
    with TestClient(
        guard, base_url=HOME, raise_server_exceptions=False, follow_redirects=False
    ) as client:
        yield client, studio, guard


async def _answer_nothing(studio: Studio, argv: Sequence[str], because: str = "") -> Any:
    """Stand in for commands that would be started to answer."""
    return None, "asked for nothing"


def enter(client: TestClient, studio: Studio) -> TestClient:
    """Take the cookie that the printed address gives."""
    answer = client.get("/", params={"token": read_secret(studio.own)})
    assert answer.status_code == 303
    return client


def list_routes(studio: Studio) -> list[Route]:
    """List all routes of the app."""
    return [route for route in make_app(studio).routes if isinstance(route, Route)]


def fill_path(route: Route, value: str = "x", number: str = "0") -> str:
    """Write an address of a route, with one value for all its words."""
    return fill_words(re.sub(r"\{\w+:int\}", number, route.path), value)


def fill_words(path: str, value: str = "x") -> str:
    """Put a value in the place of each word of a route's path."""
    return re.sub(r"\{[\w:]+\}", value, path)


def method_of(route: Route) -> str:
    """Name the method that a route is asked by."""
    return next(iter(sorted((route.methods or set()) - {"HEAD"})))


def make_jpeg(size: tuple[int, int] = (96, 72), **more: Any) -> bytes:
    """Make a photo's bytes."""
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 90, 40)).save(stream, "JPEG", **more)
    return stream.getvalue()


def make_run(root: Path, name: str = "me", prompt: str = "a photo of rraj person") -> Path:
    """Make what a page shows of a run: settings, a picture with its prompt, a checkpoint."""
    folder = root / name
    (folder / "records").mkdir(parents=True)
    (folder / "loom.toml").write_text('[subject]\nphrase = "rraj person"\n')
    (folder / "checkpoints" / "000010").mkdir(parents=True)
    (folder / "checkpoints" / "000010" / "state.safetensors").write_bytes(b"x" * 5000)
    (folder / "adapter.safetensors").write_bytes(b"x" * 3000)
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    pictures = folder / "images" / "pictures"
    pictures.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(pictures / "0000.png")
    base = {"name": "picturebook", "family": "sdxl", "fingerprint": "0" * 64, "revision": ""}
    drawn = {"file": "0000.png", "prompt": prompt, "seed": 1, "scheduler": "ddim", "steps": 2}
    images = {
        "base": base,
        "adapters": [],
        "subject": "rraj person",
        "class_noun": "person",
        "resolution_px": 16,
        "pictures": [{**drawn, "guidance": 1.0}],
    }
    (pictures / "manifest.json").write_text(json.dumps(images))
    return folder
