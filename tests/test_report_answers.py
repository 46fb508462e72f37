"""The answers at the top of the page: of the right set, beside its own base, and no more."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamloom.core.manifests import ImageSet, Picture, read_image_set, write_manifest
from dreamloom.core.run_folder import write_json
from dreamloom.evaluation.compare import compare_cards, read_floor
from dreamloom.evaluation.metrics.scorecard import Flags, PictureScores, Score, Scorecard
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.merge import merge_adapters
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.report.answers import find_headline, list_verdicts, tell_headline
from dreamloom.report.making import merge_facts
from dreamloom.report.roles import place_of
from dreamloom.report.samples import find_failures, sample_galleries
from dreamloom.report.story import read_story
from merges import random_adapter

SCENES = [f"a photo of rraj person, scene {number}" for number in range(12)]
MERGE = ["pixel, a photo of rraj person"]
SEEDS = range(4)


def picture(prompt: str, seed: int, number: int) -> Picture:
    return Picture(
        file=f"{number:04d}.png", prompt=prompt, seed=seed, scheduler="ddim", steps=5, guidance=4
    )


def draw(run: Path, name: str, prompts: list[str], seeds: int = len(SEEDS), **role) -> ImageSet:
    cells = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    images = ImageSet(
        folder=run / "images" / name,
        base={"name": "picturebook"},
        resolution_px=32,
        pictures=tuple(picture(*cell, number) for number, cell in enumerate(cells)),
        **role,
    )
    images.folder.mkdir(parents=True)
    for path in images.paths():
        Image.new("RGB", (8, 8), "red").save(path)
    write_manifest(images)
    return images


def card_of(
    images: ImageSet, identity: float, clip_t: float, *, base: float | None = None, **fields
) -> Scorecard:
    """Each prompt differs from the others, and the base model's pictures differ with it."""
    rng = np.random.default_rng(len(images.pictures))
    prompts = {p.prompt: rng.normal(0, 0.1) for p in images.pictures}

    def values(level: float, of: Picture) -> float:
        return level + prompts[of.prompt]

    def score(level: float, **ends) -> Score:
        mean = level + float(np.mean(list(prompts.values())))
        return Score(
            value=mean, n=len(images.pictures), interval=(mean - 0.09, mean + 0.09), key="k", **ends
        )

    floors = {} if base is None else {"floor": 0.1, "ceiling": 0.97}
    return Scorecard(
        scores={"identity": score(identity, **floors), "clip_t": score(clip_t)},
        encoders="picturebook",
        photos=6,
        confidence=0.95,
        resamples=100,
        pictures=tuple(
            PictureScores(
                file=p.file,
                prompt=p.prompt,
                category="",
                seed=p.seed,
                scheduler=p.scheduler,
                steps=p.steps,
                values={"identity": values(identity, p), "clip_t": values(clip_t, p)},
                floor={} if base is None else {"clip_t": values(base, p)},
            )
            for p in images.pictures
        ),
        **fields,
    )


def build(run: Path) -> Path:
    """A demo whose names say nothing: only the manifests tell what each set is."""
    (run / "records").mkdir(parents=True)
    subject, main = "subject with class images", "main"
    cards = {}
    for name, prompts, role, purpose, identity, clip_t in (
        ("a", SCENES, "base", main, 0.1, 0.54),
        ("b", SCENES, "subject without class images", main, 0.86, 0.46),
        ("c", SCENES, subject, main, 0.88, 0.44),
        ("d", MERGE, "base", "merge", 0.1, 0.34),
        ("e", MERGE, "merged", "merge", 0.9, 0.46),
        ("z", MERGE, subject, "merge", 0.95, 0.45),
    ):
        images = draw(run, name, prompts, role=role, purpose=purpose)
        cards[name] = card_of(images, identity, clip_t, base=None if role == "base" else 0.54)
    write_json(run / "scores.json", cards)
    write_json(run / "summary.json", {"kind": "demo", "subject": "rraj person"})
    return run


def test_the_headline_is_of_the_set_with_most_prompts_of_the_subject(tmp_path: Path):
    story = read_story(build(tmp_path / "demo"))
    found = find_headline(story)
    assert found is not None
    assert (found.name, found.prompts, found.score.n) == ("c", 12, 48)
    told = tell_headline(story)
    assert told.startswith(f"{found.score.value:.3f} (")
    assert "n = 48): identity of 48 pictures of 12 prompts of rraj person, drawn by the" in told
    assert told.endswith("adapter taught with class images")


def test_roles_stand_in_manifests_and_older_sets_go_by_their_names(tmp_path: Path):
    images = draw(tmp_path, "table_with_prior", MERGE, role="style", purpose="merge")
    assert read_image_set(images.folder) == images
    assert place_of("table_with_prior", images) == ("style", "merge")
    older = images.model_copy(update={"role": None, "purpose": "main"})
    assert place_of("table_with_prior", older) == ("subject with class images", "table")
    assert "role" not in older.model_dump()
    assert place_of("demo/base") == ("base", "main")
    assert place_of("base_merged") == ("base", "merge")
    assert place_of("pictures_base") == ("base", "main")
    assert place_of("pictures") == ("subject", "main")


def test_each_set_stands_beside_its_own_base_and_no_other(tmp_path: Path):
    verdicts = list_verdicts(read_story(build(tmp_path / "demo")))
    likeness, following, prior, merge = verdicts
    assert [label for label, _, _ in likeness.bars] == ["b", "c"]
    assert [label for label, _, _ in following.bars] == ["base model", "b", "c"]
    # Against the merge prompt's base, 0.34, this would look better.
    assert (following.answer, following.tone) == ("Worse than the base model", "bad")
    assert following.call == "dreamloom compare RUN:a RUN:c --score clip_t"
    assert "−0.100" in following.sentences[-1]
    assert "p < 0.001, 48 pairs of 12 prompts" in following.sentences[-1]
    assert prior.call == "dreamloom compare RUN:b RUN:c --score identity --score clip_t"
    assert "Better in Identity; worse in CLIP-T" in prior.answer
    assert [label for label, _, _ in merge.bars] == ["e"]


def test_what_was_scored_with_a_floor_alone_is_told(tmp_path: Path):
    run = tmp_path / "run"
    (run / "records").mkdir(parents=True)
    images = draw(run, "pictures", SCENES)
    card = card_of(images, 0.88, 0.44, base=0.54)
    write_json(run / "scores.json", {"pictures": card})
    following = list_verdicts(read_story(run))[1]
    assert following.answer == "Worse than the base model"
    # It is what the two sets' own scorecards say, and an older card keeps no floor.
    base = card_of(images, 0.1, 0.54)
    (other,) = compare_cards(base, card, ["clip_t"])
    (own,) = compare_cards(read_floor(card), card, ["clip_t"])
    assert (own.outcome, own.p, own.difference) == pytest.approx(
        (other.outcome, other.p, other.difference)
    )
    assert read_floor(base) is None
    assert "floor" not in base.model_dump()["pictures"][0]


def test_few_pictures_make_the_weaker_claim(tmp_path: Path):
    """An interval that only reaches the photos' likeness does not make pictures alike."""
    run = build(tmp_path / "demo")
    answer = list_verdicts(read_story(run))[0].answer
    assert not answer.startswith("Yes, as alike")


def test_nothing_is_concluded_where_scores_mean_nothing(tmp_path: Path):
    run = tmp_path / "run"
    (run / "records").mkdir(parents=True)
    images = draw(run, "pictures", SCENES)
    warned = card_of(images, 0.99, 0.6, base=0.54, warning="These photographs are outside.")
    write_json(run / "scores.json", {"pictures": warned})
    story = read_story(run)
    assert [v.tone for v in list_verdicts(story)] == ["unknown", "unknown"]
    assert all(v.answer.startswith("Cannot be told") and not v.bars for v in list_verdicts(story))
    assert tell_headline(story) == ""
    with pytest.raises(
        Exception, match="scores of the second side mean nothing: These photographs"
    ):
        compare_cards(card_of(images, 0.1, 0.5), warned)


def test_a_verdict_that_is_impossible_by_arithmetic_says_how_many_prompts_it_takes(tmp_path: Path):
    run = tmp_path / "run"
    (run / "records").mkdir(parents=True)
    images = draw(run, "pictures", SCENES[:3])
    write_json(run / "scores.json", {"pictures": card_of(images, 0.88, 0.44, base=0.54)})
    following = list_verdicts(read_story(run))[1]
    assert following.answer == "Cannot be told from so few prompts"
    assert "3 prompts cannot tell 1 score from chance; 6 could" in following.sentences[-1]


def test_a_study_answers_its_question(tmp_path: Path):
    (tmp_path / "records").mkdir()
    one = {"measure": "identity", "outcome": "better", "difference": 0.1, "pairs": 9, "prompts": 9}
    rows = [{"first": "none", "second": "class images", "measures": [one]}]
    answer = {"question": "Do class images help?", "answer": "Yes: much.", "notes": ["Quick."]}
    write_json(tmp_path / "study.json", {**answer, "comparisons": rows})
    (verdict,) = list_verdicts(read_story(tmp_path))
    assert (verdict.question, verdict.answer) == ("Do class images help?", "Yes: much.")
    assert verdict.sentences[0] == "Quick."
    assert "“class images” against “none”: Identity: better; +0.100" in verdict.sentences[1]


def test_samples_of_a_training_are_shown_with_their_scores(tmp_path: Path):
    (tmp_path / "records").mkdir()
    for updates in (0, 20, 40):
        images = draw(tmp_path, "sample", MERGE, seeds=2)
        target = tmp_path / "looks" / f"{updates:06d}"
        target.parent.mkdir(exist_ok=True)
        images.folder.rename(target)
        card = card_of(images, 0.3 + updates / 100, 0.4) if updates else None
        write_json(target / "scores.json", card)
    (gallery,) = sample_galleries(read_story(tmp_path))
    labels = [column.label for column in gallery.columns]
    assert labels == ["untrained", "after 20 updates", "after 40 updates"]
    assert gallery.columns[0].adapters == "not scored"
    assert gallery.columns[2].adapters.startswith("Identity 0.648 (0.558 to")
    shots = gallery.groups[0][1][0].cells[2]
    assert [name for name, _ in shots[0].badges] == ["Identity", "CLIP-T"]


def test_the_failures_are_the_flagged_and_the_least_alike(tmp_path: Path):
    run = build(tmp_path / "demo")
    cards = {name: Scorecard.model_validate(card) for name, card in read_json(run).items()}
    flagged = cards["c"].pictures[-1].file
    flags = Flags(
        label="eyes",
        n=48,
        judged=48,
        abstained={},
        flagged=(flagged,),
        rate=0.02,
        interval=(0.0, 0.1),
        told="one",
    )
    cards["c"] = cards["c"].model_copy(update={"flags": {"eyes": flags}})
    write_json(run / "scores.json", cards)
    found = find_failures(read_story(run))
    assert found[0][1] == "eyes"
    least = min(p.values["identity"] for p in cards["c"].pictures)
    assert found[1][1] == f"identity {least:.2f}"
    assert len(found) == 5


def read_json(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())


def test_a_merged_file_that_lies_in_a_run_says_on_the_page_how_it_was_made(tmp_path: Path):
    (tmp_path / "records").mkdir()
    parts = []
    for number in range(2):
        path = tmp_path / f"part{number}.safetensors"
        write_adapter(path, random_adapter(number, {"linear": 2}))
        parts.append(AdapterPart(path, 0.5 + number))
    merge_adapters(parts, tmp_path / "both.safetensors")
    facts = dict(merge_facts(read_story(tmp_path)))
    told = facts["Parts of both.safetensors"]
    assert told == "0.5 × part0.safetensors + 1.5 × part1.safetensors"
    assert facts["Method"].startswith("sum")
