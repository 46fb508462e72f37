"""Attention with frozen weights computes what diffusers' does, a prompt's part of it once."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dreamloom.models.frozen_attention import freeze_attentions
from dreamloom.models.packed_linear import Order, PackedLinear, restore_forward

RNG = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 16, generator=RNG)
PROMPTS = [torch.randn(2, 5, 12, generator=RNG) for _ in range(3)]


def make(cross: int | None = None, **others: object) -> Attention:
    torch.manual_seed(0)
    made = Attention(16, cross, heads=2, dim_head=8, **others)
    return made.requires_grad_(False)


@pytest.fixture(autouse=True)
def nothing_learns() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("order", ["turned", "packed"])
@pytest.mark.parametrize("cross", [None, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_diffusers(order: Order, cross: int | None, bias: bool) -> None:
    attention = make(cross, bias=bias)
    asked: list[tuple[Tensor, ...]] = [(X, one) for one in PROMPTS] if cross else [(X,)]
    expected = [attention(*one) for one in asked]
    frozen = freeze_attentions([attention], order)
    assert frozen == [attention]
    for _ in range(3):
        for one, other in zip(asked, expected, strict=True):
            torch.testing.assert_close(attention(*one), other)
    restore_forward(frozen)
    assert all(map(torch.equal, (attention(*one) for one in asked), expected))


def test_what_a_prompt_becomes_is_computed_for_the_first_steps_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    plain = PackedLinear.apply
    monkeypatch.setattr(
        PackedLinear, "apply", lambda self, x: seen.append(x.shape[-1]) or plain(self, x)
    )
    attention = make(12)
    freeze_attentions([attention], "turned")
    for _ in range(5):
        attention(X, PROMPTS[0])
    assert seen.count(12) == 2
    assert seen.count(16) == 5
    changed = PROMPTS[0].clone()
    before = attention(X, changed)
    changed.mul_(2)
    assert not torch.allclose(attention(X, changed), before)


def test_masks_and_hooks_are_left_to_diffusers() -> None:
    attention, told = make(12), []
    mask = torch.zeros(2, 1, 5).index_fill(2, torch.tensor([4]), -1e4)
    masked = attention(X, PROMPTS[0], mask)
    freeze_attentions([attention], "turned")
    assert torch.equal(attention(X, PROMPTS[0], mask), masked)
    assert not torch.allclose(attention(X, PROMPTS[0]), masked)
    attention.to_k.register_forward_pre_hook(lambda layer, given: told.append(given[0]))
    attention(X, PROMPTS[0])
    assert told[0] is PROMPTS[0]


def test_what_learns_or_computes_in_its_own_way_is_left() -> None:
    learning, own, normed = make(), make(), make(qk_norm="layer_norm")
    learning.to_v.weight.requires_grad_(True)
    vars(own.to_q)["forward"] = own.to_q.forward
    assert freeze_attentions([learning, own, normed, nn.Linear(2, 2)], "turned") == []
