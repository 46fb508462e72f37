"""CSD: in which style a picture is made, whatever it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamloom.evaluation.encoders.computing import (
    WEIGHTS,
    NetworkEncoder,
    load_weights,
    make_ready,
    rename_block,
)
from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING

_HEAD_WIDTH = 64  # CLIP gives each head of attention 64 features, whatever the size
_STYLE = "last_layer_style"
_TOWER = "backbone."


class CsdEncoder(NetworkEncoder):
    """The style half of CSD: a CLIP's eye with a projection that keeps style and drops content.

    Its folder holds model.safetensors under the names of CSD's authors: ``backbone.…`` as OpenAI
    names the parts of CLIP's eye, and ``last_layer_style``.

    Source: Somepalli et al. 2024, "Measuring Style Similarity in Diffusion Models", section 4.
    """

    recipe = CLIP_PREPROCESSING

    def load(self, folder: Path) -> None:
        """Read the network."""
        weights = load_file(folder / WEIGHTS)
        self._style = weights[_STYLE].float().to(self.device)
        self._eye = make_ready(_read_eye(weights), self.device)

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into what is left of them as style."""
        features: Tensor = self._eye(pixel_values=pixels).pooler_output @ self._style
        return features


def _read_eye(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build CLIP's eye from weights under OpenAI's names; its sizes are read from them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    kernel = weights[f"{_TOWER}conv1.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    block = f"{_TOWER}transformer.resblocks."
    layers = 1 + max(
        int(name.removeprefix(block).split(".")[0]) for name in weights if name.startswith(block)
    )
    places = weights[f"{_TOWER}positional_embedding"].shape[0] - 1
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights[f"{block}0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
        model = CLIPVisionModel(config)
    # Some versions of transformers keep the eye one floor further down.
    floor = (
        "vision_model." if any(n.startswith("vision_model.") for n in model.state_dict()) else ""
    )
    renamed = {f"{floor}{name}": given for name, given in _rename(weights, layers).items()}
    return load_weights(model, renamed)


def _rename(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Give the eye's weights the names of transformers."""
    renamed = {
        "embeddings.class_embedding": weights[f"{_TOWER}class_embedding"],
        "embeddings.position_embedding.weight": weights[f"{_TOWER}positional_embedding"],
        "embeddings.patch_embedding.weight": weights[f"{_TOWER}conv1.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = weights[f"{_TOWER}ln_pre.{kind}"]
        renamed[f"post_layernorm.{kind}"] = weights[f"{_TOWER}ln_post.{kind}"]
    parts = {
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "attn.out_proj.": "self_attn.out_proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    for layer in range(layers):
        theirs, ours = f"{_TOWER}transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        renamed |= rename_block(weights, theirs, ours, parts, "attn.in_proj_", "self_attn.")
    return renamed
