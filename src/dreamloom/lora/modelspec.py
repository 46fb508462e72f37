"""What other tools list an adapter by: ModelSpec's header entries, and kohya's ``ss_`` ones.

Neither holds a date: two trainings of the same settings are the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import file_sha256, library_versions
from dreamloom.lora.base_names import BASE_KEY, publish_base
from dreamloom.lora.key_names import LAYOUT_KEY

HASH_KEY = "modelspec.hash_sha256"
TENSOR_HASH_KEY = "sshs_model_hash"
"""The same hash under the name by which AUTOMATIC1111's extensions look for it."""
TRIGGER_KEY = "modelspec.trigger_phrase"
TAGS_KEY = "ss_tag_frequency"

_PREDICTIONS = {"noise": "epsilon", "velocity": "v", "flow": "flow", "picture": "sample"}
_SDXL = "stable-diffusion-xl-v1-base"


def make_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """Describe an SDXL adapter as ModelSpec entries, from DreamLoom's own header entries.

    Read are ``dreamloom.subject``, ``dreamloom.photo_prompt``, ``dreamloom.words``,
    ``dreamloom.resolution_px``, ``dreamloom.prediction`` (as in `models.base.Prediction`),
    ``dreamloom.layout``, ``dreamloom.date`` (ISO 8601) and ``dreamloom.base``; what is absent is
    left out. The hash of the tensors (``modelspec.hash_sha256``) is added by `write_adapter`.

    Source:
        Stability AI, ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec).
    """
    subject = metadata.get("dreamloom.subject", "")
    words = list(json.loads(metadata.get("dreamloom.words", "{}")))
    triggers = [word for word in words if word not in subject] + ([subject] if subject else [])
    side = metadata.get("dreamloom.resolution_px", "")
    # Whoever has other blocks than SDXL is told from its adapters' list, too.
    is_sdxl = metadata.get(LAYOUT_KEY, "sdxl") == "sdxl"
    family = _SDXL if is_sdxl else publish_base(metadata.get(BASE_KEY, "")) or "unknown"
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family}/lora",
        "implementation": "diffusers",
        "implementation_version": f"DreamLoom {library_versions().get('dreamloom', '')}",
        "title": subject or "DreamLoom adapter",
        "description": metadata.get("dreamloom.photo_prompt", ""),
        "date": metadata.get("dreamloom.date", ""),
        "trigger_phrase": ", ".join(triggers),
        "usage_hint": f"Write {subject!r} where the subject stands." if subject else "",
        "resolution": f"{side}x{side}" if side else "",
        "prediction_type": _PREDICTIONS.get(metadata.get("dreamloom.prediction", ""), ""),
        "tags": metadata.get("dreamloom.kind", ""),
    }
    return {f"modelspec.{name}": text for name, text in entries.items() if text}


def describe_base(name: str) -> dict[str, str]:
    """Name the base model as kohya's header does: its name, and the hashes of a checkpoint file.

    Args:
        name: The base model's name, hub id, folder or file.
    """
    entries = {"ss_sd_model_name": publish_base(name)} if name else {}
    if Path(name).is_file():
        whole, short = _hash_checkpoint(Path(name), Path(name).stat().st_mtime_ns)
        entries |= {"ss_new_sd_model_hash": whole, "ss_sd_model_hash": short}
    return entries


@cache
def _hash_checkpoint(path: Path, _changed_ns: int) -> tuple[str, str]:
    """Hash a checkpoint as AUTOMATIC1111 names it: all of it, and, as it did at first, a part."""
    with path.open("rb") as file:
        file.seek(0x100000)
        part = file.read(0x10000)
    return file_sha256(path), hashlib.sha256(part).hexdigest()[:8]


def describe_captions(subject: str, captions: Sequence[str]) -> dict[str, str]:
    """Count what the pictures were called, as kohya's header does; tools show it as tags.

    Args:
        subject: What the pictures show.
        captions: Each picture's own.
    """
    tags = Counter(tag.strip() for text in captions for tag in text.split(",") if tag.strip())
    return {
        "ss_num_train_images": str(len(captions)),
        "ss_dataset_dirs": json.dumps({subject: {"n_repeats": 1, "img_count": len(captions)}}),
        TAGS_KEY: json.dumps({subject: dict(tags)}),
    }


def join_descriptions(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Describe a merge by what its parts say: all trigger words, titles and tags.

    Args:
        headers: The metadata of each part, in the merge's order.
    """
    triggers = list(dict.fromkeys(text for header in headers for text in _list_triggers(header)))
    titles = [header.get("modelspec.title") or _name(header) for header in headers]
    titles = list(dict.fromkeys(filter(None, titles)))
    entries = {
        TRIGGER_KEY: ", ".join(triggers),
        "modelspec.title": " + ".join(titles),
        "modelspec.merged_from": ", ".join(titles),
        TAGS_KEY: _join_tags(headers),
    }
    for key in ("ss_sd_model_name", "ss_new_sd_model_hash", "ss_sd_model_hash"):
        # Of another base than the first's, the merge has nothing.
        entries[key] = next((header[key] for header in headers if header.get(key)), "")
    return {key: text for key, text in entries.items() if text}


def _name(header: Mapping[str, str]) -> str:
    return header.get("dreamloom.subject") or header.get("ss_output_name", "")


def _list_triggers(header: Mapping[str, str]) -> list[str]:
    said = header.get(TRIGGER_KEY) or header.get("dreamloom.subject", "")
    return [text.strip() for text in said.split(",") if text.strip()]


def _join_tags(headers: Sequence[Mapping[str, str]]) -> str:
    joined: dict[str, object] = {}
    for header in headers:
        try:
            found = json.loads(header.get(TAGS_KEY, "{}"))
        except (ValueError, RecursionError):
            continue
        joined |= found if isinstance(found, dict) else {}
    return json.dumps(joined) if joined else ""


def read_prediction(header: Mapping[str, str]) -> str:
    """Tell what a file's base predicts, in ModelSpec's words; empty if its header does not say."""
    ours = _PREDICTIONS.get(header.get("dreamloom.prediction", ""), "")
    said = header.get("modelspec.prediction_type", "").lower()
    if not (ours or said) and header.get("ss_v_parameterization", "").lower() == "true":
        return "v"
    return ours or {"v_prediction": "v", "vpred": "v"}.get(said, said)


def refuse_other_predictions(headers: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse adapters whose bases predict different things: no base draws with both.

    Args:
        headers: Metadata by the file's name.

    Raises:
        AdapterError: If so, naming each.
    """
    said = {name: told for name, header in headers.items() if (told := read_prediction(header))}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{name} ({told})" for name, told in said.items())
        raise AdapterError(
            f"The adapters were made for bases that predict different things: {listed}.",
            "Only adapters of one prediction type can be merged.",
        )
