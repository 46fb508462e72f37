"""Stable Diffusion XL at any size: encode, predict, train adapters on it, and sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from dreamloom.core.device import Runtime, send
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
from dreamloom.models.loading import CHECKPOINT_SUFFIXES, load_source
from dreamloom.models.lora_branches import ScheduledBranches, lora_branches, peft_branches
from dreamloom.models.lora_schedule import Curve, LoraSchedule, Strength
from dreamloom.models.offload import CpuOffload
from dreamloom.models.peft_adapter import AttachedAdapter
from dreamloom.models.quantized_layers import quantize_linears
from dreamloom.models.sampling_shortcuts import IntervalGuidance, reusing_deep_levels
from dreamloom.models.schedule import NoiseSchedule, end_in_noise
from dreamloom.models.schedulers import check_steps, list_schedulers, make_scheduler
from dreamloom.models.text_encoder_training import TextEncoderTraining
from dreamloom.models.token_embeddings import AttachedTokenEmbeddings, start_embeddings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A UNet with fewer channels than this is a toy: it needs a longer reach and larger steps.
_FULL_SIZE_CHANNELS = 320
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class SDXLConditioning:
    """Token embeddings of both text encoders, and the second one's pooled embedding."""

    tokens: Float[Tensor, "prompts tokens features"]
    pooled: Float[Tensor, "prompts pooled"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Int[Tensor, " n"]) -> SDXLConditioning:
        """Select prompts by index."""
        rows = send(rows, self.tokens.device)
        return SDXLConditioning(self.tokens[rows], self.pooled[rows])


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
        source = load_source(base, runtime)
        identity = BaseIdentity(base, self.name, source.fingerprint, source.revision)
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
            quantize_linears(pipeline.unet, memory_options.quantization, runtime.device)
            for name in _TEXT_ENCODERS:
                quantize_linears(self._components[name], "int8", runtime.device)
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
        self._text_training: TextEncoderTraining | None = None

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
            # The noisiest steps choose who is drawn. Without more weight on them, few updates leave
            # that choice to the base model, and only some pictures show the subject.
            return Advice(
                resolution_px,
                guidance=4.0,
                learning_rate=2e-3,
                target_modules="all",
                weighting="debiased",
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

    def encode_prompts(self, prompts: Sequence[str]) -> SDXLConditioning:
        """Encode prompts with both text encoders; with gradients only while text is trained."""
        with_gradients = self.trains_text and torch.is_grad_enabled()
        self._offload.load(*_TEXT_ENCODERS, exclusive=not with_gradients)
        if with_gradients and self._text_training is not None:
            tokens, pooled = self._text_training.encode(prompts, self.runtime.device)
        else:
            with nullcontext() if self.trains_text else torch.no_grad():
                tokens, _, pooled, _ = self._pipeline.encode_prompt(
                    list(prompts), device=self.runtime.device, do_classifier_free_guidance=False
                )
        return SDXLConditioning(tokens.to(self.runtime.dtype), pooled.to(self.runtime.dtype))

    def release_encoders(self) -> None:
        """Move autoencoder and text encoders off the GPU; those that are trained stay."""
        self._offload.unload("vae", *(() if self.trains_text else _TEXT_ENCODERS))

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
    ) -> Float[Tensor, "images channels height width"]:
        """Predict the target for each image, each with its own size and crop."""
        if not isinstance(conditioning, SDXLConditioning):
            raise TypeError(f"this family encodes its own prompts, got {type(conditioning)}")
        trained_encoders = _TEXT_ENCODERS if self.trains_text and torch.is_grad_enabled() else ()
        self._offload.load("unet", *trained_encoders, exclusive=True)
        height, width = (side * self.pixels_per_latent for side in noisy.shape[-2:])
        time_ids = send(
            torch.tensor(
                [[*f.original_px, *f.crop_top_left_px, height, width] for f in framings],
                dtype=conditioning.pooled.dtype,
            ),
            noisy.device,
        )
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
        trained_encoders = _TEXT_ENCODERS if spec.text_encoders or spec.tokens else ()
        self._offload.load("unet", *trained_encoders, exclusive=True)
        words = start_embeddings(self._pipeline, spec.tokens)
        self._attached = AttachedAdapter(self._components, spec, compiled)
        weights = list(self._attached.weights)
        try:
            if words:
                self._token_embeddings = AttachedTokenEmbeddings(self._pipeline, words)
                weights.append(WeightGroup("tokens", self._token_embeddings.parameters()))
        except Exception:
            self.detach_adapter()
            raise
        self._text_training = TextEncoderTraining(self._pipeline)
        set_gradient_checkpointing(self._pipeline.unet, gradient_checkpointing)
        return weights

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
        self._text_training = None
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
        drawing.
        """
        words = gather_token_embeddings(
            [adapter.tokens for adapter, strength in parts if _is_active(strength)]
        )
        scheduled = [(a, one) for a, one in parts if isinstance(one, LoraSchedule)]
        plain = [(a, weight) for a, weight in parts if not isinstance(weight, LoraSchedule)]
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
        named = zip(_TEXT_ENCODERS, tokenizers, strict=True)
        return {name: [t.removesuffix("</w>") for t in one.tokenize(text)] for name, one in named}

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
        self._pipeline.scheduler = make_scheduler(sampler.scheduler, self._scheduler_config)
        prompts = sorted({shot.prompt for shot in shots})
        encoded = self.encode_prompts(prompts)
        batch = min(batch, self.memory_options.drawn_at_once or batch)
        at_once = len(shots) if self.memory_options.cpu_offload else batch
        pictures: list[Image.Image] = []
        with fastest_layout(self._pipeline.unet):
            for start in range(0, len(shots), at_once):
                drawn = []
                for first in range(start, min(start + at_once, len(shots)), batch):
                    some = shots[first : min(first + batch, len(shots))]
                    rows = torch.tensor([prompts.index(shot.prompt) for shot in some])
                    drawn.append(self._denoise(some, encoded.take(rows), sampler, side))
                pictures += self._decode(torch.cat(drawn))
                on_picture(len(pictures), len(shots))
        return pictures

    def _denoise(
        self, shots: Sequence[Shot], chosen: SDXLConditioning, sampler: Sampler, side_px: int
    ) -> Float[Tensor, "images channels height width"]:
        guidance = self._guidance_options(chosen, sampler)
        self._offload.load("unet", exclusive=True)
        with (
            self._schedules.followed(),
            reusing_deep_levels(self._pipeline, sampler.cache_interval),
        ):
            latents: Tensor = self._pipeline(
                prompt_embeds=chosen.tokens,
                pooled_prompt_embeds=chosen.pooled,
                num_inference_steps=sampler.steps,
                height=side_px,
                width=side_px,
                generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in shots],
                output_type="latent",
                **guidance,
            ).images
        return latents

    def _decode(self, latents: Float[Tensor, "images channels height width"]) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for one in latents.split(1):
            pictures += self._pipeline.image_processor.postprocess(self.decode(one))
        return pictures

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "1 channels height width"]
    ) -> Float[Tensor, "1 3 height_px width_px"]:
        """Decode one picture to about [-1, 1]: several would need several times the memory."""
        self._offload.load("vae", exclusive=True)
        vae = self._pipeline.vae
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return pixels

    def _guidance_options(self, chosen: SDXLConditioning, sampler: Sampler) -> dict[str, Any]:
        """Say how the pipeline must be called for a sampler's guidance."""
        if sampler.guidance <= 1:
            return {"guidance_scale": sampler.guidance}
        nothing = self._encode_empty_prompt(chosen)
        negative = {
            "negative_prompt_embeds": nothing.tokens,
            "negative_pooled_prompt_embeds": nothing.pooled,
        }
        if sampler.guidance_interval == (0.0, 1.0):
            return {"guidance_scale": sampler.guidance, **negative}
        part = IntervalGuidance(
            sampler.guidance, sampler.guidance_interval, nothing.tokens, nothing.pooled
        )
        return {**part.options(), **negative}

    def _encode_empty_prompt(self, chosen: SDXLConditioning) -> SDXLConditioning:
        """Encode the unconditional half's empty prompt, for as many pictures.

        Most bases take zeros for it. The others encode it, without what belongs to the conditional
        half only.
        """
        if self._pipeline.config.force_zeros_for_empty_prompt:
            return SDXLConditioning(
                torch.zeros_like(chosen.tokens), torch.zeros_like(chosen.pooled)
            )
        with self._schedules.off_in_unconditional_text():
            return self.encode_prompts([""]).take(torch.zeros(len(chosen), dtype=torch.int64))


def _is_active(strength: Strength) -> bool:
    return (strength.curve.strongest if isinstance(strength, LoraSchedule) else strength) != 0
