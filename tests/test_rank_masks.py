"""Ranks that are left out: by chance in training, by the timestep; against plain autograd."""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from dreamloom.core.config.aliases import use_earlier_names
from dreamloom.core.config.loading import load_config
from dreamloom.core.device import Runtime, generator_for, seed_for
from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.core.events import Event, LossLogged, Note
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder
from dreamloom.experiments.merge_search.request import SearchRequest, read_parts
from dreamloom.lora.adapter import T_LORA_KEY, Adapter, Layer
from dreamloom.lora.readers import tell_readers
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.convert import FileForm, convert_file, resize_adapter
from dreamloom.merging.files.fuse import fuse_into_checkpoint
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import AdapterPart, Recipe
from dreamloom.merging.ranks import RankRequest
from dreamloom.models.activation_hooks import apply_as
from dreamloom.models.base import AdapterSpec, DropoutSeeds, Framing, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.lora_schedule import Composition, parse_curve, set_lora_schedules
from dreamloom.models.rank_masks import RankMasks, mask_by_timestep
from dreamloom.models.sdxl import SDXLModel
from dreamloom.training.train import check_training, train_adapter
from studio_set import claimed, small_config

# Linear layers and convolutions of two ranks, but few of them.
SPEC = AdapterSpec(
    rank=4,
    alpha=2.0,
    target_modules="all",
    seed=0,
    blocks="mid_block, up_blocks.0.resnets.0",
    ranks={"mid_block.attentions": 3},
    use_rslora=True,
)
SEEDS = DropoutSeeds((11, 12, 13), 99)
TIMES = torch.tensor([0, 430, 999])


@pytest.fixture(scope="module")
def tiny(model: object) -> SDXLModel:
    assert isinstance(model, SDXLModel)
    return model


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails must not leave its adapter to the next."""
    yield
    if "tiny" in request.fixturenames:
        request.getfixturevalue("tiny").detach_adapter()


def attach(model: SDXLModel, spec: AdapterSpec, checkpointing: Any = "none") -> list[nn.Parameter]:
    """Attach an adapter that changes something."""
    weights = [w for group in model.attach_adapter(spec, checkpointing) for w in group.parameters]
    rng = torch.Generator().manual_seed(7)
    for weight in weights:
        weight.data += 0.2 * torch.randn(weight.shape, generator=rng)
    return weights


def predict(
    model: SDXLModel, rows: list[int], dropout: DropoutSeeds | None = SEEDS, at: Tensor = TIMES
) -> Tensor:
    """Predict some of three images, each with its own noise, timestep and seed."""
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))[rows]
    prompts = model.encode_prompts(["a dog", "a cat", "a house"]).take(torch.tensor(rows))
    if dropout is not None:
        dropout = replace(dropout, images=tuple(dropout.images[row] for row in rows))
    return model.predict(noisy, at[rows], prompts, [Framing((64, 64))] * len(rows), dropout)


# ------------------------------------------------------------------ the reference


def draw_masks(ranks: dict[str, int], spec: AdapterSpec) -> dict[str, Tensor]:
    """Say layer by layer and image by image what counts, as the settings' descriptions do."""
    names, total = sorted(ranks), sum(ranks.values())
    masks = {name: torch.ones(3, ranks[name]) for name in names}
    drawn = [torch.rand(total, generator=generator_for(s, "rank dropout")) for s in SEEDS.images]
    layers = torch.rand(len(names), generator=generator_for(SEEDS.update, "module dropout"))
    place, left = 0, 1 - spec.rank_dropout
    for number, name in enumerate(names):
        rank = ranks[name]
        for image in range(3):
            for one in range(rank):
                mask = 1.0
                if spec.rank_dropout:
                    mask *= float(drawn[image][place + one] < left) / left
                if layers[number] < spec.module_dropout:
                    mask = 0.0
                least = spec.t_lora_min_rank
                if least is not None:
                    least = min(least, rank)
                    active = (rank - least) * (1000 - int(TIMES[image])) // 1000 + least
                    mask *= float(one < active)
                masks[name][image, one] = mask
        place += rank
    return masks


def refer(model: SDXLModel, spec: AdapterSpec, weights: list[nn.Parameter]) -> list[Tensor]:
    """Predict beside the bare base, and let autograd find the gradients; in the weights' order."""
    attached = model._attached
    assert attached is not None
    named = {id(weight): weight.detach().clone().requires_grad_(True) for weight in weights}
    layers = {
        name: (
            layer.get_base_layer(),
            named[id(layer.lora_A["taught"].weight)],
            named[id(layer.lora_B["taught"].weight)],
            layer.scaling["taught"],
        )
        for name, layer in attached._adapted()
    }
    inner = {name.removeprefix("unet."): one for name, one in layers.items()}
    masks = draw_masks({name: len(one[1]) for name, one in inner.items()}, spec)
    model.detach_adapter()

    def hook_for(name: str) -> Any:
        _, down, up, scale = inner[name]

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            narrow = apply_as(module, inputs[0], down)
            is_conv = isinstance(module, nn.Conv2d)
            rows = []
            for image, one in enumerate(narrow):
                one = (
                    one * masks[name][image].view(-1, 1, 1) if is_conv else one * masks[name][image]
                )
                if spec.dropout:
                    seed = seed_for(SEEDS.images[image], f"dropout {name}")
                    kept = torch.empty(one.shape).bernoulli_(
                        1 - spec.dropout, generator=torch.Generator().manual_seed(seed)
                    )
                    one = one * kept / (1 - spec.dropout)
                rows.append(one)
            narrow = torch.stack(rows)
            return output + scale * (conv2d(narrow, up) if is_conv else linear(narrow, up))

        return add

    with ExitStack() as stack:
        for name, (base, *_) in inner.items():
            stack.callback(base.register_forward_hook(hook_for(name)).remove)
        out = predict(model, [0, 1, 2], None)
    out.square().mean().backward()
    zero = [torch.zeros_like(one) if one.grad is None else one.grad for one in named.values()]
    return [out.detach(), *zero]


# Each alone; by default all of them together.
SLOW = {"nothing", "elements", "ranks", "layers"}
CASES = {
    "nothing": ({}, "none"),
    "elements": ({"dropout": 0.3}, "none"),
    "ranks": ({"rank_dropout": 0.4}, "full"),
    "layers": ({"module_dropout": 0.5}, "none"),
    "timesteps": ({"t_lora_min_rank": 1}, "none"),
    "all": (
        {"dropout": 0.3, "rank_dropout": 0.4, "module_dropout": 0.2, "t_lora_min_rank": 2},
        "full",
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in CASES],
)
def test_predictions_and_gradients_are_those_of_plain_autograd(tiny: SDXLModel, case: str) -> None:
    settings, checkpointing = CASES[case]
    spec = replace(SPEC, **settings)
    weights = attach(tiny, spec, checkpointing)
    out = predict(tiny, [0, 1, 2])
    # What another pass leaves out is nothing to a backward pass that computes this one again.
    predict(tiny, [2], SEEDS)
    out.square().mean().backward()
    ours = [out.detach(), *(torch.zeros_like(w) if w.grad is None else w.grad for w in weights)]
    theirs = refer(tiny, spec, weights)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    flat = [torch.cat([one.flatten() for one in some[1:]]) for some in (ours, theirs)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-4
    if case == "nothing":
        return
    attach(tiny, SPEC)  # one that leaves nothing out is found out
    with torch.no_grad():
        assert (predict(tiny, [0, 1, 2], None) - theirs[0]).norm() > 1e-3


def test_masks_depend_on_the_image_and_not_on_its_batch(tiny: SDXLModel) -> None:
    attach(tiny, replace(SPEC, dropout=0.2, rank_dropout=0.3, module_dropout=0.2))
    with torch.no_grad():
        together = predict(tiny, [0, 1, 2])
        turned = predict(tiny, [2, 0, 1])
        torch.testing.assert_close(turned, together[[2, 0, 1]], rtol=1e-4, atol=1e-5)
        for row in range(3):
            alone = predict(tiny, [row])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
        other = predict(tiny, [0, 1, 2], replace(SEEDS, images=(1, 2, 13)))
    assert (other[0] - together[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[2], together[2], rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_where_it_is_not_asked_for(tiny: SDXLModel) -> None:
    """In validation, in drawing, and with the finished adapter."""
    dropping = replace(SPEC, dropout=0.9, rank_dropout=0.9, module_dropout=0.9)
    attach(tiny, dropping)
    adapter, sampler = tiny.read_adapter(), Sampler("ddim", steps=1, guidance=1.0)
    assert not any("dropout" in key for key in adapter.metadata)
    with torch.no_grad():
        attached = predict(tiny, [0, 1, 2], None)
        drawn = tiny.sample([Shot("a dog", 1)], sampler)[0]
        assert (predict(tiny, [0, 1, 2]) - attached).abs().max() > 1e-3
        tiny.detach_adapter()
        assert not tiny._pipeline.unet._forward_pre_hooks
        assert not tiny._pipeline.unet._forward_hooks
        with tiny.apply_adapters([(adapter, 1.0)]):
            torch.testing.assert_close(
                predict(tiny, [0, 1, 2], None), attached, rtol=1e-3, atol=1e-4
            )
            again = tiny.sample([Shot("a dog", 1)], sampler)[0]
    assert max(abs(a - b) for a, b in zip(drawn.tobytes(), again.tobytes(), strict=True)) <= 1


# ------------------------------------------------------------------ the draws


def test_shares_are_left_out_and_the_rest_makes_up_for_it() -> None:
    denoiser = nn.Identity()
    spec = AdapterSpec(8, 8.0, "attention", 0, dropout=0.25, rank_dropout=0.5)
    masks = RankMasks(denoiser, {"a": 8, "b": 3}, spec, 1000)
    seen = []
    denoiser.forward = lambda x, t: seen.append(masks.mask("b", torch.ones(len(x), 50, 3))) or x
    with masks.dropping(DropoutSeeds(tuple(range(400)), 0)):
        denoiser(torch.ones(400, 1), torch.zeros(400))
    (found,) = seen
    rows = found.amax(dim=1)  # a rank is left out everywhere, or nowhere as a whole
    assert float((rows == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((found[rows[:, None].expand_as(found) > 0] == 0).float().mean()) == pytest.approx(
        0.25, abs=0.02
    )
    assert {round(float(v), 4) for v in found.unique()} == {0.0, round(1 / 0.5 / 0.75, 4)}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.1)
    assert not masks.are_set


def test_a_layer_is_left_out_for_a_whole_update() -> None:
    spec = AdapterSpec(2, 2.0, "attention", 0, module_dropout=0.3)
    names = {f"layer {number:03d}": 2 for number in range(300)}
    denoiser = nn.Identity()
    masks = RankMasks(denoiser, names, spec, 1000)

    def count(seeds: DropoutSeeds) -> set[str]:
        gone: set[str] = set()
        denoiser.forward = lambda x, t: (
            gone.update(
                name for name in names if not masks.mask(name, torch.ones(len(x), 4, 2)).any()
            )
            or x
        )
        with masks.dropping(seeds):
            denoiser(torch.ones(len(seeds.images), 1), torch.zeros(1))
        return gone

    first = count(DropoutSeeds((1, 2), 5))
    assert len(first) / 300 == pytest.approx(0.3, abs=0.08)
    assert count(DropoutSeeds((3,), 5)) == first  # another pass of the same update
    assert count(DropoutSeeds((1, 2), 6)) != first


def test_rows_that_are_no_images_are_refused() -> None:
    denoiser = nn.Identity()
    masks = RankMasks(denoiser, {"a": 2}, replace(SPEC, rank_dropout=0.5), 1000)
    denoiser.forward = lambda x, t: masks.mask("a", torch.ones(6, 4, 2))
    with masks.dropping(DropoutSeeds((1, 2), 0)), pytest.raises(ValueError, match="a is given 6"):
        denoiser(torch.ones(2, 1), torch.zeros(2))
    assert not masks.are_set  # nor is anything left behind


# ------------------------------------------------------------------ training


DROPOUTS = {
    "adapter__dropout": 0.1,
    "adapter__rank_dropout": 0.3,
    "adapter__module_dropout": 0.2,
    "adapter__blocks": "mid_block",
    "train__rank": 4,
    "train__batch_photos": 1,
    "train__batch_priors": 1,
}


def train(
    folder: Path, model: SDXLModel, sets: tuple[PhotoSet, ClassImageSet], **settings: object
) -> tuple[RunFolder, list[Event]]:
    told: list[Event] = []
    run = claimed(folder)
    train_adapter(run, model, *sets, small_config(model, **settings), told.append)
    return run, told


def is_same(first: Adapter, second: Adapter) -> bool:
    return all(
        torch.equal(one.down, second.layers[name].down)
        and torch.equal(one.up, second.layers[name].up)
        for name, one in first.layers.items()
    )


def test_a_stopped_training_with_dropout_goes_on_to_the_same_weights(
    model: SDXLModel,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bounds and T-LoRA included; looking drops nothing and changes nothing."""
    settings = {
        **DROPOUTS,
        "train__steps": 2,
        "train__checkpointing_steps": 1,
        "adapter__t_lora_min_rank": 2,
        "train__scale_weight_norms": 0.05,
        "train__update_penalty": 0.1,
    }
    whole, _ = train(tmp_path / "whole", model, sets, **settings)

    def stop(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 1:
            raise KeyboardInterrupt

    run = claimed(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(run, model, *sets, small_config(model, **settings), stop)
    asked: list[bool] = []
    true = model.predict

    def listen(*given: Any, **named: Any) -> Tensor:
        asked.append(named.get("dropout") is not None)
        return true(*given, **named)

    monkeypatch.setattr(model, "predict", listen)
    looking = {"validation__every": 2, "validation__images": 1, "validation__steps": 1}
    train_adapter(run, model, *sets, small_config(model, **settings, **looking))
    assert asked.count(True) == 2
    assert asked.count(False) > 4
    assert is_same(read_adapter(whole.adapter), read_adapter(run.adapter))
    looked = next((run.path / "looks").glob("*/adapter.safetensors"))
    for file in (run.adapter, looked):
        assert read_adapter(file).t_lora_min_rank == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"adapter__dropout": 0.1, "adapter__kind": "lokr"},
            r"adapter\.dropout = 0\.1 leaves out parts of a LoRA, and this is a lokr",
        ),
        (
            {"adapter__t_lora_min_rank": 1, "adapter__kind": "dora"},
            r"adapter\.t_lora_min_rank = 1 leaves out parts of a LoRA, and this is a dora",
        ),
        (
            {"adapter__rank_dropout": 0.1, "adapter__init_lora_weights": "pissa"},
            "would leave out parts of the base's weights, which pissa takes",
        ),
        ({"adapter__t_lora_min_rank": 3}, "t_lora_min_rank = 3 is not from 1 to the rank, 2"),
        (
            {"adapter__module_dropout": 0.1, "train__compile": "blocks"},
            "Compiled blocks compute an adapter whole",
        ),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    model: SDXLModel, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_training(model, ["", ""], small_config(model, **settings))
    assert check_training(model, ["", ""], small_config(model, adapter__dropout=0.1)) is None


def test_settings_that_leave_nothing_out_are_no_part_of_a_fingerprint() -> None:
    off = load_config().adapter.model_dump()
    new = {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1, "t_lora_min_rank": 1}
    assert not new.keys() & use_earlier_names(off, "adapter").keys()
    assert new.keys() <= use_earlier_names({**off, **new}, "adapter").keys()


# ------------------------------------------------------------------ T-LoRA


def test_ranks_count_as_the_formula_says() -> None:
    times = torch.arange(1001)
    for rank, least in ((16, 8), (7, 1), (5, 5), (3, 9), (64, 31)):
        mask = mask_by_timestep(times, 1000, rank, least)
        floor = min(least, rank)
        wanted = [(rank - floor) * (1000 - t) // 1000 + floor for t in range(1001)]
        assert mask.sum(dim=1).tolist() == wanted
        assert (mask.diff(dim=1) <= 0).all()  # the first ones
        assert (wanted[0], wanted[-1]) == (rank, floor)
    # Schedulers ask between the timesteps, too, and may go beyond the ends.
    assert mask_by_timestep(torch.tensor([-3.0, 499.5, 2000.0]), 1000, 4, 1).sum(1).tolist() == [
        4,
        2,
        1,
    ]


@pytest.fixture(scope="module")
def t_lora(tiny: SDXLModel) -> Adapter:
    attach(tiny, replace(SPEC, t_lora_min_rank=1, text_encoders=True))
    adapter = tiny.read_adapter()
    tiny.detach_adapter()
    return adapter


def cut(adapter: Adapter, timestep: float) -> Adapter:
    """A plain LoRA of the ranks that count at a timestep; text encoders have no timestep."""
    layers = {}
    for name, one in adapter.layers.items():
        least = min(1, one.rank)
        count = int((one.rank - least) * (1000 - timestep) / 1000) + least
        count = count if name.startswith("unet.") else one.rank
        layers[name] = Layer(one.down[:count], one.up[:, :count])
    return Adapter(layers)


@torch.no_grad()
def test_each_image_has_the_ranks_of_its_own_timestep(tiny: SDXLModel, t_lora: Adapter) -> None:
    with tiny.apply_adapters([(t_lora, 0.7)]):
        together = predict(tiny, [0, 1, 2], None)
    for row, timestep in enumerate(TIMES.tolist()):
        with tiny.apply_adapters([(cut(t_lora, timestep), 0.7)]):
            alone = predict(tiny, [row], None)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-4)
    with tiny.apply_adapters([(t_lora.at_full_rank(), 0.7)]):
        whole = predict(tiny, [0, 1, 2], None)
    torch.testing.assert_close(together[0], whole[0], rtol=1e-3, atol=1e-4)
    assert (together[2] - whole[2]).abs().max() > 1e-2
    assert not tiny._pipeline.unet._forward_pre_hooks


class ByHand:
    """A denoiser that wears, at each call, plain LoRAs cut for that call's timestep."""

    def __init__(self, model: SDXLModel, parts: list[tuple[Adapter, float]]) -> None:
        self.model, self.parts = model, parts
        self.true = model._pipeline.unet.forward
        self.seen: list[float] = []

    def __call__(self, sample: Tensor, timestep: Any, *given: Any, **named: Any) -> Any:
        self.seen.append(float(timestep))
        cuts = [(cut(a, float(timestep)) if a.t_lora_min_rank else a, w) for a, w in self.parts]
        with self.model.apply_adapters(cuts):
            return self.true(sample, timestep, *given, **named)


def draw(model: SDXLModel, parts: Any, sampler: Sampler) -> Tensor:
    with model.apply_adapters(parts):
        pictures = model.sample([Shot("a dog", 3), Shot("a cat", 4)], sampler)
    return torch.stack([torch.tensor(list(one.tobytes())).float() for one in pictures])


def is_near(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().mean()) < 0.05


@pytest.mark.parametrize("scheduler", ["ddim", pytest.param("heun", marks=pytest.mark.slow)])
def test_a_drawing_has_the_ranks_of_each_step(
    tiny: SDXLModel, t_lora: Adapter, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another adapter, and as it was looked at while it was trained."""
    sampler = Sampler(scheduler, steps=3, guidance=3.0)
    unet_only = replace(
        t_lora, layers={n: one for n, one in t_lora.layers.items() if n.startswith("unet.")}
    )
    other = cut(unet_only, 500)
    parts = [(unet_only, 0.6), (other, 0.3)]
    ours = draw(tiny, parts, sampler)
    assert not is_near(ours, draw(tiny, [(unet_only.at_full_rank(), 0.6), (other, 0.3)], sampler))
    by_hand = ByHand(tiny, parts)
    with monkeypatch.context() as patch:
        patch.setattr(tiny._pipeline.unet, "forward", by_hand)
        # Copies of weights that lie faster would not be changed with them.
        patch.setattr("dreamloom.models.sdxl.fastest_layout", lambda *parts: nullcontext())
        theirs = draw(tiny, [], sampler)
    assert len(set(by_hand.seen)) == 3
    assert is_near(ours, theirs)


def test_a_drawing_follows_timesteps_and_its_schedule_at_once(
    tiny: SDXLModel, t_lora: Adapter
) -> None:
    sampler = Sampler("ddim", steps=4, guidance=3.0)
    curve = parse_curve("1@0,1@0.5,0@0.5")
    (strength,) = set_lora_schedules([t_lora], [curve], Composition(conditional_only=True))
    ours = draw(tiny, [(t_lora, strength)], sampler)
    assert not is_near(ours, draw(tiny, [(t_lora.at_full_rank(), strength)], sampler))
    assert not is_near(ours, draw(tiny, [(t_lora, 1.0)], sampler))


def test_looks_at_a_training_are_drawn_as_its_file_is(tiny: SDXLModel) -> None:
    sampler = Sampler("ddim", steps=3, guidance=3.0)
    attach(tiny, replace(SPEC, t_lora_min_rank=1))
    looked = draw(tiny, [], sampler)
    adapter = tiny.read_adapter()
    tiny.detach_adapter()
    assert is_near(draw(tiny, [(adapter, 1.0)], sampler), looked)
    assert not is_near(draw(tiny, [(adapter.at_full_rank(), 1.0)], sampler), looked)


@pytest.mark.slow
def test_a_half_precision_base_follows_timesteps(tiny_sdxl: Path, t_lora: Adapter) -> None:
    half = load_model(str(tiny_sdxl), Runtime(torch.device("cpu"), torch.bfloat16))
    assert isinstance(half, SDXLModel)
    with torch.no_grad(), half.apply_adapters([(t_lora, 1.0)]):
        masked = predict(half, [2], None)
    with torch.no_grad(), half.apply_adapters([(cut(t_lora, 999), 1.0)]):
        right = predict(half, [2], None)
    with torch.no_grad(), half.apply_adapters([(t_lora.at_full_rank(), 1.0)]):
        whole = predict(half, [2], None)
    assert (masked - right).norm() < 0.1 * (masked - whole).norm()


@pytest.mark.parametrize("masks", [{"t_lora_min_rank": 1}, {"rank_dropout": 0.5}])
def test_an_orthogonal_beginning_is_nothing_whatever_is_left_out(
    tiny: SDXLModel, masks: dict[str, Any]
) -> None:
    with torch.no_grad():
        base = predict(tiny, [0, 1, 2], None)
    tiny.attach_adapter(replace(SPEC, init="orthogonal", rank=4, ranks={}, **masks))
    with torch.no_grad():
        torch.testing.assert_close(predict(tiny, [0, 1, 2]), base, rtol=1e-4, atol=1e-5)
    for layer in tiny.read_adapter().layers.values():
        if layer.down.dim() == 2:
            gram = layer.down @ layer.down.T
            torch.testing.assert_close(gram, torch.eye(4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["peft", "kohya-diffusers"])
def test_a_file_says_that_its_ranks_follow_the_timestep(
    t_lora: Adapter, tmp_path: Path, format: Any
) -> None:
    file = tmp_path / "t.safetensors"
    write_adapter(file, t_lora, format=format)
    back = read_adapter(file)
    assert back.t_lora_min_rank == 1
    for name, one in t_lora.layers.items():
        # Rank for rank: only their sum would be the same in another order.
        ours, theirs = (
            layer.up.flatten(1)[:, :1] @ layer.down.flatten(1)[:1]
            for layer in (one, back.layers[name])
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert "other programs apply all of them at every step" in tell_readers(file)
    write_adapter(file, t_lora.at_full_rank(), format=format)
    assert "T-LoRA" not in tell_readers(file)


@pytest.mark.parametrize("told", ["0", "-1", "two", "1" * 5000, "1.5", ""])
def test_a_header_that_says_no_rank_is_refused(tiny: SDXLModel, t_lora: Adapter, told: str) -> None:
    broken = t_lora.with_metadata(**{T_LORA_KEY: told})
    with (
        pytest.raises(AdapterError, match="which is no rank"),
        tiny.apply_adapters([(broken, 1.0)]),
    ):
        pass


def test_what_is_made_of_a_t_lora_says_what_is_lost(
    tiny_sdxl: Path, t_lora: Adapter, tmp_path: Path
) -> None:
    told: list[Event] = []

    def is_told() -> bool:
        notes = [one.text for one in told if isinstance(one, Note) and "is a T-LoRA" in one.text]
        told.clear()
        return len(notes) == 1 and "applies all of them at every step" in notes[0]

    file, plain = tmp_path / "t.safetensors", tmp_path / "plain.safetensors"
    write_adapter(file, t_lora)
    write_adapter(plain, t_lora.at_full_rank())
    part = AdapterPart(file, 1.0)
    merged = carry_out(
        Recipe((part, AdapterPart(plain, 0.5))),
        tmp_path / "merged.safetensors",
        observe=told.append,
    )
    assert is_told()
    assert merged.adapter.t_lora_min_rank is None
    resized = resize_adapter(
        file, tmp_path / "thin.safetensors", RankRequest("fixed", 2), observe=told.append
    )
    assert is_told()
    assert resized.adapter.t_lora_min_rank is None
    fuse_into_checkpoint([part], str(tiny_sdxl), tmp_path / "baked", observe=told.append)
    assert is_told()
    form = FileForm(has_equal_ranks=True)
    equal = convert_file(file, tmp_path / "equal.safetensors", form, observe=told.append)
    assert is_told()
    assert equal.t_lora_min_rank is None
    # Other names change nothing of it.
    again = convert_file(file, tmp_path / "names.safetensors", observe=told.append)
    assert not is_told()
    assert again.t_lora_min_rank == 1


def test_a_training_goes_on_from_a_t_lora_as_one_alone(tiny: SDXLModel, t_lora: Adapter) -> None:
    spec = replace(SPEC, text_encoders=True)
    tiny.attach_adapter(spec)
    with pytest.raises(AdapterError, match="t_lora_min_rank = 1, and none is trained here"):
        tiny.load_adapter(t_lora)
    tiny.detach_adapter()
    tiny.attach_adapter(replace(spec, t_lora_min_rank=1))
    with pytest.raises(AdapterError, match="t_lora_min_rank = none, and 1 is trained here"):
        tiny.load_adapter(t_lora.at_full_rank())
    tiny.load_adapter(t_lora)
    torch.testing.assert_close(tiny.read_adapter().norm(), t_lora.norm(), rtol=1e-5, atol=0.0)


def test_a_search_for_merge_weights_refuses_a_t_lora(t_lora: Adapter, tmp_path: Path) -> None:
    files = [tmp_path / "t.safetensors", tmp_path / "plain.safetensors"]
    for file, adapter in zip(files, (t_lora, t_lora.at_full_rank()), strict=True):
        write_adapter(file, adapter)
    read_parts(SearchRequest(files[1], files[1], tmp_path, tmp_path / "out"))
    with pytest.raises(AdapterError, match=r"t\.safetensors is a T-LoRA, fewer of whose ranks"):
        read_parts(SearchRequest(*files, tmp_path, tmp_path / "out"))
