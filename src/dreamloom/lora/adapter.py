"""A LoRA in memory: each layer's factors and rank, PEFT's other kinds, tokens, metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import AdapterError

AdapterKind = Literal["lora", "dora", "loha", "lokr", "oft"]
"""How an adapter says what changes: LoRA's product of factors, or one of PEFT's other forms."""

DoraAxis = Literal["outputs", "inputs"]
"""Which lengths of a weight a DoRA sets."""

KIND_NAMES: dict[AdapterKind, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
}


T_LORA_KEY = "dreamloom.t_lora_min_rank"
"""The header entry of a LoRA whose ranks count by the timestep; see `Adapter.t_lora_min_rank`."""


@dataclass(frozen=True)
class Layer:
    """The update of one layer, ΔW = up · down, with every scale already folded in.

    For a linear layer ``down`` is (rank, inputs) and ``up`` (outputs, rank). For a convolution
    ``down`` is (rank, inputs, kernel height, kernel width) and ``up`` (outputs, rank, 1, 1).

    Source:
        Hu et al., LoRA (arXiv:2106.09685), Eq. 3; convolutions as in the LyCORIS paper
        (arXiv:2309.14859), section 3.1.
    """

    down: Float[Tensor, "rank ..."]
    up: Float[Tensor, "outputs rank *one_by_one"]

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"the factors' ranks differ: up has {self.up.shape[1]}, down {self.down.shape[0]}"
            )

    @property
    def rank(self) -> int:
        """The number of directions that the update may use."""
        return self.down.shape[0]

    def update(self) -> Float[Tensor, "outputs ..."]:
        """Multiply out the change of the layer's weight, in the weight's own shape."""
        flat = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return flat.view(self.up.shape[0], *self.down.shape[1:]).float()


@dataclass(frozen=True)
class PeftState:
    """A DoRA, LoHa, LoKr or OFT, whose change is no product of two factors, in PEFT's own form.

    What it changes can be computed only with PEFT and, for DoRA and OFT, the base model's weights.

    Args:
        kind: Which of them.
        tensors: PEFT's tensors by their key in a file, such as
            ``unet.mid_block.attentions.0.proj_in.hada_w1_a``.
        configs: PEFT's configuration of each component, in values that JSON knows. Its
            ``target_modules`` are the exact names of the layers.
        dora_axis: Whether a DoRA's magnitudes are the lengths of a weight's ``outputs``, as in the
            paper and PEFT, or of its ``inputs``, as OneTrainer and LyCORIS have them unless told
            otherwise. PEFT knows no such form, but the tensors bear its names all the same.

    Source:
        DoRA (arXiv:2402.09353), LoHa (arXiv:2108.06098), LoKr (arXiv:2309.14859), OFT
        (arXiv:2306.07280), as PEFT implements them.
    """

    kind: AdapterKind
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, Mapping[str, Any]]
    dora_axis: DoraAxis = "outputs"

    @property
    def layer_names(self) -> list[str]:
        """Every layer that changes, by its name in the model."""
        return [
            f"{component}.{name}"
            for component, config in self.configs.items()
            for name in config["target_modules"]
        ]


@dataclass(frozen=True)
class Adapter:
    """What a training changed, and how it was made.

    Args:
        layers: The updates of a LoRA by the layer's name in the model, such as
            ``unet.mid_block.attentions.0.proj_in``; empty for other kinds.
        metadata: Text by name; written into the file's header.
        tokens: New words, each with its embeddings by text encoder (``text_encoder``,
            ``text_encoder_2``), of shape (vectors, features).
        peft: The layers of another kind than LoRA, or None.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    peft: PeftState | None = None

    def __post_init__(self) -> None:
        if self.layers and self.peft is not None:
            raise ValueError(f"an adapter is either a LoRA or a {self.peft.kind}, not both")

    @property
    def kind(self) -> AdapterKind:
        """How the adapter says what changes."""
        return "lora" if self.peft is None else self.peft.kind

    @property
    def t_lora_min_rank(self) -> int | None:
        """How many ranks of a denoiser's layer count in pure noise (T-LoRA); None for all of them.

        Raises:
            AdapterError: If the header says something else than a number above 0.
        """
        told = self.metadata.get(T_LORA_KEY)
        if told is None or self.peft is not None:
            return None
        if not re.fullmatch("[1-9][0-9]{0,5}", told):
            raise AdapterError(
                f"The adapter's header says {T_LORA_KEY} = {told[:40]!r}, which is no rank.",
                "Get the file from whoever trained it; how it is to be drawn with cannot be told "
                "from the rest of it.",
            )
        return int(told)

    def at_full_rank(self) -> Adapter:
        """The same factors, of which every rank counts at every timestep."""
        others = {key: text for key, text in self.metadata.items() if key != T_LORA_KEY}
        return replace(self, metadata=others)

    @property
    def layer_names(self) -> list[str]:
        """Every layer that changes, whatever the kind."""
        return [*self.layers] if self.peft is None else self.peft.layer_names

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer's update; empty for other kinds than LoRA."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def parameters(self) -> int:
        """How many numbers were learned: factors, other kinds' tensors, embeddings of words."""
        tensors = [t for layer in self.layers.values() for t in (layer.down, layer.up)]
        tensors += self.peft.tensors.values() if self.peft is not None else ()
        tensors += [vectors for word in self.tokens.values() for vectors in word.values()]
        return sum(tensor.numel() for tensor in tensors)

    def with_metadata(self, **entries: str) -> Adapter:
        """The same updates with entries added to, or replaced in, the metadata."""
        return replace(self, metadata={**self.metadata, **entries})

    def norm(self) -> float:
        """The Frobenius norm over all updates, from the small Gram matrices: no dense matrix.

        Raises:
            AdapterError: If it is no LoRA: the size of its change depends on the base.
        """
        refuse_other_kinds(self, "The adapter", "has a norm of its own")
        total = 0.0
        for layer in self.layers.values():
            up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
            total += float(torch.sum((up.T @ up) * (down @ down.T)))
        # Rounding may leave a zero update just below 0.
        return math.sqrt(max(total, 0.0))


def note_lost_timesteps(adapter: Adapter, name: str, what: str) -> list[str]:
    """Say, for a T-LoRA alone, that what is made of it does not know its timesteps any more.

    Args:
        adapter: Any adapter.
        name: What the user calls it: the file's path.
        what: What is made of it, such as "the merge".
    """
    if adapter.t_lora_min_rank is None:
        return []
    return [
        f"{name} is a T-LoRA, fewer of whose ranks count in noise; {what} applies all of them at "
        "every step, as other programs do"
    ]


_AS_LORA = {
    "dora": "Write the nearest LoRA, and take that: dreamloom convert FILE --rank 32 --base BASE.",
    "loha": "Write it as a LoRA, and take that: dreamloom resize FILE --rank full.",
    "lokr": "Write it as a LoRA, and take that: dreamloom resize FILE --rank full.",
    "oft": "Make the nearest LoRA, and take that: dreamloom bake FILE --base BASE -o MODEL, then "
    "dreamloom extract MODEL --base BASE --rank 32 -o LORA.",
}


def refuse_other_kinds(adapter: Adapter, name: str, what_loras_can: str) -> None:
    """Stop where only a LoRA will do, such as at a merge.

    Args:
        adapter: Any adapter.
        name: What the user calls it: the file's path.
        what_loras_can: What was asked, after "only a LoRA …".

    Raises:
        AdapterError: If it is of another kind.
    """
    if adapter.peft is not None:
        raise AdapterError(
            f"{name} is a {KIND_NAMES[adapter.kind]}; only a LoRA {what_loras_can}.",
            _AS_LORA[adapter.kind],
        )
