"""Identities that hold for every merge method and each of its settings, over awkward adapters.

Ranks and alphas are mixed, layers are missing, convolutions are there, factors repeat a direction
or hold one of zeros. Adapters go in as files where it matters how they are stored.
"""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.peftconfig import CONFIG_KEY
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.merging.files.merge import merge_adapters
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.merging.files.verify import verify_merge
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.merging.ranks import parse_rank
from merges import SHAPES, adapters, assert_same, dense, names_of, random_layer, rewrite

SPACES = ("dense", "knots", "core")
OF_ENTRIES = ("magnitude", "ties", "dare", "della", "breadcrumbs", "sce")
MIXTURES = ("slerp", "karcher", "stock", "matched", "equal", "perpendicular", "median")
OF_FACTORS = [name for name, method in METHODS.items() if method.needs == "factors"]

# Every method with every setting that changes what it computes.
EVERY = [
    *((name, {}) for name in OF_FACTORS),
    *((name, {"scope": "model"}) for name in MIXTURES),
    *(("matched", {"size": size}) for size in ("mean", "added")),
    *(("np", {"side": side}) for side in ("output", "both")),
    *(("np", {"projection": "hard", "protected": 1, "energy": share}) for share in (0.5, 1.0)),
    *((name, {"space": space}) for name in OF_ENTRIES for space in SPACES),
    *(("ties", {"reduce": reduce}) for reduce in ("mean", "weighted_mean")),
    *(("ties", {"election": "unweighted", "space": space}) for space in SPACES),
    *((name, {"density": 0.3}) for name in ("knots", "core")),
    *((name, {"threshold": "model"}) for name in ("ties", "knots", "core", "magnitude")),
]
RANKS = ("full", "2", "energy:0.9", "budget:1kB")


def title(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={setting}" for name, setting in value.items()) or "plain"
    return str(value)


def draw_awkward(seed: int, count: int, sides: tuple[int, int] = (8, 7)) -> list[Adapter]:
    """Some adapters, none of which is orderly; each kind of layer is in two of them at least."""
    rng = torch.Generator().manual_seed(seed)
    some: list[dict[str, Layer]] = [{} for _ in range(count)]
    for place, kind in enumerate(SHAPES):
        for number in range(count):
            if count > 2 and number == place % count:
                continue  # a layer that this one lacks
            rank = 2 + int(torch.randint(0, 3, (), generator=rng))
            deficient = (number + place + seed) % 2 == 0
            some[number][f"unet.{kind}"] = random_layer(rank, rng, *sides, kind, deficient)
    some[0]["unet.lonely"] = random_layer(3, rng, *sides, "conv", deficient=True)
    return [Adapter(layers) for layers in some]


def count_for(method: str) -> int:
    return METHODS[method].most or 3


def merged_by(method, some, weights, rank="full", **options):
    request = MergeRequest(weights[: len(some)], method, options, parse_rank(rank))
    return combine(some, request).adapter


WEIGHTS = [0.8, -0.6, 1.1]


@pytest.mark.parametrize(("method", "options"), EVERY, ids=title)
def test_the_split_into_factors_changes_nothing(method, options):
    for seed in range(5):
        some = draw_awkward(seed, count_for(method))
        rewritten = [rewrite(adapter, 10 * seed + n) for n, adapter in enumerate(some)]
        assert_same(
            merged_by(method, rewritten, WEIGHTS, **options),
            merged_by(method, some, WEIGHTS, **options),
            atol=5e-4,
        )


@pytest.mark.parametrize("method", ["sum", "np", "tsv", "iso", "knots", "ties"])
@pytest.mark.parametrize("rank", RANKS)
def test_nor_does_it_where_the_result_is_cut(method, rank):
    for seed in range(3):
        some = draw_awkward(seed, 3)
        rewritten = [rewrite(adapter, 10 * seed + n) for n, adapter in enumerate(some)]
        told, again = (merged_by(method, each, WEIGHTS, rank) for each in (some, rewritten))
        assert told.ranks == again.ranks or rank == "full"
        assert_same(again, told, atol=5e-4)


def test_adding_factors_would_change_with_the_split():
    """The negative control: what the test above compares is not the same anyway."""
    some = draw_awkward(0, 2)
    rewritten = [rewrite(adapter, number) for number, adapter in enumerate(some)]
    name = "unet.conv"
    rank = min(adapter.layers[name].rank for adapter in some)

    def average(adapters):
        up = sum(adapter.layers[name].up[:, :rank] for adapter in adapters)
        down = sum(adapter.layers[name].down[:rank] for adapter in adapters)
        return dense(Adapter({name: Layer(down, up)}), name)

    assert (average(rewritten) - average(some)).norm() > 0.3 * average(some).norm()


@pytest.mark.parametrize(("method", "options"), EVERY, ids=title)
def test_an_update_of_zeros_is_as_good_as_a_missing_one(method, options):
    for seed in range(3):
        some = draw_awkward(seed, count_for(method))
        names = names_of(some)
        filled = []
        for adapter in some:
            layers = dict(adapter.layers)
            for name in names - layers.keys():
                like = next(a.layers[name] for a in some if name in a.layers)
                layers[name] = Layer(like.down, torch.zeros_like(like.up))
            filled.append(Adapter(layers))
        assert any(adapter.layers.keys() < names for adapter in some)
        assert_same(
            merged_by(method, filled, WEIGHTS, **options),
            merged_by(method, some, WEIGHTS, **options),
            atol=1e-4,
        )


@settings(max_examples=40)
@given(adapters(1, 1), st.integers(0, 99), st.sampled_from(["full", "energy:1"]))
def test_two_halves_are_the_whole_and_an_adapter_less_itself_is_nothing(some, seed, rank):
    (one,) = some
    again = rewrite(one, seed)
    assert_same(merged_by("sum", [one, again], [0.5, 0.5], rank), one, atol=2e-5)
    assert_same(merged_by("sum", [one, again], [1.5, -0.5], rank), one, atol=5e-5)
    if rank == "full":
        nothing = merged_by("sum", [one, again], [1.0, -1.0], rank)
        assert all(dense(nothing, name).abs().max() < 1e-4 for name in nothing.layers)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_two_equally_strong_adapters_is_halfway_on_the_arc(seed):
    one, other = draw_awkward(seed, 2)
    shared = one.layers.keys() & other.layers.keys()
    made = []
    for adapter in (one, other):
        norms = {name: float(dense(adapter, name).norm()) for name in shared}
        made.append(
            Adapter(
                {
                    name: Layer(adapter.layers[name].down, adapter.layers[name].up / norms[name])
                    for name in shared
                }
            )
        )
    for scope in ("layer", "model"):
        mean, arc = (merged_by(m, made, [1.0, 1.0], scope=scope) for m in ("karcher", "slerp"))
        assert_same(mean, arc, atol=1e-5)


# One adapter, however it is stored.

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
SIZES = {TO_Q: (9, 7, ()), CONV: (6, 4, (3, 3)), TEXT: (8, 8, ())}


def draw_stored(seed):
    """The factors of a file before any strength, of ranks 2 to 4, one direction repeated."""
    rng = torch.Generator().manual_seed(seed)
    stored = {}
    for number, (name, (outputs, inputs, kernel)) in enumerate(SIZES.items()):
        rank = 2 + number
        down = torch.randn(rank, inputs, *kernel, generator=rng)
        up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=rng)
        down[-1] = down[0]
        stored[name] = Layer(down, up)
    return stored


def store_in_kohya(path, stored, naming):
    """An alpha for every layer, none of them its rank."""
    scales, tensors = {}, {}
    for number, (name, layer) in enumerate(stored.items()):
        alpha = 0.5 + 2.0 * number
        stem = getattr(sdxl_layers()[name], naming)
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        scales[name] = alpha / layer.rank
    save_file(tensors, path)
    return scales


def store_as_peft(path, stored, stabilised):
    """One alpha by a pattern, the others by default; perhaps divided by roots of ranks."""
    tensors = {}
    for name, layer in stored.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.down, layer.up
    inner = CONV.removeprefix("unet.")
    config = {
        **{"unet.r": 4, "unet.lora_alpha": 7.0, "unet.alpha_pattern": {inner: 1.0}},
        **{"text_encoder.r": 4, "text_encoder.lora_alpha": 3.0},
        **{f"{part}.use_rslora": stabilised for part in ("unet", "text_encoder")},
    }
    save_file(tensors, path, {CONFIG_KEY: json.dumps(config)})
    alphas = {TO_Q: 7.0, CONV: 1.0, TEXT: 3.0}
    power = 0.5 if stabilised else 1.0
    return {name: alphas[name] / layer.rank**power for name, layer in stored.items()}


QUANTIZED = {
    "kohya": lambda path, stored: store_in_kohya(path, stored, "kohya"),
    "kohya-diffusers": lambda path, stored: store_in_kohya(path, stored, "kohya_diffusers"),
    "peft": lambda path, stored: store_as_peft(path, stored, stabilised=False),
    "peft, rank-stabilised": lambda path, stored: store_as_peft(path, stored, stabilised=True),
}
ALONE = [name for name, method in METHODS.items() if method.keeps_one and method.least == 1]


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("form", QUANTIZED)
def test_one_file_at_weight_1_stays_the_change_that_it_was(method, form, tmp_path):
    """Also those that ask the base model: with one adapter there is nothing to ask."""
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    stored = draw_stored(3)
    scales = QUANTIZED[form](source, stored)
    assert all(abs(scale - 1) > 0.05 for scale in scales.values())
    merge_adapters([AdapterPart(source, 1.0)], out, method)
    assert verify_merge(out).error < 1e-6
    expected = Adapter({n: Layer(la.down, scales[n] * la.up) for n, la in stored.items()})
    assert_same(read_adapter(out), expected, atol=2e-5)


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(QUANTIZED, 2)])
def test_files_of_any_two_forms_add_up_to_what_they_say(first, second, tmp_path):
    paths, parts = [], []
    for number, form in enumerate((first, second)):
        paths.append(tmp_path / f"{number}.safetensors")
        stored = draw_stored(number)
        if number:
            del stored[TEXT]
        scales = QUANTIZED[form](paths[-1], stored)
        parts.append(Adapter({n: Layer(la.down, scales[n] * la.up) for n, la in stored.items()}))
    weights = [0.7, -1.3]
    out = tmp_path / "out.safetensors"
    merge_adapters([AdapterPart(path, w) for path, w in zip(paths, weights, strict=True)], out)
    found = read_adapter(out)
    assert found.layers.keys() == names_of(parts)
    for name in found.layers:
        expected = sum(w * dense(a, name) for w, a in zip(weights, parts, strict=True))
        torch.testing.assert_close(dense(found, name), expected, rtol=0, atol=2e-5)
