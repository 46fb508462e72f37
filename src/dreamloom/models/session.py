"""The session: the base model that a process works with, loaded once, and its noise schedule."""

from __future__ import annotations

from collections.abc import Iterable

from dreamloom.core.device import Runtime
from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter
from dreamloom.models.base import NO_SAVINGS, MemoryOptions, Model
from dreamloom.models.families import load_model

_OPEN: dict[tuple[str, Runtime, MemoryOptions], Model] = {}


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
    key = (base, runtime, options)
    if key not in _OPEN:
        _OPEN.clear()
        _OPEN[key] = load_model(base, runtime, options)
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


def refuse_other_base(named: str, adapter: Adapter, model: Model) -> None:
    """Refuse an adapter that says it was made for another base model.

    Args:
        named: What the message calls it.
        adapter: The adapter.
        model: The base model as it is here.

    Raises:
        AdapterError: If so.
    """
    made_for = adapter.metadata.get("dreamloom.base_fingerprint")
    if made_for and made_for != model.identity.fingerprint:
        other = adapter.metadata.get("dreamloom.base", "of another kind")
        raise AdapterError(
            f"{named} was made for the base model {other}, not for {model.identity.name} as it is "
            "here.",
            "Name that base model with --base, or train the adapter again.",
        )
