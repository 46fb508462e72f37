"""The commands for adapter files: what a user reads after each."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.methods import METHODS
from dreamloom.models.weight_files import open_weights
from merges import random_adapter, random_layer

RANKS = ({"linear": 3, "conv": 4}, {"linear": 2, "conv": 3})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Two adapters in the folder where the commands run."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("me", "pixel")):
        adapter = random_adapter(seed, RANKS[seed], outputs=12, inputs=10)
        write_adapter(Path(f"{name}.safetensors"), adapter.with_metadata(**{"n": "x" * 300}))
    return tmp_path


def run(*words: object) -> str:
    """Run a command that must succeed; return what it says, in one line a sentence."""
    done = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def merge(*words: object) -> str:
    return run("merge", "me.safetensors:0.9", "pixel.safetensors", *words)


def test_a_merge_says_what_it_wrote_and_what_the_cut_cost():
    assert merge("-o", "sum.safetensors") == (
        "The merged adapter: sum.safetensors (2 layers, ranks 5 to 7)\n"
        "For diffusers, with the same base.\n"
    )
    cut = merge("--rank", 2, "-o", "cut.safetensors", "--verify")
    assert "cut.safetensors (2 layers, rank 2, " in cut
    assert "% off the uncut merge)" in cut
    assert "cut.safetensors holds: merged again from me and pixel by sum" in cut


def test_one_adapter_is_counted_as_one():
    told = CliRunner().invoke(main, ["merge", "me.safetensors", "-o", "one.safetensors"])
    assert "merge 1 adapter\n" in told.output


def test_the_methods_are_listed_each_in_a_line_and_one_in_full():
    listed = run("merge", "--methods")
    for name in METHODS:
        assert f"\n {name} " in listed
    assert "Σ" not in listed
    assert "--methods --method NAME" in listed
    whole = run("merge", "--methods", "--method", "np")
    assert "arXiv:2511.11051" in whole
    for option in METHODS["np"].options:
        assert f"\n {option.name} " in whole
    assert "tsv" not in whole


def test_the_methods_are_listed_as_json_with_their_settings():
    listed = json.loads(run("merge", "--methods", "--json"))
    assert [one["name"] for one in listed] == list(METHODS)
    (np,) = json.loads(run("merge", "--methods", "--method", "np", "--json"))
    assert [one["name"] for one in np["options"]] == [one.name for one in METHODS["np"].options]


def test_parts_are_listed_with_what_keeps_their_weights_as_they_are():
    merge("-o", "sum.safetensors")
    parts = "me=0.9  (me.safetensors)\npixel=1  (pixel.safetensors)\n"
    assert run("remix", "sum.safetensors") == parts
    merge("--method", "np", "-o", "np.safetensors")
    assert run("remix", "np.safetensors") == (
        f"{parts}Their weights cannot be changed. np.safetensors was merged by np, whose parts "
        "cannot be told apart.\n"
    )
    run("convert", "sum.safetensors", "--precision", "fp16", "-o", "half.safetensors")
    assert run("remix", "half.safetensors") == parts


def test_a_file_is_told_in_words_and_in_json():
    merge("--rank", "full", "-o", "sum.safetensors")
    words = run("inspect", "sum.safetensors")
    assert "sum.safetensors  LoRA in the format peft; 2 layers; ranks 5 to 7;" in words
    assert "merged by sum, rank full:\n    me=0.9  (me.safetensors)\n    pixel=1  (" in words
    assert "as it was written" in words
    assert "'dreamloom remix' gives its parts other weights" in words
    told = json.loads(run("inspect", "sum.safetensors", "--json"))
    assert (told["sealed"], told["can_be_remixed"]) == (True, True)
    single = run("inspect", "me.safetensors")
    assert "merged" not in single
    assert f"{'x' * 50}" in single
    assert max(map(len, single.splitlines())) <= 80


def test_a_merge_that_was_changed_is_told_as_such():
    merge("-o", "sum.safetensors")
    file = Path("sum.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = run("inspect", file)
    assert "changed since it was merged" in words
    assert "remix" not in words


def test_a_cut_says_off_what_it_is():
    cut = run("resize", "me.safetensors", "--rank", 1, "-o", "thin.safetensors")
    assert "thin.safetensors (2 layers, rank 1, " in cut
    assert "% off me.safetensors)" in cut
    whole = run("resize", "me.safetensors", "--rank", "full", "-o", "same.safetensors")
    assert "(2 layers, ranks 3 to 4, nothing lost)" in whole


def test_a_dora_is_refused_with_the_command_that_makes_a_lora_of_it(tiny_sdxl):
    name = "unet.down_blocks.1.attentions.0.proj_in"
    weight = open_weights(str(tiny_sdxl)).read(name).float()
    layer = random_layer(2, torch.Generator().manual_seed(1), *weight.shape)
    dora = make_dora({name: layer}, {name: weight.flatten(1).norm(dim=1)})
    write_adapter(Path("dora.safetensors"), Adapter({}, peft=dora))
    done = CliRunner().invoke(main, ["merge", "dora.safetensors", "-o", "out.safetensors"])
    assert done.exit_code == 1
    assert "dora.safetensors is a DoRA; only a LoRA can be merged." in done.output
    assert "dreamloom convert FILE --rank 32 --base BASE" in done.output
    told = run(
        *("convert", "dora.safetensors", "--rank", 2, "--base", tiny_sdxl),
        *("-o", "lora.safetensors"),
    )
    assert "lora.safetensors (1 layers, " in told
    assert read_adapter(Path("lora.safetensors")).ranks == {name: 2}
    run("merge", "lora.safetensors", "-o", "out.safetensors")


@pytest.mark.parametrize("words", [("--prompt", "me: a photo"), ("--joint-prompt", "pixel, me")])
def test_prompts_that_nobody_is_asked_are_refused(words):
    both = ["merge", "me.safetensors", "pixel.safetensors", "-o", "out.safetensors", *words]
    done = CliRunner().invoke(main, both)
    assert done.exit_code == 2
    assert "The method sum asks no base model, so prompts change nothing." in done.output
    assert not Path("out.safetensors").exists()
