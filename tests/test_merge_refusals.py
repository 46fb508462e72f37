"""Bad input to a merge: one sentence and a hint, no file, and nothing left of a file begun.

Every case is typed as a user types it, and the folder is compared before and after.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from dreamloom.cli.main import main
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.peftconfig import CONFIG_KEY
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.methods import METHODS

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.down_blocks.1.resnets.0.conv1"
KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
BAD = "bad.safetensors"

Damage = Callable[[Path], object]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_one(seed: int, rank: int, **metadata: str) -> Adapter:
    return Adapter(
        {
            TO_Q: Layer(draw(rank, 6, seed=seed), draw(8, rank, seed=seed + 1)),
            CONV: Layer(draw(2, 4, 3, 3, seed=seed + 2), draw(5, 2, 1, 1, seed=seed + 3)),
        },
        metadata,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two adapters that can be merged, of ranks 2 and 3."""
    write_adapter(tmp_path / "a.safetensors", make_one(1, 2))
    write_adapter(tmp_path / "b.safetensors", make_one(5, 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def list_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def merge(*typed: str) -> Result:
    return CliRunner().invoke(main, ["--quiet", "merge", *typed])


def refused(folder: Path, *typed: str, out: str = "out.safetensors", code: int = 1) -> str:
    """Merge what cannot be, see that nothing was written, and return the sentence."""
    before, listed = list_bytes(folder), sorted(folder.rglob("*"))
    done = merge(*typed, "-o", out)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code
    assert list_bytes(folder) == before
    assert sorted(folder.rglob("*")) == listed
    told = " ".join(done.output.split())
    assert "Traceback" not in told
    assert told.startswith("Error: ")
    return told


def test_what_is_not_bad_is_merged(folder: Path) -> None:
    """The control: the same adapters without a fault, and what is written is one file."""
    listed = set(folder.rglob("*"))
    done = merge("a.safetensors:0.9", "b.safetensors:-1.1", "-o", "out.safetensors")
    assert done.exit_code == 0, done.output
    assert set(folder.rglob("*")) - listed == {folder / "out.safetensors"}


# Files.


def pair_of(layer: str, outputs: int = 8, inputs: int = 6) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_A.weight": draw(2, inputs),
        f"{layer}.lora_B.weight": draw(outputs, 2),
    }


def kohya_of(alpha: float) -> dict[str, torch.Tensor]:
    return {
        f"{KOHYA}.lora_down.weight": draw(2, 6),
        f"{KOHYA}.lora_up.weight": draw(8, 2),
        f"{KOHYA}.alpha": torch.tensor(alpha),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [1, -1])
def test_a_number_that_is_none_is_told_with_its_file_and_layer(
    folder: Path, value: float, dtype: torch.dtype, order: int
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in pair_of(TO_Q).items()}
    tensors[f"{TO_Q}.lora_B.weight"][3, 1] = value
    save_file(tensors, folder / BAD)
    told = refused(folder, *["a.safetensors", BAD][::order])
    assert f"{TO_Q} in {BAD} holds NaN or infinity" in told


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_told_with_its_file(folder: Path, value: float) -> None:
    save_file(kohya_of(value), folder / BAD)
    assert f"{KOHYA} in {BAD} holds NaN or infinity" in refused(folder, "a.safetensors", BAD)
    for config in ({"unet.lora_alpha": value}, {"unet.lora_alpha": 1, "unet.alpha_pattern": {}}):
        if "unet.alpha_pattern" in config:
            config["unet.alpha_pattern"] = {"to_q": value}
        save_file(pair_of(TO_Q), folder / BAD, {CONFIG_KEY: json.dumps(config)})
        told = refused(folder, "a.safetensors", BAD)
        assert f"in the header of {BAD} cannot be read: an alpha is {value}" in told


def test_a_strength_that_overflows_is_told_with_its_file(folder: Path) -> None:
    tensors = kohya_of(1e38)
    tensors[f"{KOHYA}.lora_up.weight"] *= 100
    save_file(tensors, folder / BAD)
    assert f"change of {TO_Q} in {BAD} is infinite" in refused(folder, "a.safetensors", BAD)


def test_whole_numbers_are_no_factors(folder: Path) -> None:
    tensors = {key: (10 * tensor).int() for key, tensor in pair_of(TO_Q).items()}
    save_file(tensors, folder / BAD)
    assert f"{TO_Q} in {BAD} holds int32" in refused(folder, "a.safetensors", BAD)


def split(path: Path) -> tuple[int, bytes]:
    whole = path.read_bytes()
    return int(struct.unpack("<Q", whole[:8])[0]), whole


def cut_to(length: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def cut_in_half(path: Path) -> None:
    length, whole = split(path)
    path.write_bytes(whole[: (8 + length + len(whole)) // 2])


def claim(length: Callable[[int], int]) -> Damage:
    """Let the header lie about its own length."""

    def damage(path: Path) -> None:
        honest, whole = split(path)
        path.write_bytes(struct.pack("<Q", length(honest)) + whole[8:])

    return damage


def lie(**entry: object) -> Damage:
    """Let the header lie about the tensor that lies last."""

    def damage(path: Path) -> None:
        length, whole = split(path)
        header = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__", None)
        max(header.values(), key=lambda told: told["data_offsets"][1]).update(entry)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    return damage


BROKEN: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the length": cut_to(4),
    "length alone": cut_to(8),
    "cut in the header": cut_to(60),
    "cut in the tensors": cut_in_half,
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "with more at the end": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "claims nothing": claim(lambda honest: 0),
    "claims a byte less": claim(lambda honest: honest - 1),
    "claims a byte more": claim(lambda honest: honest + 1),
    "claims a terabyte": claim(lambda honest: 2**40),
    "claims all there can be": claim(lambda honest: 2**64 - 1),
    "another shape": lie(shape=[99, 99]),
    "a place far behind": lie(data_offsets=[2**50, 2**51]),
    "a place before": lie(data_offsets=[-4, 4]),
    "an unknown precision": lie(dtype="F99"),
    "no dictionary": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "no text": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"\xff\xfe"),
    "brackets without end": lambda path: path.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
    "a page of the web": lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    "a pointer of Git LFS": lambda path: path.write_bytes(b"version https://git-lfs.github.com"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_told_as_such(folder: Path, damage: str) -> None:
    save_file(pair_of(TO_Q), folder / BAD)
    BROKEN[damage](folder / BAD)
    told = refused(folder, "a.safetensors", BAD)
    assert f"{BAD} cannot be read as safetensors: " in told
    assert "again" in told


def test_a_file_without_tensors_holds_no_layer(folder: Path) -> None:
    save_file({}, folder / BAD)
    assert "it holds no layer" in refused(folder, "a.safetensors", BAD)


def test_a_missing_file_and_a_folder_are_named(folder: Path) -> None:
    assert f"There is no adapter at {BAD}" in refused(folder, "a.safetensors", BAD)
    (folder / BAD).mkdir()
    assert f"{BAD} is a folder without adapter_config.json" in refused(folder, "a.safetensors", BAD)


# Bases.


def test_adapters_of_different_bases_are_named_with_them(folder: Path) -> None:
    for name in "ab":
        told = {"dreamloom.base_fingerprint": f"of {name}", "dreamloom.base": f"base-{name}"}
        write_adapter(folder / f"{name}.safetensors", make_one(1, 2, **told))
    told = refused(folder, "a.safetensors", "b.safetensors")
    assert "different base models: a.safetensors (base-a), b.safetensors (base-b)" in told


OTHERS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
    "width": (pair_of(TO_K, inputs=768), {}, "for Stable Diffusion 1.x"),
    "second version": (pair_of(TO_K, inputs=1024), {}, "for Stable Diffusion 2.x"),
    "text encoder": (
        {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": draw(2, 6),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": draw(8, 2),
        },
        {},
        "for Stable Diffusion 1.x or 2.x (it has one text encoder",
    ),
    # Nothing but layers that both bases have, of equal widths: only the header tells.
    "kohya's header": (
        pair_of(TO_Q),
        {"ss_base_model_version": "sd_v1"},
        "for sd_v1 (its header says so in ss_base_model_version)",
    ),
    "ModelSpec": (
        pair_of(TO_Q),
        {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
        "for stable-diffusion-v2-768-v (its header says so in modelspec.architecture)",
    ),
}


@pytest.mark.parametrize("sign", OTHERS)
@pytest.mark.parametrize("order", [1, -1])
def test_an_adapter_of_stable_diffusion_1_is_not_merged_with_one_of_sdxl(
    folder: Path, sign: str, order: int
) -> None:
    tensors, header, says = OTHERS[sign]
    save_file(tensors, folder / BAD, header or None)
    told = refused(folder, *["a.safetensors", BAD][::order])
    assert f"{BAD} is {says}" in told
    assert "SDXL" in told


@pytest.mark.parametrize(
    "header",
    [
        {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        {"ss_base_model_version": "sdxl_pony"},
    ],
)
def test_what_says_that_it_is_of_sdxl_is_merged(folder: Path, header: dict[str, str]) -> None:
    save_file(pair_of(TO_Q), folder / "ours.safetensors", header)
    assert merge("a.safetensors", "ours.safetensors", "-o", "out.safetensors").exit_code == 0


def test_layers_of_another_width_are_named(folder: Path) -> None:
    save_file(pair_of(TO_Q, inputs=7), folder / BAD)
    told = refused(folder, "a.safetensors", BAD)
    assert f"The updates of {TO_Q} differ in shape" in told


# Weights.


@pytest.mark.parametrize("method", ["sum", "matched", "ties", "knots", "np"])
def test_weights_that_sum_to_nothing_are_told(folder: Path, method: str) -> None:
    how = ("--method", method)
    told = refused(folder, "a.safetensors:0", "b.safetensors:0", *how, code=2)
    assert "Every weight is 0" in told
    told = refused(folder, "a.safetensors", "b.safetensors", "--blocks", "all=0", *how, code=2)
    assert "Every weight is 0" in told
    if method != "np":
        # The protected adapter stays, whatever is taken from its copy.
        (folder / "same.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
        told = refused(folder, "a.safetensors:0.5", "same.safetensors:-0.5", *how, code=2)
        assert "nothing is left" in told


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e400", "1e300"])
def test_a_weight_that_is_no_number_is_told(folder: Path, weight: str) -> None:
    told = refused(folder, f"a.safetensors:{weight}", "b.safetensors", code=2)
    assert "Weights must be finite numbers" in told


def test_a_weight_that_cannot_be_read_is_told(folder: Path) -> None:
    assert "not a weight" in refused(folder, "a.safetensors:much", "b.safetensors", code=2)


EXACT = [name for name, method in METHODS.items() if method.needs in {"factors", "entries"}]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("rank", ["full", "1", "energy:0.9", "budget:1MB"])
def test_a_weight_that_makes_the_change_infinite_is_told(
    folder: Path, method: str, rank: str
) -> None:
    """Whatever is done with the updates: a matrix that is not finite has no singular values."""
    third = ("b.safetensors",) if METHODS[method].least > 2 else ()
    parts = ("a.safetensors", "b.safetensors:3e38", *third)
    told = refused(folder, *parts, "--method", method, "--rank", rank)
    assert f"The update of {TO_Q} is not finite: in adapter 2" in told
    assert "Lower the weight" in told


# Ranks.


@pytest.mark.parametrize(("method", "most"), [("sum", 5), ("np", 5), ("knots", 5), ("ties", 6)])
def test_a_rank_above_what_exists_is_told_with_what_does(
    folder: Path, method: str, most: int
) -> None:
    parts = ("a.safetensors", "b.safetensors", "--method", method)
    told = refused(folder, *parts, "--rank", str(most + 1), code=2)
    assert f"Rank {most + 1} is above what exists: no layer has more than rank {most}." in told
    assert f"Ask for {most} or less" in told
    done = merge(*parts, "--rank", str(most), "-o", "out.safetensors")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("rank", ["0", "-1", "1.5", "much", "energy:0", "energy:1.5", "budget:0"])
def test_a_rank_that_is_none_is_told(folder: Path, rank: str) -> None:
    told = refused(folder, "a.safetensors", "b.safetensors", "--rank", rank, code=2)
    assert f"'{rank}' is no rank" in told


def test_a_budget_below_rank_1_is_told(folder: Path) -> None:
    told = refused(folder, "a.safetensors", "b.safetensors", "--rank", "budget:20", code=2)
    assert "The budget has room for 5 numbers, and rank 1 in every layer needs" in told


# Places.


def test_a_bad_merge_leaves_the_file_that_it_should_have_replaced(folder: Path) -> None:
    write_adapter(folder / "out.safetensors", make_one(9, 1))
    told = refused(folder, "a.safetensors", "b.safetensors")
    assert "out.safetensors exists already" in told
    cut_in_half(folder / "b.safetensors")
    told = refused(folder, "a.safetensors", "b.safetensors", "--overwrite")
    assert "b.safetensors cannot be read" in told
    told = refused(folder, "a.safetensors", "--overwrite", out="a.safetensors")
    assert "is one of the inputs" in told


@pytest.mark.parametrize("place", ["nowhere/out.safetensors", "out.bin", "."])
def test_a_place_where_nothing_can_be_written_is_told(folder: Path, place: str) -> None:
    refused(folder, "a.safetensors", "b.safetensors", out=place)


def test_a_change_too_large_for_half_precision_is_not_written(folder: Path) -> None:
    parts = ("a.safetensors:1e6", "b.safetensors", "--precision", "fp16")
    told = refused(folder, *parts)
    assert "is not finite" in told
    done = merge(*parts[:2], "-o", "out.safetensors")
    assert done.exit_code == 0, done.output
