"""The page in a browser: whoever cannot see it well, or has no mouse, can read it all the same.

Skipped where Chromium or the extra ``web`` is not there: ``apt-get install chromium`` and
``pip install dreamloom[web]``.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamloom.report.render import write_report
from test_report import PROMPTS, Folder, build_demo, build_run, scorecard
from test_report_appearance import build as build_class
from test_report_appearance import spoil_two

axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs the extra web: dreamloom[web]"
)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra web: dreamloom[web]")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium was not found"),
]

MOST_PRINTED_PAGES = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A demo; a run with samples of its training, one that drew the class, and an empty one."""
    root = tmp_path_factory.mktemp("web")
    run = Folder(build_run(root / "run"))
    for updates in (0, 20):
        folder = run.pictures("sample", PROMPTS[:1]).folder
        target = run.run.validation_samples / f"{updates:06d}"
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    empty = root / "empty"
    (empty / "records").mkdir(parents=True)
    folders = {"demo": build_demo(root / "demo"), "run": run.run.path, "empty": empty}
    folders["class"] = build_class(root / "class", spoil_two)
    return {name: write_report(folder) for name, folder in folders.items()}


def violations(page: object) -> list[str]:
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["demo", "run", "class", "empty"])
def test_axe_finds_nothing(browser, pages, name: str, scheme: str, width: int):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(pages[name].as_uri())
    assert violations(page) == []
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert violations(page) == []
    # Nothing is wider than the screen: what is scrolls in itself, and by keyboard.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_the_closer_look_has_a_name_and_buttons(browser, pages):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages["demo"].as_uri())
    page.locator(".shot img").first.click()
    dialog = page.get_by_role("dialog", name="A closer look")
    first = dialog.locator(".chosen img").get_attribute("alt")
    dialog.get_by_role("button", name="Next →").click()
    assert dialog.locator(".chosen img").get_attribute("alt") != first
    dialog.get_by_role("button", name="← Previous").click()
    assert dialog.locator(".chosen img").get_attribute("alt") == first
    assert violations(page) == []
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()
    page.close()


def test_print_is_short(browser, tmp_path: Path):
    """As many pictures as the demo draws: nineteen prompts of three seeds by three models."""
    demo = Folder(build_demo(tmp_path / "demo"))
    prompts = [(f"a photo of rraj person in place {number}", "scene") for number in range(12)]
    prompts += [(f"a photo of a person in place {number}", "class") for number in range(7)]
    cards = {}
    demo.seeds = range(3)
    for name in ("base", "without_prior", "with_prior"):
        shutil.rmtree(demo.run.images / name)
        cards[name] = scorecard(demo.pictures(name, prompts), 0.5)
    demo.scores(cards)
    page = browser.new_page()
    page.goto(write_report(tmp_path / "demo").as_uri())
    printed = page.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= MOST_PRINTED_PAGES
    page.close()
