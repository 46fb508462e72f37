"""Stable Diffusion XL at any size: encode, predict, train adapters on it, and sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from dreamloom.core.device import Runtime, send
from dreamloom.core.errors import BaseModelError
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.token_embeddings import gather_token_embeddings
from dreamloom.models.base import (
    NO_SAVINGS,
    AdapterSpec,
    Advice,
    BaseIdentity,
    Checkpointing,
    Conditioning,
    DropoutSeeds,
    Framing,
    Latents,
    MemoryOptions,
    Prediction,
    Sampler,
    Shot,
    WeightGroup,
)
from dreamloom.models.channels_last import fastest_layout
from dreamloom.models.fuse_adapters import fused_adapters, locate
from dreamloom.models.gradient_checkpointing import set_gradient_checkpointing
from dreamloom.models.guidance import guidance_options, scaling_unconditional
from dreamloom.models.loading import CHECKPOINT_SUFFIXES, load_source
from dreamloom.models.lora_branches import (
    ScheduledBranches,
    follow_timesteps,
    lora_branches,
    peft_branches,
)
from dreamloom.models.lora_schedule import Curve, LoraSchedule, Strength
from dreamloom.models.offload import CpuOffload
from dreamloom.models.peft_adapter import AttachedAdapter
from dreamloom.models.prompts import PromptEncoder, SDXLConditioning, split_alike
from dreamloom.models.quantization import Quantization
from dreamloom.models.quantized_layers import quantize_linears
from dreamloom.models.sampling_shortcuts import reusing_deep_levels
from dreamloom.models.schedule import NoiseSchedule, end_in_noise
from dreamloom.models.schedulers import check_steps, list_schedulers, make_scheduler
from dreamloom.models.token_embeddings import (
    AttachedTokenEmbeddings,
    refuse_other_words,
    start_embeddings,
)
from dreamloom.models.tokenizers import TEXT_ENCODERS, tokenize_text
from dreamloom.picturebook.class_prompts import choose_class_prompts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A UNet with fewer channels than this is a toy: it needs a longer reach and larger steps.
_FULL_SIZE_CHANNELS = 320


class SDXLFamily:
    """Loads anything that is an SDXL: by name, hub id, folder or checkpoint."""

    name = "sdxl"

    def recognises(self, base: str) -> bool:
        """Say whether ``base`` can name an SDXL."""
        return (
            base in {"picturebook", "sdxl"}
            or base.lower().endswith(CHECKPOINT_SUFFIXES)
            or Path(base).is_dir()
            or _HUB_ID.fullmatch(base) is not None
        )

    def load(
        self, base: str, runtime: Runtime, memory_options: MemoryOptions = NO_SAVINGS
    ) -> SDXLModel:
        """Load a base model; raises BaseModelError if it cannot be found or read."""
        reading = runtime
        if memory_options.quantization != "whole" and runtime.device.type == "cpu":
            # What is kept in fewer bits need not lie there in all of them first.
            reading = Runtime(runtime.device, torch.bfloat16)
        source = load_source(base, reading)
        identity = BaseIdentity(
            base, self.name, source.fingerprint, source.revision, source.earlier_fingerprint
        )
        return SDXLModel(source.pipeline, identity, runtime, source.notes, memory_options)


class SDXLModel:
    """A loaded SDXL behind the family contract; see `families.base.Model`."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        identity: BaseIdentity,
        runtime: Runtime,
        notes: tuple[str, ...] = (),
        memory_options: MemoryOptions = NO_SAVINGS,
        offload: type[CpuOffload] = CpuOffload,
    ) -> None:
        self.identity = identity
        self.runtime = runtime
        self.notes = notes
        self.memory_options = memory_options
        self._pipeline: Any = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self._components: dict[str, nn.Module] = {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
        for module in (*self._components.values(), pipeline.vae):
            module.requires_grad_(False).eval()
        if memory_options.quantization != "whole":
            quantization = memory_options.quantization
            quantize_linears(pipeline.unet, quantization, runtime.device)
            for name in TEXT_ENCODERS:
                kind: Quantization = "bf16" if quantization == "bf16" else "int8"
                quantize_linears(self._components[name], kind, runtime.device)
            # The rest may have been read in fewer bits than it computes in.
            for module in (*self._components.values(), pipeline.vae):
                module.to(runtime.dtype)
        self._offload = offload(
            {**self._components, "vae": pipeline.vae}, runtime.device, memory_options.cpu_offload
        )
        self._own_noise_schedule = {
            **pipeline.scheduler.config,
            "_class_name": type(pipeline.scheduler).__name__,
        }
        self._set_noise_schedule(self._own_noise_schedule)
        self.pixels_per_latent = int(pipeline.vae_scale_factor)
        self.latent_channels = int(pipeline.vae.config.latent_channels)
        self.advice = self._advise()
        self._attached: AttachedAdapter | None = None
        self._token_embeddings: AttachedTokenEmbeddings | None = None
        self._schedules = ScheduledBranches(pipeline, self._components, identity.name)
        self._prompts: PromptEncoder | None = None

    def _set_noise_schedule(self, config: dict[str, Any]) -> None:
        self._scheduler_config = config
        self._noise = NoiseSchedule(config)
        self.train_timesteps = self._noise.timesteps
        self.schedulers = tuple(list_schedulers(config))

    @property
    def prediction(self) -> Prediction:
        """What `target` is, as the base model's scheduler file says."""
        return self._noise.prediction

    @property
    def trains_text(self) -> bool:
        """Whether an attached adapter changes how prompts are encoded."""
        in_encoders = self._attached is not None and self._attached.spec.text_encoders
        return in_encoders or self._token_embeddings is not None

    def set_zero_terminal_snr(self, wanted: bool) -> None:
        """Take a noise schedule that ends in pure noise, see `end_in_noise`, or the base's own."""
        own = self._own_noise_schedule
        self._set_noise_schedule(end_in_noise(own) if wanted else own)

    def _advise(self) -> Advice:
        unet_config = self._pipeline.unet.config
        resolution_px = int(unet_config.sample_size) * self.pixels_per_latent
        if unet_config.block_out_channels[0] < _FULL_SIZE_CHANNELS:
            # The noisiest steps choose who is drawn; weighed less, only some show the subject.
            return Advice(
                resolution_px,
                guidance=4.0,
                learning_rate=2e-3,
                target_modules="all",
                weighting="debiased",
                choose_class_prompts=choose_class_prompts,
                caption_dropout=0.15,
                prior_target="base_prediction",
                final_scale=0.7,
            )
        return Advice(resolution_px, guidance=5.0, learning_rate=1e-4, target_modules="attention")

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "images 3 height width"]) -> Latents:
        """Encode pictures in [-1, 1]."""
        self._offload.load("vae", exclusive=True)
        vae = self._pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return Latents(posterior.mean.float() * scale, posterior.std.float() * scale)

    def encode_prompts(
        self, prompts: Sequence[str], weighted: bool = False, drop_empty: bool = False
    ) -> SDXLConditioning:
        """Encode prompts with both text encoders; with gradients only while text is trained."""
        has_gradients = self.trains_text and torch.is_grad_enabled()
        self._offload.load(*TEXT_ENCODERS, exclusive=not has_gradients)
        with nullcontext() if self.trains_text else torch.no_grad():
            encoded = self._prompt_encoder().encode(prompts, weighted)
        if drop_empty and self._pipeline.config.force_zeros_for_empty_prompt:
            encoded = encoded.zeroed([not prompt for prompt in prompts])
        return encoded.to(self.runtime.dtype)

    def note_prompts(self, prompts: Sequence[str], weighted: bool = False) -> list[str]:
        """Say which prompts are longer than the text encoders' input, or written otherwise."""
        return self._prompt_encoder().note(prompts, weighted)

    def _prompt_encoder(self) -> PromptEncoder:
        # Only a training asks for the same prompts again and again.
        return self._prompts or PromptEncoder(self._pipeline, self.runtime.device)

    def release_encoders(self) -> None:
        """Move autoencoder and text encoders off the GPU; those that are trained stay."""
        self._offload.unload("vae", *(() if self.trains_text else TEXT_ENCODERS))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix latents and noise; see `NoiseSchedule`."""
        return self._noise.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, velocity, flow or picture, as the base model's scheduler file says."""
        return self._noise.target(latents, noise, timesteps)

    def snr(self, timesteps: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        """Signal-to-noise ratio; see `NoiseSchedule`."""
        return self._noise.snr(timesteps)

    def predict(
        self,
        noisy: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
        conditioning: Conditioning,
        framings: Sequence[Framing],
        dropout: DropoutSeeds | None = None,
    ) -> Float[Tensor, "images channels height width"]:
        """Predict the target for each image, each with its own size and crop."""
        if not isinstance(conditioning, SDXLConditioning):
            raise TypeError(f"this family encodes its own prompts, got {type(conditioning)}")
        conditioning = conditioning.aligned()
        trained_encoders = TEXT_ENCODERS if self.trains_text and torch.is_grad_enabled() else ()
        self._offload.load("unet", *trained_encoders, exclusive=True)
        height, width = (side * self.pixels_per_latent for side in noisy.shape[-2:])
        time_ids = send(
            torch.tensor(
                [[*f.original_px, *f.crop_top_left_px, height, width] for f in framings],
                dtype=conditioning.pooled.dtype,
            ),
            noisy.device,
        )
        masks = self._attached.masks if self._attached is not None else None
        with masks.dropping(dropout) if masks and dropout else nullcontext():
            predicted: Tensor = self._pipeline.unet(
                noisy.to(self.runtime.dtype),
                self._noise.model_timesteps(timesteps),
                encoder_hidden_states=conditioning.tokens,
                added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": time_ids},
                return_dict=False,
            )[0]
        return predicted

    def attach_adapter(
        self,
        spec: AdapterSpec,
        gradient_checkpointing: Checkpointing = "none",
        compiled: bool = False,
    ) -> list[WeightGroup]:
        """Add a new adapter; ``gradient_checkpointing`` says what the backward pass recomputes."""
        # Adapters are made where the layers lie.
        trained_encoders = TEXT_ENCODERS if spec.text_encoders or spec.tokens else ()
        self._offload.load("unet", *trained_encoders, exclusive=True)
        words = start_embeddings(self._pipeline, spec.tokens)
        timesteps = self.train_timesteps
        self._attached = AttachedAdapter(self._components, spec, compiled, timesteps)
        weights = list(self._attached.weights)
        try:
            if words:
                self._token_embeddings = AttachedTokenEmbeddings(self._pipeline, words)
                weights.append(WeightGroup("tokens", self._token_embeddings.parameters()))
        except Exception:
            self.detach_adapter()
            raise
        self._prompts = PromptEncoder(self._pipeline, self.runtime.device)
        masks = self._attached.masks
        recompute = masks.checkpoint if masks else None
        set_gradient_checkpointing(self._pipeline.unet, gradient_checkpointing, recompute)
        return weights

    def load_adapter(self, adapter: Adapter) -> None:
        """Give the attached adapter a finished LoRA's weights and words."""
        attached = self._require_attached()
        refuse_other_words(adapter.tokens, attached.spec.tokens)
        attached.load(adapter)
        if self._token_embeddings is not None:
            self._token_embeddings.load(adapter.tokens)

    def read_adapter(self) -> Adapter:
        """Copy the attached adapter, scales folded in, and what kohya's format must know."""
        attached = self._require_attached()
        words = self._token_embeddings.read() if self._token_embeddings is not None else {}
        config = self._pipeline.unet.config
        attention = ["CrossAttn" in kind for kind in config.down_block_types]
        is_published = attention == [False, True, True] and config.layers_per_block == 2
        layout = "sdxl" if is_published else "other"
        return replace(attached.read(), tokens=words).with_metadata(
            **{"dreamloom.layout": layout, "dreamloom.prediction": self.prediction}
        )

    def _require_attached(self) -> AttachedAdapter:
        if self._attached is None:
            raise RuntimeError("no adapter is attached; call attach_adapter first")
        return self._attached

    def detach_adapter(self) -> None:
        """Remove the attached adapter."""
        if self._token_embeddings is not None:
            self._token_embeddings.detach()
            self._token_embeddings = None
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
        self._prompts = None
        set_gradient_checkpointing(self._pipeline.unet, "none")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Encode and predict without the attached adapter for a block."""
        with ExitStack() as stack:
            stack.enter_context(self._require_attached().off())
            if self._token_embeddings is not None:
                stack.enter_context(self._token_embeddings.off())
            yield

    @contextmanager
    def apply_adapters(self, parts: Sequence[tuple[Adapter, Strength]]) -> Iterator[None]:
        """Apply adapters at weights for a block.

        A float32 model takes plain weights' changes into its own. A half-precision one would
        round small changes away, and one stored in fewer bits has no weights to write into, so
        there they stay beside the weights, as everywhere do those that follow the steps of a
        drawing, or its timesteps.
        """
        parts = follow_timesteps(parts)
        scheduled = [(a, one) for a, one in parts if isinstance(one, LoraSchedule)]
        plain = [(a, weight) for a, weight in parts if not isinstance(weight, LoraSchedule)]
        strongest = [(a, one.curve.strongest) for a, one in scheduled] + plain
        words = gather_token_embeddings([a.tokens for a, weight in strongest if weight != 0])
        name = self.identity.name
        with ExitStack() as stack:
            stack.enter_context(self._schedules.added(scheduled))
            if self.runtime.dtype == torch.float32 and self.memory_options.quantization == "whole":
                stack.enter_context(fused_adapters(self._components, plain, name))
            else:
                others = [
                    (a, LoraSchedule(Curve.constant(w))) for a, w in plain if a.peft is not None
                ]
                stack.enter_context(lora_branches(self._components, others, name))
                # Of an adapter that only teaches words there is nothing to load.
                loras = [part for part in plain if part[0].layers]
                stack.enter_context(peft_branches(self._pipeline, self._components, loras, name))
            if words:
                stack.callback(AttachedTokenEmbeddings(self._pipeline, words).detach)
            yield

    def layers_of(self, adapter: Adapter) -> dict[str, nn.Module]:
        """Find the layers that an adapter changes."""
        return locate(self._components, adapter, self.identity.name)

    @contextmanager
    def recompute_activations(self) -> Iterator[None]:
        """Recompute activations in the backward passes of a block."""
        set_gradient_checkpointing(self._pipeline.unet, "full")
        try:
            yield
        finally:
            set_gradient_checkpointing(self._pipeline.unet, "none")

    def tokenize(self, text: str) -> dict[str, list[str]]:
        """Say what each text encoder's tokenizer makes of a text."""
        tokenizers = (self._pipeline.tokenizer, self._pipeline.tokenizer_2)
        return tokenize_text(dict(zip(TEXT_ENCODERS, tokenizers, strict=True)), text)

    def check_sampler(self, scheduler: str, steps: int) -> None:
        """Refuse what cannot be drawn; see `schedulers.check_steps`."""
        check_steps(scheduler, steps, self._scheduler_config)

    @torch.no_grad()
    def sample(
        self,
        shots: Sequence[Shot],
        sampler: Sampler,
        resolution_px: int | None = None,
        batch: int = 8,
        on_picture: OnProgress = no_progress,
    ) -> list[Image.Image]:
        """Draw one picture per shot; each starts from its own seed's noise on the CPU."""
        side = resolution_px or self.advice.resolution_px
        size_px = sampler.size_px or (side, side)
        self._pipeline.scheduler = make_scheduler(sampler.scheduler, self._scheduler_config)
        prompts = sorted({shot.prompt for shot in shots})
        encoded = self.encode_prompts(prompts, sampler.prompt_weights)
        negative = self._encode_negative(sampler)
        rows = [prompts.index(shot.prompt) for shot in shots]
        batch = min(batch, self.memory_options.drawn_at_once or batch)
        batches = split_alike(
            [encoded.lengths[row] if encoded.lengths else 0 for row in rows], batch
        )
        at_once = len(batches) if self.memory_options.cpu_offload else 1
        pictures: dict[int, Image.Image] = {}
        with fastest_layout(self._pipeline.unet, self._pipeline.vae):
            for start in range(0, len(batches), at_once):
                drawn, numbers = [], []
                for some in batches[start : start + at_once]:
                    chosen = encoded.take(torch.tensor([rows[number] for number in some]))
                    guidance = guidance_options(chosen, negative, sampler)
                    seeds = [shots[number].seed for number in some]
                    drawn.append(self._denoise(seeds, chosen, sampler, size_px, guidance))
                    numbers += some
                of = [shots[number] for number in numbers]
                pictures |= zip(numbers, self._decode(torch.cat(drawn), of), strict=True)
                on_picture(len(pictures), len(shots))
        return [pictures[number] for number in range(len(shots))]

    def _denoise(
        self,
        seeds: Sequence[int],
        chosen: SDXLConditioning,
        sampler: Sampler,
        size_px: tuple[int, int],
        guidance: dict[str, Any],
    ) -> Float[Tensor, "images channels height width"]:
        self._offload.load("unet", exclusive=True)
        with (
            self._schedules.followed(),
            reusing_deep_levels(self._pipeline, sampler.cache_interval),
            scaling_unconditional(self._pipeline, sampler.cfg_zero_star),
        ):
            # Original and target size, which SDXL is told, are those of the picture.
            latents: Tensor = self._pipeline(
                pooled_prompt_embeds=chosen.pooled,
                num_inference_steps=sampler.steps,
                height=size_px[0],
                width=size_px[1],
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="latent",
                **guidance,
            ).images
        return latents

    def _decode(
        self, latents: Float[Tensor, "images channels height width"], shots: Sequence[Shot]
    ) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for one, shot in zip(latents.split(1), shots, strict=True):
            self._refuse_broken(one, shot, "its denoiser")
            pixels = self.decode(one)
            self._refuse_broken(pixels, shot, "its autoencoder's decoder")
            pictures += self._pipeline.image_processor.postprocess(pixels)
        return pictures

    def _refuse_broken(self, drawn: Tensor, shot: Shot, part: str) -> None:
        """Refuse what would be a black picture, before anybody saves it or learns from it."""
        if not torch.isfinite(drawn).all():
            raise BaseModelError(
                f"What {self.identity.name} draws of “{shot.prompt}” with seed {shot.seed} is not "
                f"finite: {part} gives NaN or infinity.",
                "If an adapter is applied, lower its weight; in half precision, use "
                "--set precision=fp32; otherwise the base model itself is broken.",
            )

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "1 channels height width"]
    ) -> Float[Tensor, "1 3 height_px width_px"]:
        """Decode one picture to about [-1, 1]: several would need several times the memory."""
        self._offload.load("vae", exclusive=True)
        vae = self._pipeline.vae
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return pixels

    def _encode_negative(self, sampler: Sampler) -> SDXLConditioning | None:
        """Encode the prompt of guidance's unconditional half; None where zeros take its place.

        For an empty one most bases take zeros. The others encode it, without what belongs to the
        conditional half only.
        """
        is_zeros = self._pipeline.config.force_zeros_for_empty_prompt
        if sampler.guidance <= 1 or (not sampler.negative_prompt and is_zeros):
            return None
        with self._schedules.off_in_unconditional_text():
            return self.encode_prompts([sampler.negative_prompt], sampler.prompt_weights)
