"""Pictures and photos in, honest scores out."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dreamloom.core.config.settings import EvaluateConfig, LoomConfig, SubjectConfig
from dreamloom.core.errors import DreamLoomError, EvaluationError, PhotoError
from dreamloom.core.events import Note, Progress, StageDone, StageSkipped, silent
from dreamloom.core.manifests import ImageSet, Photo, PhotoSet, Picture, write_manifest
from dreamloom.core.run_folder import RunFolder, file_sha256, fingerprint
from dreamloom.evaluation import scoring
from dreamloom.evaluation.compare import compare_cards, read_floor
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.measures import MEASURES, SubjectWords
from dreamloom.evaluation.scoring import (
    EvaluationOptions,
    Floor,
    evaluate_images,
    pick_encoders,
    read_pictures,
    refuse_drawn_photos,
    replace_subject,
)
from dreamloom.pipeline import score as pipeline_score
from dreamloom.pipeline import score_set
from dreamloom.pipeline.score_set import evaluate_run, evaluation_options, read_scorecards

OPTIONS = EvaluationOptions(resamples=100, detectors=False)
CONFIG = EvaluateConfig(resamples=100, detectors=False)
WORDS = SubjectWords("rraj person", "person")
PROMPTS = ("a photo of rraj person", "a rraj person in the snow", "a painting of rraj person")
PICTUREBOOK_SCORES = [
    *("identity", "verified", "rank_1", "clip_i", "clip_t", "prompt_found", "variety", "copy"),
    *("leakage", "drift"),
]
SCORE_KEYS = {"value", "n", "interval", "floor", "ceiling", "lift", "key", "lift_interval", "note"}


class Colours:
    """Sees a picture's mean colour and knows a few words: TEST, not an encoder of anything."""

    key = "colours@TEST"
    may_miss = False

    def embed(self, images):
        rows = [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.array(rows)).float(), dim=1)

    def embed_texts(self, texts):
        rows = [[1.0, 1.0, 3.0] if "snow" in text else [2.0, 1.0, 1.0] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)

    def too_long(self, texts):
        return [text for text in texts if len(text) > 100]


class Broken(Colours):
    key = "broken@TEST"

    def embed(self, images):
        return super().embed(images) * float("nan")


class Constant(Colours):
    key = "constant@TEST"

    def embed(self, images):
        return torch.tensor([[0.6, 0.8, 0.0]]).repeat(len(images), 1)


def encoders(kind="picturebook", **changed):
    given = {
        "identity": Colours(),
        "clip": Colours(),
        "dino": Missing("picturebook's judges have no DINO"),
    }
    return Encoders(kind, **{**given, **changed})


def colour_file(path, base, seed, size=(24, 24), **options):
    rng = np.random.default_rng(seed)
    tint = np.array(base) + rng.normal(0, 25, 3)
    pixels = np.clip(tint + rng.normal(0, 12, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_photos(folder, count=6, seed=100):
    photos = []
    for index in range(count):
        path = colour_file(folder / f"{index}.png", (200, 60, 60), seed + index, (24, 30))
        photos.append(
            Photo(
                file=path.name,
                source=f"IMG_{index}.JPG",
                source_sha256=file_sha256(path)[::-1],
                original_px=(300, 240),
                scaled_px=(30, 24),
            )
        )
    return PhotoSet(folder=folder, resolution_px=24, photos=tuple(photos))


def make_images(folder, base, *, seeds=4, cells=(("ddim", 50),), prompts=PROMPTS, offset=0):
    pictures = []
    for scheduler, steps in cells:
        for number, prompt in enumerate(prompts):
            for seed in range(seeds):
                name = f"{len(pictures):04d}.png"
                colour_file(folder / name, base, offset + 1000 * number + seed + steps)
                pictures.append(
                    Picture(
                        file=name,
                        prompt=prompt,
                        category=("photo", "scene", "style")[number],
                        seed=seed,
                        scheduler=scheduler,
                        steps=steps,
                        guidance=5.0,
                    )
                )
    images = ImageSet(
        folder=folder, base={"name": "tiny"}, resolution_px=24, pictures=tuple(pictures)
    )
    write_manifest(images)
    return images


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "pictures", (180, 90, 70))


@pytest.fixture
def floor(tmp_path):
    return make_images(tmp_path / "floor", (60, 90, 180), offset=50_000)


def score(images, photos, floor=None, **given):
    options = {"subject": WORDS, "options": OPTIONS, "encoders": encoders(), **given}
    return evaluate_images(images, photos, floor=floor, **options)


def test_every_score_has_its_companions(images, photos, floor):
    card = score(images, photos, floor)
    data = json.loads(card.model_dump_json())
    assert list(data["scores"]) == PICTUREBOOK_SCORES
    assert all(set(one) == SCORE_KEYS for one in data["scores"].values())
    identity = card.scores["identity"]
    assert identity.floor < identity.value < identity.ceiling
    assert identity.interval[0] < identity.value < identity.interval[1]
    assert 0 < identity.lift < 1
    assert identity.lift_interval[0] < identity.lift < identity.lift_interval[1]
    assert identity.lift == pytest.approx(
        (identity.value - identity.floor) / (identity.ceiling - identity.floor)
    )
    assert (identity.n, identity.key) == (12, "colours@TEST")
    text = card.scores["clip_t"]
    assert text.floor is not None
    assert (text.ceiling, text.lift, text.lift_interval) == (None, None, None)
    assert card.floors["identity"].interval is not None
    assert card.ceilings["identity"].n == 6
    assert (card.warning, card.alarms, card.notes) == (None, (), ())


def test_the_values_are_those_of_the_plain_formula(images, photos):
    card = score(images, photos)
    look = Colours()
    squares = [Image.open(path).crop((0, 3, 24, 27)) for path in photos.paths()]
    seen, known = look.embed([Image.open(p) for p in images.paths()]), look.embed(squares)
    assert card.scores["clip_i"].value == pytest.approx((seen @ known.T).mean().item(), abs=1e-6)
    apart = known @ known.T
    ceiling = (apart.sum() - apart.trace()) / 30
    assert card.scores["clip_i"].ceiling == pytest.approx(ceiling.item(), abs=1e-6)
    groups = seen.split(4)
    inside = [(1 - group @ group.T).sum() / 12 for group in groups]
    assert card.scores["variety"].value == pytest.approx(
        torch.stack(inside).mean().item(), abs=1e-6
    )
    texts = look.embed_texts([picture.prompt for picture in images.pictures])
    assert [one.values["clip_t"] for one in card.pictures] == pytest.approx(
        (seen * texts).sum(dim=1).tolist(), abs=1e-6
    )


def test_the_order_of_pictures_and_photos_does_not_matter(images, photos):
    turned = images.model_copy(update={"pictures": images.pictures[::-1]})
    others = photos.model_copy(update={"photos": photos.photos[::-1]})
    first, second = score(images, photos), score(turned, others)
    for name, one in first.scores.items():
        assert second.scores[name].value == pytest.approx(one.value)
        assert second.scores[name].ceiling == pytest.approx(one.ceiling)


def test_swapping_pictures_and_photos_shows(images, photos):
    right = score(images, photos).scores["identity"]
    as_photos = PhotoSet(
        folder=images.folder,
        resolution_px=24,
        photos=tuple(
            photos.photos[0].model_copy(update={"file": picture.file})
            for picture in images.pictures[:6]
        ),
    )
    as_pictures = ImageSet(
        folder=photos.folder,
        base={},
        resolution_px=24,
        pictures=tuple(
            images.pictures[0].model_copy(update={"file": photo.file, "seed": index})
            for index, photo in enumerate(photos.photos)
        ),
    )
    wrong = score(as_pictures, as_photos).scores
    assert wrong["identity"].ceiling != pytest.approx(right.ceiling)
    assert wrong["clip_t"].value != pytest.approx(score(images, photos).scores["clip_t"].value)


def test_swapped_folders_are_refused(images, photos):
    with pytest.raises(EvaluationError, match="pictures that DreamLoom drew") as refused:
        refuse_drawn_photos(images.folder)
    assert "swapped" in refused.value.hint
    refuse_drawn_photos(photos.folder)
    write_manifest(photos)
    refuse_drawn_photos(photos.folder)


def test_a_picture_on_its_side_scores_as_the_upright_one(photos, tmp_path):
    upright, lying = tmp_path / "upright", tmp_path / "lying"
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 40, 3), np.uint8)
        pixels[:, :10] = 250  # the centre crop of the picture on its side would differ
        upright.mkdir(exist_ok=True)
        lying.mkdir(exist_ok=True)
        image = Image.fromarray(pixels)
        image.save(upright / f"{seed}.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(lying / f"{seed}.png", exif=exif)
    first, second = (score(read_pictures(folder), photos) for folder in (upright, lying))
    assert first.scores == second.scores


def test_prompts_are_scored_without_the_invented_word(images, photos):
    card = score(images, photos)
    assert [(group.prompt, group.scored) for group in card.by_prompt] == [
        ("a photo of rraj person", "a photo of person"),
        ("a rraj person in the snow", "a person in the snow"),
        ("a painting of rraj person", "a painting of person"),
    ]
    assert [group.category for group in card.by_category] == ["photo", "scene", "style"]
    assert all(group.pictures == group.scores["identity"].n == 4 for group in card.by_prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Rraj Person, smiling", "person, smiling"),
        ("a rraj personality", "a rraj personality"),
        ("two dogs", "two dogs"),
        ("rraj person and rraj person", "person and person"),
    ],
)
def test_only_the_whole_phrase_is_replaced(prompt, expected):
    assert replace_subject(prompt, "rraj person", "person") == expected


def test_there_is_a_table_of_schedulers_and_steps(tmp_path, photos):
    cells = (("ddim", 50), ("ddim", 80), ("pndm", 50), ("pndm", 80))
    images = make_images(tmp_path / "grid", (180, 90, 70), seeds=2, cells=cells)
    card = score(images, photos)
    assert [(cell.scheduler, cell.steps) for cell in card.by_cell] == list(cells)
    assert all(cell.scores["identity"].n == 6 for cell in card.by_cell)
    mean = np.mean([cell.scores["identity"].value for cell in card.by_cell])
    assert card.scores["identity"].value == pytest.approx(mean)


def test_samplers_of_one_seed_are_not_independent_pictures(tmp_path, photos):
    once = make_images(tmp_path / "once", (180, 90, 70), prompts=PROMPTS[:1])
    copies = [
        picture.model_copy(update={"scheduler": scheduler})
        for scheduler in ("ddim", "pndm", "euler", "heun")
        for picture in once.pictures
    ]
    often = once.model_copy(update={"pictures": tuple(copies)})
    one, many = (score(images, photos).scores for images in (once, often))
    assert many["identity"].n == 16
    assert many["identity"].interval == pytest.approx(one["identity"].interval)
    assert many["variety"].value == pytest.approx(one["variety"].value)


def test_a_single_picture_has_no_interval_and_no_variety(images, photos):
    card = score(images.select(prompt=PROMPTS[0], seed=0), photos)
    assert card.scores["identity"].interval is None
    assert card.scores["variety"].value is None
    assert "two pictures or more of one prompt" in card.scores["variety"].note
    pair = score(images.model_copy(update={"pictures": images.pictures[:2]}), photos).scores[
        "variety"
    ]
    assert pair.value is not None
    assert pair.interval is None


def test_floors_pair_up_by_words_seed_and_sampler(images, floor, photos):
    base_words = floor.model_copy(
        update={
            "pictures": tuple(
                one.model_copy(update={"prompt": one.prompt.replace("rraj ", "")})
                for one in floor.pictures[::-1]
            )
        }
    )
    plain, without_word = score(images, photos, floor), score(images, photos, base_words)
    for name, one in plain.scores.items():
        assert without_word.scores[name].floor == pytest.approx(one.floor)


def test_what_does_not_pair_up_is_said(images, floor, photos):
    half = floor.model_copy(update={"pictures": floor.pictures[:6]})
    card = score(images, photos, half)
    assert card.notes[0].startswith("6 of 12 pictures have no floor")
    kept = images.model_copy(update={"pictures": images.pictures[:6]})
    alone = score(kept, photos, half).scores["identity"]
    assert card.scores["identity"].floor == pytest.approx(alone.floor)
    assert card.scores["identity"].lift == pytest.approx(alone.lift)
    other = make_images(floor.folder.parent / "other", (60, 90, 180), cells=(("euler", 5),))
    card = score(images, photos, other)
    assert card.notes[0].startswith("12 of 12 pictures have no floor")
    assert card.scores["identity"].floor is None
    assert card.floors == {}


def test_lift_needs_room(images, floor, photos):
    near = images.model_copy()  # a base model that scores as high as the photos themselves
    copies = PhotoSet(
        folder=images.folder,
        resolution_px=24,
        photos=tuple(
            photos.photos[0].model_copy(update={"file": one.file}) for one in images.pictures[:4]
        ),
    )
    card = score(images, copies, near)
    assert card.scores["identity"].lift is None
    assert "no lift: the ceiling does not lie clearly above" in card.scores["identity"].note


def test_few_photos_give_no_lift(images, floor, tmp_path):
    two = score(images, make_photos(tmp_path / "two", 2), floor)
    assert two.scores["identity"].ceiling is not None
    assert two.ceilings["identity"].interval is None
    assert "no lift: it needs three photos or more" in two.scores["identity"].note
    one = score(images, make_photos(tmp_path / "one", 1), floor)
    assert one.scores["identity"].ceiling is None
    assert one.scores["identity"].lift is None
    assert "There is one photo only: no ceiling, and no lift." in one.notes


def test_what_is_not_measured_is_null_with_a_reason(images, photos, floor):
    found = encoders("standard", clip=Missing("the weights are not here"), dino=Colours())
    card = score(images, photos, floor, encoders=found)
    assert list(card.scores) == [measure.name for measure in MEASURES]
    assert card.scores["dino"].value is not None
    for name in ("clip_i", "clip_t", "variety"):
        data = card.scores[name].model_dump()
        assert data.pop("note") == "not measured: the weights are not here"
        assert set(data.values()) == {None}
    assert all("clip_t" not in one.values for one in card.pictures)
    assert card.encoders == "standard"


def test_not_a_number_is_an_alarm_not_a_score(images, photos, floor):
    card = score(images, photos, floor, encoders=encoders(identity=Broken()))
    assert card.scores["identity"].value is None
    assert "gave no usable numbers" in card.scores["identity"].note
    assert card.scores["clip_i"].value is not None
    assert any("12 pictures" in alarm and "broken@TEST" in alarm for alarm in card.alarms)
    assert any("12 floor pictures" in alarm for alarm in card.alarms)


def test_a_score_that_ignores_the_pictures_is_an_alarm(images, photos):
    seen = []
    card = score(images, photos, encoders=encoders(identity=Constant()), observe=seen.append)
    assert any("identity is 1.000000 for every picture" in alarm for alarm in card.alarms)
    notes = [event for event in seen if isinstance(event, Note)]
    assert [note.text for note in notes] == list(card.alarms)
    assert all(note.warning for note in notes)


def test_copies_of_photos_and_plain_pictures_are_alarms(images, photos, floor):
    paths = images.paths()
    shutil.copy(photos.paths()[0], paths[0])
    Image.new("RGB", (24, 24), "black").save(paths[1])
    shutil.copy(paths[2], paths[3])
    shutil.copy(floor.paths()[4], paths[4])
    card = score(images, photos, floor)
    assert [alarm.split(",")[0] for alarm in card.alarms[:4]] == [
        "1 pictures repeat photos of the subject",
        "1 pictures are one plain colour",
        "1 pictures are copies of others",
        "1 pictures are the base model's own",
    ]


def test_an_original_photo_among_the_pictures_is_an_alarm(images, photos):
    source = file_sha256(images.paths()[2])
    first = photos.photos[0].model_copy(update={"source_sha256": source})
    named = photos.model_copy(update={"photos": (first, *photos.photos[1:])})
    assert "repeat photos of the subject, first 0002.png" in score(images, named).alarms[0]


@pytest.mark.parametrize(
    ("known", "what"),
    [(lambda one: one.size[0] != one.size[1], ""), (lambda one: False, "photographs")],
)
def test_pictures_outside_the_world_are_said_to_mean_nothing(images, photos, known, what):
    found = encoders(familiar=lambda squares: [known(one) or not what for one in squares])
    card = score(images, photos, encoders=found)
    if not what:
        assert card.warning is None
        return
    assert card.warning == (
        "These photographs are outside picturebook's world of drawings: its judges know only "
        "that, so these scores mean nothing about real likeness."
    )
    assert all("outside the world" in one.note for one in card.scores.values())


def test_a_scorecard_keeps_what_the_base_models_pictures_scored(images, photos, floor):
    """So a set that was scored with its floor alone can be compared with the base model."""
    card, base = score(images, photos, floor), score(floor, photos)
    kept = read_floor(card)
    assert read_floor(base) is None
    for asked in ("identity", "clip_t"):
        (own,) = compare_cards(kept, card, [asked])
        (other,) = compare_cards(base, card, [asked])
        assert own.pairs == other.pairs == len(images.pictures)
        assert own.difference == pytest.approx(other.difference)
        assert own.outcome == other.outcome


def test_pictures_alone_may_be_outside(images, photos):
    answers = iter([[False] * 12, [True] * 6])
    card = score(images, photos, encoders=encoders(familiar=lambda squares: next(answers)))
    assert card.warning.startswith("These pictures are outside")


def test_a_folder_without_manifest_has_no_prompts(images, photos):
    (images.folder / "manifest.json").unlink()
    card = score(read_pictures(images.folder), photos)
    assert card.scores["identity"].n == 12
    assert card.scores["clip_t"].note == (
        "not measured: the prompts are unknown: the folder has no manifest"
    )
    assert card.scores["variety"].value is not None
    assert (card.by_prompt, card.by_cell, card.by_category) == ((), (), ())
    assert card.pictures[0].seed is None
    assert any("prompts are unknown" in note for note in card.notes)


def test_a_folder_with_manifest_is_read_by_it(images, photos, floor):
    card = score(read_pictures(images.folder), photos, read_pictures(floor.folder))
    assert card == score(images, photos, floor)


def test_too_long_prompts_are_said(tmp_path, photos):
    long = "a photo of rraj person " + "very " * 30
    images = make_images(tmp_path / "long", (180, 90, 70), prompts=(long,))
    assert any("too long for the encoder" in note for note in score(images, photos).notes)


def test_what_cannot_be_scored_is_refused(tmp_path, images, photos):
    with pytest.raises(EvaluationError, match="There is no folder"):
        read_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no pictures"):
        read_pictures(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="There is no picture to score"):
        score(images.select(seed=99), photos)
    with pytest.raises(EvaluationError, match="There is no photo to compare with"):
        score(images, photos.model_copy(update={"photos": ()}))
    images.paths()[3].write_bytes(b"no picture")
    with pytest.raises(PhotoError, match=r"0003\.png is not a picture"):
        score(images, photos)
    images.paths()[3].unlink()
    with pytest.raises(EvaluationError, match=r"1 listed pictures are gone, first .*0003\.png"):
        score(images, photos)
    (images.folder / "manifest.json").write_text("{")
    with pytest.raises(DreamLoomError, match="is damaged"):
        read_pictures(images.folder)


def test_progress_covers_everything(images, photos, floor):
    seen = []
    score(images, photos, floor, observe=seen.append)
    steps = [(event.done, event.total) for event in seen if isinstance(event, Progress)]
    assert steps == [(12, 30), (18, 30), (30, 30)]


def test_pictures_of_picturebook_are_seen_by_its_judges(images, monkeypatch):
    asked = []
    monkeypatch.setattr(
        scoring, "load_encoders", lambda kind, device: asked.append(kind) or encoders()
    )
    drawn = images.model_copy(update={"base": {"name": "picturebook"}})
    pick_encoders("auto", images.base_name, "cpu")
    pick_encoders("auto", drawn.base_name, "cpu")
    pick_encoders("standard", drawn.base_name, "cpu")
    pick_encoders("picturebook", images.base_name, "cpu")
    assert asked == ["standard", "picturebook", "standard", "picturebook"]


def in_run(run, images, photos, **given):
    options = {"config": CONFIG, "subject": SubjectConfig(), "encoders": encoders(), **given}
    return evaluate_run(run, images, photos, **options)


def test_a_run_keeps_its_scores_and_resumes(tmp_path, images, photos, floor):
    run, seen = RunFolder(tmp_path / "run"), []
    run.claim()
    card = in_run(run, images, photos, floor=floor, observe=seen.append)
    assert isinstance(seen[-1], StageDone)
    record = run.read_record("evaluate-pictures")
    assert record.results["scores"]["identity"] == card.scores["identity"].value
    assert read_scorecards(run) == {"pictures": card}
    base = in_run(run, floor, photos)
    assert set(read_scorecards(run)) == {"pictures", "floor"}
    again = in_run(run, images, photos, floor=floor, observe=seen.append)
    assert isinstance(seen[-1], StageSkipped)
    assert again == card
    assert read_scorecards(run)["floor"] == base


def test_a_card_of_another_version_is_kept(tmp_path, images, photos):
    run = RunFolder(tmp_path / "run")
    run.claim()
    foreign = {"scores": 3, "hue": "of another version"}
    run.scores.write_text(json.dumps({"older": foreign}))
    card = in_run(run, images, photos)
    assert read_scorecards(run) == {"pictures": card}
    assert json.loads(run.scores.read_text())["older"] == foreign


@pytest.mark.parametrize("damaged", ['{"pictures": {"sco', "[]", ""])
def test_scores_that_cannot_be_read_at_all_are_put_aside(tmp_path, images, photos, damaged):
    run, seen = RunFolder(tmp_path / "run"), []
    run.claim()
    run.scores.write_text(damaged)
    card = in_run(run, images, photos, observe=seen.append)
    assert read_scorecards(run) == {"pictures": card}
    assert (run.path / "scores.damaged-1.json").read_text() == damaged
    assert any("kept as scores.damaged-1.json" in getattr(event, "text", "") for event in seen)


def test_evaluations_that_end_at_once_lose_no_card(tmp_path, images, photos):
    run = RunFolder(tmp_path / "run")
    run.claim()
    card = in_run(run, images, photos)
    names = [f"set{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: score_set._keep_scorecard(run, name, card, silent), names))
    assert set(read_scorecards(run)) == {"pictures", *names}


@pytest.mark.parametrize(
    ("inside", "named"),
    [("", "images/mine"), ("images", "mine"), ("images/mine", "."), ("images/mine", "../mine")],
)
def test_a_set_named_from_inside_its_run_is_scored_there(
    tmp_path, monkeypatch, images, photos, inside, named
):
    run = RunFolder(tmp_path / "run")
    run.claim()
    shutil.copytree(images.folder, run.images / "mine")
    (tmp_path / "own").mkdir()
    for photo in photos.paths():
        Image.open(photo).resize((64, 80)).save(tmp_path / "own" / photo.name)
    monkeypatch.setattr(pipeline_score, "pick_encoders", lambda *_: encoders())
    monkeypatch.chdir(run.path / inside)
    config = LoomConfig(evaluate=CONFIG)
    card = pipeline_score.score(Path(named), tmp_path / "own", config)
    assert read_scorecards(run) == {"mine": card}


def test_what_evaluation_takes_of_the_settings_has_their_fingerprint():
    for config in (EvaluateConfig(), CONFIG, EvaluateConfig(detectors="experimental")):
        assert fingerprint(evaluation_options(config)) == fingerprint(config)


@pytest.mark.parametrize("change", ["picture", "photo", "floor", "encoder", "setting", "scores"])
def test_any_change_is_scored_again(tmp_path, images, photos, floor, change):
    run, seen = RunFolder(tmp_path / "run"), []
    run.claim()
    in_run(run, images, photos, floor=floor)
    given = {"floor": floor}
    if change == "picture":
        colour_file(images.paths()[0], (0, 200, 0), 1)
    elif change == "photo":
        photos = photos.model_copy(update={"photos": photos.photos[:-1]})
    elif change == "floor":
        given = {}
    elif change == "encoder":
        given["encoders"] = encoders(identity=Constant())
    elif change == "setting":
        given["config"] = EvaluateConfig(resamples=300)
    else:
        run.scores.write_text("{")
    in_run(run, images, photos, observe=seen.append, **given)
    assert isinstance(seen[-1], StageDone)


# --- what a picture is for -----------------------------------------------------------------------


class Faces(Colours):
    """Sees a face wherever a picture is not dark: TEST."""

    key = "faces@TEST"
    may_miss = True

    def embed(self, images):
        rows = super().embed(images)
        dark = torch.tensor([np.asarray(image).mean() < 40 for image in images])
        return rows.masked_fill(dark[:, None], float("nan"))


WATCHED = (*PROMPTS[:2], "a photo of a person", "a photo of a red car")


def make_watched(folder, bases, seeds=6, offset=0):
    """Draw two prompts of the subject, one of its class and one of something else."""
    pictures = []
    for number, (prompt, base) in enumerate(zip(WATCHED, bases, strict=True)):
        for seed in range(seeds):
            name = f"{len(pictures):04d}.png"
            colour_file(folder / name, base, offset + 1000 * number + seed)
            pictures.append(
                Picture(
                    file=name,
                    prompt=prompt,
                    seed=seed,
                    scheduler="ddim",
                    steps=20,
                    guidance=5.0,
                )
            )
    images = ImageSet(
        folder=folder, base={"name": "tiny"}, resolution_px=24, pictures=tuple(pictures)
    )
    write_manifest(images)
    return images


RED, BLUE, GREEN = (180, 90, 70), (60, 90, 180), (60, 180, 90)
VIOLET = (130, 90, 140)


def cosine(one: Path, other: Path) -> float:
    middles = [ImageOps.fit(Image.open(path), (24, 24)) for path in (one, other)]
    first, second = Colours().embed(middles)
    return float(first @ second)


@pytest.fixture
def watched_floor(tmp_path):
    return make_watched(tmp_path / "below", (BLUE, BLUE, BLUE, GREEN), offset=50_000)


def test_leakage_is_found_in_pictures_of_the_class_alone(tmp_path, photos, watched_floor):
    leaky = make_watched(tmp_path / "leaky", (RED, RED, RED, GREEN))
    tight = make_watched(tmp_path / "tight", (RED, RED, BLUE, GREEN))
    found, none = (score(images, photos, watched_floor) for images in (leaky, tight))
    assert found.scores["leakage"].n == none.scores["leakage"].n == 6
    assert found.scores["leakage"].lift_interval[0] > 0
    assert none.scores["leakage"].lift < found.scores["leakage"].lift / 3
    assert found.findings[0].startswith("Leakage found: pictures of another person have a likeness")
    assert not none.findings[0].startswith("Leakage found")
    # The class does not count for the subject, nor the other way round.
    assert found.scores["identity"] == none.scores["identity"]
    assert found.scores["identity"].n == 12
    roles = [one.role for one in found.pictures]
    assert roles == ["subject"] * 12 + ["class"] * 6 + ["other"] * 6
    assert "leakage" not in found.pictures[0].values
    assert "identity" not in found.pictures[12].values
    assert any("12 of 24 pictures are not of the subject" in note for note in found.notes)


def test_the_floor_of_likeness_is_never_lower_than_that_of_impostors(tmp_path, photos):
    """To the base model the identifier means somebody blue, and persons are violet."""
    peculiar = make_watched(
        tmp_path / "peculiar", (BLUE, BLUE, VIOLET, GREEN), seeds=8, offset=50_000
    )
    impostor = make_watched(tmp_path / "stranger", (VIOLET, VIOLET, VIOLET, GREEN), seeds=8)
    taught = make_watched(tmp_path / "taught", (RED, RED, VIOLET, GREEN), seeds=8)
    other, own = (score(images, photos, peculiar) for images in (impostor, taught))
    persons = [cosine(path, photo) for path in peculiar.paths()[16:24] for photo in photos.paths()]
    found = other.scores["identity"]
    assert found.floor == pytest.approx(np.mean(persons), abs=1e-5)
    assert found.value == pytest.approx(found.floor, abs=0.03)
    assert "floor: 8 pictures of anybody of the class" in found.note
    assert other.floors["identity"].value == found.floor
    assert other.floors["identity"].n == 8
    assert own.scores["identity"].value > found.floor + 0.06
    # What else is seen in pictures of other words has little to do with these.
    assert "floor:" not in other.scores["clip_i"].note
    # Copies earn what strangers do.
    for number, path in enumerate(taught.paths()[:16]):
        Image.open(photos.paths()[number % 6]).crop((0, 3, 24, 27)).save(path)
    copied = score(taught, photos, peculiar).scores["identity"]
    assert copied.value == pytest.approx(copied.floor)
    # Other strangers join those of the floor, each of them one of the persons.
    few = make_watched(tmp_path / "few", (BLUE, BLUE, VIOLET, GREEN), seeds=7, offset=50_000)
    flat = score(impostor, photos, Floor(few, peculiar.paths()[16:24]))
    assert "floor: 15 pictures" in flat.scores["identity"].note
    assert flat.floors["identity"].n == 15
    assert flat.floors["clip_t"] == score(impostor, photos, few).floors["clip_t"]
    # With few persons, or persons less like the photos, it stays with the pictures' own prompts.
    unlike = make_watched(tmp_path / "unlike", (VIOLET, VIOLET, BLUE, GREEN), seeds=8)
    for beneath in (few, unlike):
        assert "floor:" not in score(impostor, photos, beneath).scores["identity"].note


def test_drift_is_what_has_moved_beside_the_subject(tmp_path, photos, watched_floor):
    moved = make_watched(tmp_path / "moved", (RED, RED, BLUE, RED))
    same = make_watched(tmp_path / "same", (RED, RED, BLUE, GREEN), offset=50_000)
    far, near = (score(images, photos, watched_floor) for images in (moved, same))
    assert far.scores["drift"].value > near.scores["drift"].value
    # The same dice draw the same pictures beside the subject.
    assert near.scores["drift"].value == pytest.approx(0, abs=1e-6)
    assert far.scores["drift"].n == 12
    alone = score(moved, photos)
    assert alone.scores["drift"].note == "not measured: it needs the base model's pictures: --floor"


def test_without_pictures_of_the_class_leakage_says_what_to_draw(images, photos, floor):
    card = score(images, photos, floor)
    assert card.scores["leakage"].value is None
    assert "draw the pack class-v1 as well" in card.scores["leakage"].note
    assert all("leakage" not in group.scores for group in card.by_prompt)


def test_copied_photos_earn_what_the_base_model_earned(tmp_path, photos, floor):
    copied = make_images(tmp_path / "copied", RED)
    for number, path in enumerate(copied.paths()):
        photo = Image.open(photos.paths()[number % 6])
        photo.crop((0, 3, 24, 27)).save(path)
    card = score(copied, photos, floor)
    assert "12 pictures repeat photos of the subject" in card.alarms[0]
    assert all(one.copied and one.nearest_photo for one in card.pictures)
    assert card.scores["copy"].value > 0.98
    for name in ("identity", "clip_i"):
        assert card.scores[name].value == pytest.approx(card.scores[name].floor)
        assert card.scores[name].lift == pytest.approx(0)
    # Without a floor they earn nothing.
    assert score(copied, photos).scores["identity"].value == 0


def test_an_encoder_of_copies_tells_the_nearest_photo(images, photos, floor):
    card = score(images, photos, floor, encoders=encoders("standard", copies=Colours()))
    look = Colours()
    squares = [Image.open(path).crop((0, 3, 24, 27)) for path in photos.paths()]
    similar = look.embed([Image.open(p) for p in images.paths()]) @ look.embed(squares).T
    nearest = similar.amax(dim=1)
    assert card.scores["copy_sscd"].value == pytest.approx(nearest.mean().item(), abs=1e-6)
    assert card.scores["copy_sscd"].floor < card.scores["copy_sscd"].value


def test_pictures_without_a_face_earn_what_the_base_model_earned(images, photos, floor):
    found = encoders(identity=Faces())
    before = score(images, photos, floor, encoders=found)
    for path in images.paths()[::2]:
        Image.new("RGB", (24, 24), (20, 10, 12)).save(path)
    after = score(images, photos, floor, encoders=found)
    assert any("6 pictures show no face" in alarm for alarm in after.alarms)
    kept = [one.values["identity"] for one in after.pictures]
    low = [one.values["identity"] for one in score(floor, photos, encoders=found).pictures]
    assert kept[::2] == pytest.approx(low[::2])
    assert kept[1::2] == pytest.approx([one.values["identity"] for one in before.pictures][1::2])
    assert after.scores["identity"].n == 12
    assert after.scores["identity"].value < before.scores["identity"].value


def test_photos_without_a_face_are_left_out_and_said(images, photos, floor):
    Image.new("RGB", (24, 30), (20, 10, 12)).save(photos.paths()[0])
    card = score(images, photos, floor, encoders=encoders(identity=Faces()))
    assert card.ceilings["identity"].n == 5
    assert card.ceilings["clip_i"].n == 6
    assert any("In 1 of 6 photos no face was found" in note for note in card.notes)
    for path in photos.paths():
        Image.new("RGB", (24, 30), (20, 10, 12)).save(path)
    none = score(images, photos, floor, encoders=encoders(identity=Faces()))
    assert none.scores["identity"].note == "not measured: no photo shows a face"
    assert none.scores["clip_i"].value is not None


def test_verification_and_rank_are_measured_against_the_base_models_persons(tmp_path, photos):
    like = make_images(tmp_path / "like", (200, 60, 60), seeds=8)
    unlike = make_images(tmp_path / "unlike", BLUE, seeds=8, offset=9_000)
    below = make_images(tmp_path / "below", BLUE, seeds=8, offset=50_000)
    good, bad = score(like, photos, below), score(unlike, photos, below)
    assert good.scores["verified"].value > 0.9
    assert good.scores["rank_1"].value > 0.9
    assert good.scores["verified"].interval[1] == 1
    assert good.scores["verified"].interval[0] < good.scores["verified"].value
    assert bad.scores["verified"].value < 0.2
    assert bad.scores["rank_1"].value < 0.2
    # One in a hundred of the base model's own may pass; of 24 that is the highest alone.
    assert good.scores["verified"].floor == pytest.approx(1 / 24)
    assert "from 24 pictures of others" in good.scores["verified"].note
    assert all(0 <= end <= 1 for end in good.scores["verified"].interval)
    few = make_images(tmp_path / "few", BLUE, seeds=4, offset=50_000)
    told = score(make_images(tmp_path / "two", RED), photos, few).scores["verified"].note
    assert "needs 20 pictures of the base model's persons; there are 12" in told


def test_a_prompt_is_found_where_it_fits_best(images, photos):
    card = score(images, photos)
    look = Colours()
    seen = look.embed([Image.open(path) for path in images.paths()])
    texts = look.embed_texts([group.scored for group in card.by_prompt])
    own = torch.arange(3).repeat_interleave(4)
    fits = seen @ texts.T
    right = fits.gather(1, own[:, None])[:, 0] >= fits.amax(dim=1) - 1e-9
    assert card.scores["prompt_found"].value == pytest.approx(right.double().mean().item())
    assert card.scores["prompt_found"].note == "among 3 prompts"
    one = images.model_copy(update={"pictures": images.pictures[:4]})
    assert "two different prompts" in score(one, photos).scores["prompt_found"].note


# --- bad input -----------------------------------------------------------------------------------


def test_mixed_sizes_black_pictures_and_one_photo_are_scored_and_said(tmp_path, floor):
    mixed = make_images(tmp_path / "mixed", RED)
    for number, path in enumerate(mixed.paths()):
        Image.open(path).resize((24 + 8 * number, 24 + 3 * number)).save(path)
    one = make_photos(tmp_path / "one", 1)
    card = score(mixed, one, floor)
    assert card.scores["identity"].value is not None
    assert card.scores["identity"].ceiling is None
    for path in mixed.paths():
        Image.new("RGB", (32, 32)).save(path)
    black = encoders(identity=Faces(), clip=Missing("not here"))
    told = score(mixed, one, floor, encoders=black)
    assert any("12 pictures are one plain colour" in alarm for alarm in told.alarms)
    assert any("12 pictures show no face" in alarm for alarm in told.alarms)
    assert told.scores["identity"].value == pytest.approx(told.scores["identity"].floor)
