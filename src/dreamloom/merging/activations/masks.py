"""Learn the masks of ZipLoRA and ZipRank by gradient descent on the LoRAs' own predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import Parameter

from dreamloom.core.device import generator_for
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import Progress
from dreamloom.lora.adapter import Adapter
from dreamloom.merging.activation_inputs import JOINT, name_mask
from dreamloom.merging.activations.denoising import BATCH, predict
from dreamloom.merging.activations.forward_passes import (
    ForwardPass,
    ForwardPasses,
    ForwardResult,
    Prepared,
)
from dreamloom.merging.factors import Factors, balance, flatten
from dreamloom.merging.method import Value
from dreamloom.merging.methods.ziplora import split_directions
from dreamloom.models.activation_hooks import add_changes, go_down, go_up
from dreamloom.models.base import Conditioning, Model
from dreamloom.models.lora_schedule import acts_on_text

# Examples of each adapter in one update.
_PER_UPDATE = 2


class Masked(ABC):
    """The masked updates of one layer, side by side.

    Args:
        parts: The updates, split as the masks act on them.
        weights: What each is multiplied by.
        like: Gives device and precision.
    """

    masks: Parameter

    def __init__(self, parts: Sequence[Factors], weights: Sequence[float], like: Tensor) -> None:
        ups = [part.up * weight for part, weight in zip(parts, weights, strict=True)]
        self._up = torch.cat(ups, dim=1).to(like)
        self._down = torch.cat([part.down for part in parts]).to(like)
        self._ranks = [part.rank for part in parts]

    @abstractmethod
    def __call__(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """The layer's change of its output."""

    @abstractmethod
    def overlap(self) -> Tensor:
        """How much of the same the masks let through, from 0; about 1 at the most at first."""

    @abstractmethod
    def read(self) -> list[Tensor]:
        """The mask of each part."""


class MaskedColumns(Masked):
    """ZipLoRA: a number for every input of the layer and every part; see `Masked`.

    The masked factors are as thin as the factors, so nothing is ever multiplied out.
    """

    def __init__(self, parts: Sequence[Factors], weights: Sequence[float], like: Tensor) -> None:
        super().__init__([balance(part) for part in parts], weights, like)
        self.masks = Parameter(torch.ones(len(parts), self._down.shape[1], device=like.device))
        self._repeats = torch.tensor(self._ranks, device=like.device)

    def __call__(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """Up · ((down ∘ m) · x)."""
        masks = self.masks.to(self._down.dtype).repeat_interleave(self._repeats, dim=0)
        return go_up(layer, go_down(layer, rows, self._down * masks), self._up)

    def overlap(self) -> Tensor:
        """The mean of |mᵢ · mⱼ| / inputs over pairs of parts.

        Source:
            ZipLoRA (arXiv:2311.13600), Eq. 4, for a layer; there it is not divided by the inputs.
        """
        pairs = [(a @ b).abs() for a, b in combinations(self.masks, 2)]
        return torch.stack(pairs).mean() / self.masks.shape[1]

    def read(self) -> list[Tensor]:
        """The mask of each part."""
        return list(self.masks.detach().float().cpu())


class MaskedDirections(Masked):
    """ZipRank: a number for every singular direction of every part; see `Masked`."""

    def __init__(self, parts: Sequence[Factors], weights: Sequence[float], like: Tensor) -> None:
        split = [split_directions(part) for part in parts]
        super().__init__(split, weights, like)
        self.masks = Parameter(torch.ones(sum(self._ranks), device=like.device))
        self._pairs = [
            (i, j, _compare_directions(split[i], split[j]).to(like.device))
            for i, j in combinations(range(len(split)), 2)
        ]

    def __call__(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """Up · (m ∘ (down · x))."""
        narrow = go_down(layer, rows, self._down)
        masks = self.masks.to(narrow.dtype)
        masked = narrow * (masks[:, None, None] if isinstance(layer, nn.Conv2d) else masks)
        return go_up(layer, masked, self._up)

    def overlap(self) -> Tensor:
        """The mean of |⟨ΔWᵢ(mᵢ), ΔWⱼ(mⱼ)⟩| / (‖ΔWᵢ‖ ‖ΔWⱼ‖) over pairs of parts.

        Masks of different length have no product of their own; the updates that they leave have.
        """
        masks = self.masks.split(self._ranks)
        return torch.stack([(masks[i] @ c @ masks[j]).abs() for i, j, c in self._pairs]).mean()

    def read(self) -> list[Tensor]:
        """The mask of each part."""
        return [mask.cpu() for mask in self.masks.detach().float().split(self._ranks)]


def _compare_directions(one: Factors, other: Factors) -> Tensor:
    """Inner products of two updates' directions, as shares of the product of their norms."""
    ups = one.up.double().T @ other.up.double()
    products = ups * (one.down.double() @ other.down.double().T)
    # Directions stand at right angles to each other, so their squares add up.
    lengths = [
        (f.up.double().norm(dim=0) * f.down.double().norm(dim=1)).norm() for f in (one, other)
    ]
    both = float(lengths[0] * lengths[1])
    return (products / (both if both > 0 else 1.0)).float()


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
        """How far from the recorded prediction the model is now, as shares of ``gap``.

        0 says what the adapter says alone, 1 is as far away as the base model is on average.

        Args:
            model: As it shall be judged: what it wears is worn.
            conditioning: The ask's prompts as it encodes them.
            picked: Which examples.
        """
        said = predict(
            model, self.noisy[picked], self.timesteps[picked], conditioning.take(self.rows[picked])
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


Make = Callable[[Sequence[Factors], Sequence[float], Tensor], Masked]
"""Makes the masks of a layer from its parts and their weights, where the last tensor lies."""


def learn_masks(
    forward_passes: ForwardPasses, options: Mapping[str, Value], make: Make
) -> ForwardResult:
    """Change masks until the merge says on each adapter's prompts what that adapter says alone.

        L = Σₖ ‖ε_merged(xₖ) − εₖ(xₖ)‖² / d + η ‖ε_merged(x) − ε_sum(x)‖² / d + λ overlap

    The first term asks for each adapter's own answers to its prompts, the second, which is ours,
    for the plain sum's to prompts that ask for all of them. d is the mean square distance between
    what the adapters and the base model say, so that λ means the same for weak and strong adapters.
    What adapters say is recorded once, for fixed noise and timesteps, so an update costs one pass
    forward and back for each. Masks begin at 1, which is the plain sum; if they end no better than
    that, they stay 1. Updates of text encoders are added up, unmasked.

    Args:
        forward_passes: The merge.
        options: Those of ZipLoRA and ZipRank.
        make: Makes the masks of a layer.

    Source:
        ZipLoRA (arXiv:2311.13600), Eq. 4 and section 4: up to 100 updates. Adam at 0.01 is what
        LoRA.rar (arXiv:2412.05148) trains it with.

    Raises:
        TrainingError: If the loss is not finite.
    """
    model = forward_passes.model
    recorded = record_examples(forward_passes)
    masked = {
        n: _mask_layer(forward_passes, n, make)
        for n in forward_passes.shared
        if not acts_on_text(n)
    }
    others = [
        (replace(a, layers={n: layer for n, layer in a.layers.items() if n not in masked}), 1.0)
        for a in forward_passes.weighed
    ]
    with ExitStack() as stack:
        stack.enter_context(model.apply_adapters(others))
        stack.enter_context(add_changes(forward_passes.layers, masked))
        prompts = [model.encode_prompts(examples.one_pass.prompts) for examples in recorded]
        model.release_encoders()
        # What each kind of example adds to the loss, in units of what is missed of it.
        gaps = [examples.gap for examples in recorded if examples.one_pass.number != JOINT]
        mean = sum(gaps) / len(gaps)
        joint = float(options["joint"])
        shares = [e.gap / mean * (joint if e.one_pass.number == JOINT else 1.0) for e in recorded]
        missed_by_sum = _measure(model, recorded, prompts)
        if model.runtime.device.type == "cuda":
            stack.enter_context(model.recompute_activations())
        weighted_examples = list(zip(recorded, prompts, shares, strict=True))
        _descend(forward_passes, options, weighted_examples, list(masked.values()))
        missed = _measure(model, recorded, prompts)
    at_first, at_last = (
        sum(share * part for share, part in zip(shares, parts, strict=True))
        for parts in (missed_by_sum, missed)
    )
    if at_last >= at_first:
        masked, missed = {}, missed_by_sum
    prepared: Prepared = {}
    for name, numbers in forward_passes.shared.items():
        masks = (masked.get(name) or _mask_layer(forward_passes, name, make)).read()
        prepared[name] = {name_mask(n): mask for n, mask in zip(numbers, masks, strict=True)}
    adapters = len([one_pass for one_pass in forward_passes.passes if one_pass.number != JOINT])
    return ForwardResult(prepared, missed_by_sum[:adapters], missed[:adapters])


def _mask_layer(forward_passes: ForwardPasses, name: str, make: Make) -> Masked:
    numbers = forward_passes.shared[name]
    parts = [flatten(forward_passes.adapters[number - 1].layers[name]) for number in numbers]
    weight: Tensor = forward_passes.layers[name].weight  # type: ignore[assignment]
    return make(
        parts, [forward_passes.request.weight_of(number - 1, name) for number in numbers], weight
    )


def _measure(
    model: Model, recorded: Sequence[Examples], prompts: Sequence[Conditioning]
) -> list[float]:
    return [e.miss_of_all(model, said) for e, said in zip(recorded, prompts, strict=True)]


def _descend(
    forward_passes: ForwardPasses,
    options: Mapping[str, Value],
    weighted_examples: Sequence[tuple[Examples, Conditioning, float]],
    masked: Sequence[Masked],
) -> None:
    if not masked:
        return
    optimizer = torch.optim.Adam(
        [layer.masks for layer in masked], lr=float(options["learning_rate"])
    )
    updates = int(options["updates"])
    for update in range(updates):
        optimizer.zero_grad(set_to_none=True)
        rng = generator_for(forward_passes.seed, "masks", update)
        draws = torch.rand(_PER_UPDATE, generator=rng)
        for examples, said, share in weighted_examples:
            # The same places for each adapter, so that their order does not matter.
            picked = (draws * len(examples)).long()
            loss = share * examples.miss(forward_passes.model, said, picked).mean()
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"The loss of the masks is not finite after {update} updates.",
                    "Lower the option learning_rate.",
                )
            loss.backward()
        overlap = torch.stack([layer.overlap() for layer in masked]).mean()
        (float(options["overlap"]) * overlap).backward()
        optimizer.step()
        forward_passes.observe(Progress("merge", "learning masks", update + 1, updates))
