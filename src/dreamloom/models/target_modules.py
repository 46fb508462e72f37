"""Target modules: which layers an adapter changes, and each one's rank and lora_alpha, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import AdapterKind
from dreamloom.lora.patterns import B_LORA_BLOCKS, matches
from dreamloom.models.base import AdapterSpec, TargetModules

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Few tools read adapters on these, and they shape every picture rather than one subject.
_LEFT_ALONE = ("conv_in", "conv_out", "time_embedding", "add_embedding")
# The text encoders' layers under other names; not the projection of the pooled text.
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_TEXT_LAYERS = (*_TEXT_ATTENTION, "fc1", "fc2")


def choose_layers(components: Mapping[str, nn.Module], spec: AdapterSpec) -> dict[str, list[str]]:
    """List the layers that an adapter changes, by component, from the model itself.

    Args:
        components: The denoiser under ``unet`` and the text encoders under their names.
        spec: Reach, kind, blocks and whether the text encoders change.

    Raises:
        ConfigError: If a pattern of blocks matches no layer, or a rank fits none.
    """
    unet = list_layers(components["unet"], spec.target_modules, spec.kind)
    if spec.blocks != "all":
        unet = _choose_blocks(unet, spec)
    chosen = {"unet": unet}
    if spec.text_encoders:
        chosen |= {
            component: _list_text_layers(component, module, spec.target_modules)
            for component, module in components.items()
            if component.startswith("text_encoder")
        }
    _refuse_rank(components, chosen, spec)
    return chosen


def _refuse_rank(
    components: Mapping[str, nn.Module], chosen: Mapping[str, list[str]], spec: AdapterSpec
) -> None:
    """Refuse ranks that no layer's update can have: they cost memory and change nothing."""
    if spec.kind == "oft":
        return  # its rank counts blocks
    layers: list[Any] = [
        components[component].get_submodule(name)
        for component, names in chosen.items()
        for name in names
    ]
    most: int = max((min(one.weight.flatten(1).shape) for one in layers), default=0)
    for rank in (spec.rank, *spec.ranks.values()):
        if rank > most > 0:
            raise ConfigError(
                f"A rank of {rank} is more than any layer of this base model can hold.",
                f"Choose at most {most}; 4 to 64 is usual.",
            )


def list_layers(
    unet: nn.Module, target_modules: TargetModules, kind: AdapterKind = "lora"
) -> list[str]:
    """List the names of the denoiser's layers within reach of an adapter of this kind."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    if target_modules == "all":
        kinds = (nn.Linear, nn.Conv2d)
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, kinds)
        and name.split(".")[0] not in _LEFT_ALONE
        # PEFT's OFT rotates the patches of a wide convolution and adds them up where they overlap:
        # untrained, it would change the picture.
        and not (kind == "oft" and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
    ]
    if target_modules == "attention":
        names = [name for name in names if name.endswith(_ATTENTION)]
    return names


def _list_text_layers(
    component: str, encoder: nn.Module, target_modules: TargetModules
) -> list[str]:
    within = _TEXT_ATTENTION if target_modules == "attention" else _TEXT_LAYERS
    names = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in within
    ]
    if component == "text_encoder":
        # SDXL reads this encoder before its last layer, which so would learn nothing.
        numbers = {name: int(name.partition("layers.")[2].partition(".")[0]) for name in names}
        last = max(numbers.values())
        names = [name for name in names if numbers[name] < last]
    return names


def _choose_blocks(names: list[str], spec: AdapterSpec) -> list[str]:
    wanted = [part.strip() for part in spec.blocks.split(",") if part.strip()]
    chosen: set[str] = set()
    for block in wanted:
        found = [name for name in names if matches(B_LORA_BLOCKS.get(block, block), f"unet.{name}")]
        if not found:
            within = sorted({".".join(n.split(".")[:4]) for n in names if ".attentions." in n})
            problem = f"The block {block!r} matches no layer that may change."
            if block in B_LORA_BLOCKS:
                problem = (
                    f"The block {block!r} is {B_LORA_BLOCKS[block]} in SDXL, which this base model "
                    "lacks."
                )
            raise ConfigError(
                problem,
                f"Within reach {spec.target_modules} there are, among others: {', '.join(within)}.",
            )
        chosen.update(found)
    if not chosen:
        raise ConfigError(
            f"The blocks {spec.blocks!r} name nothing.", "Write all, content, style or patterns."
        )
    return [name for name in names if name in chosen]


def assign_by_pattern(
    by_pattern: Mapping[str, float], names: Iterable[str], setting: str
) -> dict[str, float]:
    """Give each layer whose name matches a pattern that pattern's value; the last match counts.

    Args:
        by_pattern: Values by pattern.
        names: Full names of all layers that change.
        setting: What the user calls the values, for the message.

    Raises:
        ConfigError: If a pattern matches no layer.
    """
    known = list(names)
    assigned: dict[str, float] = {}
    for pattern, value in by_pattern.items():
        found = [name for name in known if matches(pattern, name)]
        if not found:
            raise ConfigError(
                f"The pattern {pattern!r} of {setting} matches no layer that changes.",
                f"Layers have names such as {known[0]}; write whole parts of them.",
            )
        assigned |= dict.fromkeys(found, value)
    return assigned
