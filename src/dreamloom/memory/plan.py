"""Plan a run's memory before it begins: what each phase needs, what is chosen, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.memory.choose import (
    EIGHT_BIT,
    LADDER,
    QUANTIZED,
    Choice,
    Limits,
    Work,
    choose_setting,
    usable_bytes,
)
from dreamloom.memory.predict import GIB, PHASES, Setting, count_flops, predict_memory_use
from dreamloom.memory.table import MemoryTable, read_table

if TYPE_CHECKING:
    import torch

# What SDXL's own advice is; a base of another size is counted and brings its own.
_SDXL_RESOLUTION_PX = 1024
_LATENT_STEP_PX = 8
_UNITS = {"": GIB, "g": GIB, "gb": 10**9, "gib": GIB, "m": 2**20, "mb": 10**6, "mib": 2**20}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_LEAST_MEMORY = GIB // 8
_RECOMPUTED = {
    "none": "nothing is recomputed: all activations are kept",
    "high": "the high levels of the U-Net are recomputed in the backward pass",
    "low": "the lowest level of the U-Net is recomputed in the backward pass",
    "full": "every level of the U-Net is recomputed in the backward pass",
}
_QUANTIZED = {
    "whole": "the base model is kept whole",
    "fp8": "the base model's linear layers are kept in fp8",
    "int8": "the base model's linear layers are kept in 8 bits",
    "nf4": "the base model's linear layers are kept in 4 bits (nf4), the text encoders' in 8",
}
_COMPILED = {
    "off": "repeated blocks not compiled (train.compile=auto does, where training is long)",
    "auto": "repeated blocks compiled where training is long enough to repay it",
    "blocks": "repeated blocks compiled",
}


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory as it was said.

    Args:
        nbytes: How much that is.
        said: In the user's words.
    """

    nbytes: int
    said: str

    @property
    def gib(self) -> float:
        """In GiB (2^30 bytes)."""
        return self.nbytes / GIB


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
            "memory_gib": round(self.memory.gib, 3),
            "usable_gib": round(usable_bytes(self.memory.nbytes) / GIB, 3),
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
            },
            "petaflops": {name: round(count / 1e15, 3) for name, count in self.flops.items()},
            "least_seconds": self.least_seconds,
        }

    def lines(self) -> list[str]:
        """Say it in words, one line each."""
        setting, memory_use = self.choice.setting, self.choice.memory_use
        usable = usable_bytes(self.memory.nbytes)
        lines = [
            f"{self.base} at {setting.resolution_px} px, rank {setting.rank}"
            f"{', both text encoders' if setting.text_encoders else ''}, in {self.memory.said}: "
            f"{_gib(memory_use.peak_bytes)} at most, of {_gib(usable)} that tensors may hold",
            ", ".join(f"{phase} {_gib(memory_use.phases[phase])}" for phase in PHASES),
        ]
        images = self.work.images_per_batch * self.work.gradient_accumulation_steps
        lines += [
            _QUANTIZED[setting.quantization] + self._why("quantization"),
            _RECOMPUTED[setting.gradient_checkpointing] + self._why("gradient_checkpointing"),
            f"{_count(setting.micro_batch_size, 'image')} a pass, "
            f"{_count(setting.passes, 'pass', 'passes')} an update of {images}: the same update "
            "however it is cut" + self._why("micro_batch_size"),
        ]
        if setting.cpu_offload:
            lines.append(
                "autoencoder, text encoders and denoiser take turns on the device, so that the "
                "end of the run needs no more than its middle" + self._why("cpu_offload")
            )
        if setting.optimizer == EIGHT_BIT and self.work.setting.optimizer != EIGHT_BIT:
            lines.append("the optimizer keeps its states in 8 bits: without, nothing fits")
        lines.append(
            f"{_count(setting.drawn_at_once, 'picture')} drawn at a time; attention by torch's "
            f"own fused kernels; {_COMPILED[self.compile]}"
        )
        whole = sum(self.flops.values()) / 1e15
        parts = ", ".join(f"{name} {count / 1e15:.3g}" for name, count in self.flops.items())
        operations = f"{whole:.3g} PFLOP in all ({parts})"
        if self.least_seconds is None:
            lines.append(f"{operations}; --gpu-rate TFLOPS says how long that is at best")
        else:
            least = _duration(self.least_seconds)
            lines.append(f"{operations}: at {self.rate_tflops:g} TFLOP/s no less than {least}")
        return lines

    def _why(self, name: str) -> str:
        """Say what the next faster or more exact value would have needed."""
        refused = [(value, needed) for what, value, needed in self.choice.refused if what == name]
        if not refused:
            return ""
        value, needed = refused[-1]
        usable = usable_bytes(self.memory.nbytes)
        words = {"cpu_offload": "together", "micro_batch_size": f"{value} a pass"}.get(name, value)
        if needed <= usable:
            return ""
        return f" ({words} would need {_gib(needed)})"


def read_memory(text: str) -> DeviceMemory:
    """Read a size of memory: 12GiB, 12GB, 11.5 or 8192MiB; a bare number means GiB.

    Raises:
        ConfigError: If it is none, or too small for any GPU.
    """
    found = _SIZE.fullmatch(text)
    unit = found.group(2).lower() if found else "?"
    if found is None or unit not in _UNITS:
        raise ConfigError(
            f"{text!r} is no size of memory.",
            "Write it like 12GiB (2^30 bytes each), 12GB (10^9 bytes each) or 8192MiB.",
        )
    nbytes = round(float(found.group(1)) * _UNITS[unit])
    if nbytes < _LEAST_MEMORY:
        raise ConfigError(
            f"{text!r} is {nbytes / 2**20:.0f} MiB, less than any GPU has.",
            "Write it with its unit, like 12GiB.",
        )
    if unit in ("gb", "mb"):
        return DeviceMemory(nbytes, f"{text.strip()} ({nbytes / GIB:.2f} GiB)")
    return DeviceMemory(nbytes, f"{nbytes / GIB:.4g} GiB")


def find_memory(said: str | None, config: LoomConfig) -> DeviceMemory:
    """Take the memory that was named, or else that of the GPU that is here.

    Raises:
        ConfigError: If none was named and there is no GPU.
    """
    if said is not None:
        return read_memory(said)
    if config.memory.limit != "auto":
        return read_memory(config.memory.limit)
    from dreamloom.core.device import pick_runtime

    has = read_device_memory(pick_runtime(config.device).device)
    if has is None:
        raise ConfigError(
            "There is no GPU here whose memory could be planned.", "Name one: --gpu-memory 12GiB."
        )
    return has


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Read how much memory a GPU has; None where it shares the computer's."""
    from dreamloom.core.device import device_memory_bytes

    has = device_memory_bytes(device)
    return None if has is None else read_memory(f"{has / 2**20:.0f}MiB")


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
    if config.memory.limit != "auto":
        memory = read_memory(config.memory.limit)
    table = find_table(config.base, on_count)
    work, limits = _read_work(config, table), _read_limits(config)
    choice = choose_setting(table, work, memory.nbytes, limits)
    if not choice.fits:
        raise _nothing_fits(config, memory, choice)
    flops = _count_work(config, table, choice.setting, work, photos)
    return MemoryPlan(config.base, memory, choice, work, flops, config.train.compile, rate_tflops)


def plan_drawing(config: LoomConfig, memory: DeviceMemory) -> Setting:
    """Choose how to keep the base model, and how many pictures to draw at a time.

    Raises:
        ConfigError: If not even one picture at a time fits.
    """
    table, limits = find_table(config.base), _read_limits(config)
    usable = usable_bytes(memory.nbytes)
    work = _read_work(config, table)
    least, tried = None, work.setting
    for quantization in limits.quantization:
        for in_turn in limits.cpu_offload:
            number = config.generate.batch
            while number:
                tried = replace(
                    work.setting,
                    quantization=quantization,
                    cpu_offload=in_turn,
                    drawn_at_once=number,
                )
                needed = predict_memory_use(table, tried).phases["class images"]
                if needed <= usable:
                    return tried
                least = min(needed, least or needed)
                number //= 2
    raise ConfigError(
        f"Nothing fits in {memory.said}: to draw one picture of {tried.resolution_px} px, "
        f"{config.base} needs {_gib(least or 0)} of the {_gib(usable)} that tensors may hold.",
        "Draw smaller pictures, or take a GPU with more memory.",
    )


def find_table(base: str, on_count: Callable[[str], None] = lambda case: None) -> MemoryTable:
    """Find what was counted of a base model; a folder of another size is counted now."""
    folder = find_folder(base)
    if folder is None:
        # A checkpoint, a hub id or sdxl itself: all of them are of SDXL's published size.
        return read_table()
    from dreamloom.memory.measure import count_folder

    return count_folder(folder, on_count) or read_table()


def find_folder(base: str) -> Path | None:
    """Find the folder of a base model in diffusers' layout; None for what lies elsewhere."""
    if base == "picturebook":
        from dreamloom.picturebook import weights_folder

        return weights_folder()
    return Path(base) if Path(base).is_dir() else None


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
    return config.model_copy(update={"memory": memory, "train": train})


def _read_work(config: LoomConfig, table: MemoryTable) -> Work:
    side = config.photos.resolution_px
    side = table.resolution_px if side == "auto" else side
    if side % _LATENT_STEP_PX:
        near = max(_LATENT_STEP_PX, round(side / _LATENT_STEP_PX) * _LATENT_STEP_PX)
        raise ConfigError(
            f"photos.resolution_px = {side} is no multiple of {_LATENT_STEP_PX}, the side of a "
            "latent.",
            f"Take {near}.",
        )
    target_modules = config.train.target_modules
    is_full_size = table.resolution_px >= _SDXL_RESOLUTION_PX
    has_priors = config.priors.kind != "none" and config.train.prior_weight > 0
    priors = (
        config.train.batch_photos if config.priors.kind == "base" else config.train.batch_priors
    )
    setting = Setting(
        side,
        rank=config.train.rank,
        target_modules=("attention" if is_full_size else "all")
        if target_modules == "auto"
        else target_modules,
        text_encoders=config.adapter.text_encoders or bool(config.adapter.placeholder_tokens),
        optimizer=config.train.optimizer,
        base_bytes=4 if config.precision == "fp32" else 2,
    )
    return Work(
        setting,
        config.train.batch_photos + (priors if has_priors else 0),
        config.train.gradient_accumulation_steps,
        config.generate.batch,
    )


def _read_limits(config: LoomConfig) -> Limits:
    asked = config.memory
    quantization = ("whole",) if config.adapter.splits_base else QUANTIZED
    return Limits(
        gradient_checkpointing=LADDER
        if asked.gradient_checkpointing == "auto"
        else (asked.gradient_checkpointing,),
        quantization=quantization
        if asked.base_quantization == "auto"
        else (asked.base_quantization,),
        cpu_offload=(False, True) if asked.cpu_offload == "auto" else (asked.cpu_offload,),
        micro_batch_size=None if asked.micro_batch_size == "auto" else asked.micro_batch_size,
        may_use_8_bit=config.train.optimizer == "adamw",
    )


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


def _nothing_fits(config: LoomConfig, memory: DeviceMemory, choice: Choice) -> ConfigError:
    needed, usable = choice.memory_use.peak_bytes, usable_bytes(memory.nbytes)
    setting = choice.setting
    ways = []
    if setting.resolution_px > 512:
        ways.append("--set photos.resolution_px=512")
    if setting.text_encoders:
        ways.append("--set adapter.text_encoders=false")
    ways += [
        f"--set {name}=auto"
        for name, value in config.flat().items()
        if name.startswith("memory.") and name != "memory.limit" and value != "auto"
    ]
    if setting.rank > 16:
        ways.append("--set train.rank=16")
    return ConfigError(
        f"Nothing fits in {memory.said}: the least that {config.base} can do with needs "
        f"{_gib(needed)} in its phase {choice.memory_use.peak_phase!r}, {_gib(needed - usable)} "
        f"more than the {_gib(usable)} that tensors may hold there.",
        f"Try {' or '.join(ways)}." if ways else "Take a GPU with more memory.",
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
