"""DINO and DINOv2: vision transformers that nobody told what they see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamloom.evaluation.encoders.computing import (
    WEIGHTS,
    NetworkEncoder,
    load_pretrained,
    load_weights,
    make_ready,
    rename_block,
)
from dreamloom.evaluation.encoders.preprocessing import (
    DINO_PREPROCESSING,
    DINOV2_PREPROCESSING,
)

_HEAD_WIDTH = 64  # DINO's authors give each head of attention 64 features, whatever the size
_EPSILON = 1e-6  # and this to their layer norms; transformers' own configuration says 1e-12


class DinoEncoder(NetworkEncoder):
    """A vision transformer taught by DINO: its class token after the last layer.

    Its folder holds model.safetensors, and config.json if transformers wrote it. Without the
    latter the weights bear the names that DINO's authors gave them, as timm has them too.
    """

    recipe = DINO_PREPROCESSING

    def load(self, folder: Path) -> None:
        """Read the network."""
        from transformers import ViTModel

        if (folder / "config.json").is_file():
            self._model = load_pretrained(ViTModel, folder, self.device, add_pooling_layer=False)
        else:
            self._model = make_ready(_read_authors_names(load_file(folder / WEIGHTS)), self.device)

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into the class token."""
        features: Tensor = self._model(pixel_values=pixels).last_hidden_state[:, 0]
        return features


class Dinov2Encoder(NetworkEncoder):
    """A vision transformer taught by DINOv2: its class token after the last layer norm.

    Its folder holds config.json and model.safetensors, as transformers writes them.
    """

    recipe = DINOV2_PREPROCESSING

    def load(self, folder: Path) -> None:
        """Read the network."""
        from transformers import Dinov2Model

        self._model = load_pretrained(Dinov2Model, folder, self.device)

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into the class token."""
        features: Tensor = self._model(pixel_values=pixels).pooler_output
        return features


def _read_authors_names(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a ViT from weights under the names of DINO's authors; its sizes are read from them."""
    from transformers import ViTConfig, ViTModel

    kernel = weights["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    places = weights["pos_embed"].shape[1] - 1
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        layer_norm_eps=_EPSILON,
    )
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
        model = ViTModel(config, add_pooling_layer=False)
    renamed = _rename(weights, layers)
    return load_weights(model, renamed)


def _rename(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Give DINO's weights the names that transformers uses."""
    renamed = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    parts = {
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attn.proj.": "attention.o_proj.",
        "mlp.fc1.": "mlp.fc1.",
        "mlp.fc2.": "mlp.fc2.",
    }
    for layer in range(layers):
        ours, attention = f"layers.{layer}.", "attention."
        renamed |= rename_block(weights, f"blocks.{layer}.", ours, parts, "attn.qkv.", attention)
    return renamed
