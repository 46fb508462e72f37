"""Combining adapters: the thin result is the dense weighted sum, whatever it is made of."""

import doctest

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dreamloom.merging.merging
from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.merging.ranks import FULL, parse_rank
from merges import (
    assert_same,
    dense,
    merges,
    names_of,
    random_adapter,
    random_layer,
    rewrite,
)


def weighted_sum(adapters, weights):
    return combine(adapters, MergeRequest(weights)).adapter


@settings(max_examples=25)
@given(merges())
def test_the_result_is_the_dense_weighted_sum(merge):
    adapters, weights = merge
    merged = weighted_sum(adapters, weights)
    for name in names_of(adapters):
        parts = [w * dense(a, name) for a, w in zip(adapters, weights, strict=True)]
        expected = torch.stack(torch.broadcast_tensors(*parts)).sum(dim=0)
        found = dense(merged, name)
        torch.testing.assert_close(found.expand_as(expected), expected, rtol=0, atol=2e-5)
        if name in merged.layers:
            update = merged.layers[name].update()
            torch.testing.assert_close(update, expected.float(), rtol=0, atol=2e-5)


@settings(max_examples=25)
@given(merges())
def test_ranks_add_up_over_those_that_count(merge):
    adapters, weights = merge
    merged = weighted_sum(adapters, weights)
    counting = [a for a, w in zip(adapters, weights, strict=True) if w != 0]
    assert merged.ranks == {
        name: sum(a.ranks.get(name, 0) for a in counting) for name in names_of(counting)
    }


@settings(max_examples=25)
@given(merges(), st.randoms(use_true_random=False))
def test_order_does_not_matter(merge, rng):
    adapters, weights = merge
    order = list(range(len(adapters)))
    rng.shuffle(order)
    shuffled = weighted_sum([adapters[i] for i in order], [weights[i] for i in order])
    assert_same(shuffled, weighted_sum(adapters, weights))


@settings(max_examples=25)
@given(merges(), st.floats(-2, 2).filter(bool))
def test_it_is_linear_in_the_weights(merge, factor):
    adapters, weights = merge
    weights = [w or 1.0 for w in weights]
    scaled = weighted_sum(adapters, [factor * w for w in weights])
    merged = weighted_sum([weighted_sum(adapters, weights)], [factor])
    assert_same(scaled, merged)


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(5)
    one = Adapter({"unet.both": random_layer(3, rng), "unet.one": random_layer(2, rng)})
    other = Adapter({"unet.both": random_layer(4, rng), "unet.other": random_layer(1, rng)})
    return one, other


def test_alone_at_full_weight_it_stays_what_it_was(pair):
    merged = weighted_sum(pair[:1], [1.0])
    for name, layer in pair[0].layers.items():
        assert torch.equal(merged.layers[name].up, layer.up)
        assert torch.equal(merged.layers[name].down, layer.down)


def test_a_weight_of_zero_leaves_out(pair):
    assert_same(weighted_sum(pair, [0.0, 1.0]), pair[1])
    with pytest.raises(ConfigError, match="nothing is left"):
        weighted_sum(pair, [0.0, 0.0])
    broken = Adapter({"unet.both": random_layer(2, torch.Generator(), inputs=9)})
    assert_same(weighted_sum([pair[0], broken], [1.0, 0.0]), pair[0])


def test_layers_of_one_alone_keep_their_rank(pair):
    merged = weighted_sum(pair, [1.0, 1.0])
    assert merged.ranks == {"unet.both": 7, "unet.one": 2, "unet.other": 1}


def test_a_negative_weight_takes_away(pair):
    gone = weighted_sum([pair[0], pair[0]], [1.0, -1.0])
    assert gone.norm() < 1e-6 * pair[0].norm()
    halves = weighted_sum([pair[0], pair[0]], [0.5, 0.5])
    assert_same(halves, pair[0])


def test_adding_the_factors_is_something_else(pair):
    """The negative control: what several tools do instead, and why the factors are stacked."""
    rng = torch.Generator().manual_seed(6)
    one, other = (Adapter({"unet.x": random_layer(3, rng)}) for _ in range(2))
    exact = dense(weighted_sum([one, other], [0.5, 0.5]), "unet.x")
    a, b = one.layers["unet.x"], other.layers["unet.x"]
    averaged = dense(Adapter({"unet.x": Layer((a.down + b.down) / 2, (a.up + b.up) / 2)}), "unet.x")
    squared = 0.5**2 * (dense(one, "unet.x") + dense(other, "unet.x"))
    for wrong in (averaged, squared):
        assert (wrong - exact).norm() > 0.3 * exact.norm()


def test_the_sum_does_not_depend_on_how_an_update_is_split(pair):
    rewritten = [rewrite(adapter, seed=7) for adapter in pair]
    assert_same(weighted_sum(rewritten, [0.7, -0.3]), weighted_sum(pair, [0.7, -0.3]))


def test_the_parts_are_left_as_they_were(pair):
    before = [layer.up.clone() for layer in pair[0].layers.values()]
    weighted_sum(pair, [3.0, 2.0])
    assert all(map(torch.equal, before, [layer.up for layer in pair[0].layers.values()]))


@pytest.mark.parametrize(("count", "weights"), [(2, [1.0]), (1, [1.0, 2.0]), (0, [])])
def test_each_adapter_needs_a_weight(pair, count, weights):
    with pytest.raises(ConfigError, match=f"{count} adapters need as many weights"):
        weighted_sum(pair[:count], weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(pair, weight):
    with pytest.raises(ConfigError, match="finite"):
        weighted_sum(pair, [1.0, weight])


@pytest.mark.parametrize("other", [{"inputs": 9}, {"outputs": 9}, {"kind": "conv"}])
def test_updates_of_other_shapes_are_refused_by_name(other):
    rng = torch.Generator().manual_seed(8)
    one, two = (Adapter({"unet.x": random_layer(2, rng, **kind)}) for kind in ({}, other))
    with pytest.raises(AdapterError, match=r"unet\.x differ in shape: \[\(6, 5\)") as caught:
        weighted_sum([one, two], [1.0, 1.0])
    assert "9" in str(caught.value) or "3, 3" in str(caught.value)


def test_the_example_is_true():
    failures, tried = doctest.testmod(dreamloom.merging.merging)
    assert tried
    assert not failures


# Every method, whatever it does.

EXACT = [name for name, method in METHODS.items() if method.needs in {"factors", "entries"}]


def merged_by(method, some, weights, rank=None):
    """Merge as many of some adapters as a method takes: two, or more if it needs more."""
    count = min(len(some), max(2, METHODS[method].least))
    request = MergeRequest(
        weights[:count], method, rank=FULL if rank is None else parse_rank(str(rank))
    )
    return combine(some[:count], request).adapter


@pytest.fixture
def some():
    """As many adapters as every method needs, their ranks mixed, each lacking some layer."""
    ranks = (
        {"linear": 3, "conv": 2},
        {"linear": 2, "pointwise": 3, "conv": 4},
        {"linear": 1, "pointwise": 2, "conv": 3},
    )
    return [random_adapter(seed, each) for seed, each in enumerate(ranks, 11)]


@pytest.mark.parametrize("method", EXACT)
def test_a_method_tells_its_formula_and_source(method):
    found = METHODS[method]
    assert found.summary.endswith(".")
    assert "=" in found.formula
    assert found.source
    assert all(option.description for option in found.options)
    assert found.read_options({}) == {option.name: option.default for option in found.options}


@pytest.mark.parametrize("method", EXACT)
def test_no_method_depends_on_how_an_update_is_split(method, some):
    rewritten = [rewrite(adapter, seed) for seed, adapter in enumerate(some)]
    assert_same(
        merged_by(method, rewritten, [0.8, 0.6, 0.5]),
        merged_by(method, some, [0.8, 0.6, 0.5]),
        atol=2e-4,
    )


@pytest.mark.parametrize("method", [name for name in EXACT if METHODS[name].keeps_one])
def test_one_adapter_at_weight_1_stays_what_it_is(method, some):
    if METHODS[method].least == 1:
        assert_same(merged_by(method, some[:1], [1.0]), some[0], atol=2e-5)


@pytest.mark.parametrize("method", EXACT)
def test_a_merge_says_the_same_twice(method, some):
    once, again = (merged_by(method, some, [0.8, 0.6, 0.5]) for _ in range(2))
    assert once.layers.keys() == again.layers.keys()
    for name, layer in once.layers.items():
        assert torch.equal(layer.up, again.layers[name].up)
        assert torch.equal(layer.down, again.layers[name].down)


@pytest.mark.parametrize("method", EXACT)
def test_zeros_are_finite(method, some):
    empty = Adapter(
        {
            name: Layer(torch.zeros_like(layer.down), torch.zeros_like(layer.up))
            for name, layer in some[1].layers.items()
        }
    )
    merged = merged_by(method, [some[0], empty, empty], [1.0, 1.0, 1.0])
    for layer in merged.layers.values():
        assert torch.isfinite(layer.up).all()
        assert torch.isfinite(layer.down).all()


@settings(max_examples=25)
@given(merges(), st.integers(1, 7))
def test_cutting_is_the_best_that_a_rank_can_do(merge, rank):
    adapters, weights = merge
    whole = combine(adapters, MergeRequest(weights)).adapter
    assume(whole.norm() > 1e-3)
    existing = max(
        min(*layer.up.shape[:2], *layer.down.flatten(1).shape) for layer in whole.layers.values()
    )
    done = combine(adapters, MergeRequest(weights, rank=parse_rank(str(min(rank, existing)))))
    for name in whole.layers:
        exact = dense(whole, name).flatten(1)
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        found = dense(done.adapter, name).expand(whole.layers[name].update().shape).flatten(1)
        lost = (found - exact).norm()
        assert lost <= (best - exact).norm() + 1e-4 * exact.norm() + 1e-6
        if exact.norm() > 1e-5:
            report = done.reports[name]
            assert report.error == pytest.approx(float(lost / exact.norm()), abs=2e-3)
            assert report.norm == pytest.approx(float(found.norm()), rel=1e-3, abs=1e-5)
