"""What the base model is asked before a merge, against what can be seen by hand."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import AdapterError, ConfigError, TrainingError
from dreamloom.core.events import Progress
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.activation_inputs import JOINT, name_down, name_gram
from dreamloom.merging.activations.denoising import denoise_steps, predict, step_down
from dreamloom.merging.activations.forward_passes import (
    ForwardPasses,
    find_prompts,
    list_passes,
    weigh_adapters,
)
from dreamloom.merging.activations.gram import (
    find_sources,
    gather_inputs,
    gather_signals,
    plan_rounds,
)
from dreamloom.merging.activations.masks import measure_missed, record_examples
from dreamloom.merging.activations.prepare import PREPARERS, prepare_merge
from dreamloom.merging.blocks import BlockWeights
from dreamloom.merging.factors import flatten
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.models.activation_hooks import add_changes, hook_activations
from dreamloom.models.base import AdapterSpec
from dreamloom.models.families import load_model
from dreamloom.models.schedule import NoiseSchedule
from dreamloom.models.target_modules import choose_layers
from merges import assert_same, dense, rewrite

PROMPTS = (("a photo of a dog", "a painting of a dog in the snow"), ("a painting", "a person"))
QUICK = {"prompts": 2, "steps": 2}
BLOCK = "down_blocks.1.attentions.0"


def make_adapter(model, seed, strength=0.3, target_modules="all", text=False, blocks="all"):
    spec = AdapterSpec(2, 2.0, target_modules, seed, blocks=blocks, text_encoders=text)
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for component, names in choose_layers(model._components, spec).items():
        for name in names:
            outputs, *inputs = model._components[component].get_submodule(name).weight.shape
            down = torch.randn(2, *inputs, generator=rng) / prod(inputs) ** 0.5
            up = strength * torch.randn(outputs, 2, *[1] * (len(inputs) - 1), generator=rng)
            layers[f"{component}.{name}"] = Layer(down, up)
    return Adapter(layers)


@pytest.fixture(scope="module")
def pair(model):
    """Two adapters of some linear layers and some convolutions, from the first to the last."""
    some = f"{BLOCK},mid_block,up_blocks.2,down_blocks.0"
    return [make_adapter(model, seed, blocks=some) for seed in (1, 2)]


@pytest.fixture(scope="module")
def small(model):
    """Two adapters of a few layers, quick to learn with."""
    return [make_adapter(model, seed, 0.6, blocks=BLOCK) for seed in (3, 4)]


def inquire(model, some, weights=(1.0, 1.0), joint=False, **options):
    request = MergeRequest(list(weights), **options)
    prompts = find_prompts(some, 2, PROMPTS)
    passes = list_passes(weigh_adapters(some, request), prompts, joint)
    return ForwardPasses(model, some, request, passes, 2, 0)


def answer(model):
    """What the model says to something, to see whether it is as it was."""
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return predict(model, noisy, torch.tensor([500]), model.encode_prompts(["a dog"]))


@contextmanager
def recorded(layers):
    """Keep every input of some layers, in rows that fit their flattened weight."""
    kept = {name: [] for name in layers}

    def gather(name, layer, rows):
        if isinstance(layer, nn.Conv2d):
            size = {"padding": layer.padding, "stride": layer.stride}
            rows = unfold(rows, layer.kernel_size, **size).transpose(1, 2)
        kept[name].append(rows.double().reshape(-1, rows.shape[-1]))

    with torch.no_grad(), hook_activations(layers, gather):
        yield kept


def inputs_by_hand(forward_passes, one_pass):
    model = forward_passes.model
    with (
        recorded(forward_passes.layers) as kept,
        model.apply_adapters([(a, 1.0) for a in one_pass.active]),
    ):
        said = model.encode_prompts(one_pass.prompts)
        for _ in denoise_steps(model, said, forward_passes.steps, forward_passes.seed):
            pass
    return {name: torch.cat(rows) for name, rows in kept.items()}


# Prompts.


def told(**metadata):
    return Adapter({}, {f"dreamloom.{name}": text for name, text in metadata.items()})


def test_an_adapter_tells_its_prompt_and_is_asked_in_several_places():
    person = told(photo_prompt="a photo of rraj person", subject="rraj person")
    style = told(photo_prompt="pixel, a photo", subject="pixel")
    found = find_prompts([person, style], 3)
    assert found.each[0][:2] == ("a photo of rraj person", "a photo of rraj person in a studio")
    assert found.each[1][:2] == (
        "pixel, a photo of a person",
        "pixel, a photo of a dog in a studio",
    )
    assert found.joint[0] == "pixel, a photo of rraj person"
    assert all(len(set(own)) == 3 for own in (*found.each, found.joint))


def test_words_alone_are_put_into_a_photo():
    one = Adapter({}, {"modelspec.trigger_phrase": "sks dog"})
    assert find_prompts([one], 1).each == (("a photo of sks dog",),)


def test_prompts_that_are_given_are_taken_as_they_are():
    person = told(subject="rraj person")
    found = find_prompts([person, Adapter({})], 3, [(), ("x", "y")], ("z",))
    assert found.each[1] == ("x", "y", "x")
    assert found.joint == ("z", "z", "z")


def test_an_adapter_that_does_not_tell_needs_a_prompt():
    with pytest.raises(ConfigError, match=r"Adapter 2 does not say .* Give a prompt for it"):
        find_prompts([told(subject="a"), Adapter({})], 3)
    with pytest.raises(ConfigError, match="Prompts are given for 1 adapters, but there are 2"):
        find_prompts([Adapter({}), Adapter({})], 3, [("x",)])


# Drawing.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_right_prediction_leads_to_the_same_picture_with_less_noise(prediction):
    schedule = NoiseSchedule({"prediction_type": prediction, "num_train_timesteps": 1000})
    rng = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(2, 4, 3, 3, generator=rng) for _ in range(2))
    before, after = torch.tensor([900, 500]), torch.tensor([400, 100])
    noisy = schedule.add_noise(picture, noise, before)
    right = schedule.target(picture, noise, before)
    expected = schedule.add_noise(picture, noise, after)
    found = step_down(schedule, noisy, right, before, after)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    wrong = step_down(schedule, noisy, right + 0.1, before, after)
    assert (wrong - expected).abs().max() > 1e-2


def test_drawings_begin_with_the_same_noise_and_go_down(model):
    said = model.encode_prompts(["a dog", "a person", "a painting", "snow", "a photo"])
    denoised = list(denoise_steps(model, said, 3, 7))
    assert [step.rows.tolist() for step in denoised] == [[0, 1, 2, 3]] * 3 + [[4]] * 3
    assert [int(step.timesteps[0]) for step in denoised] == [999, 666, 333] * 2
    other = model.encode_prompts(["a painting", "snow"])
    first = next(denoise_steps(model, other, 1, 7))
    assert torch.equal(first.noisy, denoised[0].noisy[:2])
    assert not torch.equal(first.prediction, denoised[0].prediction[:2])
    assert not torch.equal(next(denoise_steps(model, other, 1, 8)).noisy, first.noisy)


def test_timesteps_are_spread_evenly_from_the_last_one_down(model):
    denoised = denoise_steps(model, model.encode_prompts(["snow"]), 4, 7)
    assert [int(step.timesteps[0]) for step in denoised] == [999, 749, 500, 250]


# Listening.


def test_signals_are_those_of_the_layers_inputs(model, pair):
    forward_passes = inquire(model, pair, (0.8, 1.2), joint=True)
    prepared = gather_signals(forward_passes, {"unseen": "drop"}).layers
    assert prepared.keys() == pair[0].layers.keys()
    for one_pass in forward_passes.passes:
        for name, rows in inputs_by_hand(forward_passes, one_pass).items():
            down = torch.cat([flatten(a.layers[name]).down.double() for a in pair])
            signals = rows @ down.T
            expected = signals.T @ signals / len(rows)
            found = prepared[name][name_gram(one_pass.number)]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_a_layer_that_is_given_too_few_inputs_gets_the_plain_sum(model, pair):
    forward_passes = inquire(model, pair)
    kept, dropped = (
        gather_signals(forward_passes, {"unseen": word}).layers for word in ("sum", "drop")
    )
    one_pass = forward_passes.passes[0]
    few = {
        n
        for n, rows in inputs_by_hand(forward_passes, one_pass).items()
        if len(rows) < rows.shape[1]
    }
    assert 0 < len(few) < len(kept)
    assert any(name.endswith("time_emb_proj") for name in few)
    for name in kept:
        gram = kept[name][name_gram(one_pass.number)]
        assert bool(gram.any()) == (name not in few)
        assert bool(dropped[name][name_gram(one_pass.number)].any())
    merged, plain = (
        combine(forward_passes.adapters, MergeRequest([0.5, 1.0], method), kept).adapter
        for method in ("ssr", "sum")
    )
    for name in few:
        torch.testing.assert_close(dense(merged, name), dense(plain, name))


def test_each_adapter_is_recorded_while_it_is_applied_at_its_weight(model, pair):
    weak, strong = (
        gather_signals(inquire(model, pair, (weight, 1.0)), {"unseen": "sum"}).layers
        for weight in (0.1, 2.0)
    )
    # The first layers see the same, later ones what earlier ones made of it.
    last = "unet.up_blocks.2.resnets.2.conv2"
    one, other = (gathered[last][name_gram(1)] for gathered in (weak, strong))
    assert (one - other).norm() > 0.1 * other.norm()
    torch.testing.assert_close(weak[last][name_gram(2)], strong[last][name_gram(2)])


def test_block_weights_count_while_recording(model, pair):
    off = BlockWeights((("unet.up_blocks.*", 0.0),))
    forward_passes = inquire(model, pair, blocks=[off, BlockWeights()])
    assert not any(name.startswith("unet.up_blocks") for name in forward_passes.shared)
    assert all(not n.startswith("unet.up_blocks") for n in forward_passes.weighed[0].layers)
    halved = weigh_adapters(
        pair, MergeRequest([0.5, 1.0], blocks=[BlockWeights((("*", 0.5),))] * 2)
    )
    name = next(iter(pair[0].layers))
    torch.testing.assert_close(dense(halved[0], name), 0.25 * dense(pair[0], name))


def test_text_encoders_are_recorded(model):
    some = [make_adapter(model, seed, target_modules="attention", text=True) for seed in (5, 6)]
    forward_passes = inquire(model, some)
    prepared = gather_signals(forward_passes, {"unseen": "sum"}).layers
    text = [name for name in prepared if name.startswith("text_encoder")]
    assert any(name.startswith("text_encoder_2") for name in text)
    assert all(prepared[name][name_gram(1)].trace() > 0 for name in text)


def test_layers_with_the_same_inputs_are_found(model, pair):
    forward_passes = inquire(model, pair)
    sources = find_sources(forward_passes)
    seen = inputs_by_hand(
        replace(forward_passes, steps=1), replace(forward_passes.passes[0], active=())
    )
    for name, source in sources.items():
        assert torch.equal(seen[name], seen[source])
    attention = "unet.mid_block.attentions.0.transformer_blocks.1.attn"
    assert sources[f"{attention}1.to_v"] == sources[f"{attention}1.to_k"]
    assert sources[f"{attention}2.to_v"] == sources[f"unet.{BLOCK}.transformer_blocks.0.attn2.to_k"]
    assert sources[f"{attention}1.to_q"] != sources[f"{attention}2.to_q"]
    # Every pair of equal inputs of linear layers is found, not some of them.
    # Time is activated anew for each block: equal numbers, but not one tensor.
    linear = [
        n
        for n, m in forward_passes.layers.items()
        if isinstance(m, nn.Linear) and "time_emb" not in n
    ]
    distinct = {sources[name] for name in linear}
    digests = {name: seen[name].sum().item() for name in distinct}
    assert len(set(digests.values())) == len(distinct)


def test_rounds_hold_what_fits():
    assert plan_rounds({"a": 10, "b": 10, "c": 10}, 2, 1600) == [{"a": 10, "b": 10}, {"c": 10}]
    assert plan_rounds({"a": 100, "b": 1, "c": 1}, 1, 8) == [{"a": 100}, {"b": 1, "c": 1}]


@pytest.mark.parametrize("joint", [0.0, 0.5])
def test_inputs_are_shared_out_as_by_hand(model, small, joint):
    forward_passes = inquire(model, small, joint=joint > 0)
    options = METHODS["regmean"].read_options({"joint": joint, "shrink": 0.7, "ridge": 1e-4})
    prepared = gather_inputs(forward_passes, options).layers
    seen = {
        one_pass.number: inputs_by_hand(forward_passes, one_pass)
        for one_pass in forward_passes.passes
    }
    few: dict[str, bool] = {}
    for name in forward_passes.shared:
        grams = {n: rows[name].T @ rows[name] / len(rows[name]) for n, rows in seen.items()}
        shrunk = {n: 0.7 * g + 0.3 * torch.diag(g.diagonal()) for n, g in grams.items()}
        both = joint * shrunk[JOINT] if joint else 0
        total = shrunk[1] + shrunk[2] + both
        ridge = 1e-4 * total.trace() / len(total) * torch.eye(len(total))
        few[name] = min(len(seen[n][name]) for n in (1, 2)) < len(total)
        for number, adapter in enumerate(small, 1):
            down = flatten(adapter.layers[name]).down.double()
            if few[name]:  # left to the plain sum
                assert torch.equal(prepared[name][name_down(number)].double(), down)
                continue
            own = shrunk[number] + both + ridge
            expected = torch.linalg.solve(total + ridge, own @ down.T).T
            found = prepared[name][name_down(number)].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(down.abs().max()))
    assert 0 < sum(few.values()) < len(few)


def test_recording_in_rounds_says_the_same(model, small):
    forward_passes = inquire(model, small)
    options = METHODS["regmean"].read_options({})
    at_once, bit_by_bit = (
        gather_inputs(forward_passes, options, size).layers for size in (2**31, 10_000)
    )
    assert at_once.keys() == bit_by_bit.keys()
    for name, own in at_once.items():
        for key, tensor in own.items():
            torch.testing.assert_close(bit_by_bit[name][key], tensor)


def test_a_layer_that_is_never_asked_gets_the_plain_sum(model, small):
    unheard = "unet.never"
    layer = Layer(torch.ones(1, 3), torch.ones(4, 1))
    forward_passes = inquire(
        model, [replace(a, layers={**a.layers, unheard: layer}) for a in small]
    )
    vars(forward_passes)["layers"] = {
        **{n: m for n, m in model.layers_of(small[0]).items() if n in forward_passes.shared},
        unheard: nn.Linear(3, 4),
    }
    passes = [replace(one_pass, active=()) for one_pass in forward_passes.passes]
    prepared = gather_signals(replace_asks(forward_passes, passes), {"unseen": "sum"}).layers
    assert float(prepared[unheard][name_gram(1)].norm()) == 0
    merged = combine(forward_passes.adapters, MergeRequest([0.5, 1.0], "ssr"), prepared).adapter
    expected = 1.5 * torch.ones(4, 3).double()
    torch.testing.assert_close(dense(merged, unheard), expected)


def replace_asks(forward_passes, passes):
    other = replace(forward_passes, passes=passes)
    vars(other)["layers"] = forward_passes.layers
    return other


@pytest.mark.parametrize("method", ["ssr", "regmean"])
def test_the_merge_answers_each_adapters_prompts_better_than_the_sum(model, pair, method):
    request = MergeRequest([1.0, 1.0], method, QUICK)
    prepared = prepare_merge(model, pair, request, PROMPTS)
    merged, plain = (
        combine(pair, replace(request, method=m, options=o), prepared.layers).adapter
        for m, o in ((method, QUICK), ("sum", {}))
    )
    examples = record_examples(inquire(model, pair))
    assert sum(measure_missed(model, examples, merged)) < sum(
        measure_missed(model, examples, plain)
    )


# What is missed.


def test_nothing_is_missed_by_the_adapter_itself_and_all_by_none(model, pair):
    examples = record_examples(inquire(model, pair))
    assert measure_missed(model, examples, pair[0])[0] < 1e-9
    nothing = Adapter({n: Layer(x.down, 0 * x.up) for n, x in pair[0].layers.items()})
    assert measure_missed(model, examples, nothing) == pytest.approx([1.0, 1.0], rel=1e-5)
    assert measure_missed(model, examples, pair[0])[1] > 0.1


# Masks.

LEARNED = ["ziprank", "ziplora"]
FEW = {**QUICK, "updates": 12, "learning_rate": 0.03}


@pytest.fixture(scope="module", params=LEARNED)
def learned(request, model, small):
    before = answer(model)
    request = MergeRequest([1.0, 0.8], request.param, FEW)
    events = []
    prepared = prepare_merge(model, small, request, PROMPTS, observe=events.append)
    assert torch.equal(answer(model), before)
    return request, prepared, events


def test_masks_move_and_less_is_missed(learned):
    """An optimizer that hardly moves gives the plain sum under another name."""
    request, prepared, _ = learned
    masks = torch.cat([mask for own in prepared.layers.values() for mask in own.values()])
    assert (masks - 1).abs().mean() > 0.02
    assert sum(prepared.result.missed) < 0.95 * sum(prepared.result.missed_by_sum)
    assert request.method in METHODS


def test_the_file_says_what_the_masked_model_said(model, small, learned):
    """The exported LoRA misses as much as was measured while learning, and ranks only add up."""
    request, prepared, _ = learned
    merged = combine(small, request, prepared.layers).adapter
    wished = find_prompts(small, 2, PROMPTS)
    passes = list_passes(weigh_adapters(small, request), wished, False)
    examples = record_examples(ForwardPasses(model, small, request, passes, 2, 0))
    assert measure_missed(model, examples, merged) == pytest.approx(
        prepared.result.missed, rel=1e-3
    )
    assert set(merged.ranks.values()) == {4}


def test_progress_is_told_without_a_gap(learned):
    _, _, events = learned
    assert all(isinstance(event, Progress) for event in events)
    tasks = [event.task for event in events]
    assert {"asking adapter 1", "asking adapter 2", "learning masks"} == set(tasks)
    assert [e.done for e in events if e.task == "learning masks"] == list(range(1, 13))
    assert all(event.done <= event.total for event in events)


@pytest.mark.parametrize("method", LEARNED)
def test_learning_does_not_depend_on_order_or_on_how_an_update_is_split(model, small, method):
    options = {**QUICK, "updates": 3}
    request = MergeRequest([1.0, 0.8], method, options)

    def merge(some, weights, prompts):
        request = MergeRequest(weights, method, options)
        return combine(some, request, prepare_merge(model, some, request, prompts).layers).adapter

    merged = merge(small, [1.0, 0.8], PROMPTS)
    turned = merge(small[::-1], [0.8, 1.0], PROMPTS[::-1])
    rewritten = merge([rewrite(a, 5) for a in small], [1.0, 0.8], PROMPTS)
    plain = combine(small, MergeRequest(request.weights)).adapter
    moved = max((dense(merged, n) - dense(plain, n)).abs().max() for n in merged.layers)
    assert moved > 1e-2
    assert_same(turned, merged, atol=0.1 * float(moved))
    assert_same(rewritten, merged, atol=0.1 * float(moved))


def test_masks_that_help_nothing_stay_1(model, small):
    same = [small[0], Adapter({n: Layer(x.down, 0 * x.up) for n, x in small[1].layers.items()})]
    request = MergeRequest([1.0, 1.0], "ziprank", {**QUICK, "updates": 2, "learning_rate": 1.0})
    prepared = prepare_merge(model, same, request, (PROMPTS[0], PROMPTS[0]))
    # Nothing is missed by the sum: whatever is learned is worse.
    assert prepared.result.missed_by_sum[0] < 1e-6
    assert_same(combine(same, request, prepared.layers).adapter, small[0])


def test_text_encoders_are_added_up_unmasked(model):
    some = [
        make_adapter(model, seed, blocks=BLOCK, target_modules="attention", text=True)
        for seed in (7, 8)
    ]
    request = MergeRequest([1.0, 1.0], "ziprank", {**QUICK, "updates": 1})
    prepared = prepare_merge(model, some, request, PROMPTS)
    merged = combine(some, request, prepared.layers).adapter
    plain = combine(some, MergeRequest([1.0, 1.0])).adapter
    text = [name for name in merged.layers if name.startswith("text_encoder")]
    assert text
    for name in text:
        torch.testing.assert_close(dense(merged, name), dense(plain, name), rtol=0, atol=1e-5)


def test_saving_memory_gives_the_same_gradients(model, small):
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    said = model.encode_prompts(["a dog"])
    name = f"unet.{BLOCK}.transformer_blocks.0.attn1.to_q"
    layers = {name: model.layers_of(small[0])[name]}

    def descend(saving):
        scale, calls = torch.ones(1, requires_grad=True), []

        def change(layer, rows):
            calls.append(layer)
            return scale * rows.square()

        with add_changes(layers, {name: change}), saving():
            predict(model, noisy, torch.tensor([500]), said).square().sum().backward()
        return scale.grad, len(calls)

    (kept, once), (recomputed, twice) = descend(nullcontext), descend(model.recompute_activations)
    assert (once, twice) == (1, 2)
    assert kept.abs() > 0
    torch.testing.assert_close(recomputed, kept)


# What cannot be done.


@pytest.mark.parametrize("method", PREPARERS)
def test_every_method_that_asks_the_base_can_be_prepared(method):
    assert METHODS[method].needs in {"activations", "training"}


def test_every_method_that_needs_it_is_prepared_here():
    asking = {n for n, m in METHODS.items() if m.needs in {"activations", "training"}}
    assert asking == set(PREPARERS)


def test_a_method_of_factors_needs_nothing(model, pair):
    assert prepare_merge(model, pair, MergeRequest([1.0, 1.0])) is None


@pytest.mark.parametrize("method", PREPARERS)
def test_layers_of_one_alone_need_nothing(model, method):
    apart = [
        make_adapter(model, 1, blocks="mid_block", target_modules="attention"),
        make_adapter(model, 2, blocks=BLOCK, target_modules="attention"),
    ]
    request = MergeRequest([1.0, 1.0], method, QUICK)
    prepared = prepare_merge(model, apart, request, PROMPTS)
    assert prepared.layers == {}
    merged = combine(apart, request, prepared.layers).adapter
    assert_same(merged, combine(apart, MergeRequest([1.0, 1.0])).adapter)


def test_numbers_must_match(model, pair):
    with pytest.raises(ConfigError, match="2 adapters need as many weights, got 1"):
        prepare_merge(model, pair, MergeRequest([1.0], "ssr"))


def test_an_adapter_of_another_base_is_refused(model, pair):
    other = replace(
        pair[1],
        metadata={"dreamloom.base": "sdxl", "dreamloom.base_fingerprint": "other"},
    )
    with pytest.raises(AdapterError, match=r"Adapter 2 was made for the base model sdxl .*not for"):
        prepare_merge(model, [pair[0], other], MergeRequest([1.0, 1.0], "ssr"), PROMPTS)
    strange = Adapter({"unet.nowhere": next(iter(pair[1].layers.values()))})
    with pytest.raises(AdapterError, match=r"does not fit .* unet\.nowhere"):
        prepare_merge(model, [pair[0], strange], MergeRequest([1.0, 1.0], "ssr", QUICK), PROMPTS)


@pytest.mark.parametrize("method", ["ssr", "ziprank"])
def test_numbers_out_of_range_are_told_and_the_base_stays(model, pair, method):
    before = answer(model)
    with pytest.raises(TrainingError, match=r"wore adapter 2, .* not finite.*Lower the weight"):
        prepare_merge(model, pair, MergeRequest([1.0, 1e38], method, QUICK), PROMPTS)
    assert torch.equal(answer(model), before)


def test_hooks_go_when_a_block_fails(model, pair):
    layers = model.layers_of(pair[0])
    gathered = []
    change = {next(iter(layers)): lambda layer, rows: 1.0}
    hooks = (
        hook_activations(layers, lambda *told: gathered.append(told)),
        add_changes(layers, change),
    )
    with pytest.raises(RuntimeError, match="stop"), hooks[0], hooks[1]:
        raise RuntimeError("stop")
    answer(model)
    assert gathered == []


@pytest.mark.parametrize("method", PREPARERS)
def test_a_half_precision_base_says_nearly_the_same(tiny_sdxl, model, small, method):
    half = load_model(str(tiny_sdxl), pick_runtime("cpu", "bf16"))
    options = {**QUICK, "updates": 1} if method in LEARNED else QUICK
    request = MergeRequest([1.0, 1.0], method, options)
    exact, rough = (
        combine(small, request, prepare_merge(m, small, request, PROMPTS).layers).adapter
        for m in (model, half)
    )
    for name in exact.layers:
        gap = (dense(rough, name) - dense(exact, name)).norm() / dense(exact, name).norm()
        assert gap < 0.15
