"""Merge methods that ask the base model: which it is, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Note, Observer
from dreamloom.lora.adapter import Adapter
from dreamloom.merging.activations.forward_passes import Prepared
from dreamloom.merging.merging import MergeRequest
from dreamloom.merging.methods import find_method


@dataclass(frozen=True)
class Question:
    """What a base model is asked before a merge.

    Args:
        base: Its name; empty takes the one that the adapters name.
        device: Where it computes; see `dreamloom.core.device.pick_runtime`.
        prompts: For each adapter the prompts that ask for it; an empty list lets the adapter tell.
        joint: Prompts that ask for all adapters at once; none are made from the others.
    """

    base: str = ""
    device: str = "auto"
    prompts: Sequence[Sequence[str]] = ()
    joint: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """What a base model told, and all that it takes to ask it again.

    Args:
        layers: What it told, for `combine`.
        base: Its name.
        fingerprint: Of its weights.
        runtime: Where and how precisely it computed.
        prompts: What each adapter was asked for.
        joint: What all were asked for.
    """

    layers: Prepared = field(default_factory=dict)
    base: str = ""
    fingerprint: str = ""
    runtime: str = ""
    prompts: Sequence[Sequence[str]] = ()
    joint: Sequence[str] = ()


def asks_base(method: str) -> bool:
    """Say whether a method needs the base model."""
    return find_method(method).needs in {"activations", "training"}


def ask_base(
    question: Question, adapters: Sequence[Adapter], request: MergeRequest, observe: Observer
) -> Answer:
    """Load the base model and ask it what the method must know.

    Other methods ask nothing, and a single adapter has nobody to be reconciled with.

    Raises:
        ConfigError: If no base model is named, or the adapters do not say what to ask for.
        BaseModelError: If it cannot be loaded.
        AdapterError: If an adapter was made for another base model.
    """
    if not asks_base(request.method) or sum(weight != 0 for weight in request.weights) < 2:
        return Answer()
    base = question.base or next(
        (a.metadata["dreamloom.base"] for a in adapters if "dreamloom.base" in a.metadata), ""
    )
    if not base:
        raise ConfigError(
            f"The method {request.method} asks the base model, and no adapter says which it is.",
            "Name it with --base.",
        )
    # The libraries of models take seconds to load, and most methods need none of them.
    from dreamloom.memory.fit import fit_asking
    from dreamloom.merging.activations.prepare import prepare_merge
    from dreamloom.models.session import open_base

    # In fewer bits it would answer something else.
    fitted = fit_asking(base, question.device)
    for line in fitted.lines:
        observe(Note("merge", line))
    model = open_base(base, fitted.runtime, fitted.memory_options)
    # What is merged counts at every timestep, so what is asked of the base does.
    adapters = [adapter.at_full_rank() for adapter in adapters]
    preparation = prepare_merge(model, adapters, request, question.prompts, question.joint, observe)
    assert preparation is not None
    asked = preparation.prompts
    for text in model.note_prompts([*chain.from_iterable(asked.each), *asked.joint]):
        observe(Note("merge", text))
    return Answer(
        preparation.layers,
        model.identity.name,
        model.identity.fingerprint,
        model.runtime.name,
        asked.each,
        asked.joint,
    )
