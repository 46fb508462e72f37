import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.models.quantization import (
    BLOCK,
    QUANTIZATIONS,
    dequantize,
    nf4_levels,
    quantize,
)

FEWER_BITS = [kind for kind in QUANTIZATIONS if kind != "whole"]
# From appendix E of the QLoRA paper (arXiv:2305.14314), to seven digits.
PUBLISHED = """
    -1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1.0
"""


def matrix(rows: int = 24, columns: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_nf4_has_the_published_levels():
    assert nf4_levels() == pytest.approx([float(value) for value in PUBLISHED.split()], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_int8_errs_by_half_a_step_of_the_row_at_most(rows, columns, scale, seed):
    weight = matrix(rows, columns, seed) * scale
    back = dequantize(quantize(weight, "int8"), torch.float32)
    half_step = weight.abs().amax(dim=1, keepdim=True) / 254
    assert bool(((back - weight).abs() <= half_step * (1 + 1e-4)).all())


def test_fp8_errs_by_a_sixteenth_of_the_weight_or_a_step_at_most():
    weight = matrix() * 0.02
    back = dequantize(quantize(weight, "fp8"), torch.float32)
    largest = weight.abs().amax(dim=1, keepdim=True)
    bound = torch.maximum(weight.abs() / 16, largest / 448 * 2.0**-10)
    assert bool(((back - weight).abs() <= bound * (1 + 1e-4)).all())


def test_nf4_takes_the_nearest_level_of_the_blocks_own_scale():
    weight = matrix()
    back = dequantize(quantize(weight, "nf4"), torch.float32).view(-1, BLOCK)
    blocks = weight.view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(nf4_levels())
    widest = (levels[1:] - levels[:-1]).max() / 2
    # Scales are off by half a step of their own 8 bits.
    slack = (largest - largest.mean()).abs().max() / 254
    assert bool(((back - blocks).abs() <= widest * (largest + slack) + slack).all())
    used = (back / back.abs().amax(dim=1, keepdim=True)).round(decimals=4).unique()
    assert {round(float(value), 3) for value in used} <= {
        round(sign * float(a), 3) for sign, a in product((1, -1), levels)
    }


@pytest.mark.parametrize(("kind", "at_most"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_what_normal_weights_lose(kind, at_most):
    weight = matrix(64, 640)
    lost = (dequantize(quantize(weight, kind), torch.float32) - weight).norm() / weight.norm()
    assert at_most / 5 < lost < at_most


@pytest.mark.parametrize("kind", FEWER_BITS)
def test_zeros_come_back_as_zeros_and_stay_finite(kind):
    weight = torch.zeros(3, 70)
    assert torch.equal(dequantize(quantize(weight, kind), torch.float32), weight)


def expected_bytes(outputs, inputs, kind):
    """One byte a weight and a scale a row; for bf16 two bytes a weight; for nf4 half a byte,
    scales, and scales of scales.
    """
    weights = outputs * inputs
    if kind == "bf16":
        return 2 * weights
    if kind != "nf4":
        return weights + 4 * outputs
    blocks = -(-weights // BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * (-(-blocks // 256) + 1) + 4 * 2 * 256


@pytest.mark.parametrize("kind", FEWER_BITS)
@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (7, 64), (320, 640)])
def test_what_is_stored_weighs_what_is_told(kind, sides):
    weight = matrix(*sides)
    quantized = quantize(weight, kind)
    assert quantized.nbytes == expected_bytes(*sides, kind)
    assert dequantize(quantized, torch.bfloat16).shape == weight.shape
    assert dequantize(quantized, torch.bfloat16).dtype == torch.bfloat16


def test_nf4_takes_little_more_than_half_a_byte_a_weight():
    weight = torch.ones(1280, 1280)
    assert quantize(weight, "int8").nbytes / 1280**2 == pytest.approx(1, rel=0.01)
    # Half a byte, a byte of scale per 64 weights, and next to nothing for scales of scales.
    expected = 0.5 + 1 / 64
    assert quantize(weight, "nf4").nbytes / 1280**2 == pytest.approx(expected, rel=0.01)


def test_whole_is_no_way_to_store_in_fewer_bits():
    with pytest.raises(ValueError, match="a whole weight is not stored in fewer bits"):
        quantize(matrix(), "whole")


def test_a_coarser_kind_loses_more():
    weight = matrix(64, 640)
    lost = [
        float((dequantize(quantize(weight, k), torch.float32) - weight).norm()) for k in FEWER_BITS
    ]
    by_kind = dict(zip(FEWER_BITS, lost, strict=True))
    assert by_kind["int8"] < by_kind["fp8"] < by_kind["nf4"]
    assert all(map(math.isfinite, lost))
