"""Merging files: one file that draws what its parts draw together, and says what it is made of."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn

from dreamloom.core.errors import AdapterError, ConfigError, RunFolderError
from dreamloom.core.events import Progress, StageDone, StageStarted
from dreamloom.core.run_folder import RunFolder, file_sha256
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.convert import FileForm, convert_file
from dreamloom.merging.files.merge import merge_adapters, record_merge
from dreamloom.merging.files.recipe import AdapterPart, parse_part
from looks import psnr_of_arrays

# ------------------------------------------------------------------ what is typed


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-0.5", "a.safetensors", -0.5),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("runs/a.safetensors:2", "runs/a.safetensors", 2.0),
        ("C:\\x\\a.safetensors", "C:\\x\\a.safetensors", 1.0),
        ("C:\\x\\a.safetensors:0.8", "C:\\x\\a.safetensors", 0.8),
        ("C:/x/a.safetensors", "C:/x/a.safetensors", 1.0),
        ("C:/x/a.safetensors:0.8", "C:/x/a.safetensors", 0.8),
    ],
)
def test_a_part_is_a_file_and_perhaps_a_weight(text, path, weight):
    assert parse_part(text) == AdapterPart(Path(path), weight)


@pytest.mark.parametrize("text", ["a:b", "a.safetensors:0,8", "a.safetensors:", "C:a.safetensors"])
def test_what_is_no_weight_is_named(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse_part(text)
    ending = text.partition(":")[2]
    assert caught.value.problem == f"{text!r} ends in {ending!r}, which is not a weight."
    assert "FILE:0.8" in caught.value.hint


@pytest.mark.parametrize("name", ["a:b", "style:2", "style:2.safetensors"])
def test_an_existing_file_may_have_a_colon_in_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert parse_part(name) == AdapterPart(Path(name), 1.0)
    assert parse_part(f"{name}:0.5") == AdapterPart(Path(name), 0.5)


# ------------------------------------------------------------------ files in, file out


def random_adapter(seed, **metadata):
    rng = torch.Generator().manual_seed(seed)
    layers = {
        name: Layer(torch.randn(2, 4, generator=rng), torch.randn(3, 2, generator=rng))
        for name in ("unet.both", f"unet.only{seed}")
    }
    return Adapter(layers, {f"dreamloom.{key}": text for key, text in metadata.items()})


@pytest.fixture
def parts(tmp_path):
    """Two adapters of one base on disk."""
    made = []
    for seed, subject in enumerate(["rraj person", "pixel"]):
        path = tmp_path / f"{seed}.safetensors"
        base = {"base": "picturebook", "base_fingerprint": "f00"}
        write_adapter(path, random_adapter(seed, subject=subject, **base))
        made.append(AdapterPart(path, [0.8, -0.5][seed]))
    return made


@pytest.fixture
def out(tmp_path):
    (tmp_path / "merged").mkdir()
    return tmp_path / "merged" / "out.safetensors"


def test_the_file_holds_the_weighted_sum(parts, out):
    events = []
    merged = merge_adapters(parts, out, observe=events.append)
    one, other = (read_adapter(part.path).layers for part in parts)
    for layers in (merged.layers, read_adapter(out).layers):
        assert sorted(layers) == ["unet.both", "unet.only0", "unet.only1"]
        torch.testing.assert_close(
            layers["unet.both"].update(),
            0.8 * one["unet.both"].update() - 0.5 * other["unet.both"].update(),
        )
        torch.testing.assert_close(
            layers["unet.only1"].update(), -0.5 * other["unet.only1"].update()
        )
    assert [type(event) for event in events] == [StageStarted, *[Progress] * 3, StageDone]
    assert (events[0].detail, events[-1].detail) == ("2 adapters", str(out))


def write_described(path, **header):
    adapter = random_adapter(0)
    write_adapter(path, Adapter(adapter.layers, header))
    return AdapterPart(path)


def test_a_merge_has_the_trigger_words_of_all_its_parts(tmp_path, out):
    """Those of DreamLoom and of others, in order and each once; tags and titles as well."""
    ours = write_described(
        tmp_path / "me.safetensors",
        **{
            "dreamloom.subject": "rraj person",
            "ss_tag_frequency": json.dumps({"rraj person": {"a photo of rraj person": 6}}),
            "ss_sd_model_name": "sdxl",
        },
    )
    theirs = write_described(
        tmp_path / "style.safetensors",
        **{
            "modelspec.trigger_phrase": "pixel, rraj person",
            "modelspec.title": "Pixel art",
            "modelspec.hash_sha256": "0x00",
            "ss_tag_frequency": json.dumps({"pixel": {"pixel": 20}}),
            "ss_network_dim": "2",
        },
    )
    merge_adapters([ours, theirs], out)
    story = read_adapter(out).metadata
    assert story["modelspec.trigger_phrase"] == "rraj person, pixel"
    assert story["modelspec.title"] == "rraj person + Pixel art"
    assert json.loads(story["ss_tag_frequency"]).keys() == {"rraj person", "pixel"}
    assert story["ss_sd_model_name"] == "sdxl"
    with safe_open(out, "pt") as file:
        assert file.metadata().get("modelspec.hash_sha256") != "0x00"
    convert_file(out, out.with_name("half.safetensors"), FileForm(precision="fp16"))
    again = read_adapter(out.with_name("half.safetensors")).metadata
    assert again["modelspec.trigger_phrase"] == "rraj person, pixel"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"dreamloom.prediction": "noise"}, {"modelspec.prediction_type": "v"}),
        ({"modelspec.prediction_type": "epsilon"}, {"ss_v_parameterization": "True"}),
    ],
)
def test_adapters_of_bases_that_predict_otherwise_are_not_merged(tmp_path, out, one, other):
    parts = [
        write_described(tmp_path / f"{n}.safetensors", **h) for n, h in enumerate((one, other))
    ]
    with pytest.raises(AdapterError) as caught:
        merge_adapters(parts, out)
    assert "0.safetensors (epsilon)" in caught.value.problem
    assert "1.safetensors (v)" in caught.value.problem
    assert not out.exists()


def test_the_file_tells_what_it_is_made_of(parts, out):
    merge_adapters(parts, out)
    story = dict(read_adapter(out).metadata)
    recipe = json.loads(story.pop("dreamloom.recipe"))
    assert recipe.pop("parts") == [
        {
            "name": name,
            "file": f"{name}.safetensors",
            "sha256": file_sha256(part.path),
            "weight": part.weight,
            "subject": subject,
        }
        for name, part, subject in zip("01", parts, ["rraj person", "pixel"], strict=True)
    ]
    assert recipe.pop("versions").keys() == {"dreamloom", "torch"}
    assert recipe == {
        "method": "sum",
        "options": {},
        "rank": "full",
        "seed": 0,
        "format": "peft",
        "precision": "fp32",
    }
    assert {key for key in story if key.startswith("dreamloom.")} == {
        "dreamloom.kind",
        "dreamloom.method",
        "dreamloom.base",
        "dreamloom.base_fingerprint",
        "dreamloom.subject",
        "dreamloom.layers",
        "dreamloom.slices",
        "dreamloom.seal",
    }
    assert (story["dreamloom.kind"], story["dreamloom.method"]) == ("merge", "sum")
    assert (story["dreamloom.base"], story["dreamloom.subject"]) == ("picturebook", "rraj person")


def test_the_folders_of_the_parts_stay_private(parts, out):
    merge_adapters(parts, out)
    assert str(parts[0].path.parent).encode() not in out.read_bytes()


def test_an_existing_file_is_not_overwritten_unasked(parts, out):
    out.write_text("another's work")
    with pytest.raises(RunFolderError) as caught:
        merge_adapters(parts, out)
    assert caught.value.problem == f"{out} exists already."
    assert "--overwrite" in caught.value.hint
    assert out.read_text() == "another's work"
    merge_adapters(parts, out, overwrite=True)
    assert len(read_adapter(out).layers) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_input_is_overwritten_even_if_asked(parts, overwrite):
    before = parts[0].path.read_bytes()
    with pytest.raises(RunFolderError) as caught:
        merge_adapters(parts, parts[0].path, overwrite=overwrite)
    assert caught.value.problem == f"{parts[0].path} is one of the inputs, which would be lost."
    assert parts[0].path.read_bytes() == before


def refused(error, parts, out, **options):
    """Merge, expect a refusal, and check that it left nothing behind."""
    before = sorted(parts[0].path.parent.glob("**/*")) if parts else None
    with pytest.raises(error) as caught:
        merge_adapters(parts, out, **options)
    assert (sorted(parts[0].path.parent.glob("**/*")) if parts else None) == before
    return caught.value


def test_a_folder_is_not_overwritten_even_if_asked(parts, tmp_path):
    (tmp_path / "full").mkdir()
    error = refused(RunFolderError, parts, tmp_path / "full", overwrite=True)
    assert "is a folder" in error.problem


def test_different_bases_are_refused_naming_both_files(parts, out):
    write_adapter(parts[1].path, random_adapter(1, base="sdxl", base_fingerprint="bar"))
    error = refused(AdapterError, parts, out)
    assert f"{parts[0].path} (picturebook)" in error.problem
    assert f"{parts[1].path} (sdxl)" in error.problem
    write_adapter(parts[1].path, random_adapter(1, base="picturebook", base_fingerprint="bar"))
    error = refused(AdapterError, parts, out)
    assert f"{parts[1].path} (picturebook, weights bar)" in error.problem


def test_an_adapter_that_does_not_tell_its_base_may_join(parts, out):
    write_adapter(parts[0].path, random_adapter(0))
    merge_adapters(parts, out)
    assert read_adapter(out).metadata["dreamloom.base"] == "picturebook"


def test_an_unknown_method_is_refused_with_the_known_ones(parts, out):
    error = refused(ConfigError, parts, out, method="average")
    assert error.problem == "There is no merge method 'average'."
    assert "sum" in error.hint


def test_weights_that_leave_nothing_are_refused(parts, out):
    error = refused(ConfigError, [AdapterPart(part.path, 0.0) for part in parts], out)
    assert "Every weight is 0" in error.problem


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(parts, out, weight):
    error = refused(ConfigError, [parts[0], AdapterPart(parts[1].path, weight)], out)
    assert "must be finite" in error.problem


def test_nothing_cannot_be_merged(out):
    assert "0 adapters" in refused(ConfigError, [], out).problem


def test_updates_of_other_shapes_are_refused(parts, out):
    other = Adapter({"unet.both": Layer(torch.ones(2, 9), torch.ones(3, 2))})
    write_adapter(parts[1].path, other)
    assert "updates of unet.both differ in shape" in refused(AdapterError, parts, out).problem


def test_a_merge_that_overflows_is_not_written(parts, out):
    error = refused(AdapterError, [parts[0], AdapterPart(parts[1].path, 3e38)], out)
    assert "is not finite" in error.problem


def test_a_missing_part_is_named(parts, out):
    parts[0].path.unlink()
    assert str(parts[0].path) in refused(AdapterError, parts, out).problem


def test_only_safetensors_are_written(parts, out):
    assert ".safetensors" in refused(AdapterError, parts, out.with_suffix(".bin")).problem


def test_a_merge_inside_a_run_is_recorded(parts, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    out = run.path / "merged.safetensors"
    merged = merge_adapters(parts, out)
    record = record_merge(run, parts, out, merged, 1.5)
    assert run.read_record("merge") == record
    assert run.finished("merge", record.inputs) == record
    assert record.inputs == {f"part{n}": file_sha256(p.path) for n, p in enumerate(parts)}
    assert record.outputs == {"merged.safetensors": file_sha256(out)}
    assert record.settings == {
        "method": "sum",
        "weights": [0.8, -0.5],
        "files": ["0.safetensors", "1.safetensors"],
    }
    assert record.results == {"layers": 3, "ranks": [2, 4], "norm": pytest.approx(merged.norm())}


def test_the_record_tells_parts_of_one_name_apart(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    parts = [
        AdapterPart(run.path / name / "adapter.safetensors") for name in ("with_prior", "style")
    ]
    for seed, part in enumerate(parts):
        write_adapter(part.path, random_adapter(seed))
    out = run.path / "merged.safetensors"
    record = record_merge(run, parts, out, merge_adapters(parts, out), 1.5)
    assert record.settings["files"] == [
        "with_prior/adapter.safetensors",
        "style/adapter.safetensors",
    ]


# ------------------------------------------------------------------ the pictures


@pytest.fixture
def pipeline(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_the_merged_file_alone_draws_what_the_parts_draw_together(pipeline, tmp_path, out):
    weights = {"subject": 0.9, "style": -0.6}
    wanted = {"subject": r"mid.*(to_[qk]$|conv1)", "style": r"mid.*(to_q$|to_out\.0|conv2)"}
    parts = []
    for seed, (name, pattern) in enumerate(wanted.items()):
        rng = torch.Generator().manual_seed(seed)
        layers = {}
        for number, (layer, module) in enumerate(pipeline.unet.named_modules()):
            if isinstance(module, nn.Linear | nn.Conv2d) and re.search(pattern, layer):
                rank, (outputs, *inputs) = 1 + number % 3, module.weight.shape
                layers[f"unet.{layer}"] = Layer(
                    0.3 * torch.randn(rank, *inputs, generator=rng),
                    0.3 * torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=rng),
                )
        write_adapter(tmp_path / f"{name}.safetensors", Adapter(layers))
        parts.append(AdapterPart(tmp_path / f"{name}.safetensors", weights[name]))
    merged = merge_adapters(parts, out)
    assert len(set(merged.ranks.values())) > 2

    def draw():
        return pipeline(
            "a photo of rraj person",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]

    plain = draw()
    for name in weights:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters([*weights], [*weights.values()])
    together = draw()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(out.parent, weight_name=out.name)
    alone = draw()
    assert psnr_of_arrays(alone, together) > 80
    # The test can fail: adapters and weights change the picture by more than that.
    pipeline.set_adapters(["default_0"], [0.7])
    weaker = draw()
    assert psnr_of_arrays(plain, together) < 40
    assert psnr_of_arrays(weaker, together) < 60
