"""CLIP: pictures and prompts in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from dreamloom.evaluation.encoders.computing import (
    NetworkEncoder,
    load_pretrained,
    steady,
    unit_rows,
)


class ClipEncoder(NetworkEncoder):
    """A CLIP of any size; its folder holds config.json, model.safetensors and the tokenizer."""

    def load(self, folder: Path) -> None:
        """Read the network."""
        from transformers import CLIPModel, CLIPTokenizer

        self._model = load_pretrained(CLIPModel, folder, self.device)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._longest = int(self._model.config.text_config.max_position_embeddings)

    def look(self, pixels: Tensor) -> Tensor:
        """Turn pixels into features in the space that prompts share."""
        features: Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
        return features

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
