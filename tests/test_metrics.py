"""Scores have their known values, refuse what has none, and do not depend on order."""

import doctest

import numpy as np
import pytest
import torch

from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics import similarity
from dreamloom.evaluation.metrics.build_scorecard import find_alarms
from dreamloom.evaluation.metrics.embed import Embeddings
from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import asks_for_other_looks, assign_roles
from dreamloom.evaluation.metrics.scorecard import PictureScores, Score
from dreamloom.evaluation.metrics.similarity import (
    calibrate_threshold,
    cosines,
    differences,
    drift,
    is_nearest,
    is_own_prompt_best,
    photo_ceiling,
    prompt_fidelity,
    subject_fidelity,
)

FEATURES = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def test_the_examples_run():
    assert doctest.testmod(similarity).failed == 0


def test_likeness_with_oneself_is_one():
    assert cosines(FEATURES, FEATURES).diagonal() == pytest.approx(torch.ones(6).double())


def test_length_does_not_matter():
    longer = subject_fidelity(generated=5 * FEATURES, photos=OTHERS / 3)
    assert torch.allclose(longer, subject_fidelity(generated=FEATURES, photos=OTHERS))


def test_order_does_not_matter():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    plain = subject_fidelity(generated=FEATURES, photos=OTHERS)
    mixed = subject_fidelity(generated=FEATURES[order], photos=OTHERS.flip(0))
    assert torch.allclose(mixed, plain[order].flip(1))
    assert torch.allclose(differences(FEATURES[order]), differences(FEATURES)[order][:, order])
    assert photo_ceiling(FEATURES[order]).mean() == pytest.approx(
        photo_ceiling(FEATURES).mean().item()
    )


def test_swapping_pictures_and_prompts_shows():
    right = prompt_fidelity(generated=FEATURES, prompts=FEATURES.roll(1, 0))
    wrong = prompt_fidelity(generated=FEATURES.flip(0), prompts=FEATURES.roll(1, 0))
    assert not torch.allclose(right, wrong)
    with pytest.raises(TypeError):
        subject_fidelity(FEATURES, OTHERS)


def test_the_ceiling_leaves_out_self_pairs():
    by_hand = [
        torch.cosine_similarity(FEATURES[i], FEATURES[torch.arange(6) != i]).mean()
        for i in range(6)
    ]
    assert photo_ceiling(FEATURES).float() == pytest.approx(torch.stack(by_hand), abs=1e-6)


def test_copies_have_no_variety():
    assert differences(FEATURES[:1].repeat(5, 1)).abs().max() == pytest.approx(0, abs=1e-12)
    expected = 1 - torch.cosine_similarity(FEATURES[0], FEATURES[1], dim=0).item()
    assert differences(FEATURES)[0, 1].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subject_fidelity(generated=FEATURES, photos=OTHERS[:0]), "got 6 and 0"),
        (lambda: subject_fidelity(generated=FEATURES[:0], photos=OTHERS), "got 0 and 4"),
        (lambda: photo_ceiling(FEATURES[:1]), "two photos or more, got 1"),
        (lambda: prompt_fidelity(generated=OTHERS[:0], prompts=OTHERS[:0]), "at least one picture"),
        (lambda: cosines(FEATURES * 0, OTHERS), "all zeros"),
        (lambda: cosines(FEATURES / 0, OTHERS), "must be finite"),
    ],
)
def test_what_has_no_score_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def seen_in(prints, flat=None, missed=None):
    n = len(prints)
    return Embeddings(
        features={},
        prints=prints,
        flat=flat or [False] * n,
        familiar=[True] * n,
        broken={},
        layouts=np.zeros((n, 1), np.float32),
        missed={"identity": torch.tensor(missed or [False] * n)},
    )


def alarms(**changed):
    given = {
        "scores": {"identity": Score(value=0.2, n=3)},
        "ceilings": {},
        "values": [0.1, 0.2, 0.3],
        "prints": ["a", "b", "c"],
        "copied": [False] * 3,
        "flat": [False] * 3,
        "missed": [False] * 3,
        "floor_prints": [None] * 3,
        **changed,
    }
    pictures = [
        PictureScores(
            file=f"{i}.png",
            prompt="a",
            category="",
            seed=i,
            scheduler="ddim",
            steps=5,
            copied=given["copied"][i],
            values={"identity": value},
        )
        for i, value in enumerate(given["values"])
    ]
    floor = given["floor_prints"]
    absent = Missing("it is not here")
    evidence = Evidence(
        pictures=(),
        prompts=["a"] * 3,
        roles=["subject"] * 3,
        partners=[None if own is None else place for place, own in enumerate(floor)],
        embeddings=seen_in(given["prints"], given["flat"], given["missed"]),
        photos=seen_in(["p"]),
        nearness=torch.zeros(3, 1),
        copied=np.array(given["copied"]),
        below=seen_in([own or "" for own in floor]),
        below_prompts=["a"] * 3,
        below_roles=["subject"] * 3,
        below_units=["a"] * 3,
        encoders=Encoders("standard", identity=absent, clip=absent, dino=absent),
    )
    return find_alarms(evidence, given["scores"], given["ceilings"], pictures)


def test_good_pictures_raise_no_alarm():
    assert alarms() == []
    assert alarms(ceilings={"identity": Score(value=0.15, n=6, interval=(0.1, 0.25))}) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"copied": [False, True, False]},
            "1 pictures repeat photos of the subject, first 1.png",
        ),
        ({"missed": [False, True, True]}, "2 pictures show no face, first 1.png"),
        ({"flat": [True, True, False]}, "2 pictures are one plain colour, first 0.png"),
        ({"prints": ["a", "b", "a"]}, "1 pictures are copies of others, first 2.png"),
        ({"floor_prints": ["z", None, "c"]}, "1 pictures are the base model's own, first 2.png"),
        ({"values": [0.25, 0.25, 0.25 + 1e-9]}, "identity is 0.250000 for every picture"),
        (
            {"ceilings": {"identity": Score(value=0.1, n=6, interval=(0.05, 0.15))}},
            "identity is 0.200, above the ceiling of 0.150",
        ),
        ({"ceilings": {"identity": Score(value=0.1, n=2)}}, "above the ceiling of 0.100"),
    ],
)
def test_each_sign_of_a_mistake_is_named(changed, message):
    (found,) = alarms(**changed)
    assert message in found


def test_that_every_picture_passes_is_no_alarm():
    pictures = [
        PictureScores(
            file=f"{i}.png",
            prompt="a",
            category="",
            seed=i,
            scheduler="ddim",
            steps=5,
            values={"verified": 1.0},
        )
        for i in range(3)
    ]
    assert alarms(scores={"verified": Score(value=1.0, n=3)}, pictures=pictures) == []


def test_the_threshold_lets_one_impostor_in_a_hundred_pass():
    impostors = np.random.default_rng(0).normal(size=1000)
    threshold = calibrate_threshold(impostors)
    assert (impostors > threshold).sum() == 9
    assert (impostors >= threshold).mean() == pytest.approx(0.01)
    assert calibrate_threshold(impostors[:20]) == impostors[:20].max()
    with pytest.raises(ValueError, match="needs 20 pictures of others, got 19"):
        calibrate_threshold(impostors[:19])


def test_the_nearest_decides():
    similar = torch.tensor([[0.2, 0.9], [0.1, 0.3], [0.5, 0.5]])
    others = torch.tensor([[0.8, 0.1], [0.8, -torch.inf], [-torch.inf, 0.5]])
    assert is_nearest(similar, others).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="photos and pictures of others"):
        is_nearest(similar, others[:, :0])


def test_a_picture_that_fits_its_own_prompt_best_is_found():
    fits = torch.tensor([[0.3, 0.2, 0.1], [0.3, 0.2, 0.1], [0.1, 0.1, 0.4]])
    assert is_own_prompt_best(fits, torch.tensor([0, 1, 2])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="two different prompts"):
        is_own_prompt_best(fits[:, :1], torch.tensor([0, 0, 0]))


def test_drift_is_nothing_for_the_same_picture_and_one_for_the_opposite():
    before = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    assert drift(before=before, after=3 * before).abs().max() < 1e-7
    assert drift(before=before, after=-before) == pytest.approx(1.0)
    assert drift(before=before, after=before.roll(1, 0)).min() > 0


def test_other_looks_are_told_from_what_a_style_or_a_hat_changes():
    assert asks_for_other_looks("attribute", ("hair", "surface"))
    assert asks_for_other_looks("attribute", ("age", "hair", "skin"))
    assert not asks_for_other_looks("attribute", ("expression", "teeth"))
    assert not asks_for_other_looks("style", ("eyes", "hair", "skin"))
    assert not asks_for_other_looks("accessory", ("hair", "hat"))
    assert not asks_for_other_looks("attribute", None)


def test_roles_are_read_from_prompts_and_packs():
    prompts = ("a photo of RRAJ person", "a photo of a person", "an old man", "two personalities")
    roles = assign_roles(prompts, ("", "", "class", ""), "rraj person", "person")
    assert roles == ["subject", "class", "class", "other"]
    # Where nobody is named, nothing is known of the pictures.
    assert assign_roles(("", ""), ("", ""), "rraj person", "person") == ["subject"] * 2
    assert assign_roles(prompts[1:], ("",) * 3, "rraj person", "person") == ["subject"] * 3
