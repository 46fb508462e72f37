"""Every setting of a run: name, default, limits and its one description, in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from dreamloom.core.config.phrases import (
    ClassPrompt,
    SubjectPrompt,
    SubjectWords,
    refuse_blanks,
)
from dreamloom.core.toml_files import NONE, Section

Auto = Literal["auto"]
Preset = Literal["quick", "standard", "thorough"]
PriorKind = Literal["generated", "folder", "base", "none"]
_AboveZero = Annotated[float, Field(gt=0)]
_Guidance = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Dropped = Annotated[float, Field(ge=0, lt=1)]
_OrNone = BeforeValidator(lambda value: None if value == NONE else value)


def _check_order(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] >= given[1]:
        raise ValueError("it must begin below its end, such as [0.2, 0.8]")
    return given


_Part = Annotated[tuple[_Share, _Share], AfterValidator(_check_order)]


class SubjectConfig(Section):
    """Who or what is taught, and in which words."""

    phrase: SubjectWords = "rraj person"
    """The subject as prompts name it: a rare word and the class noun, such as 'rraj person'."""
    class_noun: SubjectWords = "person"
    """What the subject is one of: person, dog, backpack; by default the phrase's last word."""
    photo_prompt: SubjectPrompt = "a photo of {subject}"
    """The prompt each photo is trained with; {subject} stands for the phrase."""
    class_prompt: ClassPrompt = "a photo of a {class_noun}"
    """The prompt of the class images; {class_noun} stands for the noun."""

    @model_validator(mode="wrap")
    @classmethod
    def _take_the_noun_from_the_phrase(
        cls, given: Any, check: ModelWrapValidatorHandler[SubjectConfig]
    ) -> SubjectConfig:
        is_open = isinstance(given, dict) and "class_noun" not in given
        words = str(given.get("phrase", "")).split() if is_open else []
        if not words:
            return check(given)
        subject = check({**given, "class_noun": words[-1]})
        subject.model_fields_set.remove("class_noun")  # it follows; nobody gave it
        return subject

    @property
    def lacks_noun(self) -> bool:
        """Whether nobody said what the subject is one of: its phrase is one word, and the noun."""
        return self.phrase.strip() == self.class_noun.strip()


class PhotosConfig(Section):
    """How photos and their captions are read."""

    @property
    def chooses_lines(self) -> bool:
        """Whether each line of a caption file is a caption of its own."""
        return self.caption_lines == "choose"

    resolution_px: Auto | Annotated[int, Field(ge=8)] = "auto"
    """Side of the square that is trained on; auto takes the base model's own."""
    shape: Auto | Literal["square", "buckets"] = "auto"
    """Crops are squares, or as near to the photo's own shape as buckets of the same area allow."""
    flip: bool = False
    """Mirror photos at random. Off by default: faces are not symmetric."""
    caption_lines: Literal["join", "choose"] = "join"
    """A caption file of several lines is one caption, or each line is one, of which one is chosen
    each time the photo is drawn."""
    shuffle_caption: bool = False
    """Put the tags of photos' prompts, which commas part, in another order each time."""
    keep_tokens: int = Field(0, ge=0)
    """First tags that are neither shuffled nor dropped."""
    caption_tag_dropout_rate: _Share = 0.0
    """Share of tags that are left out each time; those that name the subject always stay."""


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
    prompts: Auto | tuple[ClassPrompt, ...] = "auto"
    """More prompts of the class, with {class_noun}: every third class image is drawn from and
    trained with one of them, in turn; auto takes the base model's own advice."""


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
    prior_target: Auto | Literal["images", "base_prediction", "guided_prediction"] = "auto"
    """What class images are trained towards: themselves (DreamBooth's), the base model's prediction
    of them, or what it draws of them at priors.guidance; auto takes the base model's advice."""
    caption_dropout: Auto | _Share = "auto"
    """Share of photos and class images that are trained without their prompt; auto takes the base
    model's own advice."""
    rank: int = Field(16, ge=1)
    """Rank of the adapter's updates."""
    alpha: Auto | _AboveZero = "auto"
    """Updates are scaled by alpha / rank; auto means alpha = rank."""
    target_modules: Auto | Literal["attention", "linear", "all"] = "auto"
    """Layers that get LoRA weights: those of attention, every linear one, or all with
    convolutions; auto takes the base model's own advice."""
    init_adapter: str = ""
    """A LoRA's file to begin from instead of anew; rank and layers must be those of the file."""
    optimizer: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, schedule_free, lion, came, muon and others."""
    learning_rate: Auto | _AboveZero = "auto"
    """Step size; auto takes the base model's own advice, fitted to the optimizer."""
    text_learning_rate: Auto | _AboveZero = "auto"
    """Step size of the text encoders' adapters; auto takes half of learning_rate."""
    text_encoder_2_learning_rate: Auto | _AboveZero = "auto"
    """Step size of the second text encoder's adapter alone; auto takes text_learning_rate."""
    token_learning_rate: Auto | _AboveZero = "auto"
    """Step size of new words' embeddings; auto takes ten times learning_rate."""
    learning_rate_pattern: dict[str, _AboveZero] = Field(default_factory=dict)
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
    ema_decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, _OrNone] = None
    """Decay of the adapter's moving average (EMA), which is then saved; none saves the last."""
    scale_weight_norms: Annotated[Annotated[float, Field(gt=0)] | None, _OrNone] = None
    """Largest Frobenius norm of a layer's update; longer ones are scaled back; none: no limit."""
    update_penalty: float = Field(0.0, ge=0)
    """Weight of the updates' squared Frobenius norms in the loss; 0 leaves them out."""
    compile: Auto | Literal["off", "blocks"] = "off"
    """blocks compiles what repeats: the U-Net's blocks, on a processor the text encoders', too;
    auto does so on GPUs from 500 steps on."""
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
    t_lora_min_rank: Annotated[Annotated[int, Field(ge=1)] | None, _OrNone] = None
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
    timestep_range: _Part = (0.0, 1.0)
    """The first and last timestep that are trained, as shares of all; 0 is a clean picture."""
    background_weight: float = Field(0.1, ge=0, le=1)
    """Weight of what lies outside a photo's mask, where it has one."""


class ValidationConfig(Section):
    """What is looked at while training runs."""

    every: Annotated[Annotated[int, Field(ge=1)] | None, _OrNone] = None
    """Steps between validations; each draws pictures, measures, keeps the adapter; none never."""
    prompts: tuple[SubjectPrompt, ...] = Field(("a photo of {subject}",), min_length=1)
    """What is drawn at each validation; {subject} stands for the phrase."""
    images: int = Field(4, ge=1)
    """Pictures of each prompt, always from the same seeds."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of these pictures."""
    keep: Annotated[Annotated[int, Field(ge=1)] | None, _OrNone] = None
    """Validations whose pictures and adapter are kept: the last ones, and the best; none all."""
    held_out_photos: int = Field(0, ge=0)
    """Photos that are not trained on, from the end of the list, to validate with."""
    scores: bool = True
    """Score the pictures at each validation, where encoders are at hand."""
    patience: Annotated[Annotated[int, Field(ge=1)] | None, _OrNone] = None
    """End once so many validations in a row scored no better than an earlier one; none never."""
    tracker: str = "auto"
    """Where curves go too: tensorboard (auto, if installed), wandb and others, or none."""


LARGEST_SEED = 2**64 - 1
"""What a generator of random numbers takes at most."""

_FROM_THE_FIRST = {"schedulers", "steps", "guidance", "images_per_prompt", "first_seed"}


class GenerateConfig(Section):
    """How pictures are drawn."""

    @property
    def unusual(self) -> dict[str, Any]:
        """What is set beside scheduler, steps, guidance and seeds; nothing where all is plain.

        Settings are remembered with these named only where they are set, so that what was drawn
        before they were there is known again.
        """
        return self.model_dump(exclude={"batch", *_FROM_THE_FIRST}, exclude_defaults=True)

    @property
    def drawn_with(self) -> dict[str, Any]:
        """Everything that a picture depends on."""
        return self.model_dump(include=_FROM_THE_FIRST) | self.unusual

    schedulers: tuple[str, ...] = Field(("ddim",), min_length=1)
    """Names of schedulers: ddim, ddpm, pndm, euler, euler_a, dpm++, dpm++karras, unipc, heun."""
    steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((30,), min_length=1)
    """Denoising steps; each scheduler is used with each number."""
    guidance: Auto | _Guidance = "auto"
    """Classifier-free guidance; auto takes the base model's own."""
    guidance_interval: _Part = (0.0, 1.0)
    """Part of the drawing that is guided, from 0, its first step, to 1; the rest costs half."""
    guidance_rescale: _Share = 0.0
    """How far a guided prediction is scaled back to the spread of the unguided one; 0 not at all.
    It keeps strong guidance from washing out colours."""
    cfg_zero_star: bool = False
    """Scale guidance's unconditional half to fit the other one best (CFG-Zero*)."""
    conditional_only: bool = False
    """Keep adapters out of guidance's unconditional half."""
    cache_interval: int = Field(1, ge=1)
    """Steps from one computing of the U-Net's deep levels to the next (DeepCache); 1 for each."""
    negative_prompt: Annotated[str, AfterValidator(refuse_blanks)] = ""
    """What guidance leads away from, instead of the empty prompt."""
    prompt_weights: bool = False
    """Read (word:1.2), (word) and [word] in prompts as weights; else they are taken literally."""
    width_px: Annotated[Annotated[int, Field(ge=8)] | None, _OrNone] = None
    """Width of the pictures; none takes the base model's own."""
    height_px: Annotated[Annotated[int, Field(ge=8)] | None, _OrNone] = None
    """Height of the pictures; none takes the base model's own."""
    images_per_prompt: int = Field(8, ge=1)
    """Pictures of each prompt, from the seeds first_seed, first_seed + 1 and so on."""
    first_seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of each prompt's first picture."""
    batch: int = Field(8, ge=1)
    """Pictures drawn at a time; changes memory and speed, never the pictures."""

    @model_validator(mode="after")
    def _count_seeds(self) -> GenerateConfig:
        if self.first_seed + self.images_per_prompt - 1 > LARGEST_SEED:
            raise ValueError(
                f"first_seed = {self.first_seed} leaves too few seeds for images_per_prompt = "
                f"{self.images_per_prompt}: the largest is {LARGEST_SEED}"
            )
        return self


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


NOT_TRAINED = (
    "preset",
    "device",
    "generate.",
    "evaluate.",
    "train.checkpointing_steps",
    "train.log_gradient_noise",
    "memory.limit",
    "memory.gradient_checkpointing",
    "memory.micro_batch_size",
    "memory.cpu_offload",
    "validation.keep",
    "validation.tracker",
)
"""Beginnings of the names of settings that change nothing of what is taught."""


class LoomConfig(Section):
    """Every setting of a run."""

    preset: Preset = "standard"
    """How much effort."""
    base: str = "picturebook"
    """The base model: picturebook, sdxl, a hub id, a folder or a .safetensors checkpoint."""
    seed: int = Field(0, ge=0)
    """Seed of every random draw of the run."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen base model; adapters are always float32."""
    subject: SubjectConfig = SubjectConfig()
    photos: PhotosConfig = PhotosConfig()
    priors: PriorsConfig = PriorsConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def photo_prompt(self) -> str:
        """The prompt that photos are trained with."""
        return self.subject.photo_prompt.format(subject=self.subject.phrase)

    def taught_words(self) -> list[str]:
        """The words that training teaches: what the subject's phrase adds to its class noun."""
        noun = self.subject.class_noun.lower().split()
        words = [word for word in self.subject.phrase.split() if word.lower() not in noun]
        return [*(words or [self.subject.phrase]), *self.adapter.placeholder_tokens]

    def class_prompt(self) -> str:
        """The prompt that class images are drawn and trained with."""
        return self.subject.class_prompt.format(class_noun=self.subject.class_noun)

    def worded_priors(self) -> PriorsConfig:
        """The settings of class images, their further prompts written out for the class noun."""
        given = () if self.priors.prompts == "auto" else self.priors.prompts
        worded = tuple(text.format(class_noun=self.subject.class_noun) for text in given)
        return self.priors.model_copy(update={"prompts": worded})

    def flat(self) -> dict[str, Any]:
        """Every setting's value by its dotted name, such as ``train.rank``."""
        values: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                values |= {f"{name}.{inner}": item for inner, item in value.items()}
            else:
                values[name] = value
        return values

    def resolve(self, advice: Mapping[str, Any]) -> LoomConfig:
        """Replace every 'auto' that the base model has advice for.

        What depends on the machine or the encoders (device, precision, memory.*,
        evaluate.encoders) stays as it was given.

        Args:
            advice: resolution_px, guidance, learning_rate, target_modules and weighting, as
                `models.base.Advice`.
        """
        rate, text_rate = self.train.learning_rate, self.train.text_learning_rate
        choose_prompts = advice.get("choose_class_prompts")
        if rate == "auto":
            rate = advice["learning_rate"]
        if text_rate == "auto":
            text_rate = rate * advice.get("text_rate_share", 0.5)
        sections = {
            "photos": {
                "resolution_px": advice["resolution_px"],
                "shape": advice.get("shape", "square"),
            },
            "priors": {
                "guidance": advice["guidance"],
                "prompts": choose_prompts(self.subject.class_noun) if choose_prompts else (),
            },
            "train": {
                "learning_rate": rate,
                "text_learning_rate": text_rate,
                "text_encoder_2_learning_rate": text_rate,
                "token_learning_rate": rate * advice.get("token_rate_share", 10.0),
                "target_modules": advice["target_modules"],
                "caption_dropout": advice.get("caption_dropout", 0.0),
                "prior_target": advice.get("prior_target", "images"),
                "alpha": float(self.train.rank),
            },
            "objective": {"weighting": advice.get("weighting", "none")},
            "generate": {"guidance": advice["guidance"]},
        }
        changed = {}
        for name, values in sections.items():
            section = getattr(self, name)
            missing = {
                key: value for key, value in values.items() if getattr(section, key) == "auto"
            }
            changed[name] = section.model_copy(update=missing)
        return self.model_copy(update=changed)
