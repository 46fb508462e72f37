"""Assemble a layer's tensors (LoRA, LoHa, LoKr, DoRA, diff) to factors, alpha folded in.

A weight of a convolution is taken as a matrix: a row for each output, a column for each input and
place of the kernel. Products are computed in double precision and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Layer
from dreamloom.lora.tensors import is_finite

Parts = Mapping[str, Tensor]
"""The tensors of one layer by their part, as `key_names.split_key` names them."""
ScaleOf = Callable[[int], float]
"""From a rank to the scale of a LoRA whose file says nothing of the layer's own alpha."""

Matrix = Float[Tensor, "_ _"]


FactorPair = tuple[Matrix, Matrix]
"""Two matrices, up and down, whose product is the change."""

MAGNITUDES = {"magnitude", "dora_scale"}
"""The parts that make a DoRA of any product: the lengths of a weight's outputs or inputs."""
DORA = "DoRA"

_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOHA_CORES = {"hada_t1", "hada_t2"}
_LOKR_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_LOKR = [first | second for first in _LOKR_FIRST for second in _LOKR_SECOND]


def name_stored_kind(parts: Parts) -> str:
    """Name the kind of change that a layer's tensors make up; empty if they make up none."""
    names = set(parts) - {"alpha"}
    product = _name_product(names - MAGNITUDES, "alpha" in parts)
    if not names & MAGNITUDES:
        return product
    if len(names & MAGNITUDES) > 1 or product in ("", "full difference"):
        return ""
    return DORA if product == "LoRA" else f"{DORA} of a {product}"


def _name_product(names: set[str], has_alpha: bool) -> str:
    if names == {"down", "up"}:
        return "LoRA"
    if names == {"down", "mid", "up"}:
        return "LoRA with Tucker cores"
    if names in (_LOHA, _LOHA | _LOHA_CORES):
        return "LoHa"
    if names in _LOKR:
        return "LoKr"
    return "full difference" if names == {"diff"} and not has_alpha else ""


def assemble_layer(
    path: str, name: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf
) -> Layer:
    """Put a layer's tensors together as two factors, of ΔW = up · down.

    Of a DoRA it is the product whose direction the magnitudes lengthen, whatever kind of product
    that is: LyCORIS decomposes the sum of a weight and a LoHa, too.

    Args:
        path: The file, for messages.
        name: The layer, for messages.
        parts: The tensors of one of the kinds that `name_stored_kind` names, in any precision.
        kernel: Of the layer's convolution, where the tensors do not tell it; empty for a linear
            layer.
        scale_of: The scale of a plain LoRA without an alpha of its own.

    Raises:
        AdapterError: If the tensors' shapes do not fit together, or the change is infinite.
    """
    tensors = {part: tensor.float() for part, tensor in parts.items()}
    try:
        product = {part: tensor for part, tensor in tensors.items() if part not in MAGNITUDES}
        layer = _assemble(name_stored_kind(product), product, kernel, scale_of)
    except (ValueError, RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{part} is {tuple(t.shape)}" for part, t in sorted(tensors.items()))
        raise AdapterError(
            f"The factors of {name} in {path} do not fit together: {shapes}.",
            "The file may be damaged; get it again.",
        ) from error
    if not (is_finite(layer.up) and is_finite(layer.down)):
        raise AdapterError(
            f"The change of {name} in {path} is infinite: its alpha, or its factors, are too large "
            "for float32.",
            "The file may be damaged; get it again.",
        )
    return layer


def _assemble(kind: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf) -> Layer:
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError("the alpha is no single number")
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if kind == "full difference":
        # Bit for bit: one of the factors is an identity.
        change = parts["diff"]
        if change.ndim < 2:
            raise ValueError("a difference of a vector")
        return make_layer(split_exactly(change.flatten(1)), change.shape[2:])
    if kind in ("LoHa", "LoKr"):
        return assemble_product(kind, parts, kernel, lambda r: 1.0 if alpha is None else alpha / r)
    down, up = parts["down"], parts["up"]
    if kind == "LoRA with Tucker cores":
        down, core, up = down.flatten(1), parts["mid"], up.flatten(1)
        if up.shape[1] != core.shape[0]:
            raise ValueError("up and the core differ in rank")
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        return make_layer((up, contract_tucker(core, down)), core.shape[2:], scale)
    if up.ndim == 2 and down.ndim > 2:
        # DyLoRA keeps the outer factor of a convolution as a matrix.
        up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
    fits = (
        down.ndim >= 2
        and down.shape[0] > 0
        and up.ndim == down.ndim
        and up.shape[1] == down.shape[0]
        and all(side == 1 for side in up.shape[2:])
    )
    if not fits:
        raise ValueError("up and down differ in rank or in dimensions")
    rank = down.shape[0]
    scale = scale_of(rank) if alpha is None else alpha / rank
    return Layer(down.contiguous(), (up * scale).contiguous())


def assemble_product(
    kind: str, parts: Parts, kernel: Sequence[int], scale_of: ScaleOf, is_kohya: bool = True
) -> Layer:
    """Write a LoHa's or a LoKr's product as two factors.

    Args:
        kind: ``LoHa`` or ``LoKr``.
        parts: Its tensors, named as LyCORIS and PEFT do.
        kernel: Of the layer's convolution, where the tensors do not tell it.
        scale_of: From the rank in the file to the scale.
        is_kohya: Whether LyCORIS's rule holds: a LoKr of two whole blocks has no scale.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if kind == "LoHa":
        first = _read_hada(parts, "w1", "t1")
        second = _read_hada(parts, "w2", "t2")
        shape = parts["hada_t1"].shape[2:] if "hada_t1" in parts else kernel
        return make_layer(
            multiply_entries(first, second), shape, scale_of(parts["hada_w1_b"].shape[0])
        )
    first, second, inner = _read_blocks(parts)
    whole = "lokr_w1" in parts and "lokr_w2" in parts
    # The rank is found where there is one; PEFT divides by its setting all the same.
    ranks = [parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
    scale = 1.0 if whole and is_kohya else scale_of(ranks[0] if ranks else 0)
    return make_layer(multiply_blocks(first, second), inner or kernel, scale)


def _read_hada(parts: Parts, factor: str, core: str) -> FactorPair:
    up, down = parts[f"hada_{factor}_a"], parts[f"hada_{factor}_b"]
    if f"hada_{core}" not in parts:
        # OneTrainer keeps them in the shapes of convolutions.
        return up.flatten(1), down.flatten(1)
    # Beside a core, the outer factor lies on its side.
    return up.T, contract_tucker(parts[f"hada_{core}"], down)


def _read_blocks(parts: Parts) -> tuple[FactorPair, FactorPair, tuple[int, ...]]:
    """Read both blocks of a LoKr, and the kernel if the second one tells it."""
    if "lokr_w1" in parts:
        first = split_exactly(parts["lokr_w1"])
    else:
        first = parts["lokr_w1_a"], parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        block = parts["lokr_w2"]
        return first, split_exactly(block.flatten(1)), tuple(block.shape[2:])
    up, down = parts["lokr_w2_a"], parts["lokr_w2_b"]
    if "lokr_t2" in parts:
        core = parts["lokr_t2"]
        return first, (up.T, contract_tucker(core, down)), tuple(core.shape[2:])
    return first, (up, down.flatten(1)), tuple(down.shape[2:])


def stack_layers(layers: Sequence[Layer]) -> Layer:
    """Add changes of one layer exactly, by stacking their factors.

    Raises:
        ValueError: If their shapes differ.
    """
    if len(layers) == 1:
        return layers[0]
    if len({(layer.up.shape[0], layer.down.shape[1:]) for layer in layers}) > 1:
        raise ValueError("the changes differ in shape")
    return Layer(
        torch.cat([layer.down for layer in layers]),
        torch.cat([layer.up for layer in layers], dim=1),
    )


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
        return split_exactly(_place_blocks(up1 @ down1, up2 @ down2))
    return _place_blocks(up1, up2), _place_blocks(down1, down2)


def _place_blocks(outer: Matrix, inner: Matrix) -> Matrix:
    """The Kronecker product outer ⊗ inner; `torch.kron` refuses some transposed matrices."""
    rows, columns = outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1]
    return (outer[:, None, :, None] * inner[None, :, None, :]).reshape(rows, columns)


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
