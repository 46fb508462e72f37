"""kohya's format: its names, and what other programs apply."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.lora.key_names import LayerNames, name_for_kohya
from dreamloom.lora.modelspec import make_modelspec
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.lora.writing import write_adapter

# From files that kohya-ss writes and from its own list of modules.
KNOWN = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": (
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0"
    ),
    "unet.mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
    "unet.up_blocks.0.attentions.2.proj_in": "lora_unet_output_blocks_2_1_proj_in",
    "unet.up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_v": (
        "lora_unet_output_blocks_3_1_transformer_blocks_1_attn1_to_v"
    ),
    "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "unet.down_blocks.0.resnets.1.time_emb_proj": "lora_unet_input_blocks_2_0_emb_layers_1",
    "unet.up_blocks.2.resnets.2.conv_shortcut": "lora_unet_output_blocks_8_0_skip_connection",
    "unet.down_blocks.1.resnets.0.conv1": "lora_unet_input_blocks_4_0_in_layers_2",
    "text_encoder.encoder.layers.0.self_attn.q_proj": (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    ),
    "text_encoder_2.text_model.encoder.layers.31.mlp.fc2": (
        "lora_te2_text_model_encoder_layers_31_mlp_fc2"
    ),
}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def test_names_are_those_of_kohyas_files() -> None:
    assert name_for_kohya(KNOWN, {}) == KNOWN


def test_names_come_back_exactly() -> None:
    names = list(sdxl_layers())
    there = name_for_kohya(names, {})
    assert len(set(there.values())) == len(names)
    found = LayerNames()
    assert [found.find(there[name]) for name in names] == names


@pytest.mark.parametrize("wrapped", ["text_model.", ""])
def test_both_spellings_of_text_encoders_are_named(wrapped: str) -> None:
    for encoder, short in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        name = f"{encoder}.{wrapped}encoder.layers.1.mlp.fc1"
        assert (
            name_for_kohya([name], {})[name] == f"lora_{short}_text_model_encoder_layers_1_mlp_fc1"
        )


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fill(pipeline: StableDiffusionXLPipeline) -> Adapter:
    """Every layer that kohya can name, with ranks that differ."""
    rng = torch.Generator().manual_seed(2)
    layers = {}
    for component in COMPONENTS:
        for name, module in getattr(pipeline, component).named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or "text_projection" in name:
                continue
            rank, weight = 1 + len(layers) % 3, module.weight
            layers[f"{component}.{name}"] = Layer(
                0.1 * torch.randn(rank, *weight.shape[1:], generator=rng),
                0.1 * torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=rng),
            )
    return Adapter(layers, {"dreamloom.subject": "rraj person", "dreamloom.layout": "sdxl"})


def test_diffusers_applies_a_kohya_file_as_we_say(
    tmp_path: Path, pipeline: StableDiffusionXLPipeline
) -> None:
    adapter = fill(pipeline)
    assert any("upsamplers" in name for name in adapter.layers)
    assert any("conv_shortcut" in name for name in adapter.layers)
    write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    before = {
        name: getattr(pipeline, name.split(".")[0])
        .get_submodule(name.partition(".")[2])
        .weight.detach()
        .clone()
        for name in adapter.layers
    }
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipeline.fuse_lora(components=[*COMPONENTS])
    try:
        for name, layer in adapter.layers.items():
            module = getattr(pipeline, name.split(".")[0]).get_submodule(name.partition(".")[2])
            change = module.base_layer.weight - before[name]
            torch.testing.assert_close(change, layer.update(), rtol=1e-4, atol=1e-6)
    finally:
        pipeline.unfuse_lora(components=[*COMPONENTS])
        pipeline.unload_lora_weights()


def test_a_kohya_file_is_read_back(tmp_path: Path, pipeline: StableDiffusionXLPipeline) -> None:
    adapter = fill(pipeline)
    write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.layers.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        assert again.layers[name].rank == layer.rank
        torch.testing.assert_close(again.layers[name].update(), layer.update())
    assert again.metadata["dreamloom.subject"] == "rraj person"
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        keys = set(file.keys())
        story = file.metadata()
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= keys
    assert story["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert story["modelspec.trigger_phrase"] == "rraj person"
    assert story["modelspec.hash_sha256"].startswith("0x")
    assert story["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("unet.down_blocks.3.resnets.0.conv1", "sdxl"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q", "sdxl"),
        ("unet.up_blocks.2.attentions.0.proj_in", "sdxl"),
        ("unet.mid_block.attentions.0.proj_in", "other"),
    ],
)
def test_other_layouts_have_no_kohya_names(tmp_path: Path, name: str, layout: str) -> None:
    adapter = Adapter(
        {name: Layer(torch.ones(1, 2), torch.ones(2, 1))}, {"dreamloom.layout": layout}
    )
    with pytest.raises(AdapterError, match="other blocks than the published SDXL"):
        write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    assert list(tmp_path.iterdir()) == []


def test_kohya_holds_what_its_programs_compute_right(tmp_path: Path) -> None:
    layers = {"unet.mid_block.attentions.0.proj_in": Layer(torch.ones(1, 2), torch.ones(2, 1))}
    dora = Adapter({}, peft=make_dora(layers, {name: torch.ones(2) for name in layers}))
    oft = PeftState("oft", {}, {"unet": {"target_modules": ["mid_block.attentions.0.proj_in"]}})
    for adapter, way_out in ((dora, "--rank 32"), (Adapter({}, peft=oft), "dreamloom bake")):
        with pytest.raises(AdapterError, match="The format kohya holds no") as caught:
            write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
        assert way_out in caught.value.hint


def test_a_modelspec_leaves_out_what_is_not_known() -> None:
    spec = make_modelspec({})
    assert spec["modelspec.sai_model_spec"] == "1.0.1"
    assert {"modelspec.trigger_phrase", "modelspec.date", "modelspec.resolution"}.isdisjoint(spec)
    full = make_modelspec(
        {
            "dreamloom.subject": "<me> person",
            "dreamloom.words": json.dumps({"<me>": {}, "<it>": {}}),
            "dreamloom.resolution_px": "1024",
            "dreamloom.prediction": "velocity",
            "dreamloom.date": "2026-01-02T03:04:05Z",
        }
    )
    assert full["modelspec.trigger_phrase"] == "<it>, <me> person"
    assert full["modelspec.resolution"] == "1024x1024"
    assert full["modelspec.prediction_type"] == "v"
    assert full["modelspec.date"] == "2026-01-02T03:04:05Z"


def test_the_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    layers = {"unet.mid_block.attentions.0.proj_in": Layer(torch.ones(1, 2), torch.ones(2, 1))}
    found = []
    for number, subject in enumerate(("one", "two")):
        path = tmp_path / f"{number}.safetensors"
        write_adapter(path, Adapter(layers, {"dreamloom.subject": subject}), format="kohya")
        with safe_open(path, framework="pt") as file:
            found.append(file.metadata()["modelspec.hash_sha256"])
    assert found[0] == found[1]
