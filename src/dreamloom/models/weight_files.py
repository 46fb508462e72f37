"""Weight files of a base model, read layer by layer: no model is built.

Files are read by offset, not mapped into memory, so that what a process holds is what it asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from dreamloom.core.errors import BaseModelError
from dreamloom.lora.sdxl_layers import COMPONENTS, respell_text, sdxl_layers
from dreamloom.models.single_files import Entry, check_is_sdxl, read_header

SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"

_SAMPLE_BYTES = 2**20
_CHUNK_BYTES = 2**24
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
)
_UNET, _CLIP, _OPEN_CLIP = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)
_OPEN_CLIP_LAYERS = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors and so on.
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors"
)
_EMBEDDINGS = ("token_embedding", "position_embedding")


class TensorFile:
    """A safetensors file of which single tensors are read.

    Raises:
        BaseModelError: If it cannot be read as one, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path, header = path, read_header(path)
        self.metadata, self.entries = header.metadata, header.entries

    def read(self, key: str) -> Tensor:
        """Read a tensor in its own precision.

        Raises:
            BaseModelError: If it is in none of fp64, fp32, fp16 and bf16.
        """
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise BaseModelError(
                f"{self.path} holds {key} as {entry.dtype}.",
                "Name a file in fp32, fp16 or bf16.",
            )
        if entry.stop == entry.start:
            return torch.zeros(entry.shape, dtype=_DTYPES[entry.dtype])
        with self.path.open("rb") as file:
            file.seek(entry.start)
            content = bytearray(entry.stop - entry.start)
            file.readinto(content)
        return torch.frombuffer(content, dtype=_DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Give a tensor's bytes, some MiB at a time."""
        entry = self.entries[key]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class TensorPlace:
    """Where the weight of a layer lies.

    Args:
        file: The file.
        key: The tensor in it.
        rows: Which rows of the tensor are the layer's, first and last + 1; None for all.
        transposed: Whether the tensor has inputs before outputs.
    """

    file: TensorFile
    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The sides of the layer's weight, outputs first."""
        sides = self.file.entries[self.key].shape
        if self.transposed:
            sides = sides[::-1]
        return (self.rows[1] - self.rows[0], *sides[1:]) if self.rows else sides

    def pick(self, tensor: Tensor) -> Tensor:
        """The layer's part of the whole tensor, outputs first; a view."""
        tensor = tensor.T if self.transposed else tensor
        return tensor[slice(*self.rows)] if self.rows else tensor


@dataclass(frozen=True)
class BaseWeights:
    """A base model's weights.

    Args:
        path: The folder or the file.
        files: Every file of weights.
        places: For each layer that an adapter may change, by its name such as
            ``unet.mid_block.attentions.0.proj_in``, where its weight lies: once, or once in each
            of the precisions in which a folder holds it, the one that loads by default first.
    """

    path: Path
    files: tuple[TensorFile, ...]
    places: Mapping[str, Sequence[TensorPlace]]

    def shape(self, layer: str) -> tuple[int, ...]:
        """The sides of a layer's weight, outputs first."""
        return self.places[layer][0].shape

    def read(self, layer: str) -> Tensor:
        """Read a layer's weight in its own precision."""
        place = self.places[layer][0]
        return place.pick(place.file.read(place.key))


def open_weights(base: str) -> BaseWeights:
    """Find a base model's weights; nothing but headers is read.

    Args:
        base: ``picturebook``, ``sdxl``, a hub id, a folder in diffusers' layout, or a .safetensors
            checkpoint in the original layout.

    Raises:
        BaseModelError: If it cannot be found or read.
    """
    path = locate_weights(base)
    weights = _open_checkpoint(path) if path.is_file() else _open_folder(path)
    if not weights.places:
        raise BaseModelError(
            f"{path} holds no layer of a Stable Diffusion XL.",
            "Name a folder in diffusers' layout or a checkpoint.",
        )
    return weights


def locate_weights(base: str) -> Path:
    """Find where a base model lies: a folder in diffusers' layout, or a single file.

    Raises:
        BaseModelError: If it is not on this machine and cannot be fetched.
    """
    if base == "picturebook":
        from dreamloom.picturebook import weights_folder

        return weights_folder()
    path = Path(base)
    if path.exists():
        return path
    if base != "sdxl" and (base.count("/") != 1 or path.suffix):
        raise BaseModelError(f"There is no base model at {base}.", "Check the path.")
    try:
        return fetch_pipeline(base)
    except (OSError, ValueError, HfHubHTTPError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
        where = "and HF_HUB_OFFLINE forbids to look for it" if offline else "and was not found"
        raise BaseModelError(
            f"The base model {base} is not on this machine, {where} on the hub.",
            "Connect to the internet, or name a folder or a checkpoint that holds it.",
        ) from error


def fetch_pipeline(base: str) -> Path:
    """Fetch a pipeline in diffusers' layout from the hub, or find it in the hub's cache.

    Raises:
        OSError: If it is neither in the cache nor to be had; ValueError and others likewise.
    """
    name, revision = (SDXL_ID, SDXL_REVISION) if base == "sdxl" else (base, None)
    weights = "*.fp16.safetensors" if base == "sdxl" else "**/*.safetensors"
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", weights])
    )


def _open_folder(folder: Path) -> BaseWeights:
    """Open the weights of a pipeline in diffusers' layout."""
    files: list[TensorFile] = []
    places: dict[str, list[TensorPlace]] = {}
    for component in COMPONENTS:
        inside = folder / component
        found = sorted(inside.glob("*.safetensors")) if inside.is_dir() else []
        # Half-precision copies bear a word more in their names: model.fp16.safetensors.
        for path in sorted(found, key=lambda file: (".fp16" in file.name, file.name)):
            files.append(TensorFile(path))
            for key, entry in files[-1].entries.items():
                name = respell_text(f"{component}.{key.removesuffix('.weight')}")
                if _is_layer(name, key, entry):
                    places.setdefault(name, []).append(TensorPlace(files[-1], key))
    return BaseWeights(folder, tuple(files), places)


def _is_layer(name: str, key: str, entry: Entry) -> bool:
    """Say whether a tensor is the weight of a linear layer or a convolution."""
    return key.endswith(".weight") and len(entry.shape) in {2, 4} and not name.endswith(_EMBEDDINGS)


def _open_checkpoint(path: Path) -> BaseWeights:
    """Open a checkpoint with Stability AI's names."""
    check_is_sdxl(path, read_header(path))
    file = TensorFile(path)
    unet = {layer.stability: layer.name for layer in sdxl_layers().values() if layer.stability}
    places: dict[str, list[TensorPlace]] = {}
    for key, entry in file.entries.items():
        layer = key.removesuffix(".weight")
        if key.startswith(_UNET) and layer.removeprefix(_UNET) in unet and layer != key:
            places[unet[layer.removeprefix(_UNET)]] = [TensorPlace(file, key)]
        elif key.startswith(_CLIP):
            name = respell_text(f"text_encoder.{layer.removeprefix(_CLIP)}")
            if _is_layer(name, key, entry):
                places[name] = [TensorPlace(file, key)]
        elif key.startswith(_OPEN_CLIP):
            found = _place_open_clip(file, key)
            places |= {name: [place] for name, place in found.items()}
    return BaseWeights(path, (file,), places)


def _place_open_clip(file: TensorFile, key: str) -> dict[str, TensorPlace]:
    """Place what OpenCLIP names: queries, keys and values lie in one tensor."""
    inner = key.removeprefix(_OPEN_CLIP)
    if inner == "text_projection":
        return {"text_encoder_2.text_projection": TensorPlace(file, key, transposed=True)}
    if not inner.startswith("transformer.resblocks."):
        return {}
    number, _, what = inner.removeprefix("transformer.resblocks.").partition(".")
    layer = f"text_encoder_2.text_model.encoder.layers.{number}."
    if what == "attn.in_proj_weight":
        side = file.entries[key].shape[0] // 3
        return {
            f"{layer}self_attn.{name}_proj": TensorPlace(file, key, (at * side, (at + 1) * side))
            for at, name in enumerate("qkv")
        }
    theirs = what.removesuffix(".weight")
    if theirs in _OPEN_CLIP_LAYERS and theirs != what:
        return {layer + _OPEN_CLIP_LAYERS[theirs]: TensorPlace(file, key)}
    return {}


def find_variant(folder: Path) -> str | None:
    """Choose half-precision files where a folder holds no others."""
    unet = folder / "unet"
    names = [file.name for file in unet.glob("*.safetensors")] if unet.is_dir() else []
    return "fp16" if names and all(".fp16" in name for name in names) else None


def list_loaded(folder: Path) -> list[Path]:
    """List the weight files that are loaded of a folder in diffusers' layout.

    Beside them may lie variants in other precisions and the same model as one file, as other
    programs put them into the hub's cache, which they share.
    """
    variant = find_variant(folder)
    loaded: list[Path] = []
    for component in (*COMPONENTS, "vae"):
        found = sorted((folder / component).glob("*.safetensors"))
        named = [(file, _VARIANT.fullmatch(file.name)) for file in found]
        chosen = [file for file, name in named if name and name["variant"] == variant]
        loaded += chosen or found
    return sorted(loaded)


def fingerprint_weights(path: Path) -> str:
    """Hash the weight files that are loaded: their names, sizes, and a MiB of ends and middle.

    Reading seven gigabytes before every command would cost more than it protects; two different
    trainings of one architecture differ in every part. What is not loaded does not count.
    """
    return _hash_files(path, [path] if path.is_file() else list_loaded(path))


def fingerprint_every_weight(path: Path) -> str:
    """Hash all weight files of a folder, as adapters of before remember their base."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return _hash_files(path, [f for f in files if "judges" not in f.relative_to(path).parts])


def _hash_files(path: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
