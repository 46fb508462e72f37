"""Rare words: merge numbers by hand, and suggestions that keep what is said of them."""

import functools
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.core.errors import ConfigError
from dreamloom.models import rare_words
from dreamloom.models.rare_words import KNOWN_ABBREVIATIONS, Piece, ReadWord, read_rare_words
from dreamloom.models.sdxl_configs import make_tokenizers
from dreamloom.models.tokenizers import load_tokenizers

# "t" and "h" are joined first; "qrz" and "bcd" are whole words, "sks" is one that is known.
MERGES = [
    *(("t", "h"), ("th", "e</w>"), ("b", "c"), ("bc", "d</w>"), ("a", "b</w>")),
    *(("q", "r"), ("qr", "z</w>"), ("s", "k"), ("sk", "s</w>"), ("z", "z"), ("zz", "z</w>")),
]

# Making SDXL's tokenizers takes a second.
load_once = functools.cache(load_tokenizers)


@pytest.fixture(autouse=True)
def tokenizers_are_made_once(monkeypatch):
    monkeypatch.setattr(rare_words, "load_tokenizers", load_once)


@pytest.fixture
def small(monkeypatch):
    """Two tokenizers of eleven merges each."""
    made = dict(zip(("one", "two"), make_tokenizers(MERGES), strict=True))
    monkeypatch.setattr(rare_words, "load_tokenizers", lambda base: made)
    return made


def test_merges_are_numbered_from_the_most_frequent(small):
    (reading,) = read_rare_words("small", "the qrz thx").readings
    assert reading.encoders == ("one", "two")
    assert reading.merges == 11
    assert reading.words == (
        ReadWord("the", (Piece("the", 2),), 0 / 6),
        ReadWord("qrz", (Piece("qrz", 7),), 3 / 6),
        ReadWord("thx", (Piece("th", 1), Piece("x", None)), None),
    )


def test_words_later_than_every_piece_of_what_was_given_are_suggested(small):
    # Not "the" (a vowel), "ab" (too short), "sks" (known), "zzz" (one letter only).
    assert read_rare_words("small", "the dog").rarer == {"qrz": 7, "bcd": 4}
    assert read_rare_words("small", "bcd dog").rarer == {"qrz": 7}
    assert read_rare_words("small", "qrz").rarer == {}


def test_the_class_noun_may_be_rare(small):
    assert read_rare_words("small", "bcd zzz").rarer == {"qrz": 7}
    assert read_rare_words("small", "bcd zzz").class_noun == "zzz"
    assert read_rare_words("small", "bcd").class_noun == ""


def test_a_word_must_be_one_piece_for_every_tokenizer(small):
    small["two"] = make_tokenizers(MERGES[:5])[1]
    found = read_rare_words("small", "the dog")
    assert found.rarer == {"bcd": 4}
    assert [reading.encoders for reading in found.readings] == [("one",), ("two",)]


def test_suggestions_for_sdxl_keep_what_is_said_of_them():
    found = read_rare_words("sdxl", "rraj person")
    assert found == read_rare_words("sdxl", "rraj person")
    assert 0 < len(found.rarer) <= rare_words.SUGGESTED
    merges = list(found.rarer.values())
    assert merges == sorted(merges, reverse=True)
    assert min(merges) > 10_302  # that of "raj"
    tokenizers = make_tokenizers()
    for word in found.rarer:
        assert 3 <= len(word) <= 4
        assert not set(word) & set("aeiouy")
        assert word not in KNOWN_ABBREVIATIONS
        assert all(one.tokenize(word) == [f"{word}</w>"] for one in tokenizers)


def test_every_known_abbreviation_could_be_suggested_otherwise(monkeypatch):
    monkeypatch.setattr(rare_words, "KNOWN_ABBREVIATIONS", frozenset())
    monkeypatch.setattr(rare_words, "SUGGESTED", 10_000)
    assert read_rare_words("sdxl", "the").rarer.keys() >= KNOWN_ABBREVIATIONS


@pytest.mark.parametrize("text", ["", "  ", "\t"])
def test_no_word_is_an_error(text):
    with pytest.raises(ConfigError, match="There is no word to look at"):
        read_rare_words("sdxl", text)


def run(*words: str):
    return CliRunner(env={"COLUMNS": "400"}).invoke(main, list(words))


def test_the_command_says_pieces_rarity_and_rarer_words():
    said = run("token", "rraj person", "--base", "sdxl").output
    assert "sdxl: “rraj person” is read as r · raj · person" in said
    assert "– · 10,302" in said
    assert "later than 3% of one-piece words" in said
    assert "which is not to say in the captions" in said
    assert "rarer than each piece of rraj: " in said
    assert "dreamloom generate --base sdxl --prompt 'a photo of " in said
    assert run("token", "rraj", "person", "--base", "sdxl").output == said


def test_the_command_says_that_a_word_is_known_and_that_none_is_left():
    assert "sks stands for something" in run("token", "sks dog", "--base", "sdxl").output
    said = run("token", "httr dog", "--base", "sdxl").output
    assert "None is left of the short one-piece words rarer" in said
    assert "an invented word, which it reads in pieces" in run("token", "rraj person").output


def test_the_command_in_json():
    found = json.loads(run("token", "rraj person", "--base", "sdxl", "--json").output)
    (reading,) = found["readings"]
    assert reading["encoders"] == ["text_encoder", "text_encoder_2"]
    assert reading["words"][0]["pieces"] == [
        {"text": "r", "merge": None},
        {"text": "raj", "merge": 10302},
    ]
    assert found["class_noun"] == "person"
    assert all(isinstance(merge, int) for merge in found["rarer"].values())


def test_what_is_wrong_is_said_in_two_lines():
    empty = run("token", "")
    assert (empty.exit_code, len(empty.stderr.splitlines())) == (2, 2)
    unknown = run("token", "rraj", "--base", "nobody/nothing")
    assert (unknown.exit_code, len(unknown.stderr.splitlines())) == (1, 2)


def test_words_are_looked_at_without_torch():
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from dreamloom.cli.main import main\nmain(['token', 'rraj person', '--base', 'sdxl'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10,302" in done.stdout
