"""Certificates of merges: what holds is told, what was changed is found, parts change weight."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dreamloom.core.errors import AdapterError, ConfigError, RunFolderError
from dreamloom.core.events import Note
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.token_embeddings import list_token_files
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.certificate import (
    LAYERS_KEY,
    RECIPE_KEY,
    SEAL_KEY,
    forget_certificate,
    read_certificate,
    seal_holds,
    write_sealed,
)
from dreamloom.merging.files.convert import FileForm, convert_file, resize_adapter
from dreamloom.merging.files.inspect import inspect_file
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import AdapterPart, Recipe, name_parts
from dreamloom.merging.files.reweight import parse_changes, remix_merge
from dreamloom.merging.files.verify import verify_merge
from dreamloom.merging.merging import LayerReport
from dreamloom.merging.methods import METHODS
from dreamloom.merging.ranks import FULL, parse_rank
from merges import assert_same, full_disk, random_adapter, random_layer

RANKS = ({"linear": 3, "pointwise": 2, "conv": 4}, {"linear": 2, "conv": 3}, {"linear": 4})
NAMES = ("person", "pixel", "pose")
WEIGHTS = (0.8, -0.5, 1.5)
PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture
def parts(tmp_path):
    """Three adapters in a folder; the first teaches a word."""
    made = []
    for seed, (name, ranks) in enumerate(zip(NAMES, RANKS, strict=True)):
        adapter = random_adapter(seed, ranks, outputs=12, inputs=10)
        if name == "person":
            adapter = replace(adapter, tokens={"rraj": {"text_encoder": torch.ones(1, 4)}})
        write_adapter(tmp_path / f"{name}.safetensors", adapter.with_metadata(n=str(seed)))
        made.append(AdapterPart(tmp_path / f"{name}.safetensors", WEIGHTS[seed]))
    return tuple(made)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def changed(path, **entries):
    """Rewrite a file's header with other entries, and a new seal, as a forger would."""
    adapter = read_adapter(path)
    forged = adapter.with_metadata(**{SEAL_KEY: "0" * 64, **entries})
    write_sealed(path, forged, "fp32", "peft")


# ------------------------------------------------------------------ what holds


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", ["full", "2", "energy:0.9", "budget:600B"])
def test_a_merge_holds_in_every_precision_and_rank(parts, out, rank, precision):
    recipe = Recipe(parts, rank=parse_rank(rank), precision=precision)
    combined = carry_out(recipe, out)
    verified = verify_merge(out)
    assert verified.layers == 3
    assert verified.rank_error == pytest.approx(combined.error, rel=1e-4, abs=1e-9)
    # What is measured is what the rank cut off, and rounding: no less and hardly more.
    rounding = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[precision]
    assert verified.error <= verified.rank_error + rounding
    assert verified.error >= verified.rank_error - rounding
    assert (verified.rank_error > 0.01) == (rank != "full")
    begins = f"{out} holds: merged again from person and pixel and pose by sum, its 3 layers "
    assert str(verified).startswith(begins)
    assert ("as near to what the method says as --rank" in str(verified)) == (rank != "full")


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if m.needs in {"factors", "entries"}]
)
@pytest.mark.parametrize("rank", ["full", "3"])
def test_every_method_can_be_verified(parts, out, method, rank):
    count = max(METHODS[method].least, 2)
    carry_out(Recipe(parts[:count], method, rank=parse_rank(rank), seed=7), out)
    verified = verify_merge(out)
    assert verified.error <= verified.rank_error + 1e-4


@pytest.mark.parametrize("method", ["ties", "knots", "core", "magnitude"])
@pytest.mark.parametrize("rank", ["full", "3", "energy:0.9", "budget:1kB"])
def test_a_threshold_for_the_whole_model_can_be_verified(parts, out, method, rank):
    """One layer is so weak that nothing of it is above the threshold."""
    for part in parts[:2]:
        adapter = read_adapter(part.path)
        faint = adapter.layers["unet.linear"]
        layers = {**adapter.layers, "unet.linear": Layer(faint.down, 1e-4 * faint.up)}
        write_adapter(part.path, replace(adapter, layers=layers))
    options = {"threshold": "model", "density": 0.2}
    carry_out(Recipe(parts[:2], method, options, parse_rank(rank)), out)
    told = read_certificate(out, read_adapter(out))
    assert told.recipe.options["threshold"] == "model"
    assert told.reports["unet.linear"].rank == 0
    assert "unet.linear" not in read_adapter(out).layers
    verified = verify_merge(out)
    assert verified.error <= verified.rank_error + 1e-4
    # The certificate's word counts: with a threshold for each layer it is another merge.
    recipe = json.loads(read_adapter(out).metadata[RECIPE_KEY])
    recipe["options"]["threshold"] = "layer"
    changed(out, **{RECIPE_KEY: json.dumps(recipe)})
    with pytest.raises(AdapterError, match="is not what its recipe says"):
        verify_merge(out)


def test_a_file_that_was_made_before_there_were_thresholds_to_choose_holds(parts, out):
    carry_out(Recipe(parts, "ties", {"density": 0.3}), out)
    recipe = json.loads(read_adapter(out).metadata[RECIPE_KEY])
    assert recipe["options"].pop("threshold") == "layer"
    changed(out, **{RECIPE_KEY: json.dumps(recipe)})
    assert "threshold" not in verify_merge(out).recipe.options


def test_the_certificate_tells_what_became_of_each_layer(parts, out):
    combined = carry_out(Recipe(parts, rank=parse_rank("2")), out)
    merged = read_adapter(out)
    told = read_certificate(out, merged)
    assert told.reports.keys() == combined.reports.keys()
    for name, report in combined.reports.items():
        assert told.reports[name].rank == report.rank == merged.layers[name].rank
        assert told.reports[name].norm == pytest.approx(report.norm, rel=1e-6)
        assert told.reports[name].error == pytest.approx(report.error, rel=1e-6)
    assert told.slices == []


def test_a_layer_of_which_nothing_is_left_is_told(parts, tmp_path, out):
    layers = {
        "unet.nothing": Layer(torch.ones(2, 5), torch.zeros(6, 2)),
        "unet.other": random_layer(2, torch.Generator().manual_seed(2)),
    }
    write_adapter(tmp_path / "half.safetensors", Adapter(layers))
    both = (AdapterPart(tmp_path / "half.safetensors"),)
    carry_out(Recipe(both, rank=parse_rank("energy:1")), out)
    certificate = read_certificate(out, read_adapter(out))
    assert certificate.reports["unet.nothing"] == LayerReport(0, 0.0, 0.0)
    assert sorted(read_adapter(out).layers) == ["unet.other"]
    assert verify_merge(out).layers == 2


def test_inputs_are_known_by_hash_under_any_name_and_at_any_depth(parts, out, tmp_path):
    carry_out(Recipe(parts), out)
    store = tmp_path / "store" / "deep"
    store.mkdir(parents=True)
    for number, part in enumerate(parts):
        shutil.move(part.path, store / f"{number}.safetensors")
    shutil.move(tmp_path / "person-tokens", store / "words-tokens")
    (store / "person.safetensors").write_text("another's, of the same name")
    with pytest.raises(AdapterError):
        verify_merge(out)
    assert verify_merge(out, tmp_path / "store").error < 1e-6


# ------------------------------------------------------------------ what does not


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_changed_byte_of_the_output_is_found(parts, tmp_path, place, bit):
    out = tmp_path / "out.safetensors"
    if not out.exists():
        carry_out(Recipe(parts), out)
    content = bytearray(out.read_bytes())
    # Damage to the length or the grammar of the header is refused by the reader of files.
    content[int(place * len(content))] ^= 1 << bit
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(AdapterError):
        verify_merge(damaged)


def test_a_changed_number_of_the_output_is_told_in_a_sentence(parts, out):
    carry_out(Recipe(parts), out)
    content = bytearray(out.read_bytes())
    content[-3] ^= 1
    out.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        verify_merge(out)
    assert caught.value.problem == (
        f"{out} is not as it was written: its bytes do not fit its seal."
    )
    assert caught.value.exit_code == 1


def test_the_seal_is_of_the_whole_file(parts, out):
    carry_out(Recipe(parts), out)
    with safe_open(out, "pt") as file:
        seal = file.metadata()[SEAL_KEY]
    assert seal_holds(out, seal)
    assert not seal_holds(out, "0" * 64)
    assert not seal_holds(out, "")
    # A space of the header's padding is as much a byte as any other.
    content = out.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = content[8 : 8 + length] + b" " * 8
    out.write_bytes((length + 8).to_bytes(8, "little") + longer + content[8 + length :])
    assert not seal_holds(out, seal)


def test_a_changed_input_is_told(parts, out):
    carry_out(Recipe(parts), out)
    adapter = read_adapter(parts[1].path)
    write_adapter(parts[1].path, adapter.with_metadata(n="other"))
    with pytest.raises(AdapterError) as caught:
        verify_merge(out)
    assert caught.value.problem.startswith(
        f"{parts[1].path} is not the file that was merged: its SHA-256 begins with "
    )


def test_another_input_of_the_same_name_has_not_changed(parts, tmp_path):
    """Every training's adapter is called adapter.safetensors."""
    named = []
    for part in parts:
        place = tmp_path / part.path.stem / "adapter.safetensors"
        place.parent.mkdir()
        write_adapter(place, read_adapter(part.path))
        named.append(replace(part, path=place))
    out = tmp_path / "merged.safetensors"
    carry_out(Recipe(tuple(named)), out)
    assert verify_merge(out, tmp_path).layers
    with pytest.raises(AdapterError) as caught:
        verify_merge(out, named[0].path.parent)
    assert caught.value.problem.startswith("The input adapter.safetensors (SHA-256 ")
    assert "changed" not in f"{caught.value}"


def test_a_full_disk_ends_every_writer_in_a_sentence_and_leaves_nothing(parts, tmp_path):
    source, out = parts[0].path, tmp_path / "new" / "out.safetensors"
    out.parent.mkdir()
    merged = tmp_path / "merged.safetensors"
    carry_out(Recipe(parts), merged)
    kept = merged.read_bytes()
    beside = sum(file.stat().st_size for file in list_token_files(source))
    writers = {
        "merge": lambda: carry_out(Recipe(parts), out),
        "convert": lambda: convert_file(source, out),
        "resize": lambda: resize_adapter(source, out, parse_rank("1")),
        "remix": lambda: remix_merge(merged, {"person": 0.5}, out),
        "remix in place": lambda: remix_merge(merged, {"person": 0.5}),
        "write": lambda: write_adapter(out, read_adapter(source)),
    }
    # At first no byte fits, then the new words do and the adapter does not.
    for (name, write), room in itertools.product(writers.items(), (0, beside)):
        with full_disk(room), pytest.raises(RunFolderError) as caught:
            write()
        named = merged if name == "remix in place" else out
        assert caught.value.problem.startswith(f"{named} cannot be written: "), name
        assert "File too large" in caught.value.problem
        assert caught.value.exit_code == 1
        assert list(out.parent.iterdir()) == []
    assert merged.read_bytes() == kept
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_missing_input_is_told(parts, out):
    carry_out(Recipe(parts), out)
    parts[1].path.unlink()
    with pytest.raises(AdapterError) as caught:
        verify_merge(out)
    assert caught.value.problem.startswith("The input pixel.safetensors (SHA-256 ")
    assert "--inputs" in caught.value.hint


def test_a_folder_that_does_not_exist_is_told(parts, out, tmp_path):
    carry_out(Recipe(parts), out)
    with pytest.raises(AdapterError, match="There is no folder"):
        verify_merge(out, tmp_path / "nowhere")


def test_a_file_without_a_recipe_is_told(parts):
    with pytest.raises(AdapterError) as caught:
        verify_merge(parts[0].path)
    assert caught.value.problem == f"{parts[0].path} does not say how it was merged."


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", ["full", "2"])
def test_forged_numbers_are_found_although_the_seal_is_new(parts, out, rank, precision):
    carry_out(Recipe(parts, rank=parse_rank(rank), precision=precision), out)
    merged = read_adapter(out)
    layer = merged.layers["unet.linear"]
    layers = {**merged.layers, "unet.linear": Layer(layer.down, layer.up * 1.05)}
    forged = replace(merged, layers=layers).with_metadata(**{SEAL_KEY: "0" * 64})
    write_sealed(out, forged, precision, "peft")
    assert seal_holds(out, read_adapter(out).metadata[SEAL_KEY])
    with pytest.raises(AdapterError) as caught:
        verify_merge(out)
    assert f"{out} is not what its recipe says: unet.linear " in caught.value.problem


def test_a_forged_certificate_is_found(parts, out):
    carry_out(Recipe(parts, rank=parse_rank("2")), out)
    rows = json.loads(read_adapter(out).metadata[LAYERS_KEY])
    rows["errors"] = [error * 0.5 for error in rows["errors"]]
    changed(out, **{LAYERS_KEY: json.dumps(rows)})
    with pytest.raises(AdapterError, match="from its rank, and the certificate says"):
        verify_merge(out)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        (RECIPE_KEY, '"weight":0.8', '"weight":0.7'),
        (RECIPE_KEY, '"weight":0.8', '"weight":0.0'),
        (RECIPE_KEY, '"rank":"full"', '"rank":"1"'),
        (RECIPE_KEY, '"rank":"full"', '"rank":"thin"'),
        (RECIPE_KEY, '"method":"sum"', '"method":"guess"'),
        (RECIPE_KEY, '"weight":0.8', '"weight":0.8,"blocks":[["conv",0.5]]'),
        (RECIPE_KEY, '{"parts"', '{"prats"'),
        (LAYERS_KEY, '"ranks":[', '"ranks":[1,'),
        (LAYERS_KEY, '"empty":{}', '"empty":{"unet.x":0.0}'),
        (LAYERS_KEY, "{", "["),
    ],
)
def test_a_forged_recipe_is_found(parts, out, key, old, new):
    carry_out(Recipe(parts), out)
    text = read_adapter(out).metadata[key]
    assert old in text
    changed(out, **{key: text.replace(old, new)})
    with pytest.raises((AdapterError, ConfigError)):
        verify_merge(out)


def test_who_merged_with_another_version_is_told_so(parts, out):
    carry_out(Recipe(parts), out)
    recipe = json.loads(read_adapter(out).metadata[RECIPE_KEY])
    recipe["versions"]["torch"] = "1.0"
    recipe["parts"][0]["weight"] = 0.9
    changed(out, **{RECIPE_KEY: json.dumps(recipe)})
    with pytest.raises(AdapterError) as caught:
        verify_merge(out)
    assert "It was merged with torch 1.0 (here " in caught.value.hint


def test_a_certificate_is_forgotten_with_all_its_entries(parts, out):
    carry_out(Recipe(parts), out)
    story = read_adapter(out).metadata
    left = forget_certificate(story)
    assert set(story) - set(left) == {
        RECIPE_KEY,
        LAYERS_KEY,
        SEAL_KEY,
        "dreamloom.slices",
    }


# ------------------------------------------------------------------ other weights


@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    weights=st.lists(st.sampled_from([-1.5, 0.0, 0.3, 1.0, 2.0]), min_size=3, max_size=3).filter(
        any
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_a_remix_equals_a_new_merge_of_the_inputs(parts, tmp_path, precision, weights):
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    fresh = tmp_path / "fresh.safetensors"
    carry_out(Recipe(parts, precision=precision), out, overwrite=True)
    remix_merge(out, dict(zip(NAMES, weights, strict=True)), again, overwrite=True)
    wanted = tuple(replace(part, weight=w) for part, w in zip(parts, weights, strict=True) if w)
    carry_out(Recipe(wanted, precision=precision), fresh, overwrite=True)
    one, other = read_adapter(again), read_adapter(fresh)
    assert one.ranks == other.ranks
    assert one.tokens.keys() == other.tokens.keys()
    rounding = {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.2}[precision]
    assert_same(one, other, rounding)
    assert verify_merge(again).recipe.remixed == 1


def test_a_remix_can_be_remixed(parts, out):
    carry_out(Recipe(parts), out)
    before = read_adapter(out)
    for weight in (0.1, 3.0, 0.8):
        remix_merge(out, {"person": weight})
    assert_same(read_adapter(out), before, 1e-5)
    assert verify_merge(out).recipe.remixed == 3


def test_block_weights_stay_in_a_remix(parts, out, tmp_path):
    blocked = (replace(parts[0], blocks="conv=0"), parts[1])
    carry_out(Recipe(blocked), out)
    assert read_adapter(out).ranks["unet.conv"] == 3
    remix_merge(out, {"person": 2.0})
    carry_out(Recipe((replace(blocked[0], weight=2.0), parts[1])), tmp_path / "fresh.safetensors")
    assert_same(read_adapter(out), read_adapter(tmp_path / "fresh.safetensors"), 1e-5)
    assert verify_merge(out)


def test_a_part_at_0_is_gone_with_its_words_and_its_name(parts, out):
    carry_out(Recipe(parts[:2]), out)
    remix_merge(out, {"person": 0.0})
    left = read_adapter(out)
    assert left.tokens == {}
    assert "person" not in left.metadata[RECIPE_KEY]
    assert "unet.pointwise" not in left.layers
    # Its file is not needed to verify what is left.
    parts[0].path.unlink()
    assert verify_merge(out).layers == 2
    with pytest.raises(ConfigError) as caught:
        remix_merge(out, {"person": 1.0})
    assert caught.value.problem == "There is no part 'person' in the file."
    assert caught.value.hint == "It has pixel (-0.5)."


def test_a_part_that_never_went_in_cannot_be_brought_back(parts, out):
    carry_out(Recipe((parts[0], replace(parts[1], weight=0.0))), out)
    with pytest.raises(ConfigError, match="The part pixel is not in the file: its weight was 0"):
        remix_merge(out, {"pixel": 1.0})


def test_a_remix_of_nothing_is_refused(parts, out):
    carry_out(Recipe(parts[:2]), out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="Every weight is 0"):
        remix_merge(out, {"person": 0.0, "pixel": 0.0})
    assert out.read_bytes() == before


def test_a_cut_merge_cannot_be_remixed(parts, out):
    carry_out(Recipe(parts, rank=parse_rank("2")), out)
    with pytest.raises(AdapterError) as caught:
        remix_merge(out, {"person": 1.0})
    assert caught.value.problem == f"{out} was cut to rank 2, which mixes its parts."


@pytest.mark.parametrize("format", ["peft", "kohya-diffusers"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_converted_merge_keeps_its_seal_and_recipe(parts, out, tmp_path, format, precision):
    carry_out(Recipe(parts), out)
    converted = tmp_path / "converted.safetensors"
    convert_file(out, converted, FileForm(format, precision))
    assert inspect_file(converted)["sealed"]
    assert verify_merge(converted, tmp_path).recipe.parts == verify_merge(out).recipe.parts
    remix_merge(converted, {"pixel": 0.25})
    assert verify_merge(converted, tmp_path).layers == verify_merge(out).layers
    # Written wider again, the numbers are those of the narrower file.
    wide = tmp_path / "wide.safetensors"
    convert_file(converted, wide, FileForm("peft", "fp32"))
    assert verify_merge(wide, tmp_path).recipe.precision == precision


def test_a_merge_with_equal_ranks_holds_and_is_no_longer_remixed(parts, out, tmp_path):
    carry_out(Recipe(parts), out)
    equal = tmp_path / "equal.safetensors"
    convert_file(out, equal, FileForm(has_equal_ranks=True))
    ranks = read_adapter(out).ranks
    assert len(set(ranks.values())) > 1
    assert set(read_adapter(equal).ranks.values()) == {max(ranks.values())}
    assert verify_merge(equal, tmp_path).layers == verify_merge(out).layers
    with pytest.raises(AdapterError):
        remix_merge(equal, {"pixel": 0.5})


def test_what_was_changed_is_not_sealed_by_converting_it(parts, out, tmp_path):
    carry_out(Recipe(parts), out)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    told = []
    convert_file(out, tmp_path / "converted.safetensors", observe=told.append)
    assert "recipe" not in inspect_file(tmp_path / "converted.safetensors")
    (note,) = (event.text for event in told if isinstance(event, Note))
    assert "is not as it was merged" in note


def test_a_merge_written_anew_cannot_be_remixed(parts, out):
    carry_out(Recipe(parts), out)
    write_adapter(out, read_adapter(out), torch.float16)
    with pytest.raises(AdapterError, match="bytes do not fit its seal"):
        remix_merge(out, {"person": 1.0})


def test_a_remix_into_another_file_leaves_the_first(parts, out, tmp_path):
    carry_out(Recipe(parts), out)
    before = out.read_bytes()
    remix_merge(out, {"pixel": 0.1}, tmp_path / "new.safetensors")
    assert out.read_bytes() == before
    with pytest.raises(RunFolderError, match="exists already"):
        remix_merge(out, {"pixel": 0.1}, tmp_path / "new.safetensors")
    with pytest.raises(RunFolderError, match="is one of the inputs"):
        remix_merge(out, {"pixel": 0.1}, out, overwrite=True)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["pixel"], "'pixel' gives no part a weight."),
        (["pixel=much"], "'pixel=much' gives no part a weight."),
        (["pixel=nan"], "'pixel=nan' gives no part a weight."),
        (["pixel=1", "pixel=2"], "pixel is given two weights."),
    ],
)
def test_what_is_no_new_weight_is_named(texts, says):
    with pytest.raises(ConfigError) as caught:
        parse_changes(texts)
    assert caught.value.problem == says


def test_new_weights_are_read():
    assert parse_changes(["a=b=0.5", "pixel=-1e-1"]) == {"a=b": 0.5, "pixel": -0.1}


# ------------------------------------------------------------------ names


def test_parts_of_one_name_are_numbered():
    paths = [Path("a/adapter.safetensors"), Path("b/adapter.safetensors"), Path("pixel")]
    assert [p.name for p in name_parts([AdapterPart(path) for path in paths])] == [
        "adapter",
        "adapter-2",
        "pixel",
    ]


def test_a_number_never_takes_a_given_name():
    parts = [AdapterPart(Path("a")), AdapterPart(Path("x"), name="a-2"), AdapterPart(Path("b/a"))]
    assert [part.name for part in name_parts(parts)] == ["a", "a-2", "a-3"]


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match="Two parts are called 'me'"):
        name_parts([AdapterPart(Path("a"), name="me"), AdapterPart(Path("b"), name="me")])


def test_a_full_rank_is_the_default():
    assert Recipe(()).rank == FULL


def test_a_file_that_holds_no_numbers_is_refused(parts, out, tmp_path):
    bad = tmp_path / "bad.safetensors"
    for value in (float("nan"), float("inf")):
        name = "unet.mid_block.attentions.0.proj_in"
        rows = {
            f"{name}.lora_A.weight": torch.ones(1, 3),
            f"{name}.lora_B.weight": torch.ones(2, 1),
        }
        rows[f"{name}.lora_A.weight"][0, 1] = value
        save_file(rows, bad)
        with pytest.raises(AdapterError) as caught:
            carry_out(Recipe((parts[0], AdapterPart(bad))), out)
        assert str(bad) in caught.value.problem
        assert "NaN or infinity" in caught.value.problem
        assert not out.exists()
