"""The lean form of a LoRA computes what PEFT computes, and leaves nothing behind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.models.attention import AttentionMaps
from dreamloom.models.base import AdapterSpec, Framing
from dreamloom.models.families import load_model
from dreamloom.models.lowrank import InputCache, SharedInput
from dreamloom.models.packed_linear import (
    Order,
    PackedLinear,
    order_layers,
    pick_order,
    restore_forward,
)
from dreamloom.models.peft_adapter import AttachedAdapter
from dreamloom.models.quantized_layers import QuantizedLinear
from dreamloom.models.sdxl import SDXLModel

INTELS = "dreamloom.models.matrix_products.is_processor_intels"
SPEC = AdapterSpec(
    rank=3, alpha=2.0, target_modules="all", seed=0, text_encoders=True, ranks={"to_k": 5}
)
PROMPTS = ["a photo of a person", "a dog in the snow"]


@pytest.fixture
def tiny(tiny_sdxl: Path) -> Iterator[SDXLModel]:
    """A model of one test alone: some change its precision."""
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    yield model
    model.detach_adapter()


def components(model: SDXLModel) -> dict[str, nn.Module]:
    return {name: model._pipeline.components[name] for name in model._components}


def attach(model: SDXLModel, spec: AdapterSpec, dtype: torch.dtype) -> AttachedAdapter:
    """Put an adapter with random weights on components of one precision, in PEFT's form."""
    attached = AttachedAdapter(components(model), spec)
    for form in attached._fused:
        form.remove()
    attached._fused.clear()
    rng = torch.Generator().manual_seed(1)
    for owner in components(model).values():
        owner.to(dtype)
    for weight in weights_of(attached):
        weight.data += 0.1 * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    return attached


def weights_of(attached: AttachedAdapter) -> list[nn.Parameter]:
    return [weight for group in attached.weights for weight in group.parameters]


def run(model: SDXLModel, attached: AttachedAdapter, side: int = 8) -> list[Tensor]:
    """Predict for two prompts; return what came out, and every weight's gradient."""
    dtype = model._pipeline.unet.dtype
    model.runtime = Runtime(torch.device("cpu"), dtype)
    model._attached = attached
    noisy = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(5)).to(dtype)
    for weight in weights_of(attached):
        weight.grad = None
    conditioning = model.encode_prompts(PROMPTS)
    at = torch.tensor([100, 800])
    out = model.predict(noisy, at, conditioning, [Framing((64, 64))] * 2)
    out.float().square().mean().backward() if dtype != torch.float64 else (
        out.square().mean().backward()
    )
    gradients = [weight.grad for weight in weights_of(attached)]
    assert all(one is not None for one in gradients)
    return [out.detach(), *gradients]


def far(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference, relative to the tensor that it is in."""
    pairs = zip(first, second, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def flat(results: list[Tensor]) -> list[Tensor]:
    """All gradients as one: some are nothing but rounding in float32."""
    return [results[0], torch.cat([one.flatten() for one in results[1:]])]


@pytest.mark.parametrize(
    ("target_modules", "gradient_checkpointing", "one_node"),  # each two of them together once
    [
        ("attention", False, False),
        ("attention", True, True),
        ("all", False, True),
        ("all", True, False),
    ],
)
def test_forward_and_gradients_are_pefts(
    tiny: SDXLModel,
    target_modules: Any,
    gradient_checkpointing: bool,
    one_node: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor an attention is one node of autograd, on a GPU several."""
    if not one_node:
        monkeypatch.setattr(AttentionMaps, "is_one_node", False)
    attached = attach(tiny, replace(SPEC, target_modules=target_modules), torch.float64)
    theirs = run(tiny, attached)
    attached._fuse()
    if gradient_checkpointing:
        tiny._pipeline.unet.enable_gradient_checkpointing()
        tiny._pipeline.unet.train()
    ours = run(tiny, attached)
    assert far(ours, theirs) < 1e-10
    # Nothing of another pass is left behind.
    run(tiny, attached, side=16)
    assert far(run(tiny, attached), theirs) < 1e-10


def test_on_a_processor_every_adapted_attention_is_one_node(tiny: SDXLModel) -> None:
    groups = tiny.attach_adapter(replace(SPEC, target_modules="attention"))
    assert groups
    kinds = {"unet": "Attention", "text_encoder": "CLIPAttention"}
    for part, kind in kinds.items():
        modules = [m for m in components(tiny)[part].modules() if type(m).__name__ == kind]
        lean = [one for one in modules if "forward" in vars(one)]
        # SDXL does not read the first encoder's last layer.
        assert len(lean) == len(modules) - (part == "text_encoder")
        first = lean[0].to_q if part == "unet" else lean[0].q_proj
        x = torch.ones(1, 4, first.in_features, requires_grad=True)
        out = lean[0](x) if part == "unet" else lean[0](x, is_causal=True)[0]
        assert type(out.grad_fn).__name__ == "_AttendBackward"


def test_feed_forward_layers_that_never_learn_are_one_node(tiny: SDXLModel) -> None:
    layers = [m for m in tiny._pipeline.unet.modules() if type(m).__name__ == "FeedForward"]
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, layers[0].net[2].out_features, generator=rng)

    def run_layer() -> list[Tensor]:
        given = x.clone().requires_grad_()
        out = layers[0](given)
        out.square().sum().backward()
        assert given.grad is not None
        return [out.detach(), given.grad]

    before = run_layer()
    tiny.attach_adapter(replace(SPEC, target_modules="attention"))
    assert all("forward" in vars(layer) for layer in layers)
    assert far(run_layer(), before) < 1e-5
    tiny.detach_adapter()
    assert not any("forward" in vars(layer) for layer in layers)
    # Beyond the attention they learn themselves.
    tiny.attach_adapter(replace(SPEC, target_modules="linear"))
    assert not any("forward" in vars(layer) for layer in layers)


def test_frozen_text_encoders_give_an_input_without_gradient(tiny: SDXLModel) -> None:
    attached = attach(tiny, replace(SPEC, text_encoders=False), torch.float64)
    theirs = run(tiny, attached)
    attached._fuse()
    assert far(run(tiny, attached), theirs) < 1e-10


class Counter(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return op(*args, **(kwargs or {}))


def test_fewer_operations_are_called(tiny: SDXLModel) -> None:
    attached = attach(tiny, replace(SPEC, target_modules="attention"), torch.float32)
    with Counter() as theirs:
        run(tiny, attached)
    attached._fuse()
    run(tiny, attached)
    with Counter() as ours:
        run(tiny, attached)
    assert ours.count < 0.8 * theirs.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_pefts(
    tiny: SDXLModel, dtype: torch.dtype
) -> None:
    """PEFT computes the update in float32 there; the lean form in the base's precision."""
    attached = attach(tiny, replace(SPEC, target_modules="attention"), torch.float32)
    truth = run(tiny, attached)
    for owner in components(tiny).values():
        for name, weight in owner.named_parameters():
            if ".lora_" not in name:
                weight.data = weight.data.to(dtype)
        for buffer in owner.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)
    theirs = run(tiny, attached)
    attached._fuse()
    ours = run(tiny, attached)
    assert all(weight.dtype == torch.float32 for weight in weights_of(attached))
    assert all(one.dtype == torch.float32 for one in ours[1:])
    assert far(flat(ours), flat(truth)) < 1.5 * far(flat(theirs), flat(truth))
    before = ours[0].clone()
    with torch.no_grad():
        for weight in weights_of(attached):
            weight.mul_(1.5)
    assert not torch.equal(run(tiny, attached)[0], before)


def test_detaching_gives_every_weight_its_own_memory(tiny: SDXLModel) -> None:
    before = {
        f"{part}.{name}": weight.detach().clone()
        for part, owner in components(tiny).items()
        for name, weight in owner.named_parameters()
    }
    attached = AttachedAdapter(components(tiny), SPEC)
    run(tiny, attached)
    attached.detach()
    after = {
        f"{part}.{name}": weight
        for part, owner in components(tiny).items()
        for name, weight in owner.named_parameters()
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len({one.untyped_storage().data_ptr() for one in after.values()}) == len(after)
    modules = [m for owner in components(tiny).values() for m in owner.modules()]
    assert not any("forward" in vars(module) for module in modules)
    assert not any(module._forward_pre_hooks for module in modules)


def test_a_component_that_was_moved_keeps_learning(tiny: SDXLModel) -> None:
    """Moving gives each weight memory of its own: what was one piece must become one again."""
    attached = AttachedAdapter(components(tiny), replace(SPEC, target_modules="attention"))
    with torch.no_grad():
        for weight in weights_of(attached):
            weight.add_(0.1)
    before = flat(run(tiny, attached))
    for owner in components(tiny).values():
        for weight in owner.parameters():
            weight.data = weight.data.clone()
    assert far(flat(run(tiny, attached)), before) < 1e-6
    with torch.no_grad():
        for weight in weights_of(attached):
            weight.add_(0.1)
    moved = flat(run(tiny, attached))
    assert far(moved[:1], before[:1]) > 1e-4
    for form in attached._fused:
        form.remove()
    attached._fused.clear()
    assert far(flat(run(tiny, attached)), moved) < 1e-4


# ------------------------------------------------------------------ pieces


def test_what_is_computed_together_is_handed_out_once() -> None:
    calls: list[int] = []

    def triple(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return x, 2 * x, 3 * x

    shared = SharedInput(triple)
    x, y = torch.ones(1), torch.ones(1)
    assert [float(shared.take(n, x)) for n in range(3)] == [1, 2, 3]
    assert [float(shared.take(n, x)) for n in range(3)] == [1, 2, 3]
    assert len(calls) == 2
    assert float(shared.take(0, x)) == 1
    # Another input with equal values is another input.
    assert shared.take(1, y) is None
    assert [float(shared.take(n, y)) for n in range(3)] == [1, 2, 3]


def test_what_frozen_weights_make_of_the_same_input_is_computed_once() -> None:
    calls: list[int] = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    memory, x = InputCache(), torch.ones(3)
    assert memory.find(x, double) is None
    for _ in range(3):
        found = memory.find(x, double)
        assert found is not None
        assert torch.equal(found, 2 * x)
    assert len(calls) == 1
    x.add_(1)
    assert memory.find(x, double) is None
    assert memory.find(torch.ones(3, requires_grad=True), double) is None
    for _ in range(5):
        assert memory.find(torch.ones(3), double) is None


def test_prompts_that_come_again_give_the_same_prediction(tiny: SDXLModel) -> None:
    attached = attach(
        tiny, replace(SPEC, target_modules="attention", text_encoders=False), torch.float64
    )
    theirs = run(tiny, attached)
    attached._fuse()
    known = tiny.encode_prompts(PROMPTS)
    tiny.encode_prompts = lambda prompts: known  # type: ignore[method-assign]
    for _ in range(4):
        assert far(run(tiny, attached), theirs) < 1e-10


@pytest.mark.parametrize("order", ["onednn", "turned", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_whose_weights_lie_otherwise_computes_the_same(
    order: Order, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INTELS, lambda: False)
    layer = nn.Linear(40, 24, bias=bias)
    layer.requires_grad_(False)
    x = torch.randn(2, 5, 40, requires_grad=True)
    layer(x).square().sum().backward()
    expected, gradient = layer(x).detach(), x.grad
    x.grad = None
    ordered = order_layers([layer], order)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer(x).detach(), expected)
    torch.testing.assert_close(x.grad, gradient)
    restore_forward(ordered)
    assert "forward" not in vars(layer)
    plain = PackedLinear(layer.weight, layer.bias, "plain")
    assert torch.equal(plain.apply(x[0]), nn.functional.linear(x[0], layer.weight, layer.bias))


def test_only_small_float32_models_on_the_processor_get_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for is_intels, small, large in ((True, "turned", "plain"), (False, "packed", "onednn")):
        with monkeypatch.context() as patch:
            patch.setattr(INTELS, lambda x=is_intels: x)
            assert pick_order(model) == small
            assert pick_order(nn.Sequential(nn.Linear(8, 8)).double()) == "plain"
            patch.setattr("dreamloom.models.packed_linear.MOST_COPIED_BYTES", 255)
            assert pick_order(model) == large


def test_what_is_large_in_convolutions_or_in_fewer_bits_keeps_one_copy_as_well(monkeypatch):
    """Of SDXL with linear layers in bf16, copies of its convolutions took 4 GiB."""
    convolutions = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(8, 8, 3))
    stored = nn.Sequential(nn.Linear(2, 2), nn.Linear(64, 64)).requires_grad_(False)
    stored[1] = QuantizedLinear(stored[1], "bf16")
    for model in (convolutions, stored):
        assert pick_order(model) in {"turned", "packed"}
    monkeypatch.setattr("dreamloom.models.packed_linear.MOST_COPIED_BYTES", 1024)
    for model in (convolutions, stored):
        assert pick_order(model) in {"plain", "onednn"}


def test_trained_text_is_encoded_as_the_pipeline_does(tiny: SDXLModel) -> None:
    tiny.attach_adapter(replace(SPEC, tokens={"<me>": "person"}))
    prompts = ["a photo of <me>", "a dog in the snow " * 15]
    for _ in range(2):
        ours = tiny.encode_prompts(prompts)
        assert ours.tokens.requires_grad
        tokens, _, pooled, _ = tiny._pipeline.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
        torch.testing.assert_close(ours.tokens, tokens, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the compiler takes a minute for each case
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradient_checkpointing", ["none", "full"])
def test_compiled_blocks_compute_the_same(tiny: SDXLModel, gradient_checkpointing: Any) -> None:
    before = weights_by_name(tiny)
    spec = replace(SPEC, target_modules="attention", text_encoders=False)
    plain, compiled = (
        run_compiled(tiny, spec, gradient_checkpointing, each) for each in (False, True)
    )
    for one, other in zip(plain, compiled, strict=True):
        assert far(other, one) < 1e-4
    after = weights_by_name(tiny)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(m._compiled_call_impl for m in tiny._pipeline.unet.modules())


def run_compiled(
    tiny: SDXLModel, spec: AdapterSpec, gradient_checkpointing: Any, compiled: bool
) -> list[list[Tensor]]:
    """Run an adapter with random weights three times, and once switched off."""
    groups = tiny.attach_adapter(spec, gradient_checkpointing, compiled)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (w for group in groups for w in group.parameters):
            weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
    assert tiny._attached is not None
    known = tiny.encode_prompts(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        if not spec.text_encoders:
            patch.setattr(tiny, "encode_prompts", lambda _, known=known: known)
        results = [flat(run(tiny, tiny._attached)) for _ in range(3)]
        with tiny.disable_adapter(), torch.no_grad():
            known = tiny.encode_prompts(PROMPTS)
            out = tiny.predict(
                torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), known, [Framing((64, 64))] * 2
            )
    tiny.detach_adapter()
    return [*results, [out]]


def weights_by_name(model: SDXLModel) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, owner in components(model).items()
        for name, weight in owner.named_parameters()
    }
