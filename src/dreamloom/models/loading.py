"""Load a base model: a folder, a checkpoint or the hub; its autoencoder (VAE) chosen to fit."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from torch import nn

from dreamloom.core.device import Runtime
from dreamloom.core.errors import BaseModelError
from dreamloom.models import sdxl_configs, single_files
from dreamloom.models.weight_files import (
    fetch_pipeline,
    find_variant,
    fingerprint_every_weight,
    fingerprint_weights,
)
from dreamloom.picturebook import weights_folder

# SDXL's own autoencoder overflows in half precision; this one was tuned not to.
FIXED_VAE_ID = "madebyollin/sdxl-vae-fp16-fix"
FIXED_VAE_REVISION = "207b116dae70ace3637169f1ddd2434b91b3a8cd"

CHECKPOINT_SUFFIXES = (".safetensors", *single_files.PICKLES)
"""How the names of single files end; pickles are refused, but by name."""

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
# Text encoders of before 2023 name this id as the end of a text; CLIP's is another.
_PLACEHOLDER_END = 2


@dataclass(frozen=True)
class BaseSource:
    """A base model that was found: its pipeline and which weights it holds.

    Args:
        pipeline: The pipeline, on the CPU.
        fingerprint: Hash over the files of the weights; see `fingerprint_weights`.
        revision: The hub's commit, or an empty string.
        earlier_fingerprint: The same over all weight files, whether loaded or not; see
            `fingerprint_every_weight`.
        vae_float32: The autoencoder computes in float32 although the rest does not: its own
            dtype says so, it takes pictures in that dtype, and it takes latents in any.
        notes: What the user should know of how the model was loaded, one sentence each.
    """

    pipeline: StableDiffusionXLPipeline
    fingerprint: str
    revision: str = ""
    earlier_fingerprint: str = ""
    vae_float32: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Autoencoder:
    """The autoencoder to load a pipeline with; None leaves it the pipeline's own."""

    module: AutoencoderKL | None = None
    note: str = ""

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.module is None else {"vae": self.module}


def load_source(base: str, runtime: Runtime, configs: Path | None = None) -> BaseSource:
    """Load the pipeline that ``--base`` names.

    Args:
        base: ``picturebook``, ``sdxl``, a folder in diffusers' layout, a .safetensors checkpoint
            in the original layout, or a hub id.
        runtime: The precision to load in. In float16 an autoencoder that overflows there gives
            way to one that does not, or stays in float32; ``notes`` says which.
        configs: A folder with configuration and tokenizers for a checkpoint that is not of SDXL's
            published size; by default those of SDXL base 1.0, which come with this package.

    Raises:
        BaseModelError: If it cannot be found (offline, or at all) or is not SDXL.
    """
    # The libraries tell much that is meant for their own users; ours hear what matters.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if base == "picturebook" or Path(base).is_dir():
            folder = weights_folder() if base == "picturebook" else Path(base)
            _check_index(folder)
            vae = _choose_autoencoder(folder, runtime.dtype)
            source = _load_pipeline(folder, runtime.dtype, vae)
        elif base.lower().endswith(CHECKPOINT_SUFFIXES):
            source = _load_checkpoint(Path(base), runtime.dtype, configs)
        else:
            folder = fetch_pipeline(base)
            _check_index(folder)
            choose = _fetch_fixed_autoencoder if base == "sdxl" else _choose_autoencoder
            vae = choose(folder, runtime.dtype)
            source = _load_pipeline(folder, runtime.dtype, vae, revision=folder.name)
    except _UNREADABLE as error:
        raise _explain(base, error) from error
    pipeline = source.pipeline
    takes, gives = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != gives:
        raise BaseModelError(
            f"The base model {base} cannot be taught: its U-Net takes {takes} channels where its "
            f"autoencoder gives {gives}; it looks like one for inpainting or editing.",
            "Name an SDXL that draws from prompts alone.",
        )
    _name_the_end_of_text(pipeline.text_encoder, pipeline.tokenizer.eos_token_id)
    _name_the_end_of_text(pipeline.text_encoder_2, pipeline.tokenizer_2.eos_token_id)
    return source


def _load_pipeline(folder: Path, dtype: torch.dtype, vae: _Autoencoder, **more: Any) -> BaseSource:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder,
        local_files_only=True,
        add_watermarker=False,
        use_safetensors=True,
        dtype=dtype,
        variant=find_variant(folder),
        **vae.options,
    )
    return _finish(pipeline, folder, vae, **more)


def _load_checkpoint(path: Path, dtype: torch.dtype, configs: Path | None) -> BaseSource:
    header = single_files.read_header(path)
    single_files.check_is_sdxl(path, header)
    folder = configs or sdxl_configs.FOLDER
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    if single_files.has_autoencoder(header):
        vae = _choose_autoencoder(folder, dtype, path)
    else:
        vae = _borrow_autoencoder(path, dtype)
    tokenizers: dict[str, Any] = {}
    if configs is None:
        first, second = sdxl_configs.make_tokenizers()
        tokenizers = {"tokenizer": first, "tokenizer_2": second}
    try:
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(path), dtype=dtype, add_watermarker=False, **options, **tokenizers, **vae.options
        )
    except NotImplementedError as error:
        # torch says so of weights that were announced and never filled in.
        raise _explain_gaps(path) from error
    if any(weight.is_meta for part in _PARTS for weight in getattr(pipeline, part).parameters()):
        raise _explain_gaps(path)
    changes = single_files.read_schedule_changes(header)
    if changes:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changes)
    return _finish(pipeline, path, vae)


def _finish(
    pipeline: StableDiffusionXLPipeline, path: Path, vae: _Autoencoder, revision: str = ""
) -> BaseSource:
    in_float32 = vae.module is not None and vae.module.dtype != pipeline.unet.dtype
    if in_float32:
        # Latents come in the pipeline's half precision; the first layer that meets them casts.
        pipeline.vae.post_quant_conv.register_forward_pre_hook(
            lambda layer, inputs: (inputs[0].to(layer.weight.dtype), *inputs[1:])
        )
    notes = (vae.note,) if vae.note else ()
    return BaseSource(
        pipeline,
        fingerprint_weights(path),
        revision,
        fingerprint_every_weight(path),
        in_float32,
        notes,
    )


def _choose_autoencoder(
    folder: Path, dtype: torch.dtype, checkpoint: Path | None = None
) -> _Autoencoder:
    """Choose an autoencoder that does not overflow in this precision.

    ``force_upcast`` marks those that do, in float16 alone: bfloat16 reaches as far as float32.
    A checkpoint cannot tell whether its own was mended, so it counts as the published one.
    """
    config = AutoencoderKL.load_config(folder, subfolder="vae", local_files_only=True)
    if dtype != torch.float16 or not config.get("force_upcast"):
        return _Autoencoder()
    whose = "The checkpoint's" if checkpoint else "The base model's"
    fixed = _read_fixed_autoencoder(dtype)
    if fixed is not None and _shape_of(fixed.config) == _shape_of(config):
        note = f"{whose} autoencoder overflows in fp16; {FIXED_VAE_ID} takes its place."
        return _Autoencoder(fixed, note)
    note = (
        f"{whose} autoencoder overflows in fp16, so it computes in float32, slower and in more "
        f"memory; once {FIXED_VAE_ID} is in the hub's cache, that one takes its place."
    )
    if checkpoint is not None:
        own = AutoencoderKL.from_single_file(
            str(checkpoint),
            config=str(folder),
            subfolder="vae",
            local_files_only=True,
            dtype=torch.float32,
        )
    else:
        own = AutoencoderKL.from_pretrained(
            folder,
            subfolder="vae",
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            variant=find_variant(folder),
        )
    return _Autoencoder(own, note)


def _borrow_autoencoder(path: Path, dtype: torch.dtype) -> _Autoencoder:
    """Find an autoencoder for a checkpoint that brings none."""
    fixed = _read_fixed_autoencoder(dtype)
    if fixed is None:
        raise BaseModelError(
            f"{path} is no complete SDXL: it brings no autoencoder (VAE).",
            f"Name a checkpoint with one, or fetch {FIXED_VAE_ID} into the hub's cache.",
        )
    note = f"The checkpoint brings no autoencoder; {FIXED_VAE_ID} takes its place."
    return _Autoencoder(fixed, note)


def _fetch_fixed_autoencoder(folder: Path, dtype: torch.dtype) -> _Autoencoder:
    """Load the same from the hub for SDXL itself; its own must do where it cannot be reached."""
    fixed = _read_fixed_autoencoder(dtype, local_files_only=False)
    if fixed is not None:
        return _Autoencoder(fixed)
    own = _choose_autoencoder(folder, dtype)
    note = own.note or f"{FIXED_VAE_ID} cannot be fetched, so SDXL's own autoencoder is used."
    return _Autoencoder(own.module, note)


def _read_fixed_autoencoder(
    dtype: torch.dtype, local_files_only: bool = True
) -> AutoencoderKL | None:
    """Load the autoencoder that does not overflow; None if it is not there."""
    try:
        folder = snapshot_download(
            FIXED_VAE_ID,
            revision=FIXED_VAE_REVISION,
            allow_patterns=["config.json", "diffusion_pytorch_model.safetensors"],
            local_files_only=local_files_only,
        )
        return AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype
        )
    except _UNREADABLE:
        return None


def _shape_of(config: Any) -> list[Any]:
    """What two autoencoders must have in common so that their latents are the same."""
    names = ("block_out_channels", "latent_channels", "scaling_factor", "layers_per_block")
    return [list(v) if isinstance(v, list | tuple) else v for v in map(config.get, names)]


def _check_index(folder: Path) -> None:
    """Make sure that a folder holds a whole SDXL pipeline in diffusers' layout."""
    index = folder / "model_index.json"
    if not index.is_file():
        single = sorted(file.name for file in folder.glob("*.safetensors"))
        raise BaseModelError(
            f"{folder} has no model_index.json, so it is not a pipeline in diffusers' layout.",
            f"Name the checkpoint itself: {folder / single[0]}."
            if single
            else "Name the folder that holds model_index.json, unet/, vae/ and the text encoders.",
        )
    index_file: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    kind = str(index_file.get("_class_name"))
    if "XL" not in kind:
        raise BaseModelError(
            f"{folder} holds a {kind}, and DreamLoom teaches Stable Diffusion XL.", "Name an SDXL."
        )
    if (index_file.get("text_encoder") or [None])[0] is None:
        raise BaseModelError(
            f"{folder} has no first text encoder: it looks like the SDXL refiner, which only "
            "finishes pictures.",
            "Name the SDXL base model, or a fine-tune of it.",
        )
    if str((index_file.get("scheduler") or ["", ""])[1]).startswith("EDM"):
        raise BaseModelError(
            f"{folder} was trained with EDM's noise levels (Playground v2.5), which DreamLoom "
            "cannot teach.",
            "Name an SDXL that predicts noise or velocity.",
        )
    _refuse_foreign_shards(folder)


def _refuse_foreign_shards(folder: Path) -> None:
    """Make sure that the indexes of sharded weights name safetensors files beside them alone.

    The libraries follow such an index wherever it leads, and open a pickle that it names as one.
    """
    for index in sorted(folder.glob("*/*.safetensors.index*.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(
                f"{index} is no index of weight files: {error}.", "Download or copy it again."
            ) from None
        for name in sorted(map(str, named)):
            if Path(name).suffix != ".safetensors" or Path(name).name != name or "\\" in name:
                raise BaseModelError(
                    f"{index} names {name}, which is no .safetensors file beside it; a pickle can "
                    "run any program when it is read.",
                    "Name a base model whose weights are safetensors files.",
                )


def _explain_gaps(path: Path) -> BaseModelError:
    return BaseModelError(
        f"{path} is no complete SDXL of the published size: weights are missing.",
        "Name a complete checkpoint; smaller relatives (SSD-1B, Vega) load from a folder in "
        "diffusers' layout.",
    )


def _name_the_end_of_text(encoder: nn.Module, end: int) -> None:
    """Let a text encoder find a prompt's end by its id.

    With the placeholder, transformers pools at the highest id of a prompt: CLIP's end token,
    until a new word is added behind it and every prompt with that word is pooled there.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == _PLACEHOLDER_END:
            module.eos_token_id = end  # type: ignore[assignment]


def _explain(base: str, error: Exception) -> BaseModelError:
    if isinstance(error, GatedRepoError):
        return BaseModelError(
            f"The base model {base} is behind a licence that must be accepted first.",
            "Accept it on the model's page on the hub, run `hf auth login`, and try again.",
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
    looks_like_hub = base == "sdxl" or (base.count("/") == 1 and not Path(base).exists())
    if looks_like_hub and isinstance(error, OSError):
        where = "and HF_HUB_OFFLINE forbids to look for it" if offline else "and it was not found"
        return BaseModelError(
            f"The base model {base} is not on this machine, {where} on the hub.",
            "Connect to the internet and run the command again, name a folder that holds it, "
            "or try everything with --base picturebook, which is built in.",
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BaseModelError(
        f"The base model {base} cannot be loaded as SDXL: {reason}",
        "Check the path; the folder or checkpoint must hold a complete SDXL.",
    )
