"""A packed convolution computes what it did before, and is itself again afterwards."""

import pytest
import torch
from torch import nn

from dreamloom.models.convolutions import can_be_packed, pack_convolutions
from dreamloom.models.packed_linear import restore_forward

SHAPES = [(2, 8, 8), (2, 4, 12), (1, 8, 8), (2, 8, 8)]
CHANNELS = pytest.mark.parametrize("channels", [(4, 6), (64, 48), (48, 64), (128, 384), (384, 128)])
BIAS = pytest.mark.parametrize("bias", [True, False])


def make_convolution(channels: tuple[int, int], bias: bool) -> nn.Conv2d:
    return nn.Conv2d(*channels, 3, padding=1, bias=bias).requires_grad_(False)


def run(layer: nn.Conv2d) -> list[torch.Tensor]:
    """Compute outputs and gradients of pictures of several shapes."""
    found = []
    for number, (images, height, width) in enumerate(SHAPES):
        rng = torch.Generator().manual_seed(number)
        x = torch.randn(images, layer.in_channels, height, width, generator=rng, requires_grad=True)
        out = layer(x)
        # A gradient whose channels lie last.
        given = torch.randn(images, height, width, layer.out_channels, generator=rng)
        out.backward(given.permute(0, 3, 1, 2))
        found += [out.detach(), x.grad]
    return found


def name_node(layer: nn.Conv2d) -> str:
    return layer(torch.ones(1, layer.in_channels, 4, 4).requires_grad_()).grad_fn.name()


@CHANNELS
@BIAS
def test_pictures_and_gradients_are_the_same_whatever_the_shape(
    channels: tuple[int, int], bias: bool
) -> None:
    layer = make_convolution(channels, bias)
    before = run(layer)
    packed = pack_convolutions([layer])
    assert packed == [layer]
    assert name_node(layer) == "_FrozenBackward"
    torch.testing.assert_close(run(layer), before, rtol=1e-4, atol=1e-4)
    restore_forward(packed)
    assert all(map(torch.equal, run(layer), before))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_others_are_left_alone(settings: dict[str, int]) -> None:
    assert not can_be_packed(nn.Conv2d(4, 4, **settings).requires_grad_(False))
    assert not can_be_packed(nn.Conv2d(4, 4, 3, padding=1))


def test_another_precision_is_computed_as_ever() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    pack_convolutions([layer])
    layer.double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))
