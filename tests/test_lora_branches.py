"""Adapters whose weights follow a drawing, against drawings that are made by hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, AdapterKind, Layer
from dreamloom.models.base import AdapterSpec, Framing, Model, Sampler, Shot, TargetModules
from dreamloom.models.families import load_model
from dreamloom.models.lora_branches import Dense, LowRank, find_moment
from dreamloom.models.lora_schedule import (
    START,
    Composition,
    Curve,
    LoraSchedule,
    Moment,
    Strength,
    parse_curve,
    set_lora_schedules,
    share_layers,
)
from dreamloom.models.schedulers import SCHEDULERS, make_scheduler
from dreamloom.models.sdxl import SDXLModel
from looks import psnr_db

FAST = Sampler("ddim", steps=4, guidance=4.0)
SHOT = Shot("a photo of a dog", 3)
# Two roundings of one picture agree to 80 dB and more here; what is told apart, to less than 40.
SAME_DB = 60
HALVES = parse_curve("1@0,1@0.5,0@0.5")
HALVES_OF_08 = parse_curve("0.8@0,0.8@0.5,0@0.5")


@pytest.fixture(scope="module")
def tiny(tiny_sdxl: Path) -> SDXLModel:
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    return model


def make_adapter(
    model: Model, seed: int, target_modules: TargetModules = "all", text: bool = False
) -> Adapter:
    spec = AdapterSpec(
        rank=2, alpha=2.0, target_modules=target_modules, seed=seed, text_encoders=text
    )
    model.attach_adapter(spec)
    fresh = model.read_adapter()
    model.detach_adapter()
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: Layer(layer.down, 0.5 * torch.randn(layer.up.shape, generator=rng))
            for name, layer in fresh.layers.items()
        }
    )


@pytest.fixture(scope="module")
def pair(tiny: SDXLModel) -> tuple[Adapter, Adapter]:
    return make_adapter(tiny, 1), make_adapter(tiny, 2)


Parts = Sequence[tuple[Adapter, Strength]]


def draw(model: Model, parts: Parts, sampler: Sampler = FAST) -> Image.Image:
    with model.apply_adapters(parts):
        return model.sample([SHOT], sampler)[0]


@torch.no_grad()
def draw_by_hand(
    model: SDXLModel,
    worn_at: Callable[[Moment], Parts],
    sampler: Sampler = FAST,
    conditional_only: bool = False,
) -> Image.Image:
    """Draw call by call, each with plainly worn adapters and each half of guidance on its own."""
    pipeline = model._pipeline
    side = model.advice.resolution_px
    tokens = model.encode_prompts([SHOT.prompt])
    nothing = type(tokens)(torch.zeros_like(tokens.tokens), torch.zeros_like(tokens.pooled))
    scheduler = make_scheduler(sampler.scheduler, model._scheduler_config)
    scheduler.set_timesteps(sampler.steps)
    generator = torch.Generator("cpu").manual_seed(SHOT.seed)
    latents = scheduler.init_noise_sigma * torch.randn(
        (1, 4, side // 8, side // 8), generator=generator
    )
    places = sorted({float(t) for t in scheduler.timesteps}, reverse=True)
    takes_dice = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        framing, parts = (
            [Framing((side, side))],
            worn_at(Moment(places.index(float(t)), len(places))),
        )
        with model.apply_adapters(parts):
            wished = model.predict(noisy, t, tokens, framing)
            free = model.predict(noisy, t, nothing, framing)
        if conditional_only:
            free = model.predict(noisy, t, nothing, framing)
        guided = free + sampler.guidance * (wished - free)
        rng = {"generator": generator} if takes_dice else {}
        latents = scheduler.step(guided, t, latents, **rng, return_dict=False)[0]
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    drawn: Image.Image = pipeline.image_processor.postprocess(pixels)[0]
    return drawn


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "heun", "unipc"])
def test_a_constant_schedule_draws_what_a_plain_weight_draws(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter], scheduler: str
) -> None:
    sampler = Sampler(scheduler, 4, 4.0)
    plain = draw(tiny, [(pair[0], 0.8)], sampler)
    assert (
        psnr_db(draw(tiny, [(pair[0], LoraSchedule(parse_curve("0.8@0,0.8@1")))], sampler), plain)
        > SAME_DB
    )
    assert psnr_db(draw(tiny, [], sampler), plain) < 40


@pytest.mark.parametrize("kind", ["dora", pytest.param("loha", marks=pytest.mark.slow)])
def test_other_kinds_than_lora_follow_a_schedule_too(tiny: SDXLModel, kind: AdapterKind) -> None:
    for group in tiny.attach_adapter(AdapterSpec(2, 2.0, "attention", 1, kind=kind)):
        for number, weight in enumerate(group.parameters):
            rng = torch.Generator().manual_seed(number)
            weight.data += 0.4 * torch.randn(weight.shape, generator=rng)
    adapter = tiny.read_adapter()
    tiny.detach_adapter()
    assert adapter.kind == kind
    short = Sampler("ddim", 2, 4.0)
    plain, base = draw(tiny, [(adapter, 0.8)], short), draw(tiny, [], short)
    assert psnr_db(base, plain) < 40
    with tiny.apply_adapters([(adapter, LoraSchedule(parse_curve("0.8@0,0.8@0.9,0@0.9")))]):
        noisy = torch.ones(1, 4, 8, 8)
        asked = noisy, torch.tensor([500]), tiny.encode_prompts(["a dog"]), [Framing((64, 64))]
        at_first = tiny.predict(*asked)
    with tiny.apply_adapters([(adapter, 0.8)]):
        torch.testing.assert_close(at_first, tiny.predict(*asked), rtol=1e-3, atol=1e-4)
    assert (
        psnr_db(draw(tiny, [(adapter, LoraSchedule(Curve.constant(0.8)))], short), plain) > SAME_DB
    )
    assert (
        draw(tiny, [(adapter, LoraSchedule(Curve.constant(0.0)))], short).tobytes()
        == base.tobytes()
    )


def test_a_weight_of_0_throughout_draws_the_bases_picture_bit_for_bit(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers that somebody listens to are multiplied one by one, which may round otherwise.
    monkeypatch.setattr("dreamloom.models.sdxl.fastest_layout", lambda *parts: nullcontext())
    base = draw(tiny, [])
    for conditional_only in (False, True):
        lora_schedule = LoraSchedule(Curve.constant(0.0), conditional_only=conditional_only)
        assert draw(tiny, [(pair[0], lora_schedule)]).tobytes() == base.tobytes()


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "heun", "euler_a"])
def test_a_schedule_draws_what_is_drawn_by_hand(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter], scheduler: str
) -> None:
    """PNDM and Heun call the denoiser more often than there are steps; ancestors roll dice."""
    sampler = Sampler(scheduler, 4, 3.0)
    falling, late = parse_curve("1.2@0,-0.2@1"), parse_curve("0@0,0@0.4,1@0.4")

    def worn_at(moment: Moment) -> Parts:
        # At the four steps the progress is 0, 1/3, 2/3 and 1.
        return [
            (pair[0], [1.2, 1.2 - 1.4 / 3, 1.2 - 2.8 / 3, -0.2][moment.step]),
            (pair[1], [0, 0, 1, 1][moment.step]),
        ]

    ours = draw(tiny, [(pair[0], LoraSchedule(falling)), (pair[1], LoraSchedule(late))], sampler)
    assert psnr_db(ours, draw_by_hand(tiny, worn_at, sampler)) > SAME_DB
    assert psnr_db(ours, draw(tiny, [(pair[0], 1.2), (pair[1], 0.0)], sampler)) < 40


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [
        ("ddim", 4, [0, 1, 2, 3]),
        ("pndm", 4, [0, 1, 1, 2, 3]),
        ("heun", 3, [0, 1, 1, 2, 2]),
        ("heun", 1, [0]),
        ("dpm++karras", 4, [0, 1, 2, 3]),
    ],
)
def test_the_step_is_read_from_the_timestep_not_counted(
    tiny: SDXLModel,
    pair: tuple[Adapter, Adapter],
    scheduler: str,
    steps: int,
    expected: list[int],
) -> None:
    seen: list[Moment] = []

    class Spy(LoraSchedule):
        def weight(self, layer: str, moment: Moment) -> float:
            if not seen or layer == next(iter(pair[0].layers)):
                seen.append(moment)
            return super().weight(layer, moment)

    draw(tiny, [(pair[0], Spy(HALVES))], Sampler(scheduler, steps, 2.0))
    seen = [moment for moment in seen if moment is not START]
    assert seen == [Moment(step, steps) for step in expected]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_every_scheduler_goes_from_the_first_step_to_the_last(name: str, steps: int) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = make_scheduler(name, {**config, "steps_offset": 1, "timestep_spacing": "leading"})
    scheduler.set_timesteps(steps)
    met = [find_moment(t, scheduler.timesteps) for t in scheduler.timesteps]
    assert [moment.step for moment in met] == sorted(moment.step for moment in met)
    assert {moment.step for moment in met} == set(range(steps))
    assert {moment.steps for moment in met} == {steps}


def test_steps_of_one_timestep_are_one() -> None:
    timesteps = torch.tensor([999.0, 500.0, 500.0, 1.5])
    assert [find_moment(t, timesteps) for t in timesteps] == [
        Moment(0, 3),
        Moment(1, 3),
        Moment(1, 3),
        Moment(2, 3),
    ]


def test_switch_draws_what_alternating_by_hand_draws(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    sampler = Sampler("euler", 5, 4.0)
    lora_schedules = set_lora_schedules(pair, [1.0, 0.7], Composition("switch", every=2))
    ours = draw(tiny, list(zip(pair, lora_schedules, strict=True)), sampler)

    def worn_at(moment: Moment) -> Parts:
        turns = [(pair[0], 1.0), (pair[0], 1.0), (pair[1], 0.7), (pair[1], 0.7), (pair[0], 1.0)]
        return [turns[moment.step]]

    assert psnr_db(ours, draw_by_hand(tiny, worn_at, sampler)) > SAME_DB
    assert psnr_db(ours, draw(tiny, [(pair[0], 1.0), (pair[1], 0.7)], sampler)) < 40


def test_k_lora_draws_what_each_layers_winner_draws_by_hand(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    lora_schedules = set_lora_schedules(pair, [1.0, 1.0], Composition("k-lora"))
    ours = draw(tiny, list(zip(pair, lora_schedules, strict=True)))
    table = share_layers(*pair)
    kept: list[int] = []

    def worn_at(moment: Moment) -> Parts:
        subject = {n: x for n, x in pair[0].layers.items() if table[n] >= moment.progress}
        style = {n: x for n, x in pair[1].layers.items() if table[n] < moment.progress}
        kept.append(len(subject))
        return [(Adapter(subject), 1.0), (Adapter(style), 1.0)]

    assert psnr_db(ours, draw_by_hand(tiny, worn_at)) > SAME_DB
    assert kept[0] > kept[1] > kept[-1] == 0


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_the_unconditional_half_sees_the_base_model(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter], scheduler: str
) -> None:
    sampler = Sampler(scheduler, 4, 4.0)
    lora_schedule = LoraSchedule(Curve.constant(0.8), conditional_only=True)
    ours = draw(tiny, [(pair[0], lora_schedule)], sampler)
    by_hand = draw_by_hand(tiny, lambda _: [(pair[0], 0.8)], sampler, conditional_only=True)
    assert psnr_db(ours, by_hand) > SAME_DB
    assert psnr_db(ours, draw(tiny, [(pair[0], 0.8)], sampler)) < 40


def test_without_guidance_there_is_no_half_to_leave_out(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    sampler = Sampler("ddim", 3, 1.0)
    lora_schedule = LoraSchedule(Curve.constant(0.8), conditional_only=True)
    plain = draw(tiny, [(pair[0], 0.8)], sampler)
    assert psnr_db(draw(tiny, [(pair[0], lora_schedule)], sampler), plain) > SAME_DB


def test_a_scheduled_picture_does_not_depend_on_its_batch(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    shots = [Shot("a photo of a dog", 0), Shot("a person", 1), SHOT]
    with tiny.apply_adapters(
        [(pair[0], LoraSchedule(HALVES, conditional_only=True)), (pair[1], 0.5)]
    ):
        together = tiny.sample(shots, FAST, batch=3)
        one_by_one = tiny.sample(shots, FAST, batch=1)
    for first, second in zip(together, one_by_one, strict=True):
        assert psnr_db(first, second) > SAME_DB


def list_state(model: SDXLModel) -> Iterator[tuple[str, bytes]]:
    for name in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(model._pipeline, name)
        for key, value in module.state_dict().items():
            yield f"{name}.{key}", value.contiguous().view(torch.uint8).numpy().tobytes()
    for module in model._pipeline.unet.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_base_is_as_it_was_even_if_drawing_fails(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    before, picture = dict(list_state(tiny)), draw(tiny, [])
    foreign = Adapter({"unet.mid_block.nowhere": Layer(torch.ones(1, 4), torch.ones(4, 1))})
    lora_schedule = LoraSchedule(HALVES)
    with (
        pytest.raises(AdapterError, match="does not fit"),
        tiny.apply_adapters([(pair[0], lora_schedule), (foreign, lora_schedule)]),
    ):
        pass
    with (
        pytest.raises(ZeroDivisionError),
        tiny.apply_adapters([(pair[0], lora_schedule), (pair[1], 0.3)]),
    ):
        tiny.sample([SHOT], FAST, on_picture=lambda done, total: done // 0)
    draw(tiny, [(pair[0], lora_schedule), (pair[1], 0.3)])
    assert dict(list_state(tiny)) == before
    assert draw(tiny, []).tobytes() == picture.tobytes()


def test_outside_a_drawing_a_schedule_stands_at_its_beginning(
    tiny: SDXLModel, pair: tuple[Adapter, Adapter]
) -> None:
    side = tiny.advice.resolution_px
    asked = (
        torch.ones(2, 4, side // 8, side // 8),
        torch.tensor([10, 900]),
        tiny.encode_prompts(["a dog", "a person"]),
        [Framing((side, side))] * 2,
    )
    with tiny.apply_adapters([(pair[0], 1.0)]), torch.no_grad():
        expected = tiny.predict(*asked)
    with (
        tiny.apply_adapters([(pair[0], LoraSchedule(HALVES, conditional_only=True))]),
        torch.no_grad(),
    ):
        torch.testing.assert_close(tiny.predict(*asked), expected, rtol=1e-3, atol=1e-4)
        tiny.sample([SHOT], FAST)
        torch.testing.assert_close(tiny.predict(*asked), expected, rtol=1e-3, atol=1e-4)


def test_text_encoders_are_applied_at_the_strongest_weight(tiny: SDXLModel) -> None:
    adapter = make_adapter(tiny, 5, text=True)
    assert any(name.startswith("text_encoder_2.") for name in adapter.layers)
    base = tiny.encode_prompts([SHOT.prompt])
    with tiny.apply_adapters([(adapter, 0.7)]):
        plain = tiny.encode_prompts([SHOT.prompt])
    with tiny.apply_adapters([(adapter, LoraSchedule(parse_curve("0@0,0.7@1")))]):
        scheduled = tiny.encode_prompts([SHOT.prompt])
    assert (plain.tokens - base.tokens).abs().max() > 0.01
    torch.testing.assert_close(scheduled.tokens, plain.tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scheduled.pooled, plain.pooled, rtol=1e-3, atol=1e-4)


def test_an_empty_prompt_that_is_encoded_sees_the_base_model(tiny_sdxl: Path) -> None:
    """Bases that encode an empty prompt for the unconditional half, instead of taking zeros."""
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    model._pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    adapter = make_adapter(model, 5, text=True)
    with model.apply_adapters([]):
        nothing = model.encode_prompts([""])
    told: list[torch.Tensor] = []
    hook = model._pipeline.unet.register_forward_pre_hook(
        lambda _, inputs, named: told.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    draw(model, [(adapter, LoraSchedule(Curve.constant(1.0), conditional_only=True))])
    assert torch.equal(told[-1][:1], nothing.tokens)
    draw(model, [(adapter, LoraSchedule(Curve.constant(1.0)))])
    assert not torch.allclose(told[-1][:1], nothing.tokens, atol=1e-3)
    hook.remove()


def test_a_half_precision_base_follows_schedules_beside_plain_adapters(tiny_sdxl: Path) -> None:
    half = load_model(str(tiny_sdxl), Runtime(torch.device("cpu"), torch.bfloat16))
    assert isinstance(half, SDXLModel)
    pair = make_adapter(half, 1, "attention"), make_adapter(half, 2, "attention")
    before, rows = dict(list_state(half)), torch.ones(1, 4, 8, 8)
    asked = rows, torch.tensor([500]), half.encode_prompts(["a dog"]), [Framing((64, 64))]

    def predict(first: Strength) -> torch.Tensor:
        with half.apply_adapters([(pair[0], first), (pair[1], 0.6)]), torch.no_grad():
            return half.predict(*asked).float()

    plain, scheduled = predict(0.8), predict(LoraSchedule(HALVES_OF_08))
    nothing, alone = predict(LoraSchedule(Curve.constant(0.0))), predict(0.0)
    # Eight bits of precision: the two ways of adding up differ by roundings.
    apart = (alone - plain).norm()
    assert (scheduled - plain).norm() < 0.1 * apart
    assert (nothing - alone).norm() < 0.1 * apart
    assert dict(list_state(half)) == before


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_factors_out_of_half_precisions_range_are_balanced(kernel: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    ones = [1] * len(kernel)
    down = torch.randn(4, 6, *kernel, generator=rng)
    up = torch.randn(5, 4, *ones, generator=rng)
    module = nn.Conv2d(6, 5, 3, stride=2, padding=1) if kernel else nn.Linear(6, 5)
    module.half()
    rows = torch.randn(3, 6, *[8] * len(kernel), generator=rng).half()
    lopsided = Layer(2.0**20 * down, 2.0**-20 * up)
    assert torch.isinf(lopsided.down.half()).any()
    found = LowRank(lopsided, module.weight)(module, rows)
    dense = Dense(Layer(down, up).update(), module.weight)(module, rows)
    assert found.shape == module(rows).shape
    torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)
    zero = LowRank(Layer(torch.zeros_like(down), up), module.weight)(module, rows)
    assert not zero.any()
