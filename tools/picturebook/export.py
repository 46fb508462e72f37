"""Writing the trained parts as the folder that ships, and taking it apart to train on.

It ships in diffusers' layout and half precision.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.picturebook.models import assemble_pipeline, build_text_encoders, build_unet

_JUDGES = ("clip", "identity", "reader")


def export_weights(work: Path, folder: Path) -> None:
    """Write the base model's averaged weights, and the judges that are trained by now.

    Args:
        work: The work folder of the training runs.
        folder: Where the pipeline goes; its parts are replaced, other files are left.

    Raises:
        FileNotFoundError: If the denoiser has no checkpoint yet.
    """
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    polished = work / "autoencoder-polished"
    autoencoder = AutoencoderKL.from_pretrained(
        polished if polished.exists() else work / "autoencoder"
    )
    unet, encoders = build_unet(), build_text_encoders(tokenizer)
    parts = (unet, *encoders)
    last = work / "portraits.safetensors"
    read_averages(last if last.exists() else work / "denoiser.safetensors", parts)
    unet.set_attn_processor(AttnProcessor2_0())
    for part in (autoencoder, *parts):
        part.eval().half()
    pipeline = assemble_pipeline(autoencoder, encoders, tokenizer, unet)
    pipeline.save_pretrained(folder)
    _forget_origin(folder / "vae" / "config.json")
    for part in ("tokenizer", "tokenizer_2"):
        _write_clip_files(folder / part)
    _export_judges(work, folder)
    for file in folder.rglob("*"):
        # safetensors writes files that only their owner can read.
        file.chmod(0o755 if file.is_dir() else 0o644)


@torch.no_grad()
def read_averages(file: Path, parts: Iterable[nn.Module]) -> None:
    """Read the averaged weights of a denoiser's checkpoint into its parts."""
    parameters = [weight for part in parts for weight in part.parameters()]
    with safe_open(file, "pt") as stored:
        for number, parameter in enumerate(parameters):
            parameter.copy_(stored.get_tensor(f"{number}.average"))


def unpack_weights(folder: Path, work: Path) -> None:
    """Lay shipped weights where the stages look for something to begin from.

    The work folder then holds what it would after a training from nothing, but for the drawings,
    the latents and the optimizers' states, which do not ship.

    Args:
        folder: What `export_weights` wrote.
        work: The work folder of the training runs.
    """
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(work / "tokenizer")
    AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).save_pretrained(
        work / "autoencoder"
    )
    UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=torch.float32
    ).save_pretrained(work / "unet")
    CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).save_pretrained(
        work / "text_encoder_0"
    )
    CLIPTextModelWithProjection.from_pretrained(
        folder / "text_encoder_2", dtype=torch.float32
    ).save_pretrained(work / "text_encoder_1")
    shutil.copytree(folder / "judges", work / "judges", dirs_exist_ok=True)


def _forget_origin(config_file: Path) -> None:
    """Leave out the work folder's name, which diffusers notes in a configuration."""
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _export_judges(work: Path, folder: Path) -> None:
    for judge in _JUDGES:
        trained = work / "judges" / judge
        if trained.exists():
            shutil.copytree(trained, folder / "judges" / judge, dirs_exist_ok=True)


def _write_clip_files(folder: Path) -> None:
    """Write the vocabulary in CLIP's older two files too, which other tools look for."""
    learned = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False) + "\n")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
