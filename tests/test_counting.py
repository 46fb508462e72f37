import gc

import torch
from torch import nn

from dreamloom.memory.tensor_counter import MemoryCounter, tensors_of

KIB = 1024


def test_views_count_once_and_freed_memory_counts_no_more():
    with MemoryCounter() as counter:
        first = torch.zeros(4 * KIB)
        views = [first[:10], first.view(2, -1), first.t()]
        assert counter.held_bytes == 16 * KIB
        second = first + 1
        assert counter.held_bytes == 32 * KIB
        del first, views
        gc.collect()
        assert counter.held_bytes == 16 * KIB
    assert counter.peak_bytes == 32 * KIB
    assert second.sum() == 4 * KIB


def test_sizes_are_rounded_up_to_the_allocators_blocks():
    with MemoryCounter() as counter:
        kept = [torch.zeros(1) for _ in range(3)]
    assert counter.held_bytes == 3 * 512
    assert len(kept) == 3


def test_what_was_kept_for_the_backward_pass_counts_until_it_is_done():
    layers = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.SiLU())))
    inputs = torch.zeros(64, 256, requires_grad=True)
    one = 64 * KIB
    with MemoryCounter() as counter:
        counter.hold(tensors_of(layers))
        weights = counter.held_bytes
        with torch.no_grad():
            layers(inputs)
        assert counter.peak_bytes - weights <= 3 * one
        output = layers(inputs)
        kept = counter.held_bytes - weights
        assert 7 * one <= kept <= 9 * one
        output.sum().backward()
        del output
    # Gradients of the weights, and of the input.
    assert counter.held_bytes == 2 * weights + one


def test_what_is_put_away_counts_again_when_it_comes_back():
    layer = nn.Linear(KIB, KIB, bias=False)
    counter = MemoryCounter()
    counter.hold(tensors_of(layer))
    counter.hold(tensors_of(layer))
    assert counter.held_bytes == 4 * KIB**2
    counter.put_away(tensors_of(layer))
    counter.put_away(tensors_of(layer))
    assert counter.held_bytes == 0
    counter.begin_phase()
    assert counter.peak_bytes == 0
    counter.hold(tensors_of(layer))
    assert counter.held_bytes == counter.peak_bytes == 4 * KIB**2
    counter.put_away(tensors_of(layer))
    del layer
    gc.collect()
    assert counter.held_bytes == 0
