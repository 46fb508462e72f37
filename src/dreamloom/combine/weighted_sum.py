"""The exact weighted sum of adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dreamloom.adapters import Adapter, Layer, gather_words, refuse_other_kinds


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Add weighted updates exactly: the merged file draws what the parts draw, worn together.

    The factors are stacked, not added: with up = [w1 up1, w2 up2] and down = [down1; down2] the
    product is w1 ΔW1 + w2 ΔW2. Adding factors instead would mix in cross terms up1 down2. Ranks
    add up; a layer that only some adapters change keeps their rank. A weight of 0 leaves its
    adapter out. New words are taken along as they are.

    Args:
        adapters: One or more LoRAs of the same base model.
        weights: One finite weight per adapter; negative ones subtract.

    Raises:
        ValueError: If the numbers of adapters and weights differ, there is none, a weight is not
            finite, or two updates of one layer differ in shape.
        AdapterError: If one is no LoRA, or two teach one word differently.

    Source:
        Block matrix product; the same identity as PEFT's "cat" combination.

    Example:
        >>> a = Adapter({"unet.x": Layer(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))})
        >>> b = Adapter({"unet.x": Layer(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0]]))})
        >>> weighted_sum([a, b], [1.0, 0.5]).layers["unet.x"].update()
        tensor([[2.0000, 1.5000]])
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not all(torch.isfinite(torch.tensor(weight)) for weight in weights):
        raise ValueError(f"weights must be finite numbers, got {list(weights)}")
    for number, adapter in enumerate(adapters, 1):
        refuse_other_kinds(adapter, f"Adapter {number}", "can be merged")
    names = sorted({name for adapter in adapters for name in adapter.layers})
    layers = {}
    for name in names:
        parts = [
            (adapter.layers[name], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.layers and weight != 0
        ]
        if parts:
            layers[name] = _stack(name, parts)
    worn = [
        adapter.tokens for adapter, weight in zip(adapters, weights, strict=True) if weight != 0
    ]
    return Adapter(layers, tokens=gather_words(worn))


def _stack(name: str, parts: Sequence[tuple[Layer, float]]) -> Layer:
    shapes = {(layer.up.shape[0], *layer.down.shape[1:]) for layer, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"the updates of {name} differ in shape: {sorted(shapes)}")
    return Layer(
        down=torch.cat([layer.down for layer, _ in parts], dim=0),
        up=torch.cat([layer.up * weight for layer, weight in parts], dim=1),
    )
