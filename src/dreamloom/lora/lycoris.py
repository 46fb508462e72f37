"""LoHa and LoKr of LyCORIS, Tucker cores and full differences as a LoRA's product of factors.

A weight of a convolution is taken as a matrix: a row for each output, a column for each input and
place of the kernel. Products are computed in double precision and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.lora.adapter import Layer

Matrix = Float[Tensor, "_ _"]
FactorPair = tuple[Matrix, Matrix]
"""Two matrices, up and down, whose product is the change."""


def make_layer(factors: FactorPair, kernel: Sequence[int], scale: float = 1.0) -> Layer:
    """Give two matrices the shapes of a layer's factors, with the scale folded into ``up``.

    Args:
        factors: Matrices of shapes (outputs, rank) and (rank, inputs · height · width).
        kernel: Height and width of a convolution's kernel; empty for a linear layer.
        scale: What the product is multiplied by.

    Raises:
        ValueError: If the columns are no multiple of the kernel's places.
    """
    up, down = factors
    places = math.prod(kernel)
    if down.shape[1] % places:
        raise ValueError(f"{down.shape[1]} columns are no multiple of the kernel's {places} places")
    ones = (1,) * len(kernel)
    return Layer(
        down.reshape(down.shape[0], down.shape[1] // places, *kernel).float().contiguous(),
        (up.double() * scale).reshape(*up.shape, *ones).float().contiguous(),
    )


def split_exactly(change: Matrix) -> FactorPair:
    """Write any matrix as a product with an identity, on its shorter side: bit for bit itself.

    Example:
        >>> up, down = split_exactly(torch.ones(2, 3))
        >>> up.shape, down.shape
        (torch.Size([2, 2]), torch.Size([2, 3]))
    """
    rows, columns = change.shape
    if rows <= columns:
        return torch.eye(rows, dtype=change.dtype), change
    return change, torch.eye(columns, dtype=change.dtype)


def contract_tucker(
    core: Float[Tensor, "left right height width"], down: Float[Tensor, "right inputs"]
) -> Matrix:
    """Multiply a Tucker core with its inner factor: what remains is a LoRA's ``down``.

    Of ΔW[o, c, h, w] = Σ_ij up[o, i] core[i, j, h, w] down[j, c] it is the sum over j, as a matrix
    of shape (left, inputs · height · width).

    Source:
        Kim et al., Compression of Deep Convolutional Neural Networks (arXiv:1511.06530), Eq. 1, as
        LyCORIS (arXiv:2309.14859) uses it for convolutions.
    """
    return torch.einsum("ijhw,jc->ichw", core.double(), down.double()).flatten(1)


def multiply_entries(first: FactorPair, second: FactorPair) -> FactorPair:
    """Write (up1 down1) ∘ (up2 down2), a LoHa's product entry by entry, as one product.

    Row i of ``up`` is the Kronecker product of row i of both ``up``, column j of ``down`` that of
    column j of both ``down``: the rank is the product of the ranks. Where that is more than a
    matrix of this shape can have, the change itself stands beside an identity.

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        Hyeon-Woo et al., FedPara (arXiv:2108.06098), Proposition 1; Khatri-Rao products: Kolda and
        Bader, Tensor Decompositions and Applications (2009), section 2.6.
    """
    (up1, down1), (up2, down2) = ((up.double(), down.double()) for up, down in (first, second))
    _refuse_misfits((up1, down1), (up2, down2))
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise ValueError("the two products differ in shape")
    rows, columns = up1.shape[0], down1.shape[1]
    rank = up1.shape[1] * up2.shape[1]
    if rank > min(rows, columns):
        return split_exactly((up1 @ down1) * (up2 @ down2))
    up = (up1[:, :, None] * up2[:, None, :]).reshape(rows, rank)
    down = (down1[:, None, :] * down2[None, :, :]).reshape(rank, columns)
    return up, down


def multiply_blocks(first: FactorPair, second: FactorPair) -> FactorPair:
    """Write (up1 down1) ⊗ (up2 down2), a LoKr's Kronecker product, as one product.

    (A B) ⊗ (C D) = (A ⊗ C)(B ⊗ D): the rank is the product of the ranks. A convolution's kernel
    belongs to the second factor, whose columns run within those of the first.

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        The mixed-product rule: Van Loan, The ubiquitous Kronecker product (2000), section 2; LoKr:
        LyCORIS (arXiv:2309.14859), section 3.2.
    """
    (up1, down1), (up2, down2) = ((up.double(), down.double()) for up, down in (first, second))
    _refuse_misfits((up1, down1), (up2, down2))
    rank = up1.shape[1] * up2.shape[1]
    if rank > min(up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1]):
        return split_exactly(torch.kron(up1 @ down1, up2 @ down2))
    return torch.kron(up1, up2), torch.kron(down1, down2)


def _refuse_misfits(*products: FactorPair) -> None:
    for up, down in products:
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"the factors' ranks differ: {up.shape[1]} and {down.shape[0]}")


def truncate_change(
    change: Matrix, rank: int | None = None, energy: float | None = None
) -> tuple[FactorPair, float]:
    """Find the product of a lower rank that comes nearest to a matrix, and say what is lost.

    Args:
        change: Any finite matrix.
        rank: The rank to keep, 1 or more; what exceeds the matrix's own is cut.
        energy: Or the share of the squared norm to keep, above 0 and up to 1: the lowest rank that
            keeps it, 1 or more.

    Returns:
        The factors, of equal norms, and the relative error ‖ΔW - up · down‖ / ‖ΔW‖ (Frobenius; 0
        for a matrix of zeros).

    Raises:
        ValueError: Unless exactly one of rank and energy is given, and in its range.

    Source:
        Eckart and Young, The approximation of one matrix by another of lower rank (1936). The
        singular vectors are the eigenvectors of the Gram matrix of the shorter side, in double
        precision: several times faster than an SVD, and exact for values above 1e-8 of the largest.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy, and not both")
    if rank is not None and rank < 1:
        raise ValueError(f"a rank must be 1 or more, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"an energy is a share above 0 and up to 1, got {energy}")
    whole = change.double()
    tall = whole.shape[0] > whole.shape[1]
    matrix = whole.T if tall else whole
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    kept = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None:
        total = squares.sum()
        # Rounding may leave the last sum just below 1.
        below = 0 if total == 0 else int((squares.cumsum(0) / total < energy - 1e-12).sum())
        kept = min(below + 1, len(squares))
    # Both factors get the root of the singular values, so that halves of them are in range alike.
    roots = squares[:kept].pow(0.25)
    left = vectors[:, :kept]
    right = left.T @ matrix
    norm = float(whole.norm())
    lost = float((matrix - left @ right).norm()) / norm if norm > 0 else 0.0
    safe = torch.where(roots > 0, roots, 1.0)
    left, right = left * roots, right / safe[:, None]
    return ((right.T, left.T) if tall else (left, right)), lost
