"""A merge method: a function of one layer's LoRA updates, its options and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer
from dreamloom.merging.factors import Factors

Value = float | int | bool | str
Need = Literal["factors", "entries", "activations", "training"]
"""``factors``: the adapters alone, as factors. ``entries``: the adapters alone, but every entry of
the update, so the result must be cut to a rank. ``activations``: what the base model's layers see
for a few prompts. ``training``: the base model, taught for a few updates."""


@dataclass(frozen=True)
class Option:
    """A setting of one method.

    Args:
        name: As the user types it.
        default: Its type is the type of every value.
        description: One line.
        low: The least number allowed.
        high: The greatest number allowed.
        choices: The words allowed.
    """

    name: str
    default: Value
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, given: Value) -> Value:
        """Turn what was given into a value of the right type.

        Raises:
            ConfigError: If it is of another type or outside what is allowed.
        """
        value: Value = str(given)
        try:
            if isinstance(self.default, bool):
                value = {"true": True, "false": False}[str(given).lower()]
            elif isinstance(self.default, int):
                value = int(given)
            elif isinstance(self.default, float):
                value = float(given)
                if not isfinite(value):
                    raise ValueError
        except (ValueError, KeyError):
            raise self._refuse(given) from None
        too_low = self.low is not None and isinstance(value, int | float) and value < self.low
        too_high = self.high is not None and isinstance(value, int | float) and value > self.high
        if too_low or too_high or (self.choices and value not in self.choices):
            raise self._refuse(given)
        return value

    def _refuse(self, given: Value) -> ConfigError:
        if self.choices:
            allowed = "one of " + ", ".join(self.choices)
        elif isinstance(self.default, bool):
            allowed = "true or false"
        else:
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            bounds = [f"from {self.low:g}"] if self.low is not None else []
            bounds += [f"up to {self.high:g}"] if self.high is not None else []
            allowed = " ".join([kind, *bounds])
        return ConfigError(f"The option {self.name} cannot be {given!r}.", f"It must be {allowed}.")


@dataclass(frozen=True)
class LayerPart:
    """One adapter's update of one layer, and how strongly it goes in.

    Args:
        factors: The update, before any weight.
        weight: The adapter's weight, a block weight of this layer included; never 0.
        number: The adapter's place in the user's list, from 1; the same in every layer.
    """

    factors: Factors
    weight: float
    number: int


@dataclass(frozen=True)
class Context:
    """What a method may know beside the updates of the layer.

    Args:
        layer: The layer's name.
        options: The method's options, complete.
        seed: Of the method's dice, if it throws any.
        adapters: How many adapters are merged; a layer may have fewer.
        whole: Inner products of the weighted updates over all layers, adapter by adapter in the
            user's order (float64, (adapters, adapters)), if the method asks for them.
        prepared: What the base model gave for this layer, by name; see `MergeMethod.needs`.
        weights: The adapters' weights in the user's order, block weights left out.
        notes: Empty; figures about the layer that a method puts here, by name, are reported.
        thresholds: What `MergeMethod.find_thresholds` found, by the adapter's number.
    """

    layer: str
    options: Mapping[str, Value]
    seed: int
    adapters: int
    whole: Float[Tensor, "adapters adapters"] | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Sequence[float] = ()
    notes: dict[str, float] = field(default_factory=dict)
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """A numeric option."""
        return float(self.options[name])

    def word(self, name: str) -> str:
        """An option that is a word."""
        return str(self.options[name])


Merged = Factors | Tensor
"""A merged update: as factors, or, from methods that need entries, multiplied out."""

ReadLayers = Callable[[], Iterable[Sequence[LayerPart]]]
"""Gives the parts of each layer, one layer after the other, each time it is called."""


@dataclass(frozen=True)
class MergeMethod:
    """A way to merge.

    Args:
        name: As the user types it.
        summary: What it does, in one sentence.
        formula: In plain text.
        source: Paper and equation.
        merge: The merged update of one layer from its parts: one or more, in the user's order.
        needs: What it must be given.
        options: Its settings.
        whole: Whether `Context.whole` is wanted; if the method has an option ``scope``, it is there
            only where that is ``model``.
        least: The fewest adapters it makes sense for.
        most: The most adapters it can take, or None.
        keeps_one: Whether one adapter at weight 1 comes out as it is.
        ordered: Whether the merged update's directions stand at right angles, none weaker than the
            next, and in an order of worth that their strengths do not tell; a cut keeps the first.
        throws_dice: Whether the seed changes what comes out; those that ask the base model do.
        find_thresholds: Reads all layers before the first one is merged, as often as it needs, and
            gives a number for each adapter by its own; nothing where the options want none.
    """

    name: str
    summary: str
    formula: str
    source: str
    merge: Callable[[Sequence[LayerPart], Context], Merged]
    needs: Need = "factors"
    options: tuple[Option, ...] = ()
    whole: bool = False
    least: int = 1
    most: int | None = None
    keeps_one: bool = True
    ordered: bool = False
    throws_dice: bool = False
    find_thresholds: Callable[[ReadLayers, Mapping[str, Value]], Mapping[int, float]] | None = None

    def read_options(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Complete and check the options that were given.

        Raises:
            ConfigError: If one is unknown or not allowed.
        """
        known = {option.name: option for option in self.options}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(
                f"The method {self.name} has no option {unknown[0]!r}.",
                offer(unknown[0], known) if known else "It has none.",
            )
        return {
            name: option.read(given[name]) if name in given else option.default
            for name, option in known.items()
        }
