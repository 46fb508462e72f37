"""Diagnosis: thin factors give what dense matrices give, and the advice follows its thresholds."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.merging.diagnose.advice import give_advice
from dreamloom.merging.diagnose.measuring import (
    KINDS,
    RANKS,
    block_of,
    diagnose_adapters,
    group_layers,
    kind_of,
    shrink,
    sort_blocks,
)
from dreamloom.merging.diagnose.picture import draw_diagnosis
from dreamloom.merging.factors import flatten
from dreamloom.merging.methods import METHODS
from merges import adapters, dense, names_of, random_adapter, random_layer, rewrite

WEIGHT = st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.05)


def directions(matrix):
    """Left and right singular vectors of what is above rounding."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    alive = values > 1e-5 * max(values[0], 1e-30)
    return left[:, alive], right[alive].T


def matrix_of(adapter, name, weight=1.0):
    return weight * dense(adapter, name).flatten(1).double().numpy()


# ------------------------------------------------------------------ against dense matrices


@given(made=adapters(2, 2), one=WEIGHT, other=WEIGHT)
@settings(max_examples=40)
def test_every_measure_is_that_of_the_dense_updates(made, one, other):
    found = diagnose_adapters(*made, weights=(one, other))
    assert [pair.layer for pair in found.pairs] == sorted(names_of(made))
    for pair in found.pairs:
        present = [name for name in (pair.layer,) if all(name in a.layers for a in made)]
        whole = sum(
            matrix_of(adapter, pair.layer, weight)
            for adapter, weight in zip(made, (one, other), strict=True)
            if pair.layer in adapter.layers
        )
        values = np.linalg.svd(whole, compute_uv=False)
        for rank in (0, 1, 3):
            lost = np.linalg.norm(values[rank:])
            assert pair.lost(rank) == pytest.approx(lost, rel=1e-4, abs=1e-5 * (1 + values[0]))
        if not present or not pair.shared:
            assert pair.cosine is None
            assert pair.row_overlap is None
            continue
        a, b = (
            matrix_of(adapter, pair.layer, weight)
            for adapter, weight in zip(made, (one, other), strict=True)
        )
        assert pair.norms == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)), rel=1e-5)
        wanted = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert pair.cosine == pytest.approx(wanted, abs=1e-5)
        (ua, va), (ub, vb) = directions(a), directions(b)
        assert pair.ranks == (ua.shape[1], ub.shape[1])
        for cosines, x, y in ((pair.row_cosines, va, vb), (pair.column_cosines, ua, ub)):
            assert cosines == pytest.approx(np.linalg.svd(x.T @ y, compute_uv=False), abs=1e-3)
        for overlap, wanted in (
            (pair.row_overlap[0], np.linalg.norm(a @ vb) / np.linalg.norm(a)),
            (pair.row_overlap[1], np.linalg.norm(b @ va) / np.linalg.norm(b)),
            (pair.column_overlap[0], np.linalg.norm(ub.T @ a) / np.linalg.norm(a)),
            (pair.column_overlap[1], np.linalg.norm(ua.T @ b) / np.linalg.norm(b)),
        ):
            assert overlap == pytest.approx(wanted, abs=1e-3)


@given(made=adapters(2, 2), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_it_does_not_matter_how_updates_are_split(made, seed):
    one = diagnose_adapters(*made).as_json()
    other = diagnose_adapters(*[rewrite(adapter, seed) for adapter in made]).as_json()
    for pair, again in zip(one["layers"], other["layers"], strict=True):
        assert pair["ranks"] == again["ranks"]
        for name in ("norms", "cosine", "row_cosines", "column_overlap", "row_overlap"):
            assert np.allclose(
                np.array(pair[name], dtype=float),
                np.array(again[name], dtype=float),
                atol=2e-3,
                equal_nan=True,
            )


@given(made=adapters(2, 2))
@settings(max_examples=20)
def test_exchanging_the_adapters_exchanges_the_sides(made):
    one, other = diagnose_adapters(*made), diagnose_adapters(*made[::-1])
    assert one.together.norms == pytest.approx(other.together.norms[::-1])
    for pair, again in zip(one.pairs, other.pairs, strict=True):
        assert pair.norms == pytest.approx(again.norms[::-1])
        if pair.shared:
            assert pair.cosine == pytest.approx(again.cosine)
            assert pair.row_overlap == pytest.approx(again.row_overlap[::-1], abs=1e-4)


def test_small_matrices_keep_norms_products_and_values():
    made = [random_adapter(seed, {"linear": rank}) for seed, rank in ((1, 3), (2, 7))]
    updates = [flatten(adapter.layers["unet.linear"]) for adapter in made]
    small = shrink(updates)
    big = [update.multiply().double() for update in updates]
    for (a, b), (c, d) in zip(
        zip(small, small[::-1], strict=True), zip(big, big[::-1], strict=True), strict=True
    ):
        assert float((a * b).sum()) == pytest.approx(float((c * d).sum()), rel=1e-5)
        values = torch.linalg.svdvals(c)
        torch.testing.assert_close(torch.linalg.svdvals(a)[: len(values)][:3], values[:3])


def test_all_layers_together_are_one_long_vector():
    made = [random_adapter(seed, {"linear": 3, "conv": 2}) for seed in (1, 2)]
    together = diagnose_adapters(*made).together
    long = [np.concatenate([matrix_of(a, n).ravel() for n in sorted(a.layers)]) for a in made]
    assert together.norms == pytest.approx([np.linalg.norm(x) for x in long], rel=1e-5)
    assert together.cosine == pytest.approx(
        long[0] @ long[1] / np.linalg.norm(long[0]) / np.linalg.norm(long[1]), abs=1e-6
    )
    lost = [
        np.linalg.svd(sum(matrix_of(a, n) for a in made), compute_uv=False)[2:]
        for n in made[0].layers
    ]
    wanted = np.linalg.norm(np.concatenate(lost)) / np.linalg.norm(sum(long))
    assert together.errors[2] == pytest.approx(wanted, rel=1e-4)
    assert list(together.errors) == [rank for rank in RANKS if rank <= 8]


def test_chance_is_what_unrelated_spaces_share():
    rng = torch.Generator().manual_seed(5)
    overlaps = []
    for _ in range(40):
        made = [Adapter({"unet.x": random_layer(4, rng, outputs=30, inputs=50)}) for _ in range(2)]
        (pair,) = diagnose_adapters(*made).pairs
        overlaps.append(pair.row_overlap[0] ** 2)
    assert pair.row_chance == pytest.approx(((4 / 50) ** 0.5,) * 2)
    assert pair.column_chance == pytest.approx(((4 / 30) ** 0.5,) * 2)
    assert np.mean(overlaps) == pytest.approx(4 / 50, rel=0.25)


# ------------------------------------------------------------------ what is not diagnosed


def test_what_is_not_comparable_is_refused():
    one = random_adapter(1, {"linear": 2})
    with pytest.raises(AdapterError, match=r"updates of unet.linear differ in shape"):
        diagnose_adapters(one, random_adapter(2, {"linear": 2}, outputs=7))
    nothing = Adapter({"unet.x": Layer(torch.ones(1, 3), torch.zeros(2, 1))})
    with pytest.raises(AdapterError, match="Neither A nor B changes anything"):
        diagnose_adapters(nothing, nothing)
    with pytest.raises(AdapterError, match="B is a LoHa; only a LoRA can be diagnosed"):
        diagnose_adapters(one, Adapter({}, peft=PeftState("loha", {}, {})))
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite and not 0"):
            diagnose_adapters(one, one, weights=(1.0, weight))


# ------------------------------------------------------------------ groups


def test_every_layer_of_sdxl_has_a_block_and_a_kind():
    blocks = {block_of(name) for name in sdxl_layers()}
    assert {"up_blocks.0.attentions.1", "mid_block", "down_blocks.0", "text_encoder_2"} <= blocks
    assert len(blocks) < 30
    kinds = {name: kind_of(name) for name in sdxl_layers()}
    assert set(kinds.values()) == set(KINDS)
    unknown = {name for name, kind in kinds.items() if kind == "other"}
    assert all("emb" in name or "projection" in name for name in unknown)


def test_blocks_stand_in_the_order_of_a_picture():
    names = ["up_blocks.0", "mid_block", "down_blocks.1", "text_encoder", "conv_in", "x"]
    assert sort_blocks(names) == [
        "text_encoder",
        "conv_in",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "x",
    ]


def test_groups_hold_every_layer_once():
    layers = {
        name: random_layer(2, torch.Generator().manual_seed(1))
        for name in list(sdxl_layers())[::37]
    }
    found = diagnose_adapters(Adapter(layers), Adapter(layers))
    for kinds in (False, True):
        groups = group_layers(found, kinds)
        told = sorted(pair.layer for group in groups for pair in group.pairs)
        assert told == [pair.layer for pair in found.pairs]
        energy = sum(group.together.norms[0] ** 2 for group in groups)
        assert energy == pytest.approx(found.together.norms[0] ** 2)


# ------------------------------------------------------------------ advice

SIDE = 64
ROWS = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))).Q
COLUMNS = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1))).Q
Q = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q"
K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"


def layer(inputs, outputs, sizes=None):
    """An update from chosen inputs to chosen outputs, each with its size."""
    sizes = torch.tensor(sizes or [1.0] * len(inputs))
    return Layer(ROWS[list(inputs)], COLUMNS[:, list(outputs)] * sizes)


def advise(one, other, weights=(1.0, 1.0), names=("me", "pixel")):
    return give_advice(diagnose_adapters(Adapter({Q: one}), Adapter({Q: other}), names, weights))


def test_the_weaker_of_unequal_adapters_is_pointed_out():
    said = advise(layer([0, 1], [0, 1]), layer([2, 3], [2, 3], [0.4, 0.4]))
    assert said[0] == (
        "me has 6.3 times the energy of pixel, and may drown it: give it the weight 0.40, or merge "
        "with --method equal."
    )
    # With that weight there is nothing more to say of it.
    even = advise(layer([0, 1], [0, 1]), layer([2, 3], [2, 3], [0.4, 0.4]), (0.4, 1.0))
    assert not any("energy" in text for text in even)
    assert (
        "pixel has 4.0 times the energy of me"
        in advise(layer([0, 1], [0, 1]), layer([2, 3], [2, 3]), (0.499, -1.0))[0]
    )


def test_the_weight_of_what_drowns_everything_is_not_rounded_to_nothing():
    said = advise(layer([0, 1], [0, 1]), layer([2, 3], [2, 3], [0.001, 0.001]))
    assert said[0].startswith(
        "me has 1000000 times the energy of pixel, and may drown it: give it the weight 0.001, "
    )


def test_energies_just_below_the_threshold_are_not_pointed_out():
    said = advise(layer([0], [0]), layer([2], [2], [0.51]))
    assert not any("energy" in text for text in said)


def test_a_block_that_is_unlike_the_others_is_named():
    one = {Q: layer([0], [0], [4.0]), K: layer([0], [0], [1.0])}
    other = {Q: layer([2], [2], [3.0]), K: layer([2], [2], [4.0])}
    said = give_advice(diagnose_adapters(Adapter(one), Adapter(other), ("me", "pixel")))
    assert said[0].startswith(
        "In down_blocks.1.attentions.0 the energies are 1 : 16.0, and 1 : 1.5 over all: "
    )


def test_adapters_that_do_the_same_may_burn():
    said = advise(layer([0, 1], [0, 1]), layer([0, 1], [0, 1]))
    assert said[0] == (
        "They change the same things the same way (cosine 1.00): their sum has 100% more energy "
        "than unrelated adapters would give, and may burn; lower both weights, or merge with "
        "--method matched."
    )


def test_adapters_that_cancel_are_told():
    said = advise(layer([0, 1], [0, 1]), layer([0, 1], [0, 1]), (1.0, -1.0))
    assert said[0].startswith("They work against each other (cosine -1.00): 100% of their energy")


def test_no_overlap_means_that_every_method_is_the_sum():
    said = advise(layer([0, 1], [0, 1]), layer([2, 3], [2, 3]))
    assert said[0] == (
        "Only 0% of me lies where pixel looks, too: methods that keep them apart, such as np, give "
        "the plain sum; choose weights."
    )


def test_a_large_overlap_asks_for_null_space_projection():
    said = advise(layer([0, 1], [0, 1]), layer([0, 3], [2, 3]))
    assert said[0] == (
        "71% of me lies where pixel looks, too (unrelated adapters of these ranks: 18%), most of "
        "all in up_blocks.0.attentions.1 cross q (71%): there --method np --set mu=0.5 takes a "
        "third of that out of me and leaves pixel whole."
    )


def test_an_overlap_by_chance_is_no_reason_for_a_method():
    rng = torch.Generator().manual_seed(4)
    made = [random_layer(16, rng, SIDE, SIDE) for _ in range(2)]
    said = advise(*made)
    assert "as unrelated adapters of these ranks do by chance (50%)" in said[0]


def test_a_little_overlap_is_called_little():
    strong = layer([0, 1, 2, 3], [0, 1, 2, 3], [0.35, 1.0, 1.0, 0.0])
    said = advise(strong, layer([0], [5], [1.2]))
    assert "which is little: begin with the plain sum" in said[0]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([1.0, 1.0], "Cut to rank 2, the sum is 70.7% off; keep --rank full (4)."),
        ([1.0, 0.01], "Cut to rank 2, the sum is 1.0% off, which hardly counts: --rank 2 does."),
    ],
)
def test_the_cost_of_a_rank_is_told(sizes, says):
    assert says in advise(layer([0, 1], [0, 1], sizes), layer([2, 3], [2, 3], sizes))


def test_the_least_rank_that_hardly_costs_is_named():
    sizes = [1.0, 1.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]
    thin = advise(layer(range(8), range(8), sizes), layer(range(8, 16), range(8, 16), sizes))
    assert "Cut to rank 8, the sum is 1.4% off, and at rank 4 1.7%: --rank 4 does." in thin
    thick = advise(
        layer(range(8), range(8)), layer(range(8, 16), range(8, 16), [1.0, 1.0, 1.0] + [0.01] * 5)
    )
    assert "Cut to rank 8, the sum is 52.2% off; at rank 12 it is 0.6%: --rank 12 does." in thick


def test_layers_of_one_alone_are_counted():
    one, other = Adapter({Q: layer([0], [0]), K: layer([0], [0])}), Adapter({Q: layer([1], [1])})
    said = give_advice(diagnose_adapters(one, other, ("me", "pixel")))
    assert said[-1] == "Of 2 layers, me alone changes 1; there every method is the sum."


def test_adapters_without_a_layer_in_common_are_told():
    found = diagnose_adapters(Adapter({Q: layer([0], [0])}), Adapter({K: layer([0], [0])}))
    assert found.together.cosine is None or found.together.shared == 0
    assert give_advice(found)[0] == (
        "A and B have no layer in common, so every method gives their plain sum: choose weights."
    )
    assert draw_diagnosis(found).size[0] > 700


def test_the_advice_names_methods_and_options_that_exist():
    from dreamloom.merging.diagnose import advice

    source = __import__("inspect").getsource(advice)
    named = {word for word in ("np", "equal", "matched") if f"--method {word}" in source}
    assert named == {"np", "equal", "matched"}
    assert named <= set(METHODS)
    assert METHODS["np"].read_options({"mu": "0.5"})["mu"] == 0.5
    assert METHODS["equal"].read_options({"scope": "layer"})["scope"] == "layer"


# ------------------------------------------------------------------ as files


def test_the_numbers_are_plain_json():
    made = [random_adapter(1, {"linear": 3, "conv": 2}), random_adapter(2, {"linear": 2})]
    told = diagnose_adapters(*made, ("me", "pixel"), (1.0, 0.5)).as_json()
    again = json.loads(json.dumps(told, allow_nan=False))
    assert again["adapters"] == ["me", "pixel"]
    assert again["weights"] == [1.0, 0.5]
    assert again["together"]["layers"] == 2
    assert [entry["layer"] for entry in again["layers"]] == ["unet.conv", "unet.linear"]
    assert [entry["block"] for entry in again["blocks"]] == ["conv", "linear"]
    assert again["blocks"][1]["shared"] == 1
    assert again["layers"][0]["cosine"] is None
    assert len(again["layers"][1]["row_cosines"]) == 2


def test_the_picture_shows_strength_by_colour():
    layers = {name: layer([0], [0], [3.0]) for name in (Q, K)}
    weak = {name: layer([1], [1]) for name in (Q, K)}
    strong = draw_diagnosis(diagnose_adapters(Adapter(layers), Adapter(weak)))
    mirrored = draw_diagnosis(diagnose_adapters(Adapter(weak), Adapter(layers)))
    assert strong.size == mirrored.size

    def warmth(picture):
        pixels = np.asarray(picture, dtype=float)[:, : picture.width // 2]
        return (pixels[..., 0] - pixels[..., 2]).mean()

    assert warmth(strong) > 0 > warmth(mirrored)
