"""A meta model: SDXL of any size without weights, its real modules, to count what they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dreamloom.models import sdxl_configs


def make_meta_model(dtype: torch.dtype, folder: Path | None = None) -> StableDiffusionXLPipeline:
    """Build a pipeline from its configurations; its weights are whatever torch initialises.

    Within torch's ``FakeTensorMode`` that is nothing: a full-size SDXL is built in a second and
    weighs nothing. Elsewhere weights are random, which does for speed and memory.

    Args:
        dtype: The precision of all weights.
        folder: A folder in diffusers' layout; by default SDXL base 1.0's configuration, which
            comes with this package.
    """
    source = folder or sdxl_configs.FOLDER
    first, second = (
        sdxl_configs.make_tokenizers()
        if folder is None
        else [CLIPTokenizer.from_pretrained(folder / one) for one in ("tokenizer", "tokenizer_2")]
    )
    schedule = EulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    with _made_in(dtype):
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config(AutoencoderKL.load_config(source, subfolder="vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(source / "text_encoder")),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(source / "text_encoder_2")
            ),
            tokenizer=first,
            tokenizer_2=second,
            unet=UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(source, subfolder="unet")
            ),
            scheduler=EulerDiscreteScheduler.from_config(schedule),
            add_watermarker=False,
        )


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in a precision at once: casting them afterwards would need both at a time."""
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(earlier)
