"""LoRA schedules: how strongly each adapter is applied at each step, and in which layers.

A weight that follows the steps is a `Curve`. Adapters applied together can take turns (LoRA Switch)
or share the layers out (K-LoRA); both only open and close what the curves weigh. Everything here
is settled before the first step, so drawing costs no more for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.lora.adapter import Adapter, refuse_other_kinds

CompositionMethod: TypeAlias = Literal["sum", "switch", "k-lora"]
"""How adapters share a drawing: all at once, one after the other, or layer by layer."""

METHODS: tuple[CompositionMethod, ...] = get_args(CompositionMethod)

COMPOSITIONS = "sum, switch, switch:STEPS, k-lora and k-lora:ALPHA,BETA"
"""How a `Composition` is typed."""

# So many entries of a layer tell which ones are large, at little cost.
_SAMPLE = 65_536


def acts_on_text(layer: str) -> bool:
    """Whether a layer, by its name in an adapter, is a text encoder's.

    Prompts are encoded once, before the first step, so such layers can follow no schedule.
    """
    return layer.startswith("text_encoder")


@dataclass(frozen=True)
class Moment:
    """Where a drawing stands.

    Args:
        step: The step that is being taken, from 0. A scheduler that looks twice at one timestep,
            as PNDM and Heun do, is then twice at the same step.
        steps: How many there are, 1 or more.
    """

    step: int
    steps: int

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last; 0 where there is only one."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.0


START = Moment(0, 1)
"""Before a drawing begins, and wherever none is going on."""


@dataclass(frozen=True)
class Curve:
    """A weight over the progress of a drawing: straight lines between points.

    Before the first point its weight holds, after the last one that one's. Two points at one
    place make a jump, from there on to the second.

    Args:
        points: (progress, weight), one or more; progress in [0, 1] and never falling, weights
            finite, negative ones allowed.

    Raises:
        ValueError: If there is no point, or one is out of range or order.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a schedule needs a point")
        for progress, weight in self.points:
            if not 0 <= progress <= 1:
                raise ValueError(f"the progress {progress:g} is not between 0 and 1")
            if not math.isfinite(weight):
                raise ValueError(f"the weight {weight:g} is not finite")
        for (before, _), (after, _) in pairwise(self.points):
            if after < before:
                raise ValueError(f"the progress falls from {before:g} to {after:g}")

    @classmethod
    def constant(cls, weight: float) -> Curve:
        """The same weight from beginning to end."""
        return cls(((0.0, float(weight)),))

    def weight(self, progress: float) -> float:
        """The weight at a progress in [0, 1]."""
        begun = [number for number, (place, _) in enumerate(self.points) if place <= progress]
        if not begun:
            return self.points[0][1]
        left = begun[-1]
        if left == len(self.points) - 1:
            return self.points[-1][1]
        (start, low), (end, high) = self.points[left : left + 2]
        return low + (progress - start) / (end - start) * (high - low)

    @property
    def strongest(self) -> float:
        """The weight farthest from 0."""
        return max((weight for _, weight in self.points), key=abs)

    def __str__(self) -> str:
        """As it is typed: ``1@0,0.4@0.5,0@1``; see `parse_curve`."""
        return ",".join(f"{_type(weight)}@{_type(progress)}" for progress, weight in self.points)


def _type(number: float) -> str:
    return repr(number).removesuffix(".0")


def parse_curve(text: str) -> Curve:
    """Read ``WEIGHT@PROGRESS,WEIGHT@PROGRESS…`` as it is typed, such as ``1@0,0.4@0.5,0@1``.

    Raises:
        ValueError: If a part is not two numbers with @ between, or `Curve` refuses the points.
    """
    points = []
    for part in text.split(","):
        weight, at, progress = part.partition("@")
        try:
            if not at:
                raise ValueError
            points.append((float(progress), float(weight)))
        except ValueError:
            raise ValueError(f"{part!r} is no WEIGHT@PROGRESS") from None
    return Curve(tuple(points))


@dataclass(frozen=True)
class Turn:
    """LoRA Switch: adapters take turns, each for some steps.

    At step t the adapter numbered floor(t / ``every``) mod ``adapters`` is applied, no other.

    Args:
        place: The number of this one, from 0.
        adapters: How many take turns.
        every: Steps of one turn, 1 or more.

    Source:
        Zhong et al., Multi-LoRA Composition for Image Generation (arXiv:2402.16843):
        LoRA Switch.
    """

    place: int
    adapters: int
    every: int

    def is_open(self, layer: str, moment: Moment) -> bool:
        """Whether it is this one's turn."""
        del layer
        return (moment.step // self.every) % self.adapters == self.place

    def __str__(self) -> str:
        return f"turn {self.place + 1} of {self.adapters}, {self.every} steps each"


@dataclass(frozen=True)
class LayerShare:
    """K-LoRA: each layer applies the subject up to a progress of its own, and then the style.

    Args:
        role: Whose share this is.
        table: Up to which progress the subject has a layer, by name; see `share_layers`. A layer
            that is not in it is applied throughout.
        alpha: What the table was made with, to be told.
        beta: Likewise.
    """

    role: Literal["subject", "style"]
    table: Mapping[str, float]
    alpha: float
    beta: float

    def is_open(self, layer: str, moment: Moment) -> bool:
        """Whether this one has the layer now."""
        if layer not in self.table:
            return True
        return (moment.progress <= self.table[layer]) == (self.role == "subject")

    def __str__(self) -> str:
        return f"k-lora {self.role}, alpha {_type(self.alpha)}, beta {_type(self.beta)}"


@dataclass(frozen=True)
class LoraSchedule:
    """How strongly one adapter is applied, at each step and in each layer.

    Args:
        curve: Its weight over the progress.
        gate: When and where it is applied at all; None is always and everywhere.
        conditional_only: Whether the unconditional half of classifier-free guidance does without.
    """

    curve: Curve
    gate: Turn | LayerShare | None = None
    conditional_only: bool = False

    def weight(self, layer: str, moment: Moment) -> float:
        """The weight of a layer's change at a moment.

        Text encoders act before the first step. Their layers have the weight that the curve
        reaches at its strongest, whatever the moment: so the prompts are encoded as the adapter
        was trained to read them.
        """
        if acts_on_text(layer):
            return self.curve.strongest
        if self.gate is not None and not self.gate.is_open(layer, moment):
            return 0.0
        return self.curve.weight(moment.progress)

    def __str__(self) -> str:
        """In words, and completely: equal adapters on equal schedules draw equal pictures."""
        parts = [str(self.curve), "" if self.gate is None else str(self.gate)]
        parts.append("conditional only" if self.conditional_only else "")
        return "; ".join(part for part in parts if part)


Strength: TypeAlias = float | LoraSchedule
"""A weight for the whole drawing, or one that follows its steps."""


@dataclass(frozen=True)
class Composition:
    """How several adapters are applied in one drawing.

    Args:
        method: sum, switch or k-lora.
        every: For switch: steps of one turn, 1 or more.
        alpha: For k-lora: how fast layers go over to the style, above 0.
        beta: For k-lora: how much the style counts at the first step, 0 or more.
        conditional_only: Whether the unconditional half of guidance sees the base model.

    Raises:
        ValueError: If a number is out of range.
    """

    method: CompositionMethod = "sum"
    every: int = 1
    alpha: float = 1.5
    beta: float = 0.5
    conditional_only: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a turn of {self.every} steps is none; take 1 or more")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"k-lora's alpha must be above 0, not {self.alpha:g}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"k-lora's beta must be 0 or more, not {self.beta:g}")

    def check(self, adapters: int) -> None:
        """Check that so many adapters can be applied in this manner.

        Raises:
            ValueError: If there are too few or too many.
        """
        if self.method == "switch" and adapters < 2:
            raise ValueError(f"switch takes turns between two adapters or more, not {adapters}")
        if self.method == "k-lora" and adapters != 2:
            raise ValueError(f"k-lora takes two adapters, subject and style, not {adapters}")
        if self.conditional_only and not adapters:
            raise ValueError("without an adapter nothing can be on the conditional half only")


TOGETHER = Composition()
"""All adapters at once, in both halves of guidance: the sum of their changes."""


def parse_composition(text: str, conditional_only: bool = False) -> Composition:
    """Read what `COMPOSITIONS` lists, such as ``switch:2``.

    Raises:
        ValueError: If it is none of them, or a number is out of range.
    """
    word, colon, rest = text.partition(":")
    unclear = ValueError(f"{text!r} is none of {COMPOSITIONS}")
    method = next((method for method in METHODS if method == word), None)
    if method is None:
        raise unclear
    composition = Composition(method, conditional_only=conditional_only)
    if not colon:
        return composition
    try:
        numbers = [float(number) for number in rest.split(",")]
    except ValueError:
        raise unclear from None
    if method == "switch" and len(numbers) == 1 and numbers[0].is_integer():
        return replace(composition, every=int(numbers[0]))
    if method == "k-lora" and len(numbers) == 2:
        return replace(composition, alpha=numbers[0], beta=numbers[1])
    raise unclear


def set_lora_schedules(
    adapters: Sequence[Adapter],
    weights: Sequence[float | Curve],
    composition: Composition = TOGETHER,
) -> list[Strength]:
    """Settle for each adapter how it is applied; a plain weight stays one where nothing moves it.

    Args:
        adapters: The adapters; for k-lora the subject, then the style.
        weights: The weight of each, or its curve.
        composition: How they are applied together.

    Raises:
        AdapterError: If k-lora is asked of another kind than LoRA.
        ValueError: If their number does not suit the manner.
    """
    composition.check(len(adapters))
    table: Mapping[str, float] = {}
    if composition.method == "k-lora":
        subject, style = adapters
        table = share_layers(subject, style, composition.alpha, composition.beta)
    return _assign(weights, composition, table)


def describe_lora_schedules(
    weights: Sequence[float | Curve], composition: Composition = TOGETHER
) -> list[str]:
    """Describe the schedule of each adapter as `LoraSchedule` does, empty for a plain weight.

    Nothing is computed: what k-lora makes of two adapters is determined by them and by this.
    """
    strengths = _assign(weights, composition, {})
    return [str(strength) if isinstance(strength, LoraSchedule) else "" for strength in strengths]


def _assign(
    weights: Sequence[float | Curve], composition: Composition, table: Mapping[str, float]
) -> list[Strength]:
    alpha, beta, count = composition.alpha, composition.beta, len(weights)
    gates: list[Turn | LayerShare | None] = [None] * count
    if composition.method == "switch":
        gates = [Turn(place, count, composition.every) for place in range(count)]
    elif composition.method == "k-lora":
        gates = [LayerShare(role, table, alpha, beta) for role in ("subject", "style")]
    strengths: list[Strength] = []
    for weight, gate in zip(weights, gates, strict=True):
        if gate is None and not composition.conditional_only and not isinstance(weight, Curve):
            strengths.append(weight)
        else:
            curve = weight if isinstance(weight, Curve) else Curve.constant(weight)
            strengths.append(LoraSchedule(curve, gate, composition.conditional_only))
    return strengths


def share_layers(
    subject: Adapter, style: Adapter, alpha: float = 1.5, beta: float = 0.5
) -> dict[str, float]:
    """Say for each layer that both change up to which progress the subject has it (K-LoRA).

    K-LoRA compares, at each step and in each layer, the subject's importance S_c with the style's
    S_s, the style counting for more as the drawing goes on: the subject has the layer while
    S_c >= γ (α p + β) S_s at progress p. S is the sum of the K = r_c r_s largest |entries| of ΔW,
    r the ranks, and γ the subject's sum of all |entries| over the style's, so no scale of an
    adapter matters. Nothing there depends on the picture, so the answer is one number a layer,
    computed once:

        p* = (S_c / (γ S_s) - β) / α

    Infinite where the style changes nothing. Below 0 the style has the layer from the first step,
    from 1 on the subject to the last. Layers of text encoders are left out: they act before the
    first step. ΔW is multiplied out for one layer at a time.

    Raises:
        AdapterError: If either is another kind than LoRA.

    Source:
        Ouyang, Li and Hou, K-LoRA (arXiv:2502.18461). We differ: γ sums over the layers that both
        adapters change; progress is that of the scheduler's timesteps, not a count of calls, and
        reaches 1; the table replaces a comparison at each step.
    """
    for adapter, name in ((subject, "The first adapter"), (style, "The second adapter")):
        refuse_other_kinds(adapter, name, "can be worn by k-lora")
    shared = [name for name in subject.layers if name in style.layers and not acts_on_text(name)]
    largest: dict[str, list[float]] = {}
    sums: tuple[list[float], list[float]] = ([], [])
    for name in shared:
        layers = subject.layers[name], style.layers[name]
        count = layers[0].rank * layers[1].rank
        largest[name] = []
        for layer, of_adapter in zip(layers, sums, strict=True):
            entries = (layer.up.flatten(1) @ layer.down.flatten(1)).abs_().flatten()
            largest[name].append(_sum_largest(entries, min(count, entries.numel())))
            of_adapter.append(float(entries.sum()))
    totals = [math.fsum(of_adapter) for of_adapter in sums]
    table = {}
    for name, (ours, theirs) in largest.items():
        if theirs == 0:
            table[name] = math.inf
            continue
        # Dividing each S by its adapter's total divides their ratio by γ, and never 0 by 0.
        relative = ours / totals[0] if ours else 0.0
        table[name] = (relative / (theirs / totals[1]) - beta) / alpha
    return table


def _sum_largest(entries: Float[Tensor, " entries"], count: int) -> float:
    """Sum the largest entries: exactly, by looking among those that a sample says are large."""
    # An odd stride meets every column of a matrix that has been flattened.
    sample = entries[:: entries.numel() // _SAMPLE | 1]
    wanted = 2 * math.ceil(count * sample.numel() / entries.numel()) + 16
    limit = sample.topk(min(wanted, sample.numel()), sorted=False).values.min()
    likely = entries[entries >= limit]
    found = (likely if likely.numel() >= count else entries).topk(count, sorted=False).values
    return float(found.sum(dtype=torch.float64))
