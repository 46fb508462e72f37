"""Low-rank updates (LoRA) of linear layers and convolutions, each a single node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from dreamloom.models.packed_linear import Order, PackedLinear


@dataclass(frozen=True)
class ScaledFactors:
    """One layer's update: ``scale`` · up · down.

    Args:
        layer: PEFT's layer around the base model's.
        base: The base model's layer; its own weights are frozen.
        down: In training, float32: (rank, inputs), or a convolution's (rank, channels, h, w).
        up: In training, float32: (outputs, rank), or (outputs, rank, 1, 1).
        scale: alpha / rank, or what else the spec makes of it.
    """

    layer: Any
    base: nn.Module
    down: nn.Parameter
    up: nn.Parameter
    scale: float


def list_factors(group: Sequence[ScaledFactors]) -> list[nn.Parameter]:
    """List the down factors of layers, then their up factors."""
    return [*(one.down for one in group), *(one.up for one in group)]


# ------------------------------------------------------------------ linear layers


class LowRankMap:
    """Linear layers of one input as one map, each with its update.

    Args:
        group: The layers. The weights of several become parts of one matrix.
        down: Working copy of their down factors, below each other.
        ups: Working copies of their up factors.
        order: How the frozen weights lie beside themselves; see `PackedLinear`.
    """

    def __init__(
        self,
        group: Sequence[ScaledFactors],
        down: Float[Tensor, "ranks inputs"],
        ups: Sequence[Tensor],
        order: Order,
    ) -> None:
        self.group = group
        self.masters = list_factors(group)
        self.down, self.ups = down, ups
        # Views cost a microsecond each time, and there are thousands.
        self._down_t, self._ups_t = down.t(), [up.t() for up in ups]
        self._is_working_copy = down.dtype != self.masters[0].dtype
        self.ranks = [up.shape[1] for up in ups]
        self.inputs = down.shape[1]
        self.outputs = [up.shape[0] for up in ups]
        self.scales = [one.scale for one in group]
        self.is_plain = all(type(one.base) is nn.Linear for one in group)
        self.is_scaled = any(scale != 1 for scale in self.scales)
        self.cache: InputCache | None = None
        self._order = order
        self._frozen: PackedLinear | None = None

    def __call__(self, x: Float[Tensor, "... inputs"]) -> tuple[Tensor, ...]:
        """Compute each layer's output."""
        if torch.compiler.is_compiling():
            # The same in operations that a compiler can see through and put together.
            return tuple(
                one.base(x)
                + linear(linear(x, one.down.to(x.dtype)) * one.scale, one.up.to(x.dtype))
                for one in self.group
            )
        results: tuple[Tensor, ...] = _Apply.apply(x, self, self.find_cached(x), *self.masters)  # type: ignore[no-untyped-call]
        if self.is_plain:
            return results
        # A base that keeps its weights in another form computes by itself.
        return (self.group[0].base(x) + results[0],)

    def find_cached(self, x: Tensor) -> Tensor | None:
        """Find what the frozen weights made of this input before; see `InputCache`."""
        if self.cache is None:
            return None
        return self.cache.find(x, lambda one: self.frozen.apply(one.reshape(-1, one.shape[-1])))

    def compute(
        self, rows: Float[Tensor, "rows inputs"], known: Tensor | None = None
    ) -> tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows ranks"]]:
        """Compute all outputs side by side, and what the up factors were given.

        Args:
            rows: The input.
            known: What the frozen weights make of it, if that is known.
        """
        narrow = torch.mm(rows, self._down_t)
        parts = _split(narrow, self.ranks)
        if self.is_scaled:
            for part, scale in zip(parts, self.scales, strict=True):
                part.mul_(scale)
        if known is not None:
            whole = known.clone()
        elif self.is_plain:
            whole = self.frozen.apply(rows)
        else:
            whole = rows.new_zeros(len(rows), sum(self.outputs))
        for out, part, up in zip(self.split(whole), parts, self._ups_t, strict=True):
            out.addmm_(part, up)
        return whole, narrow

    def split(self, whole: Float[Tensor, "rows outputs"]) -> Sequence[Tensor]:
        """Take the outputs of all layers apart."""
        return _split(whole, self.outputs)

    def pull_back(
        self, gradients: Sequence[Tensor], rows: Tensor, narrow: Tensor, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Compute the gradients of the input and of the factors, in the order of ``masters``.

        With y = x Wᵀ + s (x Aᵀ) Bᵀ and g the gradient of y, that of B is gᵀ (s x Aᵀ), that of A
        is (s g B)ᵀ x and that of x is g W + (s g B) A. W is frozen and has none.

        Args:
            gradients: Those of each layer's outputs.
            rows: The input.
            narrow: From `compute`.
            wanted: Whether the input's is; else it is None.
        """
        inner = torch.empty_like(narrow)
        backs = _split(inner, self.ranks)
        parts = _split(narrow, self.ranks)
        ups = [torch.mm(one.t(), part) for one, part in zip(gradients, parts, strict=True)]
        for one, up, back in zip(gradients, self.ups, backs, strict=True):
            torch.mm(one, up, out=back)
        if self.is_scaled:
            for back, scale in zip(backs, self.scales, strict=True):
                back.mul_(scale)
        factor_gradients = [*_split(torch.mm(inner.t(), rows), self.ranks, 0), *ups]
        if self._is_working_copy:
            factor_gradients = [one.to(self.masters[0].dtype) for one in factor_gradients]
        if not wanted:
            return None, factor_gradients
        if not self.is_plain:
            return inner @ self.down, factor_gradients
        whole = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), 1)
        return self.frozen.pull_back(whole).addmm_(inner, self.down), factor_gradients

    @property
    def frozen(self) -> PackedLinear:
        """The frozen weights of all layers below each other.

        The layers' own become parts of that one matrix: no second copy is kept.
        """
        if self._frozen is None:
            bases: list[Any] = [one.base for one in self.group]
            weight, bias = bases[0].weight, bases[0].bias
            if len(bases) > 1:
                with torch.no_grad():
                    weight = torch.cat([base.weight for base in bases])
                    bias = None if bias is None else torch.cat([base.bias for base in bases])
                for base, part in zip(bases, weight.split(self.outputs), strict=True):
                    base.weight.data = part
            self._frozen = PackedLinear(weight, bias, self._order)
        return self._frozen

    def part(self) -> None:
        """Give the layers' weights memory of their own again."""
        if self._frozen is not None and len(self.group) > 1:
            for one in self.group:
                base: Any = one.base
                base.weight.data = base.weight.data.clone()
        self._frozen = None


class _Apply(torch.autograd.Function):
    """`LowRankMap` as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, owner: LowRankMap, known: Tensor | None, *masters: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        whole, narrow = owner.compute(rows, known)
        ctx.save_for_backward(rows, narrow)
        ctx.owner, ctx.shape = owner, x.shape
        return tuple([out.view(*x.shape[:-1], -1) for out in owner.split(whole)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        owner: LowRankMap = ctx.owner
        rows, narrow = ctx.saved_tensors
        flat = [one.reshape(-1, one.shape[-1]) for one in gradients]
        into, factor_gradients = owner.pull_back(flat, rows, narrow, ctx.needs_input_grad[0])
        if into is not None:
            into = into.view(ctx.shape)
        return (into, None, None, *factor_gradients)


def _split(whole: Tensor, sizes: list[int], dim: int = 1) -> Sequence[Tensor]:
    return torch.split_with_sizes(whole, sizes, dim) if len(sizes) > 1 else (whole,)


class InputCache:
    """What the frozen weights make of inputs that come again.

    While the text encoders are frozen, each update gives the same prompts to all layers; what a
    layer's own weights make of them is computed once. An input comes again if it is the same piece
    of memory, unchanged since, and has no gradient. It is held here, so nothing else can lie there.
    """

    _MOST = 2

    def __init__(self) -> None:
        # By what tells an input apart: the input itself, and what was computed once it came again.
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def find(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Find what was computed for an input; None the first time, and for what is trained."""
        if x.requires_grad or x.is_inference():
            return None
        place = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride())
        key = (*place, x._version)
        if key not in self._seen:
            while len(self._seen) >= self._MOST:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = (x, None)
            return None
        held, output = self._seen[key]
        if output is None:
            output = compute(x)
            self._seen[key] = (held, output)
        return output


class SharedInput:
    """Computes the outputs of several layers when the first is called, and hands them out.

    Args:
        compute: Gives the outputs of all of them for an input.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._compute = compute
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def take(self, number: int, x: Tensor) -> Tensor | None:
        """Take the output of one layer, or None if others were computed from another input."""
        if not self._waiting:
            self._input, self._waiting = x, dict(enumerate(self._compute(x)))
        found = self._waiting.pop(number, None) if self._input is x else None
        if found is None or not self._waiting:
            # Whatever was left waits for a call that does not come.
            self._input, self._waiting = None, {}
        return found


class AdaptedForward:
    """The forward pass of a linear layer with its update.

    Args:
        own: The layer's own map.
        shared: Computes it together with others that read the same input; None for one that
            shares its input with none.
        number: Which of those it is, from 0.
    """

    def __init__(self, own: LowRankMap, shared: SharedInput | None = None, number: int = 0) -> None:
        self._own, self._shared, self._number = own, shared, number
        (self._factors,) = own.group

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output, with that of the others or alone."""
        if self._factors.layer.disable_adapters:
            result: Tensor = self._factors.base(x)
            return result
        found = None
        if self._shared is not None and not torch.compiler.is_compiling():
            found = self._shared.take(self._number, x)
        return self._own(x)[0] if found is None else found


# ------------------------------------------------------------------ convolutions


class LowRankConvolution:
    """The forward pass of a convolution: its update is a narrow one, and a map at each place.

    Args:
        factors: The layer.
        down: Working copy of its down factor.
        up: Working copy of its up factor.
    """

    def __init__(self, factors: ScaledFactors, down: Tensor, up: Tensor) -> None:
        self._factors = factors
        self.down, self.up = down, up.flatten(1)
        self.scale, self.dtype = factors.scale, factors.down.dtype
        self.base: Any = factors.base
        self.shape: tuple[Any, Any, Any] = (self.base.stride, self.base.padding, self.base.dilation)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        one = self._factors
        if one.layer.disable_adapters:
            return self.base(x)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            narrow = conv2d(x, one.down.to(x.dtype), None, *self.shape) * self.scale
            return self.base(x) + conv2d(narrow, one.up.to(x.dtype))  # type: ignore[no-any-return]
        return _Convolve.apply(x, self, one.down, one.up)  # type: ignore


class _Convolve(torch.autograd.Function):
    """`LowRankConvolution` as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: LowRankConvolution, down: Tensor, up: Tensor) -> Tensor:
        outputs = conv2d(x, owner.base.weight, owner.base.bias, *owner.shape)
        narrow = conv2d(x, owner.down, None, *owner.shape)
        if owner.scale != 1:
            narrow.mul_(owner.scale)
        ctx.save_for_backward(x, narrow)
        ctx.owner = owner
        wide = owner.up.expand(len(x), -1, -1)
        return torch.baddbmm(outputs.flatten(2), wide, narrow.flatten(2)).view(outputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        owner: LowRankConvolution = ctx.owner
        x, narrow = ctx.saved_tensors
        flat = gradient.flatten(2)
        up = torch.bmm(flat, narrow.flatten(2).mT).sum(0).to(owner.dtype)
        inner = torch.matmul(owner.up.t(), flat).view(narrow.shape)
        if owner.scale != 1:
            inner.mul_(owner.scale)
        needs = ctx.needs_input_grad[0]
        into, down = _pull_back(inner, x, owner.down, owner.shape, [needs, True])
        if needs:
            into = into + _pull_back(gradient, x, owner.base.weight, owner.shape, [True, False])[0]
        return (into, None, down.to(owner.dtype), up[:, :, None, None])


def _pull_back(
    gradient: Tensor, x: Tensor, weight: Tensor, shape: tuple[Any, Any, Any], wanted: list[bool]
) -> tuple[Any, Any]:
    """Compute a convolution's gradients of its input and its weight, where wanted."""
    into, down, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *shape, False, [0, 0], 1, [*wanted, False]
    )
    return into, down
