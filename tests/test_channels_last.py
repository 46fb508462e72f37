"""Weights laid out for drawing compute the same and come back as they were."""

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention import FeedForward
from torch import nn

from dreamloom.models.channels_last import fastest_layout


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(2), nn.Linear(36, 24))
    return layers.requires_grad_(False)


@torch.no_grad()
def test_the_values_stay_and_the_layout_comes_back():
    layers, x = build(), torch.randn(4, 8, 6, 6)
    before, own = {k: v.clone() for k, v in layers.state_dict().items()}, layers[2].forward
    plain = layers(x)
    with fastest_layout(layers):
        assert layers[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert "forward" in vars(layers[2])
        assert torch.allclose(layers(x), plain, atol=1e-5)
    assert layers[0].weight.is_contiguous()
    assert layers[2].forward == own
    assert all(torch.equal(v, before[k]) for k, v in layers.state_dict().items())


@torch.no_grad()
def test_weights_that_changed_since_the_last_drawing_count():
    layers, x = build(), torch.randn(4, 8, 6, 6)
    with fastest_layout(layers):
        first = layers(x)
    layers[2].weight.mul_(2)
    layers[0].weight.mul_(0.5)
    expected = layers(x)
    with fastest_layout(layers):
        assert torch.allclose(layers(x), expected, atol=1e-5)
    assert not torch.allclose(expected, first, atol=1e-3)


@torch.no_grad()
def test_layers_that_compute_in_their_own_way_and_half_precision_are_left():
    layers = build()
    marked = layers[2].forward
    vars(layers[2])["forward"] = marked
    with fastest_layout(layers):
        assert vars(layers[2])["forward"] is marked
    half = build().half()
    with fastest_layout(half):
        assert "forward" not in vars(half[2])
        assert half[0].weight.is_contiguous()


@torch.no_grad()
def test_hooks_on_what_is_inside_a_feed_forward_layer_are_called():
    layer, x, told = (
        FeedForward(8, activation_fn="geglu").requires_grad_(False),
        torch.ones(2, 8),
        [],
    )
    layer.net[2].register_forward_hook(lambda inner, given, out: out + 1)
    layer.net[0].proj.register_forward_pre_hook(lambda inner, given: told.append(given[0]))
    expected = layer(x)
    with fastest_layout(layer):
        assert torch.allclose(layer(x), expected, atol=1e-6)
    assert len(told) == 2


def test_an_error_while_drawing_leaves_nothing_behind():
    layers = build()
    try:
        with fastest_layout(layers):
            raise RuntimeError("the disk is full")
    except RuntimeError:
        pass
    assert layers[0].weight.is_contiguous()
    assert "forward" not in vars(layers[2])


@torch.no_grad()
def test_a_transformer_leaves_channels_last_and_is_itself_again_afterwards():
    torch.manual_seed(0)
    transformer = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        cross_attention_dim=12,
        use_linear_projection=True,
        norm_num_groups=4,
    ).requires_grad_(False)
    x, prompts = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 12)
    plain = transformer(x, prompts).sample
    own = set(vars(transformer))
    with fastest_layout(transformer):
        x = x.contiguous(memory_format=torch.channels_last)
        drawn = transformer(x, prompts).sample
        assert drawn.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(drawn, plain, atol=1e-5)
    assert plain.is_contiguous()
    assert set(vars(transformer)) == own
    assert torch.equal(transformer(x.contiguous(), prompts).sample, plain)
