"""A Stable Diffusion XL small enough for tests: the real classes with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

RESOLUTION_PX = 64
"""The model's own resolution: 8 latents a side, each of 8 pixels."""

TOKENS = 77
"""The length of a prompt in tokens, as in SDXL."""

_WORDS = ("a", "photo", "of", "person", "dog", "in", "the", "snow", "painting")
_START, _END = "<|startoftext|>", "<|endoftext|>"

# As in the scheduler file of stabilityai/stable-diffusion-xl-base-1.0. Euler itself does not know
# all of these keys; the schedulers that are made from this configuration do.
_SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def make_tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """Save a randomly initialised SDXL pipeline in diffusers' layout and return its folder.

    It has SDXL's structure: two text encoders of different widths, pooled text and time ids, a
    U-Net whose attention begins at the second level and grows deeper below, two layers a block,
    4 latent channels and 8x downsampling. Two calls with one seed give the same weights.
    """
    tokenizer, tokenizer_2 = _tokenizer(pad=_END), _tokenizer(pad="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, width=32, layers=2, act="quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(
            _text_config(tokenizer_2, width=48, layers=3, act="gelu")
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(prompt_width=32 + 48, pooled_width=48),
            scheduler=EulerDiscreteScheduler.from_config(_SCHEDULER),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer(pad: str) -> CLIPTokenizer:
    """Build a byte-level BPE in CLIP's form: all bytes, a merge chain per word, special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [f"{byte}</w>" for byte in alphabet]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            left, right = pieces[:2]
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            pieces = [left + right, *pieces[2:]]
    numbered = {token: number for number, token in enumerate([*vocabulary, _START, _END])}
    return CLIPTokenizer(numbered, merges, pad_token=pad, model_max_length=TOKENS)


def _text_config(tokenizer: CLIPTokenizer, *, width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(prompt_width: int, pooled_width: int) -> UNet2DConditionModel:
    time_width = 8
    return UNet2DConditionModel(
        sample_size=RESOLUTION_PX // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=prompt_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + pooled_width,
        norm_num_groups=8,
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION_PX,
        scaling_factor=0.13025,
        force_upcast=True,
    )
