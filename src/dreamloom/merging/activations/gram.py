"""Gram matrices of layers' activations on some prompts, for RegMean and SSR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import ReferenceType, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamloom.core.events import silent
from dreamloom.merging.activation_inputs import JOINT, name_down, name_gram
from dreamloom.merging.activations.forward_passes import (
    ForwardPass,
    ForwardPasses,
    ForwardResult,
    Prepared,
)
from dreamloom.merging.factors import flatten
from dreamloom.merging.method import Value
from dreamloom.merging.methods.regmean import InputShares
from dreamloom.models.activation_hooks import (
    go_down,
    gram_of,
    hook_activations,
    list_inputs,
    list_places,
)
from dreamloom.models.base import Model

ROUND_BYTES = 2**31
"""How much memory the Gram matrices of inputs may take at a time."""


@dataclass
class GramSum:
    """A growing mean of outer products.

    Args:
        features: How long the rows are.
        places: How many rows there were.
    """

    features: int
    places: int = 0
    _total: Tensor | None = None

    def add(self, rows: Float[Tensor, "places features"]) -> None:
        """Take more rows in."""
        gram = gram_of(rows)
        self._total = gram if self._total is None else self._total.add_(gram)
        self.places += len(rows)

    def mean(self) -> Float[Tensor, "features features"]:
        """The mean over all rows; zeros if there was none."""
        if self._total is None:
            return torch.zeros(self.features, self.features)
        return self._total / self.places


def gather_signals(forward_passes: ForwardPasses, options: Mapping[str, Value]) -> ForwardResult:
    """Measure how strongly each adapter's prompts fill the rows of every adapter's ``down``.

    For each layer that several adapters change: the means of z zᵀ with z = [down₁; down₂; …] · x
    over every token or pixel x that it is given. A sum of rank × rank numbers a layer is all that
    is kept, however much is drawn.

    Of a layer that is given too few inputs nothing is kept; see `_has_too_few_inputs`.

    Source:
        SSR-Merge (arXiv:2606.10617): its statistics add up over inputs.
    """
    where = forward_passes.model.runtime.device
    exact = find_place_for_doubles(forward_passes.model)
    downs = {
        name: torch.cat(
            [flatten(forward_passes.adapters[n - 1].layers[name]).down for n in numbers]
        )
        for name, numbers in forward_passes.shared.items()
    }
    downs = {name: down.to(where, torch.float32) for name, down in downs.items()}

    def read_signals(name: str, layer: nn.Module, rows: Tensor) -> Tensor:
        signals = go_down(layer, rows.float(), downs[name])
        return list_places(layer, signals).to(exact, torch.float64)

    gathered = _gather(
        forward_passes, {name: len(down) for name, down in downs.items()}, read_signals
    )
    prepared: Prepared = {}
    for name, numbers in forward_passes.shared.items():
        sums = gathered[name]
        if _has_too_few_inputs(sums, numbers, downs[name].shape[1], options):
            sums = {number: GramSum(len(downs[name])) for number in sums}
        prepared[name] = {name_gram(number): total.mean().cpu() for number, total in sums.items()}
    return ForwardResult(prepared)


def gather_inputs(
    forward_passes: ForwardPasses, options: Mapping[str, Value], round_bytes: int = ROUND_BYTES
) -> ForwardResult:
    """Measure the inputs of every layer, and share them out among the adapters.

    The Gram matrix of a layer's inputs has inputs² numbers, so only those of one round's layers are
    held at a time, and every round draws anew. Layers that are given the same tensor, as queries,
    keys and values of one attention are, share one matrix.

    A layer that is given too few inputs is left to the plain sum; see `_has_too_few_inputs`.

    Args:
        forward_passes: The merge.
        options: Those of RegMean.
        round_bytes: Memory for the matrices of one round.
    """
    sources = find_sources(forward_passes)
    widths = {
        name: forward_passes.adapters[forward_passes.shared[name][0] - 1]
        for name in sources.values()
    }
    rounds = plan_rounds(
        {name: a.layers[name].down[0].numel() for name, a in widths.items()},
        len(forward_passes.passes),
        round_bytes,
    )

    def read_inputs(name: str, layer: nn.Module, rows: Tensor) -> Tensor:
        del name  # all are read alike
        return list_inputs(layer, rows.float())

    prepared: Prepared = {}
    exact = find_place_for_doubles(forward_passes.model)
    for gathered_now in rounds:
        sums = _gather(forward_passes, gathered_now, read_inputs)
        shares: dict[tuple[str, ...], InputShares] = {}
        for name in (name for name, source in sources.items() if source in gathered_now):
            numbers, source = forward_passes.shared[name], sources[name]
            downs = [
                flatten(forward_passes.adapters[number - 1].layers[name]).down for number in numbers
            ]
            key = (source, *map(str, numbers))
            if _has_too_few_inputs(sums[source], numbers, gathered_now[source], options):
                shared = downs
            else:
                if key not in shares:
                    grams = {
                        number: total.mean().to(exact) for number, total in sums[source].items()
                    }
                    joint = float(options["joint"])
                    shares[key] = InputShares(
                        [grams[number] for number in numbers],
                        joint * grams[JOINT] if joint > 0 else None,
                        shrink=float(options["shrink"]),
                        ridge=float(options["ridge"]),
                        keeps_unseen=options["unseen"] == "sum",
                    )
                shared = [shares[key].share(place, down) for place, down in enumerate(downs)]
            prepared[name] = dict(zip(map(name_down, numbers), shared, strict=True))
    return ForwardResult(prepared)


def _has_too_few_inputs(
    gathered: Mapping[int, GramSum],
    numbers: Sequence[int],
    inputs: int,
    options: Mapping[str, Value],
) -> bool:
    """Say whether some adapter's prompts give a layer fewer inputs than an input has numbers.

    The projections of a timestep are given one input a picture and step. What answers so few
    inputs exactly may answer all others with many times what it should. Such a layer gets the
    plain sum, as inputs do that are not seen at all, unless those shall be dropped.
    """
    fewest = min(gathered[number].places for number in numbers)
    return options["unseen"] == "sum" and fewest < inputs


def _gather(
    forward_passes: ForwardPasses,
    features: Mapping[str, int],
    read: Callable[[str, nn.Module, Tensor], Float[Tensor, "places features"]],
) -> dict[str, dict[int, GramSum]]:
    """Draw every ask, and add up what some layers are given, by layer and the ask's number.

    Args:
        forward_passes: The merge.
        features: The layers, and how long the rows are that are added up of each.
        read: Makes those rows of a layer's name, the layer, and what it is given.
    """
    gathered: dict[str, dict[int, GramSum]] = {name: {} for name in features}
    layers = {name: forward_passes.layers[name] for name in features}
    for one_pass in forward_passes.passes:
        for name, length in features.items():
            gathered[name][one_pass.number] = GramSum(length)

        def gather(
            name: str, layer: nn.Module, rows: Tensor, number: int = one_pass.number
        ) -> None:
            gathered[name][number].add(read(name, layer, rows))

        with torch.no_grad(), hook_activations(layers, gather):
            forward_passes.draw(one_pass)
    return gathered


def find_sources(forward_passes: ForwardPasses) -> dict[str, str]:
    """Find which layers are given the very same tensor, by looking once.

    A convolution has its own: what it multiplies depends on its kernel.

    Returns:
        For each shared layer the first one that was given its inputs.
    """
    first: dict[int, tuple[ReferenceType[Tensor], str]] = {}
    sources = {name: name for name in forward_passes.shared}

    def gather(name: str, layer: nn.Module, rows: Tensor) -> None:
        if not isinstance(layer, nn.Linear):
            return
        # An address alone says little: another tensor may have been there before.
        alive, source = first.get(id(rows), (None, name))
        if alive is not None and alive() is rows:
            sources[name] = source
        else:
            first[id(rows)] = (ref(rows), name)

    step = replace(forward_passes, steps=1, observe=silent)
    with torch.no_grad(), hook_activations(forward_passes.layers, gather):
        step.draw(ForwardPass(JOINT, (), forward_passes.passes[0].prompts[:1]))
    return sources


def plan_rounds(widths: Mapping[str, int], matrices: int, round_bytes: int) -> list[dict[str, int]]:
    """Divide layers into rounds whose Gram matrices fit into memory together.

    Args:
        widths: The number of each layer's inputs.
        matrices: How many Gram matrices each layer needs.
        round_bytes: For those of one round, in float32; a layer that needs more has a round of its
            own.
    """
    rounds: list[dict[str, int]] = []
    left = 0
    for name, width in widths.items():
        need = 4 * width**2 * matrices
        if not rounds or need > left:
            rounds.append({})
            left = round_bytes
        rounds[-1][name] = width
        left -= need
    return rounds


def find_place_for_doubles(model: Model) -> torch.device:
    """Apple's GPU knows no float64; there the processor adds up."""
    device = model.runtime.device
    return torch.device("cpu") if device.type == "mps" else device
