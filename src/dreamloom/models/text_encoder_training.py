"""Prompts through text encoders that are being taught: what stays the same is not done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class TextEncoderTraining:
    """Encodes prompts as SDXL's pipeline does, for each update anew.

    The pipeline cuts the prompts into tokens twice each time and collects the outputs of every
    layer. Here tokens are kept, and the one layer's output that is wanted is caught on its way.

    Args:
        pipeline: diffusers' pipeline with its two tokenizers and text encoders.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._tokens: dict[tuple[Any, tuple[str, ...]], Tensor] = {}

    def encode(
        self, prompts: Sequence[str], device: torch.device
    ) -> tuple[Float[Tensor, "prompts tokens features"], Float[Tensor, "prompts pooled"]]:
        """Encode prompts; return the tokens' embeddings and the second encoder's pooled one."""
        embedded, pooled = [], torch.empty(0)
        pipeline = self._pipeline
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            heard: list[Tensor] = []
            hook = _find_last_layer(encoder).register_forward_pre_hook(
                lambda layer, inputs, heard=heard: heard.append(inputs[0])
            )
            try:
                pooled = encoder(self._spell(tokenizer, tuple(prompts), device))[0]
            finally:
                hook.remove()
            # What goes into the last layer is the last output but one, as SDXL was trained.
            embedded.append(heard[0])
        return torch.cat(embedded, dim=-1), pooled

    def _spell(
        self, tokenizer: Any, prompts: tuple[str, ...], device: torch.device
    ) -> Int[Tensor, "prompts tokens"]:
        # New words come with a tokenizer of their own.
        key = (tokenizer, prompts)
        if key not in self._tokens:
            told = self._pipeline.maybe_convert_prompt(list(prompts), tokenizer)
            self._tokens[key] = tokenizer(
                told,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
        return self._tokens[key]


def _find_last_layer(encoder: nn.Module) -> nn.Module:
    holder: Any = getattr(encoder, "text_model", encoder)
    last: nn.Module = holder.encoder.layers[-1]
    return last
