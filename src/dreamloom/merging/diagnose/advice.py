"""Advice on merging two LoRAs, in sentences; each rule states its threshold and why.

The rules speak of weights. Whether a picture gets better, only pictures can tell.
"""

from __future__ import annotations

from dreamloom.merging.diagnose.measuring import Diagnosis, Together, group_layers

UNEQUAL = 4.0
"""Energies this far apart leave the weaker adapter a fifth of the sum's, if they are unrelated."""

ADDING = 0.2
"""The share by which the sum's energy may differ from that of unrelated adapters."""

NO_OVERLAP = 0.05
"""Below this, taking the whole overlap out of an adapter moves it by less than 5 % of its norm."""

OVERLAP = 0.3
"""From this on, NP-LoRA at mu = 0.5, which takes out a third of the overlap, moves an adapter by
10 % of its norm or more."""

ABOVE_CHANCE = 1.5
"""Overlaps up to this many times that of unrelated spaces are no sign of anything shared."""

ALIKE = 0.5
"""From this cosine on, adapters were taught the same: to keep them apart would undo both."""

SMALL_ERROR = 0.05
"""An error that a rank may cost: half-precision files and the choice of a weight cost as much."""


def give_advice(diagnosis: Diagnosis) -> list[str]:
    """Say what to do, the most important first; one sentence or two for each finding."""
    together = diagnosis.together
    if together.shared == 0:
        one, other = diagnosis.names
        return [
            f"{one} and {other} have no layer in common, so every method gives their plain sum: "
            "choose weights.",
            *_advise_rank(diagnosis),
        ]
    return [
        *_advise_strength(diagnosis),
        *_advise_direction(diagnosis),
        *_advise_overlap(diagnosis),
        *_advise_rank(diagnosis),
        *_advise_coverage(diagnosis),
    ]


def _advise_strength(diagnosis: Diagnosis) -> list[str]:
    """Energies 4 : 1 or more apart drown the weaker adapter."""
    ratio = diagnosis.together.ratio or 1.0
    strong, weak = (0, 1) if ratio >= 1 else (1, 0)
    names, energy = diagnosis.names, max(ratio, 1 / ratio) ** 2
    said = []
    if energy >= UNEQUAL:
        weight = diagnosis.weights[strong] / energy**0.5
        shown = f"{weight:.2f}" if weight >= 0.1 else f"{weight:.2g}"
        said.append(
            f"{names[strong]} has {_round(energy)} times the energy of {names[weak]}, and may "
            f"drown it: give it the weight {shown}, or merge with --method equal."
        )
    odd = [
        group
        for group in group_layers(diagnosis)
        if group.together.ratio and _distance(group.together.ratio, ratio) >= UNEQUAL
    ]
    if odd:
        worst = max(odd, key=lambda group: _distance(group.together.ratio or 1.0, ratio))
        there = worst.together.ratio or 1.0
        more = f", and {len(odd) - 1} more blocks differ as much" if len(odd) > 1 else ""
        said.append(
            f"In {worst.name} the energies are {_as_ratio(there)}, and {_as_ratio(ratio)} over all"
            f"{more}: --method equal with scope=layer levels every layer, "
            f"or give that block a weight of its own with --blocks."
        )
    return said


def _distance(ratio: float, usual: float) -> float:
    return max(ratio / usual, usual / ratio) ** 2


def _as_ratio(ratio: float) -> str:
    energy = ratio**2
    return f"{_round(energy)} : 1" if energy >= 1 else f"1 : {_round(1 / energy)}"


def _round(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _advise_direction(diagnosis: Diagnosis) -> list[str]:
    """Updates that point the same way add up to more than unrelated ones, opposite ones cancel."""
    together = diagnosis.together
    one, other = together.norms
    gain = 2 * (together.cosine or 0.0) * one * other / (one**2 + other**2)
    if gain >= ADDING:
        return [
            f"They change the same things the same way (cosine {together.cosine:.2f}): their sum "
            f"has {gain:.0%} more energy than unrelated adapters would give, and may burn; lower "
            "both weights, or merge with --method matched."
        ]
    if gain <= -ADDING:
        return [
            f"They work against each other (cosine {together.cosine:.2f}): {-gain:.0%} of their "
            "energy cancels in the sum, and no choice of weights brings it back."
        ]
    return []


def _advise_overlap(diagnosis: Diagnosis) -> list[str]:
    """Say whether methods that separate the adapters' inputs have anything to separate."""
    together, (one, other) = diagnosis.together, diagnosis.names
    if (together.cosine or 0.0) >= ALIKE:
        return []
    assert together.row_overlap is not None
    assert together.row_chance is not None
    overlap, chance = together.row_overlap[0], together.row_chance[0]
    said = f"{overlap:.0%} of {one} lies where {other} looks, too"
    usual = f"(unrelated adapters of these ranks: {chance:.0%})"
    if overlap < NO_OVERLAP:
        return [
            f"Only {said}: methods that keep them apart, such as np, give the plain sum; choose "
            "weights."
        ]
    # Where the overlap is large and above chance, the strongest first.
    places = [
        group
        for group in group_layers(diagnosis, kinds=True)
        if group.together.row_chance is not None
        and _overlap(group.together) >= OVERLAP
        and _overlap(group.together) > ABOVE_CHANCE * group.together.row_chance[0]
    ]
    places.sort(key=lambda group: -_overlap(group.together))
    if places:
        where = ", ".join(f"{group.name} ({_overlap(group.together):.0%})" for group in places[:3])
        return [
            f"{said} {usual}, most of all in {where}: there --method np --set mu=0.5 takes a "
            f"third of that out of {one} and leaves {other} whole."
        ]
    if overlap <= ABOVE_CHANCE * chance:
        return [
            f"{said}, as unrelated adapters of these ranks do by chance ({chance:.0%}): methods "
            "that keep them apart, such as np, have nothing to part; choose weights for the sum."
        ]
    return [
        f"{said} {usual}, which is little: begin with the plain sum, and try --method np if one "
        "disturbs the other."
    ]


def _overlap(together: Together) -> float:
    return together.row_overlap[0] if together.row_overlap else 0.0


def _advise_rank(diagnosis: Diagnosis) -> list[str]:
    """Say what a rank costs: that of the thicker adapter, and the least that hardly costs."""
    errors = diagnosis.together.errors
    highest = max(sum(pair.ranks) for pair in diagnosis.pairs)
    single = max(max(pair.ranks) for pair in diagnosis.pairs)
    enough = next((rank for rank, error in errors.items() if error <= SMALL_ERROR), None)
    known = [rank for rank in errors if rank <= single]
    cost = f"Cut to rank {known[-1]}, the sum is {errors[known[-1]]:.1%} off"
    if enough is None:
        return [f"{cost}; keep --rank full ({highest})."]
    if errors[known[-1]] <= SMALL_ERROR and enough >= known[-1]:
        return [f"{cost}, which hardly counts: --rank {known[-1]} does."]
    if enough < known[-1]:
        return [f"{cost}, and at rank {enough} {errors[enough]:.1%}: --rank {enough} does."]
    if enough >= highest:
        return [f"{cost}; keep --rank full ({highest})."]
    return [f"{cost}; at rank {enough} it is {errors[enough]:.1%}: --rank {enough} does."]


def _advise_coverage(diagnosis: Diagnosis) -> list[str]:
    """Tell of layers that only one of them changes."""
    together = diagnosis.together
    alone = [
        (name, sum(1 for pair in diagnosis.pairs if pair.norms[1 - side] == 0))
        for side, name in enumerate(diagnosis.names)
    ]
    counts = [f"{name} alone changes {count}" for name, count in alone if count]
    if not counts:
        return []
    return [f"Of {together.layers} layers, {' and '.join(counts)}; there every method is the sum."]
