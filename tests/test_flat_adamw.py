"""Weights changed as one are changed as by torch's AdamW, and saved as if they were single."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from dreamloom.training.flat_adamw import FlatAdamW, find_neighbours

SHAPES = ((3, 4), (2, 5), (1, 6), (4, 2, 3))


def lay_out(neighbours: bool) -> list[Parameter]:
    """The same weights, in one piece of memory or each in its own."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    whole = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    parts = [one.view(shape) for one, shape in zip(whole.split(sizes), SHAPES, strict=True)]
    return [Parameter(part if neighbours else part.clone()) for part in parts]


def groups_of(weights: list[Parameter]) -> list[dict[str, Any]]:
    # Two rates, and what lies side by side is not all in one group.
    return [{"params": weights[:3], "lr": 0.05}, {"params": weights[3:], "lr": 0.02}]


def gradients(update: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(100 + update)
    return [torch.randn(shape, generator=rng) for shape in SHAPES]


def teach(
    optimizer: AdamW,
    weights: list[Parameter],
    updates: range,
    told: dict[str, Tensor] | None = None,
) -> None:
    """Do updates whose gradients are added up by autograd, in two passes."""
    for update in updates:
        optimizer.zero_grad()
        for _ in range(2):
            pairs = zip(weights, gradients(update), strict=True)
            torch.stack([(w * g).sum() for w, g in pairs]).sum().backward()
        vars(optimizer).update(told or {})
        optimizer.step()
        for name in told or {}:
            del vars(optimizer)[name]


def both() -> tuple[tuple[AdamW, list[Parameter]], tuple[FlatAdamW, list[Parameter]]]:
    single, flat = lay_out(False), lay_out(True)
    plain = AdamW(groups_of(single), weight_decay=0.1, fused=True)
    return (plain, single), (FlatAdamW(groups_of(flat), weight_decay=0.1), flat)


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_what_lies_side_by_side_is_found() -> None:
    weights = lay_out(True)
    assert [[*map(id, g)] for g in find_neighbours(weights[::-1])] == [[*map(id, weights)]]
    assert [len(group) for group in find_neighbours([weights[0], weights[2]])] == [1, 1]
    assert [len(group) for group in find_neighbours(lay_out(False))] == [1, 1, 1, 1]
    turned = Parameter(weights[1].detach().t())
    assert len(find_neighbours([weights[0], turned])) == 2


def test_updates_and_states_are_torchs() -> None:
    (plain, single), (flat, weights) = both()
    for optimizer, own in ((plain, single), (flat, weights)):
        teach(optimizer, own, range(3))
        optimizer.param_groups[0]["lr"] = 0.01
        teach(optimizer, own, range(3, 6))
    assert_same([*weights], [*single])
    assert_same(flat.state_dict()["state"], plain.state_dict()["state"])
    assert len(flat.gather_gradients()) == 2
    norm = torch.cat([one.flatten() for one in flat.gather_gradients()]).norm()
    assert_same(norm, 2 * torch.cat([one.flatten() for one in gradients(5)]).norm())


def test_gradients_are_scaled_and_what_is_not_sound_is_left_out() -> None:
    (plain, single), (flat, weights) = both()
    for found in (0.0, 1.0, 0.0):
        told = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(found)}
        before = [weight.detach().clone() for weight in weights]
        teach(plain, single, range(1), told)
        teach(flat, weights, range(1), told)
        assert_same([*weights], [*single])
        assert found == all(map(torch.equal, weights, before))


@pytest.mark.parametrize("saved_by", ["plain", "flat"])
def test_a_state_goes_from_one_to_the_other(saved_by: str) -> None:
    sides = dict(zip(("plain", "flat"), both(), strict=True))
    for optimizer, own in sides.values():
        teach(optimizer, own, range(4))
    saved = copy.deepcopy(sides[saved_by][0].state_dict())
    straight = sides[saved_by][1]
    for optimizer, own in both():
        with torch.no_grad():
            for weight, value in zip(own, straight, strict=True):
                weight.copy_(value)
        teach(optimizer, own, range(0))
        optimizer.load_state_dict(copy.deepcopy(saved))
        teach(optimizer, own, range(4, 6))
        if saved_by == ("flat" if isinstance(optimizer, FlatAdamW) else "plain"):
            resumed = own
    teach(*sides[saved_by], range(4, 6))
    assert all(map(torch.equal, resumed, straight))


def move_weights(weights: list[Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data.clone()


def drop_gradients(weights: list[Parameter]) -> None:
    for weight in weights:
        weight.grad = None


def replace_gradients(weights: list[Parameter]) -> None:
    for weight in weights:
        weight.grad = torch.full_like(weight, 7.0)


@pytest.mark.parametrize("disturb", [move_weights, drop_gradients, replace_gradients])
def test_what_was_moved_is_joined_again(disturb: Callable[[list[Parameter]], None]) -> None:
    (plain, single), (flat, weights) = both()
    for optimizer, own in ((plain, single), (flat, weights)):
        teach(optimizer, own, range(2))
        disturb(own)
        teach(optimizer, own, range(2, 4))
    assert_same([*weights], [*single])


def test_gradients_that_others_gave_are_used() -> None:
    (plain, single), (flat, weights) = both()
    for update in range(3):
        for optimizer, own in ((plain, single), (flat, weights)):
            for weight, gradient in zip(own, gradients(update), strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    assert_same([*weights], [*single])


def test_a_closure_is_refused() -> None:
    _, (flat, _) = both()
    with pytest.raises(ValueError, match="closure"):
        flat.step(lambda: 0.0)
