"""Methods that ask the base model: what they do with what it said, layer by layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import Adapter
from dreamloom.merging.activation_inputs import JOINT, name_down, name_gram, name_mask
from dreamloom.merging.factors import flatten
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.merging.methods.regmean import InputShares
from dreamloom.merging.methods.ssr import solve_routing
from dreamloom.merging.methods.ziplora import split_directions
from merges import (
    SHAPES,
    adapters,
    assert_same,
    dense,
    names_of,
    random_adapter,
    random_layer,
    rewrite,
)

ASKING = [name for name, method in METHODS.items() if method.needs in {"activations", "training"}]
LINEAR = ["ssr", "regmean"]
EXACT = {"ridge": 1e-9, "shrink": 1.0}
PLACES = 200


def options_of(method, **given):
    known = {option.name for option in METHODS[method].options}
    return {name: value for name, value in given.items() if name in known}


def draw_inputs(some, seed, spread=None, places=PLACES):
    """Make up what each layer is given on each adapter's prompts, and (at 0) on joint ones."""
    rng = torch.Generator().manual_seed(seed)
    inputs = {}
    for name in names_of(some):
        width = next(a.layers[name].down[0].numel() for a in some if name in a.layers)
        inputs[name] = {}
        for number in range(len(some) + 1):
            mix = torch.randn(width, width, generator=rng).double()
            rows = torch.randn(places, width, generator=rng).double()
            inputs[name][number] = rows @ mix if spread is None else spread(rows, number)
    return inputs


def prepare(method, some, inputs, weights=None, masks=None, **options):
    """Do what listening to a base model does, the obvious way."""
    prepared = {}
    for name, seen in inputs.items():
        kept = [
            (number, flatten(adapter.layers[name]).down.double())
            for number, adapter in enumerate(some, 1)
            if name in adapter.layers and (weights is None or weights[number - 1] != 0)
        ]
        grams = {number: rows.T @ rows / len(rows) for number, rows in seen.items()}
        if method == "ssr":
            down = torch.cat([down for _, down in kept])
            prepared[name] = {
                name_gram(number): down @ grams[number] @ down.T
                for number in [JOINT, *(number for number, _ in kept)]
            }
        elif method == "regmean":
            settled = METHODS[method].read_options(options)
            shares = InputShares(
                [grams[number] for number, _ in kept],
                settled["joint"] * grams[JOINT] if settled["joint"] else None,
                shrink=settled["shrink"],
                ridge=settled["ridge"],
                keeps_unseen=settled["unseen"] == "sum",
            )
            prepared[name] = {
                name_down(number): shares.share(place, down)
                for place, (number, down) in enumerate(kept)
            }
        else:
            prepared[name] = {name_mask(n): masks[name][n] for n, _ in kept}
    return prepared


def mask_lengths(method, some):
    """How long the mask of each adapter is in each layer."""
    return {
        name: {
            number: split_directions(flatten(adapter.layers[name])).rank
            if method == "ziprank"
            else adapter.layers[name].down[0].numel()
            for number, adapter in enumerate(some, 1)
            if name in adapter.layers
        }
        for name in names_of(some)
    }


def make_masks(method, some, make):
    return {
        name: {number: make(length) for number, length in lengths.items()}
        for name, lengths in mask_lengths(method, some).items()
    }


def merged_by(method, some, weights, inputs, masks=None, **options):
    options = options_of(method, **options)
    prepared = prepare(method, some, inputs, weights, masks, **options)
    return combine(some, MergeRequest(weights, method, options), prepared).adapter


def missed(some, weights, merged, inputs):
    """Σ ‖(ΔW − wₖ ΔWₖ) xₖ‖² over every adapter's inputs, dense: what the methods make small."""
    total = 0.0
    for name, seen in inputs.items():
        if not all(name in adapter.layers for adapter in some):
            continue
        for number, (adapter, weight) in enumerate(zip(some, weights, strict=True), 1):
            gap = (dense(merged, name) - weight * dense(adapter, name)).flatten(1)
            total += float((seen[number] @ gap.T).square().sum()) / len(seen[number])
    return total


@pytest.fixture
def some():
    ranks = ({"linear": 2, "conv": 3}, {"linear": 2, "pointwise": 3, "conv": 4})
    return [random_adapter(seed, each, inputs=9) for seed, each in enumerate(ranks, 11)]


@pytest.mark.parametrize("method", ASKING)
def test_a_method_tells_its_formula_and_source(method):
    found = METHODS[method]
    assert found.summary.endswith(".")
    assert "=" in found.formula
    assert "arXiv" in found.source
    assert all(option.description.endswith(".") for option in found.options)


@pytest.mark.parametrize("method", ASKING)
def test_without_a_base_model_it_says_so(method, some):
    with pytest.raises(ConfigError, match=r"nothing was prepared for unet\.conv.*--base"):
        combine(some, MergeRequest([1.0, 1.0], method))


@pytest.mark.parametrize("method", ASKING)
def test_one_adapter_and_layers_of_one_alone_need_no_base_model(method, some):
    assert_same(combine(some[:1], MergeRequest([0.5], method)).adapter, _half(some[0]))
    alone = random_adapter(3, {"pointwise": 2})
    apart = combine(
        [alone, random_adapter(4, {"linear": 2})], MergeRequest([0.5, 0.5], method)
    ).adapter
    assert torch.equal(apart.layers["unet.pointwise"].down, alone.layers["unet.pointwise"].down)
    assert_same(
        combine([some[0], some[1]], MergeRequest([0.5, 0.0], method)).adapter, _half(some[0])
    )


def _half(adapter):
    return combine([adapter], MergeRequest([0.5])).adapter


@pytest.mark.parametrize("method", ASKING)
@settings(max_examples=15)
@given(some=adapters(2, 3), seed=st.integers(0, 99))
def test_no_method_depends_on_how_an_update_is_split(method, some, seed):
    weights = [0.8, -0.6, 1.1][: len(some)]
    inputs = draw_inputs(some, seed)
    masks = make_masks(method, some, lambda n: torch.linspace(-1, 2, n))
    rewritten = [rewrite(adapter, seed) for adapter in some]
    options = {"joint": 0.3, "ridge": 1e-2}
    if method == "ziprank":
        # Rounding may find one more direction or one less; they count nothing.
        masks_again = make_masks(method, rewritten, lambda n: torch.linspace(-1, 2, n))
        if mask_lengths(method, some) != mask_lengths(method, rewritten):
            return
    else:
        masks_again = masks
    assert_same(
        merged_by(method, rewritten, weights, inputs, masks_again, **options),
        merged_by(method, some, weights, inputs, masks, **options),
        atol=3e-4,
    )


@pytest.mark.parametrize("method", ASKING)
@settings(max_examples=10)
@given(some=adapters(2, 3), seed=st.integers(0, 99))
def test_order_does_not_matter(method, some, seed):
    inputs = draw_inputs(some, seed)
    masks = make_masks(method, some, lambda n: torch.linspace(0, 2, n))
    count = len(some)
    turned = {
        name: {0: seen[0], **{n + 1: seen[count - n] for n in range(count)}}
        for name, seen in inputs.items()
    }
    turned_masks = {
        name: {count + 1 - number: mask for number, mask in own.items()}
        for name, own in masks.items()
    }
    weights = [0.8, -0.6, 1.1][:count]
    assert_same(
        merged_by(method, some[::-1], weights[::-1], turned, turned_masks, joint=0.5),
        merged_by(method, some, weights, inputs, masks, joint=0.5),
        atol=1e-4,
    )


@pytest.mark.parametrize("method", ASKING)
@settings(max_examples=10)
@given(some=adapters(2, 3), seed=st.integers(0, 99), factor=st.sampled_from([0.1, 3.0, -2.0]))
def test_twice_the_adapters_are_twice_the_result(method, some, seed, factor):
    """The ridge is a share of what is seen, so that how strongly was taught does not matter."""
    weights = [0.8, -0.6, 1.1][: len(some)]
    inputs = draw_inputs(some, seed)
    masks = make_masks(method, some, lambda n: torch.linspace(-1, 2, n))
    # Half of the factor in each side: a larger down changes what is seen.
    root = abs(factor) ** 0.5
    stronger = [
        Adapter(
            {
                name: type(layer)(root * layer.down, factor / root * layer.up)
                for name, layer in adapter.layers.items()
            }
        )
        for adapter in some
    ]
    options = {"joint": 0.3, "ridge": 1e-2}
    once = merged_by(method, some, weights, inputs, masks, **options)
    more = merged_by(method, stronger, weights, inputs, masks, **options)
    assert_same(more, combine([once], MergeRequest([factor])).adapter, atol=3e-4)


@pytest.mark.parametrize("method", LINEAR)
def test_nothing_near_it_answers_better(method, some):
    """The least squares solution: every other R, or every other factor, misses more."""
    weights = [0.8, 1.3]
    inputs = draw_inputs(some, 5)
    merged = merged_by(method, some, weights, inputs, **EXACT)
    least = missed(some, weights, merged, inputs)
    plain = missed(some, weights, combine(some, MergeRequest(weights)).adapter, inputs)
    assert least < 0.9 * plain
    rng = torch.Generator().manual_seed(6)
    for size in (1e-3, 1e-2, 0.1, -1e-3, -1e-2, -0.1) * 5:
        nearby = {}
        for name, layer in merged.layers.items():
            flat = flatten(layer)
            if method == "ssr":
                # The same rows of down, read through another R.
                nudge = torch.randn(flat.rank, flat.rank, generator=rng) @ flat.down
            else:
                nudge = torch.randn(flat.down.shape, generator=rng)
            down = flat.down + size * flat.down.norm() / nudge.norm() * nudge
            nearby[name] = type(layer)(down.view_as(layer.down), layer.up)
        assert missed(some, weights, Adapter(nearby), inputs) > least


def test_the_regression_answers_better_than_the_routing(some):
    """It may choose among all updates, the routing among those that read the adapters' rows."""
    inputs = draw_inputs(some, 5)
    regmean, ssr = (
        missed(some, [1.0, 1.0], merged_by(m, some, [1.0, 1.0], inputs, **EXACT), inputs)
        for m in ("regmean", "ssr")
    )
    assert regmean < ssr


@pytest.mark.parametrize("method", LINEAR)
def test_inputs_at_right_angles_are_answered_as_by_each_alone(method):
    def apart(rows, number):
        # Two inputs are filled on the first one's prompts, three others on the second one's.
        filled = {0: [], 1: [0, 5], 2: [2, 3, 7]}[number]
        kept = torch.zeros_like(rows)
        kept[:, filled] = rows[:, filled]
        return kept

    rng = torch.Generator().manual_seed(8)
    some = [Adapter({"unet.x": random_layer(rank, rng, inputs=9)}) for rank in (3, 2)]
    inputs = draw_inputs(some, 9, apart)
    weights = [0.7, 1.2]
    merged = merged_by(method, some, weights, inputs, **EXACT)
    assert missed(some, weights, merged, inputs) < 1e-8
    # The plain sum answers with both.
    assert missed(some, weights, combine(some, MergeRequest(weights)).adapter, inputs) > 1


@pytest.mark.parametrize("method", LINEAR)
def test_prompts_for_both_draw_to_the_plain_sum(method, some):
    inputs = draw_inputs(some, 10)
    weights = [0.8, 1.3]
    plain = combine(some, MergeRequest(weights)).adapter

    def distance(joint):
        merged = merged_by(method, some, weights, inputs, joint=joint, **EXACT)
        gaps = [(dense(merged, n) - dense(plain, n)).norm() for n in plain.layers]
        return float(torch.stack(gaps).norm())

    far, near, there = (distance(joint) for joint in (0.0, 1.0, 1e10))
    assert far > 1.3 * near > 0
    assert there < 1e-4 * far


@pytest.mark.parametrize("method", LINEAR)
def test_merged_with_itself_an_adapter_stays_what_it_is(method, some):
    twice = [some[0], some[0]]
    inputs = draw_inputs(twice, 11)
    merged = merged_by(method, twice, [1.0, 1.0], inputs, **EXACT)
    assert_same(merged, some[0], atol=1e-4)


@pytest.mark.parametrize(("keeps", "factor"), [(True, 1.0), (False, 0.0)])
def test_what_no_prompt_fills_is_added_up_or_dropped(keeps, factor):
    rng = torch.Generator().manual_seed(12)
    seen = torch.randn(5, 3, generator=rng).double()
    owners, weights = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.5, 2.0]).double()
    grams = torch.stack([seen @ seen.T, 2 * seen @ seen.T])
    routing = solve_routing(grams, owners, weights, ridge=1e-6, keeps_unseen=keeps)
    blind = torch.linalg.svd(seen)[0][:, 3:]
    torch.testing.assert_close(routing @ blind, factor * weights[owners, None] * blind)
    # What both see alike is shared out by how often they see it.
    share = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3]).double() * weights[owners]
    torch.testing.assert_close(routing @ seen, share[:, None] * seen, rtol=1e-4, atol=1e-4)


def test_the_routing_is_the_papers_at_weight_1():
    """R = Q (G + λ I)⁻¹ by the formula itself, with explicit selection matrices."""
    rng = torch.Generator().manual_seed(14)
    seen = [torch.randn(5, 30, generator=rng).double() for _ in range(2)]
    select = [
        torch.diag(torch.tensor(d)).double() for d in ([1.0] * 2 + [0] * 3, [0.0] * 2 + [1] * 3)
    ]
    gram = sum(z @ z.T for z in seen)
    guide = sum(e @ z @ z.T for e, z in zip(select, seen, strict=True))
    ridge = 1e-2
    expected = guide @ torch.linalg.inv(gram + ridge * gram.trace() / 5 * torch.eye(5))
    found = solve_routing(
        torch.stack([z @ z.T for z in seen]),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.ones(2).double(),
        ridge=ridge,
        keeps_unseen=False,
    )
    torch.testing.assert_close(found, expected)


def test_no_shrinking_is_the_regression_and_full_shrinking_looks_at_each_input():
    rng = torch.Generator().manual_seed(15)
    downs = [torch.randn(2, 4, generator=rng).double() for _ in range(2)]
    seen = [torch.randn(30, 4, generator=rng).double() for _ in range(2)]
    grams = [x.T @ x for x in seen]
    exact, single = (
        InputShares(grams, shrink=shrink, ridge=1e-12, keeps_unseen=False) for shrink in (1.0, 0.0)
    )
    for k in range(2):
        torch.testing.assert_close(
            exact.share(k, downs[k]), downs[k] @ grams[k] @ torch.linalg.inv(sum(grams))
        )
        share = grams[k].diagonal() / sum(grams).diagonal()
        torch.testing.assert_close(single.share(k, downs[k]), downs[k] * share)


@pytest.mark.parametrize("kind", SHAPES)
def test_masked_columns_are_those_of_the_update(kind):
    rng = torch.Generator().manual_seed(16)
    some = [Adapter({"unet.x": random_layer(r, rng, kind=kind)}) for r in (2, 3)]
    masks = make_masks("ziplora", some, lambda n: torch.rand(n, generator=rng))
    merged = merged_by("ziplora", some, [0.8, -1.2], {"unet.x": {}}, masks)
    expected = sum(
        w * dense(a, "unet.x") * masks["unet.x"][number].view(a.layers["unet.x"].down.shape[1:])
        for number, (a, w) in enumerate(zip(some, [0.8, -1.2], strict=True), 1)
    )
    torch.testing.assert_close(dense(merged, "unet.x"), expected, rtol=0, atol=1e-5)
    assert merged.ranks == {"unet.x": 5}


def test_masked_directions_are_those_of_the_dense_svd():
    rng = torch.Generator().manual_seed(17)
    some = [Adapter({"unet.x": random_layer(r, rng)}) for r in (2, 3)]
    masks = make_masks("ziprank", some, lambda n: torch.rand(n, generator=rng))
    merged = merged_by("ziprank", some, [0.8, -1.2], {"unet.x": {}}, masks)
    expected = 0
    for number, (adapter, weight) in enumerate(zip(some, [0.8, -1.2], strict=True), 1):
        left, values, right = torch.linalg.svd(dense(adapter, "unet.x"), full_matrices=False)
        mask = masks["unet.x"][number].double()
        kept = len(mask)
        expected = expected + weight * (left[:, :kept] * values[:kept] * mask) @ right[:kept]
    torch.testing.assert_close(dense(merged, "unet.x"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ziprank", "ziplora"])
@settings(max_examples=15)
@given(some=adapters(2, 3))
def test_masks_of_ones_give_the_plain_sum(method, some):
    weights = [0.8, -0.6, 1.1][: len(some)]
    masks = make_masks(method, some, torch.ones)
    inputs = {name: {} for name in names_of(some)}
    merged = merged_by(method, some, weights, inputs, masks)
    assert_same(merged, combine(some, MergeRequest(weights)).adapter, atol=2e-5)


@pytest.mark.parametrize("method", ["ziprank", "ziplora"])
def test_masks_of_other_adapters_are_refused(method, some):
    masks = make_masks(method, some, lambda n: torch.ones(n + 1))
    with pytest.raises(ConfigError, match=r"mask of adapter 1 in unet\.conv has the shape"):
        merged_by(method, some, [1.0, 1.0], {name: {} for name in names_of(some)}, masks)


@pytest.mark.parametrize("method", ASKING)
def test_zeros_are_finite(method, some):
    nothing = Adapter(
        {
            name: type(layer)(torch.zeros_like(layer.down), torch.zeros_like(layer.up))
            for name, layer in some[1].layers.items()
        }
    )
    pair = [some[0], nothing]
    inputs = draw_inputs(pair, 18, lambda rows, number: 0 * rows)
    masks = make_masks(method, pair, torch.ones)
    merged = merged_by(method, pair, [1.0, 1.0], inputs, masks)
    for layer in merged.layers.values():
        assert torch.isfinite(layer.up).all()
        assert torch.isfinite(layer.down).all()
