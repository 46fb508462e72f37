"""Choose the fastest settings whose predicted memory fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from dreamloom.memory.predict import MemoryUse, Setting, predict_memory_use
from dreamloom.memory.table import MemoryTable

LADDER = ("none", "high", "low", "full")
"""Checkpointing, from fastest to smallest."""
QUANTIZED = ("whole", "int8", "nf4")
"""How the base is kept, from most to least exact; fp8 is as large as int8 and less exact."""
QUANTIZED_FROM_FP32 = ("whole", "bf16", "int8", "nf4")
"""The same where it computes in fp32."""
EIGHT_BIT = "adamw8bit"


@dataclass(frozen=True)
class Limits:
    """What may be chosen: the given values alone, or all.

    Args:
        gradient_checkpointing: Ways to recompute.
        quantization: Ways to keep the base.
        cpu_offload: Whether parts take turns.
        micro_batch_size: Images that go through at once; None allows every division of a batch.
        may_use_8_bit: Whether the optimizer may keep its states in 8 bits.
    """

    gradient_checkpointing: Sequence[str] = LADDER
    quantization: Sequence[str] = QUANTIZED
    cpu_offload: Sequence[bool] = (False, True)
    micro_batch_size: int | None = None
    may_use_8_bit: bool = False


@dataclass(frozen=True)
class Work:
    """What is to be done, whatever memory there is.

    Args:
        setting: Resolution, adapter and optimizer; the rest of it is chosen.
        images_per_batch: Photos and class images of a batch.
        gradient_accumulation_steps: Batches of an update.
        drawn_at_once: Most pictures to draw at a time.
    """

    setting: Setting
    images_per_batch: int
    gradient_accumulation_steps: int = 1
    drawn_at_once: int = 8


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        setting: Everything that memory depends on.
        memory_use: What it needs.
        fits: Whether that is no more than there is; otherwise this is the least of all.
        refused: What was faster and did not fit: the setting that was varied, its value and the
            bytes that it would need.
    """

    setting: Setting
    memory_use: MemoryUse
    fits: bool
    refused: list[tuple[str, str, int]] = field(default_factory=list)


def choose_setting(table: MemoryTable, work: Work, usable: int, limits: Limits) -> Choice:
    """Choose the first setting that fits, in the order of what is lost by it.

    Exactness comes first: a whole base before one of 8 and one of 4 bits. Then comes speed: every
    level that is recomputed costs operations, while smaller passes and parts that take turns
    cost little. The optimizer in 8 bits is the last resort.

    Args:
        table: What was counted of the base model.
        work: What is to be done.
        usable: Bytes that tensors may hold.
        limits: What may be chosen.
    """
    smallest: Choice | None = None
    for setting in _list_settings(work, limits):
        fitted = _draw_as_many_as_fit(table, setting, work.drawn_at_once, usable)
        found = predict_memory_use(table, fitted)
        choice = Choice(fitted, found, found.peak_bytes <= usable)
        # Drawing and saving shall need no more than training, where that can be had.
        ends = max(found.phases["sampling"], found.phases["saving"])
        can_offload = not fitted.cpu_offload and True in limits.cpu_offload
        if choice.fits and (ends <= found.phases["training"] or not can_offload):
            return replace(choice, refused=_explain(table, work, limits, fitted))
        if smallest is None or found.peak_bytes < smallest.memory_use.peak_bytes:
            smallest = choice
    if smallest is None:
        raise ValueError("there is nothing to choose from")
    return smallest


def _list_settings(work: Work, limits: Limits) -> Iterator[Setting]:
    for optimizer, quantization, levels, per_pass, cpu_offload in product(
        [work.setting.optimizer, *([EIGHT_BIT] if limits.may_use_8_bit else [])],
        limits.quantization,
        limits.gradient_checkpointing,
        _divide(work, limits),
        limits.cpu_offload,
    ):
        yield replace(
            work.setting,
            optimizer=optimizer,
            quantization=quantization,
            gradient_checkpointing=levels,
            micro_batch_size=per_pass,
            passes=-(-work.images_per_batch // per_pass) * work.gradient_accumulation_steps,
            cpu_offload=cpu_offload,
        )


def _divide(work: Work, limits: Limits) -> list[int]:
    """List how many images may go through at once, most first."""
    whole = work.images_per_batch
    if limits.micro_batch_size is not None:
        return [min(limits.micro_batch_size, whole)]
    return [number for number in range(whole, 0, -1) if whole % number == 0]


def _draw_as_many_as_fit(table: MemoryTable, setting: Setting, most: int, usable: int) -> Setting:
    """Draw as many pictures at a time as need no more than training does."""
    number = most
    while number > 1:
        tried = replace(setting, drawn_at_once=number)
        found = predict_memory_use(table, tried).phases
        if max(found["class images"], found["sampling"]) <= min(usable, found["training"]):
            return tried
        number //= 2
    return replace(setting, drawn_at_once=1)


def _explain(
    table: MemoryTable, work: Work, limits: Limits, chosen: Setting
) -> list[tuple[str, str, int]]:
    """Say what each thing that is one step faster or more exact would have needed."""
    options: dict[str, list[object]] = {
        "gradient_checkpointing": list(limits.gradient_checkpointing),
        "quantization": list(limits.quantization),
        "micro_batch_size": list(_divide(work, limits)),
        "cpu_offload": list(limits.cpu_offload),
    }
    refused = []
    for name, values in options.items():
        here = values.index(getattr(chosen, name))
        for value in values[:here]:
            tried = replace(chosen, **{name: value}, drawn_at_once=1)  # type: ignore[arg-type]
            needed = predict_memory_use(table, tried).peak_bytes
            refused.append((name, str(value), needed))
    return refused
