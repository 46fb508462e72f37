"""DreamBooth on trial: who is taught, what is compared with what, and what is made of it."""

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreamloom.core.config.loading import load_config
from dreamloom.core.events import Event, Progress
from dreamloom.core.manifests import ImageSet, Picture, read_image_set, write_manifest
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.picturebook.judges import load_attribute_reader
from dreamloom.picturebook.world import KNOWN_PERSONS, Drawing, known_person, sample_drawing
from tools.picturebook import score, trial
from tools.picturebook.drawing import draw
from tools.picturebook.measurements import Row, at_least
from tools.picturebook.trial import ASKED, Outcome, TrialPlan


def outcome(
    lift: float | None = 0.7,
    obeyed: float = 0.9,
    below: float = 0.9,
    rises: dict[str, list[float]] | None = None,
) -> Outcome:
    pictures = len(ASKED) * 2
    return Outcome(
        "somebody", Score(lift=lift), [obeyed] * pictures, [below] * pictures, rises or {}
    )


# --- who is taught -----------------------------------------------------------------------


def test_the_people_look_different_and_nobody_was_trained_on():
    people = trial.choose_people(5)
    for look in ("hair", "style", "skin"):
        assert len({getattr(person, look) for person in people}) == 5
    known = {known_person(index)[1] for index in range(KNOWN_PERSONS)}
    assert not known.intersection(people)
    assert trial.choose_people(7)[:5] == people


def test_photos_show_one_person_with_nothing_on_in_several_places():
    [person] = trial.choose_people(1)
    records = trial.photo_records(person, 0, 6)
    assert records == trial.photo_records(person, 0, 6)
    assert {record.identity for record in records} == {person}
    assert {(record.medium, record.glasses, record.hat) for record in records} == {
        ("photo", "none", "none")
    }
    assert [record.view for record in records].count("side") == 1
    assert len({record.scene for record in records}) == 5
    assert len({record.stroke_seed for record in records}) == 6


def test_prompts_ask_for_what_the_reader_knows_and_never_for_other_looks():
    vocabulary = load_attribute_reader().vocabulary
    for text, wanted in ASKED:
        assert text.count("{subject}") == 1
        for name, value in wanted.items():
            assert name in ("scene", "medium", "glasses", "hat", "view")
            assert value in vocabulary[name]
    asked = {name for _, wanted in ASKED for name in wanted}
    assert asked == {"scene", "medium", "glasses", "hat", "view"}


# --- what is compared with what ----------------------------------------------------------


def write_drawings(folder: Path, drawings: Sequence[Drawing], prompts: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    pictures = []
    for number, (drawing, prompt) in enumerate(zip(drawings, prompts, strict=True)):
        draw(drawing).save(folder / f"{number}.png")
        pictures.append(
            Picture(
                file=f"{number}.png",
                prompt=prompt,
                seed=number,
                scheduler="ddim",
                steps=1,
                guidance=1.0,
            )
        )
    images = ImageSet(
        folder=folder, base={"name": "picturebook"}, resolution_px=128, pictures=tuple(pictures)
    )
    write_manifest(images)
    return folder


def test_true_likeness_is_lifted_to_the_photos_and_impostors_are_not(tmp_path: Path):
    person, other = trial.choose_people(2)
    trial.draw_photos(person, 0, 6, tmp_path / "photos")
    taught = RunFolder(tmp_path / "run")
    taught.claim()
    load_photos(tmp_path / "photos", taught, 128)
    prompts = ["a photo of rraj person"] * 8
    # Other numbers than the photos': other moments of the same people.
    own = write_drawings(tmp_path / "own", trial.photo_records(person, 1, 8), prompts)
    strange = write_drawings(tmp_path / "strange", trial.photo_records(other, 1, 8), prompts)
    crowd = [sample_drawing(9_600_000 + i, kind="person", medium="photo") for i in range(8)]
    floor = write_drawings(tmp_path / "floor", crowd, prompts)
    plan = TrialPlan(load_config())
    lifts = [
        trial.judge_likeness(taught.path, drawn, plan, floor).scores["identity"].lift
        for drawn in (own, strange)
    ]
    assert lifts[0] is not None
    assert lifts[0] == pytest.approx(1, abs=0.15)
    assert lifts[1] is not None
    assert lifts[1] < 0.3


def test_obedience_is_read_from_the_pictures(tmp_path: Path):
    [person] = trial.choose_people(1)
    asked = [(text.format(subject="rraj person"), wanted) for text, wanted in ASKED]
    [bare] = trial.photo_records(person, 0, 1)
    obeying = [replace(bare, **wanted) for _, wanted in asked]
    prompts = [text for text, _ in asked]
    drawn = write_drawings(tmp_path / "obeying", obeying, prompts)
    assert min(trial.read_obedience(read_image_set(drawn), "rraj person")) == 1
    # The city, bare-headed and from the front, whatever was asked for.
    drawn = write_drawings(tmp_path / "stubborn", [bare] * len(asked), prompts)
    shares = trial.read_obedience(read_image_set(drawn), "rraj person")
    assert shares[prompts.index("a photo of rraj person in the snow")] == 0.5
    assert shares[prompts.index("a painting of rraj person in the style of Van Gogh")] == 0


# --- the rows ----------------------------------------------------------------------------


def test_the_lift_is_the_median_and_what_cannot_be_told_counts_as_none():
    lifts = (0.9, 0.1, 0.65, 0.7, None)
    row = trial.lift_row([outcome(lift) for lift in lifts])
    assert (row.value, row.n, row.holds) == (0.65, 5, True)
    assert not trial.lift_row([outcome(lift) for lift in (0.9, None, None)]).holds


def test_attributes_lost_are_counted_against_the_base_model():
    row = trial.obedience_row([outcome(obeyed=0.8, below=0.95), outcome(obeyed=0.9, below=0.95)])
    assert row.value == pytest.approx(0.1)
    assert row.n == 4 * len(ASKED)
    assert not trial.obedience_row([outcome(obeyed=0.5, below=0.95)]).holds
    better = trial.obedience_row([outcome(obeyed=1.0, below=0.9)])
    assert better.value == pytest.approx(-0.1)
    assert better.holds


def test_leakage_is_a_ratio_of_rises_of_the_same_subjects():
    steady = {"without_prior": [0.5, 0.4, 0.6, 0.5], "with_prior": [0.2, 0.21, 0.19, 0.2]}
    row = trial.leakage_row([outcome(rises=steady), outcome()])
    assert row.value == pytest.approx(2.5)
    assert row.holds
    assert row.n == 4


def test_a_rise_within_its_own_noise_does_not_make_a_large_ratio():
    noisy = [0.3, -0.3, 0.31, -0.3]
    row = trial.leakage_row([outcome(rises={"without_prior": [0.1] * 4, "with_prior": noisy})])
    assert row.value is not None
    assert row.value < 1
    assert not row.holds
    assert "taken as" in row.note
    fallen = {"without_prior": [0.1] * 4, "with_prior": [-0.1] * 4}
    row = trial.leakage_row([outcome(rises=fallen)])
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
        "generate.steps": (2,),
        "generate.images_per_prompt": 2,
        "evaluate.resamples": 100,
        "evaluate.encoders": "picturebook",
    }
    config = load_config(overrides=small)
    return TrialPlan(
        config, subjects=2, forgetful=1, photos=3, asked_each=1, class_pictures=2, steps=2
    )


@pytest.fixture(scope="module")
def tried(
    plan: TrialPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Outcome], list[Event]]:
    work, told = tmp_path_factory.mktemp("trial"), list[Event]()
    with ThreadPoolExecutor(1) as pool:
        return work, trial.run_trial(pool, work, plan, told.append), told


def test_a_trial_judges_everybody_and_some_without_class_images(tried):
    _, outcomes, told = tried
    assert [sorted(one.rises) for one in outcomes] == [["with_prior", "without_prior"], []]
    for one in outcomes:
        assert one.identity.n == 2
        assert one.identity.floor is not None
        assert one.identity.ceiling is not None
        assert len(one.obeyed) == len(one.obeyed_below) == len(ASKED)
        assert all(len(rises) == 2 for rises in one.rises.values())
    assert len(trial.trial_rows(outcomes)) == 3
    assert told[-1] == Progress("trial", "teaching and drawing", 5, 5)


def test_all_are_trained_with_the_same_class_images_and_seed(tried):
    work, _, _ = tried
    records = {
        (number, how): RunFolder(work / f"subject-{number}" / how).read_record("train")
        for number, how in ((0, "with_prior"), (1, "with_prior"), (0, "without_prior"))
    }
    images = [record.inputs["class images"] for record in records.values()]
    assert images[0] == images[1] != images[2] == "none"
    assert len({record.inputs["photos"] for record in records.values()}) == 2
    assert len({record.results["photo_exposures"] for record in records.values()}) == 1
    assert {record.seed for record in records.values()} == {0}


def test_adapters_and_base_model_draw_the_same_prompts_and_seeds(tried):
    work, _, _ = tried
    others = {
        "portrait": ("subject-0/with_prior", "subject-1/with_prior"),
        "asked": ("subject-0/with_prior", "subject-1/with_prior"),
        "class": ("subject-0/with_prior", "subject-0/without_prior"),
    }
    for name, runs in others.items():
        plans = [read_image_set(work / run / "images" / name).pictures for run in ("base", *runs)]
        assert plans[0] == plans[1] == plans[2]


def test_a_trial_is_gone_on_with(plan: TrialPlan, tried):
    work, outcomes, _ = tried
    files = [*work.rglob("*.safetensors"), *work.glob("*/**/images/*/*.png")]
    before = {file: file.stat().st_mtime_ns for file in files}
    with ThreadPoolExecutor(1) as pool:
        again = trial.run_trial(pool, work, plan)
    assert again == outcomes
    assert {file: file.stat().st_mtime_ns for file in files} == before


# --- the program -------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    def measure(pool: Executor, quick: bool) -> list[Row]:
        return [at_least("sharpness", 31.0 if quick else 29.0, 30.0, 12, (28.5, 29.5))]

    def train_subject(*given: object) -> list[Outcome]:
        return [outcome(rises={"without_prior": [0.4, 0.5], "with_prior": [0.1, 0.1]})]

    monkeypatch.setattr(score, "score_model", measure)
    monkeypatch.setattr(score, "run_trial", train_subject)
    monkeypatch.setattr(score, "open_pool", lambda processes: nullcontext(None))
    return CliRunner()


def test_the_program_prints_every_row_and_writes_it(program: CliRunner, tmp_path: Path):
    file = tmp_path / "score.json"
    done = program.invoke(score.main, ["--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["holds"] for row in rows] == [False, True, True, True]
    for row in rows:
        assert {"name", "value", "goal", "holds"} <= row.keys()
        assert row["name"] in done.output
    assert "n = 12; 28.5000 to 29.5000" in done.output
    assert "model:" in done.output
    assert "dreambooth:" in done.output


def test_the_program_measures_one_group_alone(program: CliRunner):
    done = program.invoke(score.main, ["--only", "dreambooth"])
    assert "leakage" in done.output
    assert "sharpness" not in done.output
    done = program.invoke(score.main, ["--only", "model", "--quick"])
    assert "31.0000" in done.output
    assert "leakage" not in done.output


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
    assert len(rows) == 18
    assert all(row["value"] is not None for row in rows)
