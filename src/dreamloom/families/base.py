"""What a family of base models must be able to do; everything else is the family's own affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from dreamloom.adapters import Adapter
from dreamloom.runtime import Runtime

Reach = Literal["attention", "linear", "all"]
"""Which layers an adapter may change: attention only, every linear layer, or convolutions too."""


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
class LoraSpec:
    """The shape of a new adapter.

    Args:
        rank: Rank of each layer's update, 1 or more.
        alpha: The update is scaled by ``alpha / rank``.
        reach: Which layers may change.
        seed: Seed of the first weights; the update itself begins at zero.
    """

    rank: int
    alpha: float
    reach: Reach
    seed: int


@dataclass(frozen=True)
class Sampler:
    """How a picture is drawn from noise.

    Args:
        scheduler: One of the names in ``Model.schedulers``.
        steps: Denoising steps, 1 or more.
        guidance: Classifier-free guidance; 1 and below switch it off.
    """

    scheduler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class Shot:
    """One picture to draw: what, and from which noise.

    A shot's picture does not depend on the other shots of its batch.
    """

    prompt: str
    seed: int


@dataclass(frozen=True)
class Advice:
    """Settings that suit this base model; they replace every ``auto`` in the configuration."""

    resolution_px: int
    guidance: float
    learning_rate: float
    reach: Reach


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is.

    Args:
        name: What the user asked for: ``picturebook``, ``sdxl``, a hub id, a path.
        family: The family that loaded it.
        fingerprint: Hash over the files of the weights; adapters remember it.
        revision: The hub's commit, or an empty string.
    """

    name: str
    family: str
    fingerprint: str
    revision: str = ""

    def as_dict(self) -> dict[str, str]:
        """The same as a dictionary, for records."""
        return {
            "name": self.name,
            "family": self.family,
            "fingerprint": self.fingerprint,
            "revision": self.revision,
        }


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


OnPicture = Callable[[int, int], None]
"""Called with (pictures finished, pictures in all) while drawing."""


def nothing(done: int, total: int) -> None:
    """Ignore the progress of drawing."""


@runtime_checkable
class Model(Protocol):
    """A loaded base model. Nothing outside may assume its channels, sizes or token counts."""

    identity: BaseIdentity
    runtime: Runtime
    advice: Advice
    schedulers: tuple[str, ...]
    pixels_per_latent: int
    train_timesteps: int

    def encode_images(self, pixels: Float[Tensor, "images 3 height width"]) -> Latents:
        """Encode pictures in [-1, 1]; height and width are multiples of ``pixels_per_latent``."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts once; too long ones are cut by the family, with no error."""
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
        """What `predict` should return: noise, velocity or flow, as the base was trained."""
        ...

    def snr(self, timesteps: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        """Signal-to-noise ratio of each timestep, above 0."""
        ...

    def predict(
        self,
        noisy: Float[Tensor, "images channels height width"],
        timesteps: Int[Tensor, " images"],
        conditioning: Conditioning,
        framings: Sequence[Framing],
    ) -> Float[Tensor, "images channels height width"]:
        """Predict the target; gradients flow to an attached LoRA."""
        ...

    def release_encoders(self) -> None:
        """Free the memory of what only encodes; it comes back by itself when needed."""
        ...

    def attach_lora(self, spec: LoraSpec, save_memory: bool = False) -> list[Parameter]:
        """Add a new adapter that changes nothing yet; return its float32 weights to train.

        With ``save_memory`` the backward pass recomputes activations instead of keeping them.
        """
        ...

    def read_lora(self) -> Adapter:
        """Copy the attached adapter as it is now, on the CPU."""
        ...

    def detach_lora(self) -> None:
        """Remove the attached adapter; the base is as it was."""
        ...

    def lora_off(self) -> AbstractContextManager[None]:
        """Predict as the base model does, for the time of a block."""
        ...

    def wear(self, parts: Sequence[tuple[Adapter, float]]) -> AbstractContextManager[None]:
        """Wear adapters at weights for the time of a block; afterwards the base is as it was.

        Raises:
            AdapterError: If an adapter's layers do not fit this base.
        """
        ...

    def sample(
        self,
        shots: Sequence[Shot],
        sampler: Sampler,
        resolution_px: int | None = None,
        batch: int = 8,
        on_picture: OnPicture = nothing,
    ) -> list[Image.Image]:
        """Draw one picture per shot, square, in the order of the shots."""
        ...


@runtime_checkable
class Family(Protocol):
    """A kind of base model that DreamLoom can load."""

    name: str

    def recognises(self, base: str) -> bool:
        """Say whether this family can load what ``--base`` names."""
        ...

    def load(self, base: str, runtime: Runtime) -> Model:
        """Load a base model.

        Raises:
            BaseModelError: If it cannot be found or read.
        """
        ...
