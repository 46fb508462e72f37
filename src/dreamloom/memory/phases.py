"""Count what each phase of a run needs, by running the real modules on tensors that hold nothing.

A full-size SDXL is counted in seconds on any machine. Counted is what tensors hold at once. A GPU
needs more for itself; see `predict.OVERHEAD_GIB`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamloom.core.device import Runtime
from dreamloom.memory.predict import Phase
from dreamloom.memory.tensor_counter import MemoryCounter, tensors_of
from dreamloom.models.base import (
    AdapterSpec,
    BaseIdentity,
    Checkpointing,
    Framing,
    MemoryOptions,
    WeightGroup,
)
from dreamloom.models.meta_model import make_meta_model
from dreamloom.models.offload import CpuOffload
from dreamloom.models.prompts import SDXLConditioning
from dreamloom.models.sdxl import SDXLModel
from dreamloom.training.losses import image_errors
from dreamloom.training.optimizers import group_weights, make_optimizer

# The photos' and the class images': an update meets both.
_PROMPTS = ("a photo of rraj person", "a photo of a person")


@dataclass(frozen=True)
class Case:
    """What is counted.

    Args:
        resolution_px: Side of the pictures, a multiple of what the base model asks for.
        spec: The adapter that is trained.
        gradient_checkpointing: What the backward pass recomputes.
        memory_options: How the base model is kept and whether its parts take turns.
        micro_batch_size: Images that go through the model at once in training.
        passes: Such passes an update has; more than one keeps gradients in between.
        drawn_at_once: Pictures that are denoised at a time.
        optimizer: Its name.
        folder: The base model's configuration in diffusers' layout; None is SDXL's own.
        dtype: The base model's precision.
    """

    resolution_px: int
    spec: AdapterSpec
    gradient_checkpointing: Checkpointing = "none"
    memory_options: MemoryOptions = field(default_factory=MemoryOptions)
    micro_batch_size: int = 1
    passes: int = 2
    drawn_at_once: int = 1
    optimizer: str = "adamw"
    folder: Path | None = None
    dtype: torch.dtype = torch.bfloat16


def count_phases(case: Case) -> dict[Phase, int]:
    """Count the most bytes that each phase of a run holds at once.

    The phases go through one model, in the order of a run: sampling and saving come while the
    adapter and its optimizer are there.
    """
    with counted_run(case) as run:
        phases: dict[Phase, Callable[[], object]] = {
            "class images": run.draw,
            "caching": run.cache,
            "training": run.train,
            "sampling": run.draw,
            "saving": run.model.read_adapter,
        }
        counts: dict[Phase, int] = {}
        for phase, work in phases.items():
            run.counter.begin_phase()
            work()
            counts[phase] = run.counter.peak_bytes
    return counts


@contextmanager
def counted_run(case: Case) -> Iterator[Run]:
    """Make a model whose tensors have shapes and no contents, and count them for a block."""
    counter = MemoryCounter()
    with _nothing_real():
        pipeline = make_meta_model(case.dtype, case.folder)
        with counter:
            model = _make_model(pipeline, case, counter)
            names = ("unet", "text_encoder", "text_encoder_2")
            yield Run(case, model, counter, {name: getattr(pipeline, name) for name in names})


@contextmanager
def _nothing_real() -> Iterator[None]:
    """Let tensors have shapes and no contents, for a block."""

    def assign(target: Tensor, source: Tensor) -> None:
        target.data = source.data

    swap = torch.utils.swap_tensors
    # Casting a module swaps its weights, which torch refuses for tensors without contents.
    torch.utils.swap_tensors = assign
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.swap_tensors = swap


def _make_model(pipeline: Any, case: Case, counter: MemoryCounter) -> SDXLModel:
    class Counted(CpuOffload):
        """Fake tensors all lie on the CPU, so coming and going is told to the counter."""

        def move(self, module: nn.Module, device: torch.device) -> None:
            del device
            if module in present:
                present.remove(module)
                counter.put_away(tensors_of(module))
            else:
                present.add(module)
                counter.hold(tensors_of(module))

        def put_into_files(self, names: list[str]) -> None:
            """What is counted is a GPU's."""

    present: set[nn.Module] = set()
    runtime = Runtime(torch.device("cpu"), case.dtype)
    return SDXLModel(
        pipeline,
        BaseIdentity("counted", "sdxl", ""),
        runtime,
        memory_options=case.memory_options,
        offload=Counted,
    )


class Run:
    """A run's phases on one model, each once and as small as it shows the most that is needed.

    Args:
        case: What is counted.
        model: A model without contents.
        counter: Counts its tensors.
        parts: The denoiser and the text encoders by name.
    """

    def __init__(
        self,
        case: Case,
        model: SDXLModel,
        counter: MemoryCounter,
        parts: Mapping[str, nn.Module],
    ) -> None:
        self.parts = dict(parts)
        self.case = case
        self.model = model
        self.counter = counter
        self.optimizer: torch.optim.Optimizer | None = None
        side = case.resolution_px // model.pixels_per_latent
        self._encoded: SDXLConditioning | None = None
        self._latents_shape = (model.latent_channels, side, side)

    def needs(self, work: Callable[[], object]) -> int:
        """Count the bytes that a piece of work holds beyond what is there already."""
        self.counter.begin_phase()
        held = self.counter.held_bytes
        work()
        return self.counter.peak_bytes - held

    def draw(self) -> None:
        """Denoise a batch once, both halves of guidance together, and decode a picture."""
        self.predict(2 * self.case.drawn_at_once)
        self.decode()

    @torch.no_grad()
    def predict(self, rows: int) -> None:
        """Predict so many rows without gradients."""
        encoded = self.model.encode_prompts(_PROMPTS[:1])
        self._predict(encoded.take(torch.zeros(rows, dtype=torch.int64)))

    def decode(self) -> None:
        """Decode a picture."""
        self.model.decode(self._latents(1).to(self.case.dtype))

    def encode(self) -> None:
        """Encode a picture."""
        side = self.case.resolution_px
        self.model.encode_images(torch.zeros(1, 3, side, side))

    def encode_prompts(self) -> None:
        """Encode the prompts."""
        self.model.encode_prompts(_PROMPTS)

    def cache(self) -> None:
        """Encode a picture and the prompts."""
        self.encode()
        self.encode_prompts()
        self.model.release_encoders()

    def attach(self) -> list[WeightGroup]:
        """Begin the training: what only encodes leaves."""
        weights = self.model.attach_adapter(self.case.spec, self.case.gradient_checkpointing)
        self._encoded = None if self.model.trains_text else self.model.encode_prompts(_PROMPTS)
        self.model.release_encoders()
        groups = group_weights([(one.role, one.parameters) for one in weights], 1e-4)
        # These tensors say that they lie on a processor, where AdamW would keep the gradients
        # between updates; on a GPU it does not.
        options = {"fused": False} if self.case.optimizer == "adamw" else {}
        self.optimizer = make_optimizer(self.case.optimizer, groups, 0.01, options)
        return weights

    def train(self) -> None:
        """Go through one pass after an update: the optimizer has its states by then."""
        self.attach()
        self.forward_backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.case.passes == 1:
            self.forget_gradients()
        # Otherwise gradients of the passes before lie there, as they do now.
        self.forward_backward()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """End an update."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> None:
        """Go forward and backward once."""
        count = self.case.micro_batch_size
        encoded = self._encoded or self.model.encode_prompts(_PROMPTS[:count])
        rows = torch.arange(count, dtype=torch.int64) % len(encoded)
        predicted = self._predict(encoded.take(rows))
        image_errors(predicted, self._latents(count)).mean().backward()

    def _predict(self, encoded: SDXLConditioning) -> Tensor:
        side = self.case.resolution_px
        return self.model.predict(
            self._latents(len(encoded)),
            torch.zeros(len(encoded), dtype=torch.int64),
            encoded,
            [Framing((side, side))] * len(encoded),
        )

    def _latents(self, count: int) -> Tensor:
        return torch.zeros(count, *self._latents_shape)
