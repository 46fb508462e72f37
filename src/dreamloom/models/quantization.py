"""Quantization of frozen weights to 16, 8 or 4 bits: what they lose is bounded.

Activations and gradients stay as they are; a stored weight is turned back for each use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Quantization = Literal["whole", "bf16", "fp8", "int8", "nf4"]
"""How frozen weights are kept: as they are, or in 16, 8, 8 or 4 bits each."""

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

BLOCK = 64
"""Weights that share one scale in nf4."""
_SUPERBLOCK = 256
"""Scales that share one scale of scales in nf4."""
_LARGEST_INT8 = 127.0
_LARGEST_FP8 = 448.0  # of the format e4m3fn
# Rows of zeros have a scale, too; divided by the largest codes it is still a normal number.
_LEAST_SCALE = 1e-30


@dataclass
class QuantizedTensor:
    """One weight matrix as it is stored.

    Args:
        kind: bf16, fp8, int8 or nf4.
        shape: Of the matrix, (outputs, inputs).
        codes: The matrix; nf4: two codes a byte, the first in the upper half.
        scales: fp8 or int8: one per output, (outputs, 1) in float32; nf4: one byte per block; bf16
            has none.
        superscales: nf4: one per 256 blocks, and the scales' mean at the end; else empty.
        levels: nf4: the two values that each byte stands for, (256, 2) in float32; else empty.
    """

    kind: Quantization
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    superscales: Tensor
    levels: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.codes, self.scales, self.superscales, self.levels)
        return sum(part.nbytes for part in parts)


@cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 values of nf4, from -1 to 1: quantiles of a normal distribution, 0 among them.

    Eight quantiles are taken of the upper half and seven of the lower, evenly in probability, and
    all are divided by the largest.

    Source:
        Dettmers et al., QLoRA (arXiv:2305.14314), Eq. 4 and appendix E. The outermost probability
        is the mean of 1 - 1/30 and 1 - 1/32, which gives the appendix's values.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def spread(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [quantile(outermost - step * number) for number in range(count)]

    upper, lower = spread(8), [-value for value in spread(7)]
    values = sorted([*upper, 0.0, *lower])
    return tuple(value / values[-1] for value in values)


def quantize(weight: Float[Tensor, "outputs inputs"], kind: Quantization) -> QuantizedTensor:
    """Store a weight matrix in fewer bits.

    - ``bf16``: the nearest number of bfloat16. The error is at most 1/256 of the weight.
    - ``int8``: round(127 w / s), s the largest magnitude of the output's row. The error is at most
      s / 254.
    - ``fp8``: w / s in e4m3fn, s the row's largest magnitude over 448. The error is at most 1/16
      of the weight, and s / 1024 for the smallest ones.
    - ``nf4``: the nearest of `nf4_levels` times the largest magnitude of 64 weights in a row;
      these scales are stored in 8 bits themselves, as int8 of their distance from their mean,
      256 at a time.

    Args:
        weight: Finite, of any floating type. For nf4, blocks run on across rows, and the last one
            is filled up with zeros.
        kind: bf16, fp8, int8 or nf4.

    Raises:
        ValueError: If the kind is ``whole``.

    Source:
        Dettmers et al., LLM.int8() (arXiv:2208.07339), section 2.1, of weights alone; QLoRA
        (arXiv:2305.14314), section 3, whose scales of scales are fp8.
    """
    if kind == "whole":
        raise ValueError(
            f"a whole weight is not stored in fewer bits; give one of {QUANTIZATIONS[1:]}"
        )
    exact = weight.detach().float()
    nothing = exact.new_empty(0)
    if kind == "nf4":
        return _quantize_nf4(exact)
    if kind == "bf16":
        codes = weight.detach().to(torch.bfloat16)
        return QuantizedTensor(kind, _sides(exact), codes, nothing, nothing, nothing)
    largest = exact.abs().amax(dim=1, keepdim=True).clamp(min=_LEAST_SCALE)
    limit = _LARGEST_INT8 if kind == "int8" else _LARGEST_FP8
    scaled = exact * (limit / largest)
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return QuantizedTensor(kind, _sides(exact), codes, largest / limit, nothing, nothing)


def dequantize(stored: QuantizedTensor, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
    """Turn a stored weight back, with what it lost."""
    if stored.kind == "bf16":
        return stored.codes.to(dtype)
    if stored.kind != "nf4":
        return stored.codes.to(dtype) * stored.scales.to(dtype)
    pairs = torch.nn.functional.embedding(stored.codes.int(), stored.levels.to(dtype))
    values = pairs.view(-1, BLOCK) * _nf4_scales(stored)[:, None].to(dtype)
    outputs, inputs = stored.shape
    return values.view(-1)[: outputs * inputs].view(outputs, inputs)


def _sides(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _quantize_nf4(exact: Tensor) -> QuantizedTensor:
    flat = exact.flatten()
    blocks = -(-len(flat) // BLOCK)
    filled = torch.nn.functional.pad(flat, (0, blocks * BLOCK - len(flat))).view(blocks, BLOCK)
    largest = filled.abs().amax(dim=1)
    scales, superscales = _quantize_scales(largest)
    levels = torch.tensor(nf4_levels(), device=exact.device)
    pairs = torch.cartesian_prod(levels, levels)
    stored = QuantizedTensor("nf4", _sides(exact), exact.new_empty(0), scales, superscales, pairs)
    # Codes are chosen for the scales as they will be read, not as they were.
    shares = filled / _nf4_scales(stored)[:, None].clamp(min=_LEAST_SCALE)
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    stored.codes = codes[0::2] << 4 | codes[1::2]
    return stored


def _quantize_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    mean = largest.mean()
    groups = -(-len(largest) // _SUPERBLOCK)
    missing = groups * _SUPERBLOCK - len(largest)
    apart = torch.nn.functional.pad(largest - mean, (0, missing)).view(groups, _SUPERBLOCK)
    spread = apart.abs().amax(dim=1).clamp(min=_LEAST_SCALE)
    codes = (apart * (_LARGEST_INT8 / spread[:, None])).round().to(torch.int8)
    return codes.flatten()[: len(largest)], torch.cat([spread / _LARGEST_INT8, mean[None]])


def _nf4_scales(stored: QuantizedTensor) -> Float[Tensor, " blocks"]:
    spread, mean = stored.superscales[:-1], stored.superscales[-1]
    by_block = spread.repeat_interleave(_SUPERBLOCK)[: len(stored.scales)]
    return torch.addcmul(mean, stored.scales.float(), by_block).clamp(min=0)
