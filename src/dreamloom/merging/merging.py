"""Merge LoRAs: several adapters in, one out, layer by layer, cut to a rank, with its error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.lora.adapter import Adapter, Layer, refuse_other_kinds
from dreamloom.lora.token_embeddings import gather_token_embeddings
from dreamloom.merging.blocks import BlockWeights
from dreamloom.merging.factors import (
    Factors,
    find_singular,
    find_spectrum,
    find_values,
    flatten,
    gram,
    measure,
    measure_rest,
    norm,
    truncate_matrix,
    unflatten,
)
from dreamloom.merging.method import Context, LayerPart, Merged, MergeMethod, Value
from dreamloom.merging.methods import METHODS, find_method
from dreamloom.merging.ranks import FULL, RankRequest, choose_rank, spend_budget


@dataclass(frozen=True)
class MergeRequest:
    """How adapters shall be merged.

    Args:
        weights: One finite weight per adapter; negative ones subtract, 0 leaves out.
        method: The name of a method in `METHODS`.
        options: The method's own settings; what is absent is its default.
        rank: How thin the result may be.
        blocks: Further weights by layer, one for each adapter; absent means 1 everywhere.
        seed: Of methods that throw dice.
        bytes_per_number: Of the file that will be written; a budget counts with it.
    """

    weights: Sequence[float]
    method: str = "sum"
    options: Mapping[str, Value] = field(default_factory=dict)
    rank: RankRequest = FULL
    blocks: Sequence[BlockWeights] = ()
    seed: int = 0
    bytes_per_number: int = 4

    def weight_of(self, place: int, layer: str) -> float:
        """The weight of an adapter in a layer: its own times that of the block.

        Args:
            place: The adapter's, from 0.
            layer: The layer's name.
        """
        return self.weights[place] * (self.blocks[place].of(layer) if self.blocks else 1.0)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        rank: Of the merged update.
        norm: Its Frobenius norm.
        error: ‖what is written − what the method says‖ / ‖what the method says‖, 0 or above; the
            precision of the file is not in it.
        notes: Further figures by name, if the method tells any.
    """

    rank: int
    norm: float
    error: float
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """A merged adapter, and what became of each layer."""

    adapter: Adapter
    reports: Mapping[str, LayerReport]

    @property
    def error(self) -> float:
        """The relative error over all layers together: what was cut off, of what there was."""
        whole = lost = 0.0
        for report in self.reports.values():
            # Whatever is cut off stands at right angles to what is kept.
            squared = report.norm**2 / (1 - report.error**2) if report.error < 1 else report.norm**2
            whole += squared
            lost += squared * report.error**2
        return (lost / whole) ** 0.5 if whole > 0 else 0.0


def combine(
    adapters: Sequence[Adapter],
    request: MergeRequest,
    prepared: Mapping[str, Mapping[str, Tensor]] | None = None,
    on_layer: OnProgress = no_progress,
) -> Combined:
    """Merge LoRAs of one base model.

    A layer that only some adapters change is merged from those. New words are taken along as they
    are, if their adapter's weight is not 0. One layer is worked on at a time, so memory beyond the
    adapters and the result stays that of the largest layer.

    Args:
        adapters: One or more LoRAs.
        request: How.
        prepared: What was gathered from the base model, by layer, for methods that need it.
        on_layer: Told of progress.

    Raises:
        ConfigError: If the numbers of adapters and weights differ, a weight is not finite, nothing
            is left to merge, or the method, an option, the rank or block weights are not possible.
        AdapterError: If one is no LoRA, two change a layer of different shapes, or teach one word
            differently, or an update at its weight is too large for float32.

    Example:
        >>> a = Adapter({"unet.x": Layer(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))})
        >>> b = Adapter({"unet.x": Layer(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0]]))})
        >>> combine([a, b], MergeRequest([1.0, 0.5])).adapter.layers["unet.x"].update()
        tensor([[2.0000, 1.5000]])
    """
    merger = _Merger(adapters, request, prepared or {})
    if not merger.names:
        raise ConfigError("Every weight is 0, so nothing is left to merge.", "Raise a weight.")
    if request.rank.kind == "fixed":
        highest = max(merger.existing_rank(name) for name in merger.names)
        if request.rank.amount > highest:
            raise ConfigError(
                f"Rank {request.rank.amount:.0f} is above what exists: no layer has more than rank "
                f"{highest}.",
                f"Ask for {highest} or less, or for full.",
            )
    ranks = merger.spend_budget() if request.rank.kind == "budget" else {}
    layers: dict[str, Layer] = {}
    reports: dict[str, LayerReport] = {}
    for done, name in enumerate(merger.names):
        factors, reports[name] = merger.cut(name, ranks.get(name))
        if factors.rank:
            layers[name] = unflatten(factors, merger.kernels[name])
        on_layer(done + 1, len(merger.names))
    if not layers:
        raise ConfigError(
            "The weights cancel each other out, so nothing is left.", "Change a weight."
        )
    words = [
        adapter.tokens
        for adapter, weight in zip(adapters, request.weights, strict=True)
        if weight != 0
    ]
    return Combined(Adapter(layers, tokens=gather_token_embeddings(words)), reports)


@dataclass(frozen=True)
class Uncut:
    """What a method says of one layer, before anything is cut off.

    Args:
        layer: Its name.
        update: The merged update.
        together: The ranks of the adapters' updates of this layer, added up.
    """

    layer: str
    update: Merged
    together: int


def merge_uncut(
    adapters: Sequence[Adapter],
    request: MergeRequest,
    prepared: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Iterator[Uncut]:
    """Merge as `combine` does, but cut nothing off: what the error of a merge is measured by.

    One layer is computed at a time, when it is asked for, in the order of their names.

    Raises:
        ConfigError, AdapterError: As `combine`.
    """
    merger = _Merger(adapters, request, prepared or {})
    for name in merger.names:
        yield Uncut(name, merger.merge(name), merger.add_ranks(name))


def _check(adapters: Sequence[Adapter], request: MergeRequest, method: MergeMethod) -> None:
    count = len(adapters)
    if not adapters or count != len(request.weights):
        raise ConfigError(f"{count} adapters need as many weights, got {len(request.weights)}.")
    if request.blocks and len(request.blocks) != count:
        raise ConfigError(
            f"{count} adapters need as many block weights, got {len(request.blocks)}."
        )
    if not all(torch.isfinite(torch.tensor(weight)) for weight in request.weights):
        raise ConfigError(
            f"Weights must be finite numbers, got {list(request.weights)}.",
            "Give numbers below 1e38.",
        )
    if count < method.least or (method.most is not None and count > method.most):
        allowed = f"{method.least} to {method.most}" if method.most else f"{method.least} or more"
        allowed = str(method.least) if method.least == method.most else allowed
        raise ConfigError(
            f"The method {method.name} takes {allowed} adapters, got {count}.",
            f"Other methods take more: {', '.join(METHODS)}."
            if method.most is not None and count > method.most
            else "Name another adapter.",
        )
    for number, adapter in enumerate(adapters, 1):
        refuse_other_kinds(adapter, f"Adapter {number}", "can be merged")
    layers = {name for adapter in adapters for name in adapter.layers}
    for blocks in request.blocks:
        blocks.check(layers)


class _Merger:
    """The layers of some adapters, each merged when it is asked for."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        request: MergeRequest,
        prepared: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        method = find_method(request.method)
        _check(adapters, request, method)
        self._adapters, self._request, self._prepared = adapters, request, prepared
        self._method, self._options = method, method.read_options(request.options)
        self.names = sorted(
            {
                name
                for number, adapter in enumerate(adapters)
                for name in adapter.layers
                if request.weight_of(number, name) != 0
            }
        )
        self.kernels = {name: self._check_shapes(name) for name in self.names}
        for name in self.names:
            self._check_sizes(name)
        # A method that has a scope needs the whole model's inner products only where it is that.
        wanted = method.whole and self._options.get("scope", "model") == "model"
        self._whole = self._sum_grams() if wanted else None
        find = method.find_thresholds
        self._thresholds = find(self._read_layers, self._options) if find else {}

    def _check_shapes(self, name: str) -> tuple[int, ...]:
        shapes = {
            (adapter.layers[name].up.shape[0], *adapter.layers[name].down.shape[1:])
            for number, adapter in enumerate(self._adapters)
            if name in adapter.layers and self._request.weight_of(number, name) != 0
        }
        if len(shapes) > 1:
            raise AdapterError(
                f"The updates of {name} differ in shape: {sorted(shapes)}.",
                "Only adapters of one base model can be merged.",
            )
        return tuple(next(iter(shapes))[1:])

    def _check_sizes(self, name: str) -> None:
        """Refuse updates whose entries, or factors, times their weight may be infinite."""
        for part in self.parts(name):
            up, down = (_find_largest(side) for side in (part.factors.up, part.factors.down))
            largest = abs(part.weight) * up * max(1.0, down * part.factors.rank)
            # Not a number is not below it either.
            if not largest < torch.finfo(torch.float32).max:
                raise AdapterError(
                    f"The update of {name} is not finite: in adapter {part.number} it is about "
                    f"{largest:.1e} at weight {part.weight:g}.",
                    "Lower the weight; if it is near 1, the adapter is damaged.",
                )

    def parts(self, name: str) -> list[LayerPart]:
        """What goes into a layer; adapters without it, or with weight 0, are left out."""
        return [
            LayerPart(
                flatten(adapter.layers[name]), self._request.weight_of(number, name), number + 1
            )
            for number, adapter in enumerate(self._adapters)
            if name in adapter.layers and self._request.weight_of(number, name) != 0
        ]

    def _read_layers(self) -> Iterator[list[LayerPart]]:
        return map(self.parts, self.names)

    def existing_rank(self, name: str) -> int:
        """The rank that the layer's merged update can have at most."""
        parts = self.parts(name)
        sides = min(parts[0].factors.shape)
        if self._method.needs == "entries":
            return sides
        return min(sides, sum(part.factors.rank for part in parts))

    def _sum_grams(self) -> Float[Tensor, "adapters adapters"]:
        total = torch.zeros(len(self._adapters), len(self._adapters), dtype=torch.float64)
        for name in self.names:
            parts = self.parts(name)
            rows = torch.tensor([part.number - 1 for part in parts])
            weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
            products = gram([part.factors for part in parts]) * torch.outer(weights, weights)
            total[rows[:, None], rows] += products
        return total

    def add_ranks(self, name: str) -> int:
        """The ranks of what goes into a layer, added up; an update of zeros has none."""
        return sum(
            part.factors.rank
            for part in self.parts(name)
            if _find_largest(part.factors.up) and _find_largest(part.factors.down)
        )

    def merge(self, name: str, notes: dict[str, float] | None = None) -> Merged:
        """What the method makes of a layer, uncut; what it tells goes into ``notes``."""
        context = Context(
            layer=name,
            options=self._options,
            seed=self._request.seed,
            adapters=len(self._adapters),
            whole=self._whole,
            prepared=self._prepared.get(name, {}),
            weights=tuple(self._request.weights),
            notes={} if notes is None else notes,
            thresholds=self._thresholds,
        )
        return self._method.merge(self.parts(name), context)

    def spend_budget(self) -> dict[str, int]:
        """Choose the ranks of all layers together; what is merged is not kept meanwhile."""
        values = {}
        for name in self.names:
            merged = self.merge(name)
            if isinstance(merged, Factors):
                values[name] = find_spectrum(merged).values
            else:
                values[name] = find_values(merged.float())
        costs = {name: sum(self.parts(name)[0].factors.shape) for name in self.names}
        return spend_budget(
            values, costs, self._request.rank.amount / self._request.bytes_per_number
        )

    def cut(self, name: str, rank: int | None) -> tuple[Factors, LayerReport]:
        """Merge a layer and cut it to the rank that was asked for.

        Of what a method of entries made, a matrix, ``full`` is the rank of its parts together.
        """
        wanted = self._request.rank
        notes: dict[str, float] = {}
        merged = self.merge(name, notes)
        if isinstance(merged, Tensor):
            matrix = merged.float()
            if rank is None and wanted.kind == "energy":
                singular = find_singular(matrix)
                cut = singular.truncate(choose_rank(singular.values, wanted))
            else:
                most = int(wanted.amount) if wanted.kind == "fixed" else self.add_ranks(name)
                cut = truncate_matrix(matrix, most if rank is None else rank)
            # Of the very factors that will be written, whichever way they were found.
            whole, size, lost = measure(matrix), norm(cut), measure_rest(matrix, cut)
        elif wanted.kind == "full" or (wanted.kind == "fixed" and wanted.amount >= merged.rank):
            return merged, LayerReport(merged.rank, norm(merged), 0.0, notes)
        else:
            spectrum = find_spectrum(merged)
            values = spectrum.values
            rank = choose_rank(values, wanted) if rank is None else rank
            whole, size, lost = (
                float(values.norm()),
                float(values[:rank].norm()),
                spectrum.lost(rank),
            )
            # Among equally strong directions rounding would choose, and with it the split into
            # factors.
            first = Factors(merged.up[:, :rank], merged.down[:rank])
            cut = first if self._method.ordered else spectrum.truncate(rank)
        return cut, LayerReport(cut.rank, size, lost / whole if whole > 0 else 0.0, notes)


def _find_largest(factor: Tensor) -> float:
    if factor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(factor)
    return max(-float(low), float(high))
