"""A frozen base in 8 or 4 bits: nearly the same model, and adapters that fit the whole one."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.memory.tensor_counter import MemoryCounter
from dreamloom.models import quantized_layers
from dreamloom.models.base import AdapterSpec, Framing, MemoryOptions, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.offload import CpuOffload
from dreamloom.models.quantization import QUANTIZATIONS, Quantization, QuantizedTensor, quantize
from dreamloom.models.quantized_layers import QuantizedLinear, quantize_linears
from dreamloom.models.sdxl import SDXLModel
from looks import psnr_db

FEWER_BITS = [kind for kind in QUANTIZATIONS if kind != "whole"]
SPEC = AdapterSpec(rank=2, alpha=2.0, target_modules="attention", seed=0, text_encoders=True)
FAST = Sampler("ddim", steps=2, guidance=3.0)


def load(
    folder: Path, memory_options: MemoryOptions, dtype: torch.dtype = torch.float32
) -> SDXLModel:
    model = load_model(str(folder), Runtime(torch.device("cpu"), dtype), memory_options)
    assert isinstance(model, SDXLModel)
    return model


def layer(inputs: int = 96, outputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FEWER_BITS)
def test_a_stored_layer_computes_with_the_weight_that_it_stands_for(kind: Quantization, bias: bool):
    whole = layer(bias=bias)
    quantized = QuantizedLinear(whole, kind)
    whole.weight.copy_(quantized.weight)
    inputs = [torch.randn(3, 5, 96, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    outputs = [whole(inputs[0]), quantized(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("kind", FEWER_BITS)
def test_a_stored_layer_keeps_its_codes_when_the_model_is_cast(kind: Quantization):
    quantized = QuantizedLinear(layer(), kind)
    codes = quantized.codes.clone()
    quantized.to(torch.bfloat16)
    assert torch.equal(quantized.codes.view(torch.uint8), codes.view(torch.uint8))
    assert quantized.weight.dtype == quantized(torch.zeros(2, 96, dtype=torch.bfloat16)).dtype
    assert quantized.weight.dtype == torch.bfloat16


def test_nothing_of_the_whole_weight_is_kept_for_the_backward_pass():
    rows = 4
    for keeps, made in ((True, layer(256, 256, bias=False)), (False, None)):
        linear = made or QuantizedLinear(layer(256, 256, bias=False), "int8")
        inputs = torch.randn(rows, 256, requires_grad=True)
        with MemoryCounter() as counter:
            output = linear(inputs) if not keeps else inputs @ linear.weight.float().mul(1.0)
        assert output.requires_grad
        assert (counter.held_bytes > 256 * 256 * 4) == keeps


def test_each_whole_weight_goes_before_the_next_layer_is_stored(monkeypatch):
    """While all of them were held until the last was stored, SDXL took 2.6 GiB more to load."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).requires_grad_(False)
    whole = [weakref.ref(layer.weight) for layer in module]
    held: list[int] = []

    def look(weight: Tensor, kind: Quantization) -> QuantizedTensor:
        held.append(sum(one() is not None for one in whole))
        return quantize(weight, kind)

    monkeypatch.setattr(quantized_layers, "quantize", look)
    assert quantize_linears(module, "int8") == 3
    assert held == [3, 2, 1]


def test_small_layers_that_all_depends_on_stay_whole(tiny_sdxl: Path):
    model = load(tiny_sdxl, MemoryOptions("nf4"))
    names = {n for n, m in model._pipeline.unet.named_modules() if isinstance(m, QuantizedLinear)}
    assert any(name.endswith("attn1.to_q") for name in names)
    assert not any("time_embedding" in name or "add_embedding" in name for name in names)
    kinds = {
        m.kind for m in model._pipeline.text_encoder.modules() if isinstance(m, QuantizedLinear)
    }
    assert kinds == {"int8"}
    assert quantize_linears(model._pipeline.unet, "whole") == 0


# By default the coarsest; what a layer of each kind computes is tested above.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(one, marks=() if one == "nf4" else pytest.mark.slow) for one in FEWER_BITS],
)
def test_an_adapter_trained_on_a_stored_base_fits_the_whole_one(
    tiny_sdxl: Path, kind: Quantization
):
    model = load(tiny_sdxl, MemoryOptions(kind))
    side = model.advice.resolution_px
    parameters = [p for one in model.attach_adapter(SPEC, "low") for p in one.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    noisy, at = torch.randn(1, 4, side // 8, side // 8), torch.tensor([400])
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        prediction = model.predict(
            noisy, at, model.encode_prompts(["a dog"]), [Framing((side, side))]
        )
        loss = (prediction - noisy).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapter = model.read_adapter()
    model.detach_adapter()
    whole = load(tiny_sdxl, MemoryOptions())
    shots = [Shot("a dog", 0)]
    plain = whole.sample(shots, FAST)[0]
    with whole.apply_adapters([(adapter, 1.0)]):
        active = whole.sample(shots, FAST)[0]
    assert psnr_db(plain, active) < 60
    # Applied to the stored base it acts as well, although there is no weight to write into.
    untaught = model.sample(shots, FAST)[0]
    with model.apply_adapters([(adapter, 1.0)]):
        on_stored = model.sample(shots, FAST)[0]
    assert psnr_db(untaught, on_stored) < 60
    assert psnr_db(untaught, model.sample(shots, FAST)[0]) == float("inf")


def test_an_8_bit_base_draws_nearly_what_the_whole_one_draws(tiny_sdxl: Path):
    shots = [Shot("a dog", 0), Shot("a photo of a person", 1)]
    whole = load(tiny_sdxl, MemoryOptions()).sample(shots, FAST)
    quantized = load(tiny_sdxl, MemoryOptions("int8")).sample(shots, FAST)
    assert all(psnr_db(a, b) > 35 for a, b in zip(whole, quantized, strict=True))


def test_parts_that_take_turns_draw_and_train_the_same(tiny_sdxl: Path):
    shots = [Shot("a dog", seed) for seed in range(3)]
    roomy = load(tiny_sdxl, MemoryOptions())
    thrifty = load(tiny_sdxl, MemoryOptions(cpu_offload=True, drawn_at_once=2))
    pairs = zip(
        roomy.sample(shots, FAST, batch=2), thrifty.sample(shots, FAST, batch=8), strict=True
    )
    assert all(psnr_db(a, b) == float("inf") for a, b in pairs)


class Watched(CpuOffload):
    """Notes who lies on the device at each move."""

    together: list[set[str]]

    def move(self, module: nn.Module, device: torch.device) -> None:
        super().move(module, device)
        self.__class__.together.append(set(self._here))


def test_parts_that_take_turns_never_meet(tiny_sdxl: Path):
    Watched.together = []
    loaded = load(tiny_sdxl, MemoryOptions())
    model = SDXLModel(
        loaded._pipeline,
        loaded.identity,
        pick_runtime("cpu"),
        memory_options=MemoryOptions(cpu_offload=True),
        offload=Watched,
    )
    side = model.advice.resolution_px
    model.sample([Shot("a dog", 0)], FAST)
    model.encode_images(torch.zeros(1, 3, side, side))
    model.encode_prompts(["a dog"])
    texts = {"text_encoder", "text_encoder_2"}
    assert all(
        len(here - texts) <= 1 and not (here - texts and here & texts) for here in Watched.together
    )
    # While text is taught, its gradients need the encoders beside the denoiser.
    model.attach_adapter(SPEC)
    encoded = model.encode_prompts(["a dog"])
    model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([3]), encoded, [Framing((side, side))])
    assert model._offload._here == {"unet", *texts}
