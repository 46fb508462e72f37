"""DINO and DINOv2: vision transformers that nobody told what they see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamloom.evaluation.encoders.computing import (
    WEIGHTS,
    explaining,
    load_pretrained,
    make_ready,
    name_by_weights,
    require_all,
    steady,
    unit_rows,
)
from dreamloom.evaluation.encoders.preprocessing import (
    DINO_PREPROCESSING,
    DINOV2_PREPROCESSING,
    Preprocessing,
)

_HEAD_WIDTH = 64  # DINO's authors give each head of attention 64 features, whatever the size
_EPSILON = 1e-6  # and this to their layer norms; transformers' own configuration says 1e-12


class DinoEncoder:
    """A vision transformer taught by DINO: its class token after the last layer.

    Args:
        folder: Holds model.safetensors, and config.json if transformers wrote it. Without the
            latter the weights bear the names that DINO's authors gave them, as timm has them too.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: The published recipe unless told otherwise.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    may_miss = False

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing = DINO_PREPROCESSING,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import ViTModel

        self._preprocessing = preprocessing
        with explaining(folder):
            if (folder / "config.json").is_file():
                self._model = load_pretrained(ViTModel, folder, device, add_pooling_layer=False)
            else:
                self._model = make_ready(_read_authors_names(load_file(folder / WEIGHTS)), device)
        self.key = f"{name or name_by_weights(folder)}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        pixels = self._preprocessing(images).to(self._model.device)
        with steady(pixels.device):
            return unit_rows(self._model(pixel_values=pixels).last_hidden_state[:, 0])


class Dinov2Encoder:
    """A vision transformer taught by DINOv2: its class token after the last layer norm.

    Args:
        folder: Holds config.json and model.safetensors, as transformers writes them.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: The published recipe unless told otherwise.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    may_miss = False

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing = DINOV2_PREPROCESSING,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import Dinov2Model

        self._preprocessing = preprocessing
        with explaining(folder):
            self._model = load_pretrained(Dinov2Model, folder, device)
        self.key = f"{name or name_by_weights(folder)}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        pixels = self._preprocessing(images).to(self._model.device)
        with steady(pixels.device):
            return unit_rows(self._model(pixel_values=pixels).pooler_output)


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
    require_all([name for name in model.state_dict() if name not in renamed])
    model.load_state_dict(renamed)
    assert isinstance(model, nn.Module)
    return model


def _rename(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Give DINO's weights the names that transformers uses; query, key and value come apart."""
    renamed = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            for theirs, ours in parts.items():
                given = weights[f"blocks.{layer}.{theirs}.{kind}"]
                renamed[f"layers.{layer}.{ours}.{kind}"] = given
            together = weights[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3)
            for letter, given in zip("qkv", together, strict=True):
                renamed[f"layers.{layer}.attention.{letter}_proj.{kind}"] = given
    return renamed
