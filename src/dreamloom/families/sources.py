"""Where a base model's weights lie, and how they are read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from dreamloom.errors import BaseModelError
from dreamloom.picturebook import weights_folder
from dreamloom.runtime import Runtime

SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
# SDXL's own autoencoder overflows in half precision; this one was tuned not to.
FIXED_VAE_ID = "madebyollin/sdxl-vae-fp16-fix"
FIXED_VAE_REVISION = "207b116dae70ace3637169f1ddd2434b91b3a8cd"
_SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """A base model that was found: its pipeline and which weights it holds."""

    pipeline: StableDiffusionXLPipeline
    fingerprint: str
    revision: str = ""


def load_source(base: str, runtime: Runtime) -> Source:
    """Load the pipeline that ``--base`` names.

    Raises:
        BaseModelError: If it cannot be found (offline, or at all) or is not SDXL.
    """
    _quieten()
    options: dict[str, Any] = {"dtype": runtime.dtype, "use_safetensors": True}
    try:
        if base == "picturebook":
            return _load_folder(weights_folder(), options)
        if Path(base).is_dir():
            return _load_folder(Path(base), options)
        if base.endswith(".safetensors"):
            return _load_checkpoint(Path(base), options)
        return _load_from_hub(base, options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _explain(base, error) from error


def _quieten() -> None:
    """The libraries tell much that is meant for their own users; ours hear what matters."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _load_folder(folder: Path, options: dict[str, Any]) -> Source:
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder} has no model_index.json, so it is not a pipeline in diffusers' layout.",
            "Name the folder that holds model_index.json, unet/, vae/ and the text encoders.",
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, local_files_only=True, add_watermarker=False, **options
    )
    return Source(pipeline, fingerprint_weights(folder))


def _load_checkpoint(path: Path, options: dict[str, Any]) -> Source:
    if not path.is_file():
        raise BaseModelError(f"There is no checkpoint at {path}.", "Check the path.")
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), **options)
    return Source(pipeline, fingerprint_weights(path))


def _load_from_hub(base: str, options: dict[str, Any]) -> Source:
    from huggingface_hub import snapshot_download

    name, revision = (SDXL_ID, SDXL_REVISION) if base == "sdxl" else (base, None)
    folder = Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.txt", "*.fp16.safetensors"]
            if base == "sdxl"
            else ["*.json", "*.txt", "**/*.safetensors"],
        )
    )
    if base == "sdxl":
        options = options | {
            "variant": "fp16",
            "vae": AutoencoderKL.from_pretrained(
                FIXED_VAE_ID, revision=FIXED_VAE_REVISION, dtype=options["dtype"]
            ),
        }
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, local_files_only=True, add_watermarker=False, **options
    )
    return Source(pipeline, fingerprint_weights(folder), revision=folder.name)


def fingerprint_weights(path: Path) -> str:
    """Hash a model's weight files: their names, sizes, and a MiB from both ends and the middle.

    Reading seven gigabytes before every command would cost more than it protects; two different
    trainings of one architecture differ in every part.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    for file in files:
        if path.is_dir() and "judges" in file.relative_to(path).parts:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _explain(base: str, error: Exception) -> BaseModelError:
    if isinstance(error, BaseModelError):
        return error
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
    looks_like_hub = base == "sdxl" or (base.count("/") == 1 and not Path(base).exists())
    if looks_like_hub:
        where = "and HF_HUB_OFFLINE forbids to look for it" if offline else "and it was not found"
        return BaseModelError(
            f"The base model {base} is not on this machine, {where} on the hub.",
            "Connect to the internet and run the command again, name a folder that holds it, "
            "or try everything with --base picturebook, which is built in.",
        )
    return BaseModelError(
        f"The base model {base} cannot be loaded as SDXL: {_first_line(error)}",
        "Check the path; the folder or checkpoint must hold a complete SDXL.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
