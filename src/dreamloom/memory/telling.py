"""What plans say, in words."""

from __future__ import annotations

from dreamloom.memory.device_memory import DeviceMemory
from dreamloom.memory.host import has_bf16_units
from dreamloom.memory.predict import GIB

RECOMPUTED = {
    "none": "nothing is recomputed: all activations are kept",
    "high": "the high levels of the U-Net are recomputed in the backward pass",
    "low": "the lowest level of the U-Net is recomputed in the backward pass",
    "full": "every level of the U-Net is recomputed in the backward pass",
}
QUANTIZED = {
    "whole": "the base model is kept whole",
    "bf16": "the base model's linear layers are kept in bf16 and widened for each use",
    "fp8": "the base model's linear layers are kept in fp8",
    "int8": "the base model's linear layers are kept in 8 bits",
    "nf4": "the base model's linear layers are kept in 4 bits (nf4), the text encoders' in 8",
}
COMPILED = {
    "off": "repeated blocks not compiled (train.compile=auto does, where training is long)",
    "auto": "repeated blocks compiled where training is long enough to repay it",
    "blocks": "repeated blocks compiled",
}


def tell_compiled(setting: str, memory: DeviceMemory) -> str:
    """Say what is compiled; ``auto`` compiles nothing on a processor."""
    if memory.is_host and setting != "blocks":
        return "repeated blocks not compiled"
    return COMPILED[setting]


def tell_more_memory(memory: DeviceMemory) -> str:
    """Say what to do where nothing fits."""
    if memory.is_set:
        return "set memory.limit higher"
    if memory.is_host:
        return "close other programs, or take a computer with more memory"
    return "take a GPU with more memory"


def tell_precision(precision: str) -> str:
    """Say what a processor computes in, and why."""
    if precision == "fp32":
        why = "" if has_bf16_units() else ": it has no matrix units for bf16"
        return f"the processor computes in fp32{why}"
    if has_bf16_units():
        return "the processor computes in bf16, for which it has matrix units"
    return "the processor computes in bf16, very slowly: it has no matrix units for it"


def tell_turns(memory: DeviceMemory) -> str:
    """Say which parts wait for each other, and where."""
    if memory.is_host:
        return "text encoders and autoencoder wait in a temporary file until they are needed"
    return (
        "autoencoder, text encoders and denoiser take turns on the device, so that the end of the "
        "run needs no more than its middle"
    )


def tell_bytes(nbytes: float) -> str:
    """Tell a size of memory."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"


def tell_flops(count: float) -> str:
    """Tell a number of floating-point operations."""
    return f"{count / 1e15:.3g} PFLOP" if count >= 1e14 else f"{count / 1e12:.3g} TFLOP"


def tell_count(number: int, one: str, more: str = "") -> str:
    """Tell a number of things."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def tell_duration(seconds: float) -> str:
    """Tell a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
