"""PEFT's LoraConfig, read and written: ``lora_alpha``, rank, rsLoRA, patterns; and DoRA's form."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import regex
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import AdapterKind, DoraAxis, Layer, PeftState
from dreamloom.lora.sdxl_layers import COMPONENTS, sdxl_layers

CONFIG_KEY = "lora_adapter_metadata"
"""Under this key of a file's header diffusers keeps PEFT's configuration of each component."""

DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

OTHER_KINDS: Mapping[str, AdapterKind] = {"LOHA": "loha", "LOKR": "lokr", "OFT": "oft"}
"""The kinds that keep PEFT's own form, by PEFT's name of them."""

# These beginnings take a part of the base's weight into the adapter: without that base's remains
# the factors do not say what changes.
_SPLITS_BASE = re.compile("pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


_MOST_PATTERNS = 5000
_LONGEST_PATTERN = 1000
_SECONDS = 0.5
# What DreamLoom and diffusers write: the whole name of one layer.
_LITERAL = re.compile(r"\^(?:[\w-]|\\\W)+")


@dataclass(frozen=True)
class Patterns:
    """Values of layers by regular expressions of their names' ends; the first that matches counts.

    Raises:
        ValueError: If one is no regular expression, or very long: a header is anybody's text.
    """

    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for pattern in self.values:
                if len(pattern) > _LONGEST_PATTERN:
                    raise ValueError(f"a pattern has {len(pattern):,} signs")
                _compile(pattern)
        except regex.error as error:
            raise ValueError(f"a pattern is no regular expression: {error}") from error

    def of(self, layer: str, otherwise: float) -> float:
        """The value of a layer, by its name within the component.

        Raises:
            AdapterError: If a pattern takes too long to look for.
        """
        if self._are_names:
            return self.values.get(f"^{re.escape(layer)}", otherwise)
        try:
            for pattern, value in self.values.items():
                if _compile(pattern).match(layer, timeout=_SECONDS):
                    return value
        except TimeoutError as error:
            raise AdapterError(
                f"An adapter's configuration scales layers by the pattern {pattern[:60]!r}, which "
                "takes too long to look for.",
                "The file may be meant to do harm; get it from elsewhere.",
            ) from error
        return otherwise

    @cached_property
    def _are_names(self) -> bool:
        """Whether each names one layer, so that no two can match the same."""
        return all(_LITERAL.fullmatch(pattern) for pattern in self.values)


@lru_cache(maxsize=_MOST_PATTERNS)
def _compile(pattern: str) -> regex.Pattern[str]:
    """PEFT's rule: a pattern means the end of a name, from one of its dots on."""
    return regex.compile(rf"(.*\.)?({pattern})$")


@dataclass(frozen=True)
class Scaling:
    """How PEFT's configuration of one component scales its layers.

    Args:
        alpha: For layers that no pattern names.
        by_pattern: Alphas of single layers.
        use_rslora: Whether alpha is divided by the root of the rank.
    """

    alpha: float
    by_pattern: Patterns = field(default_factory=Patterns)
    use_rslora: bool = False

    def of(self, layer: str, rank: int) -> float:
        """The scale of a layer, by its name within the component, and its rank."""
        alpha = self.by_pattern.of(layer, self.alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def read_header_config(path: str, header: str | None) -> dict[str, dict[str, Any]]:
    """Read the configuration of each component from a header's entry.

    Raises:
        AdapterError: If it is there and cannot be read.
    """
    if header is None:
        return {}
    try:
        flat = dict(json.loads(header))
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise explain_config(path, error) from error
    return configs


def explain_config(path: str, error: Exception) -> AdapterError:
    """Say that the strength of an adapter is unknown, and why."""
    return AdapterError(
        f"The configuration in the header of {path} cannot be read: {error}.",
        "Without it the strength of the adapter is unknown; get the file again.",
    )


def read_scaling(path: str, config: Mapping[str, Any]) -> Scaling | None:
    """Read how a component of a LoRA is scaled; None if the configuration does not tell.

    Raises:
        AdapterError: If what it says makes no sense, or a LoRA's factors alone cannot hold it.
    """
    _refuse_options(path, config)
    if config.get("lora_alpha") is None:
        return None
    try:
        alpha = _read_finite(config["lora_alpha"])
        by_pattern = read_patterns(config.get("alpha_pattern"))
        return Scaling(alpha, by_pattern, bool(config.get("use_rslora")))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise explain_config(path, error) from error


def read_patterns(given: Any) -> Patterns:
    """Read values by regular expression, as JSON holds them; None is none.

    Raises:
        ValueError: If a pattern or a value makes no sense, or there are more than SDXL has layers.
    """
    if len(given or {}) > _MOST_PATTERNS:
        raise ValueError(
            f"it has {len(given):,} patterns, and SDXL has {len(sdxl_layers()):,} layers"
        )
    return Patterns({key: _read_finite(value) for key, value in (given or {}).items()})


def _read_finite(value: Any) -> float:
    # JSON as Python writes it knows NaN and Infinity.
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _refuse_options(path: str, config: Mapping[str, Any]) -> None:
    """Refuse what PEFT can teach beside the factors of a LoRA, or takes from the base for them."""
    kind = config.get("peft_type")
    init = config.get("init_lora_weights")
    problems = {
        f"is of PEFT's kind {kind}": kind not in (None, "LORA", *OTHER_KINDS),
        "changes biases": config.get("bias") not in (None, "none") or bool(config.get("lora_bias")),
        "replaces whole modules": bool(config.get("modules_to_save")),
        "teaches single words in PEFT's form": bool(config.get("trainable_token_indices")),
        "was made for transposed weights": bool(config.get("fan_in_fan_out")),
        "repeats layers": bool(config.get("layer_replication")),
        f"began as {init} and belongs to what that left of its base": (
            isinstance(init, str) and _SPLITS_BASE.match(init) is not None
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise AdapterError(
                f"{path} {problem}, by its configuration, which a LoRA's factors cannot express.",
                "DreamLoom reads LoRA, DoRA, LoHa, LoKr and OFT of PEFT.",
            )


def make_dora(
    layers: Mapping[str, Layer], magnitudes: Mapping[str, Tensor], axis: DoraAxis = "outputs"
) -> PeftState:
    """Put factors, whose scales are folded in, and magnitudes together, as PEFT names them.

    Args:
        layers: The product of each layer.
        magnitudes: Of each layer: for outputs as PEFT shapes them, for inputs of shape (inputs,).
        axis: Which lengths they are.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {
            name + DOWN: layer.down,
            name + UP: layer.up,
            name + MAGNITUDE: magnitudes[name],
        }
    configs = describe_lora({name: layer.rank for name, layer in layers.items()}, True)
    return PeftState("dora", tensors, configs, axis)


def layers_of_dora(state: PeftState) -> dict[str, Layer]:
    """The products of a DoRA, without the lengths that it gives them."""
    return {
        name: Layer(state.tensors[name + DOWN], state.tensors[name + UP])
        for name in state.layer_names
    }


def describe_lora(ranks: Mapping[str, int], use_dora: bool = False) -> dict[str, dict[str, Any]]:
    """Describe layers whose scales are folded in as PEFT's LoraConfig, by component.

    Alpha equals the rank for every layer, so that readers apply the factors as they are.
    """
    configs: dict[str, dict[str, Any]] = {}
    for component in COMPONENTS:
        own = {
            name.removeprefix(component + "."): rank
            for name, rank in ranks.items()
            if name.startswith(component + ".")
        }
        if not own:
            continue
        counts = Counter(own.values())
        common = max(counts, key=lambda rank: (counts[rank], rank))
        special = {_pattern_of(name): rank for name, rank in sorted(own.items()) if rank != common}
        configs[component] = {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            "rank_pattern": special,
            "alpha_pattern": special,
            "target_modules": sorted(own),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
        } | ({"use_dora": True} if use_dora else {})
    return configs


def _pattern_of(name: str) -> str:
    """Write the pattern of one layer's name."""
    bare = name.removeprefix("text_model.")
    if bare.startswith("encoder.layers."):
        # Versions of transformers differ in the wrapper; PEFT lets a pattern mean a name's end.
        return re.escape(bare)
    # PEFT reads these names as patterns of names' ends; "^" ties each to its own layer.
    return f"^{re.escape(name)}"
