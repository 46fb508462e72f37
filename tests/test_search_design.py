"""The search for settings: every effect can be told from every other, and a stop loses nothing."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dreamloom.inference.generate import check_set_name
from tools.picturebook import search
from tools.picturebook.search_design import (
    Effect,
    Factor,
    estimate_effects,
    make_design,
    settings_of,
)
from tools.picturebook.search_plot import draw_effects

NAMES = ("rate", "updates", "rank")


def test_every_factor_is_high_as_often_as_low_whatever_another_is():
    design = make_design()
    assert design.shape == (24, 11)
    for part in (design, design[:12]):
        assert (np.abs(part) == 1).all()
        assert (part.T @ part == len(part) * np.eye(11)).all()
        assert (part.sum(axis=0) == 0).all()


def test_each_of_a_pair_is_taught_by_half_of_the_runs_and_with_every_setting():
    design = tuple(tuple(row) for row in make_design().tolist())
    plan = search.SearchPlan("standard", design, 2)
    taught = [plan.taught_by(row) for row in design]
    for person in range(4):
        rows = np.array([row for row, who in zip(design, taught, strict=True) if person in who])
        assert len(rows) == 12
        assert (rows[:, : len(search.FACTORS)].sum(axis=0) == 0).all()


def test_with_its_mirror_image_no_pair_of_factors_passes_for_a_third():
    def mixed(design: np.ndarray) -> float:
        pairs = [design[:, a] * design[:, b] for a in range(11) for b in range(a)]
        return max(abs(float(design[:, c] @ pair)) for c in range(11) for pair in pairs)

    assert mixed(make_design()) == 0
    assert mixed(make_design()[:12]) > 0


def test_a_run_is_given_the_settings_of_its_levels():
    factors = (Factor("a", ("x=1",), ("x=2",)), Factor("b", (), ("y=1", "z=1")))
    assert settings_of((-1, 1, 1), factors) == ("x=1", "y=1", "z=1")
    assert settings_of((1, -1, 1), factors) == ("x=2",)


def test_effects_that_were_put_in_are_found_and_no_others():
    rng, design = np.random.default_rng(0), make_design()
    true = np.array([0.5, -0.2, 0.0])
    people = np.array([1.0, 3.0])
    noise = rng.normal(0, 0.05, (24, 2))
    values = (design[:, :3] / 2 @ true)[:, None] + people + noise
    values[design[:, -1] < 0, 1] = np.nan
    effects = estimate_effects(design, values, NAMES)
    assert [effects[name].value for name in NAMES] == pytest.approx(true, abs=0.05)
    assert [effects[name].is_clear for name in NAMES] == [True, True, False]


def test_of_nothing_one_effect_in_twenty_is_called_clear():
    rng, design = np.random.default_rng(1), make_design()[:12]
    clear = [
        effect.is_clear
        for _ in range(300)
        for effect in estimate_effects(design, rng.normal(size=(12, 2)), NAMES).values()
    ]
    assert 0.02 < np.mean(clear) < 0.09


def test_too_few_runs_are_refused():
    design = make_design()[:2]
    with pytest.raises(ValueError, match="2 trainings say nothing about 3 factors"):
        estimate_effects(design, np.zeros((2, 1)), NAMES)


@pytest.fixture
def plan() -> search.SearchPlan:
    tiny = ("train.steps=2", "priors.count=2", "priors.steps=2", "train.batch_photos=1")
    design = tuple(tuple(row) for row in make_design()[[0, 11]].tolist())
    return search.SearchPlan("quick", design, 1, (search.WAYS[0], search.WAYS[-1]), tiny)


@pytest.mark.slow  # teaches two adapters and draws a hundred pictures
def test_a_search_measures_every_run_and_is_gone_on_with(
    plan: search.SearchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with ThreadPoolExecutor(1) as pool:
        search.run_search(pool, tmp_path, plan)
        values = search.read_results(tmp_path, plan)
        assert values.shape == (2, 2, 2, len(search.MEASURES))
        # Both rows are low in the last column, so both teach the first of the pair.
        assert np.isfinite(values[:, 0]).all()
        assert np.isnan(values[:, 1]).all()
        assert (values[:, 0, :, search.MEASURES.index("distance")] > 0).all()
        missing = search.read_results(tmp_path / "nothing", plan)
        assert np.isnan(missing).all()
        monkeypatch.setattr(search, "train_adapter", None)
        search.run_search(pool, tmp_path, plan)
    np.testing.assert_array_equal(search.read_results(tmp_path, plan), values)


def test_the_sets_of_every_way_can_be_named_so():
    names = [way.name for way in search.WAYS]
    for name in names:
        check_set_name(name)
    assert len({*names}) == len(names)


def test_the_table_has_every_factor_way_and_run():
    design = tuple(tuple(row) for row in make_design().tolist())
    plan = search.SearchPlan("standard", design, 1)
    values = np.random.default_rng(0).normal(size=(24, 2, len(plan.ways), len(search.MEASURES)))
    for run, row in enumerate(design):
        values[run, 1 - plan.taught_by(row)[0]] = np.nan
    values[3] = np.nan
    told = search.tell_results(plan, values)
    assert told.startswith("23 of 24 runs, each of 1 of 2 persons.")
    assert all(f"| {factor.name} |" in told for factor in search.FACTORS)
    assert "| guidance 4, weight 0.7, rescale 0.7 |" in told
    assert len(told.splitlines()) == 2 + 2 + 10 + 3 + 4 + 3 + 23


def test_the_picture_shows_each_effect_with_its_interval_and_pales_what_is_not_clear():
    effects = {"rate": Effect(0.2, 0.1), "rank": Effect(0.05, 0.1)}
    drawn = draw_effects({"one": effects, "two & more": {n: effects["rank"] for n in effects}})
    ElementTree.fromstring(drawn)
    bars = re.findall(r'width="([\d.]+)" height="8".*opacity="(.*)"', drawn)
    widths = [float(width) for width, _ in bars]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.3)
    assert [shade for _, shade in bars] == ["1", "0.3", "0.3", "0.3"]
    with pytest.raises(ValueError, match="two measures"):
        draw_effects({"one": effects})
