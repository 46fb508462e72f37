"""The documentation site: it builds without a warning, stands alone, and everybody can read it."""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

from dreamloom.cli.main import main
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.toml_files import list_fields

pytest.importorskip("material", reason="needs the extra docs: pip install 'dreamloom[docs]'")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# What a page loads by itself; an <a> leads elsewhere only when somebody follows it.
LOADED = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "video"}


class Links(HTMLParser):
    """What a page loads, where it leads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src", "data") and value:
                self.targets.append((tag, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {file: Links(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_no_page_loads_anything_from_another_host(pages: dict[Path, Links]) -> None:
    assert len(pages) > 30
    for file, links in pages.items():
        for tag, target in links.targets:
            assert tag not in LOADED or not urlsplit(target).netloc, f"{file.name}: {target}"


def test_every_link_inside_leads_somewhere(site: Path, pages: dict[Path, Links]) -> None:
    dead = defaultdict(set)
    for file, links in pages.items():
        if file.name == "404.html":
            continue  # it is served for any address, so its links begin at the root
        for _, target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            aim = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            aim = aim / "index.html" if aim.is_dir() else aim
            anchor = unquote(parts.fragment)
            # "__" are the theme's own switches.
            asked = {anchor} if anchor and not anchor.startswith("__") and aim in pages else set()
            if not aim.is_file() or (asked and not asked <= pages[aim].anchors):
                dead[file.name].add(target)
            assert site in aim.parents, f"{file.name} leads out of the site: {target}"
    assert not dead


def test_the_reference_names_every_command_setting_and_function(site: Path) -> None:
    import dreamloom

    commands, settings, python = (
        (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
        for name in ("commands", "settings", "python")
    )
    for name, command in main.commands.items():
        assert f'id="dreamloom-{name}"' in commands
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in commands, f"{name} {option.opts[-1]}"
    assert "UNSET" not in commands
    for name in list_fields(LoomConfig):
        assert f"<code>{name}</code>" in settings
    for name in dreamloom.__all__:
        assert f'id="dreamloom.{name}"' in python


def test_tests_named_in_tables_are_folded_and_others_are_not() -> None:
    from tools.docs_hooks import fold_tests

    row = "| a | yes → `test_x.py::test_y`, `test_z` (on one) |"
    tests = "<details><summary>2 tests</summary>`test_x.py::test_y`, `test_z`</details>"
    assert fold_tests(row) == f"| a | yes {tests} (on one) |"
    assert (
        fold_tests("| `tests/test_x.py` | `train.steps` |")
        == "| `tests/test_x.py` | `train.steps` |"
    )
    assert fold_tests("as in `test_z`") == "as in `test_z`"


def test_the_search_works_without_a_server(site: Path) -> None:
    assert (site / "search" / "search_index.js").stat().st_size > 100_000
    home = (site / "index.html").read_text(encoding="utf-8")
    assert '<script src="site/iframe-worker.js"></script>' in home


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("axe_playwright_python", reason="needs the extra web: dreamloom[web]")
    if CHROMIUM is None:
        pytest.skip("Chromium was not found")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.web
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name", ["index", "merging", "own-face", "reference/commands", "reference/python"]
)
def test_axe_finds_nothing_serious(browser, site: Path, name: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / f"{name}.html").as_uri())
    found = Axe().run(page).response["violations"]
    serious = [
        f"{one['id']}: {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


@pytest.mark.web
def test_commands_and_tables_fit_a_laptop_and_commands_a_phone(browser, site: Path) -> None:
    wide = """what => [...document.querySelectorAll(what)]
        .filter(one => one.scrollWidth > one.clientWidth)
        .map(one => one.textContent.trim().slice(0, 60))"""
    page = browser.new_page()
    for file in sorted(site.rglob("*.html")):
        if file.name == "404.html":
            continue  # its styles begin at a server's root
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(file.as_uri())
        assert page.evaluate(wide, ".md-typeset__scrollwrap") == [], file.name
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate(wide, ".language-sh code, .language-toml code") == [], file.name
    page.close()


@pytest.mark.web
def test_an_option_is_not_broken_behind_its_hyphens(browser, site: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((site / "own-face.html").as_uri())
    lines = """[...document.querySelectorAll(".md-typeset code .option")]
        .map(one => [one.textContent, one.getClientRects().length])"""
    found = page.evaluate(lines)
    assert ["--floor", 1] in found
    assert {count for _, count in found} == {1}
    page.close()


@pytest.mark.web
def test_searching_from_the_file_system_finds_a_page(browser, site: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").fill("identifier")
    page.locator(".md-search-result__link").first.wait_for(timeout=60_000)
    page.close()
