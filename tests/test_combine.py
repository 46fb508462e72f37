"""Combining adapters: the thin result is the dense weighted sum, whatever it is made of."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.adapters import Adapter, Layer
from dreamloom.combine import METHODS, weighted_sum

SHAPES = {"linear": ((), ()), "pointwise": ((1, 1), (1, 1)), "conv": ((3, 3), (1, 1))}


def random_layer(rank, dice, outputs=6, inputs=5, kind="linear"):
    kernel, ones = SHAPES[kind]
    return Layer(
        torch.randn(rank, inputs, *kernel, generator=dice),
        torch.randn(outputs, rank, *ones, generator=dice),
    )


@st.composite
def merges(draw):
    """Two to four adapters, each with some of three layers of any rank, and their weights."""
    dice = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    adapters = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = draw(st.sets(st.sampled_from([*SHAPES]), min_size=1))
        adapters.append(
            Adapter(
                {
                    f"unet.{kind}": random_layer(draw(st.integers(1, 7)), dice, kind=kind)
                    for kind in sorted(kinds)
                }
            )
        )
    weight = st.floats(-2, 2)
    weights = draw(st.lists(weight, min_size=len(adapters), max_size=len(adapters)))
    return adapters, weights


def dense(adapter, name):
    """Multiply a layer out by hand; an absent one changes nothing."""
    if name not in adapter.layers:
        return torch.zeros((), dtype=torch.float64)
    layer = adapter.layers[name]
    up = layer.up.double().reshape(layer.up.shape[:2])
    return torch.einsum("or,r...->o...", up, layer.down.double())


def names_of(adapters):
    return {name for adapter in adapters for name in adapter.layers}


def assert_same(one, other):
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        torch.testing.assert_close(dense(one, name), dense(other, name), rtol=0, atol=1e-5)


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
def test_order_does_not_matter(merge, dice):
    adapters, weights = merge
    order = list(range(len(adapters)))
    dice.shuffle(order)
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
    dice = torch.Generator().manual_seed(5)
    one = Adapter({"unet.both": random_layer(3, dice), "unet.one": random_layer(2, dice)})
    other = Adapter({"unet.both": random_layer(4, dice), "unet.other": random_layer(1, dice)})
    return one, other


def test_alone_at_full_weight_it_stays_what_it_was(pair):
    merged = weighted_sum(pair[:1], [1.0])
    for name, layer in pair[0].layers.items():
        assert torch.equal(merged.layers[name].up, layer.up)
        assert torch.equal(merged.layers[name].down, layer.down)


def test_a_weight_of_zero_leaves_out(pair):
    assert_same(weighted_sum(pair, [0.0, 1.0]), pair[1])
    assert weighted_sum(pair, [0.0, 0.0]).layers == {}
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
    dice = torch.Generator().manual_seed(6)
    one, other = (Adapter({"unet.x": random_layer(3, dice)}) for _ in range(2))
    exact = dense(weighted_sum([one, other], [0.5, 0.5]), "unet.x")
    a, b = one.layers["unet.x"], other.layers["unet.x"]
    averaged = dense(Adapter({"unet.x": Layer((a.down + b.down) / 2, (a.up + b.up) / 2)}), "unet.x")
    squared = 0.5**2 * (dense(one, "unet.x") + dense(other, "unet.x"))
    for wrong in (averaged, squared):
        assert (wrong - exact).norm() > 0.3 * exact.norm()


def test_the_sum_does_not_depend_on_how_an_update_is_split(pair):
    dice = torch.Generator().manual_seed(7)
    turn = torch.randn(3, 3, generator=dice)
    layer = pair[0].layers["unet.both"]
    turned = Layer(torch.linalg.inv(turn) @ layer.down, layer.up @ turn)
    rewritten = Adapter({**pair[0].layers, "unet.both": turned})
    assert_same(weighted_sum([rewritten, pair[1]], [0.7, -0.3]), weighted_sum(pair, [0.7, -0.3]))


def test_the_parts_are_left_as_they_were(pair):
    before = [layer.up.clone() for layer in pair[0].layers.values()]
    weighted_sum(pair, [3.0, 2.0])
    assert all(map(torch.equal, before, [layer.up for layer in pair[0].layers.values()]))


@pytest.mark.parametrize(("count", "weights"), [(2, [1.0]), (1, [1.0, 2.0]), (0, [])])
def test_each_adapter_needs_a_weight(pair, count, weights):
    with pytest.raises(ValueError, match=f"{count} adapters need as many weights"):
        weighted_sum(pair[:count], weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(pair, weight):
    with pytest.raises(ValueError, match="finite"):
        weighted_sum(pair, [1.0, weight])


@pytest.mark.parametrize("other", [{"inputs": 9}, {"outputs": 9}, {"kind": "conv"}])
def test_updates_of_other_shapes_are_refused_by_name(other):
    dice = torch.Generator().manual_seed(8)
    one, two = (Adapter({"unet.x": random_layer(2, dice, **kind)}) for kind in ({}, other))
    with pytest.raises(ValueError, match=r"unet\.x differ in shape: \[\(6, 5\)") as caught:
        weighted_sum([one, two], [1.0, 1.0])
    assert "9" in str(caught.value) or "3, 3" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_documented_with_its_source(method):
    text = METHODS[method].__doc__
    assert "Source:" in text
    examples = doctest.DocTestFinder().find(METHODS[method], method, globs={})
    assert any(found.examples for found in examples)
