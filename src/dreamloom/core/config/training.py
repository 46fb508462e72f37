"""Settings of teaching: the training, its memory, the adapter, the loss and the validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dreamloom.core.config.limits import AboveZero, Auto, OrNone, Part, Share
from dreamloom.core.config.phrases import SubjectPrompt
from dreamloom.core.toml_files import Section

_Dropped = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """How the adapter is taught."""

    steps: int = Field(300, ge=1)
    """Optimizer steps; each sees batch_photos × gradient_accumulation_steps × processes photos."""
    batch_photos: int = Field(4, ge=1)
    """Photos in each batch."""
    batch_priors: int = Field(4, ge=1)
    """Class images in each batch, where there are any."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up for one optimizer step."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the class images' loss (DreamBooth's lambda)."""
    prior_target: Auto | Literal["images", "base_prediction"] = "auto"
    """What class images are trained towards: themselves (DreamBooth's), or what the base model
    predicts of them (prior prediction); auto takes the base model's own advice."""
    caption_dropout: Auto | Share = "auto"
    """Share of photos and class images that are trained without their prompt; auto takes the base
    model's own advice."""
    rank: int = Field(16, ge=1)
    """Rank of the adapter's updates."""
    alpha: Auto | AboveZero = "auto"
    """Updates are scaled by alpha / rank; auto means alpha = rank."""
    target_modules: Auto | Literal["attention", "linear", "all"] = "auto"
    """Layers that get LoRA weights: those of attention, every linear one, or all with
    convolutions; auto takes the base model's own advice."""
    init_adapter: str = ""
    """A LoRA's file to begin from instead of anew; rank and layers must be those of the file."""
    optimizer: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, schedule_free, lion, came, muon and others."""
    learning_rate: Auto | AboveZero = "auto"
    """Step size; auto takes the base model's own advice, fitted to the optimizer."""
    text_learning_rate: Auto | AboveZero = "auto"
    """Step size of the text encoders' adapters; auto takes half of learning_rate."""
    text_encoder_2_learning_rate: Auto | AboveZero = "auto"
    """Step size of the second text encoder's adapter alone; auto takes text_learning_rate."""
    token_learning_rate: Auto | AboveZero = "auto"
    """Step size of new words' embeddings; auto takes ten times learning_rate."""
    learning_rate_pattern: dict[str, AboveZero] = Field(default_factory=dict)
    """Step sizes of layers by pattern of their names; the others take those above."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = (
        "cosine"
    )
    """What the learning rate does after the warm-up."""
    lr_num_cycles: int = Field(3, ge=1)
    """Falls of the learning rate with lr_scheduler cosine_restarts, each from the full one."""
    lr_power: float = Field(2.0, gt=0)
    """Exponent of lr_scheduler polynomial; 1 is linear."""
    weight_decay: float = Field(1e-2, ge=0)
    """The optimizer's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    ema_decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, OrNone] = None
    """Decay of the adapter's moving average (EMA), which is then saved; none saves the last."""
    final_scale: Auto | AboveZero = "auto"
    """What the finished adapter's updates are multiplied by: below 1 it leaves more to the words of
    a prompt; auto takes the base model's advice where class images are kept at its predictions."""
    scale_weight_norms: Annotated[Annotated[float, Field(gt=0)] | None, OrNone] = None
    """Largest Frobenius norm of a layer's update; longer ones are scaled back; none: no limit."""
    update_penalty: float = Field(0.0, ge=0)
    """Weight of the updates' squared Frobenius norms in the loss; 0 leaves them out."""
    compile: Auto | Literal["off", "blocks"] = "off"
    """blocks lets torch compile what repeats, the U-Net's blocks; auto does so on GPUs from 500
    steps on."""
    checkpointing_steps: int = Field(100, ge=1)
    """Steps between checkpoints."""
    log_gradient_noise: bool = False
    """Tell the gradient's signal-to-noise ratio and noise scale with the loss."""


class MemoryConfig(Section):
    """What fits on the device; `dreamloom plan` fills in what is left at auto."""

    @property
    def changes_results(self) -> tuple[str, ...]:
        """How the base is kept, where that changes what comes out; nothing where it does not."""
        quantization = self.base_quantization
        return () if quantization in ("auto", "whole") else (quantization,)

    limit: str = "auto"
    """Memory to make do with, such as 12GiB; auto takes what the GPU has."""
    gradient_checkpointing: Auto | Literal["none", "high", "low", "full"] = "auto"
    """Levels of the U-Net that the backward pass recomputes; full is all of them."""
    base_quantization: Auto | Literal["whole", "bf16", "fp8", "int8", "nf4"] = "auto"
    """How the frozen base model is kept: whole, or its linear layers in 16, 8 or 4 bits."""
    micro_batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Images that go through the model at once; an update's batch is cut into such passes."""
    cpu_offload: Auto | bool = "auto"
    """Let autoencoder, text encoders and denoiser take turns on the device."""


class AdapterConfig(Section):
    """What kind of adapter is taught, and where it lies."""

    @property
    def splits_base(self) -> bool:
        """Whether it begins with a part of the base's weights, which must be whole for that."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    kind: Literal["lora", "dora", "loha", "lokr", "oft"] = "lora"
    """LoRA, or one of its relatives, which other programs read less widely."""
    blocks: str = Field("all", min_length=1)
    """all, content or style (B-LoRA's blocks of SDXL), or patterns of layer names with commas."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Ranks of layers by pattern of their names; the others take train.rank."""
    alpha_pattern: dict[str, AboveZero] = Field(default_factory=dict)
    """Alphas of layers by pattern of their names; the others take train.alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    init_lora_weights: str = "default"
    """How the factors begin, by peft's names: default, gaussian, pissa, pissa_niter_16 (or another
    number), olora, orthogonal."""
    loraplus_lr_ratio: float = Field(1.0, gt=0)
    """The up factors' learning rate over that of the down factors (LoRA+ advises 16)."""
    dropout: _Dropped = 0.0
    """Share of what the denoiser's up factors are given that each update leaves out (dropout)."""
    rank_dropout: _Dropped = 0.0
    """Share of the ranks that each update leaves out, drawn for each layer and image."""
    module_dropout: _Dropped = 0.0
    """Share of the layers whose change each update leaves out."""
    t_lora_min_rank: Annotated[Annotated[int, Field(ge=1)] | None, OrNone] = None
    """T-LoRA: ranks that count in pure noise, more as it clears; none lets all count everywhere."""
    text_encoders: bool = False
    """Teach both text encoders too."""
    placeholder_tokens: dict[str, str] = Field(default_factory=dict)
    """Words to learn as new tokens, each with the words that it starts from."""
    format: Literal["auto", "peft", "kohya", "kohya-diffusers"] = "auto"
    """Whose names the file uses; auto takes those that most programs read, kohya's where they can
    hold the adapter."""


class ObjectiveConfig(Section):
    """What training minimises."""

    loss: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """How the prediction's error is measured."""
    huber_delta: float = Field(0.1, gt=0, le=1)
    """Where huber and smooth_l1 go from quadratic to linear."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that threshold depends on the noise."""
    weighting: Literal["auto", "none", "min_snr", "soft_min_snr", "debiased", "p2"] = "auto"
    """How timesteps are weighed against each other; auto takes the base model's own advice."""
    snr_gamma: float = Field(5.0, gt=0)
    """Gamma of min_snr and soft_min_snr."""
    noise_offset: float = Field(0.0, ge=0, le=1)
    """Share of noise that is one value for a whole channel; helps very dark and bright pictures."""
    multires_noise_iterations: int = Field(0, ge=0)
    """Levels of coarser noise that are added (pyramid noise), so that large forms are learned as
    well as small ones; 0 for none, 6 to 10 is usual."""
    multires_noise_discount: float = Field(0.3, ge=0, le=1)
    """How much each of these levels has of the one before; 0.1 to 0.3 is usual."""
    input_perturbation: float = Field(0.0, ge=0, le=1)
    """Share of extra noise in the input that the model is not asked to predict."""
    zero_terminal_snr: bool = False
    """Let the last timestep be noise alone; for base models that predict velocity."""
    timesteps: Literal["uniform", "logit_normal", "mode", "cubic"] = "uniform"
    """How often each timestep is trained."""
    timestep_range: Part = (0.0, 1.0)
    """The first and last timestep that are trained, as shares of all; 0 is a clean picture."""
    background_weight: float = Field(0.1, ge=0, le=1)
    """Weight of what lies outside a photo's mask, where it has one."""


class ValidationConfig(Section):
    """What is looked at while training runs."""

    every: Annotated[Annotated[int, Field(ge=1)] | None, OrNone] = None
    """Steps between validations; each draws pictures, measures, keeps the adapter; none never."""
    prompts: tuple[SubjectPrompt, ...] = Field(("a photo of {subject}",), min_length=1)
    """What is drawn at each validation; {subject} stands for the phrase."""
    images: int = Field(4, ge=1)
    """Pictures of each prompt, always from the same seeds."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of these pictures."""
    keep: Annotated[Annotated[int, Field(ge=1)] | None, OrNone] = None
    """Validations whose pictures and adapter are kept: the last ones, and the best; none all."""
    held_out_photos: int = Field(0, ge=0)
    """Photos that are not trained on, from the end of the list, to validate with."""
    scores: bool = True
    """Score the pictures at each validation, where encoders are at hand."""
    patience: Annotated[Annotated[int, Field(ge=1)] | None, OrNone] = None
    """End once so many validations in a row scored no better than an earlier one; none never."""
    tracker: str = "auto"
    """Where curves go too: tensorboard (auto, if installed), wandb and others, or none."""
