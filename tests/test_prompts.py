"""Prompt packs: every prompt names the subject, once, and nothing else is left to fill in."""

import string

import pytest

from dreamloom.prompts import PACKS

PROMPTS = [(name, prompt) for name, pack in PACKS.items() for prompt in pack]


@pytest.mark.parametrize(("pack", "prompt"), PROMPTS, ids=[p.text for _, p in PROMPTS])
def test_a_prompt_has_one_place_for_the_subject(pack, prompt):
    blanks = [name for _, name, _, _ in string.Formatter().parse(prompt.text) if name is not None]
    assert blanks == ["subject"]
    assert prompt.text == " ".join(prompt.text.split())


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_prompts_of_a_pack_differ(pack):
    assert len({prompt.text for prompt in pack}) == len(pack) > 0


def test_the_study_pack_asks_for_each_kind_of_change_once():
    categories = [prompt.category for prompt in PACKS["seed-v1"]]
    assert categories == ["photo", "scene", "style", "attribute", "view", "accessory"]
    assert all(word in PACKS["seed-v1"][0].text for word in ("photo", "{subject}"))
