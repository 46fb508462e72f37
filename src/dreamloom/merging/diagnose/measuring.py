"""Compare two LoRAs: norms, cosine, subspace overlap and rank, by layer, block and kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.merging.factors import Factors, balance, flatten

RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Ranks at which the error of the weighted sum is shown."""

KINDS = (
    *("self q", "self k", "self v", "self out"),
    *("cross q", "cross k", "cross v", "cross out"),
    *("ff in", "ff out", "proj", "conv", "other"),
)
"""What a layer does in its block, in the order of tables."""

_TEXT = ("text_encoder", "text_encoder_2")
_PARTS = re.compile(r"unet\.((?:(?:down|up)_blocks\.\d+|mid_block)(?:\.attentions\.\d+)?)")
# Directions below this share of the strongest are rounding errors of float32 factors.
_NOTHING = 1e-6


@dataclass(frozen=True)
class LayerPair:
    """What two adapters do to one layer, weights counted in.

    ``one`` and ``other`` stand for the first and the second adapter. Where only one of them changes
    the layer, what needs both is None or empty.

    Args:
        layer: The layer's name.
        norms: The Frobenius norms of both updates.
        ranks: How many directions each has.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), from −1 to 1.
        row_cosines: The cosines of the principal angles between the spaces of inputs that they
            look at, descending; 1 is a direction that both share.
        column_cosines: The same for the spaces of outputs that they change.
        row_overlap: How much of each lies in the other's space of inputs: ‖ΔW₁ V₂‖ / ‖ΔW₁‖ and
            ‖ΔW₂ V₁‖ / ‖ΔW₂‖, 0 to 1.
        column_overlap: The same for outputs: ‖U₂ᵀ ΔW₁‖ / ‖ΔW₁‖ and the other way round.
        row_chance: What ``row_overlap`` is on average if the spaces are unrelated: √(k / inputs)
            for the k directions of the other.
        column_chance: The same for outputs.
        values: Singular values of ΔW₁ + ΔW₂, descending.

    Source:
        Björck and Golub, Numerical Methods for Computing Angles Between Linear Subspaces (Math.
        Comp. 27, 1973); the overlap is what NP-LoRA takes out (arXiv:2511.11051, Eq. 10).
    """

    layer: str
    norms: tuple[float, float]
    ranks: tuple[int, int]
    cosine: float | None
    row_cosines: tuple[float, ...]
    column_cosines: tuple[float, ...]
    row_overlap: tuple[float, float] | None
    column_overlap: tuple[float, float] | None
    row_chance: tuple[float, float] | None
    column_chance: tuple[float, float] | None
    values: tuple[float, ...]

    @property
    def shared(self) -> bool:
        """Whether both adapters change the layer."""
        return all(norm > 0 for norm in self.norms)

    def lost(self, rank: int) -> float:
        """The norm of what the sum loses if it is cut to a rank."""
        return math.sqrt(sum(value**2 for value in self.values[rank:]))


@dataclass(frozen=True)
class Together:
    """The same measures over several layers, each layer counted by its energy.

    Args:
        layers: How many layers.
        shared: How many of them both adapters change.
        norms: √Σ‖ΔW‖² of both.
        cosine: Σ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); None if one of them is absent.
        row_overlap: √(Σ‖ΔW₁ V₂‖² / Σ‖ΔW₁‖²) over the shared layers, and the other way round.
        column_overlap: The same for outputs.
        row_chance: What ``row_overlap`` would be by chance.
        column_chance: What ``column_overlap`` would be by chance.
        errors: By rank, ‖sum − cut sum‖ / ‖sum‖, up to the first rank that loses nothing.
    """

    layers: int
    shared: int
    norms: tuple[float, float]
    cosine: float | None
    row_overlap: tuple[float, float] | None
    column_overlap: tuple[float, float] | None
    row_chance: tuple[float, float] | None
    column_chance: tuple[float, float] | None
    errors: Mapping[int, float]

    @property
    def ratio(self) -> float | None:
        """‖ΔW₁‖ / ‖ΔW₂‖; None if one of them is absent."""
        return self.norms[0] / self.norms[1] if all(n > 0 for n in self.norms) else None


@dataclass(frozen=True)
class Diagnosis:
    """What two adapters have to do with each other.

    Args:
        names: What the adapters are called.
        weights: How strongly each goes in; all measures count it.
        pairs: Every layer that one of them changes, in the order of names.
        together: Over all layers.
    """

    names: tuple[str, str]
    weights: tuple[float, float]
    pairs: tuple[LayerPair, ...]
    together: Together

    def as_json(self) -> dict[str, Any]:
        """Write it in plain values, numbers with four digits."""
        return {
            "adapters": list(self.names),
            "weights": list(self.weights),
            "together": _plain(vars(self.together) | {"ratio": self.together.ratio}),
            "blocks": [
                {"block": group.name}
                | _plain(vars(group.together) | {"ratio": group.together.ratio})
                for group in group_layers(self)
            ],
            "layers": [_plain(vars(pair)) for pair in self.pairs],
        }


@dataclass(frozen=True)
class LayerGroup:
    """Some layers and what they have in common.

    Args:
        name: Such as ``up_blocks.0.attentions.1``.
        pairs: The layers.
        together: Their measures.
    """

    name: str
    pairs: tuple[LayerPair, ...]
    together: Together


def diagnose_adapters(
    one: Adapter,
    other: Adapter,
    names: tuple[str, str] = ("A", "B"),
    weights: tuple[float, float] = (1.0, 1.0),
    on_layer: OnProgress = no_progress,
) -> Diagnosis:
    """Measure what two adapters have to do with each other, in every layer and in all together.

    Args:
        one: A LoRA, by custom the subject's.
        other: Another of the same base model, by custom the style's.
        names: What to call them.
        weights: How strongly each would go into a merge; not 0.
        on_layer: Told of progress.

    Raises:
        AdapterError: If one is no LoRA, a layer's updates differ in shape, or neither changes
            anything.
        ValueError: If a weight is 0 or not finite.
    """
    if not all(math.isfinite(weight) and weight != 0 for weight in weights):
        raise ValueError(f"weights must be finite and not 0, got {weights}")
    for adapter, name in zip((one, other), names, strict=True):
        refuse_other_kinds(adapter, name, "can be diagnosed")
    layers = sorted(set(one.layers) | set(other.layers))
    pairs = []
    for done, layer in enumerate(layers):
        both = [
            flatten(adapter.layers[layer]).scaled(weight) if layer in adapter.layers else None
            for adapter, weight in zip((one, other), weights, strict=True)
        ]
        pairs.append(_measure_pair(layer, both[0], both[1]))
        on_layer(done + 1, len(layers))
    if not any(any(pair.norms) for pair in pairs):
        raise AdapterError(f"Neither {names[0]} nor {names[1]} changes anything.", "Name others.")
    return Diagnosis(names, weights, tuple(pairs), measure_together(pairs))


def _measure_pair(layer: str, one: Factors | None, other: Factors | None) -> LayerPair:
    """Measure one layer, in coordinates of the few directions that the factors span."""
    present = [balance(factors) for factors in (one, other) if factors is not None]
    if len({factors.shape for factors in present}) > 1:
        raise AdapterError(
            f"The updates of {layer} differ in shape: {present[0].shape} and {present[1].shape}.",
            "Only adapters of one base model can be compared.",
        )
    small = [_Small(matrix) for matrix in shrink(present)]
    values = torch.linalg.svdvals(torch.stack([side.matrix for side in small]).sum(dim=0))
    shown = tuple(values[values > _NOTHING * values[:1]].tolist())
    if len(small) == 1 or not all(side.rank for side in small):
        found = iter(small)
        a, b = (None if factors is None else next(found) for factors in (one, other))
        norms = a.norm if a else 0.0, b.norm if b else 0.0
        ranks = a.rank if a else 0, b.rank if b else 0
        return LayerPair(layer, norms, ranks, None, (), (), None, None, None, None, shown)
    a, b = small
    outputs, inputs = present[0].shape
    return LayerPair(
        layer=layer,
        norms=(a.norm, b.norm),
        ranks=(a.rank, b.rank),
        cosine=_clamp(float((a.matrix * b.matrix).sum()) / (a.norm * b.norm), -1.0),
        row_cosines=_find_cosines(a.rows, b.rows),
        column_cosines=_find_cosines(a.columns, b.columns),
        row_overlap=(
            _clamp(float((a.matrix @ b.rows).norm()) / a.norm),
            _clamp(float((b.matrix @ a.rows).norm()) / b.norm),
        ),
        column_overlap=(
            _clamp(float((b.columns.T @ a.matrix).norm()) / a.norm),
            _clamp(float((a.columns.T @ b.matrix).norm()) / b.norm),
        ),
        row_chance=(_chance(b.rank, inputs), _chance(a.rank, inputs)),
        column_chance=(_chance(b.rank, outputs), _chance(a.rank, outputs)),
        values=shown,
    )


def shrink(updates: Sequence[Factors]) -> list[Float[Tensor, "k l"]]:
    """Write some updates as small matrices with the same norms, products and angles.

    With [up₁ up₂ …] = Q S and [down₁; down₂; …]ᵀ = P T for orthonormal Q and P, ΔWᵢ is Q Mᵢ Pᵀ with
    Mᵢ = Sᵢ Tᵢᵀ, and Q and P change no length and no angle. S and T come from the Gram matrices of
    the stacked factors, in float64.

    Args:
        updates: Of one shape.
    """
    spread_up = _find_spread(torch.cat([update.up for update in updates], dim=1))
    spread_down = _find_spread(torch.cat([update.down for update in updates], dim=0).T)
    ranks = [update.rank for update in updates]
    return [
        left @ right.T
        for left, right in zip(
            spread_up.split(ranks, dim=1), spread_down.split(ranks, dim=1), strict=True
        )
    ]


def _find_spread(columns: Float[Tensor, "side rank"]) -> Float[Tensor, "k rank"]:
    """A small matrix S with SᵀS = columnsᵀ columns."""
    columns = columns.double()
    lengths, turn = torch.linalg.eigh(columns.T @ columns)
    spread: Tensor = lengths.clamp(min=0).sqrt()[:, None] * turn.T
    return spread


class _Small:
    """A small matrix with its norm and the directions of its rows and columns."""

    def __init__(self, matrix: Float[Tensor, "k l"]) -> None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        alive = values > _NOTHING * values[:1]
        self.matrix = matrix
        self.norm = float(values.norm())
        self.rank = int(alive.sum())
        self.columns = left[:, alive]
        self.rows = right[alive].T


def _find_cosines(one: Tensor, other: Tensor) -> tuple[float, ...]:
    return tuple(torch.linalg.svdvals(one.T @ other).clamp(0, 1).tolist())


def _clamp(value: float, low: float = 0.0) -> float:
    return min(max(value, low), 1.0)


def _chance(directions: int, sides: int) -> float:
    return math.sqrt(min(directions / sides, 1.0))


def measure_together(pairs: Sequence[LayerPair]) -> Together:
    """Put the measures of some layers together, each counted by its energy."""
    shared = [pair for pair in pairs if pair.shared]
    norms = (_add(pair.norms[0] for pair in pairs), _add(pair.norms[1] for pair in pairs))
    products = [(pair.cosine or 0.0) * pair.norms[0] * pair.norms[1] for pair in shared]
    cosine = sum(products) / (norms[0] * norms[1]) if all(norms) else None
    whole = _add(pair.lost(0) for pair in pairs)
    errors: dict[int, float] = {}
    for rank in RANKS:
        errors[rank] = _add(pair.lost(rank) for pair in pairs) / whole if whole > 0 else 0.0
        if errors[rank] == 0:
            break
    return Together(
        layers=len(pairs),
        shared=len(shared),
        norms=norms,
        cosine=cosine,
        row_overlap=_average(shared, "row_overlap"),
        column_overlap=_average(shared, "column_overlap"),
        row_chance=_average(shared, "row_chance"),
        column_chance=_average(shared, "column_chance"),
        errors=errors,
    )


def _add(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def _average(shared: Sequence[LayerPair], name: str) -> tuple[float, float] | None:
    """Average a share of both adapters' norms over layers, as shares of their energy."""
    if not shared:
        return None
    sides = []
    for side in (0, 1):
        parts = _add(getattr(pair, name)[side] * pair.norms[side] for pair in shared)
        sides.append(parts / _add(pair.norms[side] for pair in shared))
    return sides[0], sides[1]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


def block_of(layer: str) -> str:
    """Name the block that a layer is in: of the denoiser, or a text encoder as a whole.

    Example:
        >>> block_of("unet.up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_k")
        'up_blocks.0.attentions.1'
        >>> block_of("unet.down_blocks.2.resnets.0.conv1")
        'down_blocks.2'
    """
    component, _, inner = layer.partition(".")
    if component in _TEXT:
        return component
    found = _PARTS.match(layer)
    return found[1] if found else (inner or layer).partition(".")[0]


def kind_of(layer: str) -> str:
    """Say what a layer does in its block, as one of `KINDS`.

    Example:
        >>> kind_of("unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0")
        'cross out'
        >>> kind_of("text_encoder.encoder.layers.3.mlp.fc1")
        'ff in'
    """
    attention = re.search(r"(attn1|attn2|self_attn)\.(?:to_)?(q|k|v|out)(_proj)?(\.0)?$", layer)
    if attention:
        return f"{'cross' if attention[1] == 'attn2' else 'self'} {attention[2]}"
    for ending, kind in (
        ((".ff.net.0.proj", ".mlp.fc1"), "ff in"),
        ((".ff.net.2", ".mlp.fc2"), "ff out"),
        ((".proj_in", ".proj_out"), "proj"),
        ((".conv", ".conv1", ".conv2", ".conv_shortcut", ".conv_in", ".conv_out"), "conv"),
    ):
        if layer.endswith(ending):
            return kind
    return "other"


def group_layers(diagnosis: Diagnosis, kinds: bool = False) -> tuple[LayerGroup, ...]:
    """Put layers together by block, or by block and kind.

    Args:
        diagnosis: What was measured.
        kinds: Whether layers of one block that do different things are kept apart; names then
            are such as ``mid_block.attentions.0 cross k``.
    """
    sorted_out: dict[str, list[LayerPair]] = {}
    for pair in diagnosis.pairs:
        name = block_of(pair.layer) + (f" {kind_of(pair.layer)}" if kinds else "")
        sorted_out.setdefault(name, []).append(pair)
    return tuple(
        LayerGroup(name, tuple(sorted_out[name]), measure_together(sorted_out[name]))
        for name in sort_blocks(sorted_out)
    )


def sort_blocks(names: Iterable[str]) -> list[str]:
    """Sort blocks as a picture passes through them: text encoders, down, middle, up."""
    order = (*_TEXT, "conv_in", "time_embedding", "add_embedding", "down", "mid", "up", "conv_out")

    def place(name: str) -> tuple[int, str]:
        head = name.partition(" ")[0]
        start = head.partition("_block")[0]
        return (order.index(start) if start in order else len(order), name)

    return sorted(names, key=place)
