"""The tiny base model has the structure that the tests rely on."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from tiny import RESOLUTION_PX, TOKENS, make_tiny_sdxl


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_draws_at_its_own_resolution(pipeline):
    picture = pipeline("a photo of rraj person", num_inference_steps=2).images[0]
    assert picture.size == (RESOLUTION_PX, RESOLUTION_PX)


def test_it_has_the_structure_of_sdxl(pipeline):
    unet = pipeline.unet.config
    widths = [pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size]
    assert len(set(widths)) == 2
    assert unet.cross_attention_dim == sum(widths)
    assert unet.addition_embed_type == "text_time"
    assert unet.down_block_types == ["DownBlock2D"] + 2 * ["CrossAttnDownBlock2D"]
    assert pipeline.vae.config.latent_channels == unet.in_channels == 4
    assert pipeline.vae_scale_factor == 8


def test_its_tokenizers_pad_like_those_of_sdxl(pipeline):
    first, second = pipeline.tokenizer, pipeline.tokenizer_2
    assert first.model_max_length == second.model_max_length == TOKENS
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert first.decode(first("a photo of rraj person").input_ids, skip_special_tokens=True) == (
        "a photo of rraj person"
    )


def test_its_scheduler_file_keeps_what_other_schedulers_need(pipeline):
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert ddim.config.clip_sample is False
    assert ddim.config.set_alpha_to_one is False


def test_its_weights_follow_the_seed_alone(tiny_sdxl, tmp_path):
    before = torch.random.get_rng_state()
    again = make_tiny_sdxl(tmp_path / "again")
    other = make_tiny_sdxl(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (tiny_sdxl / weights).read_bytes()
    assert (other / weights).read_bytes() != (tiny_sdxl / weights).read_bytes()
