"""Text encoder training: prompts encoded anew at each update; what stays is not done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
            caught: list[Tensor] = []
            inner = getattr(encoder, "text_model", encoder)
            hook = inner.encoder.layers[-1].register_forward_pre_hook(
                lambda layer, inputs, caught=caught: caught.append(inputs[0])
            )
            try:
                pooled = encoder(self._tokenize(tokenizer, tuple(prompts), device))[0]
            finally:
                hook.remove()
            # What goes into the last layer is the last output but one, as SDXL was trained.
            embedded.append(caught[0])
        return torch.cat(embedded, dim=-1), pooled

    def _tokenize(
        self, tokenizer: Any, prompts: tuple[str, ...], device: torch.device
    ) -> Int[Tensor, "prompts tokens"]:
        # New words come with a tokenizer of their own.
        key = (tokenizer, prompts)
        if key not in self._tokens:
            converted = self._pipeline.maybe_convert_prompt(list(prompts), tokenizer)
            self._tokens[key] = tokenizer(
                converted,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
        return self._tokens[key]
