"""What a merge keeps of its parts."""

import pytest
import torch

from dreamloom.evaluation.metrics.retention import (
    choose_cells,
    combine_retention,
    measure_retention,
)
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.stats import intervals as statistics


def features(*, towards: torch.Tensor, share: float, n: int = 12) -> torch.Tensor:
    """Vectors whose similarity to a reference is near a share, each a little different."""
    rng = torch.Generator().manual_seed(round(1000 * share))
    shares = share + 0.02 * torch.randn(n, 1, generator=rng)
    across = torch.nn.functional.normalize(torch.randn(n, 8, generator=rng), dim=1)
    across = across - (across @ towards)[:, None] * towards
    across = torch.nn.functional.normalize(across, dim=1)
    return shares * towards + (1 - shares.square()).clamp(min=0).sqrt() * across


TOWARDS = torch.nn.functional.normalize(torch.ones(8), dim=0)
REFERENCES = TOWARDS.repeat(6, 1)


def retain(merged: float, none: float, full: float) -> Score:
    return measure_retention(
        merged=features(towards=TOWARDS, share=merged),
        none=features(towards=TOWARDS, share=none),
        full=features(towards=TOWARDS, share=full),
        references=REFERENCES,
        draws=statistics.draw(["a", "b", "c", "d"] * 3, 6, resamples=500),
        key="test",
    )


def test_retention_is_the_share_of_the_way():
    found = retain(0.5, 0.2, 0.8)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.interval[0] < found.value < found.interval[1]
    assert (found.n, found.key) == (12, "test")
    assert retain(0.2, 0.2, 0.8).value == pytest.approx(0)
    assert retain(0.8, 0.2, 0.8).value == pytest.approx(1)
    assert retain(0.1, 0.2, 0.8).value < 0


def test_where_the_part_changes_nothing_retention_means_nothing():
    found = retain(0.5, 0.3, 0.3)
    assert found.value is None
    assert "does not differ clearly" in found.note


def test_a_reference_earns_nothing_by_being_the_same_picture():
    """The part alone drew the references: against itself it must not be as like as can be."""
    full, none = (features(towards=TOWARDS, share=share) for share in (0.5, 0.1))
    prompts = ["a", "b", "c", "d"] * 3
    comparable = torch.tensor([[one != other for other in prompts] for one in prompts])
    found = measure_retention(
        merged=features(towards=TOWARDS, share=0.501),
        none=none,
        full=full,
        references=full,
        draws=statistics.draw(prompts, resamples=500),
        key="test",
        comparable=comparable,
    )
    assert found.value == pytest.approx(1, abs=0.1)
    with_itself = measure_retention(
        merged=features(towards=TOWARDS, share=0.501),
        none=none,
        full=full,
        references=full,
        draws=statistics.draw(prompts, len(full), resamples=500),
        key="test",
    )
    assert with_itself.value < found.value - 0.1


def test_neither_makes_up_for_the_other():
    assert combine_retention(Score(value=1.0), Score(value=1.0)) == 1
    assert combine_retention(Score(value=0.0), Score(value=1.0)) == 0
    assert combine_retention(Score(value=-3.0), Score(value=1.0)) == 0
    assert combine_retention(Score(value=9.0), Score(value=0.5)) == pytest.approx(2 / 3)
    assert combine_retention(Score(), Score(value=1.0)) is None


def test_only_what_all_have_drawn_is_compared():
    cells = [[("a", seed, "ddim", 20) for seed in seeds] for seeds in ((0, 1, 2), (2, 0), (5, 2))]
    assert choose_cells(cells) == [[2], [0], [1]]
    assert choose_cells([cells[0], []]) == [[], []]
