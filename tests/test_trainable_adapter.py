"""The adapter in training: which weight learns how fast."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import silent
from dreamloom.lora.patterns import matches
from dreamloom.models.base import AdapterSpec, WeightGroup
from dreamloom.models.sdxl import SDXLModel
from dreamloom.training.train import check_training
from dreamloom.training.trainable_adapter import TrainableAdapter
from studio_set import small_config

RATES = {
    "train__learning_rate": 1e-3,
    "train__text_learning_rate": 2e-4,
    "train__text_encoder_2_learning_rate": 3e-5,
    "train__token_learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def tiny(model: object) -> SDXLModel:
    assert isinstance(model, SDXLModel)
    return model


@pytest.fixture(autouse=True)
def bare(tiny: SDXLModel) -> Iterator[None]:
    yield
    tiny.detach_adapter()


def attach(model: SDXLModel, config: LoomConfig, **spec: object) -> TrainableAdapter:
    asked = AdapterSpec(2, 2.0, "attention", 0, text_encoders=True, **spec)
    return TrainableAdapter(model.attach_adapter(asked), config, model.runtime, silent)


def read_rates(model: SDXLModel, trainable: TrainableAdapter) -> dict[str, float]:
    """The full rate of each trained weight of a layer, by the weight's own name in the model."""
    names = {
        parameter: f"{component}.{name}"
        for component, owner in model._components.items()
        for name, parameter in owner.named_parameters()
    }
    groups = trainable.optimizer.param_groups
    return {
        names[weight]: group["full_rate"]
        for group in groups
        for weight in group["params"]
        if group["role"] != "tokens"
    }


def expect(name: str, patterns: dict[str, float], ratio: float) -> float:
    layer = name.split(".lora_")[0].split(".hada_")[0]
    rate = 1e-3
    if layer.startswith("text_encoder."):
        rate = 2e-4
    if layer.startswith("text_encoder_2."):
        rate = 3e-5
    for pattern, own in patterns.items():
        rate = own if matches(pattern, layer) else rate
    return rate * (ratio if ".lora_B." in name else 1.0)


MANY = {"attn2": 5e-3, "mid_block": 7e-3, "text_encoder_2.*.q_proj": 9e-4}


@pytest.mark.parametrize(
    ("optimizer", "kind", "patterns", "ratio"),
    [
        ("adamw", "lora", MANY, 4.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("muon", "lora", MANY, 4.0),
                ("adamw", "dora", {"unet.down_blocks.1": 5e-3}, 1.0),
                ("adamw", "loha", {"attn2.to_q": 5e-3}, 1.0),
            )
        ),
    ],
)
def test_each_layer_learns_at_the_rate_of_its_encoder_or_last_pattern(
    tiny: SDXLModel, optimizer: str, kind: str, patterns: dict[str, float], ratio: float
) -> None:
    if optimizer == "muon" and importlib.util.find_spec("pytorch_optimizer") is None:
        pytest.skip("needs pytorch_optimizer, of the extra 'optimizers'")
    config = small_config(
        tiny,
        **RATES,
        train__optimizer=optimizer,
        train__learning_rate_pattern=patterns,
        adapter__loraplus_lr_ratio=ratio,
    )
    trainable = attach(tiny, config, kind=kind, tokens={"<me>": "dog"})
    rates = read_rates(tiny, trainable)
    expected = {name: expect(name, patterns, ratio) for name in rates}
    assert len(rates) + 2 == len(trainable.parameters)
    assert rates == pytest.approx(expected)
    # Every rate that was asked for is met by something.
    assert {1e-3, 2e-4, 3e-5, *patterns.values()} <= set(rates.values())


def test_equal_rates_keep_the_groups_that_there_always_were(tiny: SDXLModel) -> None:
    """Checkpoints name weights by their place among the groups."""
    plain = attach(tiny, small_config(tiny))
    roles = [group["role"] for group in plain.optimizer.param_groups]
    assert roles == ["down", "up", "text down", "text up"]
    tiny.detach_adapter()
    parted = attach(tiny, small_config(tiny, **RATES))
    assert len(parted.optimizer.param_groups) == 6


def test_two_text_encoders_move_as_far_as_their_rates_say(tiny: SDXLModel) -> None:
    """AdamW's first step is as long as the rate, so the weights themselves tell it."""
    trainable = attach(tiny, small_config(tiny, **RATES, train__weight_decay=0.0))
    names = read_rates(tiny, trainable)
    before = [weight.detach().clone() for weight in trainable.parameters]
    trainable.set_rates(1)  # the first after the warm-up: the full rate
    trainable.zero_grad()
    sum(weight.sum() for weight in trainable.parameters).backward()
    trainable.clip_and_step(torch.tensor([True]))
    moved = [
        (weight.detach() - old).abs().mean().item()
        for weight, old in zip(trainable.parameters, before, strict=True)
    ]
    assert len(moved) == len(names)
    assert {f"{one:.1e}" for one in moved} == {"1.0e-03", "2.0e-04", "3.0e-05"}


def test_a_pattern_that_matches_nothing_is_refused_before_training(tiny: SDXLModel) -> None:
    config = small_config(tiny, train__learning_rate_pattern={"up_block": 1e-3})
    with pytest.raises(ConfigError) as caught:
        check_training(tiny, [""], config)
    assert caught.value.problem == (
        "The pattern 'up_block' of train.learning_rate_pattern matches no layer that changes."
    )
    assert "Layers have names such as unet." in caught.value.hint
    # Nothing is left on the model.
    tiny.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))


@pytest.mark.parametrize(
    "asked",
    [
        {"train__learning_rate_pattern": {"attn2": 0.5}},
        {"train__text_encoder_2_learning_rate": 0.5, "adapter__text_encoders": True},
    ],
)
def test_an_optimizer_of_one_rate_refuses_several(
    tiny: SDXLModel, asked: dict[str, object]
) -> None:
    pytest.importorskip("pytorch_optimizer")
    rates = dict.fromkeys(list(RATES)[:2], 1.0)
    config = small_config(tiny, **{"train__optimizer": "prodigy", **rates, **asked})
    with pytest.raises(ConfigError) as caught:
        check_training(tiny, [""], config)
    assert "prodigy finds one learning rate for all weights" in caught.value.problem
    assert "0.5" in caught.value.problem
    assert "train.learning_rate_pattern" in caught.value.hint
    # The same rate under another name is one rate.
    same = {"train__learning_rate_pattern": {"attn2": 1.0}}
    check_training(tiny, [""], small_config(tiny, train__optimizer="prodigy", **rates, **same))


def test_restarts_and_powers_reach_the_rates(tiny: SDXLModel) -> None:
    def rates(**settings: object) -> list[float]:
        asked = {"train__steps": 9, "train__warmup_steps": 1, "train__learning_rate": 1.0}
        weights = [WeightGroup("down", (torch.nn.Parameter(torch.zeros(2, 2)),))]
        config = small_config(tiny, **asked, **settings)
        trainable = TrainableAdapter(weights, config, tiny.runtime, silent)
        seen = []
        for update in range(9):
            trainable.set_rates(update)
            assert trainable.rate == trainable.optimizer.param_groups[0]["lr"]
            seen.append(trainable.rate)
        return seen

    restarts = {"train__lr_scheduler": "cosine_restarts"}
    assert rates(**restarts, train__lr_num_cycles=1) == rates(train__lr_scheduler="cosine")
    twice = rates(**restarts, train__lr_num_cycles=2)
    assert twice[1:5] == pytest.approx(twice[5:])
    assert twice[5] == 1.0
    assert rates(**restarts) == rates(**restarts, train__lr_num_cycles=3) != twice
    polynomial = {"train__lr_scheduler": "polynomial"}
    assert rates(**polynomial, train__lr_power=1.0) == rates(train__lr_scheduler="linear")
    assert rates(**polynomial) == rates(**polynomial, train__lr_power=2.0)
