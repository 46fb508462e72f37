"""Methods on factors: each says what its formula says of dense matrices, to float64's digits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging import factors as products
from dreamloom.merging.blocks import parse_blocks
from dreamloom.merging.factors import (
    Factors,
    _Basis,
    _find_triangle,
    _search,
    balance,
    find_singular,
    find_spectrum,
    find_values,
    gram,
    measure,
    measure_rest,
    norm,
    stack,
    truncate_matrix,
)
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.merging.methods import METHODS
from dreamloom.merging.methods.matched import choose_equal_energy, match_norm
from dreamloom.merging.methods.median import choose_median
from dreamloom.merging.methods.perpendicular import choose_perpendicular
from dreamloom.merging.methods.singular_vectors import whiten
from dreamloom.merging.methods.slerp import choose_mean_direction, choose_on_arc
from dreamloom.merging.methods.stock import choose_by_agreement
from dreamloom.merging.ranks import keep_energy, parse_rank, spend_budget
from merges import assert_same, dense, names_of, random_adapter, random_layer, rewrite

MIXTURES = ("slerp", "karcher", "stock", "matched", "equal", "perpendicular", "median")
THIN = ("sum", *MIXTURES, "np", "tsv", "iso")
ORDERED = ("slerp", "perpendicular", "np")  # the order says which adapter is which
EXACTLY = 1e-10


def in_float64(adapter):
    return Adapter(
        {
            name: Layer(layer.down.double(), layer.up.double())
            for name, layer in adapter.layers.items()
        }
    )


def draw_adapters(seed, count=2, ranks=(3, 2, 4), kinds=("linear", "conv")):
    made = [
        random_adapter(seed * 10 + number, dict.fromkeys(kinds, ranks[number % len(ranks)]))
        for number in range(count)
    ]
    return [in_float64(adapter) for adapter in made]


def merged_by(method, some, weights, rank="full", blocks=(), **options):
    return combine(some, MergeRequest(weights, method, options, parse_rank(rank), blocks)).adapter


def count_for(method):
    return 3 if METHODS[method].least > 2 else 2


def scaled(adapter, factor):
    return Adapter(
        {name: Layer(layer.down, factor * layer.up) for name, layer in adapter.layers.items()}
    )


def vector(adapter, names):
    """All updates of an adapter as one long vector."""
    return torch.cat([dense(adapter, name).flatten() for name in names])


seeds = st.integers(0, 10**6)

# Spectra.


@st.composite
def factors(draw, dtype=None):
    """Factors of all sorts: deficient, of very different scales, nearly cancelling, wide, zero."""
    rng = torch.Generator().manual_seed(draw(seeds))
    outputs, inputs, rank = (draw(st.integers(1, 12)) for _ in range(3))
    up = torch.randn(outputs, rank, generator=rng, dtype=torch.float64)
    down = torch.randn(rank, inputs, generator=rng, dtype=torch.float64)
    sort = draw(st.sampled_from(["plain", "scaled", "deficient", "opposed", "zero", "graded"]))
    if sort == "scaled":
        scales = torch.logspace(-6, 6, rank, dtype=torch.float64)
        up, down = up * scales, down / scales[:, None]
    elif sort == "graded":
        up = up * torch.logspace(0, -5, rank, dtype=torch.float64)
    elif sort == "deficient":
        up[:, -1], down[0] = up[:, 0], 0
    elif sort == "opposed":
        up, down = torch.cat([up, -up], dim=1), torch.cat([down, down + 1e-3 * down.flip(1)])
    elif sort == "zero":
        up = up * 0
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    return Factors(up.to(dtype), down.to(dtype))


def find_dense(found):
    matrix = found.up.double() @ found.down.double()
    return matrix, *torch.linalg.svd(matrix, full_matrices=False)


@settings(max_examples=60)
@given(factors())
def test_singular_values_are_those_of_the_dense_matrix(made):
    matrix, _, values, _ = find_dense(made)
    spectrum = find_spectrum(made)
    kept = len(spectrum.values)
    size = float((made.up.double().norm(dim=0) * made.down.double().norm(dim=1)).sum())
    torch.testing.assert_close(spectrum.values, values[:kept], rtol=0, atol=1e-11 * size)
    epsilon = torch.finfo(made.up.dtype).eps
    assert (values[kept:] <= 2 * epsilon * values[:1] + 1e-13 * size).all()
    left, right = spectrum.left_vectors(), spectrum.right_vectors()
    rebuilt = left * spectrum.values @ right
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=2 * epsilon * size + 1e-300)


@settings(max_examples=60)
@given(factors())
def test_truncation_is_the_best_and_its_error_is_what_was_left_out(made):
    matrix, left, values, right = find_dense(made)
    spectrum = find_spectrum(made)
    size = float((made.up.double().norm(dim=0) * made.down.double().norm(dim=1)).sum())
    rounding = 8 * torch.finfo(made.up.dtype).eps * float(matrix.norm()) + 1e-14 * size
    errors = []
    for rank in range(len(spectrum.values) + 1):
        cut = spectrum.truncate(rank)
        error = float((cut.up.double() @ cut.down.double() - matrix).norm())
        best = float((left[:, :rank] * values[:rank] @ right[:rank] - matrix).norm())
        assert cut.rank == rank
        assert error <= best + rounding
        assert spectrum.lost(rank) == pytest.approx(best, abs=rounding + 1e-300)
        errors.append(spectrum.lost(rank))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert error <= rounding


@settings(max_examples=25)
@given(factors(torch.float64))
def test_singular_vectors_are_orthonormal(made):
    spectrum = find_spectrum(made)
    strong = spectrum.values > 1e-6 * spectrum.values[:1]
    one = torch.eye(int(strong.sum()), dtype=torch.float64)
    left, right = spectrum.left_vectors()[:, strong], spectrum.right_vectors()[strong]
    torch.testing.assert_close(left.T @ left, one, rtol=0, atol=1e-7)
    torch.testing.assert_close(right @ right.T, one, rtol=0, atol=1e-7)


def split_badly(condition, dtype):
    """An update of rank 8 with singular values from 1 to 0.1, in factors that nearly cancel."""
    rng = torch.Generator().manual_seed(3)
    left, right, turn = (
        torch.linalg.qr(torch.randn(side, 8, generator=rng, dtype=torch.float64)).Q
        for side in (60, 50, 8)
    )
    scales = torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)
    values = torch.linspace(1, 0.1, 8, dtype=torch.float64)
    return Factors((left * scales @ turn.T).to(dtype), (turn / scales * values @ right.T).to(dtype))


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_how_an_update_is_split_costs_no_digits(condition, dtype):
    made = split_badly(condition, dtype)
    matrix, _, values, _ = find_dense(made)
    spectrum = find_spectrum(made)
    torch.testing.assert_close(spectrum.values, values[:8], rtol=0, atol=1e-9)
    cut = spectrum.truncate(8)
    error = (cut.up.double() @ cut.down.double() - matrix).norm() / matrix.norm()
    assert error < 4 * torch.finfo(dtype).eps + 1e-9


def test_squares_in_float32_would_cost_them():
    """The negative control: eigenvalues of float32 Gram matrices, as tools compute them."""
    made = split_badly(1e4, torch.float32)
    _, _, values, _ = find_dense(made)
    lengths, turn = torch.linalg.eigh(made.up.T @ made.up)
    spread = lengths.clamp(min=0).sqrt()[:, None] * turn.T
    squares = torch.linalg.eigvalsh(spread @ (made.down @ made.down.T) @ spread.T)
    found = squares.clamp(min=0).sqrt().flip(0).double()
    assert (found - values[:8]).abs().max() > 1e-3


def test_both_triangles_give_the_same_products():
    rng = torch.Generator().manual_seed(4)
    columns = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    quick, careful = (_find_triangle(columns, quick) for quick in (True, False))
    torch.testing.assert_close(quick.T @ quick, careful.T @ careful, rtol=0, atol=1e-12)
    # Cholesky's has a positive diagonal; so it is seen that it was taken.
    assert (quick.diagonal() > 0).all()
    assert (careful.diagonal() < 0).any()
    columns[:, 1] = columns[:, 0] * (1 + 1e-9)
    torch.testing.assert_close(_find_triangle(columns, True), _find_triangle(columns, False))


@settings(max_examples=25)
@given(factors())
def test_balancing_rounds_nothing(made):
    balanced = balance(made)
    assert torch.equal(balanced.multiply(), made.multiply())
    ups, downs = balanced.up.norm(dim=0), balanced.down.norm(dim=1)
    alive = (ups > 0) & (downs > 0)
    assert (ups[alive] / downs[alive]).log2().abs().max() <= 1.001 if alive.any() else True
    assert not ups[~alive].any()
    assert not downs[~alive].any()


@settings(max_examples=25)
@given(factors(torch.float64))
def test_inner_products_are_those_of_dense_matrices(made):
    matrix = made.multiply()
    other = Factors(made.up.flip(0), made.down)
    expected = torch.stack([matrix.flatten(), other.multiply().flatten()])
    size = float(norm(made)) ** 2
    torch.testing.assert_close(
        gram([made, other]), expected @ expected.T, rtol=1e-6, atol=1e-9 * size + 1e-9
    )


# Matrices that are no products.

SPECTRA = {
    "slow": lambda place: place**-0.5,
    "fast": lambda place: torch.exp(-place / 4),
    "very fast": lambda place: torch.exp(-place),
    "a cliff at 20": lambda place: torch.where(place <= 20, 1.0, 0.05) * place**-0.1,
    "pairs": lambda place: 0.8 ** torch.ceil(place / 2),
}
SIDES = [(400, 500), (1600, 320), (320, 9 * 64), (480, 480)]
"""Wide, tall, a convolution's, square; large enough for a search at rank 12."""
FLOAT32 = torch.finfo(torch.float32).eps


def make_matrix(spectrum, sides, seed=0):
    """A matrix in float32 whose singular values are those of a spectrum, but for its rounding."""
    rng = torch.Generator().manual_seed(seed)
    short = min(sides)
    left, right = (
        torch.linalg.qr(torch.randn(side, short, generator=rng, dtype=torch.float64)).Q
        for side in sides
    )
    values = SPECTRA[spectrum](torch.arange(1, short + 1, dtype=torch.float64))
    return (left * values @ right.T).float()


def error_of(matrix, cut):
    return float((matrix.double() - cut.up.double() @ cut.down.double()).norm())


def least_error(matrix, rank):
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


def assert_nearest(matrix, cut, rank, excess=5e-6):
    """The error is the least that is possible, but for a share of it and the factors' rounding."""
    rounding = 4 * FLOAT32 * float(matrix.norm())
    assert error_of(matrix, cut) <= (1 + excess) * least_error(matrix, rank) + rounding


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_search_finds_what_is_nearest(spectrum, sides, monkeypatch):
    matrix = make_matrix(spectrum, sides)
    # Whatever it is, it is not found by the exact way.
    monkeypatch.setattr(products, "find_singular", None)
    for rank in (1, 5, 12):
        cut = truncate_matrix(matrix, rank)
        assert (cut.shape, cut.rank, cut.up.dtype) == (sides, rank, torch.float32)
        assert_nearest(matrix, cut, rank)
        torch.testing.assert_close(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-5, atol=0)


def test_random_directions_alone_would_not():
    """The negative control: one look at M Ω, as the plain range finder has it."""
    for spectrum, more in (("slow", 0.05), ("a cliff at 20", 0.02), ("fast", 0.05)):
        matrix = make_matrix(spectrum, SIDES[0])
        rng = torch.Generator().manual_seed(0)
        basis = _Basis(matrix, torch.randn(500, 12 + 8, generator=rng))
        cut = basis.cut(*basis.find_strongest(12), matrix)
        assert error_of(matrix, cut) > (1 + more) * least_error(matrix, 12)


def test_where_the_search_does_not_end_soon_it_is_computed_exactly():
    """Noise has no strongest directions worth the name; a rank near the sides is not searched."""
    noise = torch.randn(400, 500, generator=torch.Generator().manual_seed(5))
    assert _search(noise, 30) is None
    assert_nearest(noise, truncate_matrix(noise, 30), 30, excess=1e-9)
    matrix = make_matrix("slow", SIDES[0])
    assert _search(matrix, 100) is None
    for rank in (100, 399, 400, 1000):
        assert_nearest(matrix, truncate_matrix(matrix, rank), rank, excess=1e-9)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(sorted(SPECTRA)), seeds)
def test_small_matrices_are_cut_to_what_is_nearest(outputs, inputs, spectrum, seed):
    matrix = make_matrix(spectrum, (outputs, inputs), seed)
    for rank in range(min(outputs, inputs) + 1):
        cut = find_singular(matrix).truncate(rank)
        assert cut.rank <= rank
        assert_nearest(matrix, cut, rank, excess=1e-6)
        assert_nearest(matrix, truncate_matrix(matrix, rank), rank)


@pytest.mark.parametrize(
    "cut_by", [truncate_matrix, lambda m, rank: find_singular(m).truncate(rank)]
)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_a_matrix_of_low_rank_comes_back(cut_by, sides, rank):
    """Also where the search begins with less, or with more directions than there are."""
    rng = torch.Generator().manual_seed(rank)
    up = torch.randn(sides[0], rank, generator=rng)
    matrix = up @ torch.randn(rank, sides[1], generator=rng)
    cut = cut_by(matrix, 30)
    # The rounding of the matrix's own entries is no direction.
    assert cut.rank == rank
    assert error_of(matrix, cut) < 8 * FLOAT32 * float(matrix.norm())
    assert_nearest(matrix, cut_by(matrix, 4), 4)


def test_of_nothing_nothing_is_left():
    for sides in [*SIDES, (3, 2), (1, 1)]:
        cut = truncate_matrix(torch.zeros(sides), 12)
        assert (cut.shape, cut.rank) == (sides, 0)
        assert truncate_matrix(torch.ones(sides), 0).rank == 0
        assert find_singular(torch.zeros(sides)).truncate(12).rank == 0
        assert not find_values(torch.zeros(sides)).any()
        assert measure_rest(torch.zeros(sides), cut) == 0


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_neither_size_nor_orientation_matters(factor):
    matrix = make_matrix("slow", SIDES[0])
    cut = truncate_matrix(matrix, 12)
    scaled = truncate_matrix(factor * matrix, 12)
    whole = float(matrix.norm())
    assert float((scaled.multiply() / factor - cut.multiply()).norm()) < 1e-3 * whole
    assert_nearest(matrix, Factors(scaled.up / factor, scaled.down), 12)
    turned = truncate_matrix(matrix.T.contiguous(), 12)
    assert float((turned.multiply().T - cut.multiply()).norm()) < 1e-3 * whole


def test_the_same_matrix_is_always_cut_alike():
    matrix = make_matrix("slow", SIDES[0])
    torch.manual_seed(1)
    first, following = truncate_matrix(matrix, 12), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), following)  # nobody else's dice are thrown
    truncate_matrix(make_matrix("fast", SIDES[1]), 5)
    again = truncate_matrix(matrix.clone(), 12)
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = truncate_matrix(matrix, 12)
    finally:
        torch.set_num_threads(threads)
    assert float((other.multiply() - first.multiply()).norm()) < 1e-4 * float(matrix.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("sides", [(40, 50), (160, 32)])
def test_values_are_as_sure_as_those_of_a_decomposition_in_float32(spectrum, sides):
    matrix = make_matrix(spectrum, sides)
    exact = torch.linalg.svdvals(matrix.double())
    theirs = (torch.linalg.svdvals(matrix).double() - exact).abs().max()
    for values in (find_values(matrix), find_singular(matrix).values):
        assert values.dtype == torch.float64
        kept = exact[: len(values)]
        assert (values - kept).abs().max() < max(1e-7 * float(exact[0]), float(theirs))
        # Squares in float64: above 10⁻⁴ of the largest, twice the digits of float32.
        large = kept > 1e-4 * exact[0]
        torch.testing.assert_close(values[large], kept[large], rtol=1e-7, atol=0)
        for share in (0.5, 0.9, 0.999, 0.9999):
            assert keep_energy(values, share) == keep_energy(exact, share)
    # Nothing above the rounding of float32 is left out, and nothing below it is kept.
    kept = len(find_singular(matrix).values)
    assert (exact[:kept] > 0.5 * FLOAT32 * exact[0]).all()
    assert (exact[kept:] < 2 * FLOAT32 * exact[0]).all()


@pytest.mark.parametrize("small", [1.0, 1e-2, 1e-4, 1e-6])
def test_what_is_lost_is_measured_to_its_own_digits(small):
    rng = torch.Generator().manual_seed(6)
    cut = Factors(torch.randn(900, 5, generator=rng), torch.randn(5, 700, generator=rng))
    matrix = cut.multiply() + small * torch.randn(900, 700, generator=rng)
    exact = error_of(matrix, cut)
    assert measure_rest(matrix, cut) == pytest.approx(exact, rel=1e-6)
    assert measure_rest(matrix.T, Factors(cut.down.T, cut.up.T)) == pytest.approx(exact, rel=1e-6)
    assert measure(matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-12)
    if small == 1e-6:
        # The negative control: the difference of two squares, even of exact ones.
        squared = measure(matrix) ** 2 - norm(cut) ** 2
        assert abs(max(squared, 0.0) ** 0.5 - exact) > 0.5 * exact


def test_a_matrix_in_float64_keeps_its_digits():
    rng = torch.Generator().manual_seed(7)
    matrix = torch.randn(30, 20, generator=rng, dtype=torch.float64)
    matrix = matrix * torch.logspace(0, -12, 20, dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(find_values(matrix), exact, rtol=0, atol=1e-15)
    assert len(find_singular(matrix).values) == 20
    rest = measure_rest(matrix, truncate_matrix(matrix, 15))
    assert rest == pytest.approx(float(exact[15:].norm()), rel=1e-3)


# Ranks.


@st.composite
def spectra(draw):
    layers = draw(st.integers(1, 5))
    value = st.floats(0.01, 10)
    values, costs = {}, {}
    for number in range(layers):
        made = sorted(draw(st.lists(value, min_size=0, max_size=6)), reverse=True)
        values[f"unet.{number}"] = torch.tensor(made, dtype=torch.float64)
        costs[f"unet.{number}"] = draw(st.integers(1, 40))
    return values, costs


def energy_of(values, ranks):
    return sum(float(values[name][:rank].square().sum()) for name, rank in ranks.items())


def cost_of(costs, ranks):
    return sum(costs[name] * rank for name, rank in ranks.items())


@settings(max_examples=60)
@given(spectra(), st.floats(0, 1))
def test_a_budget_is_kept_and_no_uniform_rank_keeps_more(spectrum, share):
    values, costs = spectrum
    least = {name: min(1, len(found)) for name, found in values.items()}
    whole = {name: len(found) for name, found in values.items()}
    low, high = cost_of(costs, least), cost_of(costs, whole)
    budget = low + share * (high - low)
    ranks = spend_budget(values, costs, budget)
    assert cost_of(costs, ranks) <= budget
    assert all(least[name] <= rank <= whole[name] for name, rank in ranks.items())
    for rank in range(1, 7):
        uniform = {name: min(rank, length) for name, length in whole.items()}
        if cost_of(costs, uniform) <= budget:
            assert energy_of(values, ranks) >= energy_of(values, uniform) - 1e-9
    assert spend_budget(values, costs, float(high)) == whole
    if low > 0:
        with pytest.raises(ConfigError, match="rank 1 in every layer needs"):
            spend_budget(values, costs, low - 1.0)


def test_the_worthiest_directions_are_bought_first_and_a_uniform_rank_is_beaten():
    values = {
        "unet.a": torch.tensor([4.0, 3.0, 2.0, 1.0]),
        "unet.b": torch.tensor([1.0, 0.1, 0.1, 0.1]),
    }
    costs = {"unet.a": 10, "unet.b": 10}
    assert spend_budget(values, costs, 40.0) == {"unet.a": 3, "unet.b": 1}
    # Worth counts by length: the strong direction costs too much to be the better one.
    values = {"unet.a": torch.tensor([4.0, 2.0]), "unet.b": torch.tensor([4.0, 1.9, 1.8])}
    assert spend_budget(values, {"unet.a": 30, "unet.b": 10}, 70.0) == {"unet.a": 1, "unet.b": 3}


@pytest.mark.parametrize("text", ["budget:4MB", "budget:100GB", "budget:1.5kB", "budget:600B"])
def test_a_budget_is_told_as_it_is_typed(text):
    assert str(parse_rank(text)) == text


@settings(max_examples=100)
@given(
    st.one_of(
        st.floats(1e-9, 1.0).map(lambda share: f"energy:{share}"),
        st.integers(1, 10**12).map(lambda size: f"budget:{size}"),
        st.floats(1e-3, 1e3).map(lambda size: f"budget:{size:.9f}MiB"),
        st.integers(1, 10**6).map(str),
        st.just("full"),
    )
)
def test_a_rank_is_read_back_as_it_is_told(text):
    """A certificate keeps the rank as a word, and verifying reads it again."""
    request = parse_rank(text)
    assert parse_rank(str(request)) == request


@settings(max_examples=50)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_an_energy_share_is_reached_by_the_fewest_directions(values, share):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    count = keep_energy(values, share)
    energy = values.square()
    assert energy[:count].sum() >= share * energy.sum() - 1e-12
    assert count == 1 or energy[: count - 1].sum() < share * energy.sum()


@pytest.mark.parametrize("method", THIN)
def test_a_rank_cuts_what_the_method_says_to_the_best_of_that_rank(method):
    some = draw_adapters(1, count_for(method))
    weights = [0.8, 0.6, 0.5][: len(some)]
    whole = merged_by(method, some, weights)
    for rank in (1, 3, 40):
        if rank > max(whole.ranks.values()):
            continue
        done = combine(some, MergeRequest(weights, method, rank=parse_rank(str(rank))))
        for name in whole.layers:
            exact = dense(whole, name).flatten(1)
            values = torch.linalg.svdvals(exact)
            lost = (dense(done.adapter, name).flatten(1) - exact).norm()
            assert float(lost) == pytest.approx(float(values[rank:].norm()), abs=1e-9)
            assert done.reports[name].error == pytest.approx(
                float(lost / exact.norm()), abs=EXACTLY
            )
            assert done.reports[name].norm == pytest.approx(float(values[:rank].norm()))


def test_the_error_over_all_layers_is_what_was_lost_of_what_there_was():
    some = draw_adapters(2)
    whole = merged_by("sum", some, [1.0, 1.0])
    done = combine(some, MergeRequest([1.0, 1.0], rank=parse_rank("2")))
    names = names_of([whole])
    lost = vector(done.adapter, names) - vector(whole, names)
    assert done.error == pytest.approx(float(lost.norm() / vector(whole, names).norm()))


# What holds for all of them.


@pytest.mark.parametrize("method", [name for name in THIN if METHODS[name].least == 1])
def test_one_adapter_at_weight_1_is_itself_to_the_last_digits(method):
    one = draw_adapters(3, 1)
    if METHODS[method].keeps_one:
        assert_same(merged_by(method, one, [1.0]), one[0], atol=EXACTLY)


@pytest.mark.parametrize("method", THIN)
@settings(max_examples=4)
@given(seed=seeds, weights=st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_the_split_into_factors_does_not_matter(method, seed, weights):
    some = draw_adapters(seed, count_for(method))
    rewritten = [in_float64(rewrite_exactly(adapter, seed)) for adapter in some]
    weights = weights[: len(some)]
    assert_same(merged_by(method, rewritten, weights), merged_by(method, some, weights), atol=1e-8)


def rewrite_exactly(adapter, seed):
    """As `rewrite`, but in float64, and with the directions in another order."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in adapter.layers.items():
        order = torch.randperm(layer.rank, generator=rng)
        turn = torch.linalg.qr(
            torch.randn(layer.rank, layer.rank, generator=rng, dtype=torch.float64)
        ).Q * (torch.rand(layer.rank, generator=rng, dtype=torch.float64) + 0.5)
        down = torch.linalg.solve(turn, layer.down[order].flatten(1)).view_as(layer.down)
        up = (layer.up[:, order].flatten(1) @ turn).view_as(layer.up)
        layers[name] = Layer(down, up)
    return Adapter(layers)


@pytest.mark.parametrize("method", THIN)
@settings(max_examples=8)
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_twice_the_adapters_are_twice_the_result(method, seed, factor):
    some = draw_adapters(seed, count_for(method))
    weights = [0.7, 1.1, 0.4][: len(some)]
    once = merged_by(method, some, weights)
    more = merged_by(method, [scaled(adapter, factor) for adapter in some], weights)
    assert_same(more, scaled(once, factor), atol=1e-8 * factor + 1e-8)


@pytest.mark.parametrize("method", [name for name in THIN if name not in ORDERED])
def test_the_order_of_adapters_does_not_matter(method):
    some = draw_adapters(5, 3)
    weights = [0.7, -1.1, 0.4]
    turned = merged_by(method, some[::-1], weights[::-1])
    assert_same(turned, merged_by(method, some, weights), atol=1e-8)


@pytest.mark.parametrize("method", [name for name in THIN if METHODS[name].most is None])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_weight_of_zero_is_as_if_the_adapter_were_not_there(method, scope):
    some = draw_adapters(6, 4)
    options = {"scope": scope} if "scope" in METHODS[method].read_options({}) else {}
    without = merged_by(method, some[:3], [0.7, 1.1, 0.4], **options)
    with_zero = merged_by(method, some, [0.7, 1.1, 0.4, 0.0], **options)
    assert_same(with_zero, without, atol=EXACTLY)


@pytest.mark.parametrize("method", THIN)
def test_a_layer_that_one_adapter_alone_changes_is_merged_from_that_one(method):
    """In its own scope a layer is what the adapters that change it make of it."""
    some = draw_adapters(7, count_for(method), kinds=("linear",))
    rng = torch.Generator().manual_seed(8)
    lonely = in_float64(Adapter({"unet.alone": random_layer(2, rng)})).layers["unet.alone"]
    some[0] = Adapter({**some[0].layers, "unet.alone": lonely})
    merged = merged_by(method, some, [1.0] * len(some))
    found = dense(merged, "unet.alone")
    expected = dense(some[0], "unet.alone")
    if method == "iso":
        values = torch.linalg.svdvals(found)[:2]
        assert values[0] == pytest.approx(values[1])
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACTLY)


# Mixtures, against their formulas on dense vectors.


def slerp_dense(one, other, t):
    angle = torch.acos((one @ other) / one.norm() / other.norm())
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


def karcher_dense(vectors, shares):
    units = [v / v.norm() for v in vectors]
    mean = sum(a * u for a, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(500):
        step = torch.zeros_like(mean)
        for a, u in zip(shares, units, strict=True):
            angle = torch.acos((mean @ u).clamp(-1, 1))
            step += a * angle / torch.sin(angle) * (u - (mean @ u) * mean)
        length = step.norm()
        if length < 1e-14:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * step / length
    return mean * sum(a * v.norm() for a, v in zip(shares, vectors, strict=True))


def stock_dense(vectors, shares):
    count = len(vectors)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosine = sum(vectors[i] @ vectors[j] / vectors[i].norm() / vectors[j].norm() for i, j in pairs)
    cosine = max(float(cosine) / len(pairs), 0.0)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(a * v for a, v in zip(shares, vectors, strict=True))


def matched_dense(vectors, weights):
    parts = [w * v for w, v in zip(weights, vectors, strict=True)]
    total = sum(parts)
    return total / total.norm() * max(part.norm() for part in parts)


def equal_dense(vectors, weights):
    mean = sum(w * v.norm() for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    return sum(w * mean * v / v.norm() for w, v in zip(weights, vectors, strict=True))


def perpendicular_dense(vectors, weights):
    basis, total = [], torch.zeros_like(vectors[0])
    for weight, v in zip(weights, vectors, strict=True):
        new = v.clone()
        for direction in basis:
            new -= (new @ direction) * direction
        total += weight * new
        basis.append(new / new.norm())
    return total


def as_shares(weights):
    return [weight / sum(weights) for weight in weights]


DENSE = {
    "slerp": lambda vectors, weights: slerp_dense(*vectors, as_shares(weights)[1]),
    "karcher": lambda vectors, weights: karcher_dense(vectors, as_shares(weights)),
    "stock": lambda vectors, weights: stock_dense(vectors, as_shares(weights)),
    "matched": matched_dense,
    "equal": equal_dense,
    "perpendicular": perpendicular_dense,
}


def related(seed, count):
    """Adapters with something in common, so that angles are neither 0 nor 90 degrees."""
    some = draw_adapters(seed, count)
    common = draw_adapters(seed + 1, 1)[0]
    return [merged_by("sum", [adapter, common], [1.0, 0.8]) for adapter in some]


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("scope", ["layer", "model"])
@settings(max_examples=6)
@given(seed=seeds, weights=st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_a_mixture_is_its_formula_on_dense_vectors(method, scope, seed, weights):
    count = 2 if method == "slerp" else 3
    some, weights = related(seed, count), weights[:count]
    # A negative weight turns its update around.
    signed = [-weights[0], *weights[1:]]
    merged = merged_by(method, some, signed, scope=scope)
    names = sorted(names_of(some))
    turned = [scaled(some[0], -1.0), *some[1:]]
    for group in [names] if scope == "model" else [[name] for name in names]:
        expected = DENSE[method]([vector(adapter, group) for adapter in turned], weights)
        torch.testing.assert_close(vector(merged, group), expected, rtol=0, atol=1e-7)


@settings(max_examples=10)
@given(seed=seeds, weights=st.lists(st.floats(0.1, 2), min_size=4, max_size=4))
def test_no_point_is_nearer_to_all_than_the_median(seed, weights):
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    points[3] *= 20
    sizes = torch.tensor(weights, dtype=torch.float64)

    def far(point):
        return float(sizes @ (points - point).norm(dim=1))

    median = choose_median(points @ points.T, sizes) @ points
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            step = torch.randn(6, generator=rng, dtype=torch.float64)
            assert far(median) <= far(median + scale * step) + 1e-7
    assert far(median) <= min(map(far, points)) + 1e-7


def test_one_that_failed_hardly_moves_the_median():
    good = related(9, 1)[0]
    wild = scaled(draw_adapters(10, 1)[0], 50.0)
    some = [good, good, wild]
    assert_same(merged_by("median", some, [1.0, 1.0, 1.0]), good, atol=1e-5)
    average = merged_by("sum", some, [1 / 3] * 3)
    assert vector(average, names_of(some)).norm() > 5 * vector(good, names_of(some)).norm()


def test_the_ends_of_an_arc_are_the_updates_themselves():
    one, other = related(11, 2)
    assert_same(merged_by("slerp", [one, other], [1.0, 1e-12]), one, atol=1e-9)
    assert_same(merged_by("slerp", [one, other], [0.0, 0.3]), other, atol=EXACTLY)
    assert_same(merged_by("slerp", [one, one], [0.4, 0.9]), one, atol=EXACTLY)
    assert_same(
        merged_by("slerp", [one, other], [1.0, 1e-12], strength=0.5), scaled(one, 0.5), 1e-9
    )


def test_opposite_updates_have_no_arc_and_stay_finite():
    products = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    shares = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert choose_on_arc(products, shares).tolist() == [0.25, 0.75]
    assert torch.isfinite(choose_mean_direction(products, shares)).all()
    assert choose_by_agreement(products, shares).tolist() == [0.0, 0.0]
    assert match_norm(products, torch.ones(2, dtype=torch.float64), "largest").tolist() == [1, 1]


@settings(max_examples=15)
@given(seed=seeds)
def test_the_mean_of_two_equally_long_updates_is_halfway_on_the_arc(seed):
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    points /= points.norm(dim=1, keepdim=True)
    products, both = points @ points.T, torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(
        choose_mean_direction(products, both), choose_on_arc(products, both), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("size", ["largest", "mean", "added"])
def test_a_matched_sum_has_the_norm_that_was_asked_for(size):
    some, weights = draw_adapters(12, 3), [0.5, -1.0, 2.0]
    merged = merged_by("matched", some, weights, size=size, scope="model")
    names = names_of(some)
    norms = [
        abs(weight) * float(vector(adapter, names).norm())
        for adapter, weight in zip(some, weights, strict=True)
    ]
    wanted = {"largest": max(norms), "mean": sum(norms) / 3, "added": sum(norms)}[size]
    assert float(vector(merged, names).norm()) == pytest.approx(wanted)


def test_equal_parts_are_equally_strong_whatever_they_were():
    one, other = draw_adapters(13, 2, kinds=("linear",))
    loud = scaled(other, 100.0)
    sizes = torch.tensor([1.0, 1.0], dtype=torch.float64)
    products = torch.tensor([[4.0, 0.0], [0.0, 900.0]], dtype=torch.float64)
    assert choose_equal_energy(products, sizes).tolist() == [8.0, pytest.approx(16 / 30)]
    merged = merged_by("equal", [one, loud], [1.0, 1.0])
    name = "unet.linear"
    parts = torch.stack([dense(one, name).flatten(), dense(loud, name).flatten()])
    found = torch.linalg.lstsq(parts.T, dense(merged, name).flatten()[:, None]).solution.flatten()
    assert found[0] * parts[0].norm() == pytest.approx(float(found[1] * parts[1].norm()))


def test_the_first_update_keeps_exactly_its_weight():
    some = related(14, 3)
    merged = merged_by("perpendicular", some, [0.7, 1.0, -2.0], scope="model")
    names = sorted(names_of(some))
    first, total = vector(some[0], names), vector(merged, names)
    assert float(total @ first) == pytest.approx(0.7 * float(first @ first))
    repeated = merged_by("perpendicular", [some[0], some[0]], [0.7, 5.0])
    assert_same(repeated, scaled(some[0], 0.7), atol=1e-8)
    products = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    assert choose_perpendicular(products, one).tolist() == [0.5, 1.0]


def test_stock_of_trainings_that_share_nothing_is_the_base():
    products = torch.eye(3, dtype=torch.float64)
    assert choose_by_agreement(products, torch.ones(3, dtype=torch.float64)).tolist() == [0.0] * 3


# Null space.


def project(matrix, directions, share=1.0):
    return matrix - share * matrix @ directions.T @ directions


def row_space(matrix, rank):
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]


@pytest.mark.parametrize("mu", [0.0, 0.5, 3.0, 1e9])
def test_a_soft_projection_is_the_formula_and_without_mu_the_sum(mu):
    subject, style = draw_adapters(15, 2)
    merged = merged_by("np", [subject, style], [0.8, 1.2], mu=mu)
    for name in names_of([subject]):
        one, other = (dense(adapter, name).flatten(1) for adapter in (subject, style))
        rank = style.layers[name].rank
        expected = 1.2 * other + 0.8 * project(one, row_space(other, rank), mu / (1 + mu))
        torch.testing.assert_close(dense(merged, name).flatten(1), expected, rtol=0, atol=1e-9)
    if mu == 0:
        assert_same(merged, merged_by("sum", [subject, style], [0.8, 1.2]), atol=EXACTLY)


@settings(max_examples=10)
@given(seed=seeds)
def test_projected_hard_the_merge_reads_the_styles_inputs_as_the_style_alone_does(seed):
    subject, style = draw_adapters(seed, 2, ranks=(4, 2))
    merged = merged_by("np", [subject, style], [1.0, 1.0], projection="hard")
    for name in names_of([subject]):
        other = dense(style, name).flatten(1)
        inputs = row_space(other, 2).T
        torch.testing.assert_close(
            dense(merged, name).flatten(1) @ inputs, other @ inputs, rtol=0, atol=1e-9
        )
        assert (dense(merged, name).flatten(1) @ inputs - other @ inputs).norm() < 1e-9


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_adapters_that_share_no_direction_are_simply_added(side):
    layers = []
    for number in range(2):
        rng = torch.Generator().manual_seed(number)
        up, down = torch.zeros(8, 2).double(), torch.zeros(2, 8).double()
        part = slice(4 * number, 4 * number + 4)
        up[part], down[:, part] = (
            torch.randn(4, 2, generator=rng),
            torch.randn(2, 4, generator=rng),
        )
        layers.append(Adapter({"unet.x": Layer(down, up)}))
    for options in ({"mu": 0.7}, {"projection": "hard"}):
        assert_same(
            merged_by("np", layers, [0.8, -0.6], side=side, **options),
            merged_by("sum", layers, [0.8, -0.6]),
            atol=EXACTLY,
        )


def test_outputs_can_be_kept_free_too():
    subject, style = draw_adapters(16, 2, kinds=("linear",))
    one, other = dense(subject, "unet.linear"), dense(style, "unet.linear")
    left = row_space(other.T, 2)
    free = {
        "output": project(one.T, left).T,
        "both": project(project(one.T, left).T, row_space(other, 2)),
    }
    for side, expected in free.items():
        merged = merged_by("np", [subject, style], [1.0, 1.0], projection="hard", side=side)
        torch.testing.assert_close(
            dense(merged, "unet.linear"), other + expected, atol=1e-9, rtol=0
        )


def test_who_is_protected_and_how_widely_can_be_chosen():
    some = draw_adapters(17, 3, kinds=("linear",))
    first, second, third = (dense(adapter, "unet.linear") for adapter in some)
    merged = merged_by("np", some, [1.0, 1.0, 1.0], projection="hard", protected=1)
    expected = first + project(second + third, row_space(first, 3))
    torch.testing.assert_close(dense(merged, "unet.linear"), expected, rtol=0, atol=1e-9)
    narrow = combine(some, MergeRequest([1.0] * 3, "np", {"projection": "hard", "energy": 0.0}))
    expected = third + project(first + second, row_space(third, 1))
    torch.testing.assert_close(dense(narrow.adapter, "unet.linear"), expected, rtol=0, atol=1e-9)
    assert narrow.reports["unet.linear"].notes == {"protected directions": 1.0}
    with pytest.raises(ConfigError, match=r"Adapter 4 cannot be protected, for there are 3\."):
        merged_by("np", some, [1.0] * 3, protected=4)
    with pytest.raises(ConfigError, match="mu cannot be -1"):
        merged_by("np", some, [1.0] * 3, mu=-1)


def test_projecting_the_style_instead_is_something_else():
    """The negative control: which adapter is protected decides."""
    subject, style = draw_adapters(18, 2, ranks=(4, 4), kinds=("linear",))
    one, other = (
        merged_by("np", [subject, style], [1.0, 1.0], projection="hard", protected=number)
        for number in (1, 2)
    )
    assert (dense(one, "unet.linear") - dense(other, "unet.linear")).norm() > 0.1


# Singular vectors.


def tsv_dense(matrices, ranks, weights):
    """TSV-Merge as it is written: dense SVDs, and Procrustes' solution of each side."""
    triplets = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = torch.cat([t.U[:, :r] for t, r in zip(triplets, ranks, strict=True)], dim=1)
    right = torch.cat([t.Vh[:r] for t, r in zip(triplets, ranks, strict=True)])
    values = torch.cat([w * t.S[:r] for t, r, w in zip(triplets, ranks, weights, strict=True)])
    sides = []
    for side in (left, right.T):
        p, _, q = torch.linalg.svd(side, full_matrices=False)
        sides.append(p @ q)
    return sides[0] * values @ sides[1].T


@settings(max_examples=10)
@given(seed=seeds, weights=st.lists(st.floats(-2, 2).filter(bool), min_size=2, max_size=2))
def test_whitened_singular_vectors_are_those_of_the_dense_method(seed, weights):
    some = draw_adapters(seed, 2, ranks=(2, 1))
    merged = combine(some, MergeRequest(weights, "tsv"))
    for name in names_of(some):
        matrices = [dense(adapter, name).flatten(1) for adapter in some]
        expected = tsv_dense(matrices, [2, 1], weights)
        condition = merged.reports[name].notes["condition"]
        assert condition >= 1
        if condition < 1e4:
            torch.testing.assert_close(
                dense(merged.adapter, name).flatten(1), expected, rtol=0, atol=1e-8
            )


def test_a_direction_that_is_shared_makes_no_noise():
    one = draw_adapters(19, 1)[0]
    twice = combine([one, one], MergeRequest([1.0, 1.0], "tsv"))
    # What both say counts once, not twice.
    assert_same(twice.adapter, one, atol=1e-6)
    assert all(report.notes["condition"] > 1e12 for report in twice.reports.values())
    noisy = draw_adapters(20, 1)[0]
    nearly = merged_by("sum", [one, noisy], [1.0, 1e-9])
    assert_same(merged_by("tsv", [one, nearly], [1.0, 1.0]), one, atol=1e-4)


def test_perpendicular_vectors_are_left_alone():
    basis = torch.linalg.qr(
        torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    ).Q
    whitened, condition = whiten(basis)
    torch.testing.assert_close(whitened, basis, rtol=0, atol=EXACTLY)
    assert condition == pytest.approx(1.0)
    whitened, condition = whiten(torch.ones(5, 2, dtype=torch.float64) / 5**0.5)
    assert condition > 1e12
    assert torch.isfinite(whitened).all()


# Isotropy.


@settings(max_examples=10)
@given(seed=seeds)
def test_all_directions_of_the_sum_become_equally_strong(seed):
    some = draw_adapters(seed, 2, ranks=(2, 1))
    merged = merged_by("iso", some, [1.0, -0.5], strength=2.0)
    whole = merged_by("sum", some, [1.0, -0.5])
    for name in names_of(some):
        left, values, right = torch.linalg.svd(dense(whole, name).flatten(1), full_matrices=False)
        expected = 2.0 * values[:3].mean() * left[:, :3] @ right[:3]
        torch.testing.assert_close(dense(merged, name).flatten(1), expected, rtol=0, atol=1e-7)


def test_rounding_does_not_become_a_direction():
    one = random_adapter(21, {"linear": 2})
    halves = merged_by("iso", [one, rewrite(one, 3)], [0.5, 0.5])
    values = torch.linalg.svdvals(dense(halves, "unet.linear"))
    assert (values > 1e-3).sum() == 2


# Options that all of them read.


def test_the_scope_decides_whether_layers_are_mixed_alike():
    some = related(22, 2)
    by_layer, as_one = (
        merged_by("slerp", some, [1.0, 1.0], scope=scope) for scope in ("layer", "model")
    )
    names = sorted(names_of(some))
    ratios = []
    for merged in (by_layer, as_one):
        found = []
        for name in names:
            parts = torch.stack([dense(adapter, name).flatten() for adapter in some])
            target = dense(merged, name).flatten()[:, None]
            found.append(torch.linalg.lstsq(parts.T, target).solution[0, 0].item())
        ratios.append(found)
    assert ratios[1][0] == pytest.approx(ratios[1][1], abs=1e-8)
    assert abs(ratios[0][0] - ratios[0][1]) > 1e-4
    with pytest.raises(ConfigError, match="must be one of layer, model"):
        merged_by("slerp", some, [1.0, 1.0], scope="block")


def test_block_weights_are_part_of_the_weights():
    some = related(23, 2)
    quiet = [parse_blocks("conv=0.5"), parse_blocks("all=1")]
    halved = Adapter({**some[0].layers, "unet.conv": scaled(some[0], 0.5).layers["unet.conv"]})
    for method in ("matched", "np", "tsv", "sum", "iso"):
        assert_same(
            merged_by(method, some, [0.8, 0.6], blocks=quiet),
            merged_by(method, [halved, some[1]], [0.8, 0.6]),
            atol=1e-8,
        )
    # Over the whole model an update is what its block weights leave of it.
    for method in ("slerp", "karcher", "equal", "stock"):
        assert_same(
            merged_by(method, some, [0.8, 0.6], blocks=quiet, scope="model"),
            merged_by(method, [halved, some[1]], [0.8, 0.6], scope="model"),
            atol=1e-8,
        )


def test_stacking_is_block_matrix_multiplication():
    rng = torch.Generator().manual_seed(24)
    made = [
        Factors(torch.randn(4, rank, generator=rng), torch.randn(rank, 3, generator=rng))
        for rank in (1, 3)
    ]
    total = stack([(made[0], 2.0), (made[1], -0.5)])
    torch.testing.assert_close(
        total.multiply(), 2.0 * made[0].multiply() - 0.5 * made[1].multiply()
    )
    assert total.rank == 4
