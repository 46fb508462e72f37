"""Prompt packs: counts, closed words, blanks, the paper's lists, and what fits which encoder."""

import hashlib
import json
import random
import re
import string
from collections import Counter

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from dreamloom.cli.main import main
from dreamloom.core.manifests import read_image_set
from dreamloom.data.prompts.packs import PACK_NAMES, Pack, PackPrompt, read_pack
from dreamloom.models.sdxl_configs import make_tokenizers
from dreamloom.picturebook.world import sample_drawing
from tools.picturebook.captions import caption

PACKS = [read_pack(name) for name in PACK_NAMES]
PROMPTS = [(pack.name, prompt) for pack in PACKS for prompt in pack.prompts]
TOLD = ("category", "style", "face", "may_change", "check")
WITHOUT_SUBJECT = ("class-v1", "unrelated-v1", "picturebook-class-v1")


def blanks(text):
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


@pytest.mark.parametrize(("pack", "prompt"), PROMPTS, ids=[f"{n}: {p.text}" for n, p in PROMPTS])
def test_a_prompt_names_the_subject_once_or_nothing_but_the_class(pack, prompt):
    if pack in WITHOUT_SUBJECT:
        assert set(blanks(prompt.text)) <= {"class_noun"}
        assert prompt.category == ("unrelated" if pack == "unrelated-v1" else "class")
        assert "zzq" not in prompt.fill("zzq person", "person")
    else:
        assert blanks(prompt.text) == ["subject"]
        assert "zzq person" in prompt.fill("zzq person", "person")
    assert prompt.text == " ".join(prompt.text.split())
    assert list(prompt.may_change) == sorted(set(prompt.may_change))
    assert not prompt.check or prompt.check.endswith("?")


@pytest.mark.parametrize("pack", PACKS, ids=PACK_NAMES)
def test_prompts_of_a_pack_differ_and_each_file_has_its_name_in_the_list(pack):
    texts = [prompt.text.lower() for prompt in pack.prompts]
    assert len(set(texts)) == len(texts) > 0
    assert pack.about.endswith((".", "?"))


def test_every_file_is_listed():
    from dreamloom.data.prompts import packs as prompts

    files = {path.stem for path in prompts._FOLDER.glob("*.toml")}
    assert files == set(PACK_NAMES)
    with pytest.raises(ValueError, match="no prompt pack 'person'"):
        read_pack("person")


def count(name):
    return Counter(prompt.category for prompt in read_pack(name).prompts)


def test_the_packs_have_the_parts_that_they_promise():
    assert count("person-v1") == {
        **{"photo": 3, "scene": 7, "accessory": 6, "attribute": 3},
        **{"view": 2, "expression": 1, "style": 3},
    }
    assert count("object-v1") == {"scene": 20, "attribute": 5}
    assert count("live-v1") == {"scene": 10, "accessory": 10, "attribute": 5}
    assert count("unrelated-v1") == {"unrelated": 10}


# Of the 25 lines of google/dreambooth's prompts_and_classes.txt for each kind, joined by line
# breaks, with {0} {1} where they put identifier and class.
PAPER = {
    "object-v1": "ffc56c551ee4504499d2fa0a9c360fe4bf3740aed5b2e3c2a961f8299964699f",
    "live-v1": "1a41ad67868db5db2094e3e69e2bd99b5ead303db9dd93bb5e229c4edba99a6b",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_lists_are_the_papers_in_its_order(name):
    lines = [prompt.text.replace("{subject}", "{0} {1}") for prompt in read_pack(name).prompts]
    assert len(lines) == 25
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PAPER[name]
    changed = "\n".join([*lines[:-1], lines[-1].replace("cube", "ball")])
    assert hashlib.sha256(changed.encode()).hexdigest() != PAPER[name]


@pytest.mark.parametrize("name", ["person-v1", *PAPER])
def test_what_is_adapted_says_from_where(name):
    attribution = read_pack(name).attribution
    for words in ("Ruiz et al.", "https://github.com/google/dreambooth", "CC BY 4.0", "modified"):
        assert words in attribution


def test_the_study_pack_asks_for_each_kind_of_change_once():
    prompts = read_pack("seed-v1").prompts
    categories = [prompt.category for prompt in prompts]
    assert categories == ["photo", "scene", "style", "attribute", "view", "accessory"]
    assert all(word in prompts[0].text for word in ("photo", "{subject}"))


@pytest.mark.parametrize(
    "broken",
    [
        {"category": "scenery"},
        {"style": "sketch"},
        {"face": "maybe"},
        {"may_change": ("nose",)},
        {"colour": "red"},
    ],
)
def test_the_vocabularies_are_closed(broken):
    with pytest.raises(ValidationError):
        PackPrompt(**{"text": "a {subject}", "category": "photo", **broken})


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        ("dog", "a photo of a dog"),
        ("owl", "a photo of an owl"),
        ("old man", "a photo of an old man"),
        ("Umbrella", "a photo of an Umbrella"),
        ("unicorn", "a photo of a unicorn"),
        ("European robin", "a photo of a European robin"),
        ("ukulele", "a photo of a ukulele"),
        ("hourglass", "a photo of an hourglass"),
        ("horse", "a photo of a horse"),
    ],
)
def test_the_article_goes_by_the_word_behind_it(words, filled):
    prompt = read_pack("class-v1").prompts[0]
    assert prompt.fill("sks thing", words) == filled
    assert read_pack("object-v1").prompts[0].fill("olis cup", "cup") == "an olis cup in the jungle"
    assert read_pack("object-v1").prompts[20].fill("olis cup", "cup") == "a red olis cup"
    # What the user's words contain is not filled in again.
    assert read_pack("seed-v1").prompts[0].fill("{class_noun}", "cup") == "a photo of {class_noun}"


def test_a_class_gets_the_prompts_that_suit_it():
    people, dogs = (
        [prompt.text for prompt in read_pack("class-v1").select(noun)] for noun in ("Man", "dog")
    )
    assert "a photo of two people talking" in people
    assert [text for text in people if "{class_noun}" in text] == dogs
    unrelated = read_pack("unrelated-v1")
    assert len(unrelated.select("person")) == len(unrelated.select("")) == 10
    kept = [prompt.text for prompt in unrelated.select("Steam train")]
    assert len(kept) == 9
    assert not any("train" in text for text in kept)
    # "train" alone stands in it as well, but not inside other words.
    assert len(unrelated.select("book")) == 9
    assert len(unrelated.select("light")) == 10


def test_a_person_is_never_asked_for_as_a_thing():
    texts = " ".join(prompt.text for prompt in read_pack("person-v1").prompts)
    assert not re.search(r"cube|purple|on top of|shiny", texts)


def test_every_prompt_fits_clip():
    tokenizer, _ = make_tokenizers()
    longest = max(
        len(tokenizer(prompt.fill("ohwxzy stuffed animal", "stuffed animal")).input_ids)
        for _, prompt in PROMPTS
    )
    assert longest <= 77
    # The counting itself: 75 words, with beginning and end.
    assert len(tokenizer("dog " * 75).input_ids) == 77


def test_the_embedded_model_knows_every_word_of_its_own_packs():
    rng = random.Random("words of the world")
    known = {word for seed in range(4000) for word in caption(sample_drawing(seed), rng).split()}
    asked = {
        word
        for name in ("picturebook-v1", "picturebook-class-v1")
        for prompt in read_pack(name).prompts
        for word in prompt.fill("person", "person").split()
    }
    assert asked <= known
    assert {"jungle", "chef", "statue"}.isdisjoint(known)


@pytest.mark.parametrize("name", PACK_NAMES)
def test_packs_are_listed_with_their_metadata_and_attribution(name):
    runner = CliRunner(env={"COLUMNS": "300"})
    assert name in runner.invoke(main, ["packs"]).output
    shown = runner.invoke(main, ["packs", name])
    assert shown.exit_code == 0
    pack = read_pack(name)
    assert all(prompt.text in shown.output for prompt in pack.prompts)
    assert pack.attribution in shown.output
    found = runner.invoke(main, ["packs", name, "--json"]).output
    assert [Pack.model_validate(one) for one in json.loads(found)] == [pack]


def test_the_help_lists_every_pack():
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["generate", "--help"]).output
    assert set(re.findall(r"[a-z-]+-v\d", shown)) == set(PACK_NAMES)
    refused = CliRunner().invoke(main, ["packs", "person"])
    assert refused.exit_code == 2
    assert "person-v1" in refused.output


def test_the_embedded_model_draws_packs_and_the_manifest_says_what_each_may_change(tmp_path):
    out = tmp_path / "run"
    words = ["generate", "--base", "picturebook", "--device", "cpu", "--out", str(out)]
    words += ["--seeds", "1", "--steps", "2"]
    for name in ("seed-v1", "pixel-v1", "seed-v1"):
        words += ["--pack", name]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    drawn = {p.prompt: p for p in read_image_set(out / "images" / "pictures").pictures}
    prompts = [prompt for name, prompt in PROMPTS if name in ("seed-v1", "pixel-v1")]
    # A pack that is named twice is drawn once.
    assert list(drawn) == [prompt.fill("rraj person", "person") for prompt in prompts]
    for prompt, picture in zip(prompts, drawn.values(), strict=True):
        told = tuple(getattr(picture, name) for name in TOLD)
        assert told == tuple(getattr(prompt, name) for name in TOLD)
    assert drawn["a photo of rraj person with sunglasses"].may_change == ("eyes", "glasses")
