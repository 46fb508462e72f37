"""Runtime: the device and precision that were asked for, and dice that can be thrown again."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamloom.core.device import Runtime, generator_for, measure_effort, pick_runtime, seed_for
from dreamloom.core.errors import ConfigError

ARGUMENTS = st.tuples(
    st.integers(0, 2**64), st.text(":ab1"), st.lists(st.integers(0, 10**6), max_size=3)
)


@given(ARGUMENTS)
def test_seeds_suit_every_generator(arguments):
    seed, purpose, indices = arguments
    assert 0 <= seed_for(seed, purpose, *indices) < 2**63
    assert seed_for(seed, purpose, *indices) == seed_for(seed, purpose, *indices)


@given(ARGUMENTS, ARGUMENTS)
def test_other_arguments_give_other_seeds(first, second):
    same = seed_for(first[0], first[1], *first[2]) == seed_for(second[0], second[1], *second[2])
    assert same == (first == second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "crop", 1, 23), (0, "crop", 12, 3)),
        ((0, "crop", 1), (0, "crop", 1, 0)),
        ((0, "crop", 1), (0, "crop:1")),
        ((0, "crop:1", 2), (0, "crop", 1, 2)),
        ((0, "crop:"), (0, "crop::")),
        ((1, "noise", 2), (2, "noise", 1)),
    ],
)
def test_seeds_do_not_run_their_arguments_together(one, other):
    assert seed_for(*one) != seed_for(*other)


def test_seeds_are_the_same_on_every_machine():
    # Old runs must repeat: the first 8 bytes of the SHA-256 of
    # "0:noise:3" and "7:adapter", halved.
    assert seed_for(0, "noise", 3) == 5383373976498782674
    assert seed_for(7, "adapter") == 6994648537746536665


def test_a_draw_depends_on_nothing_but_its_place():
    expected = torch.randn(5, generator=generator_for(3, "noise", 8))
    torch.manual_seed(1)
    torch.randn(100, generator=generator_for(3, "noise", 7))
    assert torch.equal(torch.randn(5, generator=generator_for(3, "noise", 8)), expected)
    assert not torch.equal(torch.randn(5, generator=generator_for(3, "noise", 9)), expected)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta"])
def test_a_device_that_has_no_meaning_here_is_refused(device):
    with pytest.raises(ConfigError) as caught:
        pick_runtime(device)
    assert caught.value.problem == f"--device {device} is not a device's name."
    assert caught.value.hint == "Use auto, cpu, cuda, cuda:1 or mps."


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must be absent")
def test_an_absent_gpu_is_named_with_the_way_out(device):
    with pytest.raises(ConfigError, match=f"--device {device} was asked for, but no CUDA") as error:
        pick_runtime(device)
    assert "--device cpu" in error.value.hint


@pytest.mark.parametrize(("emulated", "dtype"), [(True, torch.float16), (False, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp16(monkeypatch, emulated, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or not emulated,
    )
    assert pick_runtime("cuda:0").dtype == dtype


def test_a_gpu_beyond_the_last_is_refused():
    with pytest.raises(ConfigError, match="--device cuda:99 was asked for"):
        pick_runtime("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="asks for a GPU that must be absent")
def test_an_absent_apple_gpu_is_refused():
    with pytest.raises(ConfigError, match="no Apple GPU here"):
        pick_runtime("mps")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float32),
    ],
)
def test_the_processor_computes_in_the_asked_precision_but_not_in_fp16(precision, dtype):
    runtime = pick_runtime("cpu", precision)
    assert runtime == Runtime(torch.device("cpu"), dtype)
    assert runtime.name == f"cpu {'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def test_auto_takes_the_best_device_there_is():
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_runtime().device.type == ("cuda" if torch.cuda.is_available() else best)


def test_effort_is_measured_even_when_the_work_fails():
    measured = []

    def fail():
        with measure_effort() as effort:
            measured.append(effort)
            time.sleep(0.02)
            assert effort.seconds == 0
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    (effort,) = measured
    assert 0.02 <= effort.seconds < 10
    # Python and torch alone hold more than 50 MiB, and no test machine holds a TiB.
    assert 50 < effort.peak_mib < 2**20


@pytest.mark.gpu
def test_effort_on_a_gpu_is_that_of_the_block_alone():
    runtime = pick_runtime("cuda")
    for mib in (64, 16):
        with measure_effort(runtime) as effort:
            torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda")
        assert mib <= effort.peak_mib < mib + 8


_LARGE_PAGES = """
import dreamloom
from dreamloom.core import device
import torch
whole = torch.ones(2**24)
pages = open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1].split()[0]
print(int(pages))
"""


def test_large_tensors_lie_in_large_pages_where_linux_has_them():
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("this system has no transparent huge pages")
    bare = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", _LARGE_PAGES], capture_output=True, text=True, check=True, env=bare
    )
    assert int(done.stdout) > 0
