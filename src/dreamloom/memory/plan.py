"""Plan a run's memory before it begins: what each phase needs, what is chosen, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.memory.choose import EIGHT_BIT, Choice, Work, choose_setting
from dreamloom.memory.device_memory import DeviceMemory, apply_limit
from dreamloom.memory.predict import GIB, Setting, count_flops
from dreamloom.memory.table import MemoryTable
from dreamloom.memory.telling import (
    QUANTIZED,
    RECOMPUTED,
    tell_bytes,
    tell_compiled,
    tell_count,
    tell_duration,
    tell_flops,
    tell_more_memory,
    tell_precision,
    tell_turns,
)
from dreamloom.memory.work import find_table, read_limits, read_work

_SMALL_PX = 512
_SMALL_RANK = 16


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen for a run.

    Args:
        base: The base model's name.
        memory: What the device has.
        choice: What was chosen, and what did not fit.
        work: What is to be done.
        flops: Floating-point operations by phase.
        compile: ``train.compile``.
        rate_tflops: Of the device's matrix products, where it is known.
    """

    base: str
    memory: DeviceMemory
    choice: Choice
    work: Work
    flops: dict[str, float]
    compile: str
    rate_tflops: float | None = None

    @property
    def precision(self) -> str | None:
        """What a processor computes in; of GPUs the device alone decides."""
        return self.choice.setting.precision if self.memory.is_host else None

    @property
    def least_seconds(self) -> float | None:
        """The time of a device that does nothing but multiply, at its full rate."""
        if self.rate_tflops is None:
            return None
        return sum(self.flops.values()) / (self.rate_tflops * 1e12)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        setting = self.choice.setting
        return {
            "base": self.base,
            "memory": self.memory.said,
            "memory_gib": round(self.memory.gib, 3),
            "usable_gib": round(self.memory.usable_bytes / GIB, 3),
            "fits": self.choice.fits,
            "peak_gib": round(self.choice.memory_use.peak_bytes / GIB, 3),
            "phases_gib": {
                phase: round(size / GIB, 3) for phase, size in self.choice.memory_use.phases.items()
            },
            "settings": {
                "memory.gradient_checkpointing": setting.gradient_checkpointing,
                "memory.base_quantization": setting.quantization,
                "memory.micro_batch_size": setting.micro_batch_size,
                "memory.cpu_offload": setting.cpu_offload,
                "generate.batch": setting.drawn_at_once,
                "train.optimizer": setting.optimizer,
                "train.compile": self.compile,
                **({"precision": self.precision} if self.precision else {}),
            },
            "petaflops": {name: round(count / 1e15, 3) for name, count in self.flops.items()},
            "least_seconds": self.least_seconds,
        }

    def lines(self) -> list[str]:
        """Say it in words, one line each."""
        setting, memory_use = self.choice.setting, self.choice.memory_use
        usable = self.memory.usable_bytes
        lines = [
            f"{self.base} at {setting.resolution_px} px, rank {setting.rank}"
            f"{', both text encoders' if setting.text_encoders else ''}, in {self.memory.said}: "
            f"{tell_bytes(memory_use.peak_bytes)} at most, of {tell_bytes(usable)} that tensors "
            "may hold",
            ", ".join(f"{phase} {tell_bytes(size)}" for phase, size in memory_use.phases.items()),
        ]
        images = self.work.images_per_batch * self.work.gradient_accumulation_steps
        lines += [
            QUANTIZED[setting.quantization] + self._why("quantization"),
            RECOMPUTED[setting.gradient_checkpointing] + self._why("gradient_checkpointing"),
            f"{tell_count(setting.micro_batch_size, 'image')} a pass, "
            f"{tell_count(setting.passes, 'pass', 'passes')} an update of {images}: the same "
            "update however it is cut" + self._why("micro_batch_size"),
        ]
        if self.precision:
            lines.insert(2, tell_precision(self.precision))
        if setting.cpu_offload:
            lines.append(tell_turns(self.memory) + self._why("cpu_offload"))
        if setting.optimizer == EIGHT_BIT and self.work.setting.optimizer != EIGHT_BIT:
            lines.append("the optimizer keeps its states in 8 bits: without, nothing fits")
        lines.append(
            f"{tell_count(setting.drawn_at_once, 'picture')} drawn at a time; attention by torch's "
            f"own fused kernels; {tell_compiled(self.compile, self.memory)}"
        )
        parts = ", ".join(f"{name} {tell_flops(count)}" for name, count in self.flops.items())
        operations = f"{tell_flops(sum(self.flops.values()))} in all ({parts})"
        if self.least_seconds is None:
            lines.append(f"{operations}; --gpu-rate TFLOPS says how long that is at best")
        else:
            least = tell_duration(self.least_seconds)
            lines.append(f"{operations}: at {self.rate_tflops:g} TFLOP/s no less than {least}")
        return lines

    def _why(self, name: str) -> str:
        """Say what the next faster or more exact value would have needed."""
        refused = [(value, needed) for what, value, needed in self.choice.refused if what == name]
        if not refused:
            return ""
        value, needed = refused[-1]
        usable = self.memory.usable_bytes
        words = {
            "cpu_offload": "together",
            "micro_batch_size": f"{value} a pass",
        }.get(name, value)
        if needed <= usable:
            return ""
        return f" ({words} would need {tell_bytes(needed)})"


def plan_run(
    config: LoomConfig,
    memory: DeviceMemory,
    *,
    photos: int = 6,
    rate_tflops: float | None = None,
    on_count: Callable[[str], None] = lambda case: None,
) -> MemoryPlan:
    """Choose the fastest settings that fit, where the settings leave a choice.

    Args:
        config: Settings, resolved or not.
        memory: What the device has; ``memory.limit`` in the settings goes before it.
        photos: How many photos there are, for the time of encoding them.
        rate_tflops: The device's rate of matrix products, for the time.
        on_count: Told what is counted, where the base model is not of SDXL's size.

    Raises:
        ConfigError: If nothing fits, or the resolution fits no latents.
    """
    memory = apply_limit(memory, config)
    table = find_table(config.base, on_count)
    work, limits = read_work(config, table, memory), read_limits(config, memory)
    choice = choose_setting(table, work, memory.usable_bytes, limits)
    if not choice.fits:
        raise _nothing_fits(config, table, memory, choice)
    flops = _count_work(config, table, choice.setting, work, photos)
    return MemoryPlan(config.base, memory, choice, work, flops, config.train.compile, rate_tflops)


def apply_plan(config: LoomConfig, plan: MemoryPlan) -> LoomConfig:
    """Put what was chosen into the settings."""
    setting = plan.choice.setting
    memory = config.memory.model_copy(
        update={
            "gradient_checkpointing": setting.gradient_checkpointing,
            "base_quantization": setting.quantization,
            "micro_batch_size": setting.micro_batch_size,
            "cpu_offload": setting.cpu_offload,
        }
    )
    train = config.train.model_copy(update={"optimizer": setting.optimizer})
    precision = plan.precision or config.precision
    return config.model_copy(update={"memory": memory, "train": train, "precision": precision})


def _count_work(
    config: LoomConfig, table: MemoryTable, setting: Setting, work: Work, photos: int
) -> dict[str, float]:
    area = (setting.resolution_px / table.resolution_px) ** 2
    drawn = 0
    if config.priors.kind == "generated" and config.train.prior_weight > 0:
        drawn = config.priors.count
    per_image = 2 * table.flops["forward"] * config.priors.steps + table.flops["decode"]
    images = config.train.steps * work.images_per_batch * work.gradient_accumulation_steps
    return {
        "class images": area * drawn * per_image,
        "caching": area * (photos + drawn) * table.flops["encode"],
        "training": images * count_flops(table, setting),
    }


def _nothing_fits(
    config: LoomConfig, table: MemoryTable, memory: DeviceMemory, choice: Choice
) -> ConfigError:
    needed, usable = choice.memory_use.peak_bytes, memory.usable_bytes
    ways = _list_ways(config, table, memory)
    return ConfigError(
        f"Nothing fits in {memory.said}: the least that {config.base} can do with needs "
        f"{tell_bytes(needed)} in its phase {choice.memory_use.peak_phase!r}, "
        f"{tell_bytes(needed - usable)} more than the {tell_bytes(usable)} that tensors "
        "may hold there.",
        f"Try {' or '.join(ways)}." if ways else f"{tell_more_memory(memory).capitalize()}.",
    )


def _list_ways(config: LoomConfig, table: MemoryTable, memory: DeviceMemory) -> list[str]:
    """List changed settings with which it would fit: each alone, or else all of them together."""
    changes: dict[str, Any] = {
        name: "auto"
        for name, value in config.flat().items()
        if name.startswith("memory.") and name != "memory.limit" and value != "auto"
    }
    side = config.photos.resolution_px
    if (table.resolution_px if side == "auto" else side) > _SMALL_PX:
        changes["photos.resolution_px"] = _SMALL_PX
    if config.adapter.text_encoders:
        changes["adapter.text_encoders"] = False
    if config.train.rank > _SMALL_RANK:
        changes["train.rank"] = _SMALL_RANK

    def fits(*names: str) -> bool:
        changed = config
        for name in names:
            section, _, key = name.partition(".")
            part = getattr(changed, section).model_copy(update={key: changes[name]})
            changed = changed.model_copy(update={section: part})
        work, limits = read_work(changed, table, memory), read_limits(changed, memory)
        return choose_setting(table, work, memory.usable_bytes, limits).fits

    told = {name: f"--set {name}={str(value).lower()}" for name, value in changes.items()}
    alone = [told[name] for name in changes if fits(name)]
    if alone or not changes or not fits(*changes):
        return alone
    return [" ".join(told.values())]
