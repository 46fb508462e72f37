"""The session: the base model that a process works with, loaded once, and its noise schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dreamloom.core.device import Runtime
from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.base_names import BASE_KEY, FINGERPRINT_KEY
from dreamloom.models.base import NO_SAVINGS, MemoryOptions, Model
from dreamloom.models.families import load_model
from dreamloom.models.lora_schedule import LoraSchedule, Strength

_OPEN: dict[tuple[str, Runtime, MemoryOptions], Model] = {}
"""What is open, by what it was asked with; how much is drawn at once can change."""


def open_base(base: str, runtime: Runtime, options: MemoryOptions = NO_SAVINGS) -> Model:
    """Load a base model, or take it again if it is the one that this process last worked with.

    One is kept: another takes its place, and its memory before it is loaded.

    Args:
        base: What ``--base`` names.
        runtime: Where and how precisely to compute.
        options: How it spares memory.

    Raises:
        BaseModelError: As `load_model`.
    """
    key = (base, runtime, replace(options, drawn_at_once=None))
    if key not in _OPEN:
        _OPEN.clear()
        _OPEN[key] = load_model(base, runtime, options)
    if options.drawn_at_once:
        _OPEN[key].memory_options = options
    return _OPEN[key]


def follow_noise_schedule(model: Model, adapters: Iterable[Adapter]) -> None:
    """Let a model's noise schedule be the one that the adapters were trained with.

    One that was trained to pure noise at the last timestep needs such a schedule; without any,
    the base model has its own again.

    Raises:
        ConfigError: If the base model predicts noise, and an adapter was trained so.
    """
    trained = (adapter.metadata.get("dreamloom.zero_terminal_snr") for adapter in adapters)
    model.set_zero_terminal_snr("true" in trained)


def tell_other_base(named: str, adapter: Adapter, model: Model) -> str:
    """Say that an adapter was made for other weights than a base model's; empty if it was not.

    It can be drawn with where it fits: people train on a base and draw with its fine-tunes.

    Args:
        named: What the sentence calls it.
        adapter: The adapter.
        model: The base model as it is here.
    """
    made_for, here = adapter.metadata.get(FINGERPRINT_KEY), model.identity
    if not made_for or made_for in (here.fingerprint, here.earlier_fingerprint):
        return ""
    other = adapter.metadata.get(BASE_KEY, "of another kind")
    return (
        f"{named} was made for the base model {other} ({made_for[:8]}), not for {here.name} as it "
        f"is here ({here.fingerprint[:8]})"
    )


def refuse_other_base(named: str, adapter: Adapter, model: Model) -> None:
    """Refuse an adapter that was made for other weights, where the result would hang on them.

    Raises:
        AdapterError: As `tell_other_base` says it.
    """
    told = tell_other_base(named, adapter, model)
    if told:
        raise AdapterError(
            f"{told}.", "Name that base model with --base, or train the adapter again."
        )


def check_fit(model: Model, adapter: Adapter, strength: Strength) -> None:
    """Refuse an adapter that a base model cannot wear.

    Raises:
        AdapterError: If it does not fit.
    """
    if adapter.peft is None and not adapter.tokens and not isinstance(strength, LoraSchedule):
        # Finding its layers tells; to apply it takes a large model seconds and copies of weights.
        model.layers_of(adapter)
        return
    with model.apply_adapters([(adapter, strength)]):
        pass
