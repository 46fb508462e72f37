"""Every setting of a run: name, default, limits and its one description, in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from dreamloom.core.config.limits import Auto, OrNone, Part, Share
from dreamloom.core.config.phrases import (
    ClassPrompt,
    SubjectPrompt,
    SubjectWords,
    refuse_blanks,
)
from dreamloom.core.config.training import (
    AdapterConfig,
    MemoryConfig,
    ObjectiveConfig,
    TrainConfig,
    ValidationConfig,
)
from dreamloom.core.toml_files import Section

Preset = Literal["quick", "standard", "thorough"]
PriorKind = Literal["generated", "folder", "base", "none"]
_Guidance = Annotated[float, Field(ge=0)]


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
    caption_tag_dropout_rate: Share = 0.0
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
    guidance_interval: Part = (0.0, 1.0)
    """Part of the drawing that is guided, from 0, its first step, to 1; the rest costs half."""
    guidance_rescale: Share = 0.0
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
    width_px: Annotated[Annotated[int, Field(ge=8)] | None, OrNone] = None
    """Width of the pictures; none takes the base model's own."""
    height_px: Annotated[Annotated[int, Field(ge=8)] | None, OrNone] = None
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

    @property
    def has_class_images(self) -> bool:
        """Whether there are class images, and they are trained on."""
        return self.priors.kind in ("generated", "folder") and self.train.prior_weight > 0

    @property
    def keeps_predictions(self) -> bool:
        """Whether class images are trained towards what the base model makes of them."""
        return self.has_class_images and self.train.prior_target == "base_prediction"

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
                "prior_target": advice.get("prior_target", "images")
                if self.has_class_images
                else "images",
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
        resolved = self.model_copy(update=changed)
        if self.train.final_scale != "auto":
            return resolved
        # Where what is predicted without a prompt is kept, guidance multiplies all that is taught.
        is_kept = resolved.keeps_predictions and float(resolved.train.caption_dropout) > 0
        is_plain = self.adapter.kind == "lora" and not self.adapter.splits_base
        scale = advice.get("final_scale", 1.0) if is_kept and is_plain else 1.0
        train = resolved.train.model_copy(update={"final_scale": scale})
        return resolved.model_copy(update={"train": train})
