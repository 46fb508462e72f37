"""Single-file checkpoints: what a .safetensors file holds, read from its header alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamloom.core.errors import BaseModelError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

_UNET = "model.diffusion_model."
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_ENCODERS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
_VAE = "first_stage_model."
_PARTS = ((_UNET, "U-Net"), (_ENCODERS[0], "first text encoder"), (_ENCODERS[1], "second"))
# safetensors itself refuses longer headers; SDXL's takes 0.3 MB.
_LONGEST_HEADER = 100_000_000

_WHOLE = "Name a complete SDXL checkpoint, which holds the U-Net, both text encoders and the VAE."
# The first pattern that a file's tensors match tells what it is, so the order matters: an adapter
# for Flux is an adapter, and the refiner shares its U-Net's names with the base.
_OTHERS: tuple[tuple[str, str, str], ...] = (
    (
        r"lora_(up|down|A|B)\b|\.lora\.|\.(hada|lokr)_w|\.oft_|oft_(blocks|diag)|dora_scale",
        "a LoRA or another adapter, not a base model",
        "Name the base model that it was made for; adapters belong to --adapter.",
    ),
    (
        r"^(clip_[lg]|emb_params|string_to_param\..*)$",
        "a textual inversion (new words), not a base model",
        "Name the base model that it was made for.",
    ),
    (r"^(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet, no base model", _WHOLE),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, no base model", _WHOLE),
    (
        r"^(edm_|denoiser\.sigmas)",
        "an SDXL that was trained with EDM's noise levels (Playground v2.5, CosXL), which "
        "DreamLoom cannot teach",
        "Name an SDXL that predicts noise or velocity.",
    ),
    (
        r"^conditioner\.embedders\.0\.model\.",
        "the SDXL refiner, which only finishes pictures",
        "Name the SDXL base model, or a fine-tune of it.",
    ),
    (r"^cond_stage_model\.transformer\.", "a Stable Diffusion 1.x", "Name an SDXL."),
    (r"^cond_stage_model\.model\.", "a Stable Diffusion 2.x", "Name an SDXL."),
    (r"joint_blocks\.", "a Stable Diffusion 3", "Name an SDXL."),
    (r"double_blocks\.|single_transformer_blocks\.", "a Flux or a relative", "Name an SDXL."),
    (r"^(down_blocks|add_embedding)\.", "a U-Net alone, in diffusers' layout", _WHOLE),
    (r"^text_model\.", "a text encoder alone", _WHOLE),
    (r"^(encoder|decoder)\.", "an autoencoder (VAE) alone", _WHOLE),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        dtype: As safetensors calls it, such as ``F16``.
        shape: Its sides.
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's tensors by name, and what its maker wrote beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str]

    def has(self, prefix: str) -> bool:
        """Say whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.entries)


def read_header(path: Path) -> Header:
    """Read a .safetensors file's header and check that all that it announces is there.

    Raises:
        BaseModelError: If there is no such file, it is something else, or it is cut short.
    """
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(
            f"{path} is a pickle, and a pickle can run any program when it is read.",
            "Name the .safetensors file of the same model; most are published as one, too.",
        )
    if not path.is_file():
        raise BaseModelError(
            f"There is no checkpoint at {path}.", "Check the path, or name the base with --base."
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        text = stream.read(length) if len(start) == 8 and length <= _LONGEST_HEADER else b""
    try:
        found: dict[str, Any] = json.loads(text)
        metadata = found.pop("__metadata__", {})
        entries = {}
        for name, one in found.items():
            first, last = one["data_offsets"]
            first, last = 8 + length + first, 8 + length + last
            entries[name] = Entry(one["dtype"], tuple(one["shape"]), first, last)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _explain_foreign(path, start, size) from error
    announced = max((entry.stop for entry in entries.values()), default=8 + length)
    if size < announced:
        raise BaseModelError(
            f"{path} is cut short: it holds {size:,} of the {announced:,} bytes it announces.",
            "Download or copy it again.",
        )
    return Header(entries, metadata)


def _explain_foreign(path: Path, start: bytes, size: int) -> BaseModelError:
    marks = {
        b"PK": "a pickle or another zip archive",
        b"version ": "a git-lfs pointer to the file, not the file itself",
        b"<": "a web page, perhaps that of a failed download",
        b"GGUF": "a GGUF file",
    }
    seen = next((what for mark, what in marks.items() if start.startswith(mark)), "")
    what = f"It looks like {seen}." if seen else f"It is cut short or damaged ({size:,} bytes)."
    return BaseModelError(
        f"{path} has no readable safetensors header. {what}", "Download or copy the file again."
    )


def check_is_sdxl(path: Path, header: Header) -> None:
    """Make sure that a file holds an SDXL base model in the original layout.

    Raises:
        BaseModelError: If it does not, saying what it looks like instead.
    """
    for pattern, what, hint in _OTHERS:
        if any(re.search(pattern, name) for name in header.entries):
            raise BaseModelError(f"{path} cannot be taught: it looks like {what}.", hint)
    missing = [part for prefix, part in _PARTS if not header.has(prefix)]
    if len(missing) == len(_PARTS):
        calls_itself = header.metadata.get("modelspec.architecture", "")
        what = f"It calls itself {calls_itself}." if calls_itself else "Its names are unknown."
        raise BaseModelError(f"{path} holds nothing of an SDXL. {what}", _WHOLE)
    if missing:
        raise BaseModelError(
            f"{path} is no complete SDXL: it lacks the {' and the '.join(missing)}"
            f"{' text encoder' if missing[-1] == 'second' else ''}.",
            _WHOLE,
        )
    first = header.entries.get(_FIRST_LAYER)
    channels = 4 if first is None else first.shape[1]
    if channels != 4:
        raise BaseModelError(
            f"{path} cannot be taught: it looks like an SDXL for inpainting or editing, whose "
            f"U-Net takes {channels} channels instead of 4.",
            "Name an SDXL that draws from prompts alone.",
        )


def has_autoencoder(header: Header) -> bool:
    """Say whether a checkpoint brings an autoencoder of its own."""
    return header.has(_VAE)


def read_schedule_changes(header: Header) -> dict[str, Any]:
    """Tell what a checkpoint says of its training schedule, as changes of a scheduler's settings.

    Checkpoints that predict velocity bear an empty tensor ``v_pred``, or say so in the metadata
    (``modelspec.prediction_type``, https://github.com/Stability-AI/ModelSpec). ``ztsnr`` means
    that the last step is pure noise (arXiv:2305.08891, section 3.1), which must also be the first
    step in sampling (section 3.3).
    """
    changes: dict[str, Any] = {}
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in header.entries or said in {"v", "v_prediction", "v-prediction"}:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in header.entries:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes
