"""Class images: never another recipe's, never twice the same, and none drawn again for nothing."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import PriorsConfig
from dreamloom.core.device import pick_runtime, seed_for
from dreamloom.core.errors import ConfigError, RunFolderError
from dreamloom.core.events import Note, Progress, StageDone, StageSkipped, StageStarted
from dreamloom.core.manifests import MANIFEST, read_class_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import (
    BATCH,
    draw_class_images,
    load_class_images,
    make_class_images,
)
from dreamloom.models.base import Sampler
from dreamloom.models.families import load_model
from dreamloom.picturebook.class_prompts import CLASS_PROMPTS, choose_class_prompts
from dreamloom.training.batches import BatchShare, draw_numbers
from looks import psnr_db

PROMPT = "a photo of a person"


class Painter:
    """Stands in for a base model: a picture is noise of its shot's seed and the model's name."""

    schedulers = ("ddim", "euler")
    runtime = pick_runtime("cpu")

    def __init__(self, name="painter"):
        self.identity = SimpleNamespace(
            fingerprint=name, as_dict=lambda: {"name": name, "fingerprint": name}
        )
        self.shots = []
        self.stop_after = None

    def check_sampler(self, scheduler, steps):
        pass

    def sample(self, shots, sampler, resolution_px, batch):
        assert len(shots) <= batch
        if self.stop_after is not None and len(self.shots) >= self.stop_after:
            raise KeyboardInterrupt
        self.shots += shots
        return [self.paint(shot, sampler, resolution_px) for shot in shots]

    def paint(self, shot, sampler, side):
        recipe = repr((shot, sampler, self.identity.fingerprint)).encode()
        rng = np.random.default_rng(list(sha256(recipe).digest()))
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def run(tmp_path):
    return claim(tmp_path / "run")


def claim(path):
    run = RunFolder(path)
    run.claim()
    return run


def settings(**changes):
    return PriorsConfig(**{"count": 5, "steps": 2, "guidance": 4.0, **changes})


def make(run, count=5, *, model=None, prompt=PROMPT, seed=0, side=8, **changes):
    """Make a set; return it with the numbers of the images drawn for it, and what was told."""
    model, events = model or Painter(), []
    before = len(model.shots)
    config = settings(count=count, **changes)
    priors = make_class_images(run, model, prompt, config, seed, side, events.append)
    numbers = {seed_for(seed, "prior", number): number for number in range(200)}
    return priors, [numbers[shot.seed] for shot in model.shots[before:]], events


def contents(priors):
    return [path.read_bytes() for path in priors.paths()]


def notes(events):
    return [event.text for event in events if isinstance(event, Note)]


# What a set is


def test_every_third_image_takes_one_of_the_further_prompts_in_turn(run, tmp_path):
    more = ("a sketch of a person", "a person in the snow")
    model = Painter()
    priors, _, _ = make(run, 6, model=model, prompts=more)
    expected = [PROMPT, PROMPT, more[0], PROMPT, PROMPT, more[1]]
    assert [shot.prompt for shot in model.shots] == expected
    assert read_class_image_set(run.priors).prompts() == priors.prompts() == expected
    # A larger set begins with the smaller one, and another list of prompts is another recipe.
    _, drawn, _ = make(run, 8, prompts=more)
    assert drawn == [6, 7]
    _, drawn, events = make(run, 8, prompts=more[:1])
    assert drawn == [*range(8)]
    assert "another further prompts" in notes(events)[0]
    plain, _, _ = make(claim(tmp_path / "plain"), 6)
    assert plain.prompts() == [PROMPT] * 6


def test_further_prompts_must_be_written_out(run):
    with pytest.raises(ValueError, match="must be written out"):
        make(run, 2, prompts=("a {class_noun} at night",))
    config = load_config(sets=["subject.class_noun=dog", "subject.phrase=sks dog"])
    config = config.model_copy(update={"priors": settings(prompts=("a {class_noun} at night",))})
    assert config.worded_priors().prompts == ("a dog at night",)


def test_hair_is_asked_of_persons_alone():
    assert choose_class_prompts("Person") == CLASS_PROMPTS
    assert choose_class_prompts("dog") == ()
    assert all("{class_noun}" in text and " hair" in text for text in CLASS_PROMPTS)


def test_the_manifest_says_what_each_image_was_drawn_from(run):
    priors, drawn, _ = make(run, 3)
    assert drawn == [0, 1, 2]
    assert priors.files == ("0000.png", "0001.png", "0002.png")
    assert read_class_image_set(run.priors) == priors
    listed = json.loads((run.priors / MANIFEST).read_text())
    assert listed["recipe"] == {
        "prompt": PROMPT,
        "base model": "painter",
        "scheduler": "ddim",
        "steps": 2,
        "guidance": 4.0,
        "seed": 0,
        "resolution_px": 8,
    }
    assert listed["drawn"] == [
        {
            "file": path.name,
            "seed": seed_for(0, "prior", number),
            "sha256": sha256(path.read_bytes()).hexdigest(),
        }
        for number, path in enumerate(priors.paths())
    ]
    assert sorted(path.name for path in run.priors.iterdir()) == sorted([*priors.files, MANIFEST])


def test_the_record_and_the_events_tell_the_story(run):
    priors, _, events = make(run, 20)
    assert events[0] == StageStarted("priors", f"20 pictures of “{PROMPT}”")
    progress = [(event.done, event.total) for event in events if isinstance(event, Progress)]
    assert progress == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert isinstance(events[-1], StageDone)
    record = run.read_record("priors")
    assert record.inputs == {"recipe": priors.made_from, "count": "20"}
    assert record.results == {"count": 20, "prompt": PROMPT, "drawn": 20}
    assert len(record.outputs) == 21


def test_an_image_does_not_depend_on_the_size_of_the_set(tmp_path):
    few, many = (make(claim(tmp_path / str(n)), n)[0] for n in (3, BATCH + 3))
    assert contents(many)[:3] == contents(few)
    assert len(set(contents(many))) == BATCH + 3


def test_an_unknown_scheduler_is_explained(run):
    for draw in (make_class_images, draw_class_images):
        with pytest.raises(ConfigError, match=r"priors\.scheduler = 'ddin' is unknown"):
            draw(run, Painter(), PROMPT, settings(scheduler="ddin"), 0, 8)
    assert not run.priors.exists()


# Again


def test_a_set_is_drawn_once(run):
    first, _, _ = make(run)
    again, drawn, events = make(run)
    assert again == first
    assert drawn == []
    assert events == [StageSkipped("priors", "already drawn")]


def test_more_images_are_added_to_those_that_are_there(run):
    first, _, _ = make(run, 3)
    kept = contents(first)
    stamps = [path.stat().st_mtime_ns for path in first.paths()]
    more, drawn, events = make(run, 7)
    assert drawn == [3, 4, 5, 6]
    assert contents(more)[:3] == kept
    assert [path.stat().st_mtime_ns for path in more.paths()[:3]] == stamps
    assert events[0].detail == f"4 of 7 pictures of “{PROMPT}”; the others were drawn before"
    assert events[1].done == 3
    assert more.made_from == first.made_from
    assert len(read_class_image_set(run.priors).drawn) == 7


def test_of_more_images_than_asked_for_the_first_are_used_and_none_is_deleted(run):
    many, _, _ = make(run, 7)
    few, drawn, events = make(run, 3)
    assert drawn == []
    assert few.files == many.files[:3]
    assert events[0].detail == f"3 pictures of “{PROMPT}”, all drawn before"
    assert len(list(run.priors.glob("*.png"))) == 7
    assert make(run, 3)[0] == few
    assert run.read_record("priors").inputs["count"] == "3"
    again, drawn, _ = make(run, 7)
    assert drawn == []
    assert again == many


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"other bytes")])
def test_a_lost_or_damaged_image_is_drawn_again(run, harm):
    first, _, _ = make(run)
    kept = contents(first)
    harm(run.priors / "0003.png")
    again, drawn, _ = make(run)
    assert drawn == [3]
    assert contents(again) == kept
    assert again == first


def test_a_lost_image_is_told_of_and_so_is_one_that_comes_back_otherwise(run):
    make(run)
    (run.priors / "0003.png").unlink()
    assert notes(make(run)[2]) == [
        "lost or changed since they were drawn, and drawn again: 0003.png"
    ]
    (run.priors / "0003.png").unlink()
    model = Painter()
    sample = model.sample
    model.sample = lambda *args, **kw: [ImageOps.invert(image) for image in sample(*args, **kw)]
    told = notes(make(run, model=model)[2])
    assert "not the same to the last bit as before" in told[1]


# Interrupted


def test_what_was_drawn_before_an_interruption_is_kept(run):
    model = Painter()
    model.stop_after = 2 * BATCH
    with pytest.raises(KeyboardInterrupt):
        make(run, 20, model=model)
    assert not run.priors.exists()
    assert run.read_record("priors") is None
    model.stop_after = None
    priors, drawn, events = make(run, 20, model=model)
    assert drawn == [16, 17, 18, 19]
    assert next(event.done for event in events if isinstance(event, Progress)) == 16
    assert contents(priors) == contents(make(claim(run.path / "straight"), 20)[0])
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupted_top_up_leaves_the_set_as_it_was_and_goes_on(run):
    model = Painter()
    first, _, _ = make(run, 2, model=model)
    model.stop_after = 2 + BATCH
    with pytest.raises(KeyboardInterrupt):
        make(run, 20, model=model)
    assert read_class_image_set(run.priors) == first
    model.stop_after = None
    assert make(run, 20, model=model)[1] == list(range(2 + BATCH, 20))


def test_a_note_that_was_cut_off_costs_one_image_only(run):
    model = Painter()
    model.stop_after = BATCH
    with pytest.raises(KeyboardInterrupt):
        make(run, 20, model=model)
    (journal,) = run.path.glob(".priors-*/drawn-0-of-1.jsonl")
    journal.write_text(journal.read_text()[:-20])
    model.stop_after = 2 * BATCH
    with pytest.raises(KeyboardInterrupt):
        make(run, 20, model=model)
    model.stop_after = None
    priors, drawn, _ = make(run, 20, model=model)
    assert drawn == list(range(15, 20))
    assert len(set(contents(priors))) == 20


def test_the_old_set_stays_until_the_new_one_is_complete(run):
    old, _, _ = make(run, 3)
    kept = contents(old)
    model = Painter()
    model.stop_after = BATCH
    with pytest.raises(KeyboardInterrupt):
        make(run, 20, model=model, prompt="a dog")
    assert read_class_image_set(run.priors) == old
    assert contents(old) == kept
    model.stop_after = None
    new, drawn, _ = make(run, 20, model=model, prompt="a dog")
    assert drawn == list(range(BATCH, 20))
    assert new.prompt == read_class_image_set(run.priors).prompt == "a dog"
    assert len(list(run.priors.iterdir())) == 21


# Shared among processes


def share_out(run, count, processes):
    painters = [Painter() for _ in range(processes)]
    drawn = [
        draw_class_images(
            run, painter, PROMPT, settings(count=count), 0, 8, share=(rank, processes)
        )
        for rank, painter in enumerate(painters)
    ]
    return painters, drawn


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_work_without_drawing_an_image_twice(run, processes):
    painters, drawn = share_out(run, 11, processes)
    assert sum(drawn) == 11
    assert max(drawn) - min(drawn) <= 1
    seeds = Counter(shot.seed for painter in painters for shot in painter.shots)
    assert set(seeds.values()) == {1}
    priors, again, _ = make(run, 11)
    assert again == []
    assert contents(priors) == contents(make(claim(run.path / "alone"), 11)[0])
    assert not list(run.priors.glob("*.jsonl"))
    assert share_out(run, 11, processes)[1] == [0] * processes


def test_a_share_tops_up_and_tells_of_its_own_images(run):
    make(run, 5)
    events = []
    config = settings(count=11)
    painter = Painter()
    assert draw_class_images(run, painter, PROMPT, config, 0, 8, events.append, share=(1, 2)) == 3
    assert [shot.seed for shot in painter.shots] == [seed_for(0, "prior", n) for n in (5, 7, 9)]
    assert [(event.done, event.total) for event in events] == [(2, 5), (5, 5)]
    assert make(run, 11)[1] == [6, 8, 10]


def test_a_process_that_does_not_exist_is_refused(run):
    with pytest.raises(ValueError, match="the rank must be from 0 to 1, got 2"):
        draw_class_images(run, Painter(), PROMPT, settings(), 0, 8, share=(2, 2))


# The faults of others


def test_fault_14_stray_files_are_counted_as_class_images(run):
    run.priors.mkdir()
    Image.new("RGB", (8, 8)).save(run.priors / "0000.png")
    (run.priors / ".DS_Store").touch()
    with pytest.raises(RunFolderError, match=r"did not put there: 0000\.png\."):
        make(run, 3)
    (run.priors / "0000.png").unlink()
    priors, drawn, events = make(run, 3)
    assert drawn == [0, 1, 2]
    assert "holds no set that can be read" in notes(events)[0]
    for name in (".DS_Store", "Thumbs.db", "0003.png", "holiday.jpg"):
        (run.priors / name).write_bytes(b"stray")
    assert make(run, 3)[0] == priors
    with pytest.raises(RunFolderError, match=r"did not put there: 0003\.png, holiday\.jpg\."):
        make(run, 5, prompt="a dog")
    assert make(run, 5)[1] == [3, 4]
    assert (run.priors / "holiday.jpg").read_bytes() == b"stray"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": "a photo of a dog"}, "prompt"),
        ({"model": Painter("another")}, "base model"),
        ({"scheduler": "euler"}, "scheduler"),
        ({"steps": 3}, "steps"),
        ({"guidance": 5.0}, "guidance"),
        ({"seed": 1}, "seed"),
        ({"side": 16}, "resolution_px"),
    ],
)
def test_fault_14_stale_class_images_are_reused_silently(run, change, named):
    old, _, _ = make(run)
    before = set(contents(old))
    new, drawn, events = make(run, **change)
    assert drawn == [0, 1, 2, 3, 4]
    assert notes(events) == [
        f"the 5 class images of “{PROMPT}” in priors/ were drawn with another {named}: they are "
        "not used, and the new ones take their place when complete"
    ]
    assert not before & set(contents(new))
    assert new.made_from != old.made_from
    assert len(list(run.priors.iterdir())) == 6


def test_fault_14_class_images_of_the_users_own_are_taken_for_drawn_ones(run, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        colours = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{number}.png")
    load_class_images(folder, run, 8, PROMPT)
    _, drawn, events = make(run)
    assert drawn == [0, 1, 2, 3, 4]
    assert "were made otherwise" in notes(events)[0]
    own = load_class_images(folder, run, 8, PROMPT)
    assert read_class_image_set(run.priors) == own


def test_fault_14_class_images_lose_quality_as_jpeg(run):
    model = Painter()
    priors, _, _ = make(run, model=model)
    for path, shot in zip(priors.paths(), model.shots, strict=True):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.tobytes() == model.paint(shot, Sampler("ddim", 2, 4.0), 8).tobytes()


def test_fault_14_processes_with_one_seed_draw_duplicates(run):
    painters, _ = share_out(run, 6, 2)
    seeds = [[shot.seed for shot in painter.shots] for painter in painters]
    assert not set(seeds[0]) & set(seeds[1])
    assert len(set(contents(make(run, 6)[0]))) == 6


def test_fault_14_class_images_have_another_size_than_training(run):
    priors, _, _ = make(run, side=24)
    assert priors.resolution_px == 24
    for path in priors.paths():
        with Image.open(path) as image:
            assert image.size == (24, 24)


def test_fault_15_class_images_change_how_often_photos_are_seen():
    def looked_at(priors):
        """Deal 6 photos, and as many class images as there are, one of each an update."""
        share = BatchShare(photos=1, priors=1)
        updates = range(120)
        photos = [draw_numbers(6, update, 1, share, 0, "photos")[0][1] for update in updates]
        images = [
            draw_numbers(priors, update, 1, share, 0, "class images")[0][1] for update in updates
        ]
        return photos, images

    few, many = looked_at(6), looked_at(100)
    assert few[0] == many[0]
    assert set(Counter(many[0]).values()) == {20}
    assert len(set(many[1][:100])) == 100


def test_fault_15_a_class_image_always_meets_the_same_photo():
    share = BatchShare(photos=1, priors=1)
    partners = {}
    for update in range(120):
        (_, photo, _), (_, image, _) = (
            draw_numbers(cards, update, 1, share, 0, purpose)[0]
            for cards, purpose in ((6, "photos"), (12, "class images"))
        )
        partners.setdefault(image, set()).add(photo)
    assert sum(map(len, partners.values())) / len(partners) > 3


# A real model


def test_two_processes_draw_what_one_draws(tiny_sdxl, tmp_path):
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    side = model.advice.resolution_px
    config = settings(count=3)
    alone = make_class_images(claim(tmp_path / "alone"), model, "a person", config, 0, side)
    shared = claim(tmp_path / "shared")
    for rank in range(2):
        draw_class_images(shared, model, "a person", config, 0, side, share=(rank, 2))
    together = make_class_images(shared, model, "a person", config, 0, side)
    assert together.made_from == alone.made_from
    for one, other in zip(alone.paths(), together.paths(), strict=True):
        assert psnr_db(Image.open(one), Image.open(other)) > 45
