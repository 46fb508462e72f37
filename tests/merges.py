"""Adapters to merge, made at random: mixed ranks, missing layers, convolutions, deficient ranks."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

from dreamloom.lora.adapter import Adapter, Layer

SHAPES = {"linear": ((), ()), "pointwise": ((1, 1), (1, 1)), "conv": ((3, 3), (1, 1))}


def random_layer(rank, rng, outputs=6, inputs=5, kind="linear", deficient=False):
    """Make a layer; a deficient one repeats a direction and has one that is all zeros."""
    kernel, ones = SHAPES[kind]
    down = torch.randn(rank, inputs, *kernel, generator=rng)
    up = torch.randn(outputs, rank, *ones, generator=rng)
    if deficient:
        down[-1] = down[0]
        up[:, rank // 2] = 0
    return Layer(down, up)


def random_adapter(seed, ranks, outputs=6, inputs=5):
    """Make an adapter with a layer of each kind named in ``ranks``."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"unet.{kind}": random_layer(rank, rng, outputs, inputs, kind)
            for kind, rank in ranks.items()
        }
    )


@st.composite
def adapters(draw, fewest=1, most=4):
    """Draw some adapters, each with some of three layers of any rank up to above the sides."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(draw(st.integers(fewest, most))):
        kinds = draw(st.sets(st.sampled_from([*SHAPES]), min_size=1))
        layers = {}
        for kind in sorted(kinds):
            rank, deficient = draw(st.integers(1, 7)), draw(st.booleans())
            layers[f"unet.{kind}"] = random_layer(rank, rng, kind=kind, deficient=deficient)
        made.append(Adapter(layers))
    if not any(made_layer.update().any() for a in made for made_layer in a.layers.values()):
        made[0] = random_adapter(1, {"linear": 2})
    return made


@st.composite
def merges(draw):
    """Draw adapters and their weights."""
    made = draw(adapters())
    weight = st.floats(-2, 2)
    weights = draw(st.lists(weight, min_size=len(made), max_size=len(made)).filter(any))
    return made, weights


def rewrite(adapter, seed):
    """Split every update into other factors: (up G, G⁻¹ down) with an orderly random G."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in adapter.layers.items():
        left, _ = torch.linalg.qr(torch.randn(layer.rank, layer.rank, generator=rng).double())
        right, _ = torch.linalg.qr(torch.randn(layer.rank, layer.rank, generator=rng).double())
        scales = torch.rand(layer.rank, generator=rng).double() + 0.5
        turn, back = left * scales @ right, right.T / scales @ left.T
        down = (back @ layer.down.flatten(1).double()).view_as(layer.down).float()
        up = (layer.up.flatten(1).double() @ turn).view_as(layer.up).float()
        layers[name] = Layer(down, up)
    return Adapter(layers, adapter.metadata, adapter.tokens)


def dense(adapter, name):
    """Multiply a layer out by hand; an absent one changes nothing."""
    if name not in adapter.layers:
        return torch.zeros((), dtype=torch.float64)
    layer = adapter.layers[name]
    up = layer.up.double().reshape(layer.up.shape[:2])
    return torch.einsum("or,r...->o...", up, layer.down.double())


def names_of(some):
    """Name every layer that any of them changes."""
    return {name for adapter in some for name in adapter.layers}


def assert_same(one, other, atol=1e-5):
    """Compare the updates of two adapters; an absent layer is one of zeros."""
    for name in names_of([one, other]):
        found, expected = torch.broadcast_tensors(dense(one, name), dense(other, name))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@contextmanager
def full_disk(most_bytes):
    """Let files grow to so many bytes and no further, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
