"""Optimizers: every name learns, every group has its rate, every average comes off again."""

import builtins
import importlib
import importlib.util
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from dreamloom.core.errors import ConfigError
from dreamloom.training.ema import EmaWeights, weights_to_use
from dreamloom.training.lr_scheduler import rate_factor, set_rates
from dreamloom.training.optimizers import (
    AVERAGING_OPTIMIZERS,
    ONE_RATE_OPTIMIZERS,
    OPTIMIZERS,
    doubt_rates,
    group_weights,
    make_optimizer,
    usable_optimizer,
    usual_rate,
)

CPU = torch.device("cpu")
LIBRARY = {"adamw": "torch", "adamw8bit": "bitsandbytes"}


def needs(name):
    library = LIBRARY.get(name, "pytorch_optimizer")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}, of the extra 'optimizers'")


def weights(*shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def groups_of(name, *shapes, role="down"):
    return group_weights([(role, weights(*shapes))], usual_rate(name, 0.02))


# ------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_an_adapter(name):
    """A low-rank layer whose up factor begins at 0, as a LoRA does, with subnormals off."""
    needs(name)
    torch.set_flush_denormal(True)
    rng = torch.Generator().manual_seed(0)
    down = Parameter(torch.randn(4, 16, generator=rng) / 4)
    up, magnitude = Parameter(torch.zeros(16, 4)), Parameter(torch.ones(16))
    wanted = torch.randn(16, 2, generator=rng) @ torch.randn(2, 16, generator=rng) / 4

    def loss():
        return ((up @ down) * magnitude[:, None] - wanted).square().mean()

    rate = usual_rate(name, 0.02)
    taught = group_weights([("down", [down]), ("up", [up]), ("other", [magnitude])], rate)
    optimizer = make_optimizer(name, taught, weight_decay=0.0)
    first = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with weights_to_use(optimizer):
        assert loss().item() < 0.5 * first


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_follows_the_rate_it_is_given(name):
    needs(name)

    def moved(factor):
        taught = groups_of(name, (4, 6))
        optimizer = make_optimizer(name, taught, weight_decay=0.0)
        (weight,) = taught[0]["params"]
        before = weight.detach().clone()
        set_rates(optimizer, factor)
        weight.grad = torch.ones_like(weight) + 0.1 * before
        optimizer.step()
        return (weight.detach() - before).abs().mean().item()

    assert moved(0.5) == pytest.approx(0.5 * moved(1.0), rel=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_the_weights(name):
    needs(name)

    def norm_after(decay):
        taught = groups_of(name, (4, 6))
        (weight,) = taught[0]["params"]
        optimizer = make_optimizer(name, taught, weight_decay=decay)
        for _ in range(5):
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
        return weight.norm().item()

    assert norm_after(0.5) < norm_after(0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_keep_their_roles_and_full_rates(name):
    needs(name)
    by_role = [("down", weights((2, 8))), ("up", weights((8, 2))), ("tokens", weights((1, 4)))]
    ratio = 1.0 if name in ONE_RATE_OPTIMIZERS else 4.0
    optimizer = make_optimizer(name, group_weights(by_role, 0.1, loraplus_lr_ratio=ratio), 0.0)
    rates = {group["role"]: group["full_rate"] for group in optimizer.param_groups}
    assert rates == {"down": 0.1, "up": 0.1 * ratio, "tokens": 0.1}
    set_rates(optimizer, 0.5)
    assert all(group["lr"] == group["full_rate"] / 2 for group in optimizer.param_groups)


def test_adamw_is_torchs_own():
    ours, torchs = weights((3, 4)), weights((3, 4))
    mine = make_optimizer("adamw", group_weights([("down", ours)], 0.01), weight_decay=0.1)
    plain = torch.optim.AdamW(torchs, lr=0.01, weight_decay=0.1)
    for update in range(3):
        for weight in (*ours, *torchs):
            rng = torch.Generator().manual_seed(update)
            weight.grad = torch.randn(3, 4, generator=rng)
        mine.step()
        plain.step()
    # Its one kernel rounds otherwise than the plain one.
    torch.testing.assert_close(ours[0], torchs[0], rtol=1e-6, atol=1e-7)


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw():
    needs("muon")
    by_role = [
        ("down", weights((2, 8), (2, 3, 3, 3))),
        ("up", weights((8, 2))),
        ("other", weights((4, 4), (5,))),
        ("tokens", weights((1, 6))),
    ]
    optimizer = make_optimizer("muon", group_weights(by_role, 0.1), 0.01)
    taken = {
        (group["role"], tuple(weight.shape)): group["use_muon"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert taken == {
        ("down", (2, 8)): True,
        ("down", (2, 3, 3, 3)): True,
        ("up", (8, 2)): True,
        ("other", (4, 4)): False,
        ("other", (5,)): False,
        ("tokens", (1, 6)): False,
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


def test_a_step_of_muon_is_about_as_long_as_one_of_adamw():
    """So that one learning rate does for both."""
    needs("muon")
    rng = torch.Generator().manual_seed(1)
    gradient = torch.randn(64, 256, generator=rng)

    def step(name):
        taught = groups_of(name, (64, 256))
        (weight,) = taught[0]["params"]
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        make_optimizer(name, taught, 0.0).step()
        return (weight.detach() - before).square().mean().sqrt().item()

    assert 0.1 < step("muon") / step("adamw") < 1


def test_options_reach_the_optimizer_and_unknown_ones_are_told():
    needs("lion")
    optimizer = make_optimizer("lion", groups_of("lion", (2, 2)), 0.0, {"betas": [0.95, 0.98]})
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.98)
    with pytest.raises(ConfigError) as caught:
        make_optimizer("lion", groups_of("lion", (2, 2)), 0.0, {"beta": (0.9, 0.9)})
    assert caught.value.problem == "The optimizer lion has no option 'beta'."
    assert "betas" in caught.value.hint


@pytest.mark.parametrize("call", [usable_optimizer, usual_rate])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("adamW", "adamw"), ("prodigi", "prodigy"), ("schedulefree", "schedule_free")],
)
def test_an_unknown_name_is_told_with_the_nearest_one(call, name, meant):
    with pytest.raises(ConfigError) as caught:
        call(name, CPU if call is usable_optimizer else 1.0)
    assert caught.value.problem == f"There is no optimizer '{name}'."
    assert caught.value.hint.startswith(f"Did you mean {meant}? Choose one of: adamw, adamw8bit,")


def test_a_name_like_no_other_is_told_with_the_list():
    with pytest.raises(ConfigError) as caught:
        make_optimizer("zzz", groups_of("adamw", (2, 2)), 0.0)
    assert caught.value.hint.startswith("Choose one of: adamw,")


def test_one_rate_for_all_is_demanded_where_the_optimizer_finds_it():
    by_role = [("down", weights((2, 2))), ("up", weights((2, 2)))]
    for name in ONE_RATE_OPTIMIZERS:
        with pytest.raises(ConfigError) as caught:
            make_optimizer(name, group_weights(by_role, 1.0, loraplus_lr_ratio=16.0), 0.0)
        assert "given several: down 1, up 16" in caught.value.problem
        assert "adapter.loraplus_lr_ratio at 1" in caught.value.hint


def hide(monkeypatch, library):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real(name, *args, **kwargs)

    for loaded in list(sys.modules):
        if loaded.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(importlib, "import_module", missing)


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    hide(monkeypatch, "pytorch_optimizer")
    with pytest.raises(ConfigError) as caught:
        make_optimizer("came", groups_of("came", (2, 2)), 0.0)
    assert "came needs the library pytorch-optimizer" in caught.value.problem
    assert 'pip install "dreamloom[optimizers]"' in caught.value.hint
    assert usable_optimizer("came", CPU) == ("came", "")  # never another one in its place


def test_8_bit_states_give_way_to_adamw_where_they_are_missing(monkeypatch):
    hide(monkeypatch, "bitsandbytes")
    name, note = usable_optimizer("adamw8bit", CPU)
    assert name == "adamw"
    assert note == (
        "trains with adamw instead of adamw8bit: the library bitsandbytes cannot be imported"
    )
    with pytest.raises(ConfigError) as caught:
        make_optimizer("adamw8bit", groups_of("adamw8bit", (2, 2)), 0.0)
    assert "adamw8bit does not work here" in caught.value.problem
    assert "Use adamw" in caught.value.hint


class _Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no kernel for this device")


class _Idle(torch.optim.SGD):
    def step(self, closure=None):
        return None


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (_Broken, r"fails on cpu \(RuntimeError: no kernel for this device\)"),
        (_Idle, "does nothing on cpu"),
        (torch.optim.SGD, ""),
    ],
)
def test_8_bit_states_are_tried_before_they_are_trusted(monkeypatch, made, reason):
    stand_in = types.SimpleNamespace(AdamW8bit=made)
    monkeypatch.setattr(importlib, "import_module", lambda name: stand_in)
    name, note = usable_optimizer("adamw8bit", CPU)
    assert name == ("adamw" if reason else "adamw8bit")
    assert reason.replace("\\", "") in note


def test_rates_for_other_optimizers():
    assert usual_rate("adamw", 1e-4) == usual_rate("muon", 1e-4) == 1e-4
    assert usual_rate("came", 1e-4) == pytest.approx(2.5e-5)
    assert usual_rate("prodigy", 1e-4) == 1.0
    assert usual_rate("lion", 1e-4) == pytest.approx(2e-5)


# ------------------------------------------------------------------ groups


def test_each_role_has_its_rate():
    roles = ("down", "up", "other", "text down", "text up", "text other", "tokens")
    made = {role: weights((2, 2)) for role in roles}
    groups = group_weights(made.items(), 1.0, text_rate=0.1, token_rate=5.0, loraplus_lr_ratio=16.0)
    assert {group["role"]: group["lr"] for group in groups} == {
        "down": 1.0,
        "up": 16.0,
        "other": 1.0,
        "text down": 0.1,
        "text up": pytest.approx(1.6),
        "text other": 0.1,
        "tokens": 5.0,
    }
    assert all(group["params"] == made[group["role"]] for group in groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_single_weights_have_rates_of_their_own_within_their_role(name):
    """Every weight goes as far as it would with its rate for all."""
    needs(name)
    full = usual_rate(name, 0.02)

    def learn_at(rate, own=None, ratio=1.0):
        made = weights((4, 6), (4, 6), (6, 4), (6, 4), (5,))
        by_role = [("down", made[:2]), ("up", made[2:4]), ("other", made[4:])]
        own_rates = {made[number]: rate for number, rate in (own or {}).items()}
        groups = group_weights(by_role, rate, own_rates=own_rates, loraplus_lr_ratio=ratio)
        optimizer = make_optimizer(name, groups, weight_decay=0.01)
        for update in range(3):
            set_rates(optimizer, rate_factor(update, "linear", 1, 3))
            for number, weight in enumerate(made):
                rng = torch.Generator().manual_seed(10 * update + number)
                weight.grad = torch.randn(weight.shape, generator=rng)
            optimizer.step()
        return made

    own = {1: full / 4, 2: full / 4, 4: full / 2}
    if name in ONE_RATE_OPTIMIZERS:
        with pytest.raises(ConfigError, match=f"given several: down {full:g}, down {full / 4:g}"):
            learn_at(full, own)
        return
    mixed = learn_at(full, own, ratio=2.0)
    # The up factors' rates are those of all, or their own, times the ratio.
    rates = [full, full / 4, full / 4 * 2, full * 2, full / 2]
    for number, rate in enumerate(rates):
        torch.testing.assert_close(mixed[number], learn_at(rate)[number], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[1], learn_at(full)[1], rtol=1e-5, atol=1e-6)


def test_own_rates_that_are_those_of_the_role_make_no_further_group():
    """So that earlier checkpoints fit."""
    made = weights((2, 2), (2, 2))
    groups = group_weights([("down", made)], 0.5, own_rates={made[0]: 0.5})
    assert [group["params"] for group in groups] == [made]


def test_one_role_is_one_group_and_an_empty_role_none():
    first, second = weights((2, 2)), weights((3, 3))
    groups = group_weights([("down", first), ("up", []), ("down", second)], 1.0)
    assert [group["role"] for group in groups] == ["down"]
    assert groups[0]["params"] == first + second


def test_without_other_rates_all_learn_alike():
    by_role = [("down", weights((2, 2))), ("text up", weights((2, 2))), ("tokens", weights((1, 2)))]
    assert {group["lr"] for group in group_weights(by_role, 0.3)} == {0.3}


@pytest.mark.parametrize(
    "options",
    [
        {"loraplus_lr_ratio": 0.0},
        {"text_rate": -1.0},
        {"own_rates": {Parameter(torch.zeros(1)): -1.0}},
    ],
)
def test_rates_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        group_weights([("down", weights((2, 2)))], 1.0, **options)


# ------------------------------------------------------------------ schedules

SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "polynomial")


@given(schedule=st.sampled_from(SCHEDULES), warmup=st.integers(0, 30), updates=st.integers(1, 100))
def test_rates_are_above_nothing_and_at_most_full(schedule, warmup, updates):
    factors = [rate_factor(update, schedule, warmup, updates) for update in range(updates)]
    assert all(0 < factor <= 1 for factor in factors)
    rising = factors[: min(warmup, updates)]
    assert rising == [pytest.approx((update + 1) / warmup) for update in range(len(rising))]
    assert factors[warmup : warmup + 1] in ([], [1.0])
    if schedule != "cosine_restarts":
        assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_rates_halfway():
    def at(schedule, update=60, **options):
        return rate_factor(update, schedule, 20, 100, **options)

    assert at("constant") == 1.0
    assert at("linear") == pytest.approx(0.5)
    assert at("cosine") == pytest.approx(0.5)
    assert at("polynomial") == pytest.approx(0.25)
    assert at("polynomial", power=3.0) == pytest.approx(0.125)
    # Two falls over the 80 updates after the warm-up: the second begins halfway.
    assert at("cosine_restarts", 59, cycles=2) == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 39 / 40))
    )
    assert at("cosine_restarts", 60, cycles=2) == 1.0


@given(cycles=st.integers(1, 120), warmup=st.integers(0, 5), length=st.integers(1, 120))
def test_every_fall_with_restarts_begins_at_the_full_rate(cycles, warmup, length):
    factors = [
        rate_factor(warmup + n, "cosine_restarts", warmup, warmup + length, cycles=cycles)
        for n in range(length)
    ]
    assert [factors[n] for n in range(length) if n * cycles % length == 0] == [
        1.0 for n in range(length) if n * cycles % length == 0
    ]
    if length % cycles == 0:
        fall = length // cycles
        plain = [rate_factor(n, "cosine", 0, fall) for n in range(fall)]
        assert factors == pytest.approx(plain * cycles, abs=1e-9)


def test_rounding_would_lose_a_restart():
    """What is asked above can fail: 49 times a 49th is not quite 1."""
    assert 1 / 49 * 49 % 1 != 0
    assert rate_factor(1, "cosine_restarts", 0, 49, cycles=49) == 1.0


@given(power=st.floats(0.1, 5), length=st.integers(2, 60))
def test_the_polynomials_power_is_the_slope_of_its_logarithm(power, length):
    for update in range(1, length):
        left = (length - update) / length
        factor = rate_factor(update, "polynomial", 0, length, power=power)
        assert math.log(factor) == pytest.approx(power * math.log(left), rel=1e-9)
    linear = [rate_factor(n, "linear", 0, length) for n in range(length)]
    assert linear == [rate_factor(n, "polynomial", 0, length, power=1.0) for n in range(length)]


# ------------------------------------------------------------------ averages


def step(weight, update):
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(update)))


def test_an_average_is_that_of_the_formula():
    (weight,) = weights((3, 2))
    average, expected = EmaWeights([weight], decay=0.5), weight.detach().clone()
    for update in range(1, 20):
        step(weight, update)
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * weight.detach()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)


def test_an_average_comes_off_again_bit_for_bit_even_after_an_error():
    (weight,) = weights((3, 2))
    average = EmaWeights([weight], decay=0.9)
    step(weight, 1)
    average.update()
    before = weight.detach().clone()
    seen = []

    def draw():
        with average.applied():
            seen.append(weight.detach().clone())
            raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        draw()
    assert not torch.equal(seen[0], before)
    assert torch.equal(weight, before)


def test_an_average_goes_on_from_its_state():
    (weight,) = weights((3, 2))
    average = EmaWeights([weight], decay=0.99)
    step(weight, 1)
    average.update()
    state = average.state_dict()
    state["averages"] = [one.clone() for one in state["averages"]]
    (other,) = weights((3, 2), seed=1)
    resumed = EmaWeights([other], decay=0.99)
    resumed.load_state_dict(state)
    with torch.no_grad():
        other.copy_(weight)
    for taught, its in ((weight, average), (other, resumed)):
        step(taught, 2)
        its.update()
    with average.applied(), resumed.applied():
        assert torch.equal(weight, other)


def test_an_applied_average_is_not_averaged_again():
    average = EmaWeights(weights((2, 2)), decay=0.9)
    with average.applied():
        for forbidden in (average.update, average.state_dict, average.applied().__enter__):
            with pytest.raises(ValueError, match="leave the block"):
                forbidden()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"got {decay}"):
        EmaWeights(weights((2, 2)), decay)


def learn(name, updates=10):
    taught = groups_of(name, (4, 4))
    optimizer = make_optimizer(name, taught, 0.0)
    (weight,) = taught[0]["params"]
    for update in range(updates):
        rng = torch.Generator().manual_seed(update)
        weight.grad = weight.detach() + torch.randn(4, 4, generator=rng)
        optimizer.step()
    return optimizer, weight


def test_weights_to_use_are_the_average_that_there_is():
    optimizer, weight = learn("adamw")
    average = EmaWeights([weight], decay=0.9)
    step(weight, 1)
    before = weight.detach().clone()
    with weights_to_use(optimizer):
        assert torch.equal(weight, before)
    with weights_to_use(optimizer, average):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", sorted(AVERAGING_OPTIMIZERS))
def test_weights_to_use_are_the_optimizers_own_average(name):
    needs(name)
    optimizer, weight = learn(name)
    before = weight.detach().clone()
    with weights_to_use(optimizer):
        used = weight.detach().clone()
    assert not torch.equal(used, before)
    assert torch.equal(weight, before)
    assert all(group["train_mode"] for group in optimizer.param_groups)
    with (
        pytest.raises(ValueError, match="averages the weights itself"),
        weights_to_use(optimizer, EmaWeights([weight], 0.9)),
    ):
        pass


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - AVERAGING_OPTIMIZERS))
def test_other_optimizers_do_not_average(name):
    """Keeps the list true: one that switches modes must be in it."""
    needs(name)
    optimizer, weight = learn(name, updates=3)
    assert not any("train_mode" in group for group in optimizer.param_groups)
    with weights_to_use(optimizer):
        assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("name", "rate", "warmup", "doubted"),
    [
        ("adamw", 1e-4, 10, 0),
        ("prodigy", 1.0, 10, 0),
        ("prodigy", 1e-4, 0, 1),
        ("adamw", 1e-4, 100, 0),
        ("adamw", 1e-4, 101, 1),
        ("prodigy", 1e-4, 1000, 2),
    ],
)
def test_rates_that_teach_nothing_are_doubted(name, rate, warmup, doubted):
    assert len(doubt_rates(name, rate, warmup, 100)) == doubted
