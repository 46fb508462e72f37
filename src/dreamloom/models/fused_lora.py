"""Fused LoRA: forward and backward in few operations, for layers that PEFT has put on a model.

PEFT computes x Wᵀ, then x Aᵀ, then (x Aᵀ) Bᵀ, then the sum, each a node of autograd with casts and
looks into dictionaries between them. Here a layer is one node, and the layers of an attention that
read the same input, such as its query, key and value, are one matrix product. The weights are
PEFT's own parameters, so names, order, initialisation and reading are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from dreamloom.models.attention import AttentionMaps, FusedAttention, FusedTextAttention
from dreamloom.models.attention import can_be_fused as attention_can_be_fused
from dreamloom.models.compiled import CompiledBlocks
from dreamloom.models.convolutions import pack_convolutions
from dreamloom.models.feedforward import freeze_linears
from dreamloom.models.lowrank import (
    AdaptedForward,
    InputCache,
    LowRankConvolution,
    LowRankMap,
    ScaledFactors,
    SharedInput,
)
from dreamloom.models.packed_linear import pick_order, restore_forward
from dreamloom.models.rank_masks import MaskedForward, RankMasks

_SHARING = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))


class FusedLora:
    """The adapted layers of one component with fused LoRA, until `remove`.

    The factors of all layers come to lie in one piece of memory. On a half-precision base their
    working copies do, too, and one operation a pass brings them up to date.

    Args:
        owner: The component: a denoiser or a text encoder.
        factors: Its layers with their names.
        compiled: Whether its repeated blocks are compiled when they are first called.
        masks: What is left out of its updates, or None. Layers are then computed one by one.
    """

    def __init__(
        self,
        owner: nn.Module,
        factors: Mapping[str, ScaledFactors],
        compiled: bool = False,
        masks: RankMasks | None = None,
    ) -> None:
        self._is_compiled = compiled
        self._factors, self._masks = factors, masks
        self._blocks: CompiledBlocks | None = None
        self._groups = list(_group(owner, factors))
        self._dtype = next(iter(owner.parameters())).dtype
        self._maps: list[LowRankMap] = []
        self._by_layer: dict[Any, LowRankMap] = {}
        self._attentions: dict[Any, AttentionMaps] = {}
        self._owner = owner
        self._ordered: list[nn.Module] = []
        self._set_up()
        self._hook = owner.register_forward_pre_hook(self._bring_up_to_date)

    @torch.no_grad()
    def _set_up(self) -> None:
        """Move the factors to their place in memory and give all layers their new form."""
        # All down factors, then all up factors: an optimizer tells the two apart, and changes
        # what lies side by side as one.
        downs = [one.down for group in self._groups for one in group]
        ups = [one.up for group in self._groups for one in group]
        weights = [*downs, *ups]
        self._weights = weights
        self._masters = torch.cat([weight.data.flatten() for weight in weights])
        # The same tensor where the types agree.
        self._working = self._masters.to(self._dtype)
        # The compiler sees plain operations alone.
        self._order = "plain" if self._is_compiled else pick_order(self._owner)
        sizes = [weight.numel() for weight in weights]
        for weight, place in zip(weights, self._masters.split(sizes), strict=True):
            weight.data = place.view_as(weight)
        self._places = [weight.data_ptr() for weight in weights]
        pieces = self._working.split(sizes)
        working = [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]
        of_downs, of_ups = iter(working[: len(downs)]), iter(working[len(downs) :])
        for group in self._groups:
            self._fuse_group(group, [*islice(of_downs, len(group))], [*islice(of_ups, len(group))])
        if self._masks is None:
            self._fuse_attentions()
        else:
            for name, one in self._factors.items():
                one.layer.forward = MaskedForward(name, one, self._masks, one.layer.forward)
        if self._order != "plain":
            adapted = {one.base for group in self._groups for one in group}
            others = (one for one in self._owner.modules() if type(one) is nn.Linear)
            frozen = [
                one
                for one in others
                if one not in adapted and not any(w.requires_grad for w in one.parameters())
            ]
            self._ordered = freeze_linears(self._owner, frozen, self._order)
            if self._order != "onednn":
                unadapted = (one for one in self._owner.modules() if one not in adapted)
                self._ordered += pack_convolutions(unadapted)
        if self._is_compiled and hasattr(self._owner, "_repeated_blocks"):
            whole = {one: maps for one, maps in self._attentions.items() if maps.out is not None}
            self._blocks = CompiledBlocks(self._owner, whole)

    def _fuse_group(
        self, group: list[ScaledFactors], downs: list[Tensor], ups: list[Tensor]
    ) -> None:
        if isinstance(group[0].base, nn.Conv2d):
            group[0].layer.forward = LowRankConvolution(group[0], downs[0], ups[0])
            return
        singles = [
            LowRankMap([one], down, [up], self._order if len(group) == 1 else "plain")
            for one, down, up in zip(group, downs, ups, strict=True)
        ]
        if len(group) == 1:
            self._by_layer[group[0].layer] = singles[0]
            group[0].layer.forward = AdaptedForward(singles[0])
            return
        # They lie one after the other, so all of them are one matrix already.
        rows = sum(down.shape[0] for down in downs)
        whole = downs[0].as_strided((rows, downs[0].shape[1]), downs[0].stride())
        joint = LowRankMap(group, whole, ups, self._order)
        self._maps.append(joint)
        self._by_layer[group[0].layer] = joint
        shared = SharedInput(joint)
        for number, one in enumerate(singles):
            group[number].layer.forward = AdaptedForward(one, shared, number)

    def _fuse_attentions(self) -> None:
        """Let attentions do without what SDXL's do not need."""
        for module in self._owner.modules():
            attention: Any = module
            forward: type[FusedAttention | FusedTextAttention] = FusedAttention
            if isinstance(module, CLIPAttention):
                names, forward = ("q_proj", "q_proj", "out_proj", "v_proj"), FusedTextAttention
            elif attention_can_be_fused(module):
                first = "to_k" if attention.is_cross_attention else "to_q"
                names = ("to_q", first, "to_out.0", "to_v")
            else:
                continue
            query, joint, out, last = (attention.get_submodule(name) for name in names)
            maps = [self._by_layer.get(layer) for layer in (query, joint, out)]
            if maps[0] is None or maps[1] is None or maps[1].group[-1].layer is not last:
                continue
            if forward is FusedTextAttention and maps[2] is None:
                continue
            is_cross = joint is not query
            if is_cross:
                # Prompts whose encoders are frozen come again with each update.
                maps[1].cache = InputCache()
            fused = AttentionMaps(maps[1], maps[0] if is_cross else None, maps[2])
            attention.forward = forward(attention, fused)
            self._attentions[attention] = fused

    @torch.no_grad()
    def _bring_up_to_date(self, module: nn.Module, inputs: Any) -> None:
        del module, inputs
        if [weight.data_ptr() for weight in self._weights] != self._places:
            # Somebody moved the component, or changed its layout: each weight on its own.
            self._free()
            self._set_up()
        elif self._working is not self._masters:
            self._working.copy_(self._masters)

    def _free(self) -> None:
        if self._blocks is not None:
            self._blocks.remove()
            self._blocks = None
        for one in self._maps:
            one.part()
        self._maps.clear()
        self._by_layer.clear()
        restore_forward(self._attentions)
        self._attentions.clear()
        restore_forward(self._ordered)
        self._ordered = []

    def remove(self) -> None:
        """Give the layers PEFT's own form back, and the base's weights memory of their own."""
        self._hook.remove()
        for group in self._groups:
            for one in group:
                vars(one.layer).pop("forward", None)
        self._free()


def can_be_fused(base: nn.Module) -> bool:
    """Say whether a layer's update can be fused with it."""
    if isinstance(base, nn.Conv2d):
        plain = base.groups == 1 and base.padding_mode == "zeros"
        return plain and not isinstance(base.padding, str)
    return True


def _group(owner: nn.Module, factors: Mapping[str, ScaledFactors]) -> Iterator[list[ScaledFactors]]:
    """Put layers that read the same input together; the others stay alone."""
    done: set[str] = set()
    for name, one in factors.items():
        if name in done:
            continue
        parent, _, child = name.rpartition(".")
        together: tuple[str, ...] = next((names for names in _SHARING if child in names), ())
        if getattr(owner.get_submodule(parent), "is_cross_attention", False):
            # The query reads the picture, key and value the prompt.
            together = tuple(part for part in together if part != "to_q")
        names = [f"{parent}.{part}" for part in together]
        group = [factors[part] for part in names if part in factors]
        if child in together and len(group) == len(names) and _can_share(group):
            done.update(names)
            yield group
        else:
            yield [one]


def _can_share(group: Sequence[ScaledFactors]) -> bool:
    first: Any = group[0].base
    return all(
        type(one.base) is nn.Linear
        and one.down.shape[1] == group[0].down.shape[1]
        and one.base.weight.dtype == first.weight.dtype
        and (one.base.bias is None) == (first.bias is None)
        for one in group
    )
