"""An adapter from two checkpoints, and adapters into a checkpoint: one undoes the other."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreamloom.core.errors import AdapterError, BaseModelError, ConfigError, RunFolderError
from dreamloom.core.events import Note
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.extract import extract_adapter, find_nearest
from dreamloom.merging.files.convert import extract_file
from dreamloom.merging.files.fuse import fuse_into_checkpoint
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.merging.ranks import parse_rank
from dreamloom.models.peftstate import describe_config
from dreamloom.models.weight_files import TensorFile, fingerprint_weights, open_weights
from merges import full_disk
from original_layout import original_layout

LAYERS = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.1.resnets.0.conv1",
    "unet.down_blocks.1.downsamplers.0.conv",
    "unet.up_blocks.0.resnets.0.conv_shortcut",
    "unet.conv_in",
    "text_encoder.encoder.layers.0.self_attn.v_proj",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_projection",
)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, local_files_only=True, add_watermarker=False
    )


@pytest.fixture(scope="module")
def single(pipeline, tmp_path_factory):
    """The tiny model as one file, with Stability AI's names."""
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    tensors = {name: weight.contiguous() for name, weight in original_layout(*parts).items()}
    save_file(tensors, path, metadata={"modelspec.hash_sha256": "0x0", "author": "me"})
    return path


@pytest.fixture(scope="module")
def half(tiny_sdxl, tmp_path_factory):
    """The tiny model in half precision, split into two files where the hub splits them."""
    folder = shutil.copytree(tiny_sdxl, tmp_path_factory.mktemp("half") / "model")
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = {key: tensor.half() for key, tensor in load_file(file).items()}
        first = dict(list(tensors.items())[::2])
        second = {key: tensor for key, tensor in tensors.items() if key not in first}
        save_file(first, file.with_name(f"{file.stem}-00001-of-00002.safetensors"))
        save_file(second, file.with_name(f"{file.stem}-00002-of-00002.safetensors"))
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_sdxl):
    """A LoRA of rank 2 on layers of every kind."""
    weights, rng, layers = open_weights(str(tiny_sdxl)), torch.Generator().manual_seed(1), {}
    for name in LAYERS:
        outputs, *inputs = weights.shape(name)
        down = torch.randn(2, *inputs, generator=rng)
        up = torch.randn(outputs, 2, *(1 for _ in inputs[1:]), generator=rng)
        layers[name] = Layer(down, 0.1 * up)
    return Adapter(layers, {"dreamloom.base_fingerprint": fingerprint_weights(tiny_sdxl)})


@pytest.fixture
def part(adapter, tmp_path):
    write_adapter(tmp_path / "adapter.safetensors", adapter)
    return AdapterPart(tmp_path / "adapter.safetensors", 0.5)


# ------------------------------------------------------------------ weights by layer


def test_every_layer_is_found_in_a_folder_and_in_a_single_file(pipeline, tiny_sdxl, single, half):
    folder, file, sharded = (open_weights(str(base)) for base in (tiny_sdxl, single, half))
    wanted = {
        f"unet.{name}": module.weight
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert wanted.keys() <= folder.places.keys()
    assert set(LAYERS) < folder.places.keys() == file.places.keys() == sharded.places.keys()
    assert not any("embedding" in n.rpartition(".")[2] for n in folder.places)
    for name in folder.places:
        one, other = folder.read(name), file.read(name)
        assert one.shape == other.shape == folder.shape(name) == file.shape(name)
        assert torch.equal(one, other)
        assert torch.equal(sharded.read(name), one.half())
        if name in wanted:
            assert torch.equal(one, wanted[name])


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("nowhere", "There is no base model at nowhere."),
        ("nowhere.safetensors", "There is no base model at nowhere.safetensors."),
        ("nowhere/at-all", "nowhere/at-all is not on this machine, and HF_HUB_OFFLINE"),
    ],
)
def test_a_base_that_is_not_there_is_named(base, says):
    with pytest.raises(BaseModelError) as caught:
        open_weights(base)
    assert says in caught.value.problem


def test_a_folder_without_layers_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="holds no layer of a Stable Diffusion XL"):
        open_weights(str(tmp_path))


def test_an_adapter_is_no_base(part):
    with pytest.raises(BaseModelError, match="looks like a LoRA"):
        open_weights(str(part.path))


def test_a_precision_that_cannot_be_read_is_named(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.int32)}, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match="holds x as I32"):
        TensorFile(tmp_path / "x.safetensors").read("x")


# ------------------------------------------------------------------ into a checkpoint


@pytest.mark.parametrize("kind", ["tiny_sdxl", "single", "half"])
def test_a_fused_model_is_the_base_plus_the_weighted_updates(
    kind, request, adapter, part, tmp_path
):
    base = request.getfixturevalue(kind)
    out = tmp_path / ("baked.safetensors" if kind == "single" else "baked")
    fused = fuse_into_checkpoint([part, AdapterPart(part.path, -0.25, "again")], str(base), out)
    assert fused.layers == len(LAYERS)
    old, new = open_weights(str(base)), open_weights(str(out))
    tolerance = 2e-3 if kind == "half" else 1e-6
    for name in old.places:
        change = new.read(name).float() - old.read(name).float()
        if name in LAYERS:
            wanted = 0.25 * adapter.layers[name].update()
            torch.testing.assert_close(change, wanted, rtol=0, atol=tolerance)
            assert float(wanted.norm()) > 0.1
        else:
            assert not change.any()
    assert (0 < fused.rounding < 0.01) if kind == "half" else fused.rounding < 1e-6


def test_adapters_of_different_layers_are_fused_together(tiny_sdxl, adapter, tmp_path):
    halves = [LAYERS[::2], LAYERS[1::2]]
    parts = []
    for number, names in enumerate(halves):
        path = tmp_path / f"half{number}.safetensors"
        write_adapter(path, replace(adapter, layers={name: adapter.layers[name] for name in names}))
        parts.append(AdapterPart(path, 0.5, f"half{number}"))
    out = tmp_path / "fused"
    assert fuse_into_checkpoint(parts, str(tiny_sdxl), out).layers == len(LAYERS)
    old, new = open_weights(str(tiny_sdxl)), open_weights(str(out))
    for name in LAYERS:
        change = new.read(name).float() - old.read(name).float()
        torch.testing.assert_close(change, 0.5 * adapter.layers[name].update(), rtol=0, atol=1e-6)


def taught_by_peft(unet, config):
    """An adapter that PEFT knows, with random factors, and the weights that PEFT merges."""
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, unet)
    for name, weight in unet.named_parameters():
        if "lora_" in name or "oft_" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    tensors = {f"unet.{k}": t.clone() for k, t in peft.get_peft_model_state_dict(unet).items()}
    merged = {}
    for name in config.target_modules:
        module = unet.get_submodule(name)
        module.merge()
        merged[f"unet.{name}"] = module.base_layer.weight.detach().clone()
    return tensors, merged


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_kinds_of_peft_are_fused_as_peft_merges_them(tiny_sdxl, tmp_path, kind):
    names = [n.removeprefix("unet.") for n in LAYERS[:2]]
    given = {"dora": {"use_dora": True, "r": 2}, "oft": {"oft_block_size": 2}}
    make = {"dora": peft.LoraConfig, "oft": peft.OFTConfig}
    config = make[kind](target_modules=names, **given[kind])
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    tensors, merged = taught_by_peft(unet, config)
    described = describe_config(config) | {"target_modules": sorted(names)}
    state = PeftState(kind, tensors, {"unet": described})
    file = tmp_path / "a.safetensors"
    write_adapter(file, Adapter({}, peft=state))
    fused = fuse_into_checkpoint([AdapterPart(file)], str(tiny_sdxl), tmp_path / "baked")
    assert fused.layers == 2
    new = open_weights(str(tmp_path / "baked"))
    for name, weight in merged.items():
        torch.testing.assert_close(new.read(name), weight, rtol=1e-5, atol=1e-6)


def test_a_dora_that_scales_inputs_is_fused(tiny_sdxl, adapter, tmp_path):
    old = open_weights(str(tiny_sdxl))
    layers = {name: adapter.layers[name] for name in LAYERS[:2]}
    lengths = {name: 1 + torch.rand(old.shape(name)[1]) for name in layers}
    file = tmp_path / "a.safetensors"
    write_adapter(
        file, Adapter({}, peft=make_dora(layers, lengths, "inputs")), format="kohya-diffusers"
    )
    fuse_into_checkpoint([AdapterPart(file)], str(tiny_sdxl), tmp_path / "baked")
    new = open_weights(str(tmp_path / "baked"))
    for name in layers:
        columns = new.read(name).transpose(0, 1).flatten(1)
        torch.testing.assert_close(columns.norm(dim=1), lengths[name], rtol=1e-4, atol=1e-5)
        moved = (old.read(name) + layers[name].update()).transpose(0, 1).flatten(1)
        cosines = torch.cosine_similarity(columns, moved)
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny_sdxl", "single", "half"])
def test_a_fused_model_is_laid_out_as_its_base(kind, request, part, tmp_path):
    base = request.getfixturevalue(kind)
    out = tmp_path / ("baked.safetensors" if kind == "single" else "baked")
    fuse_into_checkpoint([part], str(base), out)
    if kind == "single":
        pairs = [(base, out)]
    else:
        inside = [file.relative_to(base) for file in sorted(base.rglob("*")) if file.is_file()]
        assert inside == [f.relative_to(out) for f in sorted(out.rglob("*")) if f.is_file()]
        pairs = [(base / name, out / name) for name in inside]
    for one, other in pairs:
        if one.suffix != ".safetensors":
            assert one.read_bytes() == other.read_bytes()
            continue
        before, after = TensorFile(one), TensorFile(other)
        assert list(before.entries) == list(after.entries)
        starts = [
            file.entries and min(e.start for e in file.entries.values()) for file in (before, after)
        ]
        for key, entry in before.entries.items():
            found = after.entries[key]
            assert (entry.dtype, entry.shape) == (found.dtype, found.shape)
            assert entry.start - starts[0] == found.start - starts[1]


def test_a_fused_file_says_what_is_in_it_and_no_longer_the_old_hash(single, part, tmp_path):
    fuse_into_checkpoint([part], str(single), tmp_path / "baked.safetensors")
    with safe_open(tmp_path / "baked.safetensors", "pt") as file:
        story = file.metadata()
    assert story.keys() == {"author", "dreamloom.baked"}
    (told,) = json.loads(story["dreamloom.baked"])
    assert (told["file"], told["weight"]) == ("adapter.safetensors", 0.5)


def test_a_fused_folder_draws_what_the_applied_adapter_draws(tiny_sdxl, part, tmp_path):
    fuse_into_checkpoint([part], str(tiny_sdxl), tmp_path / "baked")

    def draw(folder, scale=None):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        if scale is not None:
            pipeline.load_lora_weights(part.path.parent, weight_name=part.path.name)
            pipeline.set_adapters(["default_0"], [scale])
        rng = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, generator=rng, output_type="pt").images

    active = draw(tiny_sdxl, 0.5)
    torch.testing.assert_close(draw(tmp_path / "baked"), active, rtol=0, atol=1e-3)
    assert float((draw(tiny_sdxl) - active).abs().max()) > 0.01


def test_weights_of_another_base_are_told_of(single, part, tmp_path):
    events = []
    fuse_into_checkpoint([part], str(single), tmp_path / "baked.safetensors", observe=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == [
        f"{part.path} was made for other weights than these: those of another base model."
    ]


def test_new_words_stay_beside(tiny_sdxl, adapter, tmp_path):
    taught = Adapter(
        adapter.layers, adapter.metadata, {"rraj": {"text_encoder": torch.ones(1, 32)}}
    )
    write_adapter(tmp_path / "words.safetensors", taught)
    events = []
    part = AdapterPart(tmp_path / "words.safetensors")
    fuse_into_checkpoint([part], str(tiny_sdxl), tmp_path / "baked", observe=events.append)
    assert [e.text for e in events if isinstance(e, Note)] == [
        f"The new words of {part.path} (rraj) stay in the file beside it: a checkpoint has no "
        "place for them."
    ]


def refused(error, part, base, out, **options):
    before = sorted(out.parent.glob("**/*")) if out.parent.exists() else None
    with pytest.raises(error) as caught:
        fuse_into_checkpoint([part], str(base), out, **options)
    assert (sorted(out.parent.glob("**/*")) if out.parent.exists() else None) == before
    return caught.value.problem


def test_places_that_cannot_be_written_are_refused(tiny_sdxl, single, part, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for base, out, says in (
        (tiny_sdxl, tmp_path / "no" / "baked", "There is no folder"),
        (tiny_sdxl, tiny_sdxl, "is the base model itself"),
        (tiny_sdxl, tiny_sdxl / "unet" / "baked", "lies inside the base model"),
        (tiny_sdxl, tmp_path / "baked.safetensors", "names a file, and the base is a folder"),
        (tiny_sdxl, tmp_path / "full", "holds other things than a model"),
        (single, tmp_path / "baked", "is no .safetensors file, and the base is one"),
        (single, part.path, "exists already"),
    ):
        assert says in refused(RunFolderError, part, base, out)


@pytest.mark.parametrize("kind", ["tiny_sdxl", "single"])
def test_a_full_disk_is_not_blamed_on_the_base(kind, request, part, tmp_path):
    """The configurations beside the weights are copied first: that is writing, too."""
    base = request.getfixturevalue(kind)
    out = tmp_path / ("baked" if base.is_dir() else "baked.safetensors")
    with full_disk(100), pytest.raises(RunFolderError) as caught:
        fuse_into_checkpoint([part], str(base), out)
    assert caught.value.problem == f"{out} cannot be written: File too large."
    assert [path.name for path in tmp_path.iterdir()] == [part.path.name]


def test_a_fused_model_is_replaced_only_if_asked(tiny_sdxl, part, tmp_path):
    out = tmp_path / "baked"
    fuse_into_checkpoint([part], str(tiny_sdxl), out)
    assert "exists already" in refused(RunFolderError, part, tiny_sdxl, out)
    fuse_into_checkpoint(
        [AdapterPart(part.path, 0.0), AdapterPart(part.path, 1.0, "b")], str(tiny_sdxl), out, True
    )
    name = LAYERS[0]
    change = open_weights(str(out)).read(name) - open_weights(str(tiny_sdxl)).read(name)
    torch.testing.assert_close(change, read_adapter(part.path).layers[name].update())


def test_layers_that_the_base_has_not_are_refused(tiny_sdxl, part, tmp_path):
    name = "unet.down_blocks.7.attentions.0.proj_in"
    write_adapter(part.path, Adapter({name: Layer(torch.ones(1, 3), torch.ones(2, 1))}))
    says = refused(AdapterError, part, tiny_sdxl, tmp_path / "baked")
    assert says == f"{part.path} changes 1 layers that the base model has not: {name}."


def test_layers_of_another_shape_are_refused(tiny_sdxl, part, tmp_path):
    write_adapter(part.path, Adapter({LAYERS[0]: Layer(torch.ones(1, 3), torch.ones(2, 1))}))
    assert "as (2, 3), and in the base model it is" in refused(
        AdapterError, part, tiny_sdxl, tmp_path / "baked"
    )


def test_what_overflows_in_half_precision_is_not_written(half, part, tmp_path):
    strong = AdapterPart(part.path, 1e7)
    assert "is not finite in the base's precision" in refused(
        AdapterError, strong, half, tmp_path / "baked"
    )


# ------------------------------------------------------------------ out of two checkpoints


@pytest.mark.parametrize("kind", ["tiny_sdxl", "single", "half"])
@pytest.mark.parametrize("rank", ["2", "energy:0.9999", "full", "budget:50KB"])
def test_what_was_fused_is_extracted(kind, rank, request, adapter, part, tmp_path):
    base = request.getfixturevalue(kind)
    out = tmp_path / ("baked.safetensors" if kind == "single" else "baked")
    fuse_into_checkpoint([part], str(base), out)
    found = extract_adapter(str(out), str(base), parse_rank(rank))
    assert set(found.errors) == set(LAYERS)
    assert found.others == ()
    tolerance = 3e-3 if kind == "half" else 1e-5
    assert found.error < tolerance * 5
    for name, layer in found.adapter.layers.items():
        wanted = 0.5 * adapter.layers[name].update()
        torch.testing.assert_close(layer.update(), wanted, rtol=0, atol=tolerance)
    assert found.adapter.metadata["dreamloom.base_fingerprint"] == fingerprint_weights(base)
    assert float(found.adapter.metadata["dreamloom.error"]) == pytest.approx(found.error, rel=1e-4)


def test_a_full_disk_ends_an_extract_in_a_sentence(tiny_sdxl, part, tmp_path):
    fuse_into_checkpoint([part], str(tiny_sdxl), tmp_path / "baked")
    out = tmp_path / "new" / "out.safetensors"
    out.parent.mkdir()
    with full_disk(100), pytest.raises(RunFolderError) as caught:
        extract_file((str(tmp_path / "baked"), str(tiny_sdxl)), out, parse_rank("2"))
    assert caught.value.problem.startswith(f"{out} cannot be written: ")
    assert "File too large" in caught.value.problem
    assert list(out.parent.iterdir()) == []


def test_layouts_may_differ(tiny_sdxl, single, part, adapter, tmp_path):
    fuse_into_checkpoint([part], str(single), tmp_path / "baked.safetensors")
    found = extract_adapter(str(tmp_path / "baked.safetensors"), str(tiny_sdxl), parse_rank("2"))
    assert set(found.adapter.layers) == set(LAYERS)
    assert found.error < 1e-5


def test_the_errors_are_those_of_the_best_cut(tiny_sdxl, part, tmp_path):
    fuse_into_checkpoint([part], str(tiny_sdxl), tmp_path / "baked")
    found = extract_adapter(str(tmp_path / "baked"), str(tiny_sdxl), parse_rank("1"))
    lost = whole = 0.0
    for name, error in found.errors.items():
        values = torch.linalg.svdvals(
            0.5 * read_adapter(part.path).layers[name].update().flatten(1)
        )
        assert error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-3)
        lost, whole = lost + float(values[1:].norm()) ** 2, whole + float(values.norm()) ** 2
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_a_random_search_comes_near_the_best_and_finds_low_ranks_exactly():
    rng = torch.Generator().manual_seed(3)
    left, right = torch.randn(200, 8, generator=rng), torch.randn(8, 160, generator=rng)
    torch.testing.assert_close(find_nearest(left @ right, 8).multiply(), left @ right)
    for power in (0.0, 0.5, 1.0, 2.0):
        # From all directions alike, the worst case for a search, to few that matter.
        one = torch.linalg.qr(torch.randn(200, 160, generator=rng)).Q
        other = torch.linalg.qr(torch.randn(160, 160, generator=rng)).Q
        values = torch.arange(1, 161, dtype=torch.float32) ** -power
        matrix = one * values @ other
        found = find_nearest(matrix, 8, "x")
        best = float(values[8:].norm())
        assert float((matrix - found.multiply()).norm()) <= 1.01 * best
        assert torch.equal(find_nearest(matrix, 8, "x").up, found.up)


def test_other_tensors_that_differ_are_named(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "tuned")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] += 0.1
    tensors["conv_norm_out.bias"] += 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    found = extract_adapter(str(folder), str(tiny_sdxl), parse_rank("1"))
    assert list(found.errors) == ["unet.conv_in"]
    assert found.others == ("conv_norm_out.bias",)


def test_two_equal_models_give_no_adapter(tiny_sdxl):
    with pytest.raises(AdapterError, match="have the same weights in every layer"):
        extract_adapter(str(tiny_sdxl), str(tiny_sdxl), parse_rank("1"))


def test_a_rank_above_every_layers_is_refused(tiny_sdxl, half):
    with pytest.raises(ConfigError, match="Rank 9999 is above what exists"):
        extract_adapter(str(half), str(tiny_sdxl), parse_rank("9999"))


def test_models_of_other_shapes_are_refused(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "other")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].contiguous()
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match=r"unet.conv_in is \(\d+, 2, 3, 3\) in"):
        extract_adapter(str(folder), str(tiny_sdxl), parse_rank("1"))


def test_what_is_not_finite_is_not_extracted(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "bad")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match=r"unet.conv_in holds numbers that are not finite"):
        extract_adapter(str(folder), str(tiny_sdxl), parse_rank("1"))
