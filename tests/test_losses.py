"""The objective: masks tell photos from class images, and each term is a mean over its own."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamloom.training.losses import (
    combine_errors,
    huber_deltas,
    image_errors,
    subject_weights,
    timestep_weights,
)


def dreambooth_loss(guess, target, is_prior, *, prior_weight=1.0, timestep_weights=None):
    """The loss of images of one shape, in one process."""
    errors = image_errors(guess, target)
    return combine_errors(errors, is_prior, prior_weight=prior_weight, weights=timestep_weights)


def min_snr_weights(snr, gamma, velocity=False):
    return timestep_weights("min_snr", snr, "velocity" if velocity else "noise", gamma=gamma)


def batch(size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    guess, target = (torch.randn(size, 4, 3, 5, generator=rng) for _ in range(2))
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


# ------------------------------------------------------------------ errors of images

KINDS = ("l2", "l1", "huber", "smooth_l1")


def slow_error(kind, error, delta):
    """The error of one number, as the docstring writes it."""
    root = math.sqrt(error**2 + delta**2)
    return {
        "l2": error**2,
        "l1": abs(error),
        "huber": 2 * delta * (root - delta),
        "smooth_l1": root - delta,
    }[kind]


@settings(max_examples=25)
@given(kind=st.sampled_from(KINDS), delta=st.floats(0.05, 3), seed=st.integers(0, 1000))
def test_errors_are_what_the_formulas_say(kind, delta, seed):
    guess, target = batch(3, seed)
    masks = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(seed))
    deltas = torch.tensor([delta, 2 * delta, 0.5])
    plain = image_errors(guess, target, kind, deltas=deltas)
    weighed = image_errors(guess, target, kind, deltas=deltas, place_weights=masks)
    assert plain.shape == weighed.shape == (3,)
    for image in range(3):
        total = weights = 0.0
        every = []
        for row in range(3):
            for column in range(5):
                errors = (guess - target)[image, :, row, column].tolist()
                counted = [slow_error(kind, error, deltas[image].item()) for error in errors]
                every += counted
                total += masks[image, row, column].item() * sum(counted) / len(counted)
                weights += masks[image, row, column].item()
        assert plain[image].item() == pytest.approx(sum(every) / len(every), rel=1e-4)
        assert weighed[image].item() == pytest.approx(total / weights, rel=1e-4)


def test_huber_is_squared_for_a_large_delta_and_smooth_l1_absolute_for_a_small_one():
    guess, target = batch(2)
    large, small = torch.full((2,), 1e4), torch.full((2,), 1e-6)
    squares, absolutes = image_errors(guess, target), image_errors(guess, target, "l1")
    huber = image_errors(guess, target, "huber", deltas=large)
    torch.testing.assert_close(huber, squares)
    smooth = image_errors(guess, target, "smooth_l1", deltas=small)
    torch.testing.assert_close(smooth, absolutes)


def test_one_odd_number_pulls_less_with_huber_than_with_squares():
    guess = torch.zeros(1, 1, 1, 2)
    guess[..., 0], guess[..., 1] = 10.0, 0.1
    guess.requires_grad_()

    def pull(kind):
        errors = image_errors(guess, torch.zeros(1, 1, 1, 2), kind, deltas=torch.tensor([0.1]))
        gradient = torch.autograd.grad(errors.sum(), guess)[0].flatten()
        return (gradient[0] / gradient[1]).item()

    assert pull("l2") == pytest.approx(100)
    assert pull("huber") < 2


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_an_exact_guess_has_no_error_and_a_finite_gradient(kind):
    guess = torch.zeros(1, 4, 2, 2, requires_grad=True)
    error = image_errors(guess, torch.zeros(1, 4, 2, 2), kind, deltas=torch.tensor([1e-3]))
    error.sum().backward()
    assert error.item() == 0
    assert guess.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_computed_in_full_precision(kind):
    guess = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    error = image_errors(guess, torch.zeros_like(guess), kind, deltas=torch.ones(1))
    assert error.dtype == torch.float32
    assert error.isfinite().all()


def test_huber_without_a_delta_is_refused():
    guess, target = batch(1)
    with pytest.raises(ValueError, match="huber needs a delta"):
        image_errors(guess, target, "huber")


# ------------------------------------------------------------------ masks


def test_the_area_of_a_mask_does_not_change_the_scale():
    """A small face must not learn more slowly than a large one."""
    ones = torch.ones(2, 4, 8, 8)
    masks = torch.zeros(2, 8, 8)
    masks[0, :1, :1] = 1
    masks[1, :6, :6] = 1
    for background in (0.0, 0.1, 1.0):
        weights = subject_weights(masks, background)
        errors = image_errors(3 * ones, ones, place_weights=weights)
        torch.testing.assert_close(errors, torch.tensor([4.0, 4.0]))


def test_a_background_of_nothing_learns_inside_the_mask_only():
    guess, target = batch(1)
    guess.requires_grad_()
    mask = torch.zeros(1, 3, 5)
    mask[0, 1, 2:4] = 1
    weights = subject_weights(mask, 0.0)
    gradient = torch.autograd.grad(image_errors(guess, target, place_weights=weights).sum(), guess)
    assert torch.equal(gradient[0].abs().sum(dim=1) > 0, mask > 0)


def test_a_background_of_one_undoes_the_mask():
    guess, target = batch(2)
    weights = subject_weights(torch.rand(2, 3, 5), 1.0)
    torch.testing.assert_close(
        image_errors(guess, target, place_weights=weights), image_errors(guess, target)
    )


def test_the_background_counts_what_was_asked():
    mask = torch.tensor([[[1.0, 0.5, 0.0]]])
    torch.testing.assert_close(subject_weights(mask, 0.2), torch.tensor([[[1.0, 0.6, 0.2]]]))
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        subject_weights(mask, 1.5)


def test_an_empty_mask_without_background_counts_as_none_at_all():
    guess, target = batch(2)
    weights = torch.zeros(2, 3, 5)
    weights[1, 0, 0] = 1
    errors = image_errors(guess, target, place_weights=weights)
    assert errors.isfinite().all()
    torch.testing.assert_close(errors[0], image_errors(guess, target)[0])


# ------------------------------------------------------------------ Huber's delta

SHARES = torch.linspace(0, 1, 11)
FALLING_SNR = torch.tensor([1e6, 100.0, 25.0, 10.0, 4.0, 1.0, 0.5, 0.1, 0.01, 1e-4, 0.0])


def test_deltas_fall_from_one_to_the_given():
    for schedule in ("exponential", "snr"):
        deltas = huber_deltas(schedule, 0.1, SHARES, FALLING_SNR)
        assert deltas[0].item() == pytest.approx(1, abs=2e-3)
        assert deltas[-1].item() == pytest.approx(0.1)
        assert (deltas.diff() < 0).all()
    assert (huber_deltas("constant", 0.1, SHARES, FALLING_SNR) == 0.1).all()


def test_delta_example_values():
    halfway = torch.tensor([0.5])
    assert huber_deltas("exponential", 0.01, halfway, halfway).item() == pytest.approx(0.1)
    # σ = 1: (1 − 0.2) / 4 + 0.2
    assert huber_deltas("snr", 0.2, halfway, torch.ones(1)).item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("schedule", "delta"), [("constant", 0.0), ("exponential", 1.5), ("snr", -1.0), ("snr", 2.0)]
)
def test_a_delta_out_of_range_is_refused(schedule, delta):
    with pytest.raises(ValueError, match=f"got {delta}"):
        huber_deltas(schedule, delta, SHARES, FALLING_SNR)


# ------------------------------------------------------------------ weights of timesteps

SCHEMES = ("min_snr", "soft_min_snr", "debiased", "p2")
PREDICTIONS = ("noise", "velocity", "flow", "picture")


@given(scheme=st.sampled_from(SCHEMES), ratio=st.floats(2e-3, 1e4), seed=st.integers(0, 100))
def test_a_scheme_means_the_same_for_every_prediction(scheme, ratio, seed):
    """One and the same wrong guess weighs the same, whatever the model was trained to tell."""
    rng = torch.Generator().manual_seed(seed)
    picture, noise, guess = torch.randn(3, 1, 2, 4, 4, generator=rng, dtype=torch.float64)
    signal, sigma = math.sqrt(ratio / (ratio + 1)), math.sqrt(1 / (ratio + 1))
    noisy = signal * picture + sigma * noise
    # On straight lines the same ratio is that of 1 − t to t.
    time = 1 / (1 + math.sqrt(ratio))
    on_line = (1 - time) * picture + time * noise

    def answers(x):
        e = (noisy - signal * x) / sigma
        return {
            "noise": e,
            "velocity": signal * e - sigma * x,
            "flow": (on_line - (1 - time) * x) / time - x,
            "picture": x,
        }

    right, wrong = answers(picture), answers(guess)
    weighed = [
        (wrong[kind] - right[kind]).square().mean().item()
        * timestep_weights(scheme, torch.tensor([ratio]), kind).item()
        for kind in PREDICTIONS
    ]
    assert weighed == pytest.approx([weighed[0]] * 4, rel=1e-3)


def test_weights_of_noise_are_the_papers():
    roots = RATIOS.sqrt()
    expected = {
        "none": torch.ones(5),
        "soft_min_snr": 5 / (RATIOS + 5),
        "p2": 1 / (1 + RATIOS),
        "min_snr": torch.tensor([1.0, 1.0, 1.0, 0.5, 5e-4]),
    }
    for scheme, weights in expected.items():
        torch.testing.assert_close(timestep_weights(scheme, RATIOS), weights)
    torch.testing.assert_close(timestep_weights("debiased", RATIOS)[1:], 1 / roots[1:])
    half = timestep_weights("p2", RATIOS, p2_k=2.0, p2_gamma=0.5)
    torch.testing.assert_close(half, (2 + RATIOS) ** -0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_finite_down_to_a_ratio_of_nothing(scheme, prediction):
    """As the last timestep has after a rescaling to zero terminal SNR."""
    weights = timestep_weights(scheme, torch.tensor([0.0, 1e-30, 1e-4, 1.0, 1e8]), prediction)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights[0] > 0) == (prediction == "noise")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_none_weighs_alike_and_so_do_the_clips_for_noise_when_they_clip_nothing(prediction):
    assert torch.equal(timestep_weights("none", RATIOS, prediction), torch.ones(5))
    for scheme in ("min_snr", "soft_min_snr"):
        unclipped = timestep_weights(scheme, RATIOS, "noise", gamma=1e9)
        torch.testing.assert_close(unclipped, torch.ones(5), rtol=1e-4, atol=0)
        # Whatever else is predicted then weighs as the noise does: its error times the conversion.
        converted = timestep_weights(scheme, RATIOS, prediction, gamma=1e9)
        torch.testing.assert_close(
            converted, timestep_weights("p2", RATIOS, prediction, p2_gamma=0.0), rtol=1e-4, atol=0
        )


@given(st.floats(1e-4, 1e4), st.floats(1e-2, 1e2))
def test_the_soft_clip_is_below_the_hard_one_and_at_least_half_of_it(ratio, gamma):
    snr = torch.tensor([ratio])
    hard = timestep_weights("min_snr", snr, gamma=gamma).item()
    soft = timestep_weights("soft_min_snr", snr, gamma=gamma).item()
    assert hard / 2 * (1 - 1e-5) <= soft <= hard * (1 + 1e-5)


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"p2_k": 0.0}, {"p2_gamma": -1.0}])
def test_weights_refuse_what_makes_no_sense(options):
    with pytest.raises(ValueError, match="must be"):
        timestep_weights("p2", RATIOS, **options)


# ------------------------------------------------------------------ shares of an update


@settings(max_examples=25)
@given(
    kinds=st.lists(st.booleans(), min_size=1, max_size=8).filter(lambda kinds: not all(kinds)),
    processes=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_shares_of_processes_add_up_to_the_whole(kinds, processes, seed):
    """Also where a process holds photos only, class images only, or none of either."""
    guess, target = batch(len(kinds), seed)
    guess.requires_grad_()
    is_prior = torch.tensor(kinds)
    rng = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(kinds), generator=rng)
    holder = torch.randint(processes, (len(kinds),), generator=rng)
    counts = {"photos_in_all": kinds.count(False), "priors_in_all": kinds.count(True)}

    def loss(rows, **counted):
        errors = image_errors(guess[rows], target[rows])
        return combine_errors(
            errors, is_prior[rows], prior_weight=0.7, weights=weights[rows], **counted
        )

    whole = loss(torch.arange(len(kinds)))
    parts = [loss((holder == process).nonzero()[:, 0], **counts) for process in range(processes)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    torch.testing.assert_close(sum(part.subject for part in parts), whole.subject)
    assert all((part.prior is None) == (whole.prior is None) for part in parts)
    expected = torch.autograd.grad(whole.total, guess, retain_graph=True)[0]
    found = sum(torch.autograd.grad(part.total, guess, retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(found, expected)


def test_a_mean_of_each_process_is_not_the_mean_of_all():
    """The known fault that counts prevent: three photos on one process and one on the other."""
    errors = torch.tensor([1.0, 1.0, 1.0, 5.0])
    none = torch.tensor([False] * 4)
    whole = combine_errors(errors, none).total
    halves = [
        combine_errors(errors[:3], none[:3]).total,
        combine_errors(errors[3:], none[3:]).total,
    ]
    assert sum(halves) / 2 != whole == 2.0


def test_counts_that_cannot_be_are_refused():
    errors, is_prior = torch.ones(2), torch.tensor([False, True])
    with pytest.raises(ValueError, match="0 photos and 1 class images, but 1 and 1 are given"):
        combine_errors(errors, is_prior, photos_in_all=0)
    with pytest.raises(ValueError, match="class images only"):
        combine_errors(errors[1:], is_prior[1:], photos_in_all=0)
