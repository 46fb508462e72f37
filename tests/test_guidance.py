"""Guidance's two halves: rescaled, fitted to each other, and with an adapter in one alone."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import GenerateConfig, LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import StageSkipped
from dreamloom.core.manifests import read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Sampler, Shot
from dreamloom.models.guidance import optimized_scale, scaling_unconditional
from dreamloom.models.lora_schedule import Composition, Curve, LoraSchedule, parse_curve
from dreamloom.models.schedulers import make_scheduler
from dreamloom.models.sdxl import SDXLModel
from looks import psnr_db
from studio_set import claimed

SHOTS = [Shot("a photo of rraj person", 3), Shot("a dog on a beach", 4)]
# The random model answers to prompts faintly.
GUIDANCE = 60.0
Half = Callable[[float], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def adapter(model: SDXLModel) -> Adapter:
    """An adapter that changes pictures a lot."""
    weights = model.attach_adapter(AdapterSpec(2, 2.0, "attention", seed=0))
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in (p for group in weights for p in group.parameters):
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    trained = model.read_adapter()
    model.detach_adapter()
    return trained


def draw(model: SDXLModel, **how: Any) -> list[Image.Image]:
    scheduler, steps = how.pop("scheduler", "ddim"), how.pop("steps", 3)
    return model.sample(SHOTS, Sampler(scheduler, steps, how.pop("guidance", GUIDANCE), **how))


@torch.no_grad()
def draw_by_hand(
    model: SDXLModel,
    sampler: Sampler,
    in_conditional: Half = lambda _: nullcontext(),
    in_unconditional: Half = lambda _: nullcontext(),
) -> list[Image.Image]:
    """Draw as the equations say, each half of guidance in a call of its own."""
    pipeline = model._pipeline
    scheduler = make_scheduler(sampler.scheduler, model._scheduler_config)
    scheduler.set_timesteps(sampler.steps)
    order = list(dict.fromkeys(scheduler.timesteps.tolist()))
    chosen = model.encode_prompts([shot.prompt for shot in SHOTS])
    side = model.advice.resolution_px
    places = side // model.pixels_per_latent
    rng = [torch.Generator("cpu").manual_seed(shot.seed) for shot in SHOTS]
    shape = (1, model.latent_channels, places, places)
    latents = torch.cat([torch.randn(shape, generator=one) for one in rng])
    latents = latents * scheduler.init_noise_sigma
    times = torch.tensor([[side, side, 0, 0, side, side]] * len(SHOTS), dtype=torch.float32)
    low, high = sampler.guidance_interval
    for t in scheduler.timesteps:
        progress = order.index(t.item()) / (len(order) - 1)
        halves = []
        for half, share in ((in_unconditional, 0.0), (in_conditional, 1.0)):
            with half(progress):
                told = {"text_embeds": chosen.pooled * share, "time_ids": times}
                halves.append(
                    pipeline.unet(
                        scheduler.scale_model_input(latents, t),
                        t,
                        encoder_hidden_states=chosen.tokens * share,
                        added_cond_kwargs=told,
                    ).sample
                )
        u, c = halves
        predicted = c
        if low <= progress <= high:
            if sampler.cfg_zero_star:
                dots = torch.stack(
                    [(x * y).sum() / (y * y).sum() for x, y in zip(c, u, strict=True)]
                )
                u = dots[:, None, None, None] * u
            predicted = u + sampler.guidance * (c - u)
            shrink = torch.stack([x.std() / y.std() for x, y in zip(c, predicted, strict=True)])
            share = sampler.guidance_rescale
            predicted = (share * shrink[:, None, None, None] + 1 - share) * predicted
        latents = scheduler.step(predicted, t, latents).prev_sample
    return model._decode(latents, SHOTS)


def assert_alike(ours: Sequence[Image.Image], others: Sequence[Image.Image]) -> None:
    assert all(psnr_db(one, other) > 60 for one, other in zip(ours, others, strict=True))


def assert_unlike(ours: Sequence[Image.Image], others: Sequence[Image.Image]) -> None:
    assert all(psnr_db(one, other) < 60 for one, other in zip(ours, others, strict=True))


def test_rescaled_guidance_draws_what_diffusers_draws(model: SDXLModel, tiny_sdxl: Path) -> None:
    ours = draw(model, scheduler="euler", guidance_rescale=0.7)
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = make_scheduler("euler", model._scheduler_config)
    side = model.advice.resolution_px
    theirs = [
        plain(
            shot.prompt,
            num_inference_steps=3,
            guidance_scale=GUIDANCE,
            guidance_rescale=0.7,
            height=side,
            width=side,
            generator=torch.Generator("cpu").manual_seed(shot.seed),
        ).images[0]
        for shot in SHOTS
    ]
    assert_alike(ours, theirs)
    plainly = draw(model, scheduler="euler")
    assert_unlike(ours, plainly)
    with scaling_unconditional(model._pipeline, False):
        again = draw(model, scheduler="euler")
    assert [one.tobytes() for one in again] == [one.tobytes() for one in plainly]


@pytest.mark.parametrize(
    "how",
    [
        {"cfg_zero_star": True},
        {"cfg_zero_star": True, "guidance_rescale": 0.7, "scheduler": "heun"},
        {"guidance_rescale": 0.7, "guidance_interval": (0.5, 1.0)},
    ],
)
def test_pictures_are_those_of_the_equations(model: SDXLModel, how: dict[str, Any]) -> None:
    sampler = Sampler(how.pop("scheduler", "ddim"), 3, GUIDANCE, **how)
    ours = model.sample(SHOTS, sampler)
    assert_alike(ours, draw_by_hand(model, sampler))
    plain = Sampler(sampler.scheduler, 3, GUIDANCE, sampler.guidance_interval)
    assert_unlike(ours, model.sample(SHOTS, plain))


def test_they_go_together_with_adapters_schedules_and_one_half(
    model: SDXLModel, adapter: Adapter
) -> None:
    sampler = Sampler("ddim", 3, 6.0, (0.0, 0.6), guidance_rescale=0.5, cfg_zero_star=True)
    fading = parse_curve("1@0,0.5@1")
    parts = [(adapter, LoraSchedule(fading, conditional_only=True)), (adapter, 0.25)]
    with model.apply_adapters(parts):
        ours = model.sample(SHOTS, sampler)
    by_hand = draw_by_hand(
        model,
        sampler,
        lambda progress: model.apply_adapters([(adapter, 0.25 + fading.weight(progress))]),
        lambda _: model.apply_adapters([(adapter, 0.25)]),
    )
    assert_alike(ours, by_hand)
    with model.apply_adapters([(adapter, LoraSchedule(fading)), (adapter, 0.25)]):
        assert_unlike(ours, model.sample(SHOTS, sampler))


def test_they_go_together_with_deep_levels_reused(model: SDXLModel) -> None:
    """In the step between, the halves that are fitted are those of the reused levels."""
    halves: list[torch.Tensor] = []

    def watch(unet: Any, inputs: Any, output: Any) -> None:
        halves.append(output[0])

    # Hooked in before ours, it sees the halves as they are.
    hook = model._pipeline.unet.register_forward_hook(watch)
    how = {"steps": 2, "cache_interval": 2, "guidance": 2.0}
    try:
        plain = draw(model, **how)
        fitted = draw(model, **how, cfg_zero_star=True)
    finally:
        hook.remove()
    # The first step computes both alike, and so the second one starts where the fit has led.
    assert torch.equal(halves[0], halves[2])
    assert not torch.equal(halves[1], halves[3])
    assert [one.tobytes() for one in fitted] != [one.tobytes() for one in plain]


def test_a_picture_does_not_depend_on_its_batch(model: SDXLModel) -> None:
    sampler = Sampler("ddim", 3, GUIDANCE, guidance_rescale=0.5, cfg_zero_star=True)
    together, alone = model.sample(SHOTS, sampler), model.sample(SHOTS, sampler, batch=1)
    assert all(psnr_db(one, other) > 45 for one, other in zip(together, alone, strict=True))


# ------------------------------------------------------------------ the mathematics


@given(st.floats(-3, 3), st.integers(0, 9))
def test_the_optimized_scale_finds_the_factor_and_leaves_what_is_across(
    factor: float, seed: int
) -> None:
    """Half of what is added is along u, the rest across: only the part along counts."""
    rng = torch.Generator().manual_seed(seed)
    u, other = torch.randn(2, 3, 2, 4, 4, generator=rng, dtype=torch.float64)
    along = (other * u).sum((1, 2, 3), keepdim=True) / (u * u).sum((1, 2, 3), keepdim=True)
    found = optimized_scale(factor * u + (other - along * u), u)
    assert found.shape == (3, 1, 1, 1)
    assert torch.allclose(found, torch.full_like(found, factor), atol=1e-5)


def test_no_other_scale_leaves_less() -> None:
    c, u = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = optimized_scale(c, u)
    least = (c - found * u).flatten(1).norm(dim=1)
    for step in (-0.1, 0.01, 0.1):
        assert ((c - (found + step) * u).flatten(1).norm(dim=1) > least).all()


def test_nothing_is_divided_by_nothing_or_overflows() -> None:
    zeros, large = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    assert optimized_scale(large.float(), zeros).item() == 1
    assert optimized_scale(large, large).item() == 1


# ------------------------------------------------------------------ sets


@pytest.fixture
def settings() -> GenerateConfig:
    return GenerateConfig(steps=(2,), guidance=3.0, images_per_prompt=1)


def draw_set(
    model: SDXLModel, run: RunFolder, settings: GenerateConfig, *active: Path, **more: Any
) -> Any:
    adapters = [ActiveAdapter(path) for path in active]
    return generate_images(run, model, [Prompt("a dog")], settings, adapters, **more)


def test_manifest_and_record_name_what_was_set(
    model: SDXLModel, settings: GenerateConfig, tmp_path: Path
) -> None:
    set_to = {"guidance_rescale": 0.7, "cfg_zero_star": True}
    run = claimed(tmp_path)
    drawn = draw_set(model, run, settings.model_copy(update=set_to))
    picture = read_image_set(drawn.folder).pictures[0]
    assert (picture.guidance_rescale, picture.cfg_zero_star) == (0.7, True)
    assert picture.sampler == "DDIM, 2 steps, guidance 3, rescaled by 0.7, CFG-Zero*"
    record = run.read_record("generate-pictures")
    assert record is not None
    assert record.settings.items() >= set_to.items()


def test_a_set_that_was_drawn_without_them_is_as_it_was(
    model: SDXLModel, settings: GenerateConfig, tmp_path: Path
) -> None:
    known = {"schedulers", "steps", "guidance", "images_per_prompt", "first_seed"}
    assert set(settings.drawn_with) == known
    drawn = draw_set(model, claimed(tmp_path), settings)
    manifest = (drawn.folder / "manifest.json").read_text()
    assert not any(name in manifest for name in ("rescale", "zero", "conditional"))
    for one in ({"guidance_rescale": 0.1}, {"cfg_zero_star": True}, {"conditional_only": True}):
        assert set(settings.model_copy(update=one).drawn_with) == {*known, *one}


def test_one_adapter_in_one_half_is_a_setting_and_an_option_alike(
    model: SDXLModel, adapter: Adapter, settings: GenerateConfig, tmp_path: Path
) -> None:
    file, run = tmp_path / "one.safetensors", claimed(tmp_path / "run")
    write_adapter(file, adapter, format="peft")
    kept_out = settings.model_copy(update={"conditional_only": True})
    drawn = draw_set(model, run, kept_out, file)
    assert [entry.lora_schedule for entry in drawn.adapters] == ["1@0; conditional only"]
    told: list[Any] = []
    composition = Composition(conditional_only=True)
    draw_set(model, run, settings, file, composition=composition, observe=told.append)
    assert isinstance(told[0], StageSkipped)
    lora_schedule = LoraSchedule(Curve.constant(1.0), conditional_only=True)
    with model.apply_adapters([(adapter, lora_schedule)]):
        by_hand = model.sample([Shot("a dog", 0)], Sampler("ddim", 2, 3.0))
    assert psnr_db(Image.open(drawn.paths()[0]), by_hand[0]) > 60
    # The base model has nothing to keep out, and draws the set that it always drew.
    base = draw_set(model, run, settings, name="base")
    again = draw_set(model, run, kept_out, name="base", observe=told.append)
    assert again == base
    assert isinstance(told[-1], StageSkipped)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance_rescale": 0.7}, "At a guidance of 1 rescaling would change nothing"),
        ({"cfg_zero_star": True}, r"At a guidance of 1 CFG-Zero\* would change nothing"),
    ],
)
def test_without_guidance_they_are_refused(
    model: SDXLModel, settings: GenerateConfig, tmp_path: Path, given: Any, words: str
) -> None:
    unguided = settings.model_copy(update={"guidance": 1.0, **given})
    with pytest.raises(ConfigError, match=words):
        draw_set(model, claimed(tmp_path), unguided)


@pytest.mark.parametrize("given", ["-0.1", "1.5", "yes"])
def test_a_rescaling_outside_its_range_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"generate\.guidance_rescale"):
        load_config(sets=(f"generate.guidance_rescale={given}",))


def test_all_three_are_off_unless_set() -> None:
    assert LoomConfig().generate.unusual == {}
