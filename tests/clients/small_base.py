"""A random SDXL of the true blocks and depths but tiny widths, and changes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreamloom.lora.sdxl_layers import respell_text, sdxl_layers

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
BASE_FILE = "base.safetensors"
_TEXT_WIDTHS = (32, 48)


def build_components() -> dict[str, nn.Module]:
    """Build the three parts as diffusers and transformers have them, from one seed."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=sum(_TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTHS[1],
        use_linear_projection=True,
    )
    first, second = (
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
        for width, layers in zip(_TEXT_WIDTHS, (12, 32), strict=True)
    )
    texts = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    return {"unet": unet.eval(), "text_encoder": texts[0].eval(), "text_encoder_2": texts[1].eval()}


def list_layers(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """List SDXL's layers in models of diffusers and transformers, by DreamLoom's names."""
    found = {
        respell_text(f"{component}.{name}"): module
        for component, model in components.items()
        for name, module in model.named_modules()
    }
    return {name: found[name] for name in sdxl_layers()}


def save_base(folder: Path) -> dict[str, Tensor]:
    """Write the weights of all layers by their names; return them."""
    layers = list_layers(build_components())
    weights = {name: module.weight.detach().contiguous() for name, module in layers.items()}
    save_file(weights, folder / BASE_FILE)
    return weights


def load_base(folder: Path) -> dict[str, Tensor]:
    """Read the weights of all layers by their names."""
    return load_file(folder / BASE_FILE)


def shrink_layers(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Give the layers of a program's own full-size model, built without weights, the small ones.

    Only the numbers of channels change: which layers there are, and how they are called, stays the
    program's own.
    """
    for name, module in layers.items():
        weight = weights[name]
        sides = ("out_features", "in_features")
        if weight.ndim > 2:
            sides = ("out_channels", "in_channels")
        for side, count in zip(sides, weight.shape, strict=False):
            setattr(module, side, count)
        module.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if module.bias is not None:
            module.bias = nn.Parameter(torch.zeros(weight.shape[0]), requires_grad=False)


def probe_change(
    forward: Callable[[Tensor], Tensor], layer: nn.Module, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Measure how a wrapped layer's forward pass differs from the layer's own, as a weight.

    A linear layer gets the unit vectors. A convolution gets them where exactly one window sees the
    whole of each, whatever the stride.

    Args:
        forward: What the program computes in the layer's place.
        layer: The layer; its parameters may be gone.
        weight: The weight that it had.
        bias: The bias that it had.
    """
    if weight.ndim == 2:
        inputs = torch.eye(weight.shape[1])
        return (forward(inputs) - nn.functional.linear(inputs, weight, bias)).T
    pad, stride = layer.padding[0], layer.stride[0]
    units = torch.eye(weight[0].numel()).view(-1, *weight.shape[1:])
    inputs = nn.functional.pad(units, (pad,) * 4)
    place = 2 * pad // stride
    plain = nn.functional.conv2d(inputs, weight, bias, stride, pad)
    return (forward(inputs) - plain)[:, :, place, place].T.reshape(weight.shape)


def wrap_first_encoder(encoder: nn.Module) -> nn.Module:
    """Put the first text encoder into the wrapper that transformers 5 took off it.

    Programs that were made for transformers 4 name its layers by that.
    """
    if hasattr(encoder, "text_model"):
        return encoder
    wrapper = nn.Module()
    wrapper.text_model = encoder
    return wrapper


def build_tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Hang the denoiser's layers into a tree by Stability AI's names, as kohya's programs do."""
    root = nn.Module()
    for name, layer in sdxl_layers().items():
        if not layer.stability:
            continue
        *path, last = layer.stability.split(".")
        place = root
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place._modules[step]
        place.add_module(last, layers[name])
    return root
