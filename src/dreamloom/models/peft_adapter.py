"""A LoRA or another adapter in training: put on a model through PEFT, read, taken off."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.lora.adapter import T_LORA_KEY, Adapter, Layer, PeftState, refuse_other_kinds
from dreamloom.lora.peftconfig import make_dora
from dreamloom.models.base import AdapterSpec, WeightGroup
from dreamloom.models.fused_lora import FusedLora, can_be_fused
from dreamloom.models.lowrank import ScaledFactors
from dreamloom.models.peftstate import describe_config
from dreamloom.models.rank_masks import RankMasks
from dreamloom.models.target_modules import assign_by_pattern, choose_layers

ADAPTER_NAME = "taught"
_INITS = re.compile("default|gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?")
# These take a part of the base's weight into the adapter.
_SPLITS_BASE = re.compile("olora|pissa")


class AttachedAdapter:
    """An adapter in training; the model is as it was after `detach`.

    Args:
        components: The denoiser under ``unet`` and the text encoders under their names.
        spec: The adapter's shape. New words are not attached here.
        compiled: Whether the denoiser's repeated blocks are compiled; for LoRAs only, of which
            nothing is left out.
        train_timesteps: How many timesteps the base model has.

    Raises:
        ConfigError: If a pattern matches no layer, or settings contradict each other.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        spec: AdapterSpec,
        compiled: bool = False,
        train_timesteps: int = 1000,
    ) -> None:
        refuse_contradictions(spec)
        if compiled and spec.has_masks:
            raise ConfigError(
                "Compiled blocks compute an adapter whole, and parts of this one are left out at "
                "times.",
                "Set train.compile=off, or leave dropout and T-LoRA out.",
            )
        chosen = choose_layers(components, spec)
        self.spec = spec
        self._chosen = chosen
        self._configs = _configure(chosen, spec)
        self._components = {name: components[name] for name in chosen}
        # Weights that an initialisation took a part of, by layer, and what it took.
        self._originals: dict[nn.Module, Tensor] = {}
        self._taken: dict[str, Layer] = {}
        self._fused: list[FusedLora] = []
        self._train_timesteps = train_timesteps
        self.masks: RankMasks | None = None
        try:
            self._attach()
            self._fuse(compiled)
        except Exception:
            self.detach()
            raise
        self.weights = self._group_weights()

    def _attach(self) -> None:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # OFT tells of every layer whose inputs its blocks do not divide, and mends it.
            warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")
            torch.manual_seed(self.spec.seed)
            for name, module in self._components.items():
                inject_adapter_in_model(self._configs[name], module, ADAPTER_NAME)
            for name, layer in self._adapted():
                self._begin(name, layer)

    def _fuse(self, compiled: bool = False) -> None:
        """Let LoRAs be computed in few operations; the other kinds keep PEFT's."""
        if self.spec.kind != "lora":
            return
        for component, owner in self._components.items():
            factors = {
                name.removeprefix(f"{component}."): ScaledFactors(
                    layer,
                    layer.get_base_layer(),
                    layer.lora_A[ADAPTER_NAME].weight,
                    layer.lora_B[ADAPTER_NAME].weight,
                    float(layer.scaling[ADAPTER_NAME]),
                )
                for name, layer in self._adapted()
                if name.startswith(f"{component}.") and can_be_fused(layer.get_base_layer())
            }
            masks = None
            if component == "unet" and self.spec.has_masks:
                ranks = {name: one.down.shape[0] for name, one in factors.items()}
                masks = self.masks = RankMasks(owner, ranks, self.spec, self._train_timesteps)
            if factors:
                self._fused.append(FusedLora(owner, factors, compiled, masks))

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        for component, owner in self._components.items():
            for name, module in owner.named_modules():
                if isinstance(module, BaseTunerLayer):
                    yield f"{component}.{name}", module

    @torch.no_grad()
    def _begin(self, name: str, layer: Any) -> None:
        """Bring the first weights to float32; initialise what must see the base's weight so."""
        for weight in layer.parameters():
            if weight.requires_grad:
                # AdamW steps of 1e-4 vanish in bfloat16: adapters are trained in float32.
                weight.data = weight.data.float()
        special = self.spec.init not in ("default", "gaussian")
        if self.spec.kind not in ("lora", "dora") or (special, self.spec.kind) == (False, "lora"):
            return
        base = layer.get_base_layer()
        original = base.weight.data
        # A copy: some of PEFT's initialisations write into the weight itself.
        base.weight.data = original.float().clone()
        if special and isinstance(base, nn.Linear):
            if self.spec.init == "orthogonal" and self.spec.has_masks:
                # peft's factors are nothing together, and something where ranks are left out.
                nn.init.orthogonal_(layer.lora_A[ADAPTER_NAME].weight)
            elif self.spec.init == "orthogonal":
                layer.orthogonal_init(ADAPTER_NAME)
            elif self.spec.init == "olora":
                layer.olora_init(ADAPTER_NAME)
            else:
                layer.pissa_init(ADAPTER_NAME, self.spec.init)
            for factors in (layer.lora_A, layer.lora_B):
                factors[ADAPTER_NAME].weight.requires_grad_(True)
        if _SPLITS_BASE.match(self.spec.init) and isinstance(base, nn.Linear):
            self._originals[base] = original
            self._taken[name] = _read_factors(layer, sign=-1.0)
            base.weight.data = residual = base.weight.data.to(original.dtype)
            original = residual
        if self.spec.kind == "dora":
            # Magnitudes that PEFT took from a half-precision weight are off by its rounding.
            layer.lora_magnitude_vector[ADAPTER_NAME].update_layer(
                base_layer=base,
                lora_A=layer.lora_A[ADAPTER_NAME].weight,
                lora_B=layer.lora_B[ADAPTER_NAME].weight,
                scaling=layer.scaling[ADAPTER_NAME],
            )
        base.weight.data = original

    def _group_weights(self) -> list[WeightGroup]:
        kinds = {".lora_A.": "down", ".lora_B.": "up", "": "other"}
        layers = {weight: name for name, one in self._adapted() for weight in one.parameters()}
        groups: dict[Any, list[nn.Parameter]] = {
            role: [] for role in ("down", "up", "other", "text down", "text up", "text other")
        }
        scales: dict[str, list[float]] = {"up": [], "text up": []}
        is_update = self.spec.kind == "lora" and not self._taken
        for component, owner in self._components.items():
            for name, weight in owner.named_parameters():
                if weight.requires_grad:
                    kind = next(kind for mark, kind in kinds.items() if mark in name)
                    role = kind if component == "unet" else f"text {kind}"
                    groups[role].append(weight)
                    if kind == "up" and is_update:
                        layer: Any = owner.get_submodule(name.partition(".lora_B.")[0])
                        scales[role].append(float(layer.scaling[ADAPTER_NAME]))
        return [
            WeightGroup(
                role,
                tuple(weights),
                tuple(layers[weight] for weight in weights),
                tuple(scales.get(role, ())),
            )
            for role, weights in groups.items()
            if weights
        ]

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Take a finished LoRA's weights; `read` then gives the same LoRA.

        Raises:
            AdapterError: If it is of another kind, or its layers or ranks are others.
            ConfigError: If this adapter is no LoRA, or begins with a part of the base.
        """
        if self.spec.kind != "lora" or self._taken:
            raise ConfigError(
                "Only a LoRA that begins by default can begin from another adapter's weights.",
                "Set adapter.kind=lora and adapter.init_lora_weights=default, or leave --from out.",
            )
        refuse_other_kinds(adapter, "The adapter to begin from", "can be trained on")
        if adapter.t_lora_min_rank != self.spec.t_lora_min_rank:
            named = [one or "none" for one in (adapter.t_lora_min_rank, self.spec.t_lora_min_rank)]
            raise AdapterError(
                f"The adapter to begin from has adapter.t_lora_min_rank = {named[0]}, and "
                f"{named[1]} is trained here.",
                f"Set adapter.t_lora_min_rank={named[0]}, or leave --from out.",
            )
        mine = dict(self._adapted())
        differing = sorted({*mine} ^ {*adapter.layers})
        if differing:
            raise AdapterError(
                f"The adapter to begin from changes other layers than are trained here: "
                f"{', '.join(differing[:3])} and others, {len(differing)} in all.",
                "Set train.target_modules, adapter.blocks and adapter.text_encoders as it was "
                "trained; dreamloom inspect FILE tells its layers.",
            )
        for name, layer in mine.items():
            down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
            found = adapter.layers[name]
            if found.rank != down.shape[0]:
                raise AdapterError(
                    f"The adapter to begin from has rank {found.rank} in {name}, where rank "
                    f"{down.shape[0]} is trained.",
                    f"Set train.rank={found.rank}, or resize it: dreamloom resize FILE --rank "
                    f"{down.shape[0]} -o OTHER.",
                )
            if (found.down.shape, found.up.shape) != (down.shape, up.shape):
                raise AdapterError(
                    f"The adapter to begin from does not fit {name}: it was made for another base.",
                    "Name that base model with --base.",
                )
        for name, layer in mine.items():
            found = adapter.layers[name]
            layer.lora_A[ADAPTER_NAME].weight.copy_(found.down)
            layer.lora_B[ADAPTER_NAME].weight.copy_(found.up / layer.scaling[ADAPTER_NAME])

    def read(self) -> Adapter:
        """Copy the adapter to the CPU, as a change of the original base, scales folded in."""
        if self.spec.kind in ("lora", "dora"):
            layers = {name: self._read_layer(name, layer) for name, layer in self._adapted()}
            if self.spec.kind == "lora":
                least = self.spec.t_lora_min_rank
                return Adapter(layers, {} if least is None else {T_LORA_KEY: str(least)})
            magnitudes = {
                name: _copy(layer.lora_magnitude_vector[ADAPTER_NAME].weight)
                for name, layer in self._adapted()
            }
            return Adapter({}, peft=make_dora(layers, magnitudes))
        tensors: dict[str, Tensor] = {}
        configs = {}
        for component, owner in self._components.items():
            state = get_peft_model_state_dict(
                owner, adapter_name=ADAPTER_NAME, save_embedding_layers=False
            )
            tensors |= {f"{component}.{key}": _copy(value) for key, value in state.items()}
            # PEFT shortens the list of names to their ends, which mean something in this model.
            names = sorted(self._chosen[component])
            configs[component] = describe_config(self._configs[component]) | {
                "target_modules": names
            }
        return Adapter({}, peft=PeftState(self.spec.kind, tensors, configs))

    def _read_layer(self, name: str, layer: Any) -> Layer:
        now = _read_factors(layer)
        if name not in self._taken:
            return now
        # What the base lost at the start is taken off again: ΔW = up · down - up₀ · down₀.
        taken = self._taken[name]
        return Layer(torch.cat([now.down, taken.down]), torch.cat([now.up, taken.up], dim=1))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as the base model does, for the time of a block."""
        parts = {base: base.weight.data for base in self._originals}
        try:
            for _, layer in self._adapted():
                layer.enable_adapters(False)
            for base, original in self._originals.items():
                base.weight.data = original
            yield
        finally:
            for base, part in parts.items():
                base.weight.data = part
            for _, layer in self._adapted():
                layer.enable_adapters(True)

    def detach(self) -> None:
        """Take the adapter off; the base is as it was, bit for bit."""
        for form in self._fused:
            form.remove()
        if self.masks is not None:
            self.masks.remove()
        for base, original in self._originals.items():
            base.weight.data = original
        for full_name, layer in list(self._adapted()):
            component, _, name = full_name.partition(".")
            parent, _, child = name.rpartition(".")
            holder = self._components[component].get_submodule(parent)
            setattr(holder, child, layer.get_base_layer())
        for owner in self._components.values():
            if hasattr(owner, "peft_config"):
                del owner.peft_config


def refuse_contradictions(spec: AdapterSpec) -> None:
    """Refuse settings that no layer can meet, in the user's words.

    Raises:
        ConfigError: If there are any.
    """
    if spec.rank < 1 or any(rank < 1 for rank in spec.ranks.values()):
        raise ConfigError("A rank must be 1 or more.", "Choose a larger adapter rank.")
    if _INITS.fullmatch(spec.init) is None:
        raise ConfigError(
            f"There is no initialisation {spec.init!r}.",
            "Choose default, gaussian, orthogonal, olora, pissa or pissa_niter_4.",
        )
    if spec.kind not in ("lora", "dora"):
        if spec.init != "default":
            raise ConfigError(
                f"A {spec.kind} begins by its own rule, not with {spec.init}.",
                "Leave init at default, or choose kind lora or dora.",
            )
        if spec.use_rslora:
            raise ConfigError(
                f"Only lora and dora can be rank stabilised, not {spec.kind}.",
                "Leave rank_stabilised out, or choose another kind.",
            )
    if spec.has_masks:
        _refuse_masks(spec)
    if spec.init == "orthogonal" and any(r % 2 for r in (spec.rank, *spec.ranks.values())):
        raise ConfigError("The initialisation orthogonal needs even ranks.", "Add 1 to the rank.")
    if spec.kind == "oft":
        if spec.rank < 2:
            raise ConfigError(
                "For oft the rank is the side of the blocks that turn; one of 1 cannot.",
                "Choose a rank of 2 or more.",
            )
        if spec.ranks or spec.alphas:
            raise ConfigError(
                "oft has one block size for all layers, and no alpha.",
                "Leave ranks and alphas out, or choose another kind.",
            )


def _refuse_masks(spec: AdapterSpec) -> None:
    """Refuse to leave parts out of what is no sum over ranks, or holds a part of the base."""
    asked = {
        "adapter.dropout": spec.dropout,
        "adapter.rank_dropout": spec.rank_dropout,
        "adapter.module_dropout": spec.module_dropout,
        "adapter.t_lora_min_rank": spec.t_lora_min_rank,
    }
    named = ", ".join(f"{name} = {value:g}" for name, value in asked.items() if value)
    if spec.kind != "lora":
        raise ConfigError(
            f"{named} leaves out parts of a LoRA, and this is a {spec.kind}.",
            "Set adapter.kind=lora, or leave it out.",
        )
    if _SPLITS_BASE.match(spec.init):
        raise ConfigError(
            f"{named} would leave out parts of the base's weights, which {spec.init} takes into "
            "the adapter.",
            "Set adapter.init_lora_weights to default or orthogonal, or leave it out.",
        )
    least = spec.t_lora_min_rank
    if least is not None and not 1 <= least <= spec.rank:
        raise ConfigError(
            f"adapter.t_lora_min_rank = {least} is not from 1 to the rank, {spec.rank}.",
            "Take half of train.rank, as its paper does, or none.",
        )


def _configure(chosen: Mapping[str, list[str]], spec: AdapterSpec) -> dict[str, PeftConfig]:
    """Make PEFT's configuration of each component, with every layer named exactly."""
    full = [f"{component}.{name}" for component, names in chosen.items() for name in names]
    ranks = assign_by_pattern(spec.ranks, full, "ranks")
    alphas = assign_by_pattern(spec.alphas, full, "alphas")
    configs: dict[str, PeftConfig] = {}
    for component, names in chosen.items():
        if spec.kind == "oft":
            configs[component] = OFTConfig(r=0, oft_block_size=spec.rank, target_modules=names)
            continue
        # PEFT reads names as patterns of names' ends; "^" ties each to its own layer.
        rank_pattern, alpha_pattern = (
            {
                f"^{re.escape(name.removeprefix(f'{component}.'))}": value
                for name, value in values.items()
                if name.startswith(f"{component}.")
            }
            for values in (ranks, alphas)
        )
        shared: dict[str, Any] = {
            "r": spec.rank,
            "target_modules": names,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }
        if spec.kind in ("loha", "lokr"):
            kind = LoHaConfig if spec.kind == "loha" else LoKrConfig
            configs[component] = kind(alpha=spec.alpha, **shared)
        else:
            configs[component] = LoraConfig(
                lora_alpha=spec.alpha,
                use_dora=spec.kind == "dora",
                use_rslora=spec.use_rslora,
                init_lora_weights="gaussian" if spec.init == "gaussian" else True,
                **shared,
            )
    return configs


def _read_factors(layer: Any, sign: float = 1.0) -> Layer:
    scale = sign * layer.scaling[ADAPTER_NAME]
    down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    return Layer(_copy(down), _copy(up.detach().float() * scale))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()
