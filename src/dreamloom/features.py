"""Pictures and prompts to vectors: the pinned encoders, and how they are fed.

A score depends on its encoder, the encoder's revision and the preprocessing; an encoder's ``key``
names all three, and only scores of one key may be compared. Encoders see PIL pictures in 8-bit
RGB and nothing else, so that no picture can arrive at a wrong scale. Nothing is downloaded here:
an encoder whose weights are not on this machine is `Missing`, with the reason, and no other takes
its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dreamloom.errors import EvaluationError
from dreamloom.pixels import to_tensor
from dreamloom.rundir import file_sha256

EncoderKind: TypeAlias = Literal["picturebook", "standard"]

_WEIGHTS = "model.safetensors"
# Real encoders normalise to about -2.1 to 2.7. A picture in 0 to 255 would come out at some 480.
_LARGEST_NORMALISED = 3.0


@runtime_checkable
class Extractor(Protocol):
    """Something that looks at pictures."""

    key: str
    """Encoder, revision and preprocessing: only scores of equal keys may be compared."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors on the CPU, in float32."""
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """Something that looks at pictures and reads prompts."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """Turn prompts into unit vectors; what is too long is cut off at the end."""
        ...

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """List the texts that `embed_texts` cuts off."""
        ...


@runtime_checkable
class PixelJudge(Protocol):
    """What picturebook's identity encoder offers."""

    key: str

    def embed(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Turn pixels in [0, 1] into unit vectors."""
        ...


@dataclass(frozen=True)
class Missing:
    """An encoder that is not here; ``reason`` is one clause to stand behind "not measured:"."""

    reason: str


Familiarity: TypeAlias = Callable[[Sequence[Image.Image]], list[bool]]
"""Says for each picture whether it lies inside the world that the encoders know."""


_NO_DINO = Missing("picturebook's judges have no DINO")


@dataclass(frozen=True)
class Encoders:
    """The encoders of one evaluation.

    Args:
        kind: ``picturebook`` for the embedded model's judges, ``standard`` for photographs.
        identity: Knows who is shown.
        clip: Knows what is shown, and reads prompts.
        dino: Knows how it looks in detail.
        familiar: Says which pictures the encoders know; None if they know every kind.
        device: Where they compute.
    """

    kind: EncoderKind
    identity: Extractor | Missing
    clip: TextExtractor | Missing
    dino: Extractor | Missing
    familiar: Familiarity | None = None
    device: str = "cpu"

    def named(self) -> dict[str, Extractor | Missing]:
        """The encoders by the names that measures use."""
        return {"identity": self.identity, "clip": self.clip, "dino": self.dino}

    def keys(self) -> dict[str, str]:
        """The key of each encoder, or why it is missing: what a result depends on."""
        return {
            name: f"missing: {encoder.reason}" if isinstance(encoder, Missing) else encoder.key
            for name, encoder in self.named().items()
        }


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an encoder's input.

    Shorter side to ``resize_px`` (PIL bicubic, which smooths as it shrinks), centre crop to
    ``crop_px``, to [0, 1], then (value - mean) / deviation for each channel.

    Raises:
        ValueError: If the numbers would send 8-bit pictures beyond what encoders are trained on.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(
                f"a crop must be 1 px to the resized side, got {self.crop_px} of {self.resize_px}"
            )
        ends = [
            (end - mean) / deviation if deviation > 0 else float("inf")
            for mean, deviation in zip(self.mean, self.deviation, strict=True)
            for end in (0.0, 1.0)
        ]
        if max(map(abs, ends)) > _LARGEST_NORMALISED:
            raise ValueError(
                f"mean {self.mean} and deviation {self.deviation} send pictures beyond "
                f"{_LARGEST_NORMALISED:g}: they are not meant for pixels in [0, 1]"
            )
        if max(self.deviation) > 1:
            raise ValueError(
                f"a deviation of {max(self.deviation)} would leave hardly any contrast: "
                f"it is not meant for pixels in [0, 1]"
            )

    @property
    def key(self) -> str:
        """A short name of the whole recipe."""
        numbers = hashlib.sha256(repr((self.mean, self.deviation)).encode()).hexdigest()[:8]
        return f"bicubic-{self.resize_px}-crop-{self.crop_px}-norm-{numbers}"

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 side side"]:
        """Prepare pictures.

        Raises:
            ValueError: If there is none, or one is not RGB.
        """
        unfit = {image.mode for image in images} - {"RGB"}
        if unfit:
            raise ValueError(f"pictures must be 8-bit RGB, got {', '.join(sorted(unfit))}")
        pixels = to_tensor([self._frame(image) for image in images])
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        normalised = (pixels - mean[:, None, None]) / deviation[:, None, None]
        largest = float(normalised.abs().max())
        assert largest <= _LARGEST_NORMALISED + 1e-4, f"pictures reach the encoder at {largest}"
        return normalised

    def _frame(self, image: Image.Image) -> Image.Image:
        scale = self.resize_px / min(image.size)
        width, height = (max(self.resize_px, round(side * scale)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop_px) // 2, (height - self.crop_px) // 2
        return image.crop((left, top, left + self.crop_px, top + self.crop_px))

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """Read an encoder's own ``preprocessor_config.json``.

        Raises:
            ValueError: If a key is absent or does not describe a resize and a square crop.
        """
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        try:
            resize_px = _side(settings["size"])
            crop_px = _side(settings.get("crop_size", resize_px))
            mean, deviation = settings["image_mean"], settings["image_std"]
            return cls(resize_px, crop_px, _three(mean), _three(deviation))
        except KeyError as error:
            raise ValueError(f"{folder}/preprocessor_config.json has no {error}") from None


def _side(size: int | Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    sides = set(size.values())
    if len(sides) != 1:
        raise ValueError(f"a size must be one number for both sides, got {dict(size)}")
    return sides.pop()


def _three(numbers: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in numbers)
    return red, green, blue


CLIP_PREPROCESSING = Preprocessing(
    224,
    224,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
DINO_PREPROCESSING = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pinned:
    """An encoder on the Hugging Face hub: always the same bytes.

    Args:
        repository: Owner and name.
        revision: The commit.
        licence: What its authors allow.
    """

    repository: str
    revision: str
    licence: str

    @property
    def name(self) -> str:
        """Repository and the beginning of the commit, for keys."""
        return f"{self.repository}@{self.revision[:12]}"

    def folder(self) -> Path | Missing:
        """Find the files on this machine; nothing is downloaded."""
        try:
            path = snapshot_download(self.repository, revision=self.revision, local_files_only=True)
        except OSError:
            return Missing(
                f"the weights of {self.name} are not on this machine; fetch them with "
                f"'hf download {self.repository} --revision {self.revision}'"
            )
        if not (Path(path) / _WEIGHTS).is_file():
            return Missing(
                f"{self.name} has no {_WEIGHTS} on this machine, and DreamLoom reads weights "
                f"from safetensors only"
            )
        return Path(path)


# The hub's own conversion of OpenAI's weights to safetensors; the main branch has only a pickle.
CLIP_VIT_B_32 = Pinned(
    "openai/clip-vit-base-patch32", "c237dc49a33fc61debc9276459120b7eac67e7ef", "MIT"
)
DINO_VIT_S_16 = Pinned(
    "facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd", "Apache-2.0"
)


class ClipEncoder:
    """A CLIP of any size: pictures and prompts in one space.

    Args:
        folder: Holds config.json, model.safetensors and the tokenizer.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: None reads the folder's own preprocessor_config.json.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        with _explaining(folder):
            self.preprocessing = preprocessing or Preprocessing.read(folder)
            self._model = _load(CLIPModel, folder, device)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._longest = int(self._model.config.text_config.max_position_embeddings)
        self.key = f"{name or _name(folder)}/{self.preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        return self.embed_pixels(self.preprocessing(images))

    def embed_pixels(
        self, normalised: Float[Tensor, "images 3 side side"]
    ) -> Float[Tensor, "images features"]:
        """Turn what `preprocessing` makes of pictures into unit vectors.

        Nothing is checked here, so that the audit can show what wrongly prepared pixels do.
        Everybody else calls `embed`.
        """
        pixels = normalised.to(self._model.device)
        with _steady(pixels.device):
            return _unit(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """Turn prompts into unit vectors; what is too long is cut off at the end."""
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._model.device)
        with _steady(self._model.device):
            features = self._model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return _unit(features.pooler_output)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """List the texts that `embed_texts` cuts off."""
        counted = [
            (text, len(self._tokenizer(text, truncation=False, verbose=False).input_ids))
            for text in texts
        ]
        return [text for text, tokens in counted if tokens > self._longest]


class DinoEncoder:
    """A vision transformer taught by DINO: its class token after the last layer.

    Args:
        folder: Holds config.json and model.safetensors.
        name: How the key names it; None takes the folder's name and the hash of its weights.
        preprocessing: The published recipe unless told otherwise.
        device: Where to compute; always in float32.

    Raises:
        EvaluationError: If a file is missing, damaged, or of another kind of model.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing = DINO_PREPROCESSING,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import ViTModel

        self._preprocessing = preprocessing
        with _explaining(folder):
            self._model = _load(ViTModel, folder, device, add_pooling_layer=False)
        self.key = f"{name or _name(folder)}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        pixels = self._preprocessing(images).to(self._model.device)
        with _steady(pixels.device):
            return _unit(self._model(pixel_values=pixels).last_hidden_state[:, 0])


class PixelEncoder:
    """An encoder that takes pixels in [0, 1], as picturebook's judges do.

    Args:
        judge: Has a ``key``, and ``embed`` from pixels to unit vectors.
        preprocessing: How pictures become pixels.
    """

    def __init__(self, judge: PixelJudge, preprocessing: Preprocessing) -> None:
        self._judge, self._preprocessing = judge, preprocessing
        self.key = f"{judge.key}/{preprocessing.key}"

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn RGB pictures of any sizes into unit vectors."""
        with _steady(torch.device("cpu")):
            return _unit(self._judge.embed(self._preprocessing(images)))


def load_encoders(kind: EncoderKind, device: torch.device | str = "cpu") -> Encoders:
    """Load the encoders of one kind; those whose weights are not here are `Missing`."""
    return _picturebook(device) if kind == "picturebook" else _standard(device)


def _picturebook(device: torch.device | str) -> Encoders:
    from dreamloom.picturebook import judges

    try:
        clip = ClipEncoder(judges.clip_folder(), judges.clip_key(), device=device)
        reader = judges.load_attribute_reader()
        look = Preprocessing(judges.PICTURE_PX, judges.PICTURE_PX, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        identity = PixelEncoder(judges.load_identity_encoder(), look)
    except FileNotFoundError:
        absent = Missing("picturebook's judges are not installed; install DreamLoom again")
        return Encoders("picturebook", identity=absent, clip=absent, dino=_NO_DINO)
    return Encoders(
        kind="picturebook",
        identity=identity,
        clip=clip,
        dino=_NO_DINO,
        familiar=lambda images: reader.is_familiar(look(images)),
        device=str(device),
    )


def _standard(device: torch.device | str) -> Encoders:
    clip, dino = CLIP_VIT_B_32.folder(), DINO_VIT_S_16.folder()
    return Encoders(
        kind="standard",
        identity=Missing("there is no face encoder yet for photographs"),
        clip=clip
        if isinstance(clip, Missing)
        else ClipEncoder(clip, CLIP_VIT_B_32.name, CLIP_PREPROCESSING, device),
        dino=dino
        if isinstance(dino, Missing)
        else DinoEncoder(dino, DINO_VIT_S_16.name, device=device),
        device=str(device),
    )


def _name(folder: Path) -> str:
    return f"{folder.name}@{file_sha256(folder / _WEIGHTS)[:12]}"


def _load(kind: Any, folder: Path, device: torch.device | str, **options: Any) -> Any:
    """Load a model's weights, all of them: a layer left at random would score in silence."""
    with _quiet():
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ValueError(f"{_WEIGHTS} lacks {len(absent)} of the model's weights: {absent[0]} …")
    assert isinstance(model, nn.Module)
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise EvaluationError(
            f"The encoder in {folder} cannot be read: {error}.",
            "Fetch it again, or name another one.",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bar off the screen: library code never prints."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    """Compute in float32 without gradients, whatever precision the caller draws in."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=1).cpu()
