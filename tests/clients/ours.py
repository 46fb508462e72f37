"""Adapters of every kind that DreamLoom writes, and what they change of the small base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft import get_peft_model_state_dict as get_state
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from clients.small_base import COMPONENTS, build_components
from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.lora.conversion import change_of_dora
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.sdxl_layers import respell_text, sdxl_layers
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import AdapterPart, Recipe
from dreamloom.models.peftstate import describe_config

FORMATS = ("kohya", "kohya-diffusers", "peft")
Changes = dict[str, Tensor]

_ATTENTION = re.compile(r"unet\..*\.attn\d\.to_(q|k|v|out\.0)")
_LINEAR = re.compile(r"unet\..*\.attentions\..*")
_BLOCKS = re.compile(r"unet\.(.*_blocks|mid_block)\..*")
_TEXT = re.compile(r"text_encoder.*\.encoder\.layers\..*")


def write_ours(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Write every case in every format that holds it, with the changes that it stands for.

    Returns:
        For each case and format the file, or why it is not written.
    """
    written: dict[str, dict[str, str]] = {}
    for case, (adapter, changes) in _make_cases(folder, weights).items():
        save_file(changes, folder / f"{case}.changes")
        dtype = torch.float16 if "half precision" in case else torch.float32
        written[case] = {}
        for format in FORMATS:
            file = folder / f"{case}.{format}.safetensors"
            try:
                if isinstance(adapter, Recipe):
                    carry_out(_with_format(adapter, format), file)
                else:
                    write_adapter(file, adapter, dtype, format)  # type: ignore[arg-type]
                written[case][format] = str(file)
            except AdapterError as error:
                written[case][format] = f"not written: {error.problem}"
    return written


def _with_format(recipe: Recipe, format: str) -> Recipe:
    return Recipe(recipe.parts, format=format)  # type: ignore[arg-type]


def _make_cases(
    folder: Path, weights: Mapping[str, Tensor]
) -> dict[str, tuple[Adapter | Recipe, Changes]]:
    names = {
        "LoRA, attention": _pick(_ATTENTION),
        "LoRA, all linear": _pick(_LINEAR),
        "LoRA, convolutions": _pick(_BLOCKS),
        "LoRA, both text encoders": _pick(_ATTENTION, _TEXT),
        "LoRA, the layers outside the blocks": _pick(re.compile(r"unet\..*")),
        "LoRA, every layer": list(sdxl_layers()),
    }
    made = {case: _draw_lora(weights, picked) for case, picked in names.items()}
    everywhere = _pick(_BLOCKS, _TEXT)
    made["LoRA, unequal ranks"] = _draw_lora(weights, everywhere, ranks=(1, 2, 4, 7))
    made["LoRA, half precision"] = _draw_lora(weights, everywhere)
    made["LoRA, a new word beside"] = _draw_lora(weights, _pick(_ATTENTION), words=True)
    cases: dict[str, tuple[Adapter | Recipe, Changes]] = {}
    for case, adapter in made.items():
        cases[case] = adapter, {name: layer.update() for name, layer in adapter.layers.items()}
    cases["LoRA, merged of two"] = _merge(folder, weights)
    for axis in ("outputs", "inputs"):
        cases[f"DoRA of {axis}"] = _draw_dora(weights, _pick(_BLOCKS), axis)
    cases["DoRA of outputs, text encoders"] = _draw_dora(
        weights, _pick(_ATTENTION, _TEXT), "outputs"
    )
    for case, config in _CONFIGS.items():
        cases[case] = _teach_peft(config, everywhere)
    return cases


def _pick(*patterns: re.Pattern[str]) -> list[str]:
    return [name for name in sdxl_layers() if any(p.fullmatch(name) for p in patterns)]


def _draw_lora(
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    ranks: tuple[int, ...] = (4,),
    seed: int = 1,
    words: bool = False,
) -> Adapter:
    torch.manual_seed(seed)
    layers = {}
    for number, name in enumerate(names):
        shape, rank = weights[name].shape, ranks[number % len(ranks)]
        ones = (1,) * (len(shape) - 2)
        down = torch.randn(rank, *shape[1:]) / math.sqrt(shape[1:].numel())
        layers[name] = Layer(down, 0.3 * torch.randn(shape[0], rank, *ones))
    vectors = {"text_encoder": torch.randn(1, 32), "text_encoder_2": torch.randn(1, 48)}
    return Adapter(layers, tokens={"<me>": vectors} if words else {})


def _draw_dora(
    weights: Mapping[str, Tensor], names: list[str], axis: str
) -> tuple[Adapter, Changes]:
    plain = _draw_lora(weights, names, seed=2)
    magnitudes = {}
    for name in names:
        weight = weights[name]
        kept = 0 if axis == "outputs" else 1
        lengths = torch.linalg.vector_norm(weight.transpose(0, kept).flatten(1), dim=1)
        lengths = lengths * torch.empty_like(lengths).uniform_(0.5, 1.5)
        ones = (1,) * (weight.ndim - 2)
        magnitudes[name] = lengths.view(1, -1, *ones) if ones and axis == "outputs" else lengths
    state = make_dora(plain.layers, magnitudes, axis)  # type: ignore[arg-type]
    changes = {name: change_of_dora(state, name, weights[name]).float() for name in names}
    return Adapter({}, peft=state), changes


def _merge(folder: Path, weights: Mapping[str, Tensor]) -> tuple[Recipe, Changes]:
    changes: Changes = {}
    parts = []
    for number, (weight, names) in enumerate(((0.8, _pick(_BLOCKS)), (-0.5, _pick(_LINEAR)))):
        part = _draw_lora(weights, names, seed=3 + number)
        path = folder / f"part{number}.safetensors"
        write_adapter(path, part)
        parts.append(AdapterPart(path, weight, f"part{number}"))
        for name, layer in part.layers.items():
            changes[name] = changes.get(name, torch.zeros(())) + weight * layer.update()
    return Recipe(tuple(parts)), changes


_CONFIGS: dict[str, PeftConfig] = {
    "LoHa": LoHaConfig(r=3, alpha=2, init_weights=False),
    "LoHa, Tucker cores": LoHaConfig(r=3, alpha=2, init_weights=False, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=3, alpha=2, init_weights=False, decompose_both=True),
    "LoKr, Tucker cores": LoKrConfig(r=3, alpha=2, init_weights=False, use_effective_conv2d=True),
    "OFT": OFTConfig(r=0, oft_block_size=8, init_weights=False),
}


def _teach_peft(config: PeftConfig, names: list[str]) -> tuple[Adapter, Changes]:
    """Let PEFT make an adapter of random tensors, and say what it merges."""
    torch.manual_seed(5)
    tensors, configs, changes = {}, {}, {}
    for component, model in build_components().items():
        inner = [
            name
            for name, _ in model.named_modules()
            if respell_text(f"{component}.{name}") in names and _is_held(config, model, name)
        ]
        config.target_modules = inner
        injected = inject_adapter_in_model(config, model)
        for name, module in injected.named_modules():
            if isinstance(module, BaseTunerLayer):
                _soften(module)
                before = module.get_base_layer().weight.detach().clone()
                module.merge()
                merged = module.get_base_layer().weight.detach()
                changes[respell_text(f"{component}.{name}")] = merged - before
        state = get_state(injected)
        tensors |= {f"{component}.{key}": tensor.detach() for key, tensor in state.items()}
        configs[component] = {**describe_config(config), "target_modules": sorted(inner)}
    kind = config.peft_type.value.lower()
    return Adapter({}, peft=PeftState(kind, tensors, configs)), changes


def _is_held(config: PeftConfig, model: torch.nn.Module, name: str) -> bool:
    """PEFT's OFT wants inputs that its blocks divide."""
    weight = model.get_submodule(name).weight
    return config.peft_type.value != "OFT" or weight[0].numel() % config.oft_block_size == 0


def _soften(module: BaseTunerLayer) -> None:
    """Bring random factors to changes of half the size of the weights."""
    factors = dict(module.named_parameters())
    for name, parameter in factors.items():
        if "oft_" in name:
            parameter.data.normal_(0, 0.1)
            return
    size = module.get_base_layer().weight.norm() / module.get_delta_weight("default").norm()
    scaled = next(f for name, f in factors.items() if "hada_w1_a" in name or "lokr_w1" in name)
    scaled.data.mul_(0.5 * size)


__all__ = ["COMPONENTS", "FORMATS", "write_ours"]
