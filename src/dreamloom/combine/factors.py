"""Updates as products of two thin matrices, and what can be computed without multiplying them out.

Small matrices are float64 whatever the factors are: what nearly cancels, and squared lengths, would
lose half of float32's digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.adapters import Layer

# Directions below this share of what went into them are rounding errors of float64.
_ROUNDING = 1e-14
# Up to here a Cholesky factor's backward error, 2⁻⁵³ times this, is 10⁻¹² of its columns.
_WELL_CONDITIONED = 1e4


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
    """Make each column of up about as long as its row of down; the update stays what it is.

    Factors of very different size would lose digits in half precision. The scales are powers of
    two, so nothing is rounded, and lengths differ by a factor of 2 at most.
    """
    ups = factors.up.double().norm(dim=0)
    downs = factors.down.double().norm(dim=1)
    alive = (ups > 0) & (downs > 0)
    ratio = torch.where(alive, downs, 1.0) / torch.where(alive, ups, 1.0)
    scale = torch.exp2(torch.round(torch.log2(ratio) / 2))
    dtype = factors.up.dtype
    to_up = torch.where(alive, scale, 0.0).to(dtype)
    to_down = torch.where(alive, 1 / scale, 0.0).to(dtype)
    return Factors(factors.up * to_up, factors.down * to_down[:, None])


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update, and what is needed to cut it off after any of them.

    Args:
        values: Singular values, descending, in float64; only those above rounding.
        factors: The update.
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
        return Factors(
            self._multiply_up(self.left[:, :rank] * roots).to(self.factors.up.dtype),
            self._multiply_down(self.right[:rank] / roots[:, None]).to(self.factors.up.dtype),
        )

    def left_vectors(self) -> Float[Tensor, "outputs k"]:
        """The left singular vectors in float64: orthonormal columns."""
        return self._multiply_up(self.left)

    def right_vectors(self) -> Float[Tensor, "k inputs"]:
        """The right singular vectors in float64: orthonormal rows."""
        return self._multiply_down(self.right / self.values[:, None])

    # Directions that nearly cancel are large on both sides of these products, so they are
    # multiplied in float64 and rounded only once.

    def _multiply_up(self, by: Float[Tensor, "rank r"]) -> Float[Tensor, "outputs r"]:
        return self.factors.up.double() @ by

    def _multiply_down(self, by: Float[Tensor, "r rank"]) -> Float[Tensor, "r inputs"]:
        return by @ self.factors.down.double()

    def lost(self, rank: int) -> float:
        """The Frobenius norm of what `truncate` leaves out."""
        return float(self.values[rank:].norm())


def find_spectrum(factors: Factors) -> Spectrum:
    """Find an update's singular values from the triangles of two QR decompositions.

    With up = Q R and downᵀ = P S, ΔW = Q (R Sᵀ) Pᵀ, and the small matrix in the middle has ΔW's
    singular values. With its singular vectors u and v, up Sᵀ v = Q u σ and uᵀ R down = σ vᵀ Pᵀ, so
    neither Q nor P is ever formed and nothing is divided by what may vanish. Zero and repeated
    directions are left out. All of it is float64: each column counts with its own length, so
    neither large scales in one factor and small ones in the other nor parts that nearly cancel
    cost digits.

    Source:
        Golub and Van Loan, Matrix Computations, sections 5.2 (QR) and 8.6 (SVD).
    """
    quick = factors.up.dtype == torch.float32
    upper = _find_triangle(factors.up.double(), quick)
    lower = _find_triangle(factors.down.double().T, quick)
    left, values, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    # What the factors could be multiplied out to, if no two of their columns cancelled.
    size = (upper.norm(dim=0) * lower.norm(dim=0)).sum()
    noise = _ROUNDING * size + torch.finfo(factors.up.dtype).eps * values[:1]
    alive = values > noise
    left, values, right = left[:, alive], values[alive], right[alive]
    return Spectrum(
        values=values,
        factors=factors,
        left=lower.T @ right.T / values,
        right=left.T @ upper,
    )


def _find_triangle(
    columns: Float[Tensor, "side rank"], quick: bool
) -> Float[Tensor, "lesser rank"]:
    """The triangle R of columns = Q R.

    The Cholesky factor of the columns' Gram matrix is such a triangle, too, and is found sooner,
    but its rounding grows with the columns' condition number. Below the limit here it stays 10⁻⁵
    of that of float32 columns.

    Args:
        columns: In float64.
        quick: Whether that rounding is good enough.

    Source:
        Golub and Van Loan, Matrix Computations, sections 4.2 (Cholesky) and 5.2 (QR).
    """
    if quick and columns.shape[0] >= columns.shape[1] > 0:
        triangle: Tensor
        triangle, failed = torch.linalg.cholesky_ex(columns.T @ columns, upper=True)
        if not failed and _condition(triangle) < _WELL_CONDITIONED:
            return triangle
    upper: Tensor = torch.linalg.qr(columns, mode="r").R
    return upper


def _condition(triangle: Float[Tensor, "rank rank"]) -> float:
    one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, one, upper=True)
    return float(triangle.norm() * inverse.norm())


@dataclass(frozen=True)
class Singular:
    """The singular values and vectors of a matrix that is no product; only those above rounding."""

    left: Float[Tensor, "outputs k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "k inputs"]

    def truncate(self, rank: int) -> Factors:
        """The nearest update of a rank, its factors equally long.

        Source:
            Eckart and Young, Psychometrika 1 (1936).
        """
        roots = self.values[:rank].sqrt()
        return Factors(self.left[:, :rank] * roots, roots[:, None] * self.right[:rank])


def find_singular(matrix: Float[Tensor, "outputs inputs"]) -> Singular:
    """Find the singular values and vectors of a matrix, in its own precision."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    alive = values > values[:1] * torch.finfo(values.dtype).eps
    return Singular(left[:, alive], values[alive], right[alive])


def truncate_matrix(matrix: Float[Tensor, "outputs inputs"], rank: int) -> Factors:
    """The nearest update of a rank to a matrix that is no product, its factors equally long.

    Source:
        Eckart and Young, Psychometrika 1 (1936).
    """
    return find_singular(matrix).truncate(rank)
