"""The studio's words: every text that a page says is there, and none that nobody says."""

import re
from pathlib import Path

import pytest

import dreamloom.studio
from dreamloom.studio.words import read_words, say

HOME = Path(dreamloom.studio.__file__).parent
SOURCES = [*HOME.glob("*.py"), *HOME.glob("templates/**/*.html")]
TEXT = {path: path.read_text(encoding="utf-8") for path in SOURCES}
WHOLE = re.compile(
    r"""(?:say|count)\([^)"']*?["']([a-z_.0-9]+)["']|["']([a-z_]+\.[a-z_.0-9]+)["']"""
)
BEGUN = re.compile(
    r"""["']([a-z_]+(?:\.[a-z_]+)*[._])["'] ?[~%]|f["']([a-z_]+(?:\.[a-z_]+)*[._])\{"""
)


def names_said() -> tuple[set[str], set[str]]:
    whole, begun = set(), set()
    for text in TEXT.values():
        whole |= {name for found in WHOLE.findall(text) for name in found if name}
        begun |= {name for found in BEGUN.findall(text) for name in found if name}
    return whole, begun


def test_each_text_is_said_somewhere():
    whole, begun = names_said()
    unsaid = [
        name
        for name in read_words()
        if name not in whole
        and re.sub(r"\.(one|many)$", "", name) not in whole
        and not any(name.startswith(start) for start in begun)
    ]
    assert unsaid == []


def test_each_text_that_a_page_names_is_there():
    for path, text in TEXT.items():
        for name in re.findall(r"""\bsay\(["']([a-z_.0-9]+)["'][,)]""", text):
            assert name in read_words(), f"{path.name}: {name}"
        for name in re.findall(r"""\bcount\([^"']*["']([a-z_.0-9]+)["']\)""", text):
            assert {f"{name}.one", f"{name}.many"} <= set(read_words()), f"{path.name}: {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".html"], ids=lambda p: p.name)
def test_no_page_speaks_for_itself(path: Path):
    text = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", " ", TEXT[path], flags=re.DOTALL)
    # What an option offers to be typed is the command's word.
    text = re.sub(r"<option\b[^>]*>[^<]*</option>|<[^>]*>", " ", text)
    words = {word for word in re.findall(r"[A-Za-z]{3,}", text)}
    assert words <= {"DreamLoom", "GiB", "html", "doctype"}, path.name


def test_a_text_wants_its_values():
    assert say("run.done_of", done=3, total=4) == "3 of 4"
    with pytest.raises(KeyError):
        say("run.done_of", done=3)
