"""Targets of a merge: the predictions of each LoRA alone on its own prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamloom.lora.adapter import Adapter
from dreamloom.merging.activations.denoising import BATCH, predict
from dreamloom.merging.activations.forward_passes import ForwardPass, ForwardPasses
from dreamloom.models.base import Conditioning, Model


@dataclass(frozen=True)
class Examples:
    """Steps of one adapter's drawings, and what it said at each.

    Args:
        one_pass: The adapter and its prompts.
        rows: Which prompt each example is of.
        noisy: What the model was given.
        timesteps: At which timestep.
        prediction: What it said with the adapter, in float32.
        gap: How far that is from what the base model says, as a mean square; 1 where the adapter
            changes nothing.
    """

    one_pass: ForwardPass
    rows: Int[Tensor, " examples"]
    noisy: Float[Tensor, "examples channels height width"]
    timesteps: Int[Tensor, " examples"]
    prediction: Float[Tensor, "examples channels height width"]
    gap: float

    def __len__(self) -> int:
        return len(self.rows)

    def miss(
        self, model: Model, conditioning: Conditioning, picked: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How far from what was told the model is now, as shares of ``gap``.

        0 says what the adapter says alone, 1 is as far away as the base model is on average.

        Args:
            model: As it shall be judged: what it wears is worn.
            conditioning: The ask's prompts as it encodes them.
            picked: Which examples.
        """
        said = predict(
            model,
            self.noisy[picked],
            self.timesteps[picked],
            conditioning.take(self.rows[picked]),
        )
        return (said - self.prediction[picked]).square().flatten(1).mean(dim=1) / self.gap

    @torch.no_grad()
    def miss_of_all(self, model: Model, conditioning: Conditioning) -> float:
        """The mean of `miss` over every example."""
        parts = torch.arange(len(self)).split(BATCH)
        return float(torch.cat([self.miss(model, conditioning, part) for part in parts]).mean())


@torch.no_grad()
def record_examples(forward_passes: ForwardPasses) -> list[Examples]:
    """Draw each adapter's prompts with that adapter alone, and keep what it says at every step.

    Raises:
        TrainingError: If what is drawn is not finite.
    """
    model = forward_passes.model
    recorded = []
    for one_pass in forward_passes.passes:
        denoised = forward_passes.draw(one_pass)
        without_gap = Examples(
            one_pass,
            torch.cat([step.rows for step in denoised]),
            torch.cat([step.noisy for step in denoised]),
            torch.cat([step.timesteps for step in denoised]),
            torch.cat([step.prediction for step in denoised]),
            gap=1.0,
        )
        gap = without_gap.miss_of_all(model, model.encode_prompts(one_pass.prompts))
        recorded.append(replace(without_gap, gap=gap if gap > 0 else 1.0))
    return recorded


def measure_missed(model: Model, recorded: Sequence[Examples], merged: Adapter) -> list[float]:
    """Measure how much of what each adapter does on its own prompts a merged one misses.

    Returns:
        For each adapter the mean square distance from what it says alone, as a share of the base
        model's: 0 misses nothing, 1 is no better than the base.
    """
    with model.apply_adapters([(merged, 1.0)]):
        return [
            examples.miss_of_all(model, model.encode_prompts(examples.one_pass.prompts))
            for examples in recorded
        ]
