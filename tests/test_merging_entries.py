"""Methods of single entries: by hand, against slow references, and with their dice counted."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging import elementwise as entries
from dreamloom.merging import spaces
from dreamloom.merging.elementwise import add_agreeing, elect_signs
from dreamloom.merging.factors import Factors, stack, truncate_matrix
from dreamloom.merging.magnitudes import find_magnitudes
from dreamloom.merging.merging import MergeRequest, combine, merge_uncut
from dreamloom.merging.method import Context, LayerPart
from dreamloom.merging.methods import find_method
from dreamloom.merging.methods.dare import keep_chances
from dreamloom.merging.ranks import parse_rank
from merges import random_adapter, rewrite

SPACES = ("dense", "knots", "core")
IN_SPACES = [
    (name, {"space": space})
    for name in ("magnitude", "ties", "dare", "della", "breadcrumbs", "sce")
    for space in SPACES
]
EVERY = [*IN_SPACES, ("knots", {}), ("core", {})]
CERTAIN = [(name, options) for name, options in EVERY if name not in {"dare", "della"}]


def make_part(up, down, weight=1.0, number=1):
    return LayerPart(Factors(up.float(), down.float()), weight, number)


def as_parts(matrices, weights=None):
    """Parts whose updates are given matrices, split into the matrix and the unit matrix."""
    weights = weights or [1.0] * len(matrices)
    tensors = [torch.as_tensor(matrix, dtype=torch.float32) for matrix in matrices]
    return [
        make_part(matrix, torch.eye(matrix.shape[1]), weight, number)
        for number, (matrix, weight) in enumerate(zip(tensors, weights, strict=True), 1)
    ]


def random_parts(seed, ranks, weights=None, shape=(9, 7)):
    rng = torch.Generator().manual_seed(seed)
    weights = weights or [1.0] * len(ranks)
    return [
        make_part(
            torch.randn(shape[0], rank, generator=rng),
            torch.randn(rank, shape[1], generator=rng),
            weight,
            number,
        )
        for number, (rank, weight) in enumerate(zip(ranks, weights, strict=True), 1)
    ]


@st.composite
def some_parts(draw, fewest=1):
    """Up to three updates of mixed ranks and weights, negative ones too; one may be deficient."""
    count = draw(st.integers(fewest, 3))
    ranks = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    weight = st.sampled_from([-1.3, -0.4, 0.3, 0.7, 1.0, 1.9])
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    parts = random_parts(draw(st.integers(0, 2**32)), ranks, weights)
    if draw(st.booleans()):
        parts[0].factors.down[-1] = parts[0].factors.down[0]
    return parts


def merge(name, parts, seed=0, **options):
    method = find_method(name)
    context = Context("unet.x", method.read_options(options), seed, len(parts))
    return method.merge(parts, context)


def dense(merged):
    return merged.multiply() if isinstance(merged, Factors) else merged


def plain_sum(parts):
    return stack([(part.factors, part.weight) for part in parts]).multiply()


def weighted(parts):
    return [part.weight * part.factors.multiply().double() for part in parts]


def assert_close(found, expected, atol=2e-5):
    torch.testing.assert_close(dense(found).double(), expected.double(), rtol=0, atol=atol)


# Slow references, entry by entry.


def trim_slowly(matrix, density):
    values = matrix.flatten().tolist()
    order = sorted(range(len(values)), key=lambda place: -abs(values[place]))
    kept = set(order[: max(1, round(density * len(values)))])
    trimmed = [value if place in kept else 0.0 for place, value in enumerate(values)]
    return torch.tensor(trimmed, dtype=torch.float64).view(matrix.shape)


def ties_slowly(matrices, weights, density, reduce="sum", election="weighted"):
    trimmed = [trim_slowly(matrix, density) for matrix in matrices]
    merged = torch.zeros_like(trimmed[0])
    for place in itertools.product(*map(range, merged.shape)):
        ours = [
            (float(matrix[place]), abs(weight))
            for matrix, weight in zip(trimmed, weights, strict=True)
        ]
        votes = sum(value / (size if election == "unweighted" else 1) for value, size in ours)
        agreeing = [(value, size) for value, size in ours if value * votes > 0]
        if agreeing:
            total = sum(value for value, _ in agreeing)
            by = {"sum": 1, "mean": len(agreeing), "weighted_mean": sum(s for _, s in agreeing)}
            merged[place] = total / by[reduce]
    return merged


def knots_slowly(parts):
    """U, and every S Vᵢᵀ, from the SVD of all updates side by side."""
    updates = weighted(parts)
    left, values, right = torch.linalg.svd(torch.cat(updates, dim=1), full_matrices=False)
    kept = values > 1e-5 * values[0]
    aligned = (values[kept, None] * right[kept]).split(updates[0].shape[1], dim=1)
    return left[:, kept], list(aligned)


def core_slowly(parts):
    """U, V, and every Uᵀ ΔWᵢ V, from the SVDs of all updates in a row and in a column."""
    updates = weighted(parts)
    left, _ = knots_slowly(parts)
    _, values, right = torch.linalg.svd(torch.cat(updates, dim=0), full_matrices=False)
    right = right[values > 1e-5 * values[0]].T
    return left, right, [left.T @ update @ right for update in updates]


# Spaces.


@settings(max_examples=20)
@given(some_parts(), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from(["sum", "mean"]))
def test_knots_is_ties_on_the_aligned_updates(parts, density, reduce):
    weights = [part.weight for part in parts]
    left, aligned = knots_slowly(parts)
    expected = left @ ties_slowly(aligned, weights, density, reduce)
    merged = merge("knots", parts, density=density, reduce=reduce)
    assert merged.rank <= min(9, sum(part.factors.rank for part in parts))
    assert_close(merged, expected)


@settings(max_examples=20)
@given(some_parts(), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from(["sum", "mean"]))
def test_core_is_ties_on_the_core_matrices(parts, density, reduce):
    weights = [part.weight for part in parts]
    left, right, cores = core_slowly(parts)
    expected = left @ ties_slowly(cores, weights, density, reduce) @ right.T
    merged = merge("core", parts, density=density, reduce=reduce)
    assert merged.rank <= min(7, sum(part.factors.rank for part in parts))
    assert_close(merged, expected)


@settings(max_examples=20)
@given(some_parts(), st.sampled_from(SPACES))
def test_the_sum_is_the_sum_in_every_space(parts, space):
    for name in ("magnitude", "dare", "breadcrumbs"):
        merged = merge(name, parts, space=space, density=1.0, election="none", **NO_OUTLIERS[name])
        assert_close(merged, plain_sum(parts))


NO_OUTLIERS = {"magnitude": {}, "dare": {}, "breadcrumbs": {"outliers": 0.0}}


@pytest.mark.parametrize("space", ["knots", "core"])
def test_a_flipped_direction_changes_nothing(space, monkeypatch):
    parts = random_parts(3, [2, 3], [1.0, -0.6])
    before = dense(merge("ties", parts, space=space))
    find = spaces.find_directions

    def flip_some(updates):
        directions = find(updates)
        return directions * torch.tensor([1.0, -1.0] * directions.shape[1])[: directions.shape[1]]

    monkeypatch.setattr(spaces, "find_directions", flip_some)
    assert_close(merge("ties", parts, space=space), before)


def equal_values():
    """Two updates whose singular values are all equal: any rotation of their vectors is as good."""
    rng = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(side, 6, generator=rng))[0] for side in (20, 15))
    return [
        make_part(left[:, :3], right[:, :3].T, 1.0, 1),
        make_part(left[:, 3:], right[:, 3:].T, 1.0, 2),
    ]


def rotate(parts, seed):
    """Split every update anew: (up G, Gᵀ down)."""
    rng = torch.Generator().manual_seed(seed)
    turns = [
        torch.linalg.qr(torch.randn(one.factors.rank, one.factors.rank, generator=rng))[0]
        for one in parts
    ]
    return [
        make_part(one.factors.up @ turn, turn.T @ one.factors.down, one.weight, one.number)
        for one, turn in zip(parts, turns, strict=True)
    ]


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_equal_singular_values_leave_no_choice(name, options):
    parts = equal_values()
    assert_close(
        merge(name, rotate(parts, 1), **options), dense(merge(name, parts, **options)), 2e-4
    )


def test_without_a_rule_they_do(monkeypatch):
    """The negative control: singular vectors as the library happens to return them."""
    monkeypatch.setattr(spaces, "_settle", lambda directions, values: directions)
    parts = equal_values()
    apart = dense(merge("knots", rotate(parts, 1))) - dense(merge("knots", parts))
    assert apart.norm() > 0.1 * plain_sum(parts).norm()


# What holds for all of them.


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_nothing_depends_on_the_size_of_blocks(name, options, monkeypatch):
    parts = random_parts(5, [4, 3, 2], [1.0, 0.7, -0.4], (30, 19))
    before = dense(merge(name, parts, **options))
    for numbers in (1, 40):
        monkeypatch.setattr(entries, "NUMBERS_PER_BLOCK", numbers)
        after = dense(merge(name, parts, **options))
        assert torch.equal(after != 0, before != 0)
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_order_of_adapters_does_not_matter(name, options):
    parts = random_parts(6, [4, 3, 2], [1.0, 0.7, -0.4])
    before = dense(merge(name, parts, **options))
    for order in itertools.permutations(parts):
        assert_close(merge(name, order, **options), before)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_an_update_of_zeros_is_as_good_as_none(name, options):
    parts = random_parts(7, [2, 3])
    nothing = make_part(torch.zeros(9, 2), torch.zeros(2, 7), 1.0, 3)
    before = dense(merge(name, parts, **options))
    assert_close(merge(name, [nothing, *parts], **options), before, 0)
    assert merge(name, [nothing], **options).rank == 0


@pytest.mark.parametrize(("name", "options"), CERTAIN)
@pytest.mark.parametrize("factor", [-1.0, 2.0, -0.25])
def test_the_result_scales_with_the_weights(name, options, factor):
    parts = random_parts(8, [2, 3], [1.0, -0.6])
    scaled = [LayerPart(one.factors, factor * one.weight, one.number) for one in parts]
    assert_close(merge(name, scaled, **options), factor * dense(merge(name, parts, **options)))


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_weight_is_a_stronger_or_weaker_adapter(name, options):
    parts = random_parts(9, [2, 3], [0.5, -0.6])
    before = dense(merge(name, parts, **options))
    whole = [LayerPart(one.factors.scaled(one.weight), 1.0, one.number) for one in parts]
    dice_alike = sorted(parts, key=lambda one: float(one.factors.multiply().norm())) == sorted(
        parts, key=lambda one: float(one.weight * one.factors.multiply().norm()) ** 2
    )
    assert dice_alike  # so that masks are the same in both
    assert_close(merge(name, whole, **options), before)


@pytest.mark.parametrize(("name", "options"), CERTAIN)
def test_an_adapter_less_itself_is_nothing(name, options):
    one, other = random_parts(10, [3, 3])
    again = rotate([one], 2)[0]
    merged = merge(name, [one, LayerPart(again.factors, -1.0, 2)], **options)
    kept = (dense(merged).abs() > 1e-4).float().mean()
    # Entries at a threshold may fall on either side of it by rounding; the others cancel.
    assert kept <= 0.02
    assert dense(merge(name, [one, other], **options)).abs().max() > 1


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_an_adapter_that_is_alone_may_be_subtracted(name, options):
    """One side of the elections: with one adapter there is nobody to disagree."""
    (one,) = random_parts(11, [3], [-0.7])
    merged = dense(merge(name, [one], **options))
    full = one.weight * one.factors.multiply()
    assert float((merged * full).sum()) > 0.5 * float(full.square().sum())


@settings(max_examples=20)
@given(
    st.integers(0, 2**32), st.sampled_from(["ties", "magnitude", "breadcrumbs", "dare", "della"])
)
def test_where_all_signs_agree_and_all_stays_it_is_the_sum(seed, name):
    parts = random_parts(seed, [2, 3])
    parts = [
        make_part(one.factors.up.abs(), one.factors.down.abs(), weight)
        for one, weight in zip(parts, (1.0, 0.6), strict=True)
    ]
    options = {"outliers": 0.0} if name == "breadcrumbs" else {}
    merged = merge(name, parts, density=1.0, election="weighted", space="dense", **options)
    assert_close(merged, plain_sum(parts))


def test_in_a_space_of_its_own_nothing_is_cut_off():
    some = [random_adapter(seed, {"linear": 2, "conv": 3}) for seed in (12, 13)]
    for method in ("knots", "core"):
        done = combine(some, MergeRequest([1.0, 0.5], method))
        assert done.error == 0
        assert done.adapter.ranks == {"unet.linear": 4, "unet.conv": 6}
    assert combine(some, MergeRequest([1.0, 0.5], "ties", {"space": "dense"})).error > 0


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("name", ["magnitude", "ties", "dare", "della", "breadcrumbs", "sce"])
def test_what_entries_leave_is_cut_to_what_is_nearest(name, density):
    """Masks leave singular values that fall slowly, through the cut as well as after it."""
    parts = random_parts(23, [12, 12], [1.0, 0.8], (560, 400))
    spread = {"spread": 0.1} if name == "della" else {}
    merged = merge(name, parts, space="dense", density=density, **spread)
    values = torch.linalg.svdvals(merged.double())
    for rank in (12, 24):
        cut = truncate_matrix(merged, rank)
        error = (merged.double() - cut.up.double() @ cut.down.double()).norm()
        assert 1 - 1e-9 < float(error / values[rank:].norm()) < 1 + 5e-6


@pytest.mark.parametrize("rank", ["full", "5", "energy:0.6", "budget:60kB"])
def test_the_error_told_is_that_of_what_is_written(rank):
    rng = torch.Generator().manual_seed(24)
    kernels = {"unet.linear": (400,), "unet.conv": (40, 3, 3), "unet.small": (30,)}
    some = [
        Adapter(
            {
                name: Layer(
                    torch.randn(6, *kernel, generator=rng),
                    torch.randn(300, 6, *[1] * (len(kernel) - 1), generator=rng),
                )
                for name, kernel in kernels.items()
            }
        )
        for _ in range(2)
    ]
    request = MergeRequest([1.0, 0.8], "ties", {"space": "dense"}, parse_rank(rank))
    done = combine(some, request)
    lost = whole = 0.0
    for uncut in merge_uncut(some, request):
        written = done.adapter.layers[uncut.layer].update().flatten(1).double()
        rest, size = (written - uncut.update.double()).norm(), uncut.update.double().norm()
        report = done.reports[uncut.layer]
        assert report.error == pytest.approx(float(rest / size), rel=1e-5, abs=1e-6)
        assert report.norm == pytest.approx(float(written.norm()), rel=1e-5)
        values = torch.linalg.svdvals(uncut.update.double())[report.rank :]
        assert float(rest) <= (1 + 5e-6) * float(values.norm()) + 1e-6 * float(size)
        lost, whole = lost + float(rest) ** 2, whole + float(size) ** 2
    assert done.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert 0.05 < done.error < 0.95


@pytest.mark.parametrize("name", ["magnitude", "ties", "dare", "della", "breadcrumbs", "sce"])
def test_no_second_matrix_of_the_layers_size_is_made(name, monkeypatch):
    parts = random_parts(14, [4, 3], shape=(1024, 640))
    largest, next_to_it = _largest_two(name, parts, 2**14, monkeypatch)
    assert largest == 1024 * 640 * 4
    assert next_to_it < largest / 4


@pytest.mark.parametrize("name", ["ties", "magnitude"])
def test_nor_to_find_one_threshold_for_the_model(name, monkeypatch):
    monkeypatch.setattr(entries, "NUMBERS_PER_BLOCK", 2**14)
    layers = [random_parts(seed, [4, 3], shape=(1024, 640)) for seed in (14, 15)]
    method = find_method(name)
    options = method.read_options({"space": "dense", "threshold": "model"})
    with _Sizes() as sizes:
        found = method.find_thresholds(lambda: layers, options)
    assert found.keys() == {1, 2}
    # The counts of 2¹⁶ bins, in 8 bytes each, are larger than any block.
    assert max(sizes.seen) <= 2**19 + 8 < 1024 * 640 * 4 / 4


def test_in_one_block_there_would_be(monkeypatch):
    """The negative control: what is counted is counted."""
    parts = random_parts(14, [4, 3], shape=(1024, 640))
    _, next_to_it = _largest_two("ties", parts, 2**20, monkeypatch)
    assert next_to_it >= 1024 * 640 * 4


def _largest_two(name, parts, numbers, monkeypatch):
    monkeypatch.setattr(entries, "NUMBERS_PER_BLOCK", numbers)
    with _Sizes() as sizes:
        merge(name, parts, space="dense")
    return sorted(sizes.seen, reverse=True)[:2]


class _Sizes(TorchDispatchMode):
    """Notes the bytes of everything that torch computes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.seen.append(one.numel() * one.element_size())
        # What is written in place is returned, but not made.
        if function._schema.is_mutable:
            self.seen = self.seen[:-1]
        return made


# Thresholds and elections.


@settings(max_examples=50)
@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, -0.0, 1.5, -1.5, 1e-40]),
        min_size=1,
        max_size=60,
    ),
    st.data(),
)
def test_magnitudes_are_found_as_by_sorting(values, data):
    places = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    size = data.draw(st.integers(1, len(values)))
    whole = torch.tensor(values, dtype=torch.float32)
    expected = whole.abs().sort(descending=True).values
    found = find_magnitudes(lambda: (part[None] for part in whole.split(size)), places)
    assert found == [float(expected[place - 1]) for place in places]


@settings(max_examples=20)
@given(some_parts(), st.sampled_from([0.1, 0.3, 0.5, 0.999]))
def test_trimming_keeps_exactly_the_density(parts, density):
    (one, *_) = parts
    assume(one.weight)
    merged = merge("magnitude", [one], space="dense", density=density)
    assert int((merged != 0).sum()) == max(1, round(density * 63))
    assert_close(merged, trim_slowly(weighted([one])[0], density))


def test_who_is_elected():
    ours, theirs, third = (
        torch.tensor([row]) for row in ([3.0, 1, 0, 2], [-2.0, 1, 0, -2], [0.0, -3, 0, 0])
    )
    assert elect_signs([ours, theirs, third], [1.0, 1.0, 1.0], "weighted").tolist() == [
        [1, -1, 0, 0]
    ]
    assert elect_signs([ours, theirs, third], [1.0, 1.0, 1.0], "none") is None
    # Entries bear their weights: without them the second adapter votes with -8, not with -2.
    assert elect_signs([ours, theirs], [1.0, 0.25], "unweighted").tolist() == [[-1, 1, 0, -1]]
    assert elect_signs([ours, theirs], [1.0, -0.25], "unweighted").tolist() == [[-1, 1, 0, -1]]


def test_what_agrees_is_added():
    blocks = [torch.tensor([[3.0, 1, 0, 2]]), torch.tensor([[-2.0, 1, 0, -2]])]
    sign = torch.tensor([[1.0, 1, 0, 0]])
    assert add_agreeing(blocks, [0.5, -2.0], sign, "sum").tolist() == [[3, 2, 0, 0]]
    assert add_agreeing(blocks, [0.5, -2.0], sign, "mean").tolist() == [[3, 1, 0, 0]]
    by_weight = add_agreeing(blocks, [0.5, -2.0], sign, "weighted_mean")
    torch.testing.assert_close(by_weight, torch.tensor([[6, 0.8, 0, 0]]))
    assert add_agreeing(blocks, [0.5, -2.0], None, "sum").tolist() == [[1, 2, 0, 0]]
    assert add_agreeing(blocks, [0.5, -2.0], None, "mean").tolist() == [[0.5, 1, 0, 0]]


# TIES.

OURS = [[4.0, -3.0, 0.1], [2.0, 0.2, 0.3]]
THEIRS = [[-1.0, -5.0, 0.5], [3.0, 0.4, -6.0]]


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        # Half of the entries stay: 4, -3, 2 and -5, 3, -6. Both agree on -3 - 5 and 2 + 3.
        ("sum", [[4, -8, 0], [5, 0, -6]]),
        ("mean", [[4, -4, 0], [2.5, 0, -6]]),
        ("weighted_mean", [[4, -4, 0], [2.5, 0, -6]]),
    ],
)
def test_ties_by_hand(reduce, expected):
    parts = as_parts([OURS, THEIRS])
    merged = merge("ties", parts, density=0.5, reduce=reduce, space="dense")
    assert merged.tolist() == expected
    doubled = merge("ties", parts, density=0.5, reduce=reduce, scale=2.0, space="dense")
    assert torch.equal(doubled, 2 * merged)


def test_ties_elects_with_weights():
    """At weights 1 and 0.5 the entries are 4, -3, 2, all else 0, and -2.5, 1.5, -3."""
    parts = as_parts([OURS, [[-1.0, 5.0, 0.5], [3.0, 0.4, -6.0]]], [1.0, 0.5])
    merged = merge("ties", parts, density=0.5, space="dense")
    assert merged.tolist() == [[4, -3, 0], [3.5, 0, -3]]
    unweighted = merge("ties", parts, density=0.5, election="unweighted", space="dense")
    assert unweighted.tolist() == [[4, 2.5, 0], [3.5, 0, -3]]
    mean = merge("ties", parts, density=0.5, reduce="weighted_mean", space="dense")
    torch.testing.assert_close(mean, torch.tensor([[4, -3, 0], [3.5 / 1.5, 0, -6]]))


def test_ties_subtracts_an_adapter_of_negative_weight():
    merged = merge("ties", as_parts([OURS, THEIRS], [1.0, -1.0]), density=0.5, space="dense")
    assert merged.tolist() == [[4, 5, 0], [-3, 0, 6]]


@settings(max_examples=20)
@given(
    some_parts(),
    st.sampled_from([0.2, 0.5, 1.0]),
    st.sampled_from(["sum", "mean", "weighted_mean"]),
    st.sampled_from(["weighted", "unweighted"]),
)
def test_ties_is_what_it_is_entry_by_entry(parts, density, reduce, election):
    options = {"density": density, "reduce": reduce, "election": election, "space": "dense"}
    expected = ties_slowly(
        weighted(parts), [one.weight for one in parts], density, reduce, election
    )
    assert_close(merge("ties", parts, **options), expected)


# DARE and DELLA.


def throw(name, parts, times, **options):
    return torch.stack([dense(merge(name, parts, seed, **options)) for seed in range(times)])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_dare_drops_and_makes_up_for_it(space, density):
    """Over many seeds the mean is the sum, and the variance p / (1 - p) ΔW² of the entries."""
    (one,) = random_parts(15, [4], [1.7], (40, 30))
    times, drop = 50, 1 - density
    thrown = throw("dare", [one], times, density=density, space=space).double()
    update = plain_sum([one]).double()
    if space == "dense":
        # Each entry is either gone or made up for.
        assert_close(
            thrown[0].where(thrown[0] == 0, thrown[0] * density), update.where(thrown[0] != 0, 0)
        )
        spread = (drop / density) ** 0.5 * update.abs()
        assert ((thrown.mean(dim=0) - update).abs() <= 5 * spread / times**0.5 + 1e-5).all()
        ratio = (thrown - update).square().mean(dim=0) / update.square()
        assert float(ratio.mean()) == pytest.approx(drop / density, rel=0.03)
    error = (thrown - update).square().sum(dim=(1, 2)).mean() / update.square().sum()
    assert float(error) == pytest.approx(drop / density, rel=0.3)
    off = float((thrown.mean(dim=0) - update).norm() / update.norm())
    assert off < 1.6 * (drop / density / times) ** 0.5


def test_dare_by_the_norm_of_what_is_left_would_be_biased():
    """The negative control: some tools rescale to the L1 norm instead of by 1 / (1 - p)."""
    one = as_parts([[[10.0, *[0.1] * 9]]])
    matrix = plain_sum(one)
    thrown = throw("dare", one, 100, density=0.5, space="dense")
    left = matrix * (thrown != 0)
    by_norm = left * matrix.abs().sum() / left.abs().sum(dim=(1, 2), keepdim=True)
    assert float(thrown[..., 0].mean()) == pytest.approx(10, abs=3)
    assert float(by_norm[..., 0].mean()) < 7


def test_each_adapter_has_random_numbers_of_its_own():
    one = torch.ones(40, 30)
    first, second = (
        merge("dare", as_parts([one, 2 * one]), seed=s, density=0.5, space="dense") for s in (0, 1)
    )
    assert {round(v, 4) for v in first.flatten().tolist()} == {0, 2, 4, 6}
    assert not torch.equal(first, second)
    # Each of the four outcomes a quarter of the time: the two masks are independent.
    for value in (0, 2, 4, 6):
        assert float((first == value).float().mean()) == pytest.approx(0.25, abs=0.07)


def test_dare_may_elect():
    parts = as_parts([OURS, THEIRS])
    linear = merge("dare", parts, density=1.0, space="dense")
    elected = merge("dare", parts, density=1.0, election="weighted", space="dense")
    assert linear.tolist() == [
        [3, -8, 0.6000000238418579],
        [5, 0.6000000238418579, -5.699999809265137],
    ]
    assert elected.tolist() == [[4, -8, 0.6000000238418579], [5, 0.6000000238418579, -6]]


def test_chances_of_della_rise_by_rank_in_each_row():
    block = torch.tensor([[0.1, -4.0, 2.0, 1.0, -3.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    chances = keep_chances(block, 0.6, 0.2)
    expected = torch.tensor([[0.4, 0.8, 0.6, 0.5, 0.7], [0.8, 0.7, 0.6, 0.5, 0.4]])
    torch.testing.assert_close(chances, expected)
    assert keep_chances(torch.ones(3, 1), 0.6, 0.2).tolist() == [[pytest.approx(0.6)]] * 3


def test_della_keeps_large_entries_more_often_and_makes_up_for_it():
    row, times = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 4000
    parts = as_parts([row.expand(times, 5)])
    thrown = merge("della", parts, density=0.5, spread=0.4, space="dense")
    chances = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    error = 5 * (chances * (1 - chances) / times).sqrt()
    assert (((thrown != 0).float().mean(dim=0) - chances).abs() <= error).all()
    spread = ((1 - chances) / chances).sqrt() * row
    assert ((thrown.mean(dim=0) - row).abs() <= 5 * spread / times**0.5).all()


def test_della_elects_and_may_skip_that():
    parts = as_parts([OURS, THEIRS])
    ties = merge("ties", parts, density=1.0, space="dense")
    assert torch.equal(merge("della", parts, density=1.0, space="dense"), ties)
    alone = merge("della", parts, density=1.0, election="none", space="dense")
    assert_close(alone, plain_sum(parts))


@pytest.mark.parametrize(("density", "spread"), [(0.1, 0.1), (0.3, 0.4), (0.95, 0.1)])
def test_della_refuses_chances_that_are_none(density, spread):
    with pytest.raises(
        ConfigError, match=f"density of {density:g} with a spread of {spread:g}"
    ) as caught:
        merge("della", random_parts(16, [2]), density=density, spread=spread)
    assert "lower the spread" in str(caught.value)


# Breadcrumbs and SCE.


def test_breadcrumbs_by_hand():
    matrix = [[9.0, -8.0, 7.0, -6.0, 5.0], [4.0, -3.0, 2.0, -1.0, 0.5]]
    merged = merge("breadcrumbs", as_parts([matrix]), density=0.5, outliers=0.2, space="dense")
    assert merged.tolist() == [[0, 0, 7, -6, 5], [4, -3, 0, 0, 0]]
    # Where less is to go than the outliers are, fewer of them go.
    merged = merge("breadcrumbs", as_parts([matrix]), density=0.9, outliers=0.2, space="dense")
    assert merged.tolist() == [[0, -8, 7, -6, 5], [4, -3, 2, -1, 0.5]]


@settings(max_examples=20)
@given(some_parts(), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.1]))
def test_breadcrumbs_keeps_exactly_the_density(parts, density, outliers):
    """Without outliers, too, where a slice that ends at minus zero has emptied the update (D16)."""
    (one, *_) = parts
    merged = merge("breadcrumbs", [one], density=density, outliers=outliers, space="dense")
    assert int((merged != 0).sum()) == round(density * 63)
    if outliers == 0:
        assert_close(merged, trim_slowly(weighted([one])[0], density))


def test_sce_by_hand():
    """Deviations are 4, 0, 1, 3: three stay; energies of 4, 1, 5 and -4, 3, -1 are 42 and 26."""
    ours, theirs = [[4.0, 2.0], [1.0, 5.0]], [[-4.0, 2.0], [3.0, -1.0]]
    merged = merge("sce", as_parts([ours, theirs]), density=0.75, space="dense")
    agreed = (42 * 1 + 26 * 3) / (42 + 26)
    # The votes on the first entry are 4 and -4: nobody is elected.
    torch.testing.assert_close(merged, torch.tensor([[0, 0], [agreed, 5]]))
    halved = merge("sce", as_parts([ours, theirs]), density=0.75, scale=0.5, space="dense")
    assert torch.equal(halved, merged / 2)


def test_sce_counts_a_weight_in_the_energy_and_in_the_mean():
    ours, theirs = [[1.0, 3.0]], [[2.0, 1.0]]
    merged = merge("sce", as_parts([ours, theirs], [1.0, 2.0]), density=1.0, space="dense")
    mine, other = 1 + 9, 4 * (4 + 1)
    expected = torch.tensor([[mine * 1 + other * 4, mine * 3 + other * 2.0]]) / (mine + other)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("space", SPACES)
def test_sce_lets_pass_whole_what_does_not_differ(space):
    (one,) = random_parts(17, [3])
    halves = [LayerPart(one.factors, 0.5, 1), LayerPart(rotate([one], 3)[0].factors, 0.5, 2)]
    assert_close(merge("sce", [one], density=0.2, space=space), plain_sum([one]))
    # The weighted mean of two halves is a half.
    assert_close(merge("sce", halves, density=0.2, space=space), 0.5 * plain_sum([one]))


# Defects that others have.


def test_trimming_factors_depends_on_how_an_update_is_split():
    """D18: some tools trim and elect on up and on down by themselves, and so merge by chance."""
    some = [random_adapter(seed, {"linear": 3}) for seed in (18, 19)]
    again = [rewrite(adapter, seed) for seed, adapter in enumerate(some)]

    def by_factors(adapters):
        layers = [adapter.layers["unet.linear"] for adapter in adapters]
        up = ties_slowly([layer.up.double() for layer in layers], [1, 1], 0.5)
        down = ties_slowly([layer.down.double() for layer in layers], [1, 1], 0.5)
        return up @ down

    def by_updates(adapters):
        done = combine(adapters, MergeRequest([1.0, 1.0], "ties", {"density": 0.5}))
        return done.adapter.layers["unet.linear"].update()

    assert_close(by_updates(again), by_updates(some), 2e-4)
    assert (by_factors(again) - by_factors(some)).norm() > 0.3 * by_factors(some).norm()


@pytest.mark.parametrize(("name", "options"), [("knots", {}), ("ties", {"space": "core"})])
def test_every_adapter_has_its_own_weight(name, options):
    """D19: where each update gets the first one's weight, these two would be the same."""
    parts = random_parts(20, [2, 3], [1.0, 0.2])
    merged = dense(merge(name, parts, density=1.0, **options))
    as_first = dense(
        merge(name, [LayerPart(p.factors, 1.0, p.number) for p in parts], density=1.0, **options)
    )
    theirs = parts[1].factors.multiply()
    share = float((merged * theirs).sum() / theirs.square().sum())
    assert share < 0.5
    assert float((as_first * theirs).sum() / theirs.square().sum()) > 0.8


# peft, where it is right.


@pytest.fixture(scope="module")
def combine_with_peft():
    """Let the installed peft combine updates of one layer; its result is cut to no rank."""
    from peft import LoraConfig, get_peft_model

    def combine_them(parts, density, kind):
        outputs, inputs = parts[0].factors.shape
        base = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
        model = None
        for part in parts:
            rank = part.factors.rank
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
            if model is None:
                model = get_peft_model(base, config, adapter_name=str(part.number))
            else:
                model.add_adapter(str(part.number), config)
            layer = model.base_model.model[0]
            layer.lora_A[str(part.number)].weight.data = part.factors.down.clone()
            layer.lora_B[str(part.number)].weight.data = part.factors.up.clone()
        model.add_weighted_adapter(
            [str(part.number) for part in parts],
            [part.weight for part in parts],
            "merged",
            combination_type=kind,
            density=density,
            svd_rank=min(outputs, inputs),
        )
        return layer.get_delta_weight("merged").detach()

    return combine_them


def test_the_mean_makes_the_ties_of_peft_weaker_than_the_sum(combine_with_peft):
    """Where adapters have little in common; that both agree on all else: test_merging_definitions.

    It is not right with negative weights (it elects the sign of the update, not of what is added),
    nor where votes cancel each other out (it elects plus).
    """
    parts = random_parts(21, [2, 3], [1.0, 1.0], (12, 8))
    plain = plain_sum(parts)
    theirs = combine_with_peft(parts, 0.5, "ties_svd")
    ours = dense(merge("ties", parts, density=0.5, space="dense"))
    assert float((theirs * plain).sum()) < 0.9 * float((ours * plain).sum())


def test_peft_elects_another_sign_where_a_weight_is_negative(combine_with_peft):
    parts = as_parts([OURS, THEIRS], [1.0, -1.0])
    theirs = combine_with_peft(parts, 0.5, "ties_svd")
    ours = merge("ties", parts, density=0.5, election="unweighted", reduce="mean", space="dense")
    assert_close(ours, torch.tensor([[4.0, 5, 0], [-3, 0, 6]]))
    # Both agree on 2 and 3, peft says, and adds 2 and -3.
    assert float(theirs[1, 0]) == pytest.approx(-0.5, abs=1e-5)
