"""Search: budgets that hold, halving that finds, comparisons that do not flatter."""

import itertools
import json
import random
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import (
    AdapterError,
    ConfigError,
    EvaluationError,
    PhotoError,
    RunFolderError,
)
from dreamloom.core.events import Progress, StageSkipped
from dreamloom.core.manifests import ImageSet, Picture, read_image_set
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.compare import Comparison
from dreamloom.evaluation.encoders.loading import load_encoders
from dreamloom.experiments.merge_search.candidates import (
    GROUPS,
    MergeWeights,
    draw_design,
    propose_near,
    spread,
)
from dreamloom.experiments.merge_search.embeddings import MeasuredImage, PictureJudge, References
from dreamloom.experiments.merge_search.findings import Tried, write_command
from dreamloom.experiments.merge_search.plan import (
    correlate_rounds,
    halve,
    plan_search,
    split_prompts,
)
from dreamloom.experiments.merge_search.plot import draw_front
from dreamloom.experiments.merge_search.request import (
    SearchRequest,
    Words,
    list_prompts,
    name_class,
)
from dreamloom.experiments.merge_search.retention import (
    Ends,
    attribute_change,
    correlate_ranks,
    find_front,
    join_shares,
)
from dreamloom.experiments.merge_search.running import run_search
from dreamloom.experiments.merge_search.summarise import (
    compare_retention,
    decide_together,
    write_verdict,
)
from dreamloom.experiments.merge_search.work import read_measured
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.merging import combine
from dreamloom.models.base import Sampler, Shot
from dreamloom.picturebook.world import sample_identity, vary
from studio_set import claimed
from tools.picturebook.drawing import draw

BETWEEN = (0.3, 1.5)
RIVALS = {"the plain sum": spread(1, 1, False), "0.8 and 1.0": spread(0.8, 1, False)}

shares = st.lists(st.floats(-1, 2), min_size=3, max_size=3)


# --- several aims at once ----------------------------------------------------------------


@given(shares)
def test_no_share_makes_up_for_another(some: list[float]) -> None:
    flat = join_shares(some)
    assert 0 <= flat <= 1
    assert flat <= np.mean([min(1, max(0, share)) for share in some]) + 1e-12
    assert flat == pytest.approx(join_shares(some[::-1]))
    if min(some) <= 0:
        assert flat == 0
    if min(some) >= 1:
        assert flat == 1


@given(shares, shares)
def test_a_change_is_the_sum_of_what_each_share_did(
    before: list[float], after: list[float]
) -> None:
    counts = attribute_change(before, after)
    told = sum(c * (b - a) for c, a, b in zip(counts, before, after, strict=True))
    assert told == pytest.approx(join_shares(after) - join_shares(before), abs=0.01)
    assert all(count >= 0 for count in counts)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=20))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, ...]]) -> None:
    def beats(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    front = find_front(points)
    for number, point in enumerate(points):
        beaten_by = [place for place in front if beats(points[place], point)]
        assert (number in front) == (not beaten_by)
        if number in front:
            assert not any(beats(other, point) for other in points)


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=3, max_size=12))
def test_ranks_correlate_as_scipy_says(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = correlate_ranks(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic)


# --- the plan ----------------------------------------------------------------------------


@given(st.lists(st.integers(), min_size=2, max_size=40, unique=True))
def test_prompts_are_parted_and_none_is_on_both_sides(numbers: list[int]) -> None:
    prompts = [str(number) for number in numbers]
    kept, held = split_prompts(prompts)
    assert sorted([*kept, *held]) == sorted(prompts)
    assert kept
    assert len(held) >= len(prompts) // 2


@given(
    budget=st.integers(0, 1500),
    count=st.integers(1, 30),
    steps=st.integers(1, 50),
    parameters=st.sampled_from([2, 6]),
)
def test_a_plan_never_costs_more_than_its_budget(
    budget: int, count: int, steps: int, parameters: int
) -> None:
    searched, held = split_prompts([f"{n}" for n in range(count)])
    leaking = [f"class {text}" for text in held]
    try:
        plan = plan_search(budget, (searched, held, leaking), steps, parameters)
    except ConfigError as error:
        fewest = int(error.hint.split("--budget ")[1].split()[0])
        assert fewest > budget
        # Larger budgets hold out more, so the fewest may move; it suffices in the end.
        assert plan_search(fewest + 200, (searched, held, leaking), steps, parameters)
        return
    assert plan.pictures <= budget
    drawn = set()
    names = [f"{n}" for n in range(plan.rounds[0].candidates)]
    fresh = itertools.count()
    for one in plan.rounds:
        names = [
            *names[: one.candidates - one.fresh],
            *(f"new {next(fresh)}" for _ in range(one.fresh)),
        ]
        if one is plan.rounds[0]:
            names = [f"{n}" for n in range(one.candidates)]
        for name in (*names, "base", "subject", "style"):
            drawn |= {(name, shot, one.steps) for shot in plan.shots[: one.shots]}
    drawn |= {
        (name, shot, steps)
        for name in ("base", "subject", "style", "winner", "sum", "usual")
        for shot in plan.held_out
    }
    drawn |= {(n, shot, steps) for n in ("base", "winner", "sum", "usual") for shot in plan.leaks}
    assert len(drawn) == plan.pictures
    assert len(plan.held_out) >= 8
    assert not {shot.seed for shot in plan.shots} & {shot.seed for shot in plan.held_out}
    if count > 1:
        assert not {s.prompt for s in plan.shots} & {s.prompt for s in plan.held_out}


def test_the_fewest_pictures_that_are_told_suffice() -> None:
    prompts = ["a", "b", "c", "d"], [str(n) for n in range(8)], ["x", "y", "z", "w"]
    with pytest.raises(ConfigError) as caught:
        plan_search(20, prompts, 25, 2)
    assert caught.value.problem == (
        "A budget of 20 pictures is too small: a search over these prompts draws 118 at least."
    )
    assert plan_search(118, prompts, 25, 2).pictures == 118
    with pytest.raises(ConfigError):
        plan_search(117, prompts, 25, 2)


def test_more_budget_buys_more_candidates_and_more_pictures_of_each() -> None:
    prompts = [str(n) for n in range(8)], [f"h{n}" for n in range(8)], []
    plans = [plan_search(budget, prompts, 25, 2) for budget in (120, 200, 400, 800)]
    assert [p.rounds[0].candidates for p in plans] == sorted(p.rounds[0].candidates for p in plans)
    assert [p.rounds[0].shots for p in plans] == sorted(p.rounds[0].shots for p in plans)
    assert all(p.rounds[0].steps == 10 and p.rounds[1].steps == 25 for p in plans)


# --- candidates --------------------------------------------------------------------------


@pytest.mark.parametrize("by_block", [False, True])
def test_the_first_candidates_hold_the_rivals_and_spread_over_the_weights(by_block: bool) -> None:
    rivals = [spread(1, 1, by_block), spread(0.8, 1, by_block)]
    design = draw_design(20, by_block, BETWEEN, 3, rivals)
    assert design[:2] == rivals
    assert len(set(design)) == 20
    assert design == draw_design(20, by_block, BETWEEN, 3, rivals)
    assert design != draw_design(20, by_block, BETWEEN, 4, rivals)
    weights = np.array([(*one.subject, *one.style) for one in design])
    assert weights.shape == (20, 6 if by_block else 2)
    assert (weights >= 0.3).all()
    assert (weights <= 1.5).all()
    assert (np.ptp(weights, axis=0) > 0.9).all()
    near = propose_near(design[:2], 5, design, BETWEEN, 0)
    assert len(set(near) - set(design)) == 5
    assert len({one.name for one in (*design, *near)}) == 25


def test_candidates_that_are_all_known_are_not_proposed_again() -> None:
    known = [MergeWeights((a / 100,), (b / 100,)) for a in range(100, 103) for b in range(100, 103)]
    assert propose_near(known[:1], 4, known, (1.0, 1.02), 0) == []


# --- halving -----------------------------------------------------------------------------

BEST = (0.65, 1.2)


def distance(candidate: MergeWeights) -> float:
    return float(np.hypot(candidate.subject[0] - BEST[0], candidate.style[0] - BEST[1]))


def search_planted(seed: int, noise: float) -> list:
    """Search where the truth is known: a hill over the weights, and less noise for more shots."""
    rng = np.random.default_rng(seed)

    def measure(candidates, one):
        found = {}
        for candidate in candidates:
            height = 1 - distance(candidate)
            found[candidate] = {
                aim: height + noise * rng.normal() / np.sqrt(one.shots)
                for aim in ("identity", "style", "prompt")
            }
        return found

    prompts = [str(n) for n in range(8)], [f"h{n}" for n in range(8)], []
    rounds = plan_search(200, prompts, 25, 2).rounds
    design = draw_design(rounds[0].candidates, False, BETWEEN, seed, list(RIVALS.values()))
    return halve(design, rounds, measure, BETWEEN, seed)


def test_a_planted_optimum_is_found() -> None:
    found = [search_planted(seed, noise=0.0) for seed in range(20)]
    gaps = [distance(rounds[-1].candidates[0]) for rounds in found]
    assert max(gaps) < 0.25
    # Candidates that join near the leaders bring it nearer than the first ones lie.
    first = [min(distance(one) for one in rounds[0].candidates) for rounds in found]
    assert all(gap <= least for gap, least in zip(gaps, first, strict=True))
    assert np.mean(gaps) < 0.85 * np.mean(first)


def test_with_noise_it_is_still_found_better_than_by_taking_what_everybody_takes() -> None:
    gaps = [distance(search_planted(seed, 0.15)[-1].candidates[0]) for seed in range(40)]
    assert np.mean(gaps) < 0.75 * min(distance(rival) for rival in RIVALS.values())


def test_rounds_have_the_planned_sizes_and_the_same_seed_searches_the_same() -> None:
    found = search_planted(1, 0.1)
    for before, after in itertools.pairwise(found):
        stay = after.round.candidates - after.round.fresh
        assert len(after.candidates) == after.round.candidates
        assert set(before.candidates[:stay]) <= set(after.candidates)
    assert [one.candidates for one in found] == [one.candidates for one in search_planted(1, 0.1)]
    assert correlate_rounds(found[0], found[0]) == pytest.approx(1)


# --- shares ------------------------------------------------------------------------------


def measured(
    identity: float | None, style: float, prompt: float | None = 0.4, **values
) -> MeasuredImage:
    return MeasuredImage(
        identity=None if identity is None else (identity, identity),
        style=(style,),
        prompt=prompt,
        others=None if prompt is None else 0.2,
        copy_photo=0.3,
        copy_style=None,
        copies_photo=False,
        copies_style=False,
    ).model_copy(update=values)


def make_ends(prompts: int = 8) -> Ends:
    return Ends(
        prompts=[f"{n}" for n in range(prompts)],
        base=[measured(0.1, 0.2)] * prompts,
        subject=[measured(0.9, 0.2)] * prompts,
        style=[measured(0.1, 0.6)] * prompts,
    )


def test_shares_lie_between_the_ends() -> None:
    ends = make_ends()
    assert ends.keep(ends.base) == pytest.approx({"identity": 0, "style": 0, "prompt": 1})
    assert ends.keep(ends.subject)["identity"] == pytest.approx(1)
    assert ends.keep(ends.style)["style"] == pytest.approx(1)
    half = ends.keep([measured(0.5, 0.4, 0.3)] * 8)
    assert half == pytest.approx({"identity": 0.5, "style": 0.5, "prompt": 0.5})


def test_copies_and_pictures_of_nobody_earn_no_credit() -> None:
    ends = make_ends()
    full = measured(0.9, 0.6)
    for empty in (measured(None, 0.6), measured(0.9, 0.6, copies_photo=True)):
        kept = ends.keep([full] * 4 + [empty] * 4)
        assert kept["identity"] == pytest.approx(0.5)
        assert kept["style"] == pytest.approx(1)
    kept = ends.keep([full] * 4 + [measured(0.9, 0.6, copies_style=True)] * 4)
    assert kept["style"] == pytest.approx(0.5)
    nobody = replace(ends, base=[measured(None, 0.2)] * 8)
    assert nobody.keep([measured(None, 0.6)] * 8)["identity"] == pytest.approx(0)


def test_an_aim_without_room_or_encoder_is_left_out() -> None:
    ends = make_ends()
    flat = replace(ends, subject=ends.base)
    assert set(flat.keep(ends.style)) == {"style", "prompt"}
    assert flat.room("identity") is None
    mute = Ends(
        ends.prompts, *([measured(v, s, None)] * 8 for v, s in ((0.1, 0.2), (0.9, 0.2), (0.1, 0.6)))
    )
    assert set(mute.keep(mute.style)) == {"identity", "style"}
    scores = mute.score(mute.style, {}, 200, 0.95)
    assert scores["prompt"].value is None
    assert scores["style"].value == pytest.approx(1)


# --- the winner against what everybody takes ---------------------------------------------


def varied(gain: float, seed: int, prompts: int = 8) -> list[MeasuredImage]:
    rng = random.Random(seed)
    return [
        measured(0.4 + gain + 0.05 * rng.gauss(0, 1), 0.4 + 0.02 * rng.gauss(0, 1), 0.35)
        for _ in range(prompts)
    ]


def compare(gain: float, prompts: int = 8) -> Comparison:
    ends, first = make_ends(prompts), varied(0, 1, prompts)
    one = compare_retention(ends, first, varied(gain, 2, prompts), 2)
    return decide_together({"rival": one})["rival"]


def test_a_winner_that_keeps_more_is_better_and_one_that_keeps_less_is_worse() -> None:
    better, worse = compare(0.3), compare(-0.25)
    assert (better.outcome, worse.outcome) == ("better", "worse")
    low, high = better.interval
    assert 0 < low < better.difference < high
    told = join_shares(list(make_ends().keep(varied(0.3, 2)).values()))
    was = join_shares(list(make_ends().keep(varied(0, 1)).values()))
    assert better.difference == pytest.approx(told - was, abs=1e-3)


def test_too_few_pictures_are_told_before_anything_is_claimed() -> None:
    assert compare(0.3, prompts=6).outcome == "too few images"
    assert compare(0.3, prompts=7).outcome == "too few images"
    assert compare(0.0).outcome == "no difference detected"


def test_where_nothing_differs_a_difference_is_seldom_claimed() -> None:
    ends, claimed = make_ends(), 0
    for seed in range(100):
        one = compare_retention(ends, varied(0, 2 * seed), varied(0, 2 * seed + 1))
        claimed += decide_together({"rival": one})["rival"].outcome != "no difference detected"
    assert claimed / 100 < 0.1


def test_two_comparisons_are_corrected_together() -> None:
    one = Comparison(measure="kept together", outcome="too few images", difference=0.1, p=0.03)
    two = one.model_copy(update={"p": 0.04, "difference": -0.1})
    decided = decide_together({"a": one, "b": two})
    assert {c.outcome for c in decided.values()} == {"no difference detected"}
    assert decide_together({"a": one})["a"].outcome == "better"
    assert decide_together({"b": two})["b"].outcome == "worse"


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ("better", "better than 0.8 and 1.0"),
        ("no difference detected", "no better than 0.8 and 1.0: no difference detected"),
        ("worse", "no better than 0.8 and 1.0: worse, so take 0.8 and 1.0"),
        ("too few images", "too few held-out pictures to tell it from 0.8 and 1.0"),
    ],
)
def test_the_verdict_says_when_searching_was_for_nothing(outcome: str, says: str) -> None:
    one = Comparison(measure="kept together", outcome=outcome, difference=0.01)
    winner = MergeWeights((0.93,), (1.2,))
    told = write_verdict(winner, dict.fromkeys(RIVALS, one), RIVALS)
    assert told.startswith("0.93 and 1.2 on held-out prompts and seeds: ")
    assert f"; {says} (+0.010)." in told
    itself = write_verdict(RIVALS["0.8 and 1.0"], {"the plain sum": one}, RIVALS)
    assert itself.endswith("; no better than 0.8 and 1.0: they are the same.")


# --- prompts -----------------------------------------------------------------------------


def test_prompts_call_the_style_and_those_of_other_styles_are_left_out() -> None:
    words = Words("rraj person", "person", "pixel")
    request = SearchRequest(Path("a"), Path("b"), Path("p"), Path("o"))
    prompts, notes = list_prompts(request, words, "picturebook")
    assert len(prompts) == 17
    assert all(text.startswith("pixel, a ") and "rraj person" in text for text in prompts)
    assert not any("Van Gogh" in text for text in prompts)
    assert notes == [
        "3 prompts of picturebook-v1 ask for another style, or not for the subject, and are left "
        "out."
    ]
    own = replace(
        request, prompts=("a pixel {subject}", "a photo of {subject}", "a photo of a dog")
    )
    assert list_prompts(own, words, "picturebook")[0] == [
        "a pixel rraj person",
        "pixel, a photo of rraj person",
    ]
    with pytest.raises(ConfigError, match="No prompt names the subject, rraj person"):
        list_prompts(replace(request, prompts=("a photo of a dog",)), words, "picturebook")
    assert name_class(["a photo of Rraj person"], Words("rraj person", "owl", "")) == [
        "a photo of an owl"
    ]


# --- the drawing -------------------------------------------------------------------------


def tried(name: str, **kept: float) -> Tried:
    return Tried(name=name, subject=(1.0,), style=(1.0,), kept=kept, together=0.5)


def test_the_front_is_drawn_with_every_candidate() -> None:
    some = [
        tried("a", identity=0.2, style=0.9, prompt=0.5),
        tried("b", identity=0.8, style=0.3, prompt=0.9),
        tried("<c>", identity=-0.4, style=1.2),
    ]
    drawing = draw_front(some, ["a", "b"], "b", {"<c>": "0.8 & 1"})
    assert drawing.count('class="point"') == 3 + 2  # and the two of the legend
    assert drawing.count('class="front"') == 2 + 1
    assert "0.8 &amp; 1" in drawing
    assert "winner" in drawing
    assert "<c>" not in drawing
    with pytest.raises(ValueError, match="both subject and style"):
        draw_front([tried("a", identity=1.0)], ["a"], "a", {})


# --- a whole search on a tiny base model -------------------------------------------------

PROMPTS = tuple(
    f"a {medium} of {{subject}}{place}"
    for place in ("", " in the snow", " in a dog", " in a photo", " of snow")
    for medium in ("photo", "painting")
)
SAMPLER = Sampler("ddim", 2, 2.0)


@pytest.fixture(scope="module")
def taught(model, tmp_path_factory):
    """Two adapters that change every picture, and photos that look as they draw."""
    home = tmp_path_factory.mktemp("taught")
    for seed, name in enumerate(("subject", "style"), 1):
        adapter = make_adapter(model, seed, name)
        write_adapter(home / f"{name}.safetensors", adapter)
        (home / name).mkdir()
        with model.apply_adapters([(adapter, 1.0)]):
            shots = [Shot(f"a photo of rraj person {n}", 50 + n) for n in range(4)]
            for number, image in enumerate(model.sample(shots, SAMPLER)):
                image.save(home / name / f"{number}.png")
    return home


# Adapters tell a base's name alone, so searches name its folder.
BASE: dict[str, str] = {}


@pytest.fixture(autouse=True, scope="module")
def known_base(tiny_sdxl: Path) -> None:
    BASE["base"] = str(tiny_sdxl)


def make_adapter(model, seed: int, name: str, loud: float = 60.0) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    blocks = ("conv_in", "down_blocks.1", "mid_block", "up_blocks.1", "conv_out")
    layers = {}
    for layer, module in model._components["unet"].named_modules():
        if not layer.startswith(blocks) or not isinstance(
            module, torch.nn.Linear | torch.nn.Conv2d
        ):
            continue
        weight = module.weight
        up = torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), generator=rng)
        down = torch.randn(2, *weight.shape[1:], generator=rng)
        # What the judges of drawings can tell apart in pictures of noise is their colours.
        share = loud if layer == "conv_out" else 0.3
        scale = share * float(weight.detach().norm()) / float(up.norm() * down.norm())
        layers[f"unet.{layer}"] = Layer(down * scale, up)
    words = {"subject": ("rraj person", "person"), "style": ("snow", "picture")}[name]
    return Adapter(
        layers,
        {
            "dreamloom.base": model.identity.name,
            "dreamloom.base_fingerprint": model.identity.fingerprint,
            "dreamloom.subject": words[0],
            "dreamloom.class_noun": words[1],
        },
    )


def make_request(home: Path, out: Path, **changes) -> SearchRequest:
    request = SearchRequest(
        subject=home / "subject.safetensors",
        style=home / "style.safetensors",
        photos=home / "subject",
        style_photos=home / "style",
        out=out,
        prompts=PROMPTS,
        budget=118,
    )
    return replace(request, **changes)


def settings(**changes) -> LoomConfig:
    overrides = {
        "device": "cpu",
        "generate.steps": (2,),
        "generate.guidance": 2.0,
        "evaluate.encoders": "picturebook",
        "evaluate.resamples": 200,
    }
    return load_config(overrides=overrides | BASE | changes)


def list_pictures(out: Path) -> list[Path]:
    return sorted(out.glob("images/*/*.png"))


@pytest.fixture(scope="module")
def searched(taught, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "search"
    return out, run_search(make_request(taught, out), settings())


def test_a_search_draws_no_more_than_its_budget_and_says_what_it_found(searched) -> None:
    out, found = searched
    assert found.pictures == len(list_pictures(out)) <= 118
    written = json.loads((out / "search.json").read_text())
    assert written == json.loads(found.model_dump_json())
    assert "0.8 and 1.0" in found.verdict
    page = (out / "search.md").read_text()
    assert found.verdict in page
    assert found.command in page
    assert (out / "search.svg").read_text().startswith("<svg")
    assert [len(one.candidates) for one in found.rounds] == [4, 2, 2]
    assert found.winner == found.rounds[-1].candidates[0]
    assert set(found.front) <= {one.name for one in found.compared_on.candidates}
    held = found.held_out["the winner"]
    assert set(held.kept) == {"identity", "style", "prompt"}
    assert {"identity", "clip_t", "copy", "leakage"} <= set(held.scores)
    assert held.scores["leakage"].n == 4
    assert not set(found.prompts) & set(found.held_out_prompts)
    assert not set(found.seeds) & set(found.held_out_seeds)


def test_every_candidate_of_a_round_draws_the_same_prompts_and_seeds(searched) -> None:
    out, found = searched
    drawn = {
        path.name: {(one.prompt, one.seed, one.steps) for one in read_image_set(path).pictures}
        for path in (out / "images").iterdir()
    }
    for one in found.rounds:
        cells = [
            {cell for cell in drawn[name] if cell[0] in found.prompts and cell[2] == one.steps}
            for name in ("base", "subject", "style", *(tried.name for tried in one.candidates))
        ]
        assert all(len(some) >= one.shots for some in cells)
        shared = set.intersection(*cells)
        assert len(shared) >= one.shots


def test_a_stopped_search_goes_on_and_ends_the_same(searched, taught, tmp_path) -> None:
    out, found = searched

    class Stopped(Exception):
        pass

    done = 0

    def stop(event) -> None:
        nonlocal done
        done += isinstance(event, Progress)
        if done == 14:
            raise Stopped

    request = make_request(taught, tmp_path / "search")
    with pytest.raises(Stopped):
        run_search(request, settings(), stop)
    before = {path: path.stat().st_mtime_ns for path in list_pictures(request.out)}
    assert 0 < len(before) < found.pictures
    measured_images = [path for path in request.out.glob("looks/*/*.json")]
    assert measured_images
    assert all(read_measured(path) for path in measured_images)
    again = run_search(request, settings())
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert again == found.model_copy(update={"command": again.command})
    assert again.command == found.command.replace(str(out), str(request.out))


def test_a_finished_search_is_not_done_again_and_another_does_not_take_its_place(
    searched, taught
) -> None:
    out, found = searched
    events = []
    assert run_search(make_request(taught, out), settings(), events.append) == found
    assert [type(event) for event in events] == [StageSkipped]
    with pytest.raises(RunFolderError) as caught:
        run_search(make_request(taught, out, budget=130), settings())
    assert caught.value.problem == (
        f"{out} already holds another search: budget is 118 there and 130 here."
    )
    assert len(list_pictures(out)) == found.pictures


# Two processes load torch, the base model and the judges, which takes longer than the search.
@pytest.mark.slow
def test_without_pictures_in_the_style_its_own_drawings_stand_for_it(taught, tmp_path) -> None:
    out = tmp_path / "search"
    found = run_search(make_request(taught, out, style_photos=None, workers=2), settings())
    assert found.pictures <= 118
    assert found.style_reference.startswith("8 pictures that the style's adapter drew")
    held = found.held_out["the winner"].kept["style"]
    assert held.value is not None or held.note


@pytest.mark.parametrize("by_block", [False, True])
def test_applied_weights_and_the_merged_file_draw_the_same(model, by_block, tmp_path) -> None:
    subject, style = (
        make_adapter(model, n, name, 0.3) for n, name in ((1, "subject"), (2, "style"))
    )
    candidate = draw_design(3, by_block, BETWEEN, 5, [])[2]
    shots = [Shot("snow, a photo of rraj person", seed) for seed in range(2)]
    with model.apply_adapters(candidate.weigh(subject, style)):
        active = model.sample(shots, SAMPLER)
    path = tmp_path / "merged.safetensors"
    write_adapter(path, combine([subject, style], candidate.request()).adapter)
    with model.apply_adapters([(read_adapter(path), 1.0)]):
        merged = model.sample(shots, SAMPLER)
    with model.apply_adapters([(subject, 1.0), (style, 1.0)]):
        other = model.sample(shots, SAMPLER)
    for one, two, three in zip(active, merged, other, strict=True):
        apart = np.abs(np.asarray(one, int) - np.asarray(two, int))
        assert apart.max() <= 1
        assert np.abs(np.asarray(one, int) - np.asarray(three, int)).max() > 10
    if by_block:
        assert len(set(candidate.subject)) == len(GROUPS)


@pytest.mark.parametrize("by_block", [False, True])
def test_the_command_merges_with_the_winners_weights(taught, by_block, tmp_path) -> None:
    winner = draw_design(3, by_block, BETWEEN, 5, [])[2]
    files = taught / "subject.safetensors", taught / "style.safetensors"
    out = tmp_path / "merged file.safetensors"
    command = write_command(files, winner, out)
    done = CliRunner().invoke(main, ["--quiet", *shlex.split(command)[1:]])
    assert done.exit_code == 0, done.output
    expected = combine([read_adapter(path) for path in files], winner.request()).adapter
    merged = read_adapter(out)
    assert set(merged.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(
            merged.layers[name].update(), layer.update(), rtol=1e-4, atol=1e-5
        )


def test_a_judge_tells_copies_and_what_came_along_with_the_style(tmp_path) -> None:
    sets = []
    for seed, (name, medium) in enumerate({"subject": "photo", "style": "pixel art"}.items()):
        shown = tmp_path / name
        shown.mkdir()
        who = sample_identity(random.Random(seed), "person")
        for number in range(4):
            drawing = vary(who, random.Random(number), medium=medium)
            draw(drawing).save(shown / f"{number}.png")
        sets.append(load_photos(shown, claimed(tmp_path / f"{name} loaded"), 64))
    photos, style = sets
    encoders = load_encoders("picturebook", "cpu")
    prompts = ("snow, a photo of rraj person", "snow, a photo of rraj person in the snow")
    references = References(photos, style, None, (prompts,), "rraj person", "person")
    pictures = tuple(
        Picture(file=f"{n}.png", prompt=text, seed=0, scheduler="ddim", steps=2, guidance=1.0)
        for n, text in enumerate((*prompts, "a dog"))
    )
    images = ImageSet(folder=tmp_path, base={}, resolution_px=64, pictures=pictures)
    for path, source in zip(images.paths(), ("subject/0", "style/1", "style/2"), strict=True):
        shutil.copy(tmp_path / f"{source}.png", path)
    photo, own_style, unknown = PictureJudge(encoders, references).measured(images)
    assert (photo.copies_photo, photo.copies_style) == (True, False)
    assert (own_style.copies_photo, own_style.copies_style) == (False, True)
    assert photo.identity[0] > 0.99
    assert own_style.style[1] == max(own_style.style) > 0.9
    assert photo.others is not None
    assert (unknown.prompt, unknown.others) == (None, None)
    assert photo.content_style is None
    seeing = PictureJudge(replace(encoders, dino=encoders.clip), references).measured(images)
    assert seeing[1].content_style > seeing[0].content_style


# --- what cannot be searched -------------------------------------------------------------


def refuse(request: SearchRequest, error: type[Exception], problem: str, **changes) -> None:
    with pytest.raises(error) as caught:
        run_search(request, settings(**changes))
    assert problem in caught.value.problem
    assert caught.value.hint
    assert caught.value.problem.count(". ") == 0
    assert not request.out.exists()


def test_a_search_refuses_to_keep_adapters_out_of_one_half_of_guidance(tmp_path) -> None:
    request = make_request(tmp_path, tmp_path / "out")
    problem = "draws what one merged file would"
    refuse(request, ConfigError, problem, **{"generate.conditional_only": True})


def test_bad_requests_are_refused_in_a_sentence_and_nothing_is_written(
    model, taught, tmp_path
) -> None:
    request = make_request(taught, tmp_path / "out")
    refuse(replace(request, budget=20), ConfigError, "A budget of 20 pictures is too small")
    refuse(replace(request, budget=-1), ConfigError, "A budget of -1 pictures is too small")
    refuse(replace(request, between=(1.0, 0.5)), ConfigError, "between 1 and 0.5")
    refuse(replace(request, prompts=("a dog",)), ConfigError, "No prompt names the subject")
    refuse(replace(request, photos=tmp_path / "none"), PhotoError, "none")
    refuse(replace(request, packs=("none-v1",)), ConfigError, "There is no prompt pack 'none-v1'")
    refuse(
        request, ConfigError, "There is no scheduler 'none'", **{"generate.schedulers": ("none",)}
    )
    other = tmp_path / "other.safetensors"
    foreign = {"dreamloom.base": "sdxl", "dreamloom.base_fingerprint": "f00"}
    write_adapter(other, make_adapter(model, 3, "style").with_metadata(**foreign))
    refuse(replace(request, style=other), AdapterError, "were made for different base models")
    refuse(replace(request, style=tmp_path / "gone.safetensors"), AdapterError, "gone.safetensors")
    nameless = tmp_path / "nameless.safetensors"
    write_adapter(nameless, Adapter(make_adapter(model, 1, "subject").layers))
    refuse(replace(request, subject=nameless), ConfigError, "does not say whom it shows")
    text = tmp_path / "conv.safetensors"
    layers = {"unet.conv_in": make_adapter(model, 1, "style").layers["unet.conv_in"]}
    write_adapter(text, replace(make_adapter(model, 1, "style"), layers=layers))
    refuse(
        replace(request, style=text, by_block=True),
        ConfigError,
        "does not change layers in down, mid and up blocks alike",
    )


def test_an_adapter_that_shows_nothing_of_its_own_ends_the_search_early(
    model, taught, tmp_path
) -> None:
    nothing = make_adapter(model, 1, "subject")
    layers = {name: Layer(one.down, 0 * one.up) for name, one in nothing.layers.items()}
    path = tmp_path / "nothing.safetensors"
    write_adapter(path, replace(nothing, layers=layers))
    request = make_request(taught, tmp_path / "out", subject=path)
    with pytest.raises(EvaluationError) as caught:
        run_search(request, settings())
    assert caught.value.problem == (
        "There is nothing that a merge could keep: the subject's adapter alone is no more like "
        "the photos than the base model."
    )
    assert len(list_pictures(request.out)) == 3 * 8


def test_encoders_that_are_not_here_are_named(taught, tmp_path) -> None:
    request = make_request(taught, tmp_path / "out")
    changes = {"evaluate.encoders": "standard"}
    refuse(request, EvaluationError, "Nothing here can tell who is shown", **changes)


def test_the_command_prints_what_it_found(searched, taught) -> None:
    out, found = searched
    files = [str(taught / f"{name}.safetensors") for name in ("subject", "style")]
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    sets = ["generate.guidance=2.0", "evaluate.encoders=picturebook", "evaluate.resamples=200"]
    words = [
        *("search", *files, "--photos", str(taught / "subject")),
        *("--style-photos", str(taught / "style"), "--budget", "118", "--steps", "2"),
        *(*prompts, "--device", "cpu", "--base", BASE["base"], "--out", str(out)),
        *(word for text in sets for word in ("--set", text)),
    ]
    told = CliRunner().invoke(main, ["--quiet", *words])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[0] == found.verdict
    assert found.command in told.output
    asked = CliRunner().invoke(main, ["--quiet", *words, "--json"])
    assert json.loads(asked.output) == json.loads(found.model_dump_json())
