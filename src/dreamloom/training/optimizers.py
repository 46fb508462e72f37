"""Optimizers by name, and groups of weights with their learning rates (LoRA+)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer
from dreamloom.training.flat_adamw import FlatAdamW

_EXTRA = 'pip install "dreamloom[optimizers]"'


@dataclass(frozen=True)
class _Maker:
    """Where an optimizer comes from, and the settings that it has here unless told otherwise."""

    library: str
    attribute: str
    options: Mapping[str, Any]


# Settings that differ from the library's own, and why:
_MAKERS = {
    "adamw": _Maker("torch.optim", "AdamW", {}),
    "adamw8bit": _Maker("bitsandbytes.optim", "AdamW8bit", {}),
    # The rate is set from outside, and memory is saved by keeping no momentum, as its users expect.
    "adafactor": _Maker(
        "pytorch_optimizer",
        "AdaFactor",
        {"scale_parameter": False, "relative_step": False, "betas": (None, 0.999)},
    ),
    # Its authors' advice for diffusion models; without the safeguard a warm-up of the rate makes
    # the estimated distance grow without end.
    "prodigy": _Maker(
        "pytorch_optimizer", "Prodigy", {"bias_correction": True, "safeguard_warmup": True}
    ),
    "schedule_free": _Maker("pytorch_optimizer", "ScheduleFreeAdamW", {}),
    "lion": _Maker("pytorch_optimizer", "Lion", {}),
    "came": _Maker("pytorch_optimizer", "CAME", {}),
    # With this scale an update is as large as AdamW's, so AdamW's rates fit:
    # Liu et al. (arXiv:2502.16982), section 2.2.
    "muon": _Maker("pytorch_optimizer", "Muon", {"use_adjusted_lr": True}),
    "adan": _Maker("pytorch_optimizer", "Adan", {}),
    # The weight decay of AdamW, as in the paper, instead of an addition to the gradient.
    "ademamix": _Maker("pytorch_optimizer", "AdEMAMix", {"weight_decouple": True}),
}

OPTIMIZERS = tuple(_MAKERS)
"""The names that `make_optimizer` knows."""

ONE_RATE_OPTIMIZERS = frozenset({"prodigy"})
"""Optimizers that find the learning rate themselves and take one factor for all weights."""

# Rates of AdamW's world, taken for a factor, leave nothing of the rate that is found.
_LEAST_FACTOR = 0.1

_RATE_SHARES = {"lion": 1 / 5, "came": 1 / 4}

AVERAGING_OPTIMIZERS = frozenset({"schedule_free"})
"""Optimizers that average the weights themselves: no falling schedule and no other average."""

# Where torch's AdamW has one kernel for all weights; the loop over them costs more than the update.
_FUSED_DEVICES = frozenset({"cuda", "mps", "xpu"})

# Muon makes matrices orthogonal; of what adapters are made of, only these are surely matrices.
_MATRIX_ROLES = frozenset({"down", "up", "text down", "text up"})


def make_optimizer(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    weight_decay: float,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Make an optimizer by name.

    Args:
        name: One of `OPTIMIZERS`.
        groups: ``params``, ``lr`` and ``role`` of each group; see `group_weights`. Each comes back
            in ``param_groups`` with ``full_rate`` beside it, which `set_rates` starts from. Muon
            splits a group into matrices and the rest, which AdamW changes.
        weight_decay: 0 or more.
        options: Further settings of that optimizer, such as ``{"betas": [0.9, 0.99]}``.

    Raises:
        ConfigError: If the name or an option is unknown, a library is missing, 8-bit states do
            not work here, or `ONE_RATE_OPTIMIZERS` are given several learning rates.
    """
    maker = _find_maker(name)
    ready = [
        {"params": list(group["params"]), "lr": group["lr"], "role": group["role"]}
        for group in groups
        if group["params"]
    ]
    if name in ONE_RATE_OPTIMIZERS and len({group["lr"] for group in ready}) > 1:
        rates = ", ".join(dict.fromkeys(f"{group['role']} {group['lr']:g}" for group in ready))
        raise ConfigError(
            f"{name} finds one learning rate for all weights, but was given several: {rates}.",
            "Set the same rate everywhere (1 is usual): leave train.learning_rate_pattern, "
            "train.text_learning_rate and train.text_encoder_2_learning_rate out, and "
            "adapter.loraplus_lr_ratio at 1.",
        )
    if name == "muon":
        ready = _split_for_muon(ready)
    for group in ready:
        group["full_rate"] = group["lr"]
    device = ready[0]["params"][0].device if ready else torch.device("cpu")
    if name == "adamw8bit" and (reason := _why_no_8bit(device)):
        raise ConfigError(
            f"adamw8bit does not work here: {reason}.", f"Use adamw, or install it: {_EXTRA}."
        )
    make = _load_class(name)
    # Most of these classes swallow any keyword, so a slip of the pen would change nothing.
    own = {"self", "params", "lr", "weight_decay", "kwargs"}
    known = [option for option in inspect.signature(make).parameters if option not in own]
    for option in options or {}:
        if option not in known:
            raise ConfigError(
                f"The optimizer {name} has no option {option!r}.",
                f"Choose among: {', '.join(known)}.",
            )
    settings = {**maker.options, **(options or {})}
    # A settings file has lists where these classes want tuples.
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    if name == "adamw" and device.type == "cpu" and settings.get("fused", True):
        settings.pop("fused", None)
        return FlatAdamW(ready, weight_decay=weight_decay, **settings)
    if name == "adamw" and device.type in _FUSED_DEVICES:
        settings.setdefault("fused", True)
    if name == "muon":
        # Muon reads the two kinds' weight decay from different places.
        settings["adamw_wd"] = weight_decay
    optimizer: Optimizer = make(ready, weight_decay=weight_decay, **settings)
    return optimizer


def usable_optimizer(name: str, device: torch.device) -> tuple[str, str]:
    """Replace an optimizer that this machine lacks, if another one does the same.

    Returns:
        The name to use and, if it is another, a sentence that says why; else an empty text. Only
        ``adamw8bit`` is ever replaced, by ``adamw``: its states are 8-bit copies of AdamW's.

    Raises:
        ConfigError: If the name is unknown.
    """
    _find_maker(name)
    if name == "adamw8bit" and (reason := _why_no_8bit(device)):
        return "adamw", f"trains with adamw instead of adamw8bit: {reason}"
    return name, ""


def usual_rate(name: str, base_rate: float) -> float:
    """Turn a learning rate that suits AdamW into one that suits another optimizer.

    Prodigy takes 1, whatever the base rate, because it finds the rate itself (arXiv:2306.06101).
    Lion takes a fifth: its steps have full length in every number, and its authors take a third
    to a tenth (arXiv:2302.06675, section 5). CAME takes a quarter: with all of it the embedded
    model's loss rose in its first updates. The others take the same.

    Raises:
        ConfigError: If the name is unknown.
    """
    _find_maker(name)
    if name in ONE_RATE_OPTIMIZERS:
        return 1.0
    return base_rate * _RATE_SHARES.get(name, 1.0)


def doubt_rates(name: str, rate: float, warmup_steps: int, steps: int) -> list[str]:
    """Say why a training with such a learning rate would hardly learn anything, if so.

    Args:
        name: The optimizer.
        rate: The full learning rate.
        warmup_steps: Updates over which it rises.
        steps: All updates.
    """
    doubts = []
    if name in ONE_RATE_OPTIMIZERS and rate < _LEAST_FACTOR:
        doubts.append(
            f"{name} finds the learning rate itself and multiplies it by train.learning_rate, "
            f"which is {rate:g}: so little learns next to nothing; 1 is usual"
        )
    if warmup_steps > steps:
        doubts.append(
            f"train.warmup_steps = {warmup_steps} is more than the {steps} updates: the learning "
            f"rate ends at {steps / warmup_steps:.0%} of {rate:g}; a tenth of the updates is usual"
        )
    return doubts


def _find_maker(name: str) -> _Maker:
    if name not in _MAKERS:
        raise ConfigError(f"There is no optimizer {name!r}.", offer(name, _MAKERS))
    return _MAKERS[name]


def _load_class(name: str) -> Callable[..., Any]:
    maker = _MAKERS[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(maker.library), maker.attribute)
    except ImportError as error:
        library = maker.library.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"The optimizer {name} needs the library {library}, which cannot be imported: {error}.",
            f"Install it with {_EXTRA}, or use adamw.",
        ) from error
    return found


def _why_no_8bit(device: torch.device) -> str:
    """Say why 8-bit states do not work on a device; an empty text if they do."""
    try:
        make = _load_class("adamw8bit")
        # Smaller tensors keep 32-bit states, so this is the least that proves anything.
        weight = Parameter(torch.zeros(64, 64, device=device))
        weight.grad = torch.ones_like(weight)
        make([weight], lr=1e-3).step()
    except ConfigError:
        return "the library bitsandbytes cannot be imported"
    except Exception as error:  # A native library that fails can raise anything.
        return f"bitsandbytes fails on {device.type} ({type(error).__name__}: {error})"
    return "" if bool(weight.detach().any()) else f"bitsandbytes does nothing on {device.type}"


def _split_for_muon(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    split = []
    for group in groups:
        kinds: dict[bool, list[Parameter]] = {True: [], False: []}
        for weight in group["params"]:
            kinds[group["role"] in _MATRIX_ROLES and weight.ndim >= 2].append(weight)
        split += [
            {**group, "params": weights, "use_muon": matrices}
            for matrices, weights in kinds.items()
            if weights
        ]
    return split


# ------------------------------------------------------------------ groups of weights


def group_weights(
    weights_by_role: Iterable[tuple[str, Sequence[Parameter]]],
    rate: float,
    *,
    text_rate: float | None = None,
    own_rates: Mapping[Parameter, float] | None = None,
    token_rate: float | None = None,
    loraplus_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Give each kind of weights its learning rate, and single weights another where asked.

    Args:
        weights_by_role: Roles (``down``, ``up``, ``other``, the same after ``text ``, ``tokens``)
            with their weights. A role may come more than once.
        rate: Learning rate of the denoiser's weights.
        text_rate: That of the text encoders' weights; None takes ``rate``.
        own_rates: The rates of single weights, which go before those of their role.
        token_rate: That of new words' embeddings; None takes ``rate``.
        loraplus_lr_ratio: How many times faster the up factors learn than the others (LoRA+); 1 for
            the same, 16 in the paper for language models. It multiplies rates of single weights,
            too.

    Returns:
        For each role, and each rate within it, that has weights ``params``, ``lr`` and ``role``, in
        the order given.

    Raises:
        ValueError: If a rate is negative or the ratio not above 0.

    Source:
        LoRA+, Hayou et al. (arXiv:2402.12354), section 4.
    """
    if loraplus_lr_ratio <= 0:
        raise ValueError(f"loraplus_lr_ratio must be above 0, got {loraplus_lr_ratio}")
    text_rate = rate if text_rate is None else text_rate
    token_rate = rate if token_rate is None else token_rate
    own_rates = own_rates or {}
    if min(rate, text_rate, token_rate, *own_rates.values()) < 0:
        given = [rate, text_rate, token_rate, *dict.fromkeys(own_rates.values())]
        raise ValueError(f"rates must be 0 or more, got {', '.join(map(str, given))}")
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for role, weights in weights_by_role:
        shared = token_rate if role == "tokens" else text_rate if role.startswith("text ") else rate
        ratio = loraplus_lr_ratio if role.endswith("up") else 1.0
        for weight in weights:
            own = own_rates.get(weight, shared) * ratio
            group = groups.setdefault((role, own), {"params": [], "lr": own, "role": role})
            group["params"].append(weight)
    return list(groups.values())
