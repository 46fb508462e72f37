"""How often `dreamloom compare` sees a change where there is none, and how often it misses one.

    python benchmarks/comparison_errors.py [--trials 1000]

Prints two tables in Markdown, which stand in `docs/statistics.md`. Three scores are compared
together. Prompts differ four times as much as the pictures of one, and the same prompts stand on
both sides. An error is a comparison that calls any score better or worse though nothing changed;
with 1000 trials, 5 % are known to 1.4 points either way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dreamloom.evaluation.compare import Comparison, compare_cards, compare_settings
from dreamloom.evaluation.metrics.scorecard import PictureScores, Score, Scorecard

Rng = np.random.Generator
MEASURES = ("identity", "clip_t", "leakage")


@dataclass(frozen=True)
class Case:
    """One kind of comparison.

    Args:
        prompts: How many.
        seeds: How many pictures each prompt has.
        kind: How pictures scatter around their prompt.
        trainings: How many on each side.
        luck: Spread of trainings, in units of the spread of a prompt's pictures.
    """

    prompts: int
    seeds: int
    kind: str = "normal"
    trainings: int = 1
    luck: float = 0.0

    def scatter(self, rng: Rng) -> np.ndarray:
        """Draw what is peculiar to each picture, with a spread of about 1."""
        shape = (self.prompts, self.seeds)
        if self.kind == "skewed":
            return rng.exponential(size=shape) - 1
        return rng.standard_t(3, shape) if self.kind == "outliers" else rng.normal(size=shape)

    def draw(self, rng: Rng, shared: np.ndarray, gap: float) -> Scorecard:
        """Draw one side's evaluation, better by ``gap`` in identity."""
        values = {name: shared + self.scatter(rng) + rng.normal(0, self.luck) for name in MEASURES}
        values["identity"] = values["identity"] + gap
        return Scorecard(
            scores={name: Score(value=float(own.mean()), key="k") for name, own in values.items()},
            encoders="standard",
            photos=6,
            confidence=0.95,
            resamples=1,
            pictures=tuple(
                PictureScores(
                    file=f"{prompt}-{seed}.png",
                    prompt=f"prompt {prompt}",
                    category="",
                    seed=seed,
                    scheduler="ddim",
                    steps=25,
                    values={name: float(own[prompt, seed]) for name, own in values.items()},
                )
                for prompt in range(self.prompts)
                for seed in range(self.seeds)
            ),
        )

    def compare(self, rng: Rng, gap: float = 0.0) -> Sequence[Comparison]:
        """Draw both sides and compare them."""
        shared = 4 * rng.normal(size=(self.prompts, 1))
        first, second = (
            [self.draw(rng, shared, more) for _ in range(self.trainings)] for more in (0.0, gap)
        )
        if self.trainings == 1:
            return compare_cards(first[0], second[0])
        return compare_settings(first, second)


NULL = (
    *(
        Case(prompts, seeds, kind)
        for kind in ("normal", "skewed", "outliers")
        for prompts, seeds in ((7, 4), (12, 4), (25, 2), (25, 8))
    ),
    Case(1, 16),
    Case(25, 2, trainings=3),
    Case(25, 2, trainings=3, luck=0.5),
    Case(25, 2, trainings=3, luck=2.0),
    Case(25, 2, trainings=5, luck=2.0),
    Case(25, 2, luck=0.5),
)
PLANTED = tuple(
    (Case(prompts, seeds), gap)
    for prompts, seeds in ((7, 4), (12, 4), (25, 2), (25, 8))
    for gap in (0.25, 0.5, 1.0)
)


def measure_errors(case: Case, trials: int, seed: int = 0) -> float:
    """Give the share of comparisons that find a change though there is none."""
    rng = np.random.default_rng(seed)
    found = [
        any(one.outcome in {"better", "worse"} for one in case.compare(rng)) for _ in range(trials)
    ]
    return float(np.mean(found))


def measure_power(case: Case, gap: float, trials: int, seed: int = 0) -> tuple[float, float]:
    """Give the shares of comparisons that call identity better, and worse, where it is better."""
    rng = np.random.default_rng(seed)
    found = [case.compare(rng, gap)[0].outcome for _ in range(trials)]
    return found.count("better") / trials, found.count("worse") / trials


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    print("| pictures | prompts | seeds | trainings | luck of a training | errors |")
    print("|---|---|---|---|---|---|")
    for case in NULL:
        errors = measure_errors(case, trials)
        print(
            f"| {case.kind} | {case.prompts} | {case.seeds} | {case.trainings} | {case.luck:g} "
            f"| {errors:.1%} |",
            flush=True,
        )
    print("\n| prompts | seeds | change | found | taken for its opposite |")
    print("|---|---|---|---|---|")
    for case, gap in PLANTED:
        better, worse = measure_power(case, gap, trials)
        print(
            f"| {case.prompts} | {case.seeds} | {gap:g} | {better:.0%} | {worse:.1%} |", flush=True
        )


if __name__ == "__main__":
    main()
