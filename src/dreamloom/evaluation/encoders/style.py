"""CSD: in which style a picture is made, whatever it shows."""

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
    make_ready,
    name_by_weights,
    require_all,
    steady,
    unit_rows,
)
from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING, Preprocessing

_HEAD_WIDTH = 64  # CLIP gives each head of attention 64 features, whatever the size
_STYLE = "last_layer_style"
_TOWER = "backbone."


class CsdEncoder:
    """The style half of CSD: a CLIP's eye with a projection that keeps style and drops content.

    Source: Somepalli et al. 2024, "Measuring Style Similarity in Diffusion Models", section 4.

    Args:
        folder: Holds model.safetensors under the names of CSD's authors: ``backbone.…`` as OpenAI
            names the parts of CLIP's eye, and ``last_layer_style``.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: CLIP's unless told otherwise.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    may_miss = False

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing = CLIP_PREPROCESSING,
        device: torch.device | str = "cpu",
    ) -> None:
        self._preprocessing = preprocessing
        self._device = torch.device(device)
        with explaining(folder):
            weights = load_file(folder / WEIGHTS)
            self._style = weights[_STYLE].float().to(self._device)
            self._eye = make_ready(_read_eye(weights), self._device)
        self.key = f"{name or name_by_weights(folder)}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        pixels = self._preprocessing(images).to(self._device)
        with steady(self._device):
            return unit_rows(self._eye(pixel_values=pixels).pooler_output @ self._style)


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
    require_all([name for name in model.state_dict() if name not in renamed])
    model.load_state_dict(renamed)
    assert isinstance(model, nn.Module)
    return model


def _rename(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Give the eye's weights the names of transformers; query, key and value come apart."""
    renamed = {
        "embeddings.class_embedding": weights[f"{_TOWER}class_embedding"],
        "embeddings.position_embedding.weight": weights[f"{_TOWER}positional_embedding"],
        "embeddings.patch_embedding.weight": weights[f"{_TOWER}conv1.weight"],
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = weights[f"{_TOWER}ln_pre.{kind}"]
        renamed[f"post_layernorm.{kind}"] = weights[f"{_TOWER}ln_post.{kind}"]
        for layer in range(layers):
            block = f"{_TOWER}transformer.resblocks.{layer}"
            for theirs, ours in parts.items():
                renamed[f"encoder.layers.{layer}.{ours}.{kind}"] = weights[
                    f"{block}.{theirs}.{kind}"
                ]
            together = weights[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for letter, given in zip("qkv", together, strict=True):
                renamed[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = given
    return renamed
