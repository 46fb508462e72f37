"""The original layout of SDXL's checkpoints, written out: what other programs save.

Our own code reads it and does not write it, but for baking into a checkpoint that is there.
"""

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def rename(inner: str, names: dict[str, str]) -> str:
    """Replace the layer's name before `.weight` or `.bias`."""
    layer, _, kind = inner.rpartition(".")
    return f"{names.get(layer, layer)}.{kind}"


def original_unet(state: State, layers_per_block: int = 2) -> State:
    per_block = layers_per_block + 1
    with_attention = {name.split(".")[1] for name in state if name.startswith("up_blocks.")}
    with_attention &= {
        name.split(".")[1] for name in state if ".attentions." in name and name[:2] == "up"
    }
    found = {}
    for name, weight in state.items():
        place, _, inner = name.partition(".")
        if place in {"down_blocks", "up_blocks"}:
            block, kind, number, inner = inner.split(".", 3)
            start = int(block) * per_block
            side = "input_blocks" if place == "down_blocks" else "output_blocks"
            at = start + int(number) + (place == "down_blocks")
            if kind == "resnets":
                new = f"{side}.{at}.0.{rename(inner, _RESNET)}"
            elif kind == "attentions":
                new = f"{side}.{at}.1.{inner}"
            elif kind == "downsamplers":
                new = f"{side}.{start + per_block}.0.{inner.replace('conv.', 'op.')}"
            else:
                slot = 2 if block in with_attention else 1
                new = f"{side}.{start + layers_per_block}.{slot}.{inner}"
        elif place == "mid_block":
            kind, number, inner = inner.split(".", 2)
            if kind == "resnets":
                new = f"middle_block.{2 * int(number)}.{rename(inner, _RESNET)}"
            else:
                new = f"middle_block.1.{inner}"
        else:
            new = rename(name, _UNET_ENDS)
        found[f"model.diffusion_model.{new}"] = weight
    return found


def original_vae(state: State, levels: int = 4) -> State:
    found = {}
    for name, weight in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        parts = new.split(".")
        if parts[1] in {"down_blocks", "up_blocks"}:
            level = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
            way, step = ("down", "downsample") if parts[1] == "down_blocks" else ("up", "upsample")
            rest = f"block.{parts[4]}" if parts[3] == "resnets" else step
            new = f"{parts[0]}.{way}.{level}.{rest}.{'.'.join(parts[5:])}"
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            new = f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
        elif parts[1] == "mid_block":
            inner = ".".join(parts[4:])
            new = f"{parts[0]}.mid.attn_1.{rename(inner, _VAE_ATTENTION)}"
            if weight.ndim == 2:
                weight = weight[:, :, None, None]
        found[f"first_stage_model.{new}"] = weight
    return found


def original_clip(state: State) -> State:
    found = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": weight
        for name, weight in state.items()
    }
    # Checkpoints carry this buffer of older releases along.
    found["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(
        77
    )[None]
    return found


def original_open_clip(state: State) -> State:
    found: State = {"logit_scale": torch.zeros(())}
    for name, weight in state.items():
        inner = name.removeprefix("text_model.")
        if inner.startswith("encoder.layers."):
            number, inner = inner.removeprefix("encoder.layers.").split(".", 1)
            layer = f"transformer.resblocks.{number}"
            if "q_proj" in inner:
                kind = inner.rpartition(".")[2]
                three = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"{layer}.attn.in_proj_{kind}"] = torch.cat(three)
            elif "k_proj" not in inner and "v_proj" not in inner:
                found[f"{layer}.{rename(inner, _OPEN_CLIP)}"] = weight
        elif inner.startswith("embeddings.position"):
            found["positional_embedding"] = weight
        elif inner == "text_projection.weight":
            found["text_projection"] = weight.T
        else:
            new = inner.replace("final_layer_norm", "ln_final").removeprefix("embeddings.")
            found[new] = weight
    return {f"conditioner.embedders.1.model.{name}": weight for name, weight in found.items()}


def original_layout(
    unet: nn.Module, vae: nn.Module, clip: nn.Module, open_clip: nn.Module
) -> State:
    return (
        original_unet(unet.state_dict())
        | original_vae(vae.state_dict())
        | original_clip(clip.state_dict())
        | original_open_clip(open_clip.state_dict())
    )
