"""Extract a LoRA from two checkpoints (SVD of their difference), cut to a rank."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import AdapterError, BaseModelError, ConfigError
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.factors import Factors, frobenius, truncate_matrix, unflatten
from dreamloom.merging.ranks import RankRequest, choose_rank, spend_budget
from dreamloom.models.weight_files import BaseWeights, fingerprint_weights, open_weights

# A search among random directions finds the leading ones if it looks at a few more, and a few
# products with the matrix turn it towards them.
_MORE, _TURNS = 16, 2
# Below this share of a matrix's shorter side, the search is quicker than all singular values.
_WORTH_IT = 0.25


@dataclass(frozen=True)
class Extracted:
    """An adapter, and how much of the difference of two models it holds.

    Args:
        adapter: The LoRA.
        errors: For each layer that differs, ‖difference − adapter‖ / ‖difference‖, 0 to 1.
        error: The same over all layers together.
        others: Tensors that differ and that no adapter changes, such as biases and norms, by name;
            empty as well if the models' files are laid out differently.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float
    others: tuple[str, ...]


def extract_adapter(
    tuned: str,
    base: str,
    rank: RankRequest,
    bytes_per_number: int = 4,
    on_layer: OnProgress = no_progress,
) -> Extracted:
    """Write what one model has changed of another as an adapter of that other.

    Layers are read and compared one after the other, so that no more memory is needed than for a
    few copies of the largest one and for the adapter. Layers that do not differ are left out.

    Args:
        tuned: The changed model; see `open_weights`.
        base: The model that it was made from.
        rank: How thin the adapter may be; ``full`` keeps all that a layer's shape allows.
        bytes_per_number: Of the file that will be written; a budget counts with it.
        on_layer: Told of progress.

    Raises:
        BaseModelError: If a model cannot be read, they have no layer in common, layers differ in
            shape, or a number is not finite.
        ConfigError: If the rank is above every layer's.
        AdapterError: If the models do not differ in any layer.

    Source:
        Halko, Martinsson and Tropp, Finding Structure with Randomness (arXiv:0909.4061), algorithms
        4.4 and 5.1, for low ranks; otherwise the singular value decomposition.
    """
    new, old = open_weights(tuned), open_weights(base)
    names = _match(new, old, tuned, base)
    sides = {name: (new.shape(name)[0], math.prod(new.shape(name)[1:])) for name in names}
    highest = max(map(min, sides.values()))
    if rank.kind == "fixed" and rank.amount > highest:
        raise ConfigError(
            f"Rank {rank.amount:.0f} is above what exists: the largest layer has {highest}.",
            f"Ask for {highest} or less.",
        )
    total = len(names) * (2 if rank.kind == "budget" else 1)
    done = iter(range(1, total + 1))

    def list_differences() -> Iterator[tuple[str, Tensor]]:
        return _list_differences(new, old, names, lambda: on_layer(next(done), total))

    ranks: dict[str, int] = {}
    if rank.kind == "budget":
        # Of each layer only its singular values are kept.
        values = {name: torch.linalg.svdvals(matrix) for name, matrix in list_differences()}
        costs = {name: sum(sides[name]) for name in values}
        ranks = spend_budget(values, costs, rank.amount / bytes_per_number) if values else {}
    layers: dict[str, Layer] = {}
    errors: dict[str, float] = {}
    lost = whole = 0.0
    for name, matrix in list_differences():
        most = int(rank.amount) if rank.kind == "fixed" else ranks.get(name)
        if most is None:
            most = choose_rank(torch.linalg.svdvals(matrix), rank)
        factors = find_nearest(matrix, min(most, *matrix.shape), name)
        size = frobenius(matrix)
        left_out = frobenius(matrix.addmm_(factors.up, factors.down, alpha=-1.0))
        errors[name] = left_out / size
        whole, lost = whole + size**2, lost + left_out**2
        if factors.rank:
            layers[name] = unflatten(factors, new.shape(name)[1:])
    if not layers:
        raise AdapterError(
            f"{tuned} and {base} have the same weights in every layer.", "Name two models."
        )
    error = (lost / whole) ** 0.5
    metadata = {
        "dreamloom.kind": "extract",
        "dreamloom.base": base,
        "dreamloom.base_fingerprint": fingerprint_weights(old.path),
        "dreamloom.rank": str(rank),
        "dreamloom.error": f"{error:.6g}",
    }
    return Extracted(Adapter(layers, metadata), errors, error, _list_others(new, old))


def _match(new: BaseWeights, old: BaseWeights, tuned: str, base: str) -> list[str]:
    names = sorted(set(new.places) & set(old.places))
    if not names:
        raise BaseModelError(
            f"{tuned} and {base} have no layer in common.", "Name two models of one kind."
        )
    for name in names:
        if new.shape(name) != old.shape(name):
            raise BaseModelError(
                f"{name} is {new.shape(name)} in {tuned} and {old.shape(name)} in {base}.",
                "Name the model that the tuned one was made from.",
            )
    return names


def _list_differences(
    new: BaseWeights, old: BaseWeights, names: list[str], on_done: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    """Give each differing layer's name and difference, a matrix in float32."""
    for name in names:
        one, other = new.read(name), old.read(name)
        if one.dtype != other.dtype or not torch.equal(one, other):
            matrix = (one.float() - other.float()).flatten(1)
            if not torch.isfinite(matrix).all():
                raise BaseModelError(
                    f"{name} holds numbers that are not finite (NaN or infinity).",
                    "Get the checkpoint again.",
                )
            if matrix.any():
                yield name, matrix
        on_done()


def find_nearest(matrix: Float[Tensor, "outputs inputs"], rank: int, seed: str = "") -> Factors:
    """Find the nearest product of a rank to a matrix, or very nearly: by a random search.

    A rank near the matrix's own is computed exactly. Otherwise the matrix is multiplied with some
    random directions, twice more with itself to turn them to its leading ones, and decomposed
    among these. A matrix of the rank itself comes back up to rounding.

    Args:
        matrix: What to be near to.
        rank: 0 or above.
        seed: Of the dice; the same seed gives the same factors.
    """
    if rank + _MORE > _WORTH_IT * min(matrix.shape):
        return truncate_matrix(matrix, rank)
    rng = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    )
    start = torch.randn(matrix.shape[1], rank + _MORE, generator=rng)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_TURNS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small = truncate_matrix(basis.T @ matrix, rank)
    return Factors(basis @ small.up, small.down)


def _list_others(new: BaseWeights, old: BaseWeights) -> tuple[str, ...]:
    """Name tensors that differ and are no layer's weight, if both models have the same files."""
    pairs = list(zip(new.files, old.files, strict=False))
    if len(new.files) != len(old.files) or any(a.entries != b.entries for a, b in pairs):
        return ()
    held = {(place.file.path, place.key) for found in new.places.values() for place in found}
    return tuple(
        key
        for one, other in pairs
        for key in one.entries
        if (one.path, key) not in held
        and any(a != b for a, b in zip(one.chunks(key), other.chunks(key), strict=True))
    )
