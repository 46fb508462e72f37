"""Updates as products of two thin matrices, and what can be computed without multiplying them out.

Small matrices are float64 whatever the factors are: squared lengths of float32 vectors lose the
smaller half of their digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.adapters import Layer

# Directions shorter than this share of the longest are rounding errors of float64 Gram matrices.
_NOTHING = 1e-7


@dataclass(frozen=True)
class Factors:
    """The update ΔW = up · down of one layer; a convolution's is flattened to a matrix.

    ``(up G, G⁻¹ down)`` is the same update for every invertible G, so nothing that is computed
    from factors may depend on how an update is split.
    """

    up: Float[Tensor, "outputs rank"]
    down: Float[Tensor, "rank inputs"]

    @property
    def rank(self) -> int:
        """How many directions there may be; 0 or above."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; a convolution's inputs are those of its whole kernel."""
        return self.up.shape[0], self.down.shape[1]

    def multiply(self) -> Float[Tensor, "outputs inputs"]:
        """Multiply the update out, in the factors' precision."""
        return self.up @ self.down

    def scaled(self, by: float) -> Factors:
        """The update times a number."""
        return Factors(self.up * by, self.down)


def flatten(layer: Layer) -> Factors:
    """See a layer's update as a matrix; no number is copied."""
    return Factors(layer.up.flatten(1), layer.down.flatten(1))


def unflatten(factors: Factors, kernel: Sequence[int]) -> Layer:
    """Give an update the form of its layer again.

    Args:
        factors: The update as a matrix.
        kernel: What follows the first side of the layer's weight: (inputs,) of a linear layer,
            (inputs, kernel height, kernel width) of a convolution.
    """
    ones = [1] * (len(kernel) - 1)
    return Layer(
        down=factors.down.reshape(factors.rank, *kernel),
        up=factors.up.reshape(factors.up.shape[0], factors.rank, *ones),
    )


def stack(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Add weighted updates exactly: Σ wᵢ upᵢ downᵢ as one product of rank Σ rᵢ.

    Args:
        parts: One update or more, of one shape; a weight of 0 keeps its place.

    Source:
        Product of block matrices.
    """
    return Factors(
        up=torch.cat([factors.up * weight for factors, weight in parts], dim=1),
        down=torch.cat([factors.down for factors, _ in parts], dim=0),
    )


def inner_product(one: Factors, other: Factors) -> float:
    """The sum of the products of two updates' entries: ⟨ΔW₁, ΔW₂⟩ = Σ (up₁ᵀ up₂) ∘ (down₁ down₂ᵀ).

    Source:
        Trace of a product, turned around: tr(down₁ᵀ up₁ᵀ up₂ down₂).
    """
    ups = one.up.double().T @ other.up.double()
    downs = one.down.double() @ other.down.double().T
    return float((ups * downs).sum())


def gram(updates: Sequence[Factors]) -> Float[Tensor, "k k"]:
    """All inner products of some updates of one shape, in float64; see `inner_product`."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, one in enumerate(updates):
        for j in range(i, len(updates)):
            products[i, j] = products[j, i] = inner_product(one, updates[j])
    return products


def norm(factors: Factors) -> float:
    """The Frobenius norm of an update; 0 or above."""
    return math.sqrt(max(inner_product(factors, factors), 0.0))


def balance(factors: Factors) -> Factors:
    """Make each column of up as long as its row of down; the update stays what it is.

    Factors of very different size would lose digits in half precision, and in Gram matrices.
    """
    ups = factors.up.double().norm(dim=0)
    downs = factors.down.double().norm(dim=1)
    both = (ups * downs).sqrt()
    alive = both > 0
    to_up = torch.where(alive, both / ups.where(alive, torch.ones_like(ups)), 0.0)
    to_down = torch.where(alive, both / downs.where(alive, torch.ones_like(downs)), 0.0)
    dtype = factors.up.dtype
    return Factors(factors.up * to_up.to(dtype), factors.down * to_down.to(dtype)[:, None])


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update, and what is needed to cut it off after any of them.

    Args:
        values: Singular values, descending, in float64; only those above rounding.
        factors: The balanced update.
        left: Takes ``factors.up`` to orthonormal left singular vectors.
        right: Takes ``factors.down`` to right singular vectors times their values.
    """

    values: Float[Tensor, " k"]
    factors: Factors
    left: Float[Tensor, "rank k"]
    right: Float[Tensor, "k rank"]

    def truncate(self, rank: int) -> Factors:
        """The nearest update of a rank, its factors equally long.

        Source:
            Eckart and Young, Psychometrika 1 (1936): no other matrix of that rank is nearer.
        """
        roots = self.values[:rank].sqrt()
        dtype = self.factors.up.dtype
        to_up = (self.left[:, :rank] * roots).to(dtype)
        to_down = (self.right[:rank] / roots[:, None]).to(dtype)
        return Factors(self.factors.up @ to_up, to_down @ self.factors.down)

    def lost(self, rank: int) -> float:
        """The Frobenius norm of what `truncate` leaves out."""
        return float(self.values[rank:].square().sum().sqrt())


def find_spectrum(factors: Factors) -> Spectrum:
    """Find an update's singular values from two small Gram matrices.

    With up = Q S for orthonormal Q, ΔW ΔWᵀ = Q (S down downᵀ Sᵀ) Qᵀ, so the eigenvectors of the
    small matrix in the middle turn Q into the left singular vectors. Everything of the layer's own
    size is one product with each factor, and a zero or repeated direction is left out.

    Source:
        The singular values of a product of factors, see Golub and Van Loan, Matrix Computations,
        section 8.6; here by Gram matrices, whose rounding in float64 is below that of float32
        factors.
    """
    factors = balance(factors)
    up, down = factors.up.double(), factors.down.double()
    lengths, turn = torch.linalg.eigh(up.T @ up)
    kept = lengths > lengths.max() * _NOTHING**2 if len(lengths) else lengths > 0
    kept &= lengths > 0
    roots, turn = lengths[kept].sqrt(), turn[:, kept]
    spread = roots[:, None] * turn.T
    squares, turn_again = torch.linalg.eigh(spread @ (down @ down.T) @ spread.T)
    squares, turn_again = squares.flip(0), turn_again.flip(1)
    alive = squares > squares.max() * _NOTHING**2 if len(squares) else squares > 0
    alive &= squares > 0
    turn_again = turn_again[:, alive]
    return Spectrum(
        values=squares[alive].sqrt(),
        factors=factors,
        left=turn / roots @ turn_again,
        right=turn_again.T @ spread,
    )


def truncate_matrix(matrix: Float[Tensor, "outputs inputs"], rank: int) -> Factors:
    """The nearest update of a rank to a matrix that is no product, its factors equally long.

    Source:
        Eckart and Young, Psychometrika 1 (1936).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, int((values > values[:1] * torch.finfo(values.dtype).eps).sum()))
    roots = values[:rank].sqrt()
    return Factors(left[:, :rank] * roots, roots[:, None] * right[:rank])
