"""Plan a drawing's memory before it begins: how the base is kept, and how much is drawn at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.memory.device_memory import DeviceMemory
from dreamloom.memory.predict import Setting, predict_memory_use
from dreamloom.memory.telling import (
    QUANTIZED,
    tell_bytes,
    tell_count,
    tell_more_memory,
    tell_precision,
    tell_turns,
)
from dreamloom.memory.work import find_table, read_limits, read_work


@dataclass(frozen=True)
class DrawingPlan:
    """How a base model is kept to draw with.

    Args:
        base: Its name.
        memory: What the device has.
        setting: What was chosen.
        needed_bytes: What drawing holds at most.
    """

    base: str
    memory: DeviceMemory
    setting: Setting
    needed_bytes: int

    def lines(self) -> list[str]:
        """Say it in words, one line each."""
        setting, memory = self.setting, self.memory
        lines = [
            f"{self.base} at {setting.resolution_px} px, in {memory.said}: "
            f"{tell_bytes(self.needed_bytes)} at most, of {tell_bytes(memory.usable_bytes)} that "
            "tensors may hold",
            QUANTIZED[setting.quantization],
            f"{tell_count(setting.drawn_at_once, 'picture')} drawn at a time",
        ]
        if memory.is_host:
            lines.insert(1, tell_precision(setting.precision))
        if setting.cpu_offload:
            lines.append(tell_turns(memory))
        return lines


def plan_drawing(config: LoomConfig, memory: DeviceMemory) -> DrawingPlan:
    """Choose how to keep the base model, and how many pictures to draw at a time.

    Raises:
        ConfigError: If not even one picture at a time fits.
    """
    table, limits = find_table(config.base), read_limits(config, memory)
    usable = memory.usable_bytes
    work = read_work(config, table, memory)
    least, tried = None, work.setting
    for quantization, in_turn in product(limits.quantization, limits.cpu_offload):
        number = config.generate.batch
        while number:
            tried = replace(
                work.setting,
                quantization=quantization,
                cpu_offload=in_turn,
                drawn_at_once=number,
            )
            phases = predict_memory_use(table, tried).phases
            needed = max(phases["class images"], phases.get("loading", 0))
            if needed <= usable:
                return DrawingPlan(config.base, memory, tried, needed)
            least = min(needed, least or needed)
            number //= 2
    raise ConfigError(
        f"Nothing fits in {memory.said}: to draw one picture of {tried.resolution_px} px, "
        f"{config.base} needs {tell_bytes(least or 0)} of the {tell_bytes(usable)} that tensors "
        "may hold.",
        f"Draw smaller pictures, or {tell_more_memory(memory)}.",
    )
