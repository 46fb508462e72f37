"""Prepare a merge with the base model: activations for RegMean and SSR, masks for ZipLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer, silent
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.merging.activations.forward_passes import (
    ForwardPasses,
    ForwardResult,
    MergePrompts,
    Prepared,
    find_prompts,
    list_passes,
    weigh_adapters,
)
from dreamloom.merging.activations.gram import gather_inputs, gather_signals
from dreamloom.merging.activations.masks import MaskedColumns, MaskedDirections, learn_masks
from dreamloom.merging.merging import MergeRequest
from dreamloom.merging.method import Value
from dreamloom.merging.methods import find_method
from dreamloom.models.base import Model
from dreamloom.models.session import follow_noise_schedule, refuse_other_base

Prepare = Callable[[ForwardPasses, Mapping[str, Value]], ForwardResult]

PREPARERS: Mapping[str, Prepare] = MappingProxyType(
    {
        "ssr": gather_signals,
        "regmean": gather_inputs,
        "ziplora": partial(learn_masks, make=MaskedColumns),
        "ziprank": partial(learn_masks, make=MaskedDirections),
    }
)
"""How each method that needs the base model is prepared, by its name."""


@dataclass(frozen=True)
class Preparation:
    """What the base model was asked about a merge, and the result."""

    prompts: MergePrompts
    result: ForwardResult

    @property
    def layers(self) -> Prepared:
        """By layer and name, for `merging.combine`."""
        return self.result.layers


def prepare_merge(
    model: Model,
    adapters: Sequence[Adapter],
    request: MergeRequest,
    prompts: Sequence[Sequence[str]] = (),
    joint: Sequence[str] = (),
    observe: Observer = silent,
) -> Preparation | None:
    """Ask the base model what a merge method must know.

    Args:
        model: The base model of the adapters, with nothing worn.
        adapters: As many LoRAs as ``request`` has weights.
        request: How they shall be merged; the same is then given to `merging.combine`.
        prompts: For each adapter the prompts that ask for it; an empty list lets the adapter tell.
        joint: Prompts that ask for all adapters at once.
        observe: Told of progress.

    Returns:
        What `merging.combine` takes as ``prepared``, and the prompts; None if the method needs no
        base model.

    Raises:
        ConfigError: If numbers do not match, an option is not allowed, or an adapter does not say
            what it was taught with and no prompt is given.
        AdapterError: If an adapter is no LoRA, or belongs to another base model.
        TrainingError: If numbers leave their range.
    """
    method = find_method(request.method)
    if method.needs not in ("activations", "training"):
        return None
    options = method.read_options(request.options)
    if len(adapters) != len(request.weights):
        raise ConfigError(
            f"{len(adapters)} adapters need as many weights, got {len(request.weights)}."
        )
    for number, adapter in enumerate(adapters, 1):
        refuse_other_kinds(adapter, f"Adapter {number}", "can be merged")
        refuse_other_base(f"Adapter {number}", adapter, model)
    follow_noise_schedule(model, adapters)
    asked = find_prompts(adapters, int(options["prompts"]), prompts, joint)
    wants_joint = float(options.get("joint", 0.0)) > 0
    passes = list_passes(weigh_adapters(adapters, request), asked, wants_joint)
    forward_passes = ForwardPasses(
        model, adapters, request, passes, int(options["steps"]), request.seed, observe
    )
    return Preparation(asked, PREPARERS[method.name](forward_passes, options))
