"""DreamBooth on trial: who is taught, what is compared with what, and what is made of it."""

import json
import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from dreamloom.core.config.loading import load_config
from dreamloom.core.events import Event, Progress
from dreamloom.core.manifests import ImageSet, Picture, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.tensors import to_tensor
from dreamloom.picturebook.class_prompts import CLASS_PROMPTS
from dreamloom.picturebook.judges import load_attribute_reader
from dreamloom.picturebook.world import (
    KNOWN_PERSONS,
    Identity,
    known_person,
    sample_drawing,
    vary,
)
from tools.picturebook import score, trial, trial_judging, trial_measures, trial_people, trial_rows
from tools.picturebook.drawing import draw
from tools.picturebook.measurements import Row, at_least
from tools.picturebook.obedience_front import FrontPoint, identity_at_obedience, measure_area
from tools.picturebook.trial import TrialPlan
from tools.picturebook.trial_appearance import Appearance, Deviation, judge_appearance
from tools.picturebook.trial_judging import Outcome, Subject
from tools.picturebook.trial_measures import ClassChange, Obedience, OthersChange
from tools.picturebook.trial_people import draw_held_out
from tools.picturebook.trial_prompts import ASKED, PLAIN, PORTRAIT, Ask, contradicting

PHRASE = "rraj person"


def outcome(**changed: object) -> Outcome:
    """A subject with which everything went well, but for what is said."""
    plain = Outcome(
        looks="somebody",
        lift=0.9,
        lift_on_photos=0.9,
        asked=Obedience([0, 0, 1, 1], [1.0] * 4, [1.0] * 4),
        contradicting=Obedience([0, 1], [1.0, 1.0], [1.0, 1.0]),
        left_out=[False, True],
        kept=0.8,
        appearance=Appearance(Deviation(1.0, 2.0, -0.1, 0.2), [False] * 4, 0.5, 0.5),
        of_class=ClassChange(
            0.1, 0.1, [0, 0, 1, 1], [0.1] * 4, [1.0] * 4, ["red", "gray"], ["gray", "red"]
        ),
        others=OthersChange([True] * 4, [1.0] * 4),
        rises={},
        front={},
    )
    return replace(plain, **changed)


# --- who is taught -----------------------------------------------------------------------


@cache
def person(number: int = 0) -> Identity:
    return trial_people.choose_people(number + 1)[number]


def test_the_people_look_different_and_nobody_was_trained_on():
    people = trial_people.choose_people(5)
    for look in ("hair", "style", "skin"):
        assert len({getattr(person, look) for person in people}) == 5
    known = {known_person(index)[1] for index in range(KNOWN_PERSONS)}
    assert not known.intersection(people)
    assert trial_people.choose_people(7)[:5] == people


def test_photos_show_one_person_with_nothing_on_in_several_places():
    records = trial_people.photo_records(person(), 0, 6)
    assert records == trial_people.photo_records(person(), 0, 6)
    assert {record.identity for record in records} == {person()}
    assert {(record.medium, record.glasses, record.hat) for record in records} == {
        ("photo", "none", "none")
    }
    assert [record.view for record in records].count("side") == 1
    assert len({record.scene for record in records}) == 5
    assert len({record.stroke_seed for record in records}) == 6


def test_held_out_drawings_show_what_is_asked_and_the_same_person_otherwise():
    drawn = draw_held_out(person(), 3, {"medium": "painting", "hat": "cap"}, {"hair": "blue"})
    assert len({image.tobytes() for image in drawn}) == 3
    for seen in load_attribute_reader().read(to_tensor(drawn)):
        shown = {name: seen[name] for name in ("medium", "hat", "glasses", "hair", "beard")}
        assert shown == {
            "medium": "painting",
            "hat": "cap",
            "glasses": "none",
            "hair": "blue",
            "beard": person().beard,
        }


# --- what is asked for -------------------------------------------------------------------


def test_prompts_ask_for_what_the_reader_knows_and_most_leave_alone_who_it_is():
    vocabulary = load_attribute_reader().vocabulary
    for ask in [*ASKED, *contradicting(person())]:
        assert ask.text.count("{subject}") == 1
        assert all(value in vocabulary[name] for name, value in ask.wanted.items())
        assert set(ask.shown) <= {"scene", "medium", "glasses", "hat", "view"}
    assert not any(ask.changed for ask in ASKED)
    kinds = {ask.category for ask in ASKED}
    assert kinds == {"scene", "medium", "view", "accessory", "combination"}


@pytest.mark.parametrize("number", range(9))
def test_everybody_is_asked_for_other_looks_than_their_own(number: int):
    somebody = person(number)
    asks = contradicting(somebody)
    assert len({ask.text for ask in asks}) == 5
    for ask in asks:
        assert getattr(somebody, ask.contradicts) != ask.wanted[ask.contradicts]
        bald = ask.contradicts == "hair" and somebody.style == "bald"
        assert set(ask.changed) == {ask.contradicts} | ({"style"} if bald else set())
    assert [ask.contradicts for ask in asks] == ["hair"] * 4 + ["beard"]


def test_class_prompts_never_teach_what_they_are_said_to_leave_out():
    taught = " ".join(CLASS_PROMPTS)
    everybody = [ask for number in range(9) for ask in contradicting(person(number))]
    for ask in [*ASKED, *everybody]:
        if ask.left_out:
            words = ("blue hair", "a cap", "beard", "mustache")
            assert any(word in ask.text for word in words)
            assert not any(word in taught for word in words)
        elif ask.contradicts:
            assert f"{ask.wanted['hair']} hair" in taught


# --- what is compared with what ----------------------------------------------------------


def save(folder: Path, drawn: Mapping[str, Sequence[Image.Image]]) -> ImageSet:
    """Save pictures of prompts, as if they had been drawn from these."""
    folder.mkdir(parents=True)
    pictures = []
    for prompt, images in drawn.items():
        for seed, image in enumerate(images):
            file = f"{len(pictures)}.png"
            image.save(folder / file)
            one = Picture(
                file=file, prompt=prompt, seed=seed, scheduler="ddim", steps=1, guidance=1.0
            )
            pictures.append(one)
    return ImageSet(
        folder=folder, base={"name": "picturebook"}, resolution_px=128, pictures=tuple(pictures)
    )


def subject(number: int = 0, held_out: int = 8) -> Subject:
    photos = [draw(record) for record in trial_people.photo_records(person(number), number, 6)]
    return Subject(person(number), PHRASE, photos, held_out)


def draw_asked(somebody: Identity, ask: Ask, count: int = 4, **worn: str) -> list[Image.Image]:
    """Draw as an adapter would that knows somebody and obeys; other moments than held-out ones."""
    rng = random.Random(f"pictures {ask.text}")
    who = replace(somebody, **ask.changed)
    fixed = {"medium": "photo", "glasses": "none", "hat": "none", **ask.shown, **worn}
    return [draw(vary(who, rng, **fixed)) for _ in range(count)]


def crowd(count: int, start: int = 9_600_000) -> list[Image.Image]:
    return [
        draw(sample_drawing(start + number, kind="person", medium="photo"))
        for number in range(count)
    ]


def test_true_likeness_is_lifted_to_drawings_and_impostors_are_not(tmp_path: Path):
    one, prompt = subject(), PORTRAIT.format(subject=PHRASE)
    drawings = {prompt: trial_measures.embed(one.draw(PLAIN))}
    base = save(tmp_path / "base", {prompt: crowd(8)})
    own, strange = (
        save(tmp_path / str(number), {prompt: draw_asked(person(number), PLAIN, 8)})
        for number in (0, 1)
    )
    lifts = [
        trial_measures.measure_lift([images], [base], drawings) for images in (own, strange, base)
    ]
    assert lifts[0] == pytest.approx(1, abs=0.15)
    assert lifts[1] < 0.3
    assert lifts[2] == 0
    assert trial_judging.lift_on_photos(one.photos, own, base) == pytest.approx(1, abs=0.15)


def test_obedience_is_read_from_the_pictures(tmp_path: Path):
    wanted = {ask.text: ask.wanted for ask in ASKED}
    obeying = save(tmp_path / "obeying", {a.text: draw_asked(person(), a, 1) for a in ASKED})
    # The city, bare-headed and from the front, whatever was asked for.
    [bare] = [draw(record) for record in trial_people.photo_records(person(), 0, 1)]
    stubborn = save(tmp_path / "stubborn", {ask.text: [bare] for ask in ASKED})
    found = trial_measures.judge_obedience(stubborn, obeying, wanted)
    assert min(found.shares_below) == 1
    assert found.prompts == [*range(len(ASKED))]
    shares = dict(zip(wanted, found.shares, strict=True))
    assert shares["a photo of {subject} in the snow"] == 0.5
    assert shares["a painting of {subject} in the style of Van Gogh"] == 0


def test_whoever_keeps_the_own_hair_is_disobedient_and_strangers_keep_no_face(tmp_path: Path):
    one = subject(2)
    drawings = {one.word(ask): trial_measures.embed(one.draw(ask)) for ask in one.asks}
    wanted = {one.word(ask): {ask.contradicts: ask.wanted[ask.contradicts]} for ask in one.asks}

    def draw_all(name: str, somebody: Identity, obeying: bool = True) -> ImageSet:
        asks = [ask if obeying else replace(ask, changed={}) for ask in one.asks]
        return save(tmp_path / name, {one.word(a): draw_asked(somebody, a, 2) for a in asks})

    base = save(
        tmp_path / "base",
        {one.word(ask): crowd(2, 9_610_000 + 2 * place) for place, ask in enumerate(one.asks)},
    )
    for name, number, obeying, share, least, most in (
        ("right", 2, True, 1.0, 0.8, 1.2),
        ("own hair", 2, False, 0.0, 0.2, 0.9),
        ("stranger", 3, True, 1.0, -0.5, 0.5),
    ):
        drawn = draw_all(name, person(number), obeying)
        assert np.mean(trial_measures.read_obedience(drawn, wanted)) == pytest.approx(
            share, abs=0.11
        )
        assert least < trial_measures.measure_lift([drawn], [base], drawings) < most


def test_tinted_and_blurred_portraits_are_off_and_drawings_are_not():
    drawings = draw_held_out(person(), 6, {}, {})
    # As the autoencoder leaves them: a little soft.
    shown = draw_asked(person(), PLAIN, 6, scene="city")
    soft = [image.filter(ImageFilter.GaussianBlur(0.55)) for image in shown]
    orange = [Image.blend(image, Image.new("RGB", image.size, "orange"), 0.25) for image in soft]
    blurred = [image.filter(ImageFilter.GaussianBlur(2)) for image in soft[:1]] * 6
    found, tinted, dull = (
        judge_appearance(person(), images, images, drawings) for images in (soft, orange, blurred)
    )
    assert found.off.colour < found.off.colour_limit
    assert abs(found.off.sharpness) < found.off.sharpness_limit
    assert tinted.off.colour > tinted.off.colour_limit
    assert dull.off.sharpness < -dull.off.sharpness_limit
    assert not any(found.unfamiliar)
    assert found.variety > 0.3 * found.variety_drawn
    assert dull.variety == pytest.approx(0, abs=1e-6)


def test_the_base_models_own_class_has_not_moved_and_any_other_persons_have(tmp_path: Path):
    base = [save(tmp_path / name, {name: crowd(4, 9_620_000)}) for name in ("plain", "snow")]
    unchanged = trial_measures.judge_class((base[0], base[1]), (base[0], base[1]))
    assert unchanged.distances == pytest.approx([0] * 8, abs=1e-6)
    assert unchanged.colours == [0] * 8
    assert unchanged.spread == unchanged.spread_below
    assert unchanged.prompts == [0] * 4 + [1] * 4
    assert unchanged.hair == unchanged.hair_below
    # All are one person, whoever that is: not the subject.
    [narrow, other] = [
        save(tmp_path / f"one-{name}", {name: draw_asked(person(4), PLAIN)})
        for name in ("plain", "snow")
    ]
    moved = trial_measures.judge_class((narrow, other), (base[0], base[1]))
    assert np.mean(moved.distances) > 0.5
    assert np.mean(moved.colours) > 1
    assert moved.spread > moved.spread_below + 0.3
    assert moved.hair == [person(4).hair] * 4 != moved.hair_below


def test_other_classes_that_become_persons_are_seen(tmp_path: Path):
    dogs = [draw(sample_drawing(9_630_000 + i, kind="dog", medium="photo")) for i in range(4)]
    base = save(tmp_path / "dogs", {"a dog": dogs})
    people = save(tmp_path / "people", {"a dog": crowd(4)})
    kept = trial_measures.judge_others(base, base, {"a dog": "dog"})
    assert (kept.read, kept.colours) == ([True] * 4, [0] * 4)
    assert trial_measures.judge_others(people, base, {"a dog": "dog"}).read == [False] * 4


def test_partners_have_the_same_prompt_and_seed(tmp_path: Path):
    one, two = crowd(2)
    base = save(tmp_path / "base", {"a": [one, two], "b": [two, one]})
    own = save(tmp_path / "own", {"b": [one]})
    assert [(p.prompt, p.seed) for p in trial_measures.pair_up(own, base).pictures] == [("b", 0)]


# --- the front ---------------------------------------------------------------------------


def test_the_front_is_better_where_more_is_obeyed_at_equal_likeness():
    base = FrontPoint(0, 0.0, 1.0)
    stubborn = [base, FrontPoint(0.5, 0.5, 0.5), FrontPoint(1, 1.0, 0.0)]
    assert measure_area(stubborn) == pytest.approx(0.5, abs=0.01)
    obedient = [base, FrontPoint(0.5, 0.5, 0.9), FrontPoint(1, 1.0, 0.8)]
    assert measure_area(obedient) > measure_area(stubborn) + 0.3
    assert identity_at_obedience(obedient) > identity_at_obedience(stubborn) + 0.3
    # A further weight that is worse in both takes nothing away, and order does not matter.
    worse = FrontPoint(1.5, 0.9, 0.1)
    assert measure_area([worse, *obedient]) == pytest.approx(measure_area(obedient), abs=0.01)
    assert measure_area(obedient[::-1]) == measure_area(obedient)


def test_the_front_of_one_point_is_a_rectangle_and_of_none_an_error():
    assert measure_area([FrontPoint(1, 0.5, 0.8)]) == pytest.approx(0.4, abs=0.01)
    assert identity_at_obedience([FrontPoint(1, 0.9, 0.5)]) == 0
    with pytest.raises(ValueError, match="at least one point"):
        measure_area([])


# --- the rows ----------------------------------------------------------------------------


def find(outcomes: Sequence[Outcome], name: str) -> Row:
    [row] = [row for row in trial_rows.trial_rows(outcomes) if name in row.name]
    return row


def test_the_lift_is_the_median_and_copying_is_what_photos_have_above_drawings():
    lifts = (0.95, 0.1, 0.86, 0.9, 0.5)
    row = find([outcome(lift=value) for value in lifts], "median identity lift")
    assert (row.value, row.n, row.holds) == (0.86, 5, True)
    assert row.interval is not None
    assert row.interval[0] < 0.86 < row.interval[1]
    row = find([outcome(lift=0.7), outcome(lift=0.8)], "lift on the photos")
    assert (row.value, row.holds) == (0.15, False)


def test_attributes_lost_are_counted_against_the_base_model():
    lost = Obedience([0, 0, 1, 1], [0.8] * 4, [0.95] * 4)
    row = find([outcome(asked=lost), outcome()], "attributes lost")
    assert (row.value, row.n, row.holds) == (0.075, 8, False)
    better = Obedience([0, 0, 1, 1], [1.0] * 4, [0.9] * 4)
    assert find([outcome(asked=better)] * 2, "attributes lost").holds
    none = find([outcome()] * 2, "attributes lost")
    assert none.value == 0
    assert none.interval is not None
    assert none.interval[1] > 0.3


def test_contradictions_are_told_apart_by_whether_class_prompts_ask_for_them():
    torn = outcome(contradicting=Obedience([0, 1], [1.0, 0.0], [1.0, 1.0]), kept=0.4)
    row = find([torn, torn], "contradicting attributes obeyed")
    assert (row.value, row.n, row.holds) == (0.5, 4, False)
    assert "100.0% where class prompts ask for it, 0.0% where none does" in row.note
    assert not find([torn, torn], "lift where contradicted").holds
    sure = find([outcome(), outcome()], "contradicting attributes obeyed")
    assert sure.interval is not None
    # All of four is no certainty.
    assert sure.interval[0] < 0.6


def test_pictures_are_off_by_more_than_drawings_differ():
    haze = Appearance(Deviation(6.0, 2.0, -0.1, 0.2), [True] * 4, 0.1, 0.5)
    hazy = [outcome(appearance=haze), outcome(appearance=haze)]
    assert find(hazy, "colour within").value == 0
    assert "3.00, 3.00" in find(hazy, "colour within").note
    assert find([outcome(), *hazy, outcome()], "colour within").value == 0.5
    assert find(hazy, "sharpness within").holds
    for name in ("colour within", "unfamiliar", "variety"):
        assert not find(hazy, name).holds
        assert find([outcome()] * 2, name).holds


def test_the_class_must_not_move_in_any_direction_nor_narrow():
    hair = ["blue"] * 3 + ["red"], ["red"] * 3 + ["gray"]
    moved = ClassChange(0.3, 0.1, [0, 0, 1, 1], [0.9] * 4, [9.0] * 4, *hair)
    assert "hair blue in 75% instead of 0%" in find([outcome(of_class=moved)] * 2, "spread").note
    for name in ("class spread", "class distance"):
        assert find([outcome()] * 2, name).holds
        assert not find([outcome(of_class=moved)] * 2, name).holds
    wider = replace(moved, spread=-0.1)
    assert not find([outcome(of_class=wider)] * 2, "class spread").holds


def test_other_classes_are_counted_and_fronts_paired():
    lost = outcome(others=OthersChange([True, False] * 2, [1.0] * 4))
    assert find([lost, lost], "other classes").value == 0.5
    good = [FrontPoint(0, 0.0, 1.0), FrontPoint(1, 1.0, 1.0)]
    bad = [FrontPoint(0, 0.0, 1.0), FrontPoint(1, 1.0, 0.0)]
    better = outcome(front={"with_prior": good, "without_prior": bad})
    for name in ("area under the front", "identity at equal obedience"):
        row = find([better] * 3, name)
        assert row.n == 3
        assert row.holds
        worse = outcome(front={"with_prior": bad, "without_prior": good})
        assert not find([worse] * 3, name).holds


def test_leakage_is_a_ratio_of_rises_of_the_same_subjects():
    steady = {"without_prior": [0.5, 0.4, 0.6, 0.5], "with_prior": [0.2, 0.21, 0.19, 0.2]}
    row = trial_rows.leakage_row([outcome(rises=steady), outcome()])
    assert row.value == pytest.approx(2.5)
    assert row.holds
    assert row.n == 4


def test_a_rise_within_its_own_noise_does_not_make_a_large_ratio():
    noisy = {"without_prior": [0.1] * 4, "with_prior": [0.3, -0.3, 0.31, -0.3]}
    row = trial_rows.leakage_row([outcome(rises=noisy)])
    assert row.value is not None
    assert row.value < 1
    assert not row.holds
    assert "taken as" in row.note
    fallen = {"without_prior": [0.1] * 4, "with_prior": [-0.1] * 4}
    row = trial_rows.leakage_row([outcome(rises=fallen)])
    assert row.value is None
    assert not row.holds


# --- the whole trial ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tiny_sdxl: Path) -> TrialPlan:
    small = {
        "base": str(tiny_sdxl),
        "train.steps": 2,
        "train.rank": 2,
        "train.batch_photos": 2,
        "train.batch_priors": 2,
        "priors.count": 2,
        "priors.steps": 2,
        "generate.steps": (1,),
        "generate.images_per_prompt": 2,
    }
    few = trial.few_pictures(steps=1, held_out=2)
    return TrialPlan(load_config(overrides=small), 1, photos=3, front=(1.0,), **few)


@pytest.fixture(scope="module")
def tried(
    plan: TrialPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Outcome], list[Event]]:
    work, told = tmp_path_factory.mktemp("trial"), list[Event]()
    with ThreadPoolExecutor(1) as pool:
        return work, trial.run_trial(pool, work, plan, told.append), told


@pytest.mark.slow  # teaches and draws four times
def test_a_trial_judges_everybody_in_every_row(tried):
    _, outcomes, told = tried
    for one in outcomes:
        assert len(one.asked.shares) == len(one.asked.shares_below) == len(ASKED)
        assert len(one.contradicting.shares) == len(one.left_out) == 5
        assert {how: len(rises) for how, rises in one.rises.items()} == {
            "with_prior": 3,
            "without_prior": 3,
        }
        assert [point.weight for point in one.front["with_prior"]] == [1.0, 0.0]
        assert one.front["without_prior"][1] == one.front["with_prior"][1]
        assert one.front["with_prior"][1].identity == 0
    rows = trial_rows.trial_rows(outcomes)
    assert len({row.name for row in rows}) == len(rows) == 15
    assert all(row.n for row in rows)
    assert told[-1] == Progress("trial", "teaching and drawing", 4, 4)


def test_without_a_front_only_some_are_taught_without_class_images(plan: TrialPlan):
    ways = [replace(plan, front=(), forgetful=1).ways_of(number) for number in (0, 1)]
    assert ways == [["with_prior", "without_prior"], ["with_prior"]]
    assert plan.ways_of(1) == ["with_prior", "without_prior"]


@pytest.mark.slow  # teaches and draws four times
def test_both_ways_are_taught_alike_but_for_class_images(tried):
    work, _, _ = tried
    runs = [RunFolder(work / "subject-0" / how) for how in ("with_prior", "without_prior")]
    records = [run.read_record("train") for run in runs]
    assert [record.inputs["class images"] == "none" for record in records] == [False, True]
    assert len({record.inputs["photos"] for record in records}) == 1
    assert len({record.results["photo_exposures"] for record in records}) == 1
    assert {record.seed for record in records} == {0}


@pytest.mark.slow  # teaches and draws four times
def test_the_base_model_draws_all_that_adapters_draw_for_more_people_too(tried):
    work, _, _ = tried

    def plan_of(run: str, name: str) -> set[tuple[str, int]]:
        pictures = read_image_set(work / run / "images" / name).pictures
        return {(picture.prompt, picture.seed) for picture in pictures}

    assert plan_of("base", "portrait-0") == plan_of("subject-0/with_prior", "portrait")
    for name in ("asked", "class", "class-asked", "others"):
        assert plan_of("base", name) == plan_of("subject-0/with_prior", name)
    drawn = {prompt for prompt, _ in plan_of("base", "contradicting")}
    for somebody in trial_people.choose_people(trial.MOST_SUBJECTS):
        assert {ask.text.format(subject=PHRASE) for ask in contradicting(somebody)} <= drawn


@pytest.mark.slow  # teaches and draws four times
def test_a_trial_is_gone_on_with(plan: TrialPlan, tried, monkeypatch: pytest.MonkeyPatch):
    work, outcomes, _ = tried
    # Nothing is kept of judging, which takes seconds.
    monkeypatch.setattr(trial, "judge", lambda work, plan, number: outcomes[number])
    files = [*work.rglob("*.safetensors"), *work.glob("*/**/images/*/*.png")]
    before = {file: file.stat().st_mtime_ns for file in files}
    with ThreadPoolExecutor(1) as pool:
        again = trial.run_trial(pool, work, plan)
    assert again == outcomes
    assert {file: file.stat().st_mtime_ns for file in files} == before


# --- the program -------------------------------------------------------------------------


@pytest.fixture
def tried_plans() -> list[TrialPlan]:
    return []


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tried_plans: list[TrialPlan]) -> CliRunner:
    def measure(pool: Executor, quick: bool) -> list[Row]:
        return [at_least("brightness", 31.0 if quick else 29.0, 30.0, 12, (28.5, 29.5))]

    def train_subject(pool: Executor, work: Path, plan: TrialPlan, *more: object) -> list[Outcome]:
        tried_plans.append(plan)
        return [outcome(rises={"without_prior": [0.4, 0.5], "with_prior": [0.1, 0.1]})] * 2

    monkeypatch.setattr(score, "score_model", measure)
    monkeypatch.setattr(score, "run_trial", train_subject)
    monkeypatch.setattr(score, "open_pool", lambda processes: nullcontext(None))
    return CliRunner()


def test_the_program_prints_every_row_and_writes_it(program: CliRunner, tmp_path: Path):
    file = tmp_path / "score.json"
    done = program.invoke(score.main, ["--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["holds"] for row in rows] == [False] + [True] * 13
    for row in rows:
        assert {"name", "value", "goal", "holds"} <= row.keys()
        assert row["name"] in done.output
    assert "n = 12; 28.5000 to 29.5000" in done.output
    assert "model:" in done.output
    assert "dreambooth:" in done.output


def test_the_program_measures_one_group_alone(program: CliRunner):
    done = program.invoke(score.main, ["--only", "dreambooth"])
    assert "leakage" in done.output
    assert "brightness" not in done.output
    done = program.invoke(score.main, ["--only", "model", "--quick"])
    assert "31.0000" in done.output
    assert "leakage" not in done.output


def test_the_program_takes_settings_subjects_and_a_front(program: CliRunner, tried_plans):
    given = ["--only", "dreambooth", "--set", "train.rank=3", "--set", "priors.prompts=[]"]
    done = program.invoke(score.main, [*given, "--subjects", "3", "--front"])
    assert done.exit_code == 0, done.output
    assert program.invoke(score.main, [*given, "--quick"]).exit_code == 0
    standard, quick = tried_plans
    assert (standard.subjects, quick.subjects) == (3, 2)
    for plan in tried_plans:
        assert (plan.config.train.rank, plan.config.priors.prompts) == (3, ())
    assert standard.front == (0.4, 0.6, 0.8, 1.0, 1.2)
    assert quick.front == ()
    wrong = program.invoke(score.main, ["--only", "dreambooth", "--set", "train.rang=3"])
    assert wrong.exit_code == 1
    assert "train.rank" in wrong.output


def test_nothing_goes_on_working_when_measuring_fails():
    began = time.monotonic()
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    bystander.start()
    with pytest.raises(KeyboardInterrupt), score.open_pool(1) as pool:  # noqa: PT012
        for _ in range(3):
            pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    # Only the pool's own processes end.
    assert multiprocessing.active_children() == [bystander]
    assert time.monotonic() - began < 300
    bystander.terminate()
    bystander.join()


@pytest.mark.slow
def test_everything_can_be_measured_quickly(tmp_path: Path):
    file = tmp_path / "score.json"
    done = CliRunner().invoke(score.main, ["--quick", "--threads", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 28
    assert all(row["value"] is not None for row in rows)
