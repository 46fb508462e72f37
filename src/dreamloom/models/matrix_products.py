"""Matrix products by the library that is faster on this processor, and how fast they are."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def multiply(
    x: Float[Tensor, "... inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "... outputs"]:
    """Compute x Wᵀ + b by the faster library; autograd does not see it.

    torch leaves float32 products to MKL, which on processors that are not Intel's does without
    AVX-512: on an AMD EPYC of 2024 oneDNN multiplied 2.2 times as fast.
    """
    if type(x) is Tensor and x.is_cpu and x.dtype == torch.float32 and prefers_onednn():
        return multiply_by_onednn(x, weight, bias)
    return linear(x, weight, bias)


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the same by oneDNN, with a weight as it lies or packed for oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def prefers_onednn() -> bool:
    """Say whether oneDNN multiplies float32 matrices faster than torch does by itself."""
    # Timing both ways would choose otherwise from one start to the next, and the last digits of a
    # training that was broken off would differ.
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return not is_processor_intels() and torch.backends.mkldnn.is_available() and has_product


@functools.cache
def is_processor_intels() -> bool:
    """Say whether Intel made this computer's processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="ignore") if info.exists() else platform.processor()
    return "GenuineIntel" in text


def measure_matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    side: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure how many TFLOP/s a device's matrix products do, in a fraction of a second.

    Args:
        device: Where.
        dtype: Of the matrices.
        side: Of the square matrices, 2·side³ operations each; None is 8192, on a processor 2048.
        clock: Gives seconds; `time.process_time` counts a processor's alone.
    """
    side = side or (2048 if device.type == "cpu" else 8192)
    left = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    for _ in range(4):
        wait(device)
        start = clock()
        multiply(left, left)
        wait(device)
        # The first also loads the kernel.
        best = min(best, clock() - start)
    return 2 * side**3 / best / 1e12
