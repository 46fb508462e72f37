"""CLIP: pictures and prompts in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamloom.evaluation.encoders.computing import (
    explaining,
    load_pretrained,
    name_by_weights,
    steady,
    unit_rows,
)
from dreamloom.evaluation.encoders.preprocessing import Preprocessing


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

    may_miss = False

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        preprocessing: Preprocessing | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        with explaining(folder):
            self.preprocessing = preprocessing or Preprocessing.read(folder)
            self._model = load_pretrained(CLIPModel, folder, device)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._longest = int(self._model.config.text_config.max_position_embeddings)
        self.key = f"{name or name_by_weights(folder)}/{self.preprocessing.key}"

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
        with steady(pixels.device):
            return unit_rows(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """Turn prompts into unit vectors; what is too long is cut off at the end."""
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._model.device)
        with steady(self._model.device):
            features = self._model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return unit_rows(features.pooler_output)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """List the texts that `embed_texts` cuts off."""
        counted = [
            (text, len(self._tokenizer(text, truncation=False, verbose=False).input_ids))
            for text in texts
        ]
        return [text for text, tokens in counted if tokens > self._longest]
