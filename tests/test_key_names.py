"""Names that other programs give to SDXL's layers, beside those of test_kohya and test_formats."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreamloom.core.errors import AdapterError
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import AdapterPart, Recipe

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def write(path: Path, name: str) -> Path:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 640, generator=rng),
        f"{name}.lora_up.weight": torch.randn(640, 4, generator=rng),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, path)
    return path


def test_every_layer_of_the_denoiser_is_found_by_stability_ais_name_after_unet(
    tmp_path: Path,
) -> None:
    layers = [layer for layer in sdxl_layers().values() if layer.stability]
    tensors = {}
    for number, layer in enumerate(layers):
        kernel = (1, 1) if "conv" in layer.name else ()
        tensors[f"unet.{layer.stability}.lora_down.weight"] = torch.full((1, 2, *kernel), 1.0)
        tensors[f"unet.{layer.stability}.lora_up.weight"] = torch.full(
            (2, 1, *kernel), number + 1.0
        )
    save_file(tensors, tmp_path / "omi.safetensors")
    found = read_adapter(tmp_path / "omi.safetensors").layers
    assert found.keys() == {layer.name for layer in layers}
    for number, layer in enumerate(layers):
        assert float(found[layer.name].update().flatten()[0]) == number + 1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("clip_l.text_model.encoder.layers.3.mlp.fc1", "text_encoder.encoder.layers.3.mlp.fc1"),
        (
            "clip_g.text_model.encoder.layers.31.self_attn.q_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
        ),
    ],
)
def test_onetrainers_text_encoders_are_found(tmp_path: Path, theirs: str, ours: str) -> None:
    assert [*read_adapter(write(tmp_path / "omi.safetensors", theirs)).layers] == [ours]


@pytest.mark.parametrize(
    "name",
    [
        "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_x",
        "unet.output_blocks.9.0.in_layers.2",
        "clip_l.text_model.encoder.layers.12.mlp.fc1",
        "clip_g.nothing",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_qq",
        "unet.up_blocks.0.atentions.1.proj_in",
        "text_encoder.text_model.encoder.layers.0.self_attn.nothing",
    ],
)
def test_what_sdxl_has_not_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match=r"unknown keys \(") as caught:
        read_adapter(write(tmp_path / "omi.safetensors", name))
    assert name in caught.value.problem


def test_one_layer_in_two_namings_is_merged_into_one(tmp_path: Path) -> None:
    inner = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    files = [
        write(tmp_path / "omi.safetensors", f"unet.{inner}"),
        write(tmp_path / "kohya.safetensors", f"lora_unet_{inner.replace('.', '_')}"),
    ]
    out = tmp_path / "merged.safetensors"
    carry_out(Recipe(tuple(AdapterPart(file, 0.5) for file in files)), out)
    merged, one = read_adapter(out).layers, read_adapter(files[1]).layers
    assert [*merged] == [LAYER]
    torch.testing.assert_close(merged[LAYER].update(), one[LAYER].update())
