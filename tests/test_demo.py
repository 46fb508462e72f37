"""The whole journey on the embedded model, with as little work as possible."""

import json
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import RunFolderError
from dreamloom.core.events import Event, Progress, StageDone, StageSkipped, StageStarted
from dreamloom.core.manifests import read_image_set, read_photo_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.examples import examples_folder
from dreamloom.evaluation.compare import compare_cards
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.experiments import demo as demo_module
from dreamloom.experiments.demo import (
    CLASS_PROMPTS,
    QUICK_TABLE,
    SUBJECT_PROMPTS,
    run_demo,
    share_cores,
)
from dreamloom.lora.reading import read_adapter
from dreamloom.report.answers import ASKED_OF_CLASS_IMAGES
from dreamloom.report.roles import place_of

SCORE = {"value", "n", "interval", "floor", "ceiling", "lift", "key"}


@pytest.fixture(scope="module")
def settings() -> LoomConfig:
    return load_config(
        "quick",
        overrides={
            "train.steps": 2,
            "train.rank": 2,
            "priors.count": 2,
            "priors.steps": 2,
            "generate.steps": (2,),
            "generate.images_per_prompt": 2,
            "evaluate.resamples": 100,
        },
    )


@pytest.fixture(scope="module", autouse=True)
def small_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(QUICK_TABLE, "steps", (2, 3))
        yield


@pytest.fixture(scope="module")
def demo(settings: LoomConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    told: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "share_cores", lambda *_: (2, 1))
        report = run_demo(out, settings, pick_runtime("cpu"), told.append)
    assert report == out / "report.html"
    # What happens in other processes is told here, by name.
    done = {event.stage for event in told if isinstance(event, StageDone)}
    assert {"train-with_prior", "train-style", "generate-merged"} <= done
    tasks = {event.task for event in told if isinstance(event, Progress)}
    assert "with_prior: teaching" in tasks
    return out


def test_the_summary_tells_programs_what_was_measured(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for name in ("base", "without_prior", "with_prior", "merged"):
        for score in ("identity", "clip_i", "clip_t"):
            assert set(summary[name][score]) >= SCORE
            # Blonde hair is not the person's: that prompt is no question of likeness.
            asked = SUBJECT_PROMPTS - (score != "clip_t")
            assert summary[name][score]["n"] == (8 if name == "merged" else 2 * asked)
            assert summary[name][score]["key"].startswith("picturebook")
    assert summary["base"]["identity"]["floor"] is None
    assert summary["with_prior"]["identity"]["floor"] is not None
    assert summary["with_prior"]["identity"]["ceiling"] is not None
    stages = ("photos", "priors", "train-with_prior", "train-style", "merge", "generate-base")
    assert all(summary["seconds"][stage] >= 0 for stage in stages)


def test_the_main_result_is_one_number_in_the_summary_and_on_the_page(demo: Path) -> None:
    headline = json.loads((demo / "summary.json").read_text())["headline"]
    card = json.loads((demo / "scores.json").read_text())["with_prior"]
    assert (headline["set"], headline["measure"]) == ("with_prior", "identity")
    own = SUBJECT_PROMPTS - 1
    assert (headline["prompts"], headline["n"]) == (own, 2 * own)
    assert headline["value"] == card["scores"]["identity"]["value"]
    low, high = headline["interval"]
    told = f"{headline['value']:.3f} ({low:.3f} to {high:.3f}, n = {headline['n']})"
    assert f"{told}: {headline['of']}".replace("-", "−") in unescape(
        (demo / "report.html").read_text()
    )


def test_a_verdict_is_possible_for_every_question_of_the_demo(demo: Path) -> None:
    cards = {
        name: Scorecard.model_validate(card)
        for name, card in json.loads((demo / "scores.json").read_text()).items()
    }
    for first, second, asked in (
        ("base", "with_prior", ["identity"]),
        ("base", "with_prior", ["clip_t"]),
        ("without_prior", "with_prior", ASKED_OF_CLASS_IMAGES),
        ("base_merged", "merged", ["identity"]),
    ):
        compared = compare_cards(cards[first], cards[second], asked)
        assert [one.measure for one in compared if one.p_corrected is None] == []


def test_every_set_says_who_drew_it_and_what_for(demo: Path) -> None:
    places = {
        path.name: place_of("x", read_image_set(path)) for path in (demo / "images").iterdir()
    }
    assert places["with_prior"] == ("subject with class images", "main")
    assert places["with_prior_alone"] == ("subject with class images", "merge")
    assert places["merged"] == ("merged", "merge")
    assert places["table_base"] == ("base", "table")
    assert places == {name: place_of(name) for name in places}


def test_photos_are_seen_equally_often_with_and_without_class_images(demo: Path) -> None:
    records = [
        RunFolder(demo / name).read_record("train") for name in ("without_prior", "with_prior")
    ]
    exposures = {record.results["photo_exposures"] for record in records if record}
    assert len(exposures) == 1
    assert [record.results["class_images"] for record in records if record] == [0, 2]
    seeds = {record.seed for record in records if record}
    assert len(seeds) == 1


def test_compared_sets_share_prompts_seeds_and_samplers(demo: Path) -> None:
    for names in (
        ("base", "without_prior", "with_prior"),
        ("base_merged", "with_prior_alone", "style", "merged"),
        ("table_base", "table_without_prior", "table_with_prior"),
    ):
        plans = [read_image_set(demo / "images" / name).pictures for name in names]
        assert all(plan == plans[0] for plan in plans)
    cells = {(p.scheduler, p.steps) for p in read_image_set(demo / "images/table_base").pictures}
    assert cells == {("ddim", 2), ("ddim", 3), ("pndm", 2), ("pndm", 3)}


def test_the_class_and_the_merges_parts_are_measured_too(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for name in ("identity_retention", "style_retention"):
        assert {"value", "n", "interval", "floor", "ceiling", "lift", "key"} <= set(
            summary["merged"][name]
        )
    cards = json.loads((demo / "scores.json").read_text())
    leakage = cards["with_prior"]["scores"]["leakage"]
    assert leakage["n"] == 2 * CLASS_PROMPTS
    assert leakage["floor"] is not None
    assert cards["with_prior"]["scores"]["drift"]["value"] is not None
    assert cards["with_prior"]["flags"]


def test_the_merge_is_the_sum_of_its_parts(demo: Path) -> None:
    subject = read_adapter(demo / "with_prior" / "adapter.safetensors")
    style = read_adapter(demo / "style" / "adapter.safetensors")
    merged = read_adapter(demo / "merged.safetensors")
    for name, layer in merged.layers.items():
        expected = subject.layers[name].update() + style.layers[name].update()
        assert (layer.update() - expected).abs().max() < 1e-6


def test_the_style_is_trained_with_each_pictures_own_caption(demo: Path) -> None:
    captions = [photo.caption for photo in read_photo_set(demo / "style" / "photos").photos]
    assert len(set(captions)) == len(captions) == 12
    assert all(caption.startswith("pixel, a photo of") for caption in captions)


def test_the_page_is_one_file_that_loads_nothing(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "a painting of rraj person at Oktoberfest" in page
    assert 'src="http' not in page
    assert "url(http" not in page


def test_a_finished_demo_is_not_done_again(demo: Path, settings: LoomConfig) -> None:
    told: list[Event] = []
    run_demo(demo, settings, pick_runtime("cpu"), told.append)
    started = [event.stage for event in told if isinstance(event, StageStarted)]
    assert started == ["report"]
    assert sum(isinstance(event, StageSkipped) for event in told) > 15


def test_cores_are_shared_among_as_many_as_there_are_trainings() -> None:
    cpu = pick_runtime("cpu")
    assert [share_cores(cpu, threads) for threads in (1, 2, 4, 8)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 2),
    ]


def test_a_demo_with_other_settings_needs_another_folder(demo: Path, settings: LoomConfig) -> None:
    other = settings.model_copy(update={"seed": 1})
    with pytest.raises(RunFolderError, match="seed is 0 there and 1 here"):
        run_demo(demo, other, pick_runtime("cpu"))


def test_the_example_photos_are_as_a_phone_writes_them() -> None:
    photos = sorted((examples_folder() / "rraj").glob("*.jpg"))
    assert len(photos) == 6
    turned, located = [], []
    for path in photos:
        with Image.open(path) as photo:
            exif = photo.getexif()
            assert max(photo.size) * 3 == min(photo.size) * 4
            turned += [path.name] if exif.get(0x0112, 1) == 6 else []
            located += [path.name] if exif.get_ifd(0x8825) else []
    assert len(turned) == len(located) == 1
