"""What a run asks of its device's memory, read from its settings, and what they leave open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.memory.choose import LADDER, QUANTIZED, QUANTIZED_FROM_FP32, Limits, Work
from dreamloom.memory.device_memory import DeviceMemory
from dreamloom.memory.host import has_bf16_units
from dreamloom.memory.judges import weigh_judges
from dreamloom.memory.predict import Setting
from dreamloom.memory.table import PICTUREBOOK_FILE, MemoryTable, read_table

# What SDXL's own advice is; a base of another size is counted and brings its own.
_SDXL_RESOLUTION_PX = 1024
_LATENT_STEP_PX = 8


def find_table(base: str, on_count: Callable[[str], None] = lambda case: None) -> MemoryTable:
    """Find what was counted of a base model; a folder of another size is counted now."""
    if base == "picturebook":
        return read_table(PICTUREBOOK_FILE)
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


def read_work(config: LoomConfig, table: MemoryTable, memory: DeviceMemory) -> Work:
    """Read what is to be done.

    Raises:
        ConfigError: If the resolution fits no latents.
    """
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
        base_bytes=read_base_bytes(config, memory),
        on_host=memory.is_host,
        judges_bytes=weigh_judges(config),
    )
    return Work(
        setting,
        config.train.batch_photos + (priors if has_priors else 0),
        config.train.gradient_accumulation_steps,
        config.generate.batch,
    )


def read_base_bytes(config: LoomConfig, memory: DeviceMemory) -> int:
    """Read how many bytes a weight of the base has: 2 or 4.

    A processor without matrix units for bf16 is many times slower in it than in fp32.
    """
    if config.precision == "auto" and memory.is_host:
        return 2 if has_bf16_units() else 4
    if config.precision == "fp16" and memory.is_host:
        return 4
    return 4 if config.precision == "fp32" else 2


def read_limits(config: LoomConfig, memory: DeviceMemory) -> Limits:
    """Read what may be chosen: what the settings name, or all that suits the device."""
    asked = config.memory
    quantization: tuple[str, ...] = QUANTIZED
    if config.adapter.splits_base:
        quantization = ("whole",)
    elif read_base_bytes(config, memory) == 4:
        quantization = QUANTIZED_FROM_FP32
    return Limits(
        gradient_checkpointing=LADDER
        if asked.gradient_checkpointing == "auto"
        else (asked.gradient_checkpointing,),
        quantization=quantization
        if asked.base_quantization == "auto"
        else (asked.base_quantization,),
        cpu_offload=(False, True) if asked.cpu_offload == "auto" else (asked.cpu_offload,),
        micro_batch_size=None if asked.micro_batch_size == "auto" else asked.micro_batch_size,
        # Of a LoRA the states are small, and in 8 bits they are for GPUs.
        may_use_8_bit=config.train.optimizer == "adamw" and not memory.is_host,
    )
