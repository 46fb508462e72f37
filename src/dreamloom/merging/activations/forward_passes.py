"""Forward passes of the base model with LoRAs applied on prompts, whose activations are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, isfinite, nn

from dreamloom.core.errors import ConfigError, TrainingError
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.merging.activation_inputs import JOINT
from dreamloom.merging.activations.denoising import BATCH, DenoisingStep, denoise_steps
from dreamloom.merging.merging import MergeRequest
from dreamloom.models.base import Model

PLACES = (
    "",
    " in a studio",
    " on a beach",
    " in a forest",
    " in the snow",
    " in a city",
    " in the mountains",
    " at night",
)


MOTIFS = (" of a person", " of a dog", " of a cat", " of a house", " of a tree", " of a car")


_MEDIA = frozenset("photo picture image drawing painting illustration sketch art style".split())

Prepared = dict[str, dict[str, Tensor]]
"""What was prepared, by layer and name; see `method.Context.prepared`."""


@dataclass(frozen=True)
class MergePrompts:
    """What is asked while a merge is prepared.

    Args:
        each: The prompts of every adapter, in the adapters' order; as many for each.
        joint: Prompts that ask for all adapters at once.
    """

    each: tuple[tuple[str, ...], ...]
    joint: tuple[str, ...]


@dataclass(frozen=True)
class ForwardResult:
    """What was gathered from the base model.

    Args:
        layers: By layer and name.
        missed_by_sum: Where masks were learned: how much of each adapter the plain sum misses; see
            `masks.measure_missed`.
        missed: The same with the masks.
    """

    layers: Prepared
    missed_by_sum: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ForwardPass:
    """Some prompts, drawn while some adapters are worn.

    Args:
        number: The adapter's place in the user's list, from 1; JOINT for all of them.
        active: What is worn, its weights folded in.
        prompts: What is drawn.
    """

    number: int
    active: tuple[Adapter, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class ForwardPasses:
    """A merge about which the base model is asked.

    Args:
        model: The base model, with nothing worn.
        adapters: As they are.
        request: How they shall be merged: weights and block weights count here.
        passes: What is asked.
        steps: Of each drawing.
        seed: Of every dice.
        observe: Told of progress.
    """

    model: Model
    adapters: Sequence[Adapter]
    request: MergeRequest
    passes: Sequence[ForwardPass]
    steps: int
    seed: int
    observe: Observer = silent

    @cached_property
    def weighed(self) -> list[Adapter]:
        """The adapters with their weights folded in."""
        return weigh_adapters(self.adapters, self.request)

    @cached_property
    def shared(self) -> dict[str, list[int]]:
        """The layers that two or more adapters change, and the numbers of those, from 1."""
        names = sorted({name for adapter in self.weighed for name in adapter.layers})
        owners = {
            name: [n for n, adapter in enumerate(self.weighed, 1) if name in adapter.layers]
            for name in names
        }
        return {name: own for name, own in owners.items() if len(own) > 1}

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The base model's layers that two or more adapters change."""
        found: dict[str, nn.Module] = {}
        for adapter in self.weighed:
            found |= self.model.layers_of(adapter)
        return {name: found[name] for name in self.shared}

    def draw(self, one_pass: ForwardPass) -> list[DenoisingStep]:
        """Draw what is asked, for those who listen; text encoders are heard as well.

        Raises:
            TrainingError: If what is drawn is not finite.
        """
        whose = f"adapter {one_pass.number}" if one_pass.number != JOINT else "all adapters"
        denoised: list[DenoisingStep] = []
        with self.model.apply_adapters([(adapter, 1.0) for adapter in one_pass.active]):
            conditioning = self.model.encode_prompts(one_pass.prompts)
            total = -(-len(one_pass.prompts) // BATCH) * self.steps
            for step in denoise_steps(self.model, conditioning, self.steps, self.seed):
                if not bool(isfinite(step.prediction).all()):
                    raise TrainingError(
                        f"While the base model wore {whose}, it said numbers that are not finite.",
                        "Lower the weight, or compute in --precision fp32.",
                    )
                denoised.append(step)
                self.observe(Progress("merge", f"asking {whose}", len(denoised), total))
        return denoised


def weigh_adapters(adapters: Sequence[Adapter], request: MergeRequest) -> list[Adapter]:
    """Fold weights and block weights into updates; layers and adapters at weight 0 have none."""
    weighed = []
    for place, (adapter, weight) in enumerate(zip(adapters, request.weights, strict=True)):
        layers = {
            name: Layer(layer.down, layer.up * request.weight_of(place, name))
            for name, layer in adapter.layers.items()
            if request.weight_of(place, name) != 0
        }
        weighed.append(replace(adapter, layers=layers, tokens=adapter.tokens if weight else {}))
    return weighed


def list_passes(
    weighed: Sequence[Adapter], prompts: MergePrompts, joint: bool
) -> list[ForwardPass]:
    """List what is asked: each adapter's prompts, and if wanted those for all at once."""
    passes = [
        ForwardPass(number, (adapter,), own)
        for number, (adapter, own) in enumerate(zip(weighed, prompts.each, strict=True), 1)
        if adapter.layers
    ]
    return [*passes, ForwardPass(JOINT, tuple(weighed), prompts.joint)] if joint else passes


def find_prompts(
    adapters: Sequence[Adapter],
    count: int,
    given: Sequence[Sequence[str]] = (),
    joint: Sequence[str] = (),
) -> MergePrompts:
    """Find prompts for the adapters of a merge.

    An adapter tells what it was taught with: the prompt of its photos, or the words that stand for
    what it knows. That prompt is asked in different places, and if it names nobody, as a style's
    "pixel, a photo" does, of different motifs. Joint prompts put the words of the others before
    the first adapter's prompts. What is given is taken as it is.

    Args:
        adapters: In the user's order.
        count: How many prompts each adapter shall have; given ones are repeated or cut.
        given: Prompts for each adapter; an empty list means that it shall tell. None at all means
            that all shall.
        joint: Prompts that ask for all at once; found if there are none.

    Raises:
        ConfigError: If an adapter does not say what it was taught with, and nothing is given.
    """
    given = given or [()] * len(adapters)
    if len(given) != len(adapters):
        raise ConfigError(
            f"Prompts are given for {len(given)} adapters, but there are {len(adapters)}.",
            "Give each adapter its own, or none.",
        )
    each = [
        tuple(own) or _vary(adapter, number, count)
        for number, (adapter, own) in enumerate(zip(adapters, given, strict=True), 1)
    ]
    each = [_repeat(prompts, count) for prompts in each]
    if not joint:
        words = [_find_words(adapter) for adapter in adapters[1:]]
        before = ", ".join(word for word in words if word)
        joint = [f"{before}, {prompt}" if before else prompt for prompt in each[0]]
    return MergePrompts(tuple(each), _repeat(tuple(joint), count))


def _find_words(adapter: Adapter) -> str:
    keys = ("dreamloom.subject", "modelspec.trigger_phrase")
    return next(filter(None, (adapter.metadata.get(key, "").strip() for key in keys)), "")


def _vary(adapter: Adapter, number: int, count: int) -> tuple[str, ...]:
    """Put what an adapter was taught with in different places."""
    words = _find_words(adapter)
    prompt = adapter.metadata.get("dreamloom.photo_prompt", "").strip()
    if not prompt and not words:
        raise ConfigError(
            f"Adapter {number} does not say what it was taught with, so the base model cannot be "
            "asked for it.",
            'Give a prompt for it, such as "a photo of sks dog".',
        )
    prompt = prompt or f"a photo of {words}"
    names_nobody = prompt.lower().split()[-1].strip(".,") in _MEDIA
    motifs = MOTIFS if names_nobody else ("",)
    return tuple(
        f"{prompt}{motifs[i % len(motifs)]}{PLACES[i % len(PLACES)]}" for i in range(count)
    )


def _repeat(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(prompts[i % len(prompts)] for i in range(count))
