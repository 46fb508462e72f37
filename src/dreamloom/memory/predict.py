"""Predict what each phase of a run needs from a table of counted numbers, in no time.

Weights, adapter, gradients and optimizer states are sums. What forward and backward passes hold
grows with the number of images and with their area, so one count gives the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dreamloom.memory.table import MemoryTable

Phase = Literal["loading", "class images", "caching", "training", "sampling", "saving"]
"""What a run does, in order; loading counts where a processor computes."""

PHASES: tuple[Phase, ...] = ("class images", "caching", "training", "sampling", "saving")
GIB = 2**30

_MASTER_BYTES = 4
# States beside each float32 weight. A factored second moment is next to nothing.
_STATE_BYTES = {
    "adamw": 8,
    "adamw8bit": 2,
    "adafactor": 1,
    "prodigy": 16,
    "schedule_free": 8,
    "lion": 4,
    "came": 5,
    "muon": 4,
    "adan": 16,
    "ademamix": 12,
}


@dataclass(frozen=True)
class Setting:
    """What the memory of a run depends on.

    Args:
        resolution_px: Side of the pictures.
        rank: Of the adapter.
        target_modules: attention, linear or all.
        text_encoders: Whether they are trained, too.
        optimizer: Its name.
        gradient_checkpointing: none, high, low or full.
        quantization: whole, bf16, fp8, int8 or nf4.
        cpu_offload: Whether autoencoder, text encoders and denoiser take turns.
        micro_batch_size: Images that go through the model at once.
        passes: Passes of an update.
        drawn_at_once: Pictures that are denoised at a time.
        base_bytes: Bytes of one weight of the frozen base: 2 or 4.
        on_host: Whether a processor computes, in the computer's own memory.
        judges_bytes: Bytes of the encoders that score pictures while training runs.
    """

    resolution_px: int
    rank: int = 16
    target_modules: str = "attention"
    text_encoders: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: str = "none"
    quantization: str = "whole"
    cpu_offload: bool = False
    micro_batch_size: int = 1
    passes: int = 2
    drawn_at_once: int = 1
    base_bytes: int = 2
    on_host: bool = False
    judges_bytes: int = 0

    @property
    def precision(self) -> str:
        """What the base is kept in, where it is whole and a processor computes."""
        return "fp32" if self.base_bytes == 4 else "bf16"


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that each phase holds at most.

    Args:
        phases: By phase.
        parts: What the training's are made of.
    """

    phases: dict[Phase, int]
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Of all phases."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def predict_memory_use(table: MemoryTable, setting: Setting) -> MemoryUse:
    """Predict the most bytes that each phase of a run holds at once."""
    area = (setting.resolution_px / table.resolution_px) ** 2
    wide = setting.base_bytes / 2
    unet = _weigh(table.unet, setting.quantization, wide)
    kind = setting.quantization
    text = _weigh(table.text, kind if kind in ("whole", "bf16") else "int8", wide)
    vae = round(table.vae * wide)
    # A processor's denoiser never leaves, and everything is there once it is loaded: in 16 bits
    # where it is then quantized.
    counted = table.unet["whole"] + table.text["whole"] + table.vae
    read = counted * (wide if kind == "whole" else 1)
    staying = unet if setting.on_host else 0
    dequantized = table.stored.get(setting.quantization, 0)
    at_work = {
        "denoise": wide * area * table.denoise * 2 * setting.drawn_at_once + dequantized,
        "decode": wide * area * table.decode,
        "encode": wide * area * table.encode,
        "prompts": wide * table.prompts,
    }
    trained = count_parameters(table, setting)
    adapter = trained * _MASTER_BYTES + (trained * setting.base_bytes if wide == 1 else 0)
    states = trained * _STATE_BYTES.get(setting.optimizer, 8)
    # On a processor AdamW keeps them between updates.
    gradients = trained * _MASTER_BYTES if setting.passes > 1 or setting.on_host else 0
    trained_text = text if setting.text_encoders else 0
    passes = _predict_passes(table, setting, area * wide) + dequantized
    adapter_state, judges = adapter + states, setting.judges_bytes
    waiting = vae + (0 if setting.text_encoders else text) if setting.on_host else 0
    training = unet + trained_text + adapter_state + gradients + passes + judges
    if not setting.cpu_offload:
        training += waiting
    drawing = _predict_drawing(setting, (unet, text, vae), at_work, staying)
    phases: dict[Phase, float] = {"loading": max(read, unet + text + vae)}
    phases = (phases if setting.on_host else {}) | {
        "class images": drawing,
        "caching": staying + max(vae + at_work["encode"], text + at_work["prompts"])
        if setting.cpu_offload
        else unet + text + vae + max(at_work["encode"], at_work["prompts"]),
        "training": training,
        # It begins with all that training leaves behind.
        "sampling": max(unet + trained_text, drawing) + adapter_state + judges,
        "saving": adapter_state
        + judges
        + vae
        + (staying if setting.cpu_offload else unet + trained_text)
        + adapter,
    }
    parts = {
        "base model": unet + trained_text + (0 if setting.cpu_offload else waiting),
        "adapter and optimizer": adapter_state + gradients,
        "activations": passes,
    }
    return MemoryUse({phase: round(size) for phase, size in phases.items()}, parts)


def count_parameters(table: MemoryTable, setting: Setting) -> int:
    """Count the numbers of an adapter."""
    text = table.text_adapter[setting.target_modules] if setting.text_encoders else 0
    return setting.rank * (table.adapter[setting.target_modules] + text)


def count_flops(table: MemoryTable, setting: Setting) -> float:
    """Count the floating-point operations of one image's forward and backward passes."""
    area = (setting.resolution_px / table.resolution_px) ** 2
    return table.flops[setting.gradient_checkpointing] * area


def _predict_passes(table: MemoryTable, setting: Setting, scale: float) -> int:
    """What forward and backward passes hold of the images that go through at once."""
    activations = table.training[setting.gradient_checkpointing]
    share = activations / table.training["none"]
    extra = table.target_modules.get(setting.target_modules, 0) + table.rank * (setting.rank - 16)
    text = 0.0
    if setting.text_encoders:
        # An update's prompts are two; a pass of one image has one.
        text = table.text_training[setting.target_modules] * min(2, setting.micro_batch_size)
    return round(scale * setting.micro_batch_size * (activations + share * extra) + text)


def _predict_drawing(
    setting: Setting, weights: tuple[int, int, int], at_work: dict[str, float], staying: int
) -> float:
    """What drawing holds, with the weights of denoiser, text encoders and autoencoder."""
    unet, text, vae = weights
    if not setting.cpu_offload:
        return sum(weights) + max(at_work["prompts"], at_work["denoise"], at_work["decode"])
    return max(
        staying + text + at_work["prompts"],
        unet + at_work["denoise"],
        staying + vae + at_work["decode"],
    )


def _weigh(sizes: dict[str, int], quantization: str, wide: float) -> int:
    """Weigh a part: what was counted in 16 bits is wider in 32, but for what is quantized."""
    if quantization == "whole":
        return round(sizes["whole"] * wide)
    counted = sizes["whole" if quantization == "bf16" else quantization]
    # In int8 a weight has one byte of its two.
    in_16_bits = 2 * sizes["int8"] - sizes["whole"]
    return round(counted + (wide - 1) * in_16_bits)
