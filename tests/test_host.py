"""The computer's memory, beside the limits of control groups of both versions."""

import sys
from pathlib import Path

import psutil
import pytest

from dreamloom.memory.host import has_bf16_units, may_have_gpu, read_host_memory

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
MIB = 2**20


def make_group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_without_a_limit_it_is_the_machine_s(tmp_path):
    found = read_host_memory(tmp_path, "0::/")
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= found.total
    assert not found.is_limited
    make_group(tmp_path / "job", V2, "max", 1, 0)
    assert not read_host_memory(tmp_path, "0::/job").is_limited
    assert not read_host_memory(tmp_path, "").is_limited


@pytest.mark.parametrize(
    ("names", "folder", "own"),
    [(V2, "job", "0::/job/step\n"), (V1, "memory/job", "5:cpu:/x\n4:memory:/job/step\n0::/\n")],
)
def test_a_container_s_limit_counts_and_its_cache_of_files_is_free(tmp_path, names, folder, own):
    make_group(tmp_path / folder, names, 64 * MIB, 48 * MIB, 16 * MIB)
    make_group(tmp_path / folder / "step", names, 128 * MIB, 8 * MIB, 0)
    found = read_host_memory(tmp_path, own)
    assert found == type(found)(free=32 * MIB, total=64 * MIB, is_limited=True)


def test_a_group_that_is_not_shown_here_is_limited_by_those_above(tmp_path):
    make_group(tmp_path, V2, 64 * MIB, 60 * MIB, 0)
    assert read_host_memory(tmp_path, "0::/docker/0123\n").free == 4 * MIB
    make_group(tmp_path, V2, 64 * MIB, 70 * MIB, 0)
    assert read_host_memory(tmp_path, "0::/docker/0123\n").free == 0


@pytest.mark.parametrize(
    ("row", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("", False),
    ],
)
def test_units_for_bf16_are_read_from_the_processors_features(tmp_path, row, has):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: bf16 in a name\n{row}\n")
    assert has_bf16_units(tmp_path / "cpuinfo") is has
    assert not has_bf16_units(tmp_path / "no such file")


def test_a_gpu_is_looked_for_where_a_driver_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert not may_have_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert may_have_gpu(tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert may_have_gpu(tmp_path / "nothing")
