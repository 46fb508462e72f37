"""Whose definition each merge method follows: papers' and other programs' formulas, in float64.

Each formula is written down here from its paper or from what the other program computes, on dense
matrices; peft is asked itself. Nothing is cut, so what differs is the definition. Each test logs
the difference that it found, over all layers together and relative to the other's:

    pytest tests/test_merging_definitions.py --log-cli-level=INFO
"""

import logging

import pytest
import torch

from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging import elementwise
from dreamloom.merging.blocks import NO_BLOCKS, BlockWeights
from dreamloom.merging.factors import Factors
from dreamloom.merging.merging import MergeRequest, combine, merge_uncut
from dreamloom.merging.methods import find_method
from dreamloom.merging.methods.dare import keep_chances
from merges import assert_same, names_of, random_adapter

# Sides of which the shares below are whole numbers of entries; layers of unequal strength, as
# training leaves them.
SHAPES = {"unet.0": (40, 30), "unet.1": (30, 50), "unet.2": (30, 30)}
STRENGTHS = {"unet.0": 1.0, "unet.1": 3.0, "unet.2": 0.4}
SAME = 1e-5
PAPER = {"density": 0.2, "reduce": "mean"}
AS_PAPER = {**PAPER, "threshold": "model"}


def make_adapters(seed, count=2, shared=0.0, shapes=SHAPES):
    """Adapters of rank 8; a share of what they say is said by all of them."""
    rng = torch.Generator().manual_seed(seed)

    def make():
        return {
            name: (
                STRENGTHS[name] * torch.randn(outputs, 8, generator=rng),
                torch.randn(8, inputs, generator=rng),
            )
            for name, (outputs, inputs) in shapes.items()
        }

    common = make()
    made = []
    for _ in range(count):
        layers = {}
        for name, (up, down) in make().items():
            if shared:
                up = torch.cat([up, shared * common[name][0]], dim=1)
                down = torch.cat([down, common[name][1]])
            layers[name] = Layer(down, up)
        made.append(Adapter(layers))
    return made


def dense_of(adapter):
    return {name: layer.up.double() @ layer.down.double() for name, layer in adapter.layers.items()}


def merged_by(method, some, weights=None, **options):
    """What our method says, before anything is cut."""
    request = MergeRequest(weights or [1.0] * len(some), method, options)
    return {
        uncut.layer: (
            uncut.update.multiply() if isinstance(uncut.update, Factors) else uncut.update
        ).double()
        for uncut in merge_uncut(some, request)
    }


def apart(ours, theirs):
    """How far two merges are apart; logged for the tables of the docs."""
    assert ours.keys() == theirs.keys()
    squared = sum(float((ours[name] - theirs[name].double()).square().sum()) for name in ours)
    whole = sum(float(update.double().square().sum()) for update in theirs.values())
    difference = (squared / whole) ** 0.5
    logging.getLogger(__name__).info("apart by %.1e", difference)
    return difference


def by_layer(rule, some, weights=None):
    """Merge each layer by a rule for a stack of matrices and a vector of weights."""
    weights = torch.tensor(weights or [1.0] * len(some), dtype=torch.float64)
    tasks = [dense_of(adapter) for adapter in some]
    return {name: rule(torch.stack([task[name] for task in tasks]), weights) for name in SHAPES}


def keep_top(values, count):
    """The entries of largest magnitude; all others are zero."""
    kept = values.flatten().abs().topk(count).indices
    return (
        torch.zeros_like(values)
        .flatten()
        .index_copy(0, kept, values.flatten()[kept])
        .view_as(values)
    )


# TIES, by its paper: trim a whole task vector, elect, disjoint mean.


def ties_of_vectors(vectors, count):
    """TIES-Merging, section 3: τ̂ = top k of τ; γ = sgn Σ τ̂; the mean of those that agree."""
    trimmed = torch.stack([keep_top(vector, count) for vector in vectors])
    elected = trimmed.sum(dim=0).sign()
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    return (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def ties_of_paper(tasks, share=0.2, more=0):
    """The same on task vectors given as matrices by layer: all layers in one row, top k %."""
    vectors = [torch.cat([matrix.flatten() for matrix in task.values()]) for task in tasks]
    sizes = [matrix.numel() for matrix in tasks[0].values()]
    count = round(share * sum(sizes)) + more
    pieces = ties_of_vectors(vectors, count).split(sizes)
    return {
        name: piece.view_as(tasks[0][name]) for name, piece in zip(tasks[0], pieces, strict=True)
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("election", ["weighted", "unweighted"])
def test_ties_with_one_threshold_for_the_model_is_that_of_its_paper(count, election):
    some = make_adapters(1, count)
    theirs = ties_of_paper([dense_of(adapter) for adapter in some])
    ours = merged_by("ties", some, election=election, **AS_PAPER)
    assert apart(ours, theirs) < SAME
    doubled = merged_by("ties", some, election=election, scale=2.0, **AS_PAPER)
    assert apart(doubled, {name: 2 * update for name, update in theirs.items()}) < SAME


@pytest.mark.parametrize(
    ("options", "least"), [({}, 0.5), (PAPER, 0.1), ({"threshold": "model"}, 0.5)]
)
def test_ties_is_not_that_of_its_paper_without_them(options, least):
    some = make_adapters(1)
    theirs = ties_of_paper([dense_of(adapter) for adapter in some])
    assert apart(merged_by("ties", some, **options), theirs) > least


def test_ties_is_that_of_its_authors_code_but_for_one_entry():
    """It keeps what is not below the (n - ⌊d n⌋)-th smallest: 721 of 3600 entries, not 720."""
    some = make_adapters(1)
    theirs = ties_of_paper([dense_of(adapter) for adapter in some], more=1)
    as_many = {**AS_PAPER, "density": 721 / 3600}
    assert apart(merged_by("ties", some, **as_many), theirs) < SAME
    assert SAME < apart(merged_by("ties", some, **AS_PAPER), theirs) < 0.1


def test_a_task_vector_is_what_an_adapter_changes():
    """A layer that it lacks holds none of its entries: only its own decide what is kept."""
    one, other = make_adapters(2)
    less = Adapter({name: layer for name, layer in other.layers.items() if name != "unet.1"})
    merged = merged_by("magnitude", [one, less], space="dense", density=0.2, threshold="model")
    alone = [
        merged_by("magnitude", [each], space="dense", density=0.2, threshold="model")
        for each in (one, less)
    ]
    added = {name: sum(each[name] for each in alone if name in each) for name in SHAPES}
    assert apart(merged, added) < SAME
    kept = [sum(int((update != 0).sum()) for update in each.values()) for each in alone]
    assert kept == [720, 420]


# TIES, of mergekit, peft and sd-mecha: trim each layer.


def ties_of_mergekit(normalize, density):
    """Magnitude, then consensus by sum; normalized by the weights of those that agree."""

    def rule(tasks, weights):
        trimmed = torch.stack([keep_top(task, int(density * task.numel())) for task in tasks])
        weighted = trimmed * weights[:, None, None]
        majority = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
        agree = weighted.sign() == majority
        shares = (weights[:, None, None] * agree).sum(dim=0)
        total = (weighted * agree).sum(dim=0)
        return total / torch.where(shares == 0, 1.0, shares) if normalize else total

    return rule


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, 0.4]])
@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize(("normalize", "reduce"), [(True, "weighted_mean"), (False, "sum")])
def test_ties_is_that_of_mergekit(weights, density, normalize, reduce):
    some = make_adapters(3)
    theirs = by_layer(ties_of_mergekit(normalize, density), some, weights)
    assert apart(merged_by("ties", some, weights, density=density, reduce=reduce), theirs) < SAME


def ties_of_sd_mecha(density, by_count):
    """Keep what is not below the ⌊(1 - d) n⌋-th smallest; elect by sum or by count."""

    def rule(tasks, weights):
        del weights  # it has none
        trimmed = torch.stack(
            [keep_top(task, task.numel() - int((1 - density) * task.numel()) + 1) for task in tasks]
        )
        elected = (trimmed.sign() if by_count else trimmed).sum(dim=0).sign()
        agree = (trimmed.sign() == elected) & (trimmed != 0)
        return (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)

    return rule


def test_ties_is_that_of_sd_mecha_but_for_one_entry_of_each_layer():
    """Of 900 entries it keeps 181 where a fifth are 180: asked for as many, we keep the same."""
    some = make_adapters(4, shapes={"unet.2": SHAPES["unet.2"]})
    rule, weights = ties_of_sd_mecha(0.2, by_count=False), torch.ones(2)
    theirs = {"unet.2": rule(torch.stack([dense_of(one)["unet.2"] for one in some]), weights)}
    assert apart(merged_by("ties", some, density=181 / 900, reduce="mean"), theirs) < SAME
    assert SAME < apart(merged_by("ties", some, **PAPER), theirs) < 0.1


def test_ties_does_not_elect_by_counting_signs_as_sd_mecha_does():
    some = make_adapters(4, 3)
    theirs = by_layer(ties_of_sd_mecha(0.5, by_count=True), some)
    assert apart(merged_by("ties", some, density=0.5, reduce="mean"), theirs) > 0.1


# KnOTS and core space: the paper's TIES in other coordinates.


def directions_of(matrix):
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-5]


@pytest.mark.parametrize("method", ["knots", "core"])
def test_knots_and_core_are_the_papers_ties_on_turned_updates(method):
    """U, and in core space V, from the SVDs of the updates side by side and one on the other."""
    some = make_adapters(5)
    tasks = [dense_of(adapter) for adapter in some]
    lefts = {name: directions_of(torch.cat([t[name] for t in tasks], dim=1)) for name in SHAPES}
    rights = {
        name: directions_of(torch.cat([t[name].T for t in tasks], dim=1))
        if method == "core"
        else torch.eye(SHAPES[name][1], dtype=torch.float64)
        for name in SHAPES
    }
    turned = [{name: lefts[name].T @ t[name] @ rights[name] for name in SHAPES} for t in tasks]
    inside = ties_of_paper(turned)
    theirs = {name: 0.6 * lefts[name] @ inside[name] @ rights[name].T for name in SHAPES}
    assert apart(merged_by(method, some, scale=0.6, **AS_PAPER), theirs) < SAME
    as_ties = merged_by("ties", some, space=method, scale=0.6, **AS_PAPER)
    assert apart(as_ties, theirs) < SAME
    assert apart(merged_by(method, some), theirs) > 0.1


# Magnitude, Breadcrumbs, DARE, DELLA, SCE.


def test_magnitude_with_one_threshold_for_the_model_is_the_papers_trim():
    some, weights = make_adapters(6), [0.9, -0.4]
    theirs = dict.fromkeys(SHAPES, 0)
    for adapter, weight in zip(some, weights, strict=True):
        trimmed = ties_of_paper([dense_of(adapter)], share=0.5)
        theirs = {name: theirs[name] + weight * trimmed[name] for name in SHAPES}
    ours = merged_by("magnitude", some, weights, space="dense", threshold="model")
    assert apart(ours, theirs) < SAME


def breadcrumbs_of_mergekit(density=0.9, gamma=0.01):
    """Sorted by magnitude: the n_bot smallest go, and the n_top largest; both rounded down."""

    def rule(tasks, weights):
        count = tasks[0].numel()
        top = int(gamma * count)
        bottom = count - int(density * count) - top
        trimmed = [keep_top(task, count - bottom) - keep_top(task, top) for task in tasks]
        return (torch.stack(trimmed) * weights[:, None, None]).sum(dim=0)

    return rule


def test_breadcrumbs_is_that_of_mergekit():
    some, weights = make_adapters(7), [0.9, -0.4]
    theirs = by_layer(breadcrumbs_of_mergekit(), some, weights)
    assert apart(merged_by("breadcrumbs", some, weights, space="dense"), theirs) < SAME


def test_breadcrumbs_rounds_to_the_nearest_count_and_mergekit_down():
    """Of 37 × 29 = 1073 entries: 966 kept and 11 outliers here, 965 and 10 there."""
    (one,) = make_adapters(8, 1, shapes={"unet.0": (37, 29)})
    task = dense_of(one)["unet.0"]
    theirs = breadcrumbs_of_mergekit()(task[None], torch.ones(1, dtype=torch.float64))
    ours = merged_by("breadcrumbs", [one], space="dense")["unet.0"]
    assert (int((ours != 0).sum()), int((theirs != 0).sum())) == (966, 965)
    assert int(((ours != 0) != (theirs != 0)).sum()) == 3
    assert 1e-3 < apart({"unet.0": ours}, {"unet.0": theirs}) < 0.2


def test_dare_is_that_of_its_paper_and_of_peft_where_the_dice_fall_alike(monkeypatch):
    from peft.utils.merge_utils import dare_linear

    (one,) = make_adapters(9, 1)
    ours = merged_by("dare", [one], [0.7], density=0.4)
    theirs, of_mergekit = {}, {}
    for name, task in dense_of(one).items():
        mask = (ours[name] != 0).double()
        monkeypatch.setattr(torch, "bernoulli", lambda chances, mask=mask: mask)
        theirs[name] = dare_linear([task], torch.tensor([0.7], dtype=torch.float64), 0.4)
        torch.testing.assert_close(theirs[name], 0.7 * task * mask / 0.4)
        of_mergekit[name] = 0.7 * task * mask * task.abs().sum() / (task * mask).abs().sum()
    assert apart(ours, theirs) < SAME
    # It gives what is left the L1 norm of the whole, which depends on the dice.
    assert 1e-4 < apart(ours, of_mergekit) < 0.1


def test_dellas_chances_are_those_of_mergekit():
    """p = d - ε + 2 ε (rank - 1) / (n - 1), ranks by magnitude in each row."""
    (one,) = make_adapters(10, 1)
    block = dense_of(one)["unet.1"]
    ranks = block.abs().argsort(dim=1).argsort(dim=1).double()
    theirs = 0.7 - 0.15 + 2 * 0.15 * ranks / (block.shape[1] - 1)
    assert apart({"": keep_chances(block.float(), 0.7, 0.15)}, {"": theirs}) < SAME


def sce_of_mergekit(share):
    """Top variance; weights by mean square; the minority erased; the weighted mean."""

    def rule(tasks, weights):
        del weights  # it has none of the user's
        variance = tasks.var(dim=0, unbiased=False)
        kept = keep_top(variance, int(share * variance.count_nonzero())) != 0
        tasks = tasks * kept
        energy = tasks.square().mean(dim=(1, 2))
        majority = torch.where(tasks.sum(dim=0) >= 0, 1.0, -1.0)
        agreeing = (energy / energy.sum())[:, None, None] * (tasks.sign() == majority)
        divisor = agreeing.sum(dim=0)
        return (tasks * agreeing).sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)

    return rule


@pytest.mark.parametrize("density", [0.9, 1.0])
def test_sce_is_that_of_mergekit(density):
    some = make_adapters(11, 3)
    theirs = by_layer(sce_of_mergekit(density), some)
    assert apart(merged_by("sce", some, space="dense", density=density), theirs) < SAME


# Whole updates.


def slerp_of_mergekit(share):
    def rule(tasks, weights):
        del weights  # it has a share instead
        one, other = tasks
        angle = torch.acos((one * other).sum() / one.norm() / other.norm())
        sides = torch.sin((1 - share) * angle), torch.sin(share * angle)
        return (sides[0] * one + sides[1] * other) / torch.sin(angle)

    return rule


def test_slerp_is_that_of_mergekit():
    some = make_adapters(12, shared=1.0)
    assert (
        apart(merged_by("slerp", some, [0.7, 0.3]), by_layer(slerp_of_mergekit(0.3), some)) < SAME
    )


def karcher_of_mergekit(tasks, weights, rounds=10, near=1e-5):
    lengths = tasks.flatten(1).norm(dim=1)
    units, shares = tasks / lengths[:, None, None], weights / len(weights)
    mean = (shares[:, None, None] * units).sum(dim=0)
    mean = mean / mean.norm()
    for _ in range(rounds):
        cosines = (units * mean).sum(dim=(1, 2)).clamp(-1, 1)
        turns = shares * cosines.acos() / cosines.acos().sin()
        step = (turns[:, None, None] * (units - cosines[:, None, None] * mean)).sum(dim=0)
        if step.norm() < near:
            break
        mean = step.norm().cos() * mean + step.norm().sin() * step / step.norm()
    return mean * (shares * lengths).sum()


def test_karcher_is_that_of_mergekit():
    some = make_adapters(13, 3, shared=1.0)
    assert apart(merged_by("karcher", some), by_layer(karcher_of_mergekit, some)) < SAME


def median_of_sd_mecha(tasks, weights, rounds=1000):
    """Weiszfeld's rounds of averages by distance."""
    median = tasks.mean(dim=0)
    for _ in range(rounds):
        pulls = weights / (tasks - median).flatten(1).norm(dim=1)
        median = (pulls[:, None, None] * tasks).sum(dim=0) / pulls.sum()
    return median


def test_median_is_that_of_sd_mecha():
    some = make_adapters(14, 3, shared=1.0)
    assert apart(merged_by("median", some), by_layer(median_of_sd_mecha, some)) < SAME


def stock_ratio(tasks):
    """Model Stock's t = N cos θ / (1 + (N - 1) cos θ), the mean cosine of all pairs as mergekit."""
    units = tasks.flatten(1) / tasks.flatten(1).norm(dim=1, keepdim=True)
    count = len(tasks)
    pairs = torch.triu_indices(count, count, offset=1)
    cosine = (units @ units.T)[pairs[0], pairs[1]].mean()
    return count * cosine / (1 + (count - 1) * cosine)


def stock_of_paper(tasks, weights):
    del weights  # it has none
    return stock_ratio(tasks) * tasks.mean(dim=0)


@pytest.mark.parametrize("count", [2, 4])
def test_stock_is_that_of_its_paper_and_of_mergekit(count):
    some = make_adapters(15, count, shared=1.0)
    assert apart(merged_by("stock", some), by_layer(stock_of_paper, some)) < SAME


@pytest.mark.parametrize("count", [2, 3])
def test_stock_of_updates_that_point_apart_is_the_base_and_not_the_formulas_negative(count):
    """In the paper's picture, updates that share a part and err at right angles, no cosine is.

    At a mean cosine of -1/2 the formula turns the average of two around and doubles it, and for
    three it divides by zero.
    """
    angles = torch.arange(count) * 2 * torch.pi / 3
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    some = [Adapter({"unet.0": Layer(torch.eye(2, 5), row.expand(4, 2))}) for row in rows]
    ratio = float(stock_ratio(torch.stack([dense_of(adapter)["unet.0"] for adapter in some])))
    assert ratio == pytest.approx(-2, abs=1e-5) if count == 2 else abs(ratio) > 1e5
    assert not merged_by("stock", some)["unet.0"].any()


def np_of_paper(tasks, weights):
    """Eq. 10 at μ = 1/2, on the right: the style's eight directions, a third of the rest there."""
    subject, style = tasks
    directions = torch.linalg.svd(style, full_matrices=False).Vh[:8]
    projected = subject - subject @ directions.T @ directions / 3
    return weights[0] * projected + weights[1] * style


def tsv_of_paper(tasks, weights):
    """Dense SVDs, and the orthonormal matrices nearest to their vectors side by side."""
    parts = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    left = torch.cat([part.U[:, :8] for part in parts], dim=1)
    right = torch.cat([part.Vh[:8] for part in parts]).T
    values = torch.cat([w * part.S[:8] for w, part in zip(weights, parts, strict=True)])
    nearest = []
    for side in (left, right):
        p, _, q = torch.linalg.svd(side, full_matrices=False)
        nearest.append(p @ q)
    return nearest[0] * values @ nearest[1].T


def iso_of_paper(tasks, weights):
    """σ̄ U Vᵀ of the sum, within the sixteen directions that the adapters have."""
    left, values, right = torch.linalg.svd((weights[:, None, None] * tasks).sum(dim=0))
    return values[:16].mean() * left[:, :16] @ right[:16]


@pytest.mark.parametrize(
    ("method", "rule"), [("np", np_of_paper), ("tsv", tsv_of_paper), ("iso", iso_of_paper)]
)
def test_methods_on_directions_are_those_of_their_papers(method, rule):
    some, weights = make_adapters(16), [0.9, 0.7]
    assert apart(merged_by(method, some, weights), by_layer(rule, some, weights)) < SAME


# peft, asked itself.


@pytest.fixture(scope="module")
def combine_by_peft():
    """Let the installed peft combine adapters; its result is cut to no rank."""
    from peft import LoraConfig, get_peft_model

    def combine_them(some, weights, kind, **options):
        linear = [torch.nn.Linear(inputs, outputs) for outputs, inputs in SHAPES.values()]
        targets = [name.removeprefix("unet.") for name in SHAPES]
        rank = some[0].layers["unet.0"].rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        model = get_peft_model(torch.nn.Sequential(*linear), config, adapter_name="0")
        for number, adapter in enumerate(some):
            if number:
                model.add_adapter(str(number), config)
            for name, target in zip(SHAPES, targets, strict=True):
                layer = model.base_model.model[int(target)]
                layer.lora_A[str(number)].weight.data = adapter.layers[name].down.clone()
                layer.lora_B[str(number)].weight.data = adapter.layers[name].up.clone()
        names = [str(number) for number in range(len(some))]
        if kind != "cat":
            options["svd_rank"] = 30
        model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
        return {
            name: model.base_model.model[int(target)].get_delta_weight("merged").detach()
            for name, target in zip(SHAPES, targets, strict=True)
        }

    return combine_them


@pytest.mark.parametrize("kind", ["svd", "cat"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, -0.4]])
def test_the_sum_is_that_of_peft(combine_by_peft, kind, weights):
    some = make_adapters(17)
    assert apart(merged_by("sum", some, weights), combine_by_peft(some, weights, kind)) < SAME


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, 0.4]])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_is_that_of_peft(combine_by_peft, weights, density):
    some = make_adapters(18)
    theirs = combine_by_peft(some, weights, "ties_svd", density=density)
    options = {"density": density, "reduce": "mean", "election": "unweighted"}
    assert apart(merged_by("ties", some, weights, **options), theirs) < SAME


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, -0.4]])
def test_magnitude_is_that_of_peft(combine_by_peft, weights):
    some = make_adapters(19)
    theirs = combine_by_peft(some, weights, "magnitude_prune_svd", density=0.5)
    assert apart(merged_by("magnitude", some, weights, space="dense"), theirs) < SAME


# One threshold for the model.

WITH_THRESHOLD = ("ties", "knots", "core", "magnitude")


@pytest.mark.parametrize("method", WITH_THRESHOLD)
def test_the_models_threshold_does_not_depend_on_blocks_nor_on_the_order(method, monkeypatch):
    some, weights = make_adapters(20, 3), [1.0, 0.7, -0.4]
    before = merged_by(method, some, weights, threshold="model")
    again = merged_by(method, some[::-1], weights[::-1], threshold="model")
    for name in SHAPES:
        torch.testing.assert_close(again[name], before[name], rtol=1e-5, atol=1e-5)
    for numbers in (1, 70):
        monkeypatch.setattr(elementwise, "NUMBERS_PER_BLOCK", numbers)
        after = merged_by(method, some, weights, threshold="model")
        for name in SHAPES:
            assert torch.equal(after[name] != 0, before[name] != 0)
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", WITH_THRESHOLD)
def test_where_everything_is_kept_there_is_no_threshold(method):
    some = make_adapters(23)
    each, over_all = (
        merged_by(method, some, density=1.0, threshold=threshold)
        for threshold in ("layer", "model")
    )
    assert all(torch.equal(over_all[name], each[name]) for name in SHAPES)


def test_equal_magnitudes_stay_or_go_together_over_all_layers():
    """Of 2, 1, -1 and 1, 3, 1 a third are two; the next one of the four ones takes all along."""
    one = Adapter(
        {
            "unet.a": Layer(torch.eye(3), torch.tensor([[2.0, 1.0, -1.0]])),
            "unet.b": Layer(torch.eye(3), torch.tensor([[1.0, 3.0, 1.0]])),
        }
    )
    for density, kept in ((1 / 3, ([2, 0, 0], [0, 3, 0])), (0.5, ([2, 1, -1], [1, 3, 1]))):
        merged = merged_by("magnitude", [one], space="dense", threshold="model", density=density)
        assert (merged["unet.a"].tolist(), merged["unet.b"].tolist()) == ([kept[0]], [kept[1]])
    # By layer, each keeps one of its three.
    merged = merged_by("magnitude", [one], space="dense", density=1 / 3)
    assert [merged[name].tolist() for name in merged] == [[[2, 0, 0]], [[0, 3, 0]]]


def test_a_layer_may_keep_nothing_of_a_weak_update():
    """The model's threshold is above all of its entries; the layer is in the file no more."""
    strong, weak = (random_adapter(21, {kind: 2}).layers for kind in ("linear", "pointwise"))
    faint = Layer(weak["unet.pointwise"].down, 1e-3 * weak["unet.pointwise"].up)
    one = Adapter({**strong, "unet.pointwise": faint})
    options = {"threshold": "model", "density": 0.2}
    done = combine([one], MergeRequest([1.0], "ties", options))
    assert names_of([done.adapter]) == {"unet.linear"}
    assert done.reports["unet.pointwise"].rank == 0
    assert names_of([combine([one], MergeRequest([1.0], "ties", {})).adapter]) == set(one.layers)


def test_a_layer_of_weight_zero_has_no_say_in_the_threshold():
    one, other = make_adapters(22)
    blocks = [BlockWeights((("unet.1", 0.0),)), NO_BLOCKS]
    options = {"threshold": "model", "density": 0.2}
    without = Adapter({n: layer for n, layer in one.layers.items() if n != "unet.1"})
    once = combine([one, other], MergeRequest([1.0, 1.0], "knots", options, blocks=blocks)).adapter
    assert_same(once, combine([without, other], MergeRequest([1.0, 1.0], "knots", options)).adapter)


def test_what_was_recorded_before_there_was_a_choice_means_each_layer():
    old = {"density": 0.5, "election": "weighted", "reduce": "sum", "scale": 1.0, "space": "dense"}
    assert find_method("ties").read_options(old) == {**old, "threshold": "layer"}
