"""CITATION.cff says what pyproject.toml says, and names nobody and no address that is made up."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_has_what_the_format_requires():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert all(isinstance(CITATION[name], str) for name in ("message", "title", "version"))


def test_it_agrees_with_the_package():
    assert CITATION["title"].lower() == PROJECT["name"]
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["keywords"] == PROJECT["keywords"]
    assert CITATION["abstract"] == PROJECT["description"]
    # The format knows no "AND": the first is DreamLoom's own, the others are of parts.
    assert CITATION["license"] == PROJECT["license"].split(" AND ")[0]


def test_the_authors_are_an_entity_and_no_address_is_given():
    assert CITATION["authors"] == [{"name": "The DreamLoom contributors"}]
    assert not {"doi", "url", "repository-code", "identifiers", "date-released"} & set(CITATION)
