"""Screenshots of every page of the studio: ``python -m tools.studio_screenshots --demo runs/demo``.

The demo's runs, the example photos and a short queue are put into a studio of their own, and each
page is looked at by a headless Chromium at the width of a laptop and of a phone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dreamloom.data.examples import examples_folder
from dreamloom.studio.context import Studio
from dreamloom.studio.runs import list_runs

WIDTHS_PX = (1280, 390)
_HEIGHT_PX = 900
_TALLEST_PX = 1700
_SETTLE_MS = 9000


def fill_root(root: Path, demo: Path) -> Studio:
    """Put the demo's runs and the example photos into a studio."""
    shutil.copytree(demo, root / demo.name, ignore=shutil.ignore_patterns("checkpoints", "latents"))
    studio = Studio(root, root.parent)
    photos = studio.photo_sets.make("My photos")
    photos.note_drawn()
    for file in sorted((examples_folder() / "rraj").glob("*.jpg")):
        photos.store(file.read_bytes(), file.name)
    photos.write_box("photo-001.png", (320, 180, 900, 900))
    photos.write_caption("photo-002.png", "a photo of rraj person, smiling")
    return studio


def draw_ahead(root: Path, name: str) -> None:
    """Draw the demo's person and style at 5 × 5 weights, and measure what each keeps."""
    run, values = f"{root.name}/{name}", "0,0.25,0.5,0.75,1"
    adapters = (f"{run}/{part}/adapter.safetensors" for part in ("with_prior", "style"))
    subprocess.run(
        [
            *(sys.executable, "-m", "dreamloom", "grid"),
            *(f"--adapter={path}" for path in adapters),
            *("--prompt=pixel, a photo of {subject}", "--seeds=4", "--steps=15"),
            *(f"--x=weight:1={values}", f"--y=weight:2={values}", "--name=mix-1"),
            *(f"--out={run}/with_prior", f"--photos={examples_folder() / 'rraj'}"),
            f"--style-photos={examples_folder() / 'pixel-art'}",
        ],
        cwd=root.parent,
        check=True,
    )


def list_pages(studio: Studio) -> dict[str, str]:
    """List each page's address by its name; a run's is that of the demo with class images."""
    runs = {run.name: run.id for run in list_runs(studio.root)}
    chosen = next((i for name, i in runs.items() if name.endswith("with_prior")), "")
    chosen = chosen or next(iter(runs.values()))
    style = next((i for name, i in runs.items() if name.endswith("style")), "")
    return {
        "home": "/",
        "photos": "/photos",
        "photo-set": "/photos/photos-001",
        "photo": "/photos/photos-001/photo-001",
        "teach": "/teach",
        "run": f"/runs/{chosen}",
        "draw": f"/draw?run={chosen}",
        "mix": f"/mix?first={chosen}&second={style}",
        "measure": f"/measure?run={chosen}",
        "queue": "/jobs",
        "disk": "/disk",
    }


@contextmanager
def open_studio(root: Path) -> Iterator[str]:
    """Run a studio, and give the address that lets one in."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamloom", "studio", "--root", str(root), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root.parent,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if found is None:
        raise click.ClickException("The studio did not start.")
    try:
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def take_pictures(browser: Any, door: str, pages: dict[str, str], out: Path) -> None:
    """Take each page's picture at each width."""
    origin = door.partition("/?")[0]
    for width in WIDTHS_PX:
        context = browser.new_context(viewport={"width": width, "height": _HEIGHT_PX})
        page = context.new_page()
        page.goto(door)
        for name, address in pages.items():
            page.goto(origin + address)
            page.wait_for_timeout(_SETTLE_MS)
            tall = page.evaluate("document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": min(tall, _TALLEST_PX)}
            file = out / f"{name}-{width}.jpg"
            page.screenshot(path=file, clip=clip, full_page=True, type="jpeg", quality=80)
            click.echo(file)
        context.close()


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/images/studio"))
def main(demo: Path, out: Path) -> None:
    """Take the screenshots of docs/studio.md from a demo's runs."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        studio = fill_root(Path(folder) / "runs", demo)
        draw_ahead(studio.root, demo.name)
        with open_studio(studio.root) as door, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            take_pictures(browser, door, list_pages(studio), out)
            browser.close()


if __name__ == "__main__":
    main()
