"""An SDXL of about 98 M parameters or of its real size with random weights, and pictures.

The small one has SDXL's structure at a fifth of its width: transformers of 1, 2 and 10 layers,
heads of 64 channels, two text encoders, pooled text and time ids. Where SDXL is wide, its layers
take longer for what they compute; here more of the time goes to calling them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dreamloom.models import sdxl_configs
from dreamloom.models.meta_model import make_meta_model

_WORDS = ("a", "photo", "of", "person", "rraj")


def make_small_sdxl(folder: Path, seed: int = 0, text_layers: int = 4) -> Path:
    """Save the model in diffusers' layout, unless it is there already; return its folder.

    Args:
        folder: Where.
        seed: Of the weights.
        text_layers: How deep the first text encoder is; SDXL's has 12.
    """
    if (folder / "model_index.json").exists():
        return folder
    tokenizer, tokenizer_2 = sdxl_configs.make_tokenizers(_merge_words())
    schedule = EulerDiscreteScheduler.load_config(sdxl_configs.FOLDER, subfolder="scheduler")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        StableDiffusionXLPipeline(
            vae=_make_autoencoder(),
            text_encoder=CLIPTextModel(_describe_text(tokenizer, 96, text_layers, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_describe_text(tokenizer_2, 160, 8, "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_make_unet(prompt_width=96 + 160, pooled_width=160),
            scheduler=EulerDiscreteScheduler.from_config(schedule),
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def make_real_sdxl(folder: Path) -> Path:
    """Save SDXL at its real size with random weights, 6.5 GiB in fp16, unless it is there."""
    if not (folder / "model_index.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make_meta_model(torch.float16).save_pretrained(folder)
    return folder


def write_single_file(base: Path, file: Path) -> None:
    """Write a base model as a checkpoint in the original layout, in fp16."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from original_layout import original_layout

    pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float16)
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    state = original_layout(*(getattr(pipeline, name) for name in names))
    save_file({name: weight.contiguous() for name, weight in state.items()}, file)


def make_pictures(folder: Path, count: int, side_px: int, seed: int) -> Path:
    """Write square pictures of shapes and grain; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        grain = rng.normal(0, 20, (side_px, side_px, 3)) + rng.integers(60, 200, 3)
        picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for _ in range(6):
            left, top = rng.integers(0, side_px * 3 // 4, 2)
            width, height = rng.integers(side_px // 8, side_px // 2, 2)
            colour = tuple(int(part) for part in rng.integers(0, 256, 3))
            pen.ellipse((left, top, left + width, top + height), fill=colour)
        picture.save(folder / f"{number}.png")
    return folder


def _merge_words() -> list[tuple[str, str]]:
    """List the merges that put the words of the prompts together, letter by letter."""
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def _describe_text(tokenizer: CLIPTokenizer, width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _make_unet(prompt_width: int, pooled_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=prompt_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + pooled_width,
    )


def _make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
        scaling_factor=0.13025,
        force_upcast=True,
    )
