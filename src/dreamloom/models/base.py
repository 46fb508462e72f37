"""The contract of base models: what a family must be able to do; the rest is its own affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import Module, Parameter

from dreamloom.core.device import Runtime
from dreamloom.core.events import OnProgress, no_progress
from dreamloom.lora.adapter import Adapter, AdapterKind
from dreamloom.models.lora_schedule import Strength
from dreamloom.models.quantization import Quantization

TargetModules = Literal["attention", "linear", "all"]
"""Which layers an adapter may change: attention only, every linear layer, or convolutions too."""

Prediction = Literal["noise", "velocity", "flow", "picture"]
"""What a base model predicts, and so what `Model.target` is."""

Checkpointing = Literal["none", "high", "low", "full"]
"""Which levels of the denoiser recompute activations in the backward pass: none, those above the
lowest, the lowest alone, or all."""

Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased", "p2"]
"""How timesteps are weighed against each other; see `timestep_weights`."""

PriorTarget = Literal["images", "base_prediction"]
"""What class images are trained towards: themselves, or what the base model predicts of them."""

WeightRole = Literal["down", "up", "other", "text down", "text up", "text other", "tokens"]
"""What a trained weight does; `WeightGroup` says more."""


@dataclass(frozen=True)
class Framing:
    """How one image was cut from its original; it travels with that image, never with a batch.

    Args:
        original_px: Height and width of the whole picture before any scaling.
        crop_top_left_px: Top and left of the crop, in pixels of the scaled picture.
    """

    original_px: tuple[int, int]
    crop_top_left_px: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of a new adapter; whatever its kind, it changes nothing until it is trained.

    A pattern is a piece of a layer's name, such as ``mid_block``, ``attn2`` or
    ``up_blocks.0.attentions.*.attn1.to_q``: whole parts between dots, ``*`` for anything.

    Args:
        rank: Rank of each layer's update, 1 or more. For OFT the side of the rotated blocks, 2 or
            more, or the nearest one that divides the layer's inputs.
        alpha: The update is scaled by ``alpha / rank``; OFT knows no scale.
        target_modules: Which layers may change, of the denoiser and of the text encoders.
        seed: Seed of the first weights.
        kind: lora, dora, loha, lokr or oft.
        blocks: Which blocks of the denoiser may change: ``all``, or patterns with commas between
            them, of which at least one must be met; ``content`` and ``style`` are the two blocks
            of SDXL that B-LoRA found.
        ranks: The rank of layers by pattern, instead of ``rank``; where several match, the last
            one counts.
        alphas: The alpha of layers by pattern, instead of ``alpha``; likewise.
        use_rslora: Scale by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732).
        init: How the factors of linear layers begin: default, gaussian, orthogonal, olora, pissa
            or pissa_niter_N. Convolutions begin as by default, or gaussian.
        text_encoders: Whether the text encoders change, too: their attention, and beyond that
            reach their feed-forward layers.
        tokens: New words to learn, and words from whose meaning each begins.
        dropout: Share of the single numbers given to the denoiser's up factors that training
            leaves out, from 0 to below 1; the others count 1 / (1 - share) times.
        rank_dropout: Share of the ranks of each layer and image; likewise.
        module_dropout: Share of the layers whose updates a training's update leaves out.
        t_lora_min_rank: How many ranks of a denoiser's layer count in pure noise, more as it
            clears (T-LoRA); None lets all of them count everywhere.
    """

    rank: int
    alpha: float
    target_modules: TargetModules
    seed: int
    kind: AdapterKind = "lora"
    blocks: str = "all"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init: str = "default"
    text_encoders: bool = False
    tokens: Mapping[str, str] = field(default_factory=dict)
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    t_lora_min_rank: int | None = None

    @property
    def has_masks(self) -> bool:
        """Whether parts of the updates are left out at times."""
        drops = self.dropout or self.rank_dropout or self.module_dropout
        return bool(drops) or self.t_lora_min_rank is not None


@dataclass(frozen=True)
class DropoutSeeds:
    """What a pass of training drops out depends on, beside the layer and the purpose.

    Args:
        images: A seed for each image.
        update: One for all images of the update.
    """

    images: tuple[int, ...]
    update: int


@dataclass(frozen=True)
class WeightGroup:
    """Trained weights that share a learning rate, in float32.

    Args:
        role: ``down`` and ``up`` are a LoRA's factors in the denoiser, ``other`` what it has beside
            them and the weights of other kinds; with ``text`` the same in the text encoders;
            ``tokens`` are the embeddings of new words.
        parameters: The weights; their order is the same for equal specs, and that of a LoRA's
            layers is the same in its down and its up factors.
        layers: The name of each one's layer, as ``unet.mid_block.attentions.0.proj_in``; none
            where they belong to no layer.
        scales: For the up factors of a LoRA: what each layer's product of factors is multiplied
            with to be its update. Empty for other weights, and where a part of the base lies in
            the factors.
    """

    role: WeightRole
    parameters: tuple[Parameter, ...]
    layers: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class MemoryOptions:
    """How a model spares its device's memory.

    Args:
        quantization: How the frozen linear layers of the denoiser are kept; those of the text
            encoders are kept in int8 where it is neither ``whole`` nor ``bf16``. It alone changes
            what is computed. For a processor the base is then read in bf16.
        cpu_offload: Whether autoencoder, text encoders and denoiser take turns on the device,
            which costs the time of moving them.
        drawn_at_once: Most pictures that are denoised at a time; None sets no limit.
    """

    quantization: Quantization = "whole"
    cpu_offload: bool = False
    drawn_at_once: int | None = None


NO_SAVINGS = MemoryOptions()
"""Everything stays on the device as it is."""


@dataclass(frozen=True)
class Sampler:
    """How a picture is drawn from noise.

    Args:
        scheduler: One of the names in ``Model.schedulers``.
        steps: Denoising steps, 1 or more.
        guidance: Classifier-free guidance; 1 and below switch it off.
        guidance_interval: First and last progress that is guided, 0 at the first step and 1 at
            the last.
        cache_interval: Steps from one computing of the denoiser's deep levels to the next.
        negative_prompt: What guidance leads away from, instead of the empty prompt.
        prompt_weights: Whether weights that are written in prompts are read; see `prompt_weights`.
        size_px: Height and width of the picture, multiples of `Model.pixels_per_latent`; None
            takes the model's own.
        guidance_rescale: How far a guided prediction is scaled to the deviation of the conditional
            one: 0 not at all, 1 wholly.
        cfg_zero_star: Whether the unconditional half is scaled to fit the other; see `guidance`.
    """

    scheduler: str
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1
    negative_prompt: str = ""
    prompt_weights: bool = False
    size_px: tuple[int, int] | None = None
    guidance_rescale: float = 0.0
    cfg_zero_star: bool = False


@dataclass(frozen=True)
class Shot:
    """One picture to draw: what, and from which noise.

    A shot's picture does not depend on the other shots of its batch.
    """

    prompt: str
    seed: int


@dataclass(frozen=True)
class Advice:
    """Settings that suit this base model; they replace every ``auto`` in the configuration.

    Args:
        resolution_px: Side of the pictures that it was taught with.
        guidance: Of drawing.
        learning_rate: Of AdamW.
        target_modules: Layers that get LoRA weights.
        weighting: Of the timesteps.
        choose_class_prompts: From a class noun to more prompts for class images.
        caption_dropout: Share of pictures that are trained without their prompt.
        prior_target: What class images are trained towards.
        final_scale: What a finished adapter is multiplied by where they are kept at predictions.
    """

    resolution_px: int
    guidance: float
    learning_rate: float
    target_modules: TargetModules
    weighting: Weighting = "none"
    choose_class_prompts: Callable[[str], tuple[str, ...]] = lambda _: ()
    caption_dropout: float = 0.0
    prior_target: PriorTarget = "images"
    final_scale: float = 1.0


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is.

    Args:
        name: What the user asked for: ``picturebook``, ``sdxl``, a hub id, a path.
        family: The family that loaded it.
        fingerprint: Hash over the files of the weights; adapters remember it.
        revision: The hub's commit, or an empty string.
        earlier_fingerprint: What adapters of before remember of it, where that is another.
    """

    name: str
    family: str
    fingerprint: str
    revision: str = ""
    earlier_fingerprint: str = ""

    def as_dict(self) -> dict[str, str]:
        """The same as a dictionary, for records."""
        return {name: v for name, v in asdict(self).items() if name != "earlier_fingerprint"}


@dataclass(frozen=True)
class Latents:
    """The distribution of an image's latents, already scaled as the denoiser expects them."""

    mean: Float[Tensor, "images channels height width"]
    deviation: Float[Tensor, "images channels height width"]


@runtime_checkable
class Conditioning(Protocol):
    """Encoded prompts, opaque outside their family."""

    def __len__(self) -> int:
        """How many prompts are encoded here."""
        ...

    def take(self, rows: Int[Tensor, " n"]) -> Conditioning:
        """Select prompts by index, in the given order, repeats allowed."""
        ...


@runtime_checkable
class Model(Protocol):
    """A loaded base model. Nothing outside may assume its channels, sizes or token counts."""

    identity: BaseIdentity
    runtime: Runtime
    advice: Advice
    memory_options: MemoryOptions
    schedulers: tuple[str, ...]
    pixels_per_latent: int
    train_timesteps: int

    @property
    def prediction(self) -> Prediction:
        """What `target` is."""
        ...

    @property
    def trains_text(self) -> bool:
        """Whether an attached adapter changes how prompts are encoded."""
        ...

    def encode_images(self, pixels: Float[Tensor, "images 3 height width"]) -> Latents:
        """Encode pictures in [-1, 1]; height and width are multiples of ``pixels_per_latent``."""
        ...

    def encode_prompts(
        self, prompts: Sequence[str], weighted: bool = False, drop_empty: bool = False
    ) -> Conditioning:
        """Encode prompts of any length; with ``weighted`` as their written weights say.

        With ``drop_empty`` an empty prompt becomes what the base model was taught in place of a
        prompt, and what the unconditional half of guidance is given: zeros for SDXL.

        While an attached adapter trains text (`trains_text`) and gradients are recorded, they flow
        to the adapter; then prompts are encoded anew for each update.
        """
        ...

    def note_prompts(self, prompts: Sequence[str], weighted: bool = False) -> list[str]:
        """Say what a user should know of how these prompts are read, in sentences."""
        ...

    def add_noise(
        self,
        latents: Float[Tensor, "images channels height width"],
        noise: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
    ) -> Float[Tensor, "images channels height width"]:
        """Mix latents with noise as the base model's training schedule says."""
        ...

    def target(
        self,
        latents: Float[Tensor, "images channels height width"],
        noise: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
    ) -> Float[Tensor, "images channels height width"]:
        """What `predict` should return, as the base was trained: see `prediction`."""
        ...

    def snr(self, timesteps: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        """Signal-to-noise ratio of each timestep, 0 or above.

        It is 0 at the last timestep alone, and only where nothing of the picture is left there:
        in flows, and after `set_zero_terminal_snr`.
        """
        ...

    def predict(
        self,
        noisy: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
        conditioning: Conditioning,
        framings: Sequence[Framing],
        dropout: DropoutSeeds | None = None,
    ) -> Float[Tensor, "images channels height width"]:
        """Predict the target; gradients flow to an attached adapter.

        Only with ``dropout`` does that adapter drop out what its spec says.
        """
        ...

    def set_zero_terminal_snr(self, wanted: bool) -> None:
        """Train and sample with a schedule whose last timestep is pure noise, or with its own.

        Raises:
            ConfigError: If the base model predicts noise, which says nothing there.
        """
        ...

    def release_encoders(self) -> None:
        """Free the memory of what only encodes; it comes back by itself when needed.

        Text encoders that are being trained stay.
        """
        ...

    def attach_adapter(
        self,
        spec: AdapterSpec,
        gradient_checkpointing: Checkpointing = "none",
        compiled: bool = False,
    ) -> list[WeightGroup]:
        """Add a new adapter that changes nothing yet; return its float32 weights to train.

        With ``gradient_checkpointing`` the backward pass recomputes activations it did not keep;
        gradients are the same. With ``compiled`` the repeated blocks are compiled, for adapters of
        kind lora: on a processor at once, half a minute for the first time; elsewhere the
        denoiser's when they are first called, which takes longer.

        Raises:
            ConfigError: If a pattern matches no layer, settings contradict each other, or nothing
                can be compiled here.
        """
        ...

    def load_adapter(self, adapter: Adapter) -> None:
        """Give the attached adapter a finished LoRA's weights and embeddings of new words.

        Raises:
            AdapterError: If its kind, layers, ranks or words are others; says which.
        """
        ...

    def read_adapter(self) -> Adapter:
        """Copy the attached adapter as it is now, on the CPU, as a change of the original base."""
        ...

    def detach_adapter(self) -> None:
        """Remove the attached adapter; the base is as it was, bit for bit."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Encode and predict as the base model does, for the time of a block."""
        ...

    def apply_adapters(
        self, parts: Sequence[tuple[Adapter, Strength]]
    ) -> AbstractContextManager[None]:
        """Apply adapters at weights for the time of a block; afterwards the base is as it was.

        An adapter of any kind adds its weight times its change of the base's weights. New words
        are known whatever the weight, except at 0.

        A `LoraSchedule` instead of a weight is followed by `sample`, step by step;
        everywhere else it stands as at a drawing's first step, on all rows. Prompts are encoded
        once, so in text encoders it is the strongest weight that its curve reaches.

        Raises:
            AdapterError: If an adapter does not fit this base, or two teach one word.
        """
        ...

    def layers_of(self, adapter: Adapter) -> Mapping[str, Module]:
        """Find the layers that an adapter changes, to listen to them; see `activation_hooks`.

        Raises:
            AdapterError: If the adapter does not fit this base.
        """
        ...

    def recompute_activations(self) -> AbstractContextManager[None]:
        """Recompute activations in the backward passes of a block instead of keeping them."""
        ...

    def tokenize(self, text: str) -> Mapping[str, Sequence[str]]:
        """Say what each text encoder's tokenizer makes of a text, by the encoder's name."""
        ...

    def check_sampler(self, scheduler: str, steps: int) -> None:
        """Find out whether pictures can be drawn so, and draw none.

        Raises:
            ConfigError: If there is no such scheduler for this base model, or it cannot take so
                many or so few steps.
        """
        ...

    def sample(
        self,
        shots: Sequence[Shot],
        sampler: Sampler,
        resolution_px: int | None = None,
        batch: int = 8,
        on_picture: OnProgress = no_progress,
    ) -> list[Image.Image]:
        """Draw one picture per shot, in the order of the shots.

        Pictures are squares of ``resolution_px``, unless the sampler has a size.

        Raises:
            BaseModelError: If what denoiser or decoder give is not finite.
        """
        ...


@runtime_checkable
class Family(Protocol):
    """A kind of base model that DreamLoom can load."""

    name: str

    def recognises(self, base: str) -> bool:
        """Say whether this family can load what ``--base`` names."""
        ...

    def load(
        self, base: str, runtime: Runtime, memory_options: MemoryOptions = NO_SAVINGS
    ) -> Model:
        """Load a base model, sparing memory or not.

        Raises:
            BaseModelError: If it cannot be found or read.
        """
        ...
