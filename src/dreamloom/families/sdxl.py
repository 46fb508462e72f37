"""Stable Diffusion XL, at any size: the published model, its fine-tunes, and picturebook."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from dreamloom.adapters import Adapter
from dreamloom.families import lora
from dreamloom.families.base import (
    Advice,
    BaseIdentity,
    Conditioning,
    Framing,
    Latents,
    LoraSpec,
    OnPicture,
    Sampler,
    Shot,
    nothing,
)
from dreamloom.families.schedulers import LATENT_DEFAULTS, SCHEDULERS, make_scheduler
from dreamloom.families.sources import load_source
from dreamloom.runtime import Runtime

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A UNet with fewer channels than this is a toy: it needs a longer reach and larger steps.
_FULL_SIZE_CHANNELS = 320


@dataclass(frozen=True)
class SDXLConditioning:
    """Token embeddings of both text encoders, and the second one's pooled embedding."""

    tokens: Float[Tensor, "prompts tokens features"]
    pooled: Float[Tensor, "prompts pooled"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Int[Tensor, " n"]) -> SDXLConditioning:
        """Select prompts by index."""
        rows = rows.to(self.tokens.device)
        return SDXLConditioning(self.tokens[rows], self.pooled[rows])


class SDXLFamily:
    """Loads anything that is an SDXL: by name, hub id, folder or checkpoint."""

    name = "sdxl"

    def recognises(self, base: str) -> bool:
        """Say whether ``base`` can name an SDXL."""
        return (
            base in {"picturebook", "sdxl"}
            or base.endswith(".safetensors")
            or Path(base).is_dir()
            or _HUB_ID.fullmatch(base) is not None
        )

    def load(self, base: str, runtime: Runtime) -> SDXLModel:
        """Load a base model; raises BaseModelError if it cannot be found or read."""
        source = load_source(base, runtime)
        identity = BaseIdentity(base, self.name, source.fingerprint, source.revision)
        return SDXLModel(source.pipeline, identity, runtime)


class SDXLModel:
    """A loaded SDXL behind the family contract; see `families.base.Model`."""

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, identity: BaseIdentity, runtime: Runtime
    ) -> None:
        self.identity = identity
        self.runtime = runtime
        self.schedulers = tuple(SCHEDULERS)
        self._pipeline: Any = pipeline.to(runtime.device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._components: dict[str, nn.Module] = {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
        for module in (*self._components.values(), pipeline.vae):
            module.requires_grad_(False).eval()
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._training = DDPMScheduler.from_config(self._scheduler_config, **LATENT_DEFAULTS)
        self.train_timesteps = int(self._training.config["num_train_timesteps"])
        self.pixels_per_latent = int(pipeline.vae_scale_factor)
        self.advice = self._advise()
        self._lora_scale = 1.0

    def _advise(self) -> Advice:
        unet_config = self._pipeline.unet.config
        resolution_px = int(unet_config.sample_size) * self.pixels_per_latent
        if unet_config.block_out_channels[0] < _FULL_SIZE_CHANNELS:
            return Advice(resolution_px, guidance=4.0, learning_rate=2e-3, reach="all")
        return Advice(resolution_px, guidance=5.0, learning_rate=1e-4, reach="attention")

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "images 3 height width"]) -> Latents:
        """Encode pictures in [-1, 1]."""
        vae = self._pipeline.vae.to(self.runtime.device)
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return Latents(posterior.mean.float() * scale, posterior.std.float() * scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> SDXLConditioning:
        """Encode prompts with both text encoders."""
        self._gather()
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            list(prompts), device=self.runtime.device, do_classifier_free_guidance=False
        )
        return SDXLConditioning(tokens, pooled)

    def release_encoders(self) -> None:
        """Move autoencoder and text encoders off the GPU; they come back when needed."""
        for module in (
            self._pipeline.vae,
            self._pipeline.text_encoder,
            self._pipeline.text_encoder_2,
        ):
            module.to("cpu")
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gather(self) -> None:
        self._pipeline.to(self.runtime.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix latents and noise: sqrt(a) x + sqrt(1 - a) e (DDPM, arXiv:2006.11239, Eq. 4)."""
        mixed: Tensor = self._training.add_noise(latents, noise, timesteps)
        return mixed

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, the velocity or the picture, as the base model's scheduler file says."""
        kind = self._training.config["prediction_type"]
        if kind == "v_prediction":
            velocity: Tensor = self._training.get_velocity(latents, noise, timesteps)
            return velocity
        return noise if kind == "epsilon" else latents

    def snr(self, timesteps: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        """Signal-to-noise ratio, a / (1 - a)."""
        signal: Tensor = self._training.alphas_cumprod.to(timesteps.device)[timesteps]
        return signal / (1 - signal)

    def predict(
        self,
        noisy: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
        conditioning: Conditioning,
        framings: Sequence[Framing],
    ) -> Float[Tensor, "images channels height width"]:
        """Predict the target for each image, each with its own size and crop."""
        if not isinstance(conditioning, SDXLConditioning):
            raise TypeError(f"this family encodes its own prompts, got {type(conditioning)}")
        height, width = (side * self.pixels_per_latent for side in noisy.shape[-2:])
        time_ids = torch.tensor(
            [[*f.original_px, *f.crop_top_left_px, height, width] for f in framings],
            dtype=conditioning.pooled.dtype,
            device=noisy.device,
        )
        predicted: Tensor = self._pipeline.unet(
            noisy.to(self.runtime.dtype),
            timesteps,
            encoder_hidden_states=conditioning.tokens,
            added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return predicted

    def attach_lora(self, spec: LoraSpec, save_memory: bool = False) -> list[nn.Parameter]:
        """Add a new adapter; with ``save_memory``, activations are recomputed in the backward."""
        weights = lora.attach(self._pipeline.unet, spec)
        self._lora_scale = spec.alpha / spec.rank
        if save_memory:
            self._pipeline.unet.enable_gradient_checkpointing()
            # Checkpointing acts only in training mode; SDXL's UNet has no dropout to mind.
            self._pipeline.unet.train()
        return weights

    def read_lora(self) -> Adapter:
        """Copy the attached adapter, scale folded in."""
        return Adapter(lora.read(self._pipeline.unet, self._lora_scale))

    def detach_lora(self) -> None:
        """Remove the attached adapter."""
        self._pipeline.unet.unload_lora()
        self._pipeline.unet.disable_gradient_checkpointing()
        self._pipeline.unet.eval()

    @contextmanager
    def lora_off(self) -> Iterator[None]:
        """Predict without the attached adapter for a block."""
        self._pipeline.unet.disable_adapters()
        try:
            yield
        finally:
            self._pipeline.unet.enable_adapters()

    @contextmanager
    def wear(self, parts: Sequence[tuple[Adapter, float]]) -> Iterator[None]:
        """Wear adapters at weights for a block.

        A float32 model takes the updates into its weights. A half-precision one would round
        small updates away, so there they stay beside the weights.
        """
        if self.runtime.dtype == torch.float32:
            with lora.folded(self._components, parts, self.identity.name):
                yield
            return
        for adapter, _ in parts:
            lora.locate(self._components, adapter, self.identity.name)
        names = [f"part{i}" for i in range(len(parts))]
        try:
            with warnings.catch_warnings():
                # PEFT warns whenever a second adapter joins the first, which is meant here.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                for name, (adapter, _) in zip(names, parts, strict=True):
                    self._pipeline.load_lora_weights(lora.as_state_dict(adapter), adapter_name=name)
            if names:
                self._pipeline.set_adapters(names, [weight for _, weight in parts])
            yield
        finally:
            self._pipeline.unload_lora_weights()

    @torch.no_grad()
    def sample(
        self,
        shots: Sequence[Shot],
        sampler: Sampler,
        resolution_px: int | None = None,
        batch: int = 8,
        on_picture: OnPicture = nothing,
    ) -> list[Image.Image]:
        """Draw one picture per shot; each starts from its own seed's noise on the CPU."""
        self._gather()
        side = resolution_px or self.advice.resolution_px
        self._pipeline.scheduler = make_scheduler(sampler.scheduler, self._scheduler_config)
        prompts = sorted({shot.prompt for shot in shots})
        encoded = self.encode_prompts(prompts)
        pictures: list[Image.Image] = []
        for start in range(0, len(shots), batch):
            some = shots[start : start + batch]
            chosen = encoded.take(torch.tensor([prompts.index(shot.prompt) for shot in some]))
            pictures += self._pipeline(
                prompt_embeds=chosen.tokens,
                pooled_prompt_embeds=chosen.pooled,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance,
                height=side,
                width=side,
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in some],
            ).images
            on_picture(len(pictures), len(shots))
        return pictures
