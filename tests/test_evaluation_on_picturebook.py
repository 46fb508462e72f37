"""The whole evaluation on the embedded model: what should be found is found, and nothing else.

Two drawn persons whom nothing was trained on are taught for a short while, one of them also
without class images. That takes a few minutes, so everything here is slow but the first test.
"""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.manifests import ClassImageSet, ImageSet, PhotoSet, Picture, write_manifest
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.retention import MergeSets, evaluate_merge
from dreamloom.evaluation.scoring import EvaluationOptions, Floor, evaluate_images, pick_encoders
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.models.base import Model
from dreamloom.models.families import load_model
from dreamloom.picturebook.world import JUDGING_SEED_START, sample_drawing, vary
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import open_run
from dreamloom.training.train import train_adapter
from tools.picturebook.drawing import draw
from tools.picturebook.trial_people import choose_people, photo_records

PLACES = ("", " in the snow", " in a city", " on a beach", " in a forest", " at night")
PROMPTS = [
    *(Prompt(f"a photo of rraj person{place}") for place in PLACES),
    *(Prompt(f"a photo of a person{place}", "class") for place in PLACES),
]
OPTIONS = EvaluationOptions(resamples=1000)


def score(
    images: ImageSet,
    photos: PhotoSet,
    floor: ImageSet | Floor | None,
) -> Scorecard:
    return evaluate_images(
        images,
        photos,
        floor=floor,
        subject=SubjectWords("rraj person", "person"),
        options=OPTIONS,
        encoders=pick_encoders("auto", images.base_name, "cpu"),
    )


def draw_pictures(folder: Path, records) -> ImageSet:
    """Drawings as a set of pictures of six prompts."""
    folder.mkdir()
    pictures = []
    for number, record in enumerate(records):
        draw(record, 128).save(folder / f"{number}.png")
        prompt = PROMPTS[number % len(PLACES)].text
        pictures.append(
            Picture(
                file=f"{number}.png",
                prompt=prompt,
                seed=number // len(PLACES),
                scheduler="ddim",
                steps=1,
                guidance=1,
            )
        )
    images = ImageSet(
        folder=folder,
        base={"name": "picturebook"},
        resolution_px=128,
        pictures=tuple(pictures),
    )
    write_manifest(images)
    return images


def test_drawings_of_the_subject_reach_the_ceiling_and_impostors_the_floor(tmp_path: Path):
    (person,) = choose_people(1)
    photos_folder = tmp_path / "photos"
    photos_folder.mkdir()
    for number, record in enumerate(photo_records(person, 0, 6)):
        draw(record, 256).save(photos_folder / f"{number}.png")
    run = RunFolder(tmp_path / "run")
    photos = load_photos(photos_folder, run, 128)
    rng = random.Random(1)
    same = draw_pictures(tmp_path / "same", [vary(person, rng, medium="photo") for _ in range(12)])
    impostors, others = (
        draw_pictures(
            tmp_path / name,
            [
                sample_drawing(JUDGING_SEED_START + start + i, kind="person", medium="photo")
                for i in range(24)
            ],
        )
        for name, start in (("strangers", 800_000), ("others", 810_000))
    )
    alike, unlike = score(same, photos, impostors), score(others, photos, impostors)
    assert alike.scores["identity"].lift_interval[0] > 0.5
    assert alike.scores["verified"].value > 0.8
    assert alike.scores["rank_1"].value > 0.8
    low, high = unlike.scores["identity"].lift_interval
    assert low < 0 < high
    assert unlike.scores["verified"].value < 0.2
    assert alike.alarms == () or "above the ceiling" in alike.alarms[0]
    assert {"eye_colours", "extra_faces"} <= set(alike.flags)


class Taught(NamedTuple):
    model: Model
    config: LoomConfig
    root: RunFolder
    photos: list[PhotoSet]
    priors: ClassImageSet
    sets: dict[str, ImageSet]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    work = tmp_path_factory.mktemp("taught")
    model = load_model("picturebook", pick_runtime("cpu"))
    config = resolve_defaults(load_config("quick"), model)
    root = open_run(work / "root", config)
    priors = make_class_images(
        root, model, config.class_prompt(), config.worded_priors(), config.seed, 128
    )
    none = config.model_copy(update={"priors": config.priors.model_copy(update={"kind": "none"})})
    photos, adapters = [], {}
    for number, person in enumerate(choose_people(2)):
        folder = work / f"photos-{number}"
        folder.mkdir()
        for place, record in enumerate(photo_records(person, number, 6)):
            draw(record, 256).save(folder / f"{place}.png")
        for name, settings in (("with", config), ("without", none)):
            if (number, name) == (1, "without"):
                continue
            run = open_run(work / f"{name}-{number}", settings)
            own = load_photos(folder, run, 128)
            train_adapter(run, model, own, priors if name == "with" else None, settings)
            adapters[f"{name}_{number}"] = run.adapter
        photos.append(own)
    generate = config.generate.model_copy(update={"images_per_prompt": 3, "steps": (25,)})
    sets = {
        name: generate_images(root, model, PROMPTS, generate, active, name)
        for name, active in [
            ("base", []),
            *((name, [ActiveAdapter(adapter)]) for name, adapter in adapters.items()),
        ]
    }
    return Taught(model, config, root, photos, priors, sets)


@pytest.mark.slow
def test_a_trained_person_lies_above_the_floor_and_an_impostors_adapter_does_not(taught: Taught):
    for person, impostor in ((0, 1), (1, 0)):
        own, other = (
            score(
                taught.sets[f"with_{who}"],
                taught.photos[person],
                Floor(taught.sets["base"], taught.priors.paths()),
            )
            for who in (person, impostor)
        )
        assert own.scores["identity"].lift_interval[0] > 0
        assert other.scores["identity"].lift_interval[0] <= 0
        assert other.scores["identity"].lift < own.scores["identity"].lift
        assert own.scores["verified"].value > 0.8
        assert other.scores["verified"].value == 0
        assert not any(one.copied for one in own.pictures)


@pytest.mark.slow
def test_leakage_is_found_without_class_images_and_is_lower_with_them(taught: Taught):
    without = score(taught.sets["without_0"], taught.photos[0], taught.sets["base"])
    with_them = score(taught.sets["with_0"], taught.photos[0], taught.sets["base"])
    assert without.findings[0].startswith("Leakage found: pictures of another person")
    assert without.scores["leakage"].lift > with_them.scores["leakage"].lift + 0.1
    assert with_them.scores["leakage"].value < without.scores["leakage"].value
    assert without.scores["drift"].value > 0


@pytest.mark.slow
def test_a_folder_of_copied_photos_gets_no_credit(taught: Taught, tmp_path: Path):
    images, photos = taught.sets["with_0"], taught.photos[0]
    folder = tmp_path / "copies"
    shutil.copytree(images.folder, folder)
    copies = replace_folder(images, folder)
    for number, path in enumerate(copies.paths()):
        if "rraj" in copies.pictures[number].prompt:
            shutil.copy(photos.paths()[number % 6], path)
    card = score(copies, photos, taught.sets["base"])
    subject = [one for one in card.pictures if one.role == "subject"]
    assert all(one.copied for one in subject)
    assert f"{len(subject)} pictures repeat photos of the subject" in card.alarms[0]
    assert card.scores["identity"].lift == pytest.approx(0)
    assert card.scores["verified"].value == 0


@pytest.mark.slow
def test_the_subjects_adapter_alone_keeps_all_of_the_subject(taught: Taught):
    """With another person's adapter in the style's place: both ends of the scale are known."""
    sets = MergeSets(
        base=taught.sets["base"],
        subject=taught.sets["with_0"],
        style=taught.sets["with_1"],
        merged=taught.sets["with_0"],
    )
    encoders = pick_encoders("auto", sets.base.base_name, "cpu")
    kept = evaluate_merge(sets, taught.photos[0], None, encoders, OPTIONS)
    assert kept.identity.value == pytest.approx(1)
    assert kept.style.value in (None, pytest.approx(0))
    swapped = replace(sets, merged=sets.base)
    nothing = evaluate_merge(swapped, taught.photos[0], None, encoders, OPTIONS)
    assert nothing.identity.value == pytest.approx(0)


def replace_folder(images: ImageSet, folder: Path) -> ImageSet:
    return images.model_copy(update={"folder": folder})
