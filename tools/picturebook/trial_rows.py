"""The trial summed up: each measure with its number, its interval and its goal.

Persons are always the sample: their means are averaged, and other persons would give another mean.
Where all persons draw the same prompts, these are a second sample that crosses the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
from jaxtyping import Float

from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.intervals import Estimate, Interval
from tools.picturebook.measurements import Row, at_least, at_most
from tools.picturebook.obedience_front import FrontPoint, identity_at_obedience, measure_area
from tools.picturebook.trial_judging import WITH, WITHOUT, Outcome
from tools.picturebook.trial_measures import ClassChange, Obedience

LIFT_GOAL = 0.85
COPY_GOAL = 0.05
LOST_GOAL = 0.03
CONTRADICTED_GOAL = 0.75
KEPT_GOAL = 0.6
WITHIN_GOAL = 0.85
"""Seven persons of eight: of sets of drawings 95 % lie within."""
UNFAMILIAR_GOAL = 0.05
VARIETY_GOAL = 0.75
CLASS_SPREAD_GOAL = 0.05
CLASS_DISTANCE_GOAL = 0.411 / 2
"""Half of what three persons gave without further class prompts and caption dropout."""
OTHERS_GOAL = 0.95
LEAKAGE_GOAL = 2.0


def trial_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Sum the trial up in rows of the table."""
    rows = [
        *identity_rows(outcomes),
        lost_row(outcomes),
        *contradiction_rows(outcomes),
        *appearance_rows(outcomes),
        *class_rows(outcomes),
        others_row(outcomes),
    ]
    rows += [leakage_row(outcomes)] if any(one.rises for one in outcomes) else []
    return rows + (front_rows(outcomes) if any(one.front for one in outcomes) else [])


def identity_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """How like the subjects the portraits are, and how much more like their very photos."""
    lifts = [one.lift for one in outcomes]
    middle = median_with_interval(lifts)
    copied = over_people([one.lift_on_photos - one.lift for one in outcomes])
    on_photos = np.median([one.lift_on_photos for one in outcomes])
    return [
        _row(at_least, "median identity lift", middle, LIFT_GOAL, _list_each(lifts)),
        _row(
            at_most,
            "lift on the photos above that on drawings",
            copied,
            COPY_GOAL,
            f"median on the photos {on_photos:.2f}",
        ),
    ]


def lost_row(outcomes: Sequence[Outcome]) -> Row:
    """How much less of what prompts ask for the adapters draw than the base model."""
    asked = [one.asked for one in outcomes]
    lost = over_people_and_prompts(
        [np.subtract(one.shares_below, one.shares).tolist() for one in asked], asked[0].prompts
    )
    if lost.interval:
        # None lost of a hundred is no certainty either.
        low, high = lost.interval
        lost = replace(lost, interval=(low, max(high, _wilson(max(0.0, lost.value), lost.n)[1])))
    note = f"{_mean(asked):.1%} with adapters, {_mean_below(asked):.1%} without"
    return _row(at_most, "attributes lost against the base", lost, LOST_GOAL, note)


def contradiction_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """How often what contradicts the subject is obeyed, and how much of the face is kept."""
    odd = [one.contradicting for one in outcomes]
    obeyed = share_over_people_and_prompts([one.shares for one in odd], odd[0].prompts)
    shares = np.array([*chain.from_iterable(one.shares for one in odd)])
    left_out = np.array([*chain.from_iterable(one.left_out for one in outcomes)])
    note = (
        f"{shares[~left_out].mean():.1%} where class prompts ask for it, "
        f"{shares[left_out].mean():.1%} where none does; base model {_mean_below(odd):.1%}"
    )
    kept = [one.kept for one in outcomes]
    return [
        _row(at_least, "contradicting attributes obeyed", obeyed, CONTRADICTED_GOAL, note),
        _row(at_least, "lift where contradicted", over_people(kept), KEPT_GOAL, _list_each(kept)),
    ]


def appearance_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Whether pictures are off: in colour, sharpness, familiarity and variety."""
    looks = [one.appearance for one in outcomes]
    off = [one.off for one in looks]
    strange = share_over_people_and_prompts([one.unfamiliar for one in looks])
    variety = over_people([one.variety / one.variety_drawn for one in looks])
    step = np.mean([one.colour for one in off])
    change = np.mean([one.sharpness for one in off])
    return [
        _within_row(
            "colour within drawings",
            [one.colour / one.colour_limit for one in off],
            f"ΔE {step:.1f}",
        ),
        _within_row(
            "sharpness within drawings",
            [abs(one.sharpness) / one.sharpness_limit for one in off],
            f"log2 {change:+.2f}",
        ),
        _row(at_most, "pictures unfamiliar to the reader", strange, UNFAMILIAR_GOAL),
        _row(at_least, "variety of portraits, of drawings'", variety, VARIETY_GOAL),
    ]


def _within_row(name: str, spreads: Sequence[float], note: str) -> Row:
    """Count the persons whose portraits lie no farther from drawings than drawings would.

    Args:
        name: What is compared.
        spreads: Of each person, how far they lie from them, in units of that limit.
        note: What else should be known.
    """
    within = sum(one <= 1 for one in spreads)
    found = Estimate(
        within / len(spreads), len(spreads), _wilson(within / len(spreads), len(spreads))
    )
    return _row(at_least, name, found, WITHIN_GOAL, f"in limits: {_list_each(spreads)}; {note}")


def class_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """What became of the class: its spread, and how far it moved in whatever direction."""
    changes = [one.of_class for one in outcomes]
    moved = over_people([abs(one.spread - one.spread_below) for one in changes])
    distance = over_people_and_prompts([one.distances for one in changes], changes[0].prompts)
    spread = np.mean([one.spread for one in changes])
    colours = over_people_and_prompts([one.colours for one in changes], changes[0].prompts)
    return [
        _row(
            at_most,
            "class spread, away from the base's",
            moved,
            CLASS_SPREAD_GOAL,
            f"mean cosine {spread:.3f}, base model {changes[0].spread_below:.3f}; "
            f"{_name_commoner_hair(changes)}",
        ),
        _row(
            at_most,
            "class distance, in every direction",
            distance,
            CLASS_DISTANCE_GOAL,
            f"ΔE {colours.value:.1f}",
        ),
    ]


def _name_commoner_hair(changes: Sequence[ClassChange]) -> str:
    """Name the colour of hair that the class has gained most of."""
    now = [*chain.from_iterable(one.hair for one in changes)]
    below = [*chain.from_iterable(one.hair_below for one in changes)]

    def share(colour: str, seen: Sequence[str]) -> float:
        return seen.count(colour) / len(seen)

    gained = max(sorted({*now}), key=lambda colour: share(colour, now) - share(colour, below))
    return f"hair {gained} in {share(gained, now):.0%} instead of {share(gained, below):.0%}"


def others_row(outcomes: Sequence[Outcome]) -> Row:
    """Whether other classes are still what they were."""
    read = share_over_people_and_prompts([one.others.read for one in outcomes])
    step = np.mean([one.others.colours for one in outcomes])
    return _row(at_least, "other classes, kind still read", read, OTHERS_GOAL, f"ΔE {step:.1f}")


def leakage_row(outcomes: Sequence[Outcome]) -> Row:
    """How many times more of the subject leaks into its class without class images than with.

    A rise that cannot be told from none counts as large as its own uncertainty: dividing by it
    as it is would make the ratio as large as chance likes.
    """
    name = "DreamBooth: leakage without class images, of with"
    both = [one.rises for one in outcomes if one.rises]
    rise = {
        how: intervals.mean_with_interval(np.array([x for rises in both for x in rises[how]]))
        for how in (WITH, WITHOUT)
    }
    with_prior, without = rise[WITH], rise[WITHOUT]
    note = f"rise {without.value:.3f} without, {with_prior.value:.3f} with"
    ends = with_prior.interval
    uncertain = (ends[1] - ends[0]) / 2 if ends else 0.0
    if with_prior.value < uncertain:
        note += f", taken as {uncertain:.3f}"
    below = max(with_prior.value, uncertain)
    if below <= 0:
        return Row(name, None, LEAKAGE_GOAL, False, with_prior.n, None, f"{note}: no ratio")
    return at_least(name, without.value / below, LEAKAGE_GOAL, with_prior.n, note=note)


def front_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """How much more adapters give with class images than without, at equal likeness."""
    fronts = [one.front for one in outcomes if one.front]
    measures: tuple[tuple[str, Callable[[Sequence[FrontPoint]], float]], ...] = (
        ("area under the front, with above without", measure_area),
        ("identity at equal obedience, with above without", identity_at_obedience),
    )
    rows: list[Row] = []
    for name, measure in measures:
        found = {how: [measure(front[how]) for front in fronts] for how in (WITH, WITHOUT)}
        gained = over_people(np.subtract(found[WITH], found[WITHOUT]).tolist())
        note = f"{np.mean(found[WITH]):.3f} with, {np.mean(found[WITHOUT]):.3f} without"
        rows.append(_row(at_least, name, gained, 0.0, note))
    return rows


def over_people(values: Sequence[float]) -> Estimate:
    """Estimate a mean of one value a person."""
    return intervals.mean_with_interval(np.array(values))


def over_people_and_prompts(
    values: Sequence[Sequence[float]], prompts: Sequence[int] | None = None
) -> Estimate:
    """Estimate a mean of as many pictures of each person, of the same prompts and seeds.

    Args:
        values: Of each person, a value for each picture.
        prompts: For each picture, the number of its prompt; None if they count singly.
    """
    table: Float[np.ndarray, "pictures people"] = np.array(values, dtype=np.float64).T
    clusters = [*range(len(table))] if prompts is None else prompts
    found = intervals.mean_with_interval(table, clusters)
    return Estimate(found.value, table.size, found.interval)


def share_over_people_and_prompts(
    right: Sequence[Sequence[float]], prompts: Sequence[int] | None = None
) -> Estimate:
    """Estimate a share of pictures, each of them right (1) or not (0).

    All right of eight is no certainty: the interval is never narrower than Wilson's.
    """
    found = over_people_and_prompts(right, prompts)
    low, high = _wilson(found.value, found.n)
    if found.interval:
        low, high = min(low, found.interval[0]), max(high, found.interval[1])
    return Estimate(found.value, found.n, (max(0.0, low), min(1.0, high)))


def median_with_interval(values: Sequence[float]) -> Estimate:
    """Estimate a median of one value a person, by drawing persons again."""
    draws = intervals.draw([0] * len(values))
    counts = (draws.units * len(values)).round().astype(int)
    medians = np.array([np.median(np.repeat(values, row)) for row in counts])
    sampled = intervals.Sampled(float(np.median(values)), medians)
    ends = intervals.interval(sampled, draws.independent, draws.confidence)
    return Estimate(sampled.value, len(values), ends)


def _wilson(share: float, count: int) -> Interval:
    return intervals.wilson_interval(round(share * count), count) or (0.0, 1.0)


def _row(judge: partial[Row], name: str, found: Estimate, goal: float, note: str = "") -> Row:
    return judge(f"DreamBooth: {name}", found.value, goal, found.n, found.interval, note)


def _mean(read: Sequence[Obedience]) -> float:
    return float(np.mean([one.shares for one in read]))


def _mean_below(read: Sequence[Obedience]) -> float:
    return float(np.mean([one.shares_below for one in read]))


def _list_each(values: Sequence[float]) -> str:
    return f"each: {', '.join(f'{value:.2f}' for value in values)}"
