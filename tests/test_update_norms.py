"""Norms of updates: from the factors as from the product; a limit and a price on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dreamloom.core.config.aliases import use_earlier_names
from dreamloom.core.config.loading import load_config
from dreamloom.core.device import Runtime
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import LossLogged, silent
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Model, WeightGroup
from dreamloom.training.provenance import read_final_scale
from dreamloom.training.train import check_training, train_adapter
from dreamloom.training.trainable_adapter import TrainableAdapter
from dreamloom.training.update_norms import (
    FactorPair,
    limit_norms,
    pair_factors,
    scaled_updates,
    sum_squared_norms,
)
from studio_set import claimed, small_config

# Scales that differ by layer, convolutions and text encoders.
EVERYTHING = AdapterSpec(
    rank=3,
    alpha=2.0,
    target_modules="all",
    seed=0,
    ranks={"mid_block": 2},
    alphas={"attn2": 5.0},
    use_rslora=True,
    text_encoders=True,
)


def multiply_out(pair: FactorPair) -> torch.Tensor:
    return pair.scale * (pair.up.flatten(1) @ pair.down.flatten(1))


def make_pair(outputs: int, rank: int, inputs: tuple[int, ...], scale: float = 1.0) -> FactorPair:
    down, up = torch.randn(rank, *inputs), torch.randn(outputs, rank, *(1 for _ in inputs[1:]))
    return FactorPair(Parameter(down), Parameter(up), scale)


@pytest.fixture
def pairs() -> list[FactorPair]:
    torch.manual_seed(0)
    return [
        make_pair(9, 2, (7,), 0.5),
        make_pair(4, 6, (3,)),  # more ranks than inputs or outputs
        make_pair(5, 3, (4, 3, 3), 2.0),
        make_pair(1, 1, (1,), 0.01),
    ]


def test_norms_and_gradients_are_those_of_the_products(pairs: list[FactorPair]) -> None:
    weights = [weight for pair in pairs for weight in (pair.down, pair.up)]
    ours = sum_squared_norms(pairs)
    found = torch.autograd.grad(ours, weights)
    dense = torch.stack([multiply_out(pair).square().sum() for pair in pairs]).sum()
    torch.testing.assert_close(ours, dense)
    for one, expected in zip(found, torch.autograd.grad(dense, weights), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_every_layer_of_an_attached_lora_is_paired_with_its_own_scale(model: Model) -> None:
    groups = model.attach_adapter(EVERYTHING)
    try:
        torch.manual_seed(0)
        for group in groups:
            for weight in group.parameters:
                weight.data.normal_()
        pairs, adapter = pair_factors(groups), model.read_adapter()
    finally:
        model.detach_adapter()
    assert len(pairs) == len(adapter.layers)
    assert len({pair.scale for pair in pairs}) > 2
    ours = sorted(float(pair.squared_norm().detach()) for pair in pairs)
    theirs = sorted(float(one.update().square().sum()) for one in adapter.layers.values())
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("spec", [{"kind": "dora"}, {"init": "pissa"}])
def test_what_is_no_plain_product_has_no_pairs(model: Model, spec: dict[str, Any]) -> None:
    some = AdapterSpec(2, 2.0, "attention", 0, blocks="mid_block", **spec)
    try:
        assert pair_factors(model.attach_adapter(some)) == []
    finally:
        model.detach_adapter()


def test_only_updates_above_the_limit_are_scaled_back_and_only_in_length(
    pairs: list[FactorPair],
) -> None:
    before = [multiply_out(pair).detach() for pair in pairs]
    lengths = [float(one.norm()) for one in before]
    limit = sorted(lengths)[1] * 1.001  # two are below it
    downs = [pair.down.detach().clone() for pair in pairs]
    ups = [pair.up.detach().clone() for pair in pairs]
    limit_norms(pairs, limit)
    for pair, was, length, down, up in zip(pairs, before, lengths, downs, ups, strict=True):
        now = multiply_out(pair).detach()
        if length <= limit:
            assert torch.equal(pair.down, down)
            assert torch.equal(pair.up, up)
            continue
        assert float(now.norm()) == pytest.approx(limit, rel=1e-5)
        torch.testing.assert_close(now, was * (limit / length))
        assert float((pair.down.norm() / down.norm()).detach()) == pytest.approx(
            (limit / length) ** 0.5
        )
    assert sum(length > limit for length in lengths) == 2
    nothing = FactorPair(Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(3, 2)), 1.0)
    limit_norms([nothing], 1.0)
    assert not nothing.down.any()
    limit_norms([], 1.0)


def train(
    folder: Path, model: Model, sets: tuple[PhotoSet, Any], **settings: object
) -> tuple[RunFolder, list[LossLogged]]:
    told: list[Any] = []
    run = claimed(folder)
    train_adapter(run, model, *sets, small_config(model, **settings), told.append)
    return run, [event for event in told if isinstance(event, LossLogged)]


def test_a_limit_holds_in_the_finished_adapter(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    limit = 0.02
    fast = {
        "train__learning_rate": 0.02,
        "train__steps": 2,
        "train__batch_photos": 1,
        "adapter__blocks": "mid_block",
    }
    held, _ = train(tmp_path / "held", model, sets, **fast, train__scale_weight_norms=limit)
    ours = [float(layer.update().norm()) for layer in read_adapter(held.adapter).layers.values()]
    assert max(ours) <= limit * (1 + 1e-5)
    # All but a few were stopped by it: steps of this size go beyond.
    assert sum(length > 0.99 * limit for length in ours) > len(ours) / 2


def test_the_average_that_is_saved_is_limited_and_the_weights_come_back() -> None:
    """The average of two small products can be a large one: (10 · 0.1) and (0.1 · 10)."""
    down, up = Parameter(torch.tensor([[10.0]])), Parameter(torch.tensor([[0.1]]))
    config = load_config(
        overrides={
            "train.learning_rate": 1e-9,
            "train.text_learning_rate": 1e-9,
            "train.token_learning_rate": 1e-9,
            "train.ema_decay": 0.5,
            "train.scale_weight_norms": 1.0,
            "train.final_scale": 1.0,
        }
    )
    groups = [WeightGroup("down", (down,)), WeightGroup("up", (up,), scales=(1.0,))]
    one = TrainableAdapter(groups, config, Runtime(torch.device("cpu"), torch.float32), silent)
    down.data.fill_(0.1)
    up.data.fill_(10.0)
    for weight in (down, up):
        weight.grad = torch.zeros_like(weight)
    one.clip_and_step(torch.tensor([True]))
    before = down.item(), up.item()
    with one.finished():
        assert down.item() * up.item() == pytest.approx(1.0)
        assert down.item() > 0.2  # no longer one of the two
    assert (down.item(), up.item()) == before


def test_a_penalty_counts_once_an_update_in_loss_and_gradient(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    """Over several batches and passes, and without class images."""
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, blocks="mid_block"))
    fresh = model.read_adapter()
    model.detach_adapter()
    rng = torch.Generator().manual_seed(0)
    layers = {
        name: Layer(layer.down, torch.randn(layer.up.shape, generator=rng) * 0.2)
        for name, layer in fresh.layers.items()
    }
    first = tmp_path / "first.safetensors"
    write_adapter(first, Adapter(layers, fresh.metadata))
    update = {
        "priors__kind": "none",
        "train__init_adapter": str(first),
        "train__gradient_accumulation_steps": 2,
        "train__batch_photos": 1,
        "adapter__blocks": "mid_block",
        "train__steps": 1,
        "train__warmup_steps": 0,
    }
    alone = (sets[0], None)
    free, plain = train(tmp_path / "free", model, alone, **update)
    priced, dear = train(tmp_path / "priced", model, alone, **update, train__update_penalty=1.0)
    square = Adapter(layers).norm() ** 2
    assert dear[0].total - plain[0].total == pytest.approx(square, rel=1e-4)
    assert dear[0].subject == pytest.approx(plain[0].subject)
    assert read_adapter(priced.adapter).norm() < read_adapter(free.adapter).norm()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"train__update_penalty": 0.1, "adapter__kind": "dora"},
            r"train\.update_penalty = 0\.1 needs the norm of a LoRA's updates, which a dora",
        ),
        (
            {"train__scale_weight_norms": 1.0, "adapter__kind": "oft"},
            r"train\.scale_weight_norms = 1\.0 needs the norm of a LoRA's updates, which a oft",
        ),
        (
            {"train__update_penalty": 0.1, "adapter__init_lora_weights": "pissa"},
            "pissa begins with a part of the base's weights",
        ),
        (
            {"train__scale_weight_norms": 1.0, "train__optimizer": "schedule_free"},
            "schedule_free keeps an average of its own",
        ),
    ],
)
def test_what_has_no_such_norm_is_refused(
    model: Model, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_training(model, ["", ""], small_config(model, **settings))


def test_scaled_updates_are_that_much_smaller_and_come_back_bit_for_bit(
    pairs: list[FactorPair],
) -> None:
    before = [(pair.down.detach().clone(), pair.up.detach().clone()) for pair in pairs]
    whole = [multiply_out(pair) for pair in pairs]
    with scaled_updates(pairs, 0.7):
        for pair, update in zip(pairs, whole, strict=True):
            torch.testing.assert_close(multiply_out(pair), 0.7 * update)
    for pair, (down, up) in zip(pairs, before, strict=True):
        assert torch.equal(pair.down, down)
        assert torch.equal(pair.up, up)


def test_a_finished_adapter_is_scaled_and_its_training_is_not(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    adapters, losses = [], []
    for scale in (1.0, 0.5):
        told: list[object] = []
        run = claimed(tmp_path / str(scale))
        config = small_config(model, train__final_scale=scale, train__steps=2)
        train_adapter(run, model, *sets, config, told.append)
        adapters.append(read_adapter(run.adapter))
        losses.append([event.total for event in told if isinstance(event, LossLogged)])
    assert losses[0] == losses[1]
    whole, half = (one.layers for one in adapters)
    assert whole.keys() == half.keys()
    for name, layer in whole.items():
        torch.testing.assert_close(
            half[name].up.flatten(1) @ half[name].down.flatten(1),
            0.5 * layer.up.flatten(1) @ layer.down.flatten(1),
        )


def test_who_begins_from_a_scaled_adapter_begins_from_what_was_trained(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    first, still = claimed(tmp_path / "first"), claimed(tmp_path / "still")
    train_adapter(first, model, *sets, small_config(model, train__final_scale=0.5, train__steps=1))
    idle = {"train__learning_rate": 1e-12, "train__weight_decay": 0, "train__steps": 1}
    config = small_config(
        model, train__init_adapter=str(first.adapter), train__final_scale=0.5, **idle
    )
    train_adapter(still, model, *sets, config)
    before, after = (read_adapter(run.adapter) for run in (first, still))
    assert before.norm() > 0
    assert after.norm() == pytest.approx(before.norm(), rel=1e-5)
    # A header that says nonsense scales nothing.
    for text in ("nonsense", '{"final_scale": 0}', '{"final_scale": "x"}', "[]", "null"):
        assert read_final_scale(before.with_metadata(**{"dreamloom.settings": text})) == 1.0
    assert read_final_scale(before) == 0.5


def test_the_scale_is_advised_only_where_guidance_has_something_to_multiply() -> None:
    advice = {
        **{"resolution_px": 64, "guidance": 4.0, "learning_rate": 1e-3},
        **{"target_modules": "attention", "prior_target": "base_prediction", "final_scale": 0.7},
        "caption_dropout": 0.1,
    }

    def scale(*sets: str) -> object:
        return load_config(sets=list(sets)).resolve(advice).train.final_scale

    assert scale() == 0.7
    assert scale("train.final_scale=0.9", "priors.kind=none") == 0.9
    for plain in (
        "priors.kind=none",
        "priors.kind=base",
        "train.prior_weight=0",
        "train.prior_target=images",
        "train.caption_dropout=0",
        "adapter.kind=dora",
        "adapter.init_lora_weights=pissa",
    ):
        assert scale(plain) == 1.0


@pytest.mark.parametrize(
    "settings",
    [{"adapter__kind": "dora"}, {"adapter__kind": "loha"}, {"adapter__init_lora_weights": "pissa"}],
)
def test_a_scale_is_refused_where_the_factors_are_not_the_update(
    model: Model, settings: dict[str, object]
) -> None:
    config = small_config(model, train__final_scale=0.7, **settings)
    with pytest.raises(ConfigError, match=r"train\.final_scale = 0\.7 scales a LoRA's factors"):
        check_training(model, ["", ""], config)


def test_settings_that_limit_nothing_are_no_part_of_a_fingerprint() -> None:
    off = load_config().train.model_dump()
    on = {**off, "scale_weight_norms": 1.0, "update_penalty": 0.1}
    assert not {"scale_weight_norms", "update_penalty"} & use_earlier_names(off, "train").keys()
    assert {"scale_weight_norms", "update_penalty"} <= use_earlier_names(on, "train").keys()
