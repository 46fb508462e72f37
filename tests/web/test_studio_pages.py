"""Every page at both widths and in both schemes: readable by everybody, complete, and quiet."""

import shutil
from typing import Any

import pytest

from dreamloom.data.examples import examples_folder
from dreamloom.studio.context import Studio
from test_report import PROMPTS, Folder, build_run
from tools.studio_screenshots import list_pages
from web.conftest import RunningStudio, Watch

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A studio with photos and a run that has everything; and its pages."""
    root = tmp_path_factory.mktemp("pages") / "runs"
    run = Folder(build_run(root / "run"))
    for updates in (0, 20):
        folder = run.pictures("sample", PROMPTS[:1]).folder
        target = run.run.validation_samples / f"{updates:06d}"
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    studio = Studio(root, root.parent)
    photos = studio.photo_sets.make("me")
    for file in sorted((examples_folder() / "rraj").glob("*.jpg"))[:2]:
        photos.store(file.read_bytes(), file.name)
    job = studio.jobs.add("train", ["train", "<b>"], run="run", not_before=4e9)
    studio.jobs.add("report", ["report"], run="gone", after=job.id)
    running = RunningStudio(root)
    running.start()
    yield running, list_pages(studio) | {"job": f"/jobs/{job.id}", "login": "/login"}
    running.kill()
    for one in studio.jobs:
        one.cancel()
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page(browser: Any, pages: Any, scheme: str, width: int):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    studio, addresses = pages
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    watch = Watch()
    page = watch.on(context.new_page())
    page.goto(studio.door)
    found: list[str] = []
    for name, address in addresses.items():
        page.goto(studio.origin + address)
        page.wait_for_timeout(1500)
        page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
        for one in axe.run(page).response["violations"]:
            found += [f"{name}: {one['id']}: {node['html'][:120]}" for node in one["nodes"]]
        if page.evaluate("document.documentElement.scrollWidth") > width:
            found.append(f"{name} is wider than {width} px")
    context.close()
    assert found == []
    assert watch.errors == []
    assert all(url.startswith((studio.origin, "data:", "blob:")) for url in watch.asked)


def test_all_is_reached_by_keyboard(browser: Any, pages: Any):
    studio, _ = pages
    page = browser.new_context().new_page()
    page.goto(studio.door)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim()"))
    assert "Begin" in seen
