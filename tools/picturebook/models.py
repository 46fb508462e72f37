"""The base model's parts: SDXL's classes, made small."""

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
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

from tools.picturebook.dataset import PICTURE_PX

LATENT_CHANNELS = 12
LATENT_PX = PICTURE_PX // 8
TEXT_WIDTH = 128
_TIME_ID_WIDTH = 32
# SDXL's noise schedule, taken on to a `beta_end` of 0.02. At SDXL's 0.012 a picture's mean colours
# are still seen in the last step, and drawing, which begins from noise without any, would choose
# too much of what is average: gray hair twice as often as there is. `clip_sample: false` and its
# two neighbours are not Euler's, but DDIM and PNDM built from this configuration obey them:
# clipped latents come out as green noise.
_SCHEDULER_CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def build_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 128 px to 16x16 latents of 12 channels, 1.7 M parameters.

    Twelve channels, for four cannot hold a face of 40 px; no attention in the middle, for it
    costs time and brings nothing at this size.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PICTURE_PX,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser, with SDXL's pooled-text and size conditioning.

    Text is attended to at 8 and 4 px; at 16 px, where it would cost most, it arrives with the
    time embedding, as a scale and a shift of every feature.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_PX,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(80, 128, 192),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoders(
    tokenizer: CLIPTokenizer,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build SDXL's two text encoders; they differ in activation, and the second is pooled."""

    def config(activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=TEXT_WIDTH,
        )

    return CLIPTextModel(config("quick_gelu")), CLIPTextModelWithProjection(config("gelu"))


def build_noise_schedule() -> DDPMScheduler:
    """Build the schedule that training adds noise by."""
    return DDPMScheduler.from_config(_SCHEDULER_CONFIG)


def assemble_pipeline(
    autoencoder: AutoencoderKL,
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """Put the parts together as a pipeline that draws with Euler steps unless told otherwise."""
    scheduler = EulerDiscreteScheduler.from_config(_SCHEDULER_CONFIG)
    # Euler keeps only its own keys; the others must reach the file for the other schedulers.
    scheduler.register_to_config(**_SCHEDULER_CONFIG)
    return StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
