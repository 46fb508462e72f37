"""Low-rank updates as two thin factors: norms, SVD and truncation without multiplying out.

Small matrices are float64 whatever the factors are: what nearly cancels, and squared lengths, would
lose half of float32's digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.lora.adapter import Layer

# Directions below this share of what went into them are rounding errors of float64.
_ROUNDING = 1e-14
# Up to here a Cholesky factor's backward error, 2⁻⁵³ times this, is 10⁻¹² of its columns.
_WELL_CONDITIONED = 1e4
# Differences below this share of a float32 matrix are not seen by the rounding of its products.
_CANCELS = 1e-3
# What a search for the strongest directions may lose beyond what it must: a share of that energy.
_SETTLED = 1e-5
# How many directions more than the rank a search adds at a time, how many times that must be
# possible, and up to what share of the shorter side it is quicker than an exact computation.
_MORE, _LEAST_STEPS, _WORTH_IT = 8, 4, 0.45
# About how many entries of a matrix are worked on at a time: 2 MiB in float64.
_NUMBERS_AT_ONCE = 2**18
_ROWS_AT_ONCE = 256


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
        roots, dtype = self.values[:rank].sqrt(), self.factors.up.dtype
        # Directions that nearly cancel are large on both sides of these products, so they are
        # multiplied in float64 and rounded only once.
        return Factors(
            (self.factors.up.double() @ (self.left[:, :rank] * roots)).to(dtype),
            ((self.right[:rank] / roots[:, None]) @ self.factors.down.double()).to(dtype),
        )

    def left_vectors(self) -> Float[Tensor, "outputs k"]:
        """The left singular vectors in float64: orthonormal columns."""
        return self.factors.up.double() @ self.left

    def right_vectors(self) -> Float[Tensor, "k inputs"]:
        """The right singular vectors in float64: orthonormal rows."""
        return (self.right / self.values[:, None]) @ self.factors.down.double()

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
        values=values, factors=factors, left=lower.T @ right.T / values, right=left.T @ upper
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
        if not failed:
            one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
            inverse = torch.linalg.solve_triangular(triangle, one, upper=True)
            if float(triangle.norm() * inverse.norm()) < _WELL_CONDITIONED:
                return triangle
    upper: Tensor = torch.linalg.qr(columns, mode="r").R
    return upper


@dataclass(frozen=True)
class Singular:
    """The singular values of a matrix that is no product, and its vectors on the shorter side.

    Args:
        values: Singular values, descending, in float64; only those above rounding.
        vectors: The singular vectors of the shorter side, orthonormal, in float64.
        matrix: The matrix.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "side k"]
    matrix: Float[Tensor, "outputs inputs"]

    def truncate(self, rank: int) -> Factors:
        """The nearest update of a rank, its factors equally long.

        Source:
            Eckart and Young, Psychometrika 1 (1936).
        """
        roots = self.values[:rank].sqrt()
        near = self.vectors[:, :rank]
        # The other side is what the matrix makes of these vectors, so weak directions, whose
        # vectors are the least certain, are kept with exactly the strength that they have.
        far = near.to(self.matrix.dtype).T @ _lay_wide(self.matrix)
        return _stand_up(near * roots, far.double() / roots[:, None], self.matrix)


def find_singular(matrix: Float[Tensor, "outputs inputs"]) -> Singular:
    """Find the singular values and vectors of a matrix from the inner products of its short side.

    Their squares are the eigenvalues of M Mᵀ. In float64 that costs a float32 matrix nothing: what
    squaring loses lies below √(2⁻⁵³) = 10⁻⁸ of the largest value, and the rounding of float32,
    below which everything is left out, is 10⁻⁷ of it.

    Args:
        matrix: In float32. One in float64 is decomposed without squaring.

    Source:
        Golub and Van Loan, Matrix Computations, section 8.6.
    """
    wide = _lay_wide(matrix)
    if matrix.dtype == torch.float64:
        vectors, values, _ = torch.linalg.svd(wide, full_matrices=False)
    else:
        squares, vectors = torch.linalg.eigh(_multiply_rows(wide))
        values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    alive = values > values[:1] * torch.finfo(matrix.dtype).eps
    return Singular(values[alive], vectors[:, alive], matrix)


def find_values(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " side"]:
    """All singular values of a matrix, descending, in float64; as sure as in `find_singular`."""
    if matrix.dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(matrix)
        return values
    squares: Tensor = torch.linalg.eigvalsh(_multiply_rows(_lay_wide(matrix)))
    return squares.clamp(min=0).sqrt().flip(0)


def _lay_wide(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "short long"]:
    """The matrix or its transpose: whichever has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _stand_up(
    near: Float[Tensor, "short rank"],
    far: Float[Tensor, "rank long"],
    matrix: Float[Tensor, "outputs inputs"],
) -> Factors:
    """Undo `_lay_wide` for a product, and give it the matrix's precision."""
    up, down = (near, far) if matrix.shape[0] <= matrix.shape[1] else (far.T, near.T)
    return Factors(up.to(matrix.dtype).contiguous(), down.to(matrix.dtype).contiguous())


def _multiply_rows(wide: Float[Tensor, "short long"]) -> Float[Tensor, "short short"]:
    """The inner products of a matrix's rows in float64, as far as they stand below the diagonal.

    No copy of the whole matrix is made in float64. A few products above the diagonal are left as
    they come; the eigenvalues of a symmetric matrix are computed from the others.
    """
    products = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=wide.device)
    for part in wide.split(max(1, _NUMBERS_AT_ONCE // max(1, len(wide))), dim=1):
        columns = part.double()
        for start in range(0, len(wide), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            products[start:, rows].addmm_(columns[start:], columns[rows].T)
    return products


def truncate_matrix(matrix: Float[Tensor, "outputs inputs"], rank: int) -> Factors:
    """The nearest update of a rank to a matrix that is no product, its factors equally long.

    A rank well below the matrix's sides is searched for, until the error is within about 10⁻⁵ of
    the least that is possible. Other ranks, and matrices whose singular values fall so slowly that
    the search does not end soon, are computed exactly. Nothing but the matrix and the rank decides
    what comes out, up to the rounding of products.

    Source:
        Eckart and Young, Psychometrika 1 (1936): what the least error is.
    """
    if rank == 0:
        return Factors(matrix[:, :0], matrix[:0])
    found = _search(matrix, rank)
    return find_singular(matrix).truncate(rank) if found is None else found


def frobenius(tensor: Tensor) -> float:
    """The Frobenius norm of a tensor of any shape, in float64 in one go."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def measure(matrix: Float[Tensor, "outputs inputs"]) -> float:
    """The Frobenius norm of a matrix, added up in float64 without a copy of it."""
    return math.hypot(*(float(rows.double().norm()) for rows in _split(matrix, matrix)))


def measure_rest(matrix: Float[Tensor, "outputs inputs"], factors: Factors) -> float:
    """The Frobenius norm of what factors leave out of a matrix: ‖M − up · down‖.

    It is taken from the difference itself, block by block, and in float64 where it is so small
    that the rounding of float32 would count.
    """
    rest = _subtract(matrix, factors.up, factors.down)
    if rest < _CANCELS * measure(matrix):
        rest = _subtract(matrix, factors.up.double(), factors.down.double())
    return rest


def _subtract(
    matrix: Float[Tensor, "outputs inputs"],
    up: Float[Tensor, "outputs rank"],
    down: Float[Tensor, "rank inputs"],
) -> float:
    pairs = zip(_split(matrix, matrix), _split(up, matrix), strict=True)
    rests = (torch.addmm(rows.to(up.dtype), left, down, alpha=-1) for rows, left in pairs)
    return math.hypot(*(float(rest.double().norm()) for rest in rests))


def _split(tensor: Float[Tensor, "outputs any"], matrix: Tensor) -> Iterator[Tensor]:
    """Give a tensor by as many rows at a time as shall be worked on of a matrix."""
    rows = max(1, _NUMBERS_AT_ONCE // max(1, matrix.shape[1]))
    yield from tensor.split(rows)


def _search(matrix: Float[Tensor, "outputs inputs"], rank: int) -> Factors | None:
    """Search for the strongest directions of a matrix by multiplying it with few at a time.

    It begins with random directions Ω and widens a basis Q of M Ω, M Mᵀ M Ω, and so on. The best
    matrix of the rank whose columns lie in Q comes from the small Qᵀ M. Its energy can only rise
    as Q is widened, and the search ends when what is still to come, told from the last two gains
    as if they were a geometric series, is small against what is lost. (They fall sooner.)

    Args:
        matrix: Of any shape.
        rank: 1 or above.

    Returns:
        The factors, or None if Q is or becomes too wide for the search to be worth it.

    Source:
        Halko, Martinsson and Tropp, Finding Structure with Randomness (arXiv:0909.4061),
        algorithm 4.4, which keeps the last basis only. To keep all finds the directions sooner
        where singular values fall slowly: Musco and Musco, Randomized Block Krylov Methods
        (arXiv:1504.05477), algorithm 2.
    """
    wide = _lay_wide(matrix)
    block, most = rank + _MORE, int(_WORTH_IT * len(wide))
    if _LEAST_STEPS * block > most:
        return None
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], block, generator=rng, dtype=matrix.dtype)
    basis = _Basis(wide, start.to(matrix.device))
    whole, kept, gain = measure(matrix) ** 2, 0.0, 0.0
    rounding = torch.finfo(matrix.dtype).eps ** 2 * whole
    while True:
        squares, turn = basis.find_strongest(rank)
        before, gain = gain, float(squares.sum()) - kept
        kept += gain
        lost = whole - kept
        if lost < _CANCELS * whole:
            lost = measure_rest(matrix, basis.cut(squares, turn, matrix)) ** 2
        # To come are gain · (q + q² + …) with q = gain / before. The first gain is all that random
        # directions found, and tells nothing of q.
        settled = basis.width > 2 * block and gain**2 <= _SETTLED * lost * (before - gain)
        # What is below the rounding of products need not be found, nor could it be.
        if settled or gain <= block * rounding or lost <= 16 * rounding:
            return basis.cut(squares, turn, matrix)
        if basis.width + block > most:
            return None
        basis.widen(block)


class _Basis:
    """Orthonormal directions among a matrix's rows, and what the matrix makes of them.

    Args:
        wide: The matrix M.
        start: Columns whose images span the first directions.
    """

    def __init__(
        self, wide: Float[Tensor, "short long"], start: Float[Tensor, "long block"]
    ) -> None:
        self._wide = wide
        self._directions = torch.zeros(len(wide), 0, dtype=torch.float64, device=wide.device)
        self._images = wide[:0]
        self._products = self._directions[:0]
        self._add(start)

    @property
    def width(self) -> int:
        """How many directions there are."""
        return len(self._images)

    def widen(self, by: int) -> None:
        """Add the directions that M Mᵀ makes of the last ones."""
        # Orthonormal in between, too: of M Mᵀ alone float32 loses what is below 10⁻⁴.
        self._add(torch.linalg.qr(self._images[-by:].T).Q)

    def _add(self, columns: Float[Tensor, "long block"]) -> None:
        fresh = (self._wide @ columns).double()
        # Where little of it is new, once leaves much of the old, and so does float32.
        for _ in range(2):
            fresh = fresh - self._directions @ (self._directions.T @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        images = fresh.to(self._wide.dtype).T @ self._wide
        self._directions = torch.cat([self._directions, fresh], dim=1)
        self._images = torch.cat([self._images, images])
        border = self._images.double() @ images.double().T
        beside = border[: len(self._products)]
        self._products = torch.cat([torch.cat([self._products, beside], dim=1), border.T])

    def find_strongest(self, rank: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "width k"]]:
        """The squares of the largest singular values within the basis, and their vectors in it."""
        squares, turn = torch.linalg.eigh(self._products)
        squares, turn = squares.flip(0)[:rank], turn.flip(1)[:, :rank]
        alive = squares > squares[:1] * torch.finfo(self._wide.dtype).eps ** 2
        return squares[alive], turn[:, alive]

    def cut(
        self,
        squares: Float[Tensor, " k"],
        turn: Float[Tensor, "width k"],
        matrix: Float[Tensor, "outputs inputs"],
    ) -> Factors:
        """The best approximation of the matrix by these vectors."""
        roots = squares.sqrt().sqrt()
        near, far = self._directions @ turn, turn.T @ self._images.double()
        return _stand_up(near * roots, far / roots[:, None], matrix)
