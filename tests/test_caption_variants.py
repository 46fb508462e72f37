"""Caption variants: what is chosen, shuffled and left out, and what never is."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.training.batches import Batch, BatchShare, TrainingBatches
from dreamloom.training.caption_variants import (
    AS_WRITTEN,
    VARIANTS,
    CaptionPlan,
    list_lines,
    list_variants,
    vary_tags,
)
from studio_set import make_lesson, small_config

TAG = st.text("abc rraj", min_size=1, max_size=8).filter(str.strip).map(str.strip)
TAGS = st.lists(TAG, min_size=1, max_size=8)
PLANS = st.builds(
    CaptionPlan,
    choose_line=st.booleans(),
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 4),
    tag_dropout=st.floats(0, 1),
    words=st.just(("rraj",)),
)
FULL = CaptionPlan(True, True, 1, 0.5, ("rraj",))
CAPTION = "a photo of rraj person, red hat, smiling, in snow, night, full body"


def names_subject(text: str) -> bool:
    return "rraj" in text.replace(",", " ").split()


@given(tags=TAGS, plan=PLANS, seed=st.integers(0, 9), photo=st.integers(0, 3))
def test_variants_hold_tags_of_the_caption_and_never_lose_what_must_stay(tags, plan, seed, photo):
    variants = list_variants(", ".join(tags), plan, seed, photo)
    assert variants == list_variants(", ".join(tags), plan, seed, photo)
    assert len(variants) == (VARIANTS if plan.varies_tags else 1)
    for text in variants:
        left = text.split(", ")
        assert left
        assert not Counter(left) - Counter(tags)
        assert left[: plan.keep_tokens] == tags[: plan.keep_tokens]
        named = [tag for tag in tags if names_subject(tag)]
        assert Counter(tag for tag in left if names_subject(tag)) == Counter(named)
        if not plan.shuffle:
            rest = iter(tags)
            assert all(tag in rest for tag in left)
        if not plan.tag_dropout:
            assert Counter(left) == Counter(tags)


@given(st.text("ab ,\n", min_size=1, max_size=20), st.integers(0, 5))
def test_without_a_setting_a_caption_stays_to_the_letter(caption, keep):
    """Earlier runs must repeat."""
    assert list_variants(caption, AS_WRITTEN, 0, 0) == (caption,)
    # How many tags would be kept says nothing where none is moved.
    assert list_variants(caption, replace(AS_WRITTEN, keep_tokens=keep), 0, 0) == (caption,)


@given(lines=st.lists(TAG, min_size=1, max_size=40, unique=True), seed=st.integers(0, 9))
def test_each_line_is_chosen_equally_often_and_all_before_any_comes_again(lines, seed):
    variants = list_variants("\n".join(lines), CaptionPlan(choose_line=True), seed, 0)
    packs = [variants[n : n + len(lines)] for n in range(0, len(variants), len(lines))]
    assert all(sorted(pack) == sorted(lines) for pack in packs)
    assert len(variants) == 1 or VARIANTS <= len(variants) < VARIANTS + len(lines)


def test_without_the_word_tags_of_the_subject_would_be_lost():
    """The check above can fail."""
    plan = replace(FULL, keep_tokens=0, choose_line=False)
    assert all(map(names_subject, list_variants(CAPTION, plan, 0, 0)))
    assert not all(map(names_subject, list_variants(CAPTION, replace(plan, words=()), 0, 0)))
    # Whole words alone, in any case.
    other = "a photo of RRAJ, rrajah, krraj"
    everything = CaptionPlan(tag_dropout=1.0, words=("rraj",))
    assert set(list_variants(other, everything, 0, 0)) == {"a photo of RRAJ"}


def test_of_a_caption_without_the_subject_one_tag_stays():
    everything = CaptionPlan(tag_dropout=1.0, words=("rraj",))
    assert vary_tags("a, b, c", everything, Random(0)) == "a"
    assert vary_tags("a, b, c", replace(everything, keep_tokens=2), Random(0)) == "a, b"


def test_the_share_of_tags_that_is_left_out_is_the_one_that_was_asked_for():
    plan = CaptionPlan(tag_dropout=0.3, keep_tokens=1)
    left = Counter(
        tag
        for seed in range(60)
        for text in list_variants(CAPTION, plan, seed, 0)
        for tag in text.split(", ")
    )
    total = 60 * VARIANTS
    assert left["a photo of rraj person"] == total
    for tag in CAPTION.split(", ")[1:]:
        assert left[tag] / total == pytest.approx(0.7, abs=0.06)


def test_variants_differ_by_photo_and_seed_and_among_each_other():
    plan = CaptionPlan(shuffle=True, keep_tokens=1)
    told = [list_variants(CAPTION, plan, seed, photo) for seed, photo in ((0, 0), (0, 1), (1, 0))]
    assert len(set(told)) == 3
    assert len(set(told[0])) > VARIANTS / 2
    assert {text.split(", ")[0] for text in told[0]} == {"a photo of rraj person"}


def test_lines_are_one_caption_unless_each_is_one():
    assert list_lines("a, b\nc", AS_WRITTEN) == ["a, b\nc"]
    assert list_lines("a, b\nc", CaptionPlan(choose_line=True)) == ["a, b", "c"]
    assert list_lines("", CaptionPlan(choose_line=True)) == [""]


# ------------------------------------------------------------------ in training

LINES = "a photo of rraj person, red hat, snow\nrraj person, smiling, night"
SETTINGS = {
    "photos__caption_lines": "choose",
    "photos__shuffle_caption": True,
    "photos__keep_tokens": 1,
    "photos__caption_tag_dropout_rate": 0.3,
}


def caption_all(photos: PhotoSet) -> PhotoSet:
    texts = (LINES, CAPTION, "")
    captioned = tuple(
        photo.model_copy(update={"caption": text})
        for photo, text in zip(photos.photos, texts, strict=True)
    )
    return photos.model_copy(update={"photos": captioned})


@pytest.fixture(scope="module")
def batches(model: Model, sets: tuple[PhotoSet, ClassImageSet]) -> TrainingBatches:
    config = small_config(model, subject__phrase="rraj person", **SETTINGS)
    return make_lesson(model, caption_all(sets[0]), sets[1], config)


def draw(batches: TrainingBatches, updates: int, share: BatchShare) -> list[Batch]:
    return [one for update in range(updates) for one in batches.make_batches(update, share)]


def test_a_photo_is_trained_with_the_variant_of_its_round(batches: TrainingBatches) -> None:
    plan = batches.plan
    assert plan.captions == CaptionPlan(True, True, 1, 0.3, ("rraj",))
    met: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for batch in draw(batches, 3 * VARIANTS, BatchShare(2, 1)):
        for sample, prompt in zip(batch.samples, batch.prompts, strict=True):
            if sample.is_prior:
                assert prompt == batches.prior_prompts[sample.picture]
            else:
                met[sample.picture].append(prompt)
            assert prompt in batches.texts
    for number, caption in enumerate((LINES, CAPTION, batches.prompts[0])):
        variants = list_variants(caption, plan.captions, plan.seed, number)
        expected = [variants[turn % len(variants)] for turn in range(len(met[number]))]
        assert len(met[number]) > len(variants)
        assert met[number] == expected
    assert all(map(names_subject, met[0] + met[1]))


def test_variants_do_not_depend_on_batches_or_processes(batches: TrainingBatches) -> None:
    whole = [s for u in range(9) for s in batches.draw_samples(u, BatchShare(4, 0))]
    halves = [
        sample
        for update in range(9)
        for index in range(2)
        for sample in batches.draw_samples(update, BatchShare(2, 0, 2, index))
    ]
    assert whole == halves
    assert [batches._caption(one) for one in whole] == [batches._caption(one) for one in halves]


def test_frozen_and_trained_text_encoders_read_the_same_variants(
    model: Model, batches: TrainingBatches
) -> None:
    drawn = draw(batches, 6, BatchShare(2, 1))
    frozen = [batches.conditioning(batch.prompts) for batch in drawn]
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, text_encoders=True))
    try:
        # A new adapter changes nothing yet.
        trained = [batches.conditioning(batch.prompts) for batch in drawn]
    finally:
        model.detach_adapter()
    for one, other in zip(frozen, trained, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens.detach())
    assert not torch.equal(frozen[0].tokens, frozen[1].tokens)


def test_photos_are_validated_with_their_captions_as_written(batches: TrainingBatches) -> None:
    prompts = [prompt for batch in batches.validation() for prompt in batch.prompts]
    assert prompts == [LINES.splitlines()[0], CAPTION, batches.prompts[0]]
    assert set(prompts) <= set(batches.texts)
    assert set(batches.written_texts) == {*batches.prompts, *LINES.splitlines(), CAPTION}


def test_without_settings_nothing_more_is_encoded(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    plain = make_lesson(model, caption_all(sets[0]), sets[1], small_config(model))
    assert plain.texts == plain.written_texts == (*plain.prompts, LINES, CAPTION)
