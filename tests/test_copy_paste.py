"""Nearer to taught photos than to held-out ones: who repeats them is told from who draws."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from dreamloom.core.config.loading import load_config, to_toml
from dreamloom.core.config.settings import EvaluateConfig, LoomConfig, SubjectConfig
from dreamloom.core.events import StageSkipped
from dreamloom.core.manifests import ImageSet, PhotoSet, Picture, write_manifest
from dreamloom.core.run_folder import RunFolder, fingerprint, write_text
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.copy_paste import PhotoGaps, find_copy_paste, measure_photo_gaps
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.evaluation.scoring import (
    EvaluationOptions,
    PartedPhotos,
    evaluate_images,
    pick_encoders,
)
from dreamloom.picturebook.world import vary
from dreamloom.pipeline import score as scoring
from dreamloom.pipeline.score_set import (
    evaluate_run,
    find_held_out,
    name_held_out,
    read_scorecards,
)
from dreamloom.pipeline.train import make_judge
from dreamloom.report.story import read_story
from dreamloom.report.tables import score_table
from studio_set import claimed
from tools.picturebook.drawing import draw
from tools.picturebook.trial_people import choose_people, photo_records

OPTIONS = EvaluationOptions(resamples=200, detectors=False)
WORDS = SubjectWords("rraj person", "person")
CONFIG = EvaluateConfig(resamples=200, detectors=False, encoders="picturebook")
HELD = 2
PLACES = ("", " in the snow", " in a city", " on a beach", " in a forest", " at night")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return pick_encoders("picturebook", "picturebook", "cpu")


@pytest.fixture(scope="module")
def person() -> Any:
    return choose_people(4)[3]


@pytest.fixture(scope="module")
def folder(person: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, record in enumerate(photo_records(person, 0, 6)):
        draw(record, 128).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    return load_photos(folder, claimed(tmp_path_factory.mktemp("loaded")), 128)


def as_set(folder: Path, images: list[Image.Image]) -> ImageSet:
    folder.mkdir(parents=True)
    pictures = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        prompt = f"a photo of rraj person{PLACES[number % len(PLACES)]}"
        how = {"scheduler": "ddim", "steps": 1, "guidance": 1.0}
        pictures.append(
            Picture(file=f"{number}.png", prompt=prompt, seed=number // len(PLACES), **how)
        )
    base = {"name": "picturebook"}
    made = ImageSet(folder=folder, base=base, resolution_px=128, pictures=tuple(pictures))
    write_manifest(made)
    return made


@pytest.fixture(scope="module")
def honest(person: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    rng = random.Random(1)
    drawn = [draw(vary(person, rng, medium="photo"), 128) for _ in range(12)]
    return as_set(tmp_path_factory.mktemp("honest") / "pictures", drawn)


def copy(photos: PhotoSet, folder: Path, first: int, last: int) -> ImageSet:
    """Repeat photos, each a little brighter or darker."""
    some = [Image.open(path).convert("RGB") for path in photos.paths()[first:last]]
    rng = random.Random(2)
    return as_set(
        folder,
        [
            ImageEnhance.Brightness(some[number % len(some)]).enhance(rng.uniform(0.9, 1.1))
            for number in range(12)
        ],
    )


def score(images: ImageSet, photos: PhotoSet, encoders: Encoders, **given: Any) -> Scorecard:
    held_out = name_held_out(photos, given.pop("held", HELD))
    parted = PartedPhotos(photos, held_out)
    return evaluate_images(
        images, parted, subject=WORDS, encoders=encoders, options=OPTIONS, **given
    )


def test_who_copies_scores_high_and_who_draws_near_0(
    honest: ImageSet, photos: PhotoSet, encoders: Encoders, tmp_path: Path
) -> None:
    drawn = score(honest, photos, encoders)
    copied = score(copy(photos, tmp_path / "copies", 0, 4), photos, encoders)
    mine, theirs = drawn.copy_paste, copied.copy_paste
    assert mine is not None
    assert theirs is not None
    assert abs(mine.value) < mine.ceiling
    assert theirs.value > 2 * abs(mine.value)
    assert theirs.value > mine.ceiling == theirs.ceiling
    assert theirs.interval[0] > 0
    assert (theirs.n, theirs.note) == (12, "4 photos taught, 2 held out")
    assert theirs.lift is None
    told = "what was taught is repeated"
    assert any(told in text for text in copied.alarms)
    assert not any(told in text for text in drawn.alarms)


def test_who_copies_what_was_held_out_is_on_the_other_side(
    photos: PhotoSet, encoders: Encoders, tmp_path: Path
) -> None:
    found = score(copy(photos, tmp_path / "copies", 4, 6), photos, encoders).copy_paste
    assert found is not None
    assert found.value < 0
    assert find_copy_paste(found) == ""


def test_the_value_is_that_of_the_plain_formula_beside_its_floor(
    honest: ImageSet, photos: PhotoSet, encoders: Encoders, tmp_path: Path
) -> None:
    floor = copy(photos, tmp_path / "floor", 4, 6)
    found = score(honest, photos, encoders, floor=floor).copy_paste
    assert found is not None

    def embed(paths: list[Path]) -> Any:
        rows = encoders.identity.embed([Image.open(path).convert("RGB") for path in paths])  # type: ignore[union-attr]
        return torch.nn.functional.normalize(rows.double(), dim=1)

    known = embed(photos.paths())
    chance = measure_photo_gaps((known @ known.T).numpy(), HELD, 0.95)

    def gap(images: ImageSet) -> float:
        near = embed(images.paths()) @ known.T
        return float((near[:, :4].amax(1) - near[:, 4:].amax(1)).mean()) - chance.expected

    assert found.value == pytest.approx(gap(honest), abs=1e-6)
    assert found.floor == pytest.approx(gap(floor), abs=1e-6)
    assert found.ceiling == pytest.approx(chance.spread, abs=1e-6)


# ------------------------------------------------------------------ what cannot be told


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (0, "no photo was held out from training; validation.held_out_photos holds some out"),
        (6, "no taught photo shows a face"),
    ],
)
def test_without_both_kinds_of_photos_it_is_null_with_the_reason(
    honest: ImageSet, photos: PhotoSet, encoders: Encoders, held: int, words: str
) -> None:
    card = score(honest, photos, encoders, held=held)
    assert card.copy_paste == Score(note=f"not measured: {words}")
    written = Scorecard.model_validate_json(card.model_dump_json())
    assert written.copy_paste == card.copy_paste


def test_without_its_encoder_it_is_not_measured(
    honest: ImageSet, photos: PhotoSet, encoders: Encoders
) -> None:
    absent = Missing("its weights are not here")
    blind = Encoders("standard", identity=absent, clip=encoders.clip, dino=absent)
    card = score(honest, photos, blind)
    assert card.copy_paste == Score(note="not measured: its weights are not here")


def test_two_photos_are_too_few(honest: ImageSet, photos: PhotoSet, encoders: Encoders) -> None:
    two = photos.model_copy(update={"photos": photos.photos[:2]})
    card = score(honest, two, encoders, held=1)
    assert card.copy_paste == Score(note="not measured: it needs three photos or more")


def test_a_card_of_before_is_written_as_it_was() -> None:
    rest = {"photos": 3, "confidence": 0.95, "resamples": 100, "pictures": ()}
    card = Scorecard(scores={}, encoders="picturebook", **rest)
    assert "copy_paste" not in card.model_dump()
    assert "copy_paste" not in card.all_scores
    assert fingerprint(card) == fingerprint(Scorecard.model_validate_json(card.model_dump_json()))


def test_an_alarm_takes_a_gap_above_the_photos_and_an_interval_above_0() -> None:
    assert find_copy_paste(Score()) == ""
    assert find_copy_paste(Score(value=0.05, ceiling=0.1)) == ""
    assert find_copy_paste(Score(value=0.2, ceiling=0.1, interval=(-0.1, 0.5))) == ""
    assert find_copy_paste(Score(value=0.2, ceiling=0.1, interval=(0.1, 0.3))).startswith(
        "Pictures are nearer to the photos that were taught than to those held out, by 0.200 "
        "(0.100 to 0.300) more than photos that repeat nothing, whose own spread is 0.100"
    )


# ------------------------------------------------------------------ the spread among photos


@given(st.integers(3, 6), st.integers(0, 20), st.data())
def test_chance_is_what_every_choice_makes_of_the_photos(count: int, seed: int, data: Any) -> None:
    """By hand: every photo against the others, whoever is held out."""
    held = data.draw(st.integers(1, count - 1))
    features = np.random.default_rng(seed).normal(size=(count, 5))
    features /= np.linalg.norm(features, axis=1)[:, None]
    similar = features @ features.T
    found = []
    for choice in combinations(range(count), held):
        gaps = []
        for one in range(count):
            near = [similar[one, k] for k in range(count) if k != one and k not in choice]
            far = [similar[one, k] for k in choice if k != one]
            if near and far:
                gaps.append(max(near) - max(far))
        found.append(np.mean(gaps))
    chance = measure_photo_gaps(similar, held, 1.0)
    assert chance.expected == pytest.approx(np.mean(found))
    assert chance.spread == pytest.approx(max(found) - np.mean(found))
    assert measure_photo_gaps(similar, held, 0.5).spread <= chance.spread


def test_photos_that_are_all_alike_have_no_gap_and_of_many_some_choices_do() -> None:
    assert measure_photo_gaps(np.full((5, 5), 0.5), 2, 0.95) == PhotoGaps(0.0, 0.0)
    many = np.random.default_rng(0).uniform(size=(30, 30))
    first, again = (measure_photo_gaps(many, 10, 0.95) for _ in range(2))
    assert first == again
    # Twenty are taught and ten held out: the nearest of more is nearer.
    assert first.expected > 0
    assert first.spread > 0
    with pytest.raises(ValueError, match="of 2 photos 1 cannot be held out"):
        measure_photo_gaps(np.eye(2), 1, 0.95)
    with pytest.raises(ValueError, match="of 5 photos 5 cannot be held out"):
        measure_photo_gaps(np.eye(5), 5, 0.95)


# ------------------------------------------------------------------ in a run


def a_run(folder: Path, photos_folder: Path, held: int) -> tuple[RunFolder, PhotoSet]:
    run = RunFolder(folder)
    run.claim()
    config = load_config(sets=(f"validation.held_out_photos={held}", "validation.every=1"))
    write_text(run.settings_file, to_toml(config))
    return run, load_photos(photos_folder, run, 128)


def test_a_run_knows_its_held_out_photos_and_the_report_shows_the_score(
    honest: ImageSet, folder: Path, encoders: Encoders, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(scoring, "pick_encoders", lambda *_: encoders)
    run, _ = a_run(tmp_path / "run", folder, HELD)
    shown = as_set(run.images / "pictures", [Image.open(path) for path in honest.paths()])
    config = LoomConfig(evaluate=CONFIG, subject=SubjectConfig(phrase="rraj person"))
    card = scoring.score(shown.folder, folder, config)
    assert card.copy_paste is not None
    assert card.copy_paste.note == "4 photos taught, 2 held out"
    assert read_scorecards(run)["pictures"] == card
    (block,) = [
        one for one in score_table(read_story(run.path).scores(), {}) if one.label == "Copy-paste"
    ]
    assert block.rows[0][2] == card.copy_paste
    # Outside a run the settings say it.
    told = config.model_copy(
        update={"validation": config.validation.model_copy(update={"held_out_photos": 1})}
    )
    elsewhere = scoring.score(honest.folder, folder, told)
    assert elsewhere.copy_paste is not None
    assert elsewhere.copy_paste.note == "5 photos taught, 1 held out"


def test_scores_of_before_stay_valid_where_no_photo_was_held_out(
    honest: ImageSet, photos: PhotoSet, folder: Path, encoders: Encoders, tmp_path: Path
) -> None:
    run, told = claimed(tmp_path), []
    words = SubjectConfig(phrase="rraj person")
    how = {"config": CONFIG, "subject": words, "encoders": encoders, "observe": told.append}
    evaluate_run(run, honest, photos, **how)
    record = run.read_record("evaluate-pictures")
    assert record is not None
    assert "held-out photos" not in record.inputs
    evaluate_run(run, honest, photos, **how)
    assert isinstance(told[-1], StageSkipped)
    # The run's own settings say that one was, and then the score is due.
    a_run(tmp_path, folder, 1)
    assert find_held_out(run, photos) == name_held_out(photos, 1)
    held = evaluate_run(run, honest, photos, **how)
    assert held.copy_paste is not None
    assert held.copy_paste.measured


def test_validations_hold_the_same_photos_out_as_training(
    honest: ImageSet, photos: PhotoSet, tmp_path: Path
) -> None:
    sets = ("validation.held_out_photos=1", "evaluate.resamples=100", "evaluate.detectors=false")
    card = make_judge(photos, load_config(sets=sets), claimed(tmp_path))(honest, None)
    assert card.copy_paste is not None
    assert card.copy_paste.note == "5 photos taught, 1 held out"
