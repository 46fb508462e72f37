"""The groups of settings: every name, default, limit and its one description."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

Auto = Literal["auto"]
Preset = Literal["quick", "standard", "thorough"]
PriorKind = Literal["generated", "folder", "base", "none"]
_AboveZero = Annotated[float, Field(gt=0)]
_Guidance = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
# TOML has no word for nothing; "none" is ours, in files and in --set.
NONE = "none"
_OrNone = BeforeValidator(lambda value: None if value == NONE else value)


def _check_order(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] >= given[1]:
        raise ValueError("it must begin below its end, such as [0.2, 0.8]")
    return given


_Part = Annotated[tuple[_Share, _Share], AfterValidator(_check_order)]


def _check_blanks(allowed: str, text: str) -> str:
    """Let a prompt be filled in later: it may hold one word in braces, and no other."""
    try:
        blanks = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        blanks = {text}
    if blanks - {allowed}:
        raise ValueError(f"the only word in braces may be {{{allowed}}}")
    return text


_Kind = TypeVar("_Kind", bound="Section")


class Section(BaseModel):
    """A closed, frozen group of settings; a field's docstring is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def model_copy(
        self: _Kind, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> _Kind:
        """Copy with some settings changed.

        Raises:
            ValueError: If there is no setting of such a name, which pydantic would let pass.
        """
        unknown = set(update or ()) - set(type(self).model_fields)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


_SubjectPrompt = Annotated[str, AfterValidator(partial(_check_blanks, "subject"))]


class SubjectConfig(Section):
    """Who or what is taught, and in which words."""

    phrase: str = Field("rraj person", min_length=1)
    """The subject as prompts name it: a rare word and the class noun, such as 'rraj person'."""
    class_noun: str = Field("person", min_length=1)
    """What the subject is one of: person, dog, backpack; by default the phrase's last word."""
    photo_prompt: _SubjectPrompt = "a photo of {subject}"
    """The prompt each photo is trained with; {subject} stands for the phrase."""
    class_prompt: Annotated[str, AfterValidator(partial(_check_blanks, "class_noun"))] = (
        "a photo of a {class_noun}"
    )
    """The prompt of the class images; {class_noun} stands for the noun."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_noun_from_the_phrase(cls, given: Any) -> Any:
        if isinstance(given, dict) and "class_noun" not in given:
            words = str(given.get("phrase", "")).split()
            return {**given, "class_noun": words[-1]} if words else given
        return given


class PhotosConfig(Section):
    """How photos are read."""

    resolution_px: Auto | Annotated[int, Field(ge=8)] = "auto"
    """Side of the square that is trained on; auto takes the base model's own."""
    shape: Auto | Literal["square", "buckets"] = "auto"
    """Crops are squares, or as near to the photo's own shape as buckets of the same area allow."""
    flip: bool = False
    """Mirror photos at random. Off by default: faces are not symmetric."""


class PriorsConfig(Section):
    """The class images that keep the base model's idea of the class."""

    kind: PriorKind = "generated"
    """Where they come from: the base model draws them, a folder has them, the base model's own
    predictions take their place, or there are none."""
    folder: str = ""
    """Where your class images lie; only for kind 'folder'."""
    count: int = Field(48, ge=1, le=10_000)
    """How many class images."""
    scheduler: str = "ddim"
    """The scheduler that draws them."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps for each."""
    guidance: Auto | _Guidance = "auto"
    """Classifier-free guidance for each; auto takes the base model's own."""


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
    rank: int = Field(16, ge=1)
    """Rank of the adapter's updates."""
    alpha: Auto | _AboveZero = "auto"
    """Updates are scaled by alpha / rank; auto means alpha = rank."""
    target_modules: Auto | Literal["attention", "linear", "all"] = "auto"
    """Layers that get LoRA weights: those of attention, every linear one, or all with
    convolutions; auto takes the base model's own advice."""
    optimizer: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, schedule_free, lion, came, muon and others."""
    learning_rate: Auto | _AboveZero = "auto"
    """Step size; auto takes the base model's own advice, fitted to the optimizer."""
    text_learning_rate: Auto | _AboveZero = "auto"
    """Step size of the text encoders' adapters; auto takes half of learning_rate."""
    token_learning_rate: Auto | _AboveZero = "auto"
    """Step size of new words' embeddings; auto takes ten times learning_rate."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = (
        "cosine"
    )
    """What the learning rate does after the warm-up."""
    weight_decay: float = Field(1e-2, ge=0)
    """The optimizer's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    ema_decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, _OrNone] = None
    """Decay of the adapter's moving average (EMA), which is then saved; none saves the last."""
    compile: Auto | Literal["off", "blocks"] = "off"
    """blocks compiles what repeats: the U-Net's blocks, on a processor the text encoders', too;
    auto does so on GPUs from 500 steps on."""
    checkpointing_steps: int = Field(100, ge=1)
    """Steps between checkpoints."""


class MemoryConfig(Section):
    """What fits on the device; `dreamloom plan` fills in what is left at auto."""

    limit: str = "auto"
    """Memory to make do with, such as 12GiB; auto takes what the GPU has."""
    gradient_checkpointing: Auto | Literal["none", "high", "low", "full"] = "auto"
    """Levels of the U-Net that the backward pass recomputes; full is all of them."""
    base_quantization: Auto | Literal["whole", "fp8", "int8", "nf4"] = "auto"
    """How the frozen base model is kept: whole, or its linear layers in 8 or 4 bits."""
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
    alpha_pattern: dict[str, _AboveZero] = Field(default_factory=dict)
    """Alphas of layers by pattern of their names; the others take train.alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    init_lora_weights: str = "default"
    """How the factors begin: default, gaussian, pissa, olora, orthogonal, as peft names them."""
    loraplus_lr_ratio: float = Field(1.0, gt=0)
    """The up factors' learning rate over that of the down factors (LoRA+ advises 16)."""
    text_encoders: bool = False
    """Teach both text encoders too."""
    placeholder_tokens: dict[str, str] = Field(default_factory=dict)
    """Words to learn as new tokens, each with the words that it starts from."""
    format: Literal["peft", "kohya"] = "peft"
    """kohya also writes the adapter as ComfyUI and AUTOMATIC1111 name its layers."""


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
    input_perturbation: float = Field(0.0, ge=0, le=1)
    """Share of extra noise in the input that the model is not asked to predict."""
    zero_terminal_snr: bool = False
    """Let the last timestep be noise alone; for base models that predict velocity."""
    timesteps: Literal["uniform", "logit_normal", "mode", "cubic"] = "uniform"
    """How often each timestep is trained."""
    timestep_range: _Part = (0.0, 1.0)
    """The first and last timestep that are trained, as shares of all; 0 is a clean picture."""
    background_weight: float = Field(0.1, ge=0, le=1)
    """Weight of what lies outside a photo's mask, where it has one."""


class ValidationConfig(Section):
    """What is looked at while training runs."""

    every: Annotated[Annotated[int, Field(ge=1)] | None, _OrNone] = None
    """Steps between validations; each draws pictures, measures, keeps the adapter; none never."""
    prompts: tuple[_SubjectPrompt, ...] = Field(("a photo of {subject}",), min_length=1)
    """What is drawn at each validation; {subject} stands for the phrase."""
    images: int = Field(4, ge=1)
    """Pictures of each prompt, always from the same seeds."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of these pictures."""
    held_out_photos: int = Field(0, ge=0)
    """Photos that are not trained on, from the end of the list, to validate with."""
    scores: bool = True
    """Score the pictures at each validation, where encoders are at hand."""
    tracker: str = "auto"
    """Where curves go too: tensorboard (auto, if installed), wandb and others, or none."""


_SHORTCUTS = {"guidance_interval", "cache_interval"}


class GenerateConfig(Section):
    """How pictures are drawn."""

    @property
    def shortcuts(self) -> dict[str, Any]:
        """What is set to save operations; nothing where every step is drawn in full.

        Settings are remembered with these named only where they are set, so that what was drawn
        before there were any is known again.
        """
        return self.model_dump(include=_SHORTCUTS, exclude_defaults=True)

    @property
    def drawn_with(self) -> dict[str, Any]:
        """Everything that a picture depends on."""
        return self.model_dump(exclude={"batch", *_SHORTCUTS}) | self.shortcuts

    schedulers: tuple[str, ...] = Field(("ddim",), min_length=1)
    """Names of schedulers: ddim, ddpm, pndm, euler, euler_a, dpm++, dpm++karras, unipc, heun."""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((30,), min_length=1)
    """Denoising steps; each scheduler is used with each number."""
    guidance: Auto | _Guidance = "auto"
    """Classifier-free guidance; auto takes the base model's own."""
    guidance_interval: _Part = (0.0, 1.0)
    """Part of the drawing that is guided, from 0, its first step, to 1; the rest costs half."""
    cache_interval: int = Field(1, ge=1)
    """Steps from one computing of the U-Net's deep levels to the next (DeepCache); 1 for each."""
    images_per_prompt: int = Field(8, ge=1)
    """Pictures of each prompt, from the seeds first_seed, first_seed + 1 and so on."""
    first_seed: int = Field(0, ge=0)
    """Seed of each prompt's first picture."""
    batch: int = Field(8, ge=1)
    """Pictures drawn at a time; changes memory and speed, never the pictures."""


class EvaluateConfig(Section):
    """How pictures are scored."""

    encoders: Auto | Literal["picturebook", "standard"] = "auto"
    """Which encoders look at the pictures; auto uses picturebook's judges for its own pictures."""
    detectors: bool | Literal["experimental"] = True
    """Look for failures, too: eyes of another colour, faces too many or missing; experimental adds
    malformed eyes and teeth, which it is not known to find."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the intervals."""
