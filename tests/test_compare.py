"""Comparisons say what the pairs show: seldom wrong without a change, and right with one."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from dreamloom.cli.main import main
from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import RunFolder, write_json
from dreamloom.evaluation.compare import (
    Comparison,
    compare_cards,
    compare_settings,
    tell_comparison,
)
from dreamloom.evaluation.encoders.catalogue import CLIP_VIT_B_32, DINO_VIT_S_16
from dreamloom.evaluation.metrics.scorecard import Group, PictureScores, Score, Scorecard
from dreamloom.evaluation.scorecard_files import find_scorecard

KEY = "encoder@1f3a/224"
PerImageValues = Mapping[str, np.ndarray]
"""By score: a row for each prompt, a column for each seed."""


def make_card(
    values: PerImageValues,
    *,
    keys: Mapping[str, str] | None = None,
    samplers: tuple[tuple[str, int], ...] = (("ddim", 25),),
    prompts: list[str] | None = None,
    variety: list[float] | None = None,
) -> Scorecard:
    shape = next(iter(values.values())).shape
    names = prompts or [f"prompt {number}" for number in range(shape[0])]
    keys = keys or {}
    scores = {
        name: Score(value=float(table.mean()), n=table.size, key=keys.get(name, KEY))
        for name, table in values.items()
    }
    groups: tuple[Group, ...] = ()
    if variety is not None:
        scores["variety"] = Score(value=float(np.mean(variety)), n=len(variety), key=KEY)
        groups = tuple(
            Group(prompt=text, pictures=shape[1], scores={"variety": Score(value=own, key=KEY)})
            for text, own in zip(names, variety, strict=True)
        )
    return Scorecard(
        scores=scores,
        by_prompt=groups,
        encoders="standard",
        photos=6,
        confidence=0.95,
        resamples=100,
        pictures=tuple(
            PictureScores(
                file=f"{row}-{seed}-{scheduler}-{steps}.png",
                prompt=text,
                category="photo",
                seed=seed,
                scheduler=scheduler,
                steps=steps,
                values={name: float(table[row, seed]) for name, table in values.items()},
            )
            for row, text in enumerate(names)
            for seed in range(shape[1])
            for scheduler, steps in samplers
        ),
    )


def noise(seed: int, shape: tuple[int, int] = (10, 3), spread: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, spread, shape)


def only(compared: tuple[Comparison, ...]) -> Comparison:
    (one,) = compared
    return one


def outcomes(compared: tuple[Comparison, ...]) -> dict[str, str]:
    return {one.measure: one.outcome for one in compared}


def test_numbers_agree_with_scipy():
    first, second = noise(0), noise(1) + 0.03
    one = only(compare_cards(make_card({"identity": first}), make_card({"identity": second})))
    gaps = (second - first).mean(axis=1)
    expected = stats.permutation_test(
        (gaps,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert one.difference == pytest.approx(gaps.mean())
    assert one.p == pytest.approx(expected.pvalue)
    assert one.p_corrected == one.p
    assert (one.pairs, one.prompts, one.key) == (30, 10, KEY)
    student = stats.t.interval(0.95, 9, gaps.mean(), stats.sem(gaps))
    assert one.interval is not None
    # Never narrower than Student's, and wider where the differences are skewed.
    assert one.interval[0] <= student[0] + 1e-5
    assert one.interval[1] >= student[1] - 1e-5
    assert one.interval[1] - one.interval[0] < 1.6 * (student[1] - student[0])


def test_the_words_follow_from_p_and_from_the_direction_that_is_better():
    base = {name: noise(place) for place, name in enumerate(("identity", "leakage", "clip_t"))}
    base["unheard_of"] = noise(8)
    raised = {name: table + 0.2 for name, table in base.items()} | {"clip_t": noise(7)}
    compared = compare_cards(make_card(base), make_card(raised))
    assert outcomes(compared) == {
        "identity": "better",
        "leakage": "worse",  # the class has become the subject
        "clip_t": "no difference detected",
        "unheard_of": "higher",  # nobody said which way is better
    }


def test_sides_exchanged_turn_every_sign():
    first = make_card({"identity": noise(0), "leakage": noise(1)})
    second = make_card({"identity": noise(2) + 0.1, "leakage": noise(3) + 0.1})
    turned = {"better": "worse", "worse": "better"}
    for there, back in zip(compare_cards(first, second), compare_cards(second, first), strict=True):
        assert back.difference == pytest.approx(-there.difference)
        assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-9)
        assert (back.p, back.p_corrected) == (there.p, there.p_corrected)
        assert back.outcome == turned[there.outcome]


def test_order_and_names_of_prompts_do_not_matter():
    first, second = make_card({"identity": noise(0)}), make_card({"identity": noise(1) + 0.02})
    one = only(compare_cards(first, second))
    shuffled = second.model_copy(update={"pictures": second.pictures[::-1]})
    assert only(compare_cards(first, shuffled)) == one
    names = [f"other words {number}" for number in range(10)]
    renamed = [
        make_card({"identity": table}, prompts=names) for table in (noise(0), noise(1) + 0.02)
    ]
    assert only(compare_cards(*renamed)) == one


def test_prompts_count_alike_however_many_pictures_they_have():
    first = {"identity": np.zeros((8, 4))}
    gaps = np.zeros((8, 4))
    gaps[0] = 0.8
    second = make_card({"identity": gaps})
    kept = [p for p in second.pictures if p.prompt == "prompt 0" or p.seed == 0]
    thinned = second.model_copy(update={"pictures": tuple(kept)})
    one = only(compare_cards(make_card(first), thinned))
    assert one.difference == pytest.approx(0.1)
    assert one.pairs == 11


def test_samplers_of_one_noise_are_no_pictures_of_their_own():
    one_prompt = (1, 6)
    samplers = (("ddim", 25), ("euler", 25), ("pndm", 50))
    sides = [
        make_card({"identity": noise(0, one_prompt) + gap}, samplers=samplers) for gap in (0, 0.2)
    ]
    one = only(compare_cards(*sides))
    assert one.pairs == 18
    assert one.p == pytest.approx(2 ** (1 - 6))  # six seeds, not eighteen pictures


def test_only_what_was_drawn_alike_makes_a_pair():
    first = make_card({"identity": noise(0)})
    other = make_card({"identity": noise(1)}, samplers=(("ddim", 25), ("euler", 30)))
    assert only(compare_cards(first, other)).pairs == 30
    with pytest.raises(EvaluationError, match="share no picture of the same prompt, seed"):
        compare_cards(first, make_card({"identity": noise(1)}, samplers=(("ddim", 50),)))
    unknown = first.model_copy(
        update={
            "pictures": tuple(
                one.model_copy(update={"prompt": None, "seed": None}) for one in first.pictures
            )
        }
    )
    with pytest.raises(EvaluationError, match="A folder without a manifest"):
        compare_cards(unknown, unknown)


def test_scores_of_other_encoders_are_not_compared():
    values = {"identity": noise(0), "clip_t": noise(1)}
    first = make_card(values)
    partly = make_card(values, keys={"clip_t": "other@2b/224"})
    said = {one.measure: one for one in compare_cards(first, partly)}
    assert said["identity"].outcome == "no difference detected"
    assert said["clip_t"].outcome == "not measured"
    assert said["clip_t"].note == (
        f"not compared: measured with {KEY} here and with other@2b/224 there"
    )
    wholly = make_card(values, keys=dict.fromkeys(values, "other@2b/224"))
    with pytest.raises(EvaluationError, match=f"{KEY} here and with other@2b/224 there"):
        compare_cards(first, wholly)


def test_what_one_side_has_not_measured_is_said():
    both = make_card({"identity": noise(0), "dino": noise(1)})
    absent = Score(note="not measured: dino is not on this machine")
    without = both.model_copy(update={"scores": {**both.scores, "dino": absent}})
    said = {one.measure: one for one in compare_cards(both, without)}
    assert said["dino"].outcome == "not measured"
    assert said["dino"].note == "not measured on the second side: dino is not on this machine"
    neither = both.model_copy(update={"scores": {"dino": absent}})
    with pytest.raises(EvaluationError, match="Neither side has a score"):
        compare_cards(neither, neither)
    with pytest.raises(EvaluationError, match=r"measured colour\. Measured are identity, dino"):
        compare_cards(both, both, ["colour"])


@pytest.mark.parametrize(
    ("shape", "scores", "reason"),
    [
        ((5, 8), 1, "5 prompts cannot tell 1 score from chance; 6 could"),
        ((6, 8), 3, "6 prompts cannot tell 3 scores from chance; 7 could"),
        ((7, 1), 1, "7 pairs, and at least 8 are needed"),
        ((1, 8), 8, "8 seeds cannot tell 8 scores from chance; 9 could"),
        ((3, 20), 1, "3 prompts cannot tell 1 score from chance; 6 could"),
    ],
)
def test_too_few_images_say_how_many_would_do(shape, scores, reason):
    first = {f"score {place}": noise(place, shape) for place in range(scores)}
    second = {name: table + 1 for name, table in first.items()}
    compared = compare_cards(make_card(first), make_card(second))
    assert set(outcomes(compared).values()) == {"too few images"}
    assert reason in tell_comparison(compared[0])
    assert compared[0].p is None
    assert compared[0].difference == pytest.approx(1)


def test_the_number_that_would_do_does():
    first = {f"score {place}": noise(place, (7, 2)) for place in range(3)}
    second = {name: table + 1 for name, table in first.items()}
    compared = compare_cards(make_card(first), make_card(second))
    assert set(outcomes(compared).values()) == {"higher"}
    assert [one.p_corrected for one in compared] == pytest.approx([3 / 64] * 3)


def test_what_cannot_be_told_leaves_the_family():
    shape = (12, 2)
    first, second = {"identity": noise(0, shape)}, {"identity": noise(0, shape) + 0.2}
    alone = only(compare_cards(make_card(first), make_card(second)))
    # A score of three prompts only must not make the other one harder to tell.
    sides = []
    for values, variety in ((first, 0.2), (second, 0.3)):
        card = make_card(values, variety=[variety] * 12)
        sides.append(card.model_copy(update={"by_prompt": card.by_prompt[:3]}))
    identity, variety = compare_cards(*sides)
    assert identity == alone
    assert variety.outcome == "too few images"


def test_one_prompt_speaks_for_itself_only():
    first, second = noise(0, (1, 12)), noise(1, (1, 12)) + 0.2
    one = only(compare_cards(make_card({"identity": first}), make_card({"identity": second})))
    assert one.outcome == "better"
    assert one.note == "this speaks for one prompt only"
    expected = stats.permutation_test(
        ((second - first)[0],), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert one.p == pytest.approx(expected.pvalue)


def test_variety_is_compared_prompt_by_prompt():
    values = {"identity": noise(0)}
    low, high = [0.2 + 0.01 * place for place in range(10)], [0.3] * 10
    sides = [make_card(values, variety=variety) for variety in (low, high)]
    one = compare_cards(*sides)[-1]
    assert (one.measure, one.outcome, one.pairs, one.prompts) == ("variety", "higher", 30, 10)
    assert one.difference == pytest.approx(0.3 - np.mean(low))
    # A prompt of which one side has other pictures is left out.
    fewer = sides[1].model_copy(update={"pictures": sides[1].pictures[:-1]})
    assert compare_cards(sides[0], fewer)[-1].prompts == 9


@pytest.mark.parametrize(
    ("name", "key", "gap", "small"),
    [
        ("dino", f"{DINO_VIT_S_16.repository}@1/224", 0.06, True),
        ("dino", f"{DINO_VIT_S_16.repository}@1/224", 0.14, False),
        ("dino", "some/other-dino@1/224", 0.06, False),
        ("clip_t", f"{CLIP_VIT_B_32.repository}@1/224", 0.03, True),
        ("clip_i", f"{CLIP_VIT_B_32.repository}@1/224", 0.03, False),
    ],
)
def test_differences_that_nobody_would_mind_are_told(name: str, key: str, gap: float, small: bool):
    values = noise(0, spread=0.01)
    sides = [make_card({name: values + more}, keys={name: key}) for more in (0, gap)]
    one = only(compare_cards(*sides))
    assert one.outcome == "better"
    assert one.below_practical_significance is small
    assert ("below practical significance" in tell_comparison(one)) is small
    # Without a difference there is nothing to call small.
    assert not only(compare_cards(sides[0], sides[0])).below_practical_significance


def test_a_card_is_no_different_from_itself():
    card = make_card({"identity": noise(0), "leakage": noise(1)}, variety=[0.3] * 10)
    compared = compare_cards(card, card)
    assert set(outcomes(compared).values()) == {"no difference detected"}
    assert {one.p for one in compared} == {1.0}
    assert {one.interval for one in compared} == {(0.0, 0.0)}


# --- several trainings -------------------------------------------------------------------


def train(seeds: int, luck: float, gap: float = 0.0, start: int = 0) -> list[Scorecard]:
    """Trainings that differ by their own luck as well as picture by picture."""
    rng = np.random.default_rng(start)
    return [
        make_card({"identity": noise(start + 10 * seed, (12, 2)) + gap + rng.normal(0, luck)})
        for seed in range(seeds)
    ]


def test_trainings_are_averaged_prompt_by_prompt():
    first, second = train(3, 0.0), train(3, 0.0, 0.05, start=5)
    one = only(compare_settings(first, second))
    gaps = np.mean(
        [
            [
                after.values["identity"] - before.values["identity"]
                for before, after in zip(a.pictures, b.pictures, strict=True)
            ]
            for a, b in zip(first, second, strict=True)
        ],
        axis=0,
    )
    by_prompt = gaps.reshape(12, 2).mean(axis=1)
    assert one.difference == pytest.approx(by_prompt.mean())
    assert (one.pairs, one.prompts, one.outcome, one.note) == (72, 12, "better", "")
    tested = stats.permutation_test(
        (by_prompt,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert one.p >= tested.pvalue


def test_few_trainings_speak_of_their_adapters():
    for count in (1, 2):
        one = only(compare_settings(train(count, 0.0), train(count, 0.0, 0.2, start=5)))
        assert one.outcome == "better"
        assert one.note == "this speaks of these adapters, not of the method"
    with pytest.raises(ValueError, match="same number of trainings, 1 or more; got 2 and 3"):
        compare_settings(train(2, 0), train(3, 0))
    with pytest.raises(ValueError, match="got 0 and 0"):
        compare_settings([], [])


def test_the_luck_of_trainings_is_not_taken_for_the_method():
    """Adapters differ for certain, and the method does not: only several trainings can tell."""
    found = {1: 0, 3: 0}
    for trial in range(40):
        first, second = train(3, 0.05, start=trial), train(3, 0.05, start=1000 + trial)
        for count in found:
            one = only(compare_settings(first[:count], second[:count]))
            found[count] += one.outcome in {"better", "worse"}
    assert found[1] >= 25
    assert found[3] <= 6


# --- how often it is wrong, and right ----------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 2), pytest.param((25, 2), marks=pytest.mark.slow)])
def test_null_data_are_seldom_told_apart(shape):
    """Of all scores of a comparison together at most 5 % may find something where nothing is."""
    rng, trials, wrong = np.random.default_rng(shape[0]), 200, 0
    names = ("identity", "clip_t", "leakage")
    for _ in range(trials):
        # Prompts differ, and pictures have more outliers than normal ones.
        shared = rng.normal(0, 0.2, (shape[0], 1))
        sides = [
            make_card({name: shared + 0.05 * rng.standard_t(3, shape) for name in names})
            for _ in range(2)
        ]
        wrong += not {"better", "worse"}.isdisjoint(outcomes(compare_cards(*sides)).values())
    # With 200 trials, 5 % can look like up to 9 %; without Holm it would be 14 %.
    assert wrong / trials <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / trials)


def test_a_planted_effect_is_found_and_never_taken_for_its_opposite():
    rng, trials, found = np.random.default_rng(0), 60, []
    for _ in range(trials):
        shared = rng.normal(0, 0.2, (12, 1))
        # As large as a picture's own spread; prompts spread four times as much, and cancel.
        sides = [
            make_card({"identity": shared + gap + rng.normal(0, 0.05, (12, 2))})
            for gap in (0, 0.05)
        ]
        found.append(only(compare_cards(*sides)).outcome)
    assert found.count("better") / trials > 0.8
    assert "worse" not in found


# --- the command -------------------------------------------------------------------------


def run(*words: object):
    return CliRunner().invoke(main, ["compare", *(str(word) for word in words)])


@pytest.fixture
def cards(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_json(first, make_card({"identity": noise(0), "clip_t": noise(1)}))
    write_json(second, make_card({"identity": noise(2) + 0.2, "clip_t": noise(3)}))
    return first, second


def test_files_are_compared_on_the_terminal(cards: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "compared.json"
    done = run(*cards, "--json", out)
    assert done.exit_code == 0, done.output
    assert "Identity: better; +0." in done.output
    assert "CLIP-T: no difference detected; " in done.output
    assert KEY in done.output
    listed = json.loads(out.read_text(encoding="utf-8"))
    expected = compare_cards(*(find_scorecard(str(path)) for path in cards))
    assert [Comparison.model_validate(one) for one in listed] == list(expected)
    single = run(*cards, "--score", "clip_t")
    assert "Identity" not in single.output


def test_sets_of_runs_are_compared(cards: tuple[Path, Path], tmp_path: Path):
    first, second = (find_scorecard(str(path)) for path in cards)
    folder = tmp_path / "run"
    write_json(RunFolder(folder).scores, {"base": first, "pictures": second})
    done = run(f"{folder}:base", f"{folder}:pictures")
    assert done.exit_code == 0, done.output
    assert "Identity: better" in done.output
    alone = tmp_path / "alone"
    write_json(RunFolder(alone).scores, {"pictures": second})
    assert find_scorecard(str(alone)) == second == find_scorecard(str(RunFolder(alone).scores))


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("nowhere.json", "There is no scores file and no run nowhere.json."),
        ("nowhere:base", "There is no scores file and no run nowhere."),
        ("run", "Its sets are base, pictures: name one as RUN:SET."),
        ("run:pixels", "has no set pixels. Its sets are base, pictures"),
        ("broken.json", "broken.json cannot be read as JSON."),
        ("list.json", "list.json is no scorecard"),
        ("older.json", "older.json holds no scores as this version writes them."),
        ("empty", "empty has no scores."),
    ],
)
def test_what_cannot_be_found_is_told_in_a_sentence(
    where: str, problem: str, cards: tuple[Path, Path], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    card = find_scorecard(str(cards[0]))
    write_json(RunFolder(tmp_path / "run").scores, {"base": card, "pictures": card})
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    write_json(tmp_path / "older.json", {"scores": {"identity": 0.5}})
    (tmp_path / "empty").mkdir()
    done = run(where, cards[1])
    assert done.exit_code == 1
    assert problem in " ".join(done.output.split())


def test_nothing_in_common_is_told_and_writes_nothing(cards: tuple[Path, Path], tmp_path: Path):
    other = tmp_path / "other.json"
    write_json(other, make_card({"identity": noise(0)}, keys={"identity": "other@9"}))
    out = tmp_path / "compared.json"
    done = run(cards[0], other, "--score", "identity", "--json", out)
    assert done.exit_code == 1
    assert "measured with encoder@1f3a/224 here and with other@9 there" in done.output
    assert not out.exists()
