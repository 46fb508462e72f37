"""Noise and timesteps: every image has its own dice, and the dice fall as they should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.core.device import generator_for
from dreamloom.training.noise import (
    Rng,
    add_multires_noise,
    draw_noise,
    draw_normal,
    draw_timesteps,
    perturb_noise,
)

SHAPE = (4, 3, 5)


def rng(kinds, update=0, seed=0):
    is_prior = torch.tensor(kinds, dtype=torch.bool)
    return Rng(seed, update, is_prior, number_images(is_prior))


def number_images(is_prior):
    """Number the photos and the class images of a whole update, each from 0."""
    counted = torch.where(is_prior, is_prior.long().cumsum(0), (~is_prior).long().cumsum(0))
    return counted - 1


def draw_all(those):
    """Everything that an update draws, one tensor per purpose."""
    noise = draw_noise(those, SHAPE, offset=0.1)
    return [
        noise,
        add_multires_noise(noise, those, 2, 0.5),
        perturb_noise(noise, those, 0.1),
        draw_normal(those, "posterior", SHAPE),
        *(draw_timesteps(those, 1000, kind) for kind in KINDS),
    ]


KINDS = ("uniform", "logit_normal", "mode", "cubic")


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_draws_do_not_depend_on_the_batch_its_order_or_its_processes(kinds, data):
    whole = rng(kinds, update=3)
    rows = data.draw(st.lists(st.sampled_from(range(len(kinds))), unique=True))
    chosen = torch.tensor(rows, dtype=torch.long)
    part = Rng(whole.seed, whole.update, whole.is_prior[chosen], whole.numbers[chosen])
    for all_drawn, some_drawn in zip(draw_all(whole), draw_all(part), strict=True):
        assert torch.equal(all_drawn[chosen], some_drawn)


def test_a_photo_meets_the_same_rng_with_and_without_class_images():
    with_priors, without = rng([False, True, False, True]), rng([False, False])
    for one, other in zip(draw_all(with_priors), draw_all(without), strict=True):
        assert torch.equal(one[[0, 2]], other)


def test_every_image_update_seed_and_purpose_has_its_own_rng():
    drawn = [
        *draw_normal(rng([False, False, True, True]), "noise", SHAPE),
        *draw_normal(rng([False], update=1), "noise", SHAPE),
        *draw_normal(rng([False], seed=1), "noise", SHAPE),
        *draw_normal(rng([False]), "posterior", SHAPE),
    ]
    for place, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:place])


def test_draws_are_named_by_purpose_update_and_number():
    """Old runs must repeat, so the seeds of draws are part of the format."""
    those = rng([False, True, False], update=7, seed=5)
    drawn = draw_noise(those, SHAPE)
    assert torch.equal(drawn[2], torch.randn(SHAPE, generator=generator_for(5, "noise", 7, 1)))
    class_dice = generator_for(5, "noise of class", 7, 0)
    assert torch.equal(drawn[1], torch.randn(SHAPE, generator=class_dice))
    expected = torch.randint(1000, (1,), generator=generator_for(5, "timestep", 7, 0))
    assert draw_timesteps(those, 1000)[:1].equal(expected)


def test_draws_leave_the_common_rng_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draw_all(rng([False, True]))
    assert torch.equal(before, torch.get_rng_state())


def test_no_image_draws_nothing():
    none = rng([])
    assert draw_noise(none, SHAPE).shape == (0, *SHAPE)
    assert draw_timesteps(none, 10).shape == (0,)


# ------------------------------------------------------------------ noise


def test_an_offset_is_one_constant_per_image_and_channel():
    those = rng([False] * 300)
    plain, moved = draw_noise(those, SHAPE), draw_noise(those, SHAPE, offset=0.1)
    shift = moved - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    constants = shift[:, :, 0, 0]
    assert constants.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(constants.mean().item()) < 0.01
    # Channels of an image and images of a batch have nothing to do with each other.
    assert torch.corrcoef(constants.T)[0, 1].abs() < 0.2
    assert torch.equal(draw_noise(those, SHAPE, offset=0.0), plain)


def test_perturbed_noise_is_the_noise_and_a_little_more():
    those = rng([False] * 300)
    noise = draw_noise(those, SHAPE)
    extra = perturb_noise(noise, those, 0.1) - noise
    assert extra.std().item() == pytest.approx(0.1, rel=0.05)
    together = torch.stack([extra.flatten(), noise.flatten()])
    assert torch.corrcoef(together)[0, 1].abs() < 0.05
    assert perturb_noise(noise, those, 0.0) is noise
    assert perturb_noise(noise.half(), those, 0.1).dtype == torch.float16
    with pytest.raises(ValueError, match="0 or more, got -1"):
        perturb_noise(noise, those, -1.0)


def read_pyramid(noise, shrinks, levels, discount):
    """Sum the levels of one image number by number, each scaled up by hand."""
    channels, height, width = noise.shape
    summed = noise.double().clone()
    for level, (shrink, coarse) in enumerate(zip(shrinks, levels, strict=True)):
        rows, columns = (max(1, math.floor(side / shrink**level)) for side in (height, width))
        assert coarse.shape == (channels, rows, columns)
        for y in range(height):
            for x in range(width):
                # The middle of a pixel, between the middles of the coarse ones around it.
                v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
                u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
                for row, part_v in ((math.floor(v), 1 - v % 1), (math.ceil(v), v % 1)):
                    for column, part_u in ((math.floor(u), 1 - u % 1), (math.ceil(u), u % 1)):
                        own = coarse[:, row, column].double()
                        summed[:, y, x] += discount**level * part_v * part_u * own
    mean = summed.mean()
    return summed / ((summed - mean).square().sum() / (summed.numel() - 1)).sqrt()


def test_multires_noise_is_the_sum_of_its_levels():
    those, (channels, height, width) = rng([False, True], update=4, seed=2), (4, 9, 14)
    noise = draw_noise(those, (channels, height, width))
    drawn = add_multires_noise(noise, those, 3, 0.6)
    for row, purpose in enumerate(["multires noise", "multires noise of class"]):
        own = generator_for(2, purpose, 4, 0)
        shrinks, levels = [], []
        for level in range(3):
            shrinks.append(2 + 2 * torch.rand((), generator=own, dtype=torch.float64).item())
            sides = (max(1, math.floor(side / shrinks[-1] ** level)) for side in (height, width))
            levels.append(torch.randn(1, channels, *sides, generator=own)[0])
            if 1 in levels[-1].shape[1:]:
                break
        expected = read_pyramid(noise[row], shrinks, levels, 0.6)
        torch.testing.assert_close(drawn[row].double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(
    iterations=st.integers(1, 12),
    discount=st.floats(0, 1),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_multires_noise_has_the_variance_of_noise(iterations, discount, height, width):
    those = rng([False, True])
    noise = draw_noise(those, (4, height, width), offset=0.1)
    drawn = add_multires_noise(noise, those, iterations, discount)
    assert drawn.shape == noise.shape
    torch.testing.assert_close(drawn.flatten(1).std(dim=1), torch.ones(2), atol=1e-5, rtol=0)


def test_multires_noise_moves_neighbours_together_and_more_with_a_larger_discount():
    those = rng([False] * 40)
    noise = draw_noise(those, (4, 16, 16))

    def likeness(discount, iterations=6):
        drawn = add_multires_noise(noise, those, iterations, discount)
        near, far = drawn[..., 1:].flatten(), drawn[..., :-1].flatten()
        return torch.corrcoef(torch.stack([near, far]))[0, 1].item()

    # Without coarser levels the noise is white.
    assert abs(likeness(0.0)) < 0.02
    assert abs(likeness(0.8, iterations=1)) < 0.02
    assert likeness(0.3) < likeness(0.6) < likeness(0.9)
    assert likeness(0.6) > 0.1


def test_without_levels_noise_stays_as_it_is():
    noise = draw_noise(rng([False]), SHAPE)
    assert add_multires_noise(noise, rng([False]), 0, 0.3) is noise
    assert add_multires_noise(noise.half(), rng([False]), 2, 0.3).dtype == torch.float16
    assert add_multires_noise(draw_noise(rng([]), SHAPE), rng([]), 2, 0.3).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("iterations", "discount", "says"),
    [(-1, 0.3, "0 or more, got -1"), (1, 1.5, "0 to 1, got 1.5"), (1, -0.1, "0 to 1, got -0.1")],
)
def test_levels_that_make_no_sense_are_refused(iterations, discount, says):
    with pytest.raises(ValueError, match=says):
        add_multires_noise(draw_noise(rng([False]), SHAPE), rng([False]), iterations, discount)


# ------------------------------------------------------------------ timesteps


def share_below(kind, share):
    """The chance of a timestep below a share of all, by hand."""
    if kind == "uniform":
        return share
    if kind == "logit_normal":
        return 0.5 * (1 + math.erf(math.log(share / (1 - share)) / math.sqrt(2)))
    if kind == "cubic":  # 1 − u³ < share where u > (1 − share)^⅓
        return 1 - (1 - share) ** (1 / 3)
    low, high = 0.0, 1.0  # mode falls in u: find where it passes the share
    for _ in range(60):
        u = (low + high) / 2
        value = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        low, high = (u, high) if value > share else (low, u)
    return 1 - low


DRAWS = 3000
MANY = [draw_timesteps(rng([False] * DRAWS), 1000, kind).double() for kind in KINDS]


@pytest.mark.parametrize(("kind", "drawn"), list(zip(KINDS, MANY, strict=True)), ids=KINDS)
def test_timesteps_fall_as_the_formula_says(kind, drawn):
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    # Four standard errors of a share, on a fixed seed.
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = share_below(kind, share)
        error = 4 * math.sqrt(expected * (1 - expected) / DRAWS)
        assert (drawn < 1000 * share).double().mean().item() == pytest.approx(expected, abs=error)


def test_the_kinds_differ_where_they_should():
    uniform, logit_normal, mode, cubic = MANY
    assert logit_normal.std() < mode.std() < uniform.std()
    assert cubic.mean() > 700
    assert logit_normal.mean().item() == pytest.approx(500, abs=20)


def test_a_mean_leans_and_a_deviation_spreads():
    many = rng([False] * 500)
    middle = draw_timesteps(many, 1000, "logit_normal").double()
    noisy = draw_timesteps(many, 1000, "logit_normal", mean=1.0).double()
    narrow = draw_timesteps(many, 1000, "logit_normal", deviation=0.3).double()
    assert noisy.mean() > middle.mean() + 100
    assert narrow.std() < middle.std() / 2


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    timesteps=st.integers(1, 1000),
    edges=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_timesteps_stay_within_the_span(kind, timesteps, edges):
    low, high = sorted(edges)
    first, stop = round(timesteps * low), round(timesteps * high)
    if first >= stop:
        with pytest.raises(ValueError, match=f"at least one of {timesteps} timesteps"):
            draw_timesteps(rng([False]), timesteps, kind, span=(low, high))
        return
    drawn = draw_timesteps(rng([False] * 20), timesteps, kind, span=(low, high))
    assert drawn.min() >= first
    assert drawn.max() < stop


def test_every_timestep_of_a_span_can_come():
    drawn = draw_timesteps(rng([False] * 200), 20, span=(0.25, 0.5))
    assert set(drawn.tolist()) == {5, 6, 7, 8, 9}


@pytest.mark.parametrize("span", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.5), (0.5, 0.5)])
def test_a_span_that_is_none_is_refused(span):
    with pytest.raises(ValueError, match=f"got {span[0]} to {span[1]}"):
        draw_timesteps(rng([False]), 1000, span=span)


def test_a_deviation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        draw_timesteps(rng([False]), 1000, "logit_normal", deviation=0.0)
