"""The objective: masks tell photos from class images, and each term is a mean over its own."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.objective import dreambooth_loss, min_snr_weights


def batch(size, seed=0):
    dice = torch.Generator().manual_seed(seed)
    guess, target = (torch.randn(size, 4, 3, 5, generator=dice) for _ in range(2))
    return guess, target


def slow_loss(guess, target, is_prior, prior_weight, weights):
    """The formula with loops, as the paper writes it: a mean per kind, then their sum."""
    errors = {True: [], False: []}
    for number in range(len(guess)):
        pairs = zip(guess[number].flatten(), target[number].flatten(), strict=True)
        squares = [(one - other) ** 2 for one, other in pairs]
        errors[bool(is_prior[number])].append(weights[number] * sum(squares) / len(squares))
    means = {kind: sum(found) / len(found) for kind, found in errors.items() if found}
    return float(means[False] + prior_weight * means.get(True, 0.0))


def test_example_values():
    guess = torch.stack([torch.full((4, 8, 8), value) for value in (1.0, 3.0, 2.0)])
    loss = dreambooth_loss(
        guess, torch.zeros(3, 4, 8, 8), torch.tensor([False, False, True]), prior_weight=0.5
    )
    assert loss.subject == 5.0  # (1 + 9) / 2
    assert loss.prior == 4.0
    assert loss.total == 7.0


@settings(max_examples=25)
@given(
    kinds=st.lists(st.booleans(), min_size=1, max_size=5).filter(lambda kinds: not all(kinds)),
    prior_weight=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_it_is_the_sum_of_two_means_in_any_order(kinds, prior_weight, seed):
    guess, target = batch(len(kinds), seed)
    is_prior = torch.tensor(kinds)
    weights = torch.rand(len(kinds), generator=torch.Generator().manual_seed(seed))

    def loss(order):
        return dreambooth_loss(
            guess[order],
            target[order],
            is_prior[order],
            prior_weight=prior_weight,
            timestep_weights=weights[order],
        )

    found = loss(torch.arange(len(kinds)))
    expected = slow_loss(guess, target, is_prior, prior_weight, weights)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    shuffled = loss(torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)))
    assert float(shuffled.total) == pytest.approx(float(found.total), rel=1e-6)
    assert (found.prior is None) == (not any(kinds))


def test_the_share_of_class_images_does_not_change_the_balance():
    guess, target = batch(3)
    few = dreambooth_loss(guess, target, torch.tensor([False, True, True]))
    twice = [0, 1, 1, 2, 2]
    many = dreambooth_loss(
        guess[twice], target[twice], torch.tensor([False, True, True, True, True])
    )
    assert many.total == pytest.approx(few.total.item())


def test_a_batch_of_photos_alone_has_no_class_term():
    guess, target = batch(2)
    loss = dreambooth_loss(guess, target, torch.tensor([False, False]), prior_weight=100.0)
    assert loss.prior is None
    assert loss.total == loss.subject == (guess - target).square().mean()


def test_without_weight_the_gradient_is_that_of_the_subject():
    guess, target = batch(4)
    is_prior = torch.tensor([True, False, True, False])

    def gradient(part, **options):
        leaf = guess.clone().requires_grad_()
        getattr(dreambooth_loss(leaf, target, is_prior, **options), part).backward()
        return leaf.grad

    without = gradient("total", prior_weight=0.0)
    assert torch.equal(without, gradient("subject"))
    assert not without[is_prior].any()
    assert without[~is_prior].all()
    assert gradient("total", prior_weight=2.0)[is_prior].all()


def test_half_precision_is_compared_in_full():
    # 300² is beyond float16, whose largest number is 65504.
    guess = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    loss = dreambooth_loss(guess, torch.zeros_like(guess), torch.tensor([False]))
    assert loss.total.dtype == torch.float32
    assert loss.total == 90_000.0


@pytest.mark.parametrize("length", [1, 2, 5])
def test_weights_of_another_length_are_an_error(length):
    """One of the known faults: weights made for half of the batch, stretched over all of it."""
    guess, target = batch(4)
    with pytest.raises(jaxtyping.TypeCheckError):
        dreambooth_loss(
            guess, target, torch.tensor([False, True] * 2), timestep_weights=torch.ones(length)
        )


@pytest.mark.parametrize("mask", [torch.tensor([False]), torch.tensor([0, 1, 1, 0])])
def test_a_mask_of_another_length_or_kind_is_an_error(mask):
    guess, target = batch(4)
    with pytest.raises(jaxtyping.TypeCheckError):
        dreambooth_loss(guess, target, mask)


def test_a_target_of_another_shape_is_an_error():
    guess, target = batch(2)
    with pytest.raises(jaxtyping.TypeCheckError):
        dreambooth_loss(guess, target[:1], torch.tensor([False, True]))


def test_what_cannot_be_learned_from_is_refused():
    guess, target = batch(2)
    with pytest.raises(ValueError, match="class images only"):
        dreambooth_loss(guess, target, torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"0 or more, got -0\.1"):
        dreambooth_loss(guess, target, torch.tensor([False, True]), prior_weight=-0.1)


# ------------------------------------------------------------------ min-SNR

RATIOS = torch.tensor([1e-4, 0.5, 5.0, 10.0, 1e4])


def test_min_snr_example_values():
    noise = torch.tensor([1.0, 1.0, 1.0, 0.5, 5e-4])
    velocity = torch.tensor([1e-4 / 1.0001, 1 / 3, 5 / 6, 5 / 11, 5 / 10_001])
    torch.testing.assert_close(min_snr_weights(RATIOS, 5.0), noise)
    torch.testing.assert_close(min_snr_weights(RATIOS, 5.0, velocity=True), velocity)


def test_min_snr_in_the_limits_of_gamma():
    # Without a clip noise is weighed alike; with a hard one, as 1 / SNR.
    assert torch.equal(min_snr_weights(RATIOS, 1e9), torch.ones(5))
    torch.testing.assert_close(min_snr_weights(RATIOS, 1e-6), 1e-6 / RATIOS)


@given(st.floats(1e-4, 1e4), st.floats(1e-2, 1e2))
def test_min_snr_weighs_the_prediction_of_the_clean_picture_by_the_clipped_ratio(ratio, gamma):
    """Eq. in section 3.4: whatever is predicted, the picture's error weighs min(SNR, gamma)."""
    snr = torch.tensor([ratio])
    clipped = min(ratio, gamma)
    # An error e of the picture is an error e √SNR of the noise, and e √(SNR + 1) of the velocity.
    assert min_snr_weights(snr, gamma).item() * ratio == pytest.approx(clipped, rel=1e-4)
    velocity = min_snr_weights(snr, gamma, velocity=True).item()
    assert velocity * (ratio + 1) == pytest.approx(clipped, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, -5.0])
def test_min_snr_refuses_a_clip_that_weighs_nothing(gamma):
    with pytest.raises(ValueError, match="above 0"):
        min_snr_weights(RATIOS, gamma)
