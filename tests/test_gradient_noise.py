"""The noise of gradients: on gradients whose noise is known, and in a training that it leaves."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dreamloom.core.device import seed_for
from dreamloom.core.events import Event, GradientNoiseMeasured, Progress
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.training.gradient_noise import (
    GradientNoise,
    NoiseEstimate,
    RunningMean,
    estimate_noise,
    running_mean_size,
)
from dreamloom.training.step import share_update
from dreamloom.training.train import train_adapter
from studio_set import claimed, compute_loss, make_lesson, small_config

ENTRIES = 4000


class Made:
    """Gradients as a training gathers them, in two tensors."""

    def __init__(self, loss_scale: float = 1.0) -> None:
        self.loss_scale = loss_scale
        self.total = torch.zeros(ENTRIES, dtype=torch.float64)

    def gradients(self) -> list[Tensor]:
        return [self.loss_scale * one for one in self.total.split([1000, ENTRIES - 1000])]


def follow(
    noise: GradientNoise,
    signal: float,
    spread: float,
    updates: int,
    loss_scale: float = 1.0,
    drift: float = 0.0,
) -> NoiseEstimate:
    """Feed gradients of |G|² = ``signal`` whose batches have noise of S = ``spread``."""
    rng = torch.Generator().manual_seed(1)
    true = torch.randn(ENTRIES, generator=rng, dtype=torch.float64)
    true *= signal**0.5 / true.norm()
    turn = torch.randn(ENTRIES, generator=rng, dtype=torch.float64)
    estimate = None
    for update in range(updates):
        if drift:
            true = true + drift * signal**0.5 * turn / ENTRIES**0.5 * (-1) ** (update // 5)
            true *= signal**0.5 / true.norm()
        made = Made(loss_scale)
        for number in range(noise.batches):
            own = torch.randn(ENTRIES, generator=rng, dtype=torch.float64)
            made.total += (true + own * (spread / ENTRIES) ** 0.5) / noise.batches
            noise.add_batch(made, more=number + 1 < noise.batches)
        square = noise.finish_update(made)
        assert square is not None
        found = noise.read(float(made.total.norm()), float(square))
        estimate = found or estimate
    assert estimate is not None
    return estimate


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.5, 10.0])
def test_a_known_noise_is_found(batches: int, spread: float) -> None:
    found = follow(GradientNoise(batches), 2.0, spread, 200)
    assert found.signal == pytest.approx(2.0, rel=0.1)
    assert found.noise == pytest.approx(spread, rel=0.05)
    assert found.noise_scale == pytest.approx(spread / 2.0, rel=0.12)
    ratio = found.signal_to_noise(batches)
    assert ratio == pytest.approx(2.0 * batches / spread, rel=0.12)


def test_a_gradient_that_turns_seems_noisier_to_successive_updates_alone() -> None:
    one, several = (follow(GradientNoise(batches), 2.0, 1.0, 100, drift=0.5) for batches in (1, 4))
    assert several.noise == pytest.approx(1.0, rel=0.05)
    assert one.noise > 1.2
    assert one.signal < 1.8


def test_gradients_without_noise_have_none() -> None:
    for batches in (1, 3):
        found = follow(GradientNoise(batches), 2.0, 0.0, 5)
        assert found.signal == pytest.approx(2.0)
        assert found.noise == pytest.approx(0.0, abs=1e-12)
        assert found.noise_scale == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("batches", [1, 3])
def test_the_loss_scale_of_fp16_changes_nothing(batches: int) -> None:
    plain = follow(GradientNoise(batches), 1.0, 3.0, 10)
    scaled = follow(GradientNoise(batches), 1.0, 3.0, 10, loss_scale=65536.0)
    assert scaled.signal == pytest.approx(plain.signal)
    assert scaled.noise == pytest.approx(plain.noise)


@pytest.mark.parametrize("batches", [1, 2])
def test_an_overflow_leaves_no_trace(batches: int) -> None:
    noise, made = GradientNoise(batches), Made(65536.0)
    before = follow(noise, 1.0, 3.0, 10, loss_scale=65536.0)
    made.total[0] = torch.inf
    for number in range(batches):
        noise.add_batch(made, more=number + 1 < batches)
    square = noise.finish_update(made)
    assert square is not None
    assert noise.read(float("inf"), float(square)) == before
    after = follow(noise, 1.0, 3.0, 10, loss_scale=65536.0)
    assert after.noise == pytest.approx(3.0, rel=0.1)


def test_gradients_are_read_and_not_changed() -> None:
    made, noise = Made(), GradientNoise(2)
    made.total += 1
    for more in (True, False):
        noise.add_batch(made, more)
    GradientNoise(1).finish_update(made)
    assert torch.equal(made.total, torch.ones(ENTRIES, dtype=torch.float64))


def test_what_nobody_wants_is_not_computed() -> None:
    noise = GradientNoise(2, wanted=False)
    noise.add_batch(Made(), more=False)
    assert noise.finish_update(Made()) is None
    assert noise.read(1.0, None) is None
    assert noise.sums == []


# ------------------------------------------------------------------ the formulas


@given(st.floats(0.01, 9), st.floats(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_expected_norms_give_signal_and_noise_exactly(
    signal: float, noise: float, small: int, more: int
) -> None:
    large = small + more
    found = estimate_noise(signal + noise / small, signal + noise / large, small, large)
    assert found.signal == pytest.approx(signal, abs=1e-9)
    assert found.noise == pytest.approx(noise, abs=1e-9)


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_a_running_mean_is_as_long_as_its_weights_say(decay: float, count: int) -> None:
    weights = [(1 - decay) * decay**age / (1 - decay**count) for age in range(count)]
    assert sum(weights) == pytest.approx(1)
    size = 1 / sum(weight**2 for weight in weights)
    assert running_mean_size(decay, count) == pytest.approx(size)
    mean, values = RunningMean(decay), [random.Random(one).random() for one in range(count)]
    for value in values:
        last = mean.add(value)
    weighed = sum(w * v for w, v in zip(weights, reversed(values), strict=True))
    assert last == pytest.approx(weighed)


def test_where_nothing_can_be_told_nothing_is() -> None:
    assert NoiseEstimate(-0.1, 2.0).noise_scale is None
    assert NoiseEstimate(-0.1, 2.0).signal_to_noise(4) == 0
    assert NoiseEstimate(1.0, -0.1).signal_to_noise(4) is None
    assert NoiseEstimate(1.0, -0.1).noise_scale == 0
    with pytest.raises(ValueError, match="rising and above 0, not 2 and 2"):
        estimate_noise(1.0, 1.0, 2, 2)


# ------------------------------------------------------------------ in a training


@pytest.mark.parametrize(
    ("batches", "optimizer"),
    [(1, "adamw"), pytest.param(2, "adafactor", marks=pytest.mark.slow)],
)
def test_training_is_the_same_to_the_bit_and_tells_its_noise(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path, batches: int, optimizer: str
) -> None:
    weights, told = [], list[Event]()
    for name in (False, True):
        config = small_config(
            model,
            train__steps=2,
            train__batch_photos=1,
            train__batch_priors=1,
            train__gradient_accumulation_steps=batches,
            train__optimizer=optimizer,
            train__log_gradient_noise=name,
        )
        told.clear()
        run = claimed(tmp_path / str(name))
        observe = run.observer()

        def both(event: Event, observe: object = observe) -> None:
            told.append(event)
            observe(event)  # type: ignore[operator]

        record = train_adapter(run, model, *sets, config, both)
        weights.append(load_file(run.adapter))
        assert ("gradient_noise" in record.results) == name
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())
    measured = [event for event in told if isinstance(event, GradientNoiseMeasured)]
    # One gradient alone says nothing of its noise.
    assert [one.update for one in measured] == ([2] if batches == 1 else [1, 2])
    assert record.results["gradient_noise"] == {
        "signal_to_noise": measured[-1].signal_to_noise,
        "noise_scale_photos": measured[-1].noise_scale,
    }
    lines = [json.loads(line) for line in run.events_file.read_text().splitlines()]
    assert sum(line["event"] == "GradientNoiseMeasured" for line in lines) == len(measured)
    progress = [e for e in told if isinstance(e, Progress) and e.task == "teaching"]
    shown = measured[-1].signal_to_noise is not None
    assert ("SNR" in progress[-1].values) == shown


def test_the_first_estimate_is_that_of_gradients_computed_apart(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    """Each batch's gradient on its own, and their mean, by the paper's formula."""
    config = small_config(
        model,
        train__steps=1,
        train__gradient_accumulation_steps=3,
        train__log_gradient_noise=True,
    )
    told: list[Event] = []
    train_adapter(claimed(tmp_path), model, *sets, config, told.append)
    ours = next(event for event in told if isinstance(event, GradientNoiseMeasured))
    batches = make_lesson(model, *sets, config)
    spec = AdapterSpec(2, 2.0, "attention", seed_for(config.seed, "adapter"))
    own = []
    try:
        weights = [p for group in model.attach_adapter(spec) for p in group.parameters]
        for index in range(3):
            share = share_update(config, batches, 3, index)
            loss = compute_loss(model, batches, 0, config, share).total * 3
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            own.append(torch.cat([one.flatten() for one in found if one is not None]))
    finally:
        model.detach_adapter()
    small = sum(float(one.square().sum()) for one in own) / 3
    large = float(torch.stack(own).mean(dim=0).square().sum())
    noise = (small - large) / (1 - 1 / 3)
    signal = (3 * large - small) / 2
    expected = max(signal, 0) / (noise / 3)
    assert ours.signal_to_noise == pytest.approx(expected, rel=1e-3)
    if signal > 0:
        assert ours.noise_scale == pytest.approx(2 * noise / signal, rel=1e-3)
