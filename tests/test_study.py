"""Studies: their files, what arms share, going on after a stop, and answers in four words."""

import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import ConfigError, PhotoError, RunFolderError
from dreamloom.core.events import Event, StageSkipped, StageStarted
from dreamloom.core.manifests import Photo, PhotoSet, read_image_set
from dreamloom.core.run_folder import fingerprint
from dreamloom.core.toml_files import describe_fields
from dreamloom.evaluation.compare import Comparison
from dreamloom.evaluation.metrics.scorecard import PictureScores, Score, Scorecard
from dreamloom.experiments.pool import Crew, open_crew
from dreamloom.experiments.study import run as room
from dreamloom.experiments.study.answers import (
    BETTER,
    FEW,
    SAME,
    UNMEASURED,
    WORSE,
    Contrast,
    Decision,
    answer_choose,
    answer_compare,
    answer_plateau,
    answer_weak_spots,
    choose_arm,
    compare_likeness,
    correct_together,
    decide,
    find_plateau,
)
from dreamloom.experiments.study.findings import StudyFindings, join_scores
from dreamloom.experiments.study.question import (
    Changes,
    Study,
    count_updates,
    read_study,
)
from dreamloom.experiments.study.run import run_study
from dreamloom.experiments.study.work import (
    DrawnSet,
    Training,
    choose_photos,
    name_trained_settings,
)
from studio_set import make_photos

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "questions").glob("*.toml"))

HEAD = """
question = "Does it help?"
answer = "compare"
photos = "photos"
prompts = ["a photo of {subject}", "a photo of a {class_noun}"]
"""
TWO_ARMS = """
[[arms]]
name = "with"

[[arms]]
name = "without"
priors.kind = "none"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def change(text: str, **values: str) -> str:
    """Set top-level words of a study's file."""
    for name, value in values.items():
        text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
        text = f"{name} = {value}\n{text}"
    return text


# --- the file ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_can_be_read_and_its_photos_are_there(path: Path) -> None:
    study = read_study(path)
    assert list(Path(study.photos).glob("*.jpg"))
    for arm in study.list_arms():
        assert study.configure(arm, 0).base == "picturebook"
    quick = read_study(path, Changes(quick=True))
    assert quick.configure(quick.list_arms()[0], 0).train.steps == 120


def test_the_recipes_ask_what_every_user_asks() -> None:
    studies = {path.stem: read_study(path) for path in RECIPES}
    assert {name: study.answer for name, study in studies.items()} == {
        "prior": "compare",
        "photos": "plateau",
        "sampling": "choose",
        "checkpoint": "choose",
        "obedience": "compare",
        "weak-spots": "weak_spots",
    }
    prior = studies["prior"]
    assert len(prior.train_seeds) == 3
    one, other = (prior.configure(arm, 1).model_dump() for arm in prior.list_arms())
    assert (one.pop("priors")["kind"], other.pop("priors")["kind"]) == ("none", "generated")
    assert one == other
    counts = [arm.photo_count for arm in studies["photos"].list_arms()]
    assert counts == [1, 2, 3, 4, 6]
    weights = {arm.weight for arm in studies["checkpoint"].list_arms()}
    assert (min(weights), max(weights)) == (0.6, 1.2)


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        (HEAD + "anwser = 1\n" + TWO_ARMS, "There is no setting 'anwser'.", "answer"),
        (HEAD + TWO_ARMS + "wieght = 0.5\n", "There is no setting 'wieght'.", "weight"),
        (HEAD + TWO_ARMS + "train.rnk = 4\n", "There is no setting 'train.rnk'.", "train.rank"),
        (
            HEAD + "[settings]\ntrian.rank = 4\n" + TWO_ARMS,
            "There is no setting 'trian.rank'.",
            "train.rank",
        ),
        (HEAD + "[grid]\nwieght = [1.0, 2.0]\n", "There is no setting 'wieght'.", "weight"),
        (HEAD + "[settings]\ntrain.rank = 0\n" + TWO_ARMS, "train.rank = 0", "Rank"),
        (HEAD + "[settings]\nseed = 3\n" + TWO_ARMS, "seed is the same", "train_seeds"),
        (HEAD + TWO_ARMS + 'subject.phrase = "x"\n', "subject.phrase is the same", "subject"),
        (HEAD + TWO_ARMS + "checkpoint = 1.5\n", "arms.2.checkpoint = 1.5", "share"),
        (HEAD + TWO_ARMS.replace('name = "with"\n', ""), "arms.1.name is missing.", "tables"),
        (change(HEAD, answer='"guess"') + TWO_ARMS, "answer = 'guess'", "compare"),
        (
            change(HEAD, decide_by='["identiy"]') + TWO_ARMS,
            "There is no measure 'identiy'.",
            "identity",
        ),
        (
            change(HEAD, answer='"choose"', decide_by='["variety"]') + TWO_ARMS,
            "chosen by variety",
            "another measure",
        ),
        (change(HEAD, train_seeds="[1, 1]") + TWO_ARMS, "each training seed", "train_seeds"),
        (HEAD.replace('photos = "photos"\n', "") + TWO_ARMS, "photos is missing.", "photos"),
        (HEAD + 'arms = "two"\n', "begins with [[arms]]", "one by one"),
        (HEAD + TWO_ARMS + "[grid]\nweight = [1.0]\n", "both", "Keep one"),
        (HEAD + "[grid]\nweight = 1.0\n", "grid.weight = 1.0", "weight = [first, second]"),
        (HEAD + "[grid]\ncheckpoint = [0.5, 7]\n", "checkpoint = 7", "share"),
        (HEAD + TWO_ARMS.replace("without", "with"), "called 'with'", "name"),
        (HEAD + '[[arms]]\nname = "alone"\n', "needs 2 arms", "[[arms]]"),
        (change(HEAD, answer='"weak_spots"') + TWO_ARMS, "those of one arm", "one arm"),
        (change(HEAD, prompts="[]") + TWO_ARMS, "draws nothing", "prompts"),
        (change(HEAD, prompts='["a {dog}"]') + TWO_ARMS, "cannot be filled", "{subject}"),
        (HEAD + "[settings]\ngenerate.steps = [2, 3]\n" + TWO_ARMS, "one scheduler", "steps"),
        (
            change(HEAD, answer='"choose"')
            + "[settings]\ngenerate.images_per_prompt = 1\n"
            + TWO_ARMS,
            "two pictures or more",
            "images_per_prompt",
        ),
        (
            HEAD + "[settings]\ntrain.updates = 97\n[grid]\ncheckpoint = [0.5, 1.0]\n",
            "every 1 updates",
            "0.25, 0.5 and 1",
        ),
        ("question = ", "not valid TOML", "Mend"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_what_to_do(
    text: str, problem: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path, text))
    assert problem in caught.value.problem
    assert hint in caught.value.hint


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study file .*none\.toml"):
        read_study(tmp_path / "none.toml")


def test_a_grid_makes_every_combination_in_the_files_order(tmp_path: Path) -> None:
    text = HEAD + '[grid]\nsteps = [2, 5]\nscheduler = ["ddim", "euler"]\ntrain.rank = [4]\n'
    arms = read_study(write(tmp_path, text)).list_arms()
    assert [arm.name for arm in arms] == [
        f"{steps} steps, {scheduler}, train.rank = 4"
        for steps, scheduler in itertools.product((2, 5), ("ddim", "euler"))
    ]
    assert (arms[1].steps, arms[1].scheduler) == (2, "euler")
    assert arms[1].settings == {"train.rank": 4}


def test_settings_go_from_the_preset_over_the_study_to_the_arm(tmp_path: Path) -> None:
    text = HEAD + "[settings]\ntrain.updates = 8\ntrain.rank = 2\n" + TWO_ARMS + "train.rank = 3\n"
    study = read_study(write(tmp_path, text))
    with_priors, without = (study.configure(arm, 5) for arm in study.arms)
    assert (with_priors.train.rank, without.train.rank) == (2, 3)
    assert with_priors.train.steps == without.train.steps == 8
    assert (with_priors.priors.kind, without.priors.kind) == ("generated", "none")
    assert with_priors.seed == 5


def test_the_command_may_change_base_photos_subject_packs_and_effort(tmp_path: Path) -> None:
    text = change(HEAD, class_noun='"person"') + "[settings]\npriors.count = 5\n"
    file = write(tmp_path, text + TWO_ARMS)
    plain = read_study(file)
    assert Path(plain.photos) == tmp_path / "photos"
    changes = Changes("sdxl", tmp_path / "mine", "sks dog", ("live-v1",), 3, quick=True)
    study = read_study(file, changes)
    config = study.configure(study.arms[0], 0)
    assert (config.base, config.subject.phrase, config.subject.class_noun) == (
        "sdxl",
        "sks dog",
        "dog",
    )
    assert Path(study.photos) == tmp_path / "mine"
    assert (study.packs, study.prompts, study.workers) == (("live-v1",), (), 3)
    # What the file settles, it settles in every preset.
    assert (config.train.steps, config.priors.count) == (120, 5)


def test_looks_are_taken_so_that_every_checkpoint_is_kept(tmp_path: Path) -> None:
    text = HEAD + "[settings]\ntrain.updates = 120\n[grid]\ncheckpoint = [0.25, 0.5, 1.0]\n"
    study = read_study(write(tmp_path, text))
    every = {study.configure(arm, 0).validation.every for arm in study.list_arms()}
    assert every == {30}
    assert count_updates(0.25, 120) == 30
    assert count_updates(0.001, 120) == 1
    plain = read_study(write(tmp_path, HEAD + TWO_ARMS))
    assert plain.configure(plain.arms[0], 0).validation.every is None


def test_every_word_of_the_file_is_described() -> None:
    rows = {name: meaning for name, _, meaning in describe_fields(Study)}
    assert {"question", "answer", "decide_by", "train_seeds", "arms.weight"} <= rows.keys()
    page = (RECIPES[0].parents[2] / "docs" / "studies.md").read_text()
    assert all(f"| `{name}` | {meaning} |" in page for name, meaning in rows.items())


# --- how many photos ---------------------------------------------------------------------


def photo_set(count: int) -> PhotoSet:
    photos = [
        Photo(
            file=f"{number}.png",
            source=f"{number}.jpg",
            source_sha256=str(number),
            original_px=(8, 8),
            scaled_px=(8, 8),
        )
        for number in range(count)
    ]
    return PhotoSet(folder=Path("photos"), resolution_px=8, photos=tuple(photos))


@given(st.integers(0, 50), st.integers(2, 9))
def test_more_photos_include_those_of_fewer(train_seed: int, count: int) -> None:
    every = photo_set(count)
    chosen = [
        {photo.file for photo in choose_photos(every, some, train_seed).photos}
        for some in range(1, count + 1)
    ]
    assert [len(files) for files in chosen] == list(range(1, count + 1))
    assert all(few < more for few, more in itertools.pairwise(chosen))
    assert choose_photos(every, None, train_seed) == every == choose_photos(every, count, 0)


def test_each_training_seed_begins_with_another_photo() -> None:
    first = {choose_photos(photo_set(6), 1, seed).photos[0].file for seed in range(12)}
    assert len(first) > 3


def test_photos_that_are_not_there_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="asks for 7 photos, but there are 6"):
        choose_photos(photo_set(6), 7, 0)


# --- answers -----------------------------------------------------------------------------


def comparison(outcome: str, measure: str = "identity") -> Comparison:
    return Comparison(
        measure=measure, outcome=outcome, difference=-0.125, interval=(-0.25, 0.0625), prompts=9
    )


def contrast(second: str, first: str = "last", **outcomes: str) -> Contrast:
    return Contrast(first, second, tuple(comparison(o, name) for name, o in outcomes.items()))


def ranked(identities: list[str], clip_t: str = SAME) -> list[Contrast]:
    return [
        contrast(f"{number + 1} photos", identity=outcome, clip_t=clip_t)
        for number, outcome in enumerate(identities)
    ]


NAMES = ("identity", "clip_t")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([WORSE, WORSE, SAME, SAME], 2),
        ([SAME, SAME, SAME], 0),
        ([WORSE, WORSE, WORSE], None),
        # Once worse again, the plateau has not begun.
        ([SAME, WORSE, SAME], 2),
        ([WORSE, SAME, WORSE], None),
        # Better than the last is no reason to go on to the last.
        ([WORSE, BETTER, SAME], 1),
        # What cannot be told is no plateau.
        ([SAME, FEW, SAME], 2),
        ([SAME, SAME, FEW], None),
        ([FEW, FEW], None),
    ],
)
def test_the_plateau_begins_where_nothing_after_it_is_worse_than_the_last(
    outcomes: list[str], expected: int | None
) -> None:
    assert find_plateau([decide({"identity": one}, ["identity"]) for one in outcomes]) == expected


@given(st.lists(st.sampled_from([BETTER, WORSE, SAME, FEW]), min_size=1, max_size=6))
def test_no_arm_of_a_plateau_is_worse_and_the_arm_before_it_is_no_part(outcomes: list[str]) -> None:
    decisions = [decide({"identity": one}, ["identity"]) for one in outcomes]
    start = find_plateau(decisions)
    if start is None:
        assert outcomes[-1] in (WORSE, FEW)
    else:
        assert not {WORSE, FEW} & set(outcomes[start:])
        assert start == 0 or outcomes[start - 1] in (WORSE, FEW)


def test_measures_decide_together_and_only_those_that_were_named() -> None:
    mixed = {"identity": BETTER, "clip_t": WORSE, "variety": BETTER}
    assert decide(mixed, NAMES) == Decision(("identity",), ("clip_t",), few=False)
    assert decide({"variety": BETTER}, NAMES) == Decision((), (), few=True)
    assert decide({"identity": FEW, "clip_t": SAME}, NAMES) == Decision()
    assert decide({"identity": FEW, "clip_t": FEW}, NAMES).few


def test_a_comparison_is_answered_by_measure_with_its_evidence() -> None:
    answer = answer_compare([contrast("with", "without", identity=WORSE, clip_t=SAME)], 3, NAMES)
    assert answer == (
        "“with” against “without”: worse in Identity (−0.125, −0.250 to +0.062), "
        "no difference detected in CLIP-T (−0.125, −0.250 to +0.062); 3 training seeds."
    )


def test_measures_that_do_not_decide_are_not_in_the_answer() -> None:
    told = answer_compare([contrast("with", "without", identity=SAME, variety=WORSE)], 3, NAMES)
    assert "Variety" not in told
    assert "worse" not in told


def test_what_is_neither_good_nor_bad_is_told_without_a_word() -> None:
    told = answer_compare(
        [contrast("with", "without", identity=SAME, variety="higher")], 3, [*NAMES, "variety"]
    )
    assert "beside Variety (−0.125, −0.250 to +0.062)" in told
    assert "higher" not in told


def test_what_nobody_measured_is_said_to_be_so() -> None:
    one = contrast("with", "without", identity=SAME, leakage=UNMEASURED)
    told = answer_compare([one], 3, ["identity", "leakage"])
    assert "not measured in Leakage" in told


def test_many_comparisons_are_corrected_together() -> None:
    def told(p: float, prompts: int) -> Contrast:
        one = comparison(BETTER).model_copy(update={"p": p, "prompts": prompts})
        return Contrast("a", "b", (one,))

    def outcomes(*contrasts: Contrast) -> list[str]:
        return [one.measures[0].outcome for one in correct_together(contrasts)]

    assert outcomes(told(0.03, 20)) == [BETTER]
    assert outcomes(told(0.03, 20), told(0.03, 20)) == [SAME, SAME]
    assert outcomes(told(0.01, 20), told(0.04, 20)) == [BETTER, BETTER]
    # Six prompts reach 0.03 at best, which is too much for two comparisons.
    assert outcomes(told(0.03125, 6)) == [BETTER]
    assert outcomes(told(0.03125, 6), told(0.03125, 6)) == [FEW, FEW]
    # What was not tested stays what it was.
    untested = contrast("b", identity=FEW)
    assert correct_together([untested, untested]) == [untested, untested]


def test_one_training_seed_speaks_of_adapters_and_not_of_settings() -> None:
    one = answer_compare([contrast("with", identity=BETTER)], 1, NAMES)
    assert "these adapters and not about the settings" in one
    assert "adapters" not in answer_compare([contrast("with", identity=BETTER)], 3, NAMES)


def test_the_plateau_is_told_with_what_lies_before_it() -> None:
    told = answer_plateau(ranked([WORSE, WORSE, SAME, SAME]), 3, NAMES)
    assert told.startswith("From “3 photos” on, no difference detected to “last”")
    assert "“2 photos” against “last”: worse in Identity" in told
    assert "“1 photos”" not in told


@pytest.mark.parametrize(
    ("outcomes", "clip_t", "beginning"),
    [
        ([WORSE, WORSE], SAME, "No plateau found: “2 photos” against “last”: worse in Identity"),
        ([WORSE, FEW], FEW, "No plateau found: too few images to tell “2 photos” from “last”"),
        ([FEW, FEW], FEW, "Too few images to tell any of them from “last”"),
        ([WORSE, BETTER], SAME, "From “2 photos” on none is worse than “last”"),
        ([WORSE, SAME, BETTER], SAME, "From “2 photos” on none is worse than “last”"),
    ],
)
def test_without_a_plateau_it_is_said_why(outcomes: list[str], clip_t: str, beginning: str) -> None:
    assert answer_plateau(ranked(outcomes, clip_t), 3, NAMES).startswith(beginning)


def test_a_choice_names_those_that_it_cannot_be_told_from() -> None:
    others = [
        contrast("chosen", "a", identity=BETTER, clip_t=SAME),
        contrast("chosen", "b", identity=SAME, clip_t=SAME),
        contrast("chosen", "c", identity=FEW, clip_t=FEW),
        contrast("chosen", "d", identity=BETTER, clip_t=WORSE),
        contrast("chosen", "e", identity=SAME, clip_t=WORSE),
    ]
    told = answer_choose("chosen", others, 1, NAMES, (2, 3))
    assert told.startswith("“chosen”, chosen on 2 seeds of each prompt, on 3 others: ")
    for part in (
        "better than “a”",
        "worse than “e”",
        "no difference detected to “b”",
        "too few images to tell from “c”",
        "better in Identity and worse in CLIP-T than “d”",
    ):
        assert part in told


def test_weak_spots_are_categories_worse_than_the_base_model() -> None:
    kinds = {
        "style": contrast("adapter", "base model", clip_t=WORSE),
        "photo": contrast("adapter", "base model", clip_t=BETTER),
        "view": contrast("adapter", "base model", clip_t=FEW),
    }
    told = answer_weak_spots(kinds, ("", ()), 3, ["clip_t"])
    assert told.startswith("In “style” against the base model: worse in CLIP-T")
    assert "in “photo” not found worse than the base model in CLIP-T" in told
    assert "too few images in “view”" in told


def likeness(value: float, half: float = 0.05, n: int = 20) -> Score:
    return Score(value=value, n=n, interval=(value - half, value + half), key="one")


def test_likeness_is_worse_where_intervals_lie_apart_in_every_training() -> None:
    one = {"photo": likeness(0.9), "view": likeness(0.5), "style": likeness(0.85)}
    top, others = compare_likeness([one, {**one, "photo": likeness(0.95)}])
    assert top == "photo"
    assert {other.category: other.outcome for other in others} == {"view": WORSE, "style": SAME}
    _, others = compare_likeness([one, {**one, "view": likeness(0.9)}])
    assert {other.category: other.outcome for other in others} == {"view": SAME, "style": SAME}
    _, few = compare_likeness([{name: one[name].model_copy(update={"n": 3}) for name in one}])
    assert {other.outcome for other in few} == {FEW}
    assert compare_likeness([{"photo": likeness(0.9)}]) == ("", ())


WORDS = set(
    """
    better worse no difference detected too few images in than to tell from against on of each
    prompt and or other others chosen seed seeds training one two which is fewer the three that
    settings need not measured beside so this about these adapters not plateau found none any them
    base model identity clip t
    """.split()
)


def test_answers_know_four_words_and_no_others() -> None:
    rng = random.Random(0)

    def some(names: tuple[str, ...] = NAMES) -> dict[str, str]:
        return {name: rng.choice([BETTER, WORSE, SAME, FEW]) for name in names}

    for _ in range(500):
        seeds = rng.choice([1, 2, 3])
        pairs = [contrast(f"arm {n}", **some()) for n in range(3)]
        kinds = {"style": pairs[0], "view": pairs[1]}
        groups = [{n: likeness(rng.random(), 0.1, rng.choice([2, 20])) for n in kinds}]
        for told in (
            answer_compare(pairs, seeds, NAMES),
            answer_plateau(pairs, seeds, NAMES),
            answer_choose("arm", pairs, seeds, NAMES, (1, 2)),
            answer_weak_spots(kinds, compare_likeness(groups), seeds, NAMES),
        ):
            assert told.endswith(".")
            assert told.count(".") - len(re.findall(r"\d\.\d", told)) == 1
            said = re.sub(r"“[^”]*”|\([^)]*\)", " ", told)
            assert set(re.findall(r"[a-z]+", said.lower())) <= WORDS


# --- choosing ----------------------------------------------------------------------------


def card(identity: float, clip_t: float = 0.3, alarms: tuple[str, ...] = ()) -> Scorecard:
    scores = {
        "identity": Score(value=identity, n=8, floor=0.0, ceiling=1.0, lift=identity, key="one"),
        "clip_t": Score(value=clip_t, n=8, floor=0.3, key="one"),
    }
    return Scorecard(
        alarms=alarms,
        scores=scores,
        encoders="picturebook",
        photos=6,
        confidence=0.95,
        resamples=100,
        pictures=(
            PictureScores(
                file="0.png", prompt="p", category="", seed=0, scheduler="ddim", steps=2, values={}
            ),
        ),
    )


def test_an_arm_is_chosen_by_likeness_and_obedience_together() -> None:
    cards = [[card(0.9, 0.05)], [card(0.8, 0.28)], [card(0.3, 0.3)]]
    assert choose_arm(cards, NAMES) == 1
    assert choose_arm(cards, ["identity"]) == 0
    assert choose_arm(cards, ["clip_t"]) == 2
    # With any other measures the first alone chooses; of leakage, less is better.
    assert choose_arm(cards, ["identity", "clip_t", "variety"]) == 0
    leaking = [
        card(0.5).model_copy(update={"scores": {"leakage": Score(value=v)}}) for v in (3, 1, 2)
    ]
    assert choose_arm([[one] for one in leaking], ["leakage"]) == 1
    # The mean over training seeds counts, and of nearly equal arms the first.
    assert choose_arm([[card(0.5), card(0.9)], [card(0.7), card(0.705)]], NAMES) == 0
    assert choose_arm([[card(0.9, alarms=("a copy",))], [card(0.5)]], NAMES) == 1


def test_the_chosen_ones_own_score_is_too_high_and_that_on_other_seeds_is_not() -> None:
    rng = random.Random(1)
    chosen, reported = [], []
    for _ in range(300):
        # Sixteen arms that do not differ at all, each measured twice with noise.
        first, second = ([rng.gauss(0.5, 0.1) for _ in range(16)] for _ in range(2))
        best = choose_arm([[card(value)] for value in first], ["identity"])
        chosen.append(first[best])
        reported.append(second[best])
    assert sum(chosen) / 300 > 0.6
    assert sum(reported) / 300 == pytest.approx(0.5, abs=0.02)


def test_scores_of_several_trainings_are_joined_with_the_spread_between_them() -> None:
    one = Score(value=0.4, n=8, interval=(0.39, 0.41), floor=0.1, ceiling=0.9, lift=0.3, key="k")
    assert join_scores([one]) == one
    flat = join_scores([one, one.model_copy(update={"value": 0.6, "lift": None})])
    assert (flat.value, flat.n, flat.floor, flat.lift) == (0.5, 16, 0.1, None)
    assert flat.interval is not None
    assert flat.interval[1] - flat.interval[0] > 0.2
    assert "2 trainings: 0.400, 0.600" in flat.note
    shares = join_scores([one, one.model_copy(update={"value": 0.6})], is_share=True)
    assert shares.interval == (0.0, 1.0)
    assert join_scores([one, Score(note="not measured: gone")]).note == "not measured: gone"


# --- the work ----------------------------------------------------------------------------

SMALL = """
[settings]
train.steps = 2
train.rank = 2
adapter.blocks = "unet.mid_block"
train.batch_photos = 2
train.batch_priors = 2
priors.count = 2
priors.steps = 2
generate.steps = [2]
generate.images_per_prompt = 2
evaluate.resamples = 100
evaluate.encoders = "picturebook"
"""


class Teller:
    """Remembers what happened, and stops the work at a wanted moment."""

    def __init__(self, stop: Callable[[Event], bool] = lambda event: False) -> None:
        self.events: list[Event] = []
        self.stop = stop

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.stop(event):
            raise KeyboardInterrupt

    def count(self, kind: type) -> Counter[str]:
        return Counter(event.stage for event in self.events if isinstance(event, kind))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    make_photos(folder / "photos")
    return folder


def small_study(home: Path, tiny_sdxl: Path, text: str, **values: str) -> Study:
    head = change(HEAD, base=json.dumps(str(tiny_sdxl)), **values)
    return read_study(write(home, head + SMALL + text))


def read_json(out: Path) -> dict[str, Any]:
    found = json.loads((out / "study.json").read_text())
    for arm in found["arms"]:
        arm.pop("seconds_per_picture")
    return dict(found)


def test_what_arms_share_is_trained_and_drawn_once(home: Path, tiny_sdxl: Path) -> None:
    text = "[grid]\ncheckpoint = [0.5, 1.0]\nweight = [0.5, 1.0]\n"
    study = small_study(home, tiny_sdxl, text, answer='"choose"')
    told, out = Teller(), home / "grid"
    findings = run_study(study, out, observe=told)
    started = told.count(StageStarted)
    assert started["train"] == started["priors"] == 1
    # Four arms and the base model, with the seeds that choose and with those that report.
    assert started["generate-pictures"] == 2 * (4 + 1)
    assert started["evaluate-pictures"] == 2 * 4
    assert len({run for arm in findings.arms for run in arm.runs}) == 1
    assert len({folder for arm in findings.arms for folder in arm.pictures}) == 4
    active = [read_image_set(out / arm.pictures[0] / "images/pictures") for arm in findings.arms]
    assert [images.adapters[0].weight for images in active] == [0.5, 1.0, 0.5, 1.0]
    assert len({images.adapters[0].sha256 for images in active}) == 2


def test_seeds_that_choose_are_never_reported_on(home: Path, tiny_sdxl: Path) -> None:
    study = small_study(home, tiny_sdxl, "[grid]\nweight = [0.5, 1.0]\n", answer='"choose"')
    findings = run_study(study, home / "grid")
    for arm in findings.arms:
        chose = {picture.seed for card in arm.choosing for picture in card.pictures}
        reported = {picture.seed for card in arm.cards for picture in card.pictures}
        assert (chose, reported) == ({0}, {1})
    best = choose_arm([arm.choosing for arm in findings.arms], study.decide_by)
    assert findings.chosen == findings.arms[best].name
    assert "chosen on 1 seed of each prompt, on 1 other:" in findings.answer


@pytest.mark.slow
def test_fewer_photos_are_another_training_with_the_same_class_images(
    home: Path, tiny_sdxl: Path
) -> None:
    text = "[grid]\nphoto_count = [1, 2, 3]\n"
    told = Teller()
    study = small_study(home, tiny_sdxl, text, answer='"plateau"')
    findings = run_study(study, home / "photo-study", observe=told)
    started = told.count(StageStarted)
    assert (started["train"], started["priors"]) == (3, 1)
    assert started["generate-pictures"] == 3 + 1
    assert [arm.name for arm in findings.arms] == ["1 photo", "2 photos", "3 photos"]
    assert all(arm.cards[0].photos == 3 for arm in findings.arms)


def test_a_stopped_study_goes_on_and_ends_as_if_it_had_not_been(
    home: Path, tiny_sdxl: Path
) -> None:
    study = small_study(home, tiny_sdxl, TWO_ARMS)
    whole = run_study(study, home / "whole")

    def second_training(event: Event) -> bool:
        return isinstance(event, StageStarted) and stopped.count(StageStarted)["train"] == 2

    stopped, resumed = Teller(second_training), Teller()
    with pytest.raises(KeyboardInterrupt):
        run_study(study, home / "stopped", observe=stopped)
    assert not (home / "stopped" / "study.json").exists()
    again = run_study(study, home / "stopped", observe=resumed)
    assert resumed.count(StageStarted)["train"] == resumed.count(StageSkipped)["train"] == 1
    assert again.answer == whole.answer
    assert read_json(home / "stopped") == read_json(home / "whole")
    idle = Teller()
    run_study(study, home / "stopped", observe=idle)
    assert idle.count(StageStarted) == {room.STAGE: 1}


def test_a_changed_file_does_only_what_is_new(home: Path, tiny_sdxl: Path) -> None:
    run_study(small_study(home, tiny_sdxl, TWO_ARMS), home / "whole")
    told = Teller()
    study = small_study(home, tiny_sdxl, TWO_ARMS, train_seeds="[0, 7]")
    findings = run_study(study, home / "whole", observe=told)
    started = told.count(StageStarted)
    assert (started["train"], started["priors"], started["generate-pictures"]) == (2, 1, 2)
    assert [len(arm.cards) for arm in findings.arms] == [2, 2]
    identity = findings.arms[0].measures()["identity"]
    assert identity.note.startswith("2 trainings: ")
    assert "two training seeds" in findings.answer


def test_arms_that_differ_in_the_sampler_are_compared_by_prompt_and_seed(
    home: Path, tiny_sdxl: Path
) -> None:
    text = '[grid]\nscheduler = ["ddim", "euler"]\n'
    # Nothing leaks where the class is not drawn, and nothing fails for want of it.
    names = '["identity", "leakage"]'
    study = small_study(
        home, tiny_sdxl, text, decide_by=names, prompts='["a photo of {subject}"]', floor="false"
    )
    [contrast] = run_study(study, home / "samplers").contrasts
    assert [one.measure for one in contrast.measures] == ["identity", "leakage"]
    assert [one.pairs for one in contrast.measures] == [2, 0]
    assert [one.outcome for one in contrast.measures] == [FEW, UNMEASURED]


def test_without_an_encoder_the_answer_says_so_and_not_that_images_are_few(
    home: Path, tiny_sdxl: Path
) -> None:
    # Picturebook's world has no judge for this one.
    study = small_study(home, tiny_sdxl, TWO_ARMS, decide_by='["dinov2"]')
    findings = run_study(study, home / "whole")
    assert findings.answer.startswith("Not measured")
    assert findings.contrasts == ()


def test_weak_spots_are_looked_for_in_each_category(home: Path, tiny_sdxl: Path) -> None:
    study = small_study(
        home,
        tiny_sdxl,
        '[[arms]]\nname = "adapter"\n',
        answer='"weak_spots"',
        decide_by='["clip_t"]',
        packs='["seed-v1"]',
    )
    findings = run_study(study, home / "weak")
    categories = {"photo", "scene", "style", "attribute", "view", "accessory"}
    assert set(findings.categories) == categories
    assert all(one.first == "base model" for one in findings.categories.values())
    written = json.loads((home / "weak" / "study.json").read_text())
    assert set(written["categories"]) == categories
    assert "in “style”" in (home / "weak" / "study.md").read_text()


@pytest.mark.parametrize(
    ("text", "problem", "kind"),
    [
        ("[grid]\nphoto_count = [1, 9]\n", "asks for 9 photos", ConfigError),
        ('[grid]\nscheduler = ["ddim", "none"]\n', "no scheduler 'none'", ConfigError),
        (TWO_ARMS + 'train.optimizer = "nadir"\n', "nadir", ConfigError),
    ],
)
def test_what_the_base_model_does_not_know_is_refused_before_anything_is_trained(
    home: Path, tiny_sdxl: Path, tmp_path: Path, text: str, problem: str, kind: type[Exception]
) -> None:
    study = small_study(home, tiny_sdxl, text)
    with pytest.raises(kind, match=problem):
        run_study(study, tmp_path / "out")
    assert not list(tmp_path.glob("out/runs/*"))


def test_a_folder_without_photos_leaves_nothing_behind(
    home: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    study = small_study(home, tiny_sdxl, TWO_ARMS, photos='"nowhere"')
    with pytest.raises(PhotoError):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(RunFolderError):
        run_study(small_study(home, tiny_sdxl, TWO_ARMS), tmp_path / "taken")


# --- who does it -------------------------------------------------------------------------


def test_work_is_given_back_by_name_and_told_of() -> None:
    told = Teller()
    done = Crew().do_all(lambda item, observe: item * 2, {"a": 1, "b": 2}, told, "doubling")
    assert done == {"a": 2, "b": 4}
    assert [(event.done, event.total) for event in told.events] == [(0, 2), (1, 2), (2, 2)]


def test_ray_is_used_if_it_is_there_and_asked_for_by_name_if_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray, which is not installed"), open_crew(2, "ray"):
        pass
    with pytest.raises(ConfigError, match="--on moon is no place"), open_crew(2, "moon"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "ray"])
def test_processes_and_ray_do_the_same_as_one(home: Path, tiny_sdxl: Path, place: str) -> None:
    if place == "ray":
        pytest.importorskip("ray")
    study = small_study(home, tiny_sdxl, TWO_ARMS, train_seeds="[0, 1]")
    run_study(study, home / "whole")
    told = Teller()
    shared = study.model_copy(update={"workers": 2})
    run_study(shared, home / f"shared-{place}", on=place, observe=told)
    one, other = read_json(home / "whole"), read_json(home / f"shared-{place}")
    assert one.pop("study") | {"workers": 2} == other.pop("study")
    assert one == other
    # Only what is left is done, whoever does it.
    run_study(study, home / f"shared-{place}", observe=told)
    assert told.count(StageStarted)["train"] == 0


# --- on the embedded model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def prior(home: Path) -> tuple[Study, StudyFindings, Path]:
    """The first recipe, with as little work as possible."""
    text = RECIPES[[path.stem for path in RECIPES].index("prior")].read_text()
    text = change(text, photos='"photos"', train_seeds="[0]", packs="[]", workers="1")
    text = change(text, prompts='["a photo of {subject}", "a photo of a {class_noun}"]')
    text = text.replace("[settings]", SMALL).replace("generate.images_per_prompt = 2\n", "", 1)
    (home / "file").mkdir()
    study = read_study(write(home / "file", text.replace('"photos"', '"../photos"')))
    return study, run_study(study, home / "prior"), home / "prior"


def test_a_study_ends_in_a_sentence(prior: tuple[Study, StudyFindings, Path]) -> None:
    study, findings, out = prior
    written = json.loads((out / "study.json").read_text())
    assert written["question"] == "Does prior preservation help?"
    assert written["answer"] == findings.answer
    assert "“with class images” against “without class images”: " in findings.answer
    assert findings.answer.endswith("not about the settings.")
    page = (out / "study.md").read_text()
    assert page.startswith(f"# {study.question}\n\n**{findings.answer}**")
    for arm in written["arms"]:
        identity = arm["measures"]["identity"]
        assert set(identity) >= {"value", "n", "interval", "floor", "ceiling", "lift", "key"}
        assert identity["floor"] is not None
        assert f"| {arm['name']} | Identity |" in page
    measures = {one["measure"] for one in written["comparisons"][0]["measures"]}
    assert measures == {"identity", "clip_t", "variety", "leakage"}


def test_the_command_goes_on_with_a_study_and_ends_with_its_answer(
    prior: tuple[Study, StudyFindings, Path], home: Path
) -> None:
    _, findings, out = prior
    file = str(home / "file" / "study.toml")
    done = CliRunner().invoke(main, ["--quiet", "study", file, "--out", str(out)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert f"Does prior preservation help? {findings.answer}" in said
    assert said.endswith(f"Everything: {out / 'study.md'}")
    wrong = CliRunner().invoke(main, ["study", str(home / "none.toml")])
    assert wrong.exit_code == 2
    assert "There is no study file" in wrong.output


# ------------------------------------------------------------------ names of folders


@pytest.mark.parametrize(
    ("sets", "known"),
    [
        ([], "2177728267ebebf1395bdaa425637df9515714ac8f236eae803799ae555530de"),
        (
            [
                *("train.steps=7", "memory.base_quantization=int8", "validation.every=3"),
                "adapter.init_lora_weights=gaussian",
            ],
            "34f5a50c35bcf164bbbeeeaf0681eb4bfab1f5f486db501b4db0e23d4c9b9afb",
        ),
    ],
)
def test_trainings_of_earlier_studies_are_known_by_their_settings(
    sets: list[str], known: str
) -> None:
    # Computed before settings were renamed: another hash trains every study anew.
    assert fingerprint(name_trained_settings(load_config(sets=sets))) == known


def test_a_base_in_fewer_bits_has_folders_of_its_own(home: Path) -> None:
    whole, small = (
        DrawnSet(home, load_config(sets=[f"memory.base_quantization={kind}"]), "b", (), home)
        for kind in ("auto", "int8")
    )
    assert whole.run.path != small.run.path
    trainings = [Training(home, drawn.config, "b", home, ()) for drawn in (whole, small)]
    assert len({training.class_run.path for training in trainings if training.class_run}) == 2
