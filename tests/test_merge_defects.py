"""Defects of merge tools, D1 to D22 of `docs/merging.md`: that we do not have them.

Each has a negative control: the wrong formula is computed beside ours, so that a test which could
not tell them apart would fail. Those of the installed peft and diffusers are shown on them: what
they do right is compared, and what they do wrong is expected to fail, so that a mended version
is noticed.
"""

import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.activation_inputs import LEARNING_RATE, name_mask
from dreamloom.merging.blocks import parse_blocks, read_blocks
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.merging.ranks import parse_rank
from dreamloom.models.base import Framing
from merges import assert_same, dense, random_layer, rewrite

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
RESNET = "unet.mid_block.resnets.0.conv1"
PLAIN = "unet.down_blocks.0.resnets.0.conv1"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged_by(method, some, weights, rank="full", blocks=(), **options):
    return combine(some, MergeRequest(weights, method, options, parse_rank(rank), blocks)).adapter


def scaled(adapter, factor):
    return Adapter(
        {name: Layer(layer.down, factor * layer.up) for name, layer in adapter.layers.items()}
    )


def strength(found, wanted):
    """How strongly an update holds another."""
    return float((found * wanted).sum() / wanted.square().sum())


def far(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def make_one(seed, ranks=(4,), names=(TO_Q,)):
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {name: random_layer(rank, rng, 30, 20) for name, rank in zip(names, ranks, strict=True)}
    )


# Scales: D1, D2, D3, D14, D20.


def in_kohya(adapter, alphas, naming="kohya"):
    tensors = {}
    for name, layer in adapter.layers.items():
        stem = getattr(sdxl_layers()[name], naming)
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(alphas[name])
    return tensors


def test_d1_each_layer_has_its_own_alpha(tmp_path):
    adapter = make_one(1, (4, 2), (TO_Q, TO_K))
    alphas = {TO_Q: 2.0, TO_K: 1.0}
    save_file(in_kohya(adapter, alphas), tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    # The commonest alpha for both would make the first 0.25 or the second 1.
    for name in adapter.layers:
        assert strength(dense(found, name), dense(adapter, name)) == pytest.approx(0.5)


def test_d2_and_d3_alpha_counts_once_and_a_merge_inherits_no_scale(tmp_path):
    adapter = make_one(2, (8,))
    save_file(in_kohya(adapter, {TO_Q: 16.0}), tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    for rank in ("full", "8"):
        merged = merged_by("sum", [found], [1.0], rank)
        write_adapter(tmp_path / "m.safetensors", merged)
        again = read_adapter(tmp_path / "m.safetensors")
        # Twice would be 4, and the square root of the rank 5.7.
        assert strength(dense(again, TO_Q), dense(adapter, TO_Q)) == pytest.approx(2.0)


def test_d14_what_is_written_for_kohya_is_the_same_change(tmp_path):
    adapter = make_one(3, (4,))
    save_file(in_kohya(adapter, {TO_Q: 8.0}), tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    for format in ("kohya", "kohya-diffusers"):
        write_adapter(tmp_path / "k.safetensors", found, format=format)
        tensors = load_file(tmp_path / "k.safetensors")
        stem = next(iter(tensors)).partition(".")[0]
        scale = tensors[f"{stem}.alpha"] / tensors[f"{stem}.lora_down.weight"].shape[0]
        update = scale * tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        torch.testing.assert_close(update.double(), 2 * dense(adapter, TO_Q), rtol=0, atol=1e-4)


def test_d15_no_half_of_a_file_with_two_namings_is_dropped(tmp_path):
    adapter = make_one(4, (2, 2), (TO_Q, TO_K))
    alphas = {TO_Q: 2.0, TO_K: 2.0}
    tensors = in_kohya(Adapter({TO_Q: adapter.layers[TO_Q]}), alphas)
    tensors |= in_kohya(Adapter({TO_K: adapter.layers[TO_K]}), alphas, "kohya_diffusers")
    assert len(tensors) == 6
    save_file(tensors, tmp_path / "a.safetensors")
    assert_same(read_adapter(tmp_path / "a.safetensors"), adapter)


def test_d20_a_scale_of_a_block_is_applied_to_one_factor():
    adapter = make_one(5, (4, 4), (TO_Q, TO_K))
    merged = merged_by("sum", [adapter], [1.0], blocks=[parse_blocks("all=0.3, style=0.5")])
    assert strength(dense(merged, TO_K), dense(adapter, TO_K)) == pytest.approx(0.5)
    assert strength(dense(merged, TO_Q), dense(adapter, TO_Q)) == pytest.approx(0.3)


@pytest.mark.parametrize("names", ["peft", "kohya"])
@pytest.mark.parametrize("weight", [0.5, 0.8])
def test_d21_a_weight_counts_once_whoever_named_the_layers(names, weight, tmp_path):
    """Their formula is computed beside ours: every tensor of the file times the weight."""
    adapter = make_one(9)
    file = tmp_path / "one.safetensors"
    write_adapter(file, adapter, format=names)
    read = read_adapter(file)
    merged = merged_by("sum", [read], [weight])
    assert strength(dense(merged, TO_Q), dense(read, TO_Q)) == pytest.approx(weight)
    theirs = {key: weight * tensor for key, tensor in load_file(file).items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    found = dense(read_adapter(tmp_path / "theirs.safetensors"), TO_Q)
    power = 3 if names == "kohya" else 2
    assert strength(found, dense(read, TO_Q)) == pytest.approx(weight**power, abs=1e-4)


def test_d22_a_weight_counts_with_weights_of_blocks_too():
    adapter = make_one(10, (4, 4), (TO_Q, TO_K))
    merged = merged_by("sum", [adapter], [0.6], blocks=[parse_blocks("style=0.5")])
    assert strength(dense(merged, TO_K), dense(adapter, TO_K)) == pytest.approx(0.3)
    assert strength(dense(merged, TO_Q), dense(adapter, TO_Q)) == pytest.approx(0.6)


# What is no LoRA: D4.


def test_d4_a_dora_is_not_merged_as_if_it_were_a_lora(tmp_path):
    adapter = make_one(6)
    dora = Adapter({}, peft=make_dora(dict(adapter.layers), {TO_Q: torch.ones(30)}))
    with pytest.raises(AdapterError, match="only a LoRA can be merged"):
        combine([dora, adapter], MergeRequest([1.0, 1.0]))


# Products of factors: D5, D7, D8, D9, D11, D18.


def test_d5_and_d18_factors_are_not_averaged():
    """Whatever a method does, it does to updates: factors may be split in any way."""
    some = [make_one(7), make_one(8)]
    exact = 0.5 * dense(some[0], TO_Q) + 0.5 * dense(some[1], TO_Q)
    torch.testing.assert_close(dense(merged_by("sum", some, [0.5, 0.5]), TO_Q), exact)
    one, other = (adapter.layers[TO_Q] for adapter in some)
    roots = 0.5**0.5
    crossed = roots * (one.up + other.up) @ (roots * (one.down + other.down))
    assert far(crossed.double(), exact) > 0.5
    for name, method in METHODS.items():
        if method.needs == "factors" and method.least <= 2:
            told = merged_by(name, some, [0.8, 0.6])
            rewritten = [rewrite(adapter, seed) for seed, adapter in enumerate(some)]
            assert_same(merged_by(name, rewritten, [0.8, 0.6]), told, atol=5e-3)


def test_d7_and_d11_a_ratio_is_what_it_says():
    some = [make_one(9), make_one(10)]
    for weights in ([0.5, 0.5], [0.8, 0.6]):
        for rank in ("full", "8"):
            merged = dense(merged_by("sum", some, weights, rank), TO_Q)
            parts = torch.stack([dense(adapter, TO_Q).flatten() for adapter in some])
            found = torch.linalg.lstsq(parts.T, merged.flatten()[:, None]).solution.flatten()
            # Squares, or roots, of the ratios are what was found in other tools.
            assert found.tolist() == pytest.approx(weights, abs=1e-5)


def test_d8_adapters_of_unequal_ranks_keep_their_strengths():
    some = [make_one(11, (8,)), make_one(12, (12,))]
    merged = merged_by("sum", some, [1.0, 1.0])
    assert merged.ranks == {TO_Q: 20}
    parts = torch.stack([dense(adapter, TO_Q).flatten() for adapter in some])
    found = torch.linalg.lstsq(parts.T, dense(merged, TO_Q).flatten()[:, None]).solution.flatten()
    # The first file's alpha over the ranks added up would give 8/20 and 8/20.
    assert found.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("weight", [0.5, -1.0, 0.0])
def test_d9_a_block_weight_counts_once_with_its_sign(weight):
    adapter = make_one(13, (4, 4), (TO_Q, TO_K))
    listed = ["1"] * 12
    listed[5] = str(weight)  # the middle block
    merged = merged_by("sum", [adapter], [1.0], blocks=[parse_blocks(",".join(listed))])
    found = dense(merged, TO_Q) if TO_Q in merged.layers else torch.zeros(30, 20).double()
    torch.testing.assert_close(found, weight * dense(adapter, TO_Q), rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(merged, TO_K), dense(adapter, TO_K), rtol=0, atol=1e-6)


# Ranks: D6, D10.


def test_d6_a_rank_above_a_layers_sides_is_no_accident():
    """SDXL's last convolution has 4 outputs, so its update has rank 4 at most."""
    rng = torch.Generator().manual_seed(14)
    some = [
        Adapter({RESNET: random_layer(6, rng, 4, 5, "conv"), TO_Q: random_layer(6, rng, 30, 20)})
        for _ in range(2)
    ]
    merged = merged_by("sum", some, [1.0, 1.0], "12")
    assert merged.ranks == {RESNET: 12, TO_Q: 12}
    cut = merged_by("sum", some, [1.0, 1.0], "6")
    assert cut.ranks == {RESNET: 4, TO_Q: 6}
    assert_same(Adapter({RESNET: cut.layers[RESNET]}), Adapter({RESNET: merged.layers[RESNET]}))


def test_d10_nothing_is_clamped():
    """Where the rank is enough the merge is exact, however strong single entries are."""
    adapter = make_one(15, (4,))
    layer = adapter.layers[TO_Q]
    strong = torch.cat([layer.down, 100 * layer.down[:1]])
    heavy = Adapter({TO_Q: Layer(strong, torch.cat([layer.up, layer.up[:, :1].flip(0)], dim=1))})
    exact = dense(heavy, TO_Q)
    cut = merged_by("sum", [heavy, heavy], [0.5, 0.5], "5")
    assert far(dense(cut, TO_Q), exact) < 1e-6
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    limit = torch.quantile((left[:, :5] * values[:5]).flatten(), 0.99)
    clamped = (left[:, :5] * values[:5]).clamp(-limit, limit) @ right[:5].clamp(-limit, limit)
    assert far(clamped, exact) > 0.1


# Applied and taken off: D12, D13.


def look(model):
    noisy = draw(1, 4, 8, 8, seed=5)
    conditioning = model.encode_prompts(["a photo"])
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([400]), conditioning, [Framing((64, 64))]).float()


def list_weights(model, *names):
    found = {}
    for name in names:
        component, _, inner = name.partition(".")
        found[name] = model._components[component].get_submodule(inner).weight.shape
    return found


@pytest.fixture
def active(model):
    """An adapter of attention and of convolutions in blocks with and without attention."""
    layers = {}
    for number, (name, shape) in enumerate(list_weights(model, TO_Q, RESNET, PLAIN).items()):
        ones = (1,) * (len(shape) - 2)
        down = 0.5 * draw(2, *shape[1:], seed=number)
        layers[name] = Layer(down, 0.5 * draw(shape[0], 2, *ones, seed=number + 9))
    return Adapter(layers)


def test_d12_a_strength_does_not_outlive_the_drawing(model, active):
    bare = look(model)
    with model.apply_adapters([(active, 0.5)]):
        first = look(model)
    torch.testing.assert_close(look(model), bare, rtol=0, atol=0)
    with model.apply_adapters([(active, 0.5)]):
        torch.testing.assert_close(look(model), first, rtol=0, atol=0)
    with model.apply_adapters([(scaled(active, 0.25), 1.0)]):
        assert (look(model) - first).abs().max() > 1e-3


def test_d13_block_weights_reach_convolutions_and_blocks_without_attention(model, active):
    bare = look(model)
    none = read_blocks({"down": 0.0, "mid": 0.0, "up": 0.0})
    assert [none.of(name) for name in active.layers] == [0.0] * 3
    half = read_blocks({"down": 0.5, "mid": 0.5, "up": 0.5})
    merged = merged_by("sum", [active], [1.0], blocks=[half])
    with model.apply_adapters([(merged, 1.0)]):
        by_blocks = look(model)
    with model.apply_adapters([(active, 0.5)]):
        torch.testing.assert_close(look(model), by_blocks, rtol=0, atol=1e-5)
    assert (by_blocks - bare).abs().max() > 1e-3


def test_a_merged_file_draws_what_its_parts_draw_applied_together(model, active):
    """Most of these defects would show here."""
    other = Adapter({TO_Q: Layer(active.layers[TO_Q].down.flip(0), -2 * active.layers[TO_Q].up)})
    with model.apply_adapters([(active, 0.8), (other, -0.6)]):
        together = look(model)
    for rank in ("full", "4"):
        with model.apply_adapters([(merged_by("sum", [active, other], [0.8, -0.6], rank), 1.0)]):
            torch.testing.assert_close(look(model), together, rtol=0, atol=2e-5)


# Single methods: D16 to D19.


def test_d16_without_outliers_the_largest_entries_stay():
    """An empty slice counted from the end is the whole tensor, or none of it."""
    one = make_one(20)
    merged = merged_by("breadcrumbs", [one], [1.0], "20", outliers=0.0, density=0.5, space="dense")
    exact, found = dense(one, TO_Q), dense(merged, TO_Q)
    middle = exact.abs().flatten().sort().values[exact.numel() // 2]
    expected = torch.where(exact.abs() >= middle, exact, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected != 0).sum() == exact.numel() // 2


@pytest.mark.parametrize("method", ["ties", "dare", "della", "breadcrumbs", "sce", "magnitude"])
def test_d18_entries_are_those_of_updates_not_of_factors(method):
    some = [make_one(21), make_one(22)]
    rewritten = [rewrite(adapter, seed) for seed, adapter in enumerate(some)]
    told, again = (merged_by(method, each, [0.8, 0.6], "20") for each in (some, rewritten))
    assert far(dense(again, TO_Q), dense(told, TO_Q)) < 1e-3


@pytest.mark.parametrize("method", ["knots", "core"])
def test_d19_each_adapter_has_its_own_weight_in_knots(method):
    """At density 1, where one adapter is much the stronger, its sign is elected everywhere."""
    some = [make_one(23), make_one(24)]
    kept = merged_by(method, some, [1.0, 1e-3], density=1.0)
    assert strength(dense(kept, TO_Q), dense(some[0], TO_Q)) == pytest.approx(1.0, abs=0.01)
    turned = merged_by(method, some, [1e-3, 1.0], density=1.0)
    assert strength(dense(turned, TO_Q), dense(some[1], TO_Q)) == pytest.approx(1.0, abs=0.01)
    assert abs(strength(dense(turned, TO_Q), dense(some[0], TO_Q))) < 0.2


def test_d17_zip_masks_are_learned_at_a_rate_that_moves_them_and_stay_factors():
    """At 5e-5 a mask moves by 0.005 at most in 100 updates of Adam: that is the plain sum."""
    assert LEARNING_RATE.default == 0.01
    some = [make_one(16, (3,)), make_one(17, (2,))]
    masks = [draw(20, seed=18), draw(20, seed=19)]
    prepared = {TO_Q: {name_mask(i + 1): mask for i, mask in enumerate(masks)}}
    merged = combine(some, MergeRequest([1.0, 0.5], "ziplora"), prepared).adapter
    assert merged.ranks == {TO_Q: 5}
    expected = dense(some[0], TO_Q) * masks[0] + 0.5 * dense(some[1], TO_Q) * masks[1]
    torch.testing.assert_close(dense(merged, TO_Q), expected, rtol=0, atol=1e-5)


# Beside the installed libraries.


TAUGHT = ("one", "two")


class Small(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 30)
        self.conv = nn.Conv2d(4, 24, 3)
        self.last = nn.Conv2d(24, 4, 3)


def teach(targets, *settings):
    """Two LoRAs of peft's with random factors, by the names in `TAUGHT`."""
    model = None
    for name, given in zip(TAUGHT, settings, strict=True):
        config = LoraConfig(target_modules=list(targets), init_lora_weights=False, **given)
        if model is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = get_peft_model(Small(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if ".lora_A." in name or ".lora_B." in name:
            weight.data = draw(*weight.shape, seed=number)
    return model


def delta(model, name, adapter):
    return getattr(model.base_model.model, name).get_delta_weight(adapter).detach().double()


def read_there(model, targets, adapter):
    """What peft has taught, in our form."""
    layers = {}
    for name in targets:
        layer = getattr(model.base_model.model, name)
        up = layer.scaling[adapter] * layer.lora_B[adapter].weight.detach()
        layers[f"unet.{name}"] = Layer(layer.lora_A[adapter].weight.detach(), up)
    return Adapter(layers)


def compare_merges(kind, targets, first, second, weights, rank=8):
    """Merge the same two LoRAs by peft and here, and compare the updates."""
    model = teach(targets, first, second)
    sizes = {} if kind in ("cat", "linear") else {"svd_rank": rank}
    model.add_weighted_adapter([*TAUGHT], weights, "both", combination_type=kind, **sizes)
    ours = merged_by(
        "sum",
        [read_there(model, targets, name) for name in TAUGHT],
        weights,
        str(rank) if sizes else "full",
    )
    for name in targets:
        theirs = delta(model, name, "both")
        torch.testing.assert_close(dense(ours, f"unet.{name}"), theirs, rtol=0, atol=1e-3)


BOTH = ("linear", "conv")


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
def test_peft_merges_loras_of_any_alpha_as_we_do(kind, weights):
    """D2 is mended in the installed peft."""
    first, second = {"r": 8, "lora_alpha": 16}, {"r": 4, "lora_alpha": 1}
    compare_merges(kind, BOTH, first, second, weights)


def test_peft_averages_factors_of_one_adapter_rightly():
    same = {"r": 4, "lora_alpha": 4}
    model = teach(("linear",), same, same)
    model.add_weighted_adapter(["one"], [0.5], "weaker", combination_type="linear")
    ours = merged_by("sum", [read_there(model, ("linear",), "one")], [0.5])
    torch.testing.assert_close(dense(ours, "unet.linear"), delta(model, "linear", "weaker"))


@pytest.mark.xfail(reason="D3: peft's merge inherits rank stabilisation", raises=AssertionError)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_merges_rank_stabilised_loras(kind):
    """When this passes, peft has mended it, and `docs/merging.md` must say so."""
    stable = {"r": 8, "lora_alpha": 8, "use_rslora": True}
    compare_merges(kind, ("linear",), stable, stable, [1.0, 1.0])


@pytest.mark.xfail(reason="D5: peft multiplies averaged factors", raises=AssertionError)
def test_peft_merges_linearly():
    same = {"r": 4, "lora_alpha": 4}
    compare_merges("linear", ("linear",), same, same, [0.5, 0.5])


@pytest.mark.xfail(reason="D6: peft reshapes more than there is", raises=RuntimeError)
def test_peft_merges_a_convolution_with_few_outputs():
    compare_merges("svd", ("last",), {"r": 6}, {"r": 6}, [1.0, 1.0])


@pytest.mark.xfail(reason="D4: peft merges a DoRA's factors alone", raises=AssertionError)
def test_peft_keeps_a_dora_that_is_merged_alone():
    taught = {"r": 4, "lora_alpha": 4, "use_dora": True}
    model = teach(("linear",), taught, taught)
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.3 * draw(*weight.shape, seed=1)
    layer, inputs = model.base_model.model.linear, draw(3, 20)
    with torch.no_grad():
        model.set_adapter("one")
        before = layer(inputs)
        model.add_weighted_adapter(["one"], [1.0], "alone", combination_type="svd", svd_rank=4)
        model.set_adapter("alone")
        torch.testing.assert_close(layer(inputs), before, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def loaded(pipeline, active, tmp_path):
    """The adapter in diffusers, twice, under two names."""
    write_adapter(tmp_path / "a.safetensors", active)
    write_adapter(tmp_path / "b.safetensors", scaled(active, -2.0))
    try:
        for name in "ab":
            file = f"{name}.safetensors"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                pipeline.load_lora_weights(tmp_path, weight_name=file, adapter_name=name)
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def active_update(pipeline, name):
    """What diffusers' active adapters change of a layer."""
    layer = pipeline.unet.get_submodule(name.removeprefix("unet."))
    return sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters).detach()


def test_diffusers_wears_two_adapters_as_we_merge_them(loaded, active):
    loaded.set_adapters(["a", "b"], [0.8, 0.3])
    merged = merged_by("sum", [active, scaled(active, -2.0)], [0.8, 0.3])
    for name in active.layers:
        found = active_update(loaded, name).double()
        torch.testing.assert_close(found, dense(merged, name).view_as(found), rtol=0, atol=1e-5)


def test_diffusers_block_weights_are_ours_within_attention(loaded, active):
    table = {"mid": 0.25, "up": {"block_0": [1.0, 0.5, 2.0]}}
    loaded.set_adapters(["a"], [{"unet": table}])
    blocks = read_blocks({"unet": table})
    merged = merged_by("sum", [active], [1.0], blocks=[blocks])
    found = active_update(loaded, TO_Q).double()
    torch.testing.assert_close(found, dense(merged, TO_Q), rtol=0, atol=1e-6)


@pytest.mark.xfail(reason="D13: diffusers leaves all but attention at 1", raises=AssertionError)
@pytest.mark.parametrize("name", [RESNET, PLAIN])
def test_diffusers_block_weights_reach_convolutions(loaded, active, name):
    loaded.set_adapters(["a"], [{"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}}])
    assert float(active_update(loaded, name).norm()) == 0.0


def fused_strength(pipeline, layer, **how):
    """How strongly an adapter is in the weights after it is fused; it is taken out again."""
    module = pipeline.unet.get_submodule(TO_Q.removeprefix("unet."))
    base = module.get_base_layer().weight.detach().clone()
    pipeline.fuse_lora(**how)
    change = module.get_base_layer().weight.detach() - base
    pipeline.unfuse_lora()
    return strength(change.double(), (layer.up @ layer.down).double())


def test_diffusers_fuses_once_rightly(loaded, active):
    loaded.set_adapters(["a"])
    found = fused_strength(loaded, active.layers[TO_Q], lora_scale=0.5)
    assert found == pytest.approx(0.5, abs=1e-4)


@pytest.mark.xfail(reason="D12: a second fusion squares the strength", raises=AssertionError)
def test_diffusers_fuses_twice_alike(loaded, active):
    loaded.set_adapters(["a"])
    first, second = (fused_strength(loaded, active.layers[TO_Q], lora_scale=0.5) for _ in range(2))
    assert second == pytest.approx(first, abs=1e-4)


@pytest.mark.xfail(reason="D12: an adapter that is not active ignores it", raises=AssertionError)
def test_diffusers_fuses_an_adapter_that_is_not_active_at_its_strength(loaded, active):
    loaded.set_adapters(["a"])
    layer = scaled(active, -2.0).layers[TO_Q]
    found = fused_strength(loaded, layer, lora_scale=0.5, adapter_names=["b"])
    assert found == pytest.approx(0.5, abs=1e-4)
