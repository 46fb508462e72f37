"""Fit a run to the device's memory: plan it, choose quantization and CPU offload."""

from __future__ import annotations

from dataclasses import dataclass

from dreamloom.core.config.loading import load_run_settings
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, measure_matrix_rate
from dreamloom.core.run_folder import RunFolder
from dreamloom.memory.plan import (
    DeviceMemory,
    apply_plan,
    find_folder,
    plan_drawing,
    plan_run,
    read_device_memory,
    read_memory,
)
from dreamloom.memory.predict import Setting
from dreamloom.models.base import MemoryOptions

# A base whose weights are this small beside a GPU's memory is not worth a plan.
_SMALL_SHARE = 1 / 32


@dataclass(frozen=True)
class Fitted:
    """Settings that fit.

    Args:
        config: With everything that was chosen.
        lasting: With what the result depends on, as a run's folder keeps it; what depends on this
            device alone stays as it was given.
        memory_options: How the base model is to be loaded.
        lines: What was chosen, and why.
    """

    config: LoomConfig
    lasting: LoomConfig
    memory_options: MemoryOptions
    lines: tuple[str, ...] = ()


def fit_run(run: RunFolder, config: LoomConfig, runtime: Runtime, photos: int) -> Fitted:
    """Choose what the settings leave open, from the device's memory; on a processor, nothing.

    A run that was begun keeps its base as it is stored there, whatever would fit now.

    Raises:
        ConfigError: If nothing fits.
    """
    config = _go_on_as_begun(run, config)
    memory = _find_memory(config, runtime)
    if memory is None or _is_small(config.base, memory):
        chosen = (
            config if config.memory.base_quantization != "auto" else _with_base(config, "whole")
        )
        return Fitted(chosen, chosen, ask_memory_options(chosen))
    rate = measure_matrix_rate(runtime.device, runtime.dtype)
    plan = plan_run(config, memory, photos=photos, rate_tflops=round(rate))
    chosen = apply_plan(config, plan)
    setting = plan.choice.setting
    lasting = _with_base(config, setting.quantization).model_copy(update={"train": chosen.train})
    return Fitted(chosen, lasting, _planned_options(setting), tuple(plan.lines()))


def fit_drawing(config: LoomConfig, runtime: Runtime) -> MemoryOptions:
    """Choose how a base model is loaded to draw with."""
    memory = _find_memory(config, runtime)
    if memory is None or _is_small(config.base, memory):
        return ask_memory_options(config)
    return _planned_options(plan_drawing(config, memory))


def _find_memory(config: LoomConfig, runtime: Runtime) -> DeviceMemory | None:
    has = read_device_memory(runtime.device)
    if has is None or config.memory.limit == "auto":
        return has
    return read_memory(config.memory.limit)


def _is_small(base: str, memory: DeviceMemory) -> bool:
    folder = find_folder(base)
    if folder is None:
        return False
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return size < memory.nbytes * _SMALL_SHARE


def _go_on_as_begun(run: RunFolder, config: LoomConfig) -> LoomConfig:
    if config.memory.base_quantization != "auto" or not run.settings_file.is_file():
        return config
    begun = load_run_settings(run.settings_file)
    if begun.memory.base_quantization == "auto":
        return config
    config = _with_base(config, begun.memory.base_quantization)
    chose_8_bit = (config.train.optimizer, begun.train.optimizer) == ("adamw", "adamw8bit")
    return config.model_copy(update={"train": begun.train}) if chose_8_bit else config


def _with_base(config: LoomConfig, quantization: str) -> LoomConfig:
    return config.model_copy(
        update={"memory": config.memory.model_copy(update={"base_quantization": quantization})}
    )


def _planned_options(setting: Setting) -> MemoryOptions:
    """How a base model is loaded as was planned."""
    return MemoryOptions(setting.quantization, setting.cpu_offload, setting.drawn_at_once)  # type: ignore[arg-type]


def ask_memory_options(config: LoomConfig) -> MemoryOptions:
    """How the settings ask for the base model to be loaded, where nothing is planned."""
    asked = config.memory
    quantization = "whole" if asked.base_quantization == "auto" else asked.base_quantization
    return MemoryOptions(quantization, asked.cpu_offload is True)
