"""ModelSpec metadata: the header entries by which other tools list and describe a LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping

HASH_KEY = "modelspec.hash_sha256"
_PREDICTIONS = {"noise": "epsilon", "velocity": "v", "flow": "flow", "picture": "sample"}


def make_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """Describe an SDXL adapter as ModelSpec entries, from DreamLoom's own header entries.

    Read are ``dreamloom.subject``, ``dreamloom.photo_prompt``, ``dreamloom.words``,
    ``dreamloom.resolution_px``, ``dreamloom.prediction`` (as in `models.base.Prediction`),
    ``dreamloom.date`` (ISO 8601) and ``dreamloom.base``; what is absent is left out. The hash of
    the tensors (``modelspec.hash_sha256``) is added by `write_adapter`.

    Source:
        Stability AI, ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec).
    """
    subject = metadata.get("dreamloom.subject", "")
    words = list(json.loads(metadata.get("dreamloom.words", "{}")))
    triggers = [word for word in words if word not in subject] + ([subject] if subject else [])
    side = metadata.get("dreamloom.resolution_px", "")
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "diffusers",
        "title": subject or "DreamLoom adapter",
        "description": metadata.get("dreamloom.photo_prompt", ""),
        "date": metadata.get("dreamloom.date", ""),
        "trigger_phrase": ", ".join(triggers),
        "resolution": f"{side}x{side}" if side else "",
        "prediction_type": _PREDICTIONS.get(metadata.get("dreamloom.prediction", ""), ""),
        "tags": metadata.get("dreamloom.kind", ""),
    }
    return {f"modelspec.{name}": text for name, text in entries.items() if text}
