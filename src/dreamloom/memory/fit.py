"""Fit a run to the device's memory: plan it, choose precision, quantization and CPU offload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from dreamloom.core.config.loading import load_config, load_run_settings
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, pick_runtime, spare_memory
from dreamloom.core.run_folder import RunFolder
from dreamloom.memory.device_memory import DeviceMemory, apply_limit, read_device_memory
from dreamloom.memory.plan import apply_plan, plan_run
from dreamloom.memory.plan_drawing import plan_drawing
from dreamloom.memory.predict import Setting
from dreamloom.memory.work import find_folder
from dreamloom.models.base import MemoryOptions
from dreamloom.models.matrix_products import measure_matrix_rate

# A base whose weights are this small beside a device's memory is not worth a plan.
_SMALL_SHARE = 1 / 32
_USUAL_PHOTOS = 6
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Fitted:
    """Settings that fit.

    Args:
        config: With everything that was chosen.
        lasting: With what the result depends on, as a run's folder keeps it; what depends on this
            device alone stays as it was given.
        runtime: Where and how precisely to compute.
        memory_options: How the base model is to be loaded.
        lines: What was chosen, and why.
    """

    config: LoomConfig
    lasting: LoomConfig
    runtime: Runtime
    memory_options: MemoryOptions
    lines: tuple[str, ...] = ()


def fit_training(
    config: LoomConfig, runtime: Runtime, photos: int, run: RunFolder | None = None
) -> Fitted:
    """Choose what the settings leave open from the device's memory.

    Args:
        config: Settings as given.
        runtime: Where to compute, as the settings say.
        photos: How many there are.
        run: The run's folder. One that was begun keeps its base as it is stored there, whatever
            would fit now.

    Raises:
        ConfigError: If nothing fits.
    """
    config = _go_on_as_begun(run, config) if run else config
    memory = _find_memory(config, runtime)
    if memory is None or _is_small(config.base, memory):
        chosen = (
            config if config.memory.base_quantization != "auto" else _with_base(config, "whole")
        )
        return Fitted(chosen, chosen, runtime, ask_memory_options(chosen))
    rate = measure_matrix_rate(runtime.device, runtime.dtype)
    plan = plan_run(config, memory, photos=photos, rate_tflops=float(f"{rate:.2g}"))
    chosen = apply_plan(config, plan)
    setting = plan.choice.setting
    lasting = _with_base(config, setting.quantization).model_copy(
        update={"train": chosen.train, "precision": chosen.precision}
    )
    return Fitted(
        chosen,
        lasting,
        _planned_runtime(setting, runtime),
        _planned_options(setting),
        tuple(plan.lines()),
    )


def fit_open(config: LoomConfig, runtime: Runtime, work: Literal["training", "drawing"]) -> Fitted:
    """Choose what the settings leave open; where that is nothing, take them as they are.

    For work that opens its base model again and again: what was chosen first stays.

    Raises:
        ConfigError: If nothing fits.
    """
    if "auto" not in (config.memory.base_quantization, config.memory.cpu_offload):
        return Fitted(config, config, runtime, ask_memory_options(config))
    if work == "training":
        fitted = fit_training(config, runtime, _USUAL_PHOTOS)
        return fitted if fitted.lines else replace(fitted, config=config)
    return fit_drawing(config, runtime)


def fit_drawing(config: LoomConfig, runtime: Runtime) -> Fitted:
    """Choose how a base model is loaded to draw with.

    Raises:
        ConfigError: If not even one picture at a time fits.
    """
    memory = _find_memory(config, runtime)
    if memory is None or _is_small(config.base, memory):
        return Fitted(config, config, runtime, ask_memory_options(config))
    plan = plan_drawing(config, memory)
    chosen = _with_base(config, plan.setting.quantization, cpu_offload=plan.setting.cpu_offload)
    if plan.setting.on_host:
        chosen = chosen.model_copy(update={"precision": plan.setting.precision})
    return Fitted(
        chosen,
        chosen,
        _planned_runtime(plan.setting, runtime),
        _planned_options(plan.setting),
        tuple(plan.lines()),
    )


def fit_asking(base: str, device: str = "auto") -> Fitted:
    """Choose how a base model is loaded whole, to be asked what a merge must know.

    Raises:
        ConfigError: If it does not fit whole, or the device is not there.
    """
    runtime = pick_runtime(device)
    precision = "fp32" if runtime.device.type == "cpu" else "auto"
    sets = ["memory.base_quantization=whole", f"precision={precision}"]
    return fit_drawing(load_config(sets=sets, overrides={"base": base, "device": device}), runtime)


def _find_memory(config: LoomConfig, runtime: Runtime) -> DeviceMemory | None:
    has = read_device_memory(runtime.device)
    return None if has is None else apply_limit(has, config)


def _is_small(base: str, memory: DeviceMemory) -> bool:
    folder = find_folder(base)
    if folder is None:
        return False
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return size < memory.nbytes * _SMALL_SHARE


def _go_on_as_begun(run: RunFolder, config: LoomConfig) -> LoomConfig:
    if not run.settings_file.is_file():
        return config
    begun = load_run_settings(run.settings_file)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": begun.precision})
    if config.memory.base_quantization != "auto" or begun.memory.base_quantization == "auto":
        return config
    config = _with_base(config, begun.memory.base_quantization)
    chose_8_bit = (config.train.optimizer, begun.train.optimizer) == ("adamw", "adamw8bit")
    return config.model_copy(update={"train": begun.train}) if chose_8_bit else config


def _with_base(config: LoomConfig, quantization: str, **more: bool) -> LoomConfig:
    update = {"base_quantization": quantization, **more}
    return config.model_copy(update={"memory": config.memory.model_copy(update=update)})


def _planned_runtime(setting: Setting, runtime: Runtime) -> Runtime:
    """Compute as was planned; what a GPU computes in, it knows itself."""
    if not setting.on_host:
        return runtime
    spare_memory()
    return Runtime(runtime.device, _DTYPES[setting.base_bytes])


def _planned_options(setting: Setting) -> MemoryOptions:
    """How a base model is loaded as was planned."""
    return MemoryOptions(setting.quantization, setting.cpu_offload, setting.drawn_at_once)  # type: ignore[arg-type]


def ask_memory_options(config: LoomConfig) -> MemoryOptions:
    """How the settings ask for the base model to be loaded, where nothing is planned."""
    asked = config.memory
    quantization = "whole" if asked.base_quantization == "auto" else asked.base_quantization
    return MemoryOptions(quantization, asked.cpu_offload is True)
