"""What the studio's pages take from others: byte for byte what was looked at, with its licence."""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "src" / "dreamloom" / "studio" / "static" / "vendor"

# Name, where it comes from, its licence, and what its bytes hash to.
VENDORED = {
    "htmx.min.js": (
        "htmx 2.0.11, https://github.com/bigskysoftware/htmx, dist/htmx.min.js",
        "htmx.LICENSE",
        "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717",
    ),
    "htmx-ext-sse.min.js": (
        "htmx's extension sse, https://github.com/bigskysoftware/htmx-extensions, src/sse",
        "htmx-ext-sse.LICENSE",
        "98a46496de0c3605fbffdce9167ba427bdd9553184f83f149c261891a92c0136",
    ),
    "uplot.min.js": (
        "uPlot 1.6.32, https://github.com/leeoniya/uPlot, dist/uPlot.iife.min.js",
        "uplot.LICENSE",
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    ),
    "uplot.min.css": (
        "uPlot 1.6.32, https://github.com/leeoniya/uPlot, dist/uPlot.min.css",
        "uplot.LICENSE",
        "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    ),
}
LICENCES = {
    "htmx.LICENSE": "Zero-Clause BSD",
    "htmx-ext-sse.LICENSE": "BSD Zero Clause License",
    "uplot.LICENSE": "The MIT License",
}


def test_each_file_is_the_one_that_was_looked_at():
    for name, (_, licence, sha256) in VENDORED.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == sha256, name
        assert licence in LICENCES


def test_nothing_else_lies_there():
    assert {file.name for file in FOLDER.iterdir()} == {*VENDORED, *LICENCES}


def test_each_has_the_words_of_its_licence():
    for name, words in LICENCES.items():
        assert words in (FOLDER / name).read_text(encoding="utf-8")


def test_nothing_vendored_asks_another_machine():
    for name in VENDORED:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert "import(" not in text
        assert "sourceMappingURL" not in text
