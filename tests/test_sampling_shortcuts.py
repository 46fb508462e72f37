"""Guidance in an interval and deep levels reused, against loops that know neither."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import GenerateConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.manifests import read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.inference.generate import Prompt, generate_images
from dreamloom.models.base import Sampler, Shot
from dreamloom.models.schedulers import make_scheduler
from dreamloom.models.sdxl import SDXLModel
from looks import psnr_db

SHOTS = [Shot("a photo of rraj person", 3), Shot("a dog on a beach", 4)]
# The random model answers to prompts faintly.
GUIDANCE = 60.0


def draw(model: SDXLModel, **how: Any) -> list[Image.Image]:
    scheduler, steps = how.pop("scheduler", "ddim"), how.pop("steps", 5)
    return model.sample(SHOTS, Sampler(scheduler, steps, how.pop("guidance", GUIDANCE), **how))


@contextmanager
def counting_rows(model: SDXLModel) -> Iterator[list[int]]:
    """Write down with how many rows the denoiser is called."""
    rows: list[int] = []
    hook = model._pipeline.unet.register_forward_pre_hook(
        lambda unet, inputs: rows.append(len(inputs[0]))
    )
    try:
        yield rows
    finally:
        hook.remove()


@torch.no_grad()
def draw_by_hand(
    model: SDXLModel, scheduler_name: str, steps: int, interval: tuple[float, float]
) -> list[Image.Image]:
    """Draw as the equation says: both halves in each step, and one of them left out by weight."""
    pipeline = model._pipeline
    scheduler = make_scheduler(scheduler_name, model._scheduler_config)
    scheduler.set_timesteps(steps)
    order = list(dict.fromkeys(scheduler.timesteps.tolist()))
    chosen = model.encode_prompts([shot.prompt for shot in SHOTS])
    side = model.advice.resolution_px
    places = side // model.pixels_per_latent
    shape = (1, model.latent_channels, places, places)
    rng = [torch.Generator("cpu").manual_seed(shot.seed) for shot in SHOTS]
    latents = torch.cat([torch.randn(shape, generator=one) for one in rng])
    latents = latents * scheduler.init_noise_sigma
    times = torch.tensor([[side, side, 0, 0, side, side]] * len(SHOTS), dtype=torch.float32)
    nothing = chosen.tokens * 0, chosen.pooled * 0
    if not pipeline.config.force_zeros_for_empty_prompt:
        empty = model.encode_prompts([""] * len(SHOTS))
        nothing = empty.tokens, empty.pooled
    for t in scheduler.timesteps:
        predicted = []
        for tokens, pooled in (nothing, (chosen.tokens, chosen.pooled)):
            predicted.append(
                pipeline.unet(
                    scheduler.scale_model_input(latents, t),
                    t,
                    encoder_hidden_states=tokens,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": times},
                ).sample
            )
        progress = order.index(t.item()) / (len(order) - 1)
        weight = GUIDANCE if interval[0] <= progress <= interval[1] else 1.0
        noise = predicted[0] + weight * (predicted[1] - predicted[0])
        latents = scheduler.step(noise, t, latents).prev_sample
    return model._decode(latents, SHOTS)


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        ("ddim", (0.0, 0.5)),
        ("ddim", (0.3, 0.8)),
        ("ddim", (0.5, 1.0)),
        ("euler", (0.3, 0.8)),
        ("pndm", (0.0, 0.5)),
        ("heun", (0.5, 1.0)),
    ],
)
def test_guidance_in_an_interval_is_what_its_equation_says(
    model: SDXLModel, scheduler: str, interval: tuple[float, float]
) -> None:
    ours = draw(model, scheduler=scheduler, guidance_interval=interval)
    by_hand = draw_by_hand(model, scheduler, 5, interval)
    everywhere = draw(model, scheduler=scheduler)
    for mine, theirs, whole in zip(ours, by_hand, everywhere, strict=True):
        assert psnr_db(mine, theirs) > 60
        assert psnr_db(mine, whole) < 60


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_a_base_that_encodes_the_empty_prompt_does_so(
    model: SDXLModel, interval: tuple[float, float]
) -> None:
    pipeline = model._pipeline
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        ours = draw(model, guidance_interval=interval)
        by_hand = draw_by_hand(model, "ddim", 5, interval)
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    zeros = draw(model, guidance_interval=interval)
    for mine, theirs, other in zip(ours, by_hand, zeros, strict=True):
        assert psnr_db(mine, theirs) > 60
        assert psnr_db(mine, other) < 60


def test_steps_outside_the_interval_cost_half(model: SDXLModel) -> None:
    with counting_rows(model) as rows:
        draw(model, guidance_interval=(0.25, 0.75))
    assert rows == [2, 4, 4, 4, 2]


def test_without_guidance_an_interval_changes_nothing(model: SDXLModel) -> None:
    plain = draw(model, guidance=1.0)
    cut = draw(model, guidance=1.0, guidance_interval=(0.5, 1.0))
    assert [one.tobytes() for one in cut] == [one.tobytes() for one in plain]


def test_the_next_drawing_is_guided_again(model: SDXLModel) -> None:
    before = draw(model)
    draw(model, guidance_interval=(0.0, 0.3), cache_interval=2)
    assert [one.tobytes() for one in draw(model)] == [one.tobytes() for one in before]


@contextmanager
def feeding_old_depths(model: SDXLModel, is_due: Callable[[int], bool]) -> Iterator[None]:
    """Compute every level always, and hand the first one what an earlier step found below it."""
    unet = model._pipeline.unet
    state: dict[str, Any] = {"call": -1, "kept": None}

    def count(module: Any, inputs: Any) -> None:
        state["call"] += 1

    def replace(module: Any, inputs: Any, named: dict[str, Any]) -> Any:
        now: Tensor = named["hidden_states"]
        if is_due(state["call"]):
            state["kept"] = now
            return None
        return inputs, {**named, "hidden_states": state["kept"][-len(now) :]}

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(count).remove)
        stack.callback(
            unet.up_blocks[-1].register_forward_pre_hook(replace, with_kwargs=True).remove
        )
        yield


@pytest.mark.parametrize("interval", [2, 3])
def test_deep_levels_are_those_of_the_last_full_step(model: SDXLModel, interval: int) -> None:
    ours = draw(model, steps=7, cache_interval=interval)
    with feeding_old_depths(model, lambda call: call % interval == 0):
        by_hand = draw(model, steps=7)
    in_full = draw(model, steps=7)
    for mine, theirs, whole in zip(ours, by_hand, in_full, strict=True):
        assert psnr_db(mine, theirs) > 60
        assert mine.tobytes() != whole.tobytes()


def test_both_together_keep_the_half_that_is_left(model: SDXLModel) -> None:
    """Guided at steps 2 and 3 of 0 to 6: step 2 knows no unconditional half, so it is in full."""
    how = {"steps": 7, "guidance_interval": (0.3, 0.55)}
    with counting_rows(model) as rows:
        ours = draw(model, cache_interval=4, **how)
    assert rows == [2, 2, 4, 4, 2, 2, 2]
    with feeding_old_depths(model, lambda call: call in (0, 2, 4)):
        by_hand = draw(model, **how)
    for mine, theirs in zip(ours, by_hand, strict=True):
        assert psnr_db(mine, theirs) > 60


def test_deep_levels_are_computed_that_rarely_and_left_as_they_were(model: SDXLModel) -> None:
    unet = model._pipeline.unet
    inner = unet.mid_block.resnets[0]
    calls: list[int] = []
    hook = inner.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    try:
        draw(model, steps=7, cache_interval=3)
        assert len(calls) == 3
        # Heun looks twice at each step but the last, and both times in full or both times not.
        calls.clear()
        draw(model, scheduler="heun", steps=4, cache_interval=2)
        assert len(calls) == 3
    finally:
        hook.remove()
    assert not any("forward" in vars(block) for block in [*unet.down_blocks, *unet.up_blocks])


def test_a_picture_does_not_depend_on_its_batch(model: SDXLModel) -> None:
    sampler = Sampler("ddim", 5, GUIDANCE, (0.2, 0.8), 2)
    together = model.sample(SHOTS, sampler)
    alone = model.sample(SHOTS, sampler, batch=1)
    for one, other in zip(together, alone, strict=True):
        assert psnr_db(one, other) > 45


@pytest.fixture
def settings() -> GenerateConfig:
    return GenerateConfig(steps=(3,), guidance=3.0, images_per_prompt=1)


def draw_set(model: SDXLModel, folder: Path, settings: GenerateConfig) -> Any:
    run = RunFolder(folder)
    run.claim()
    return generate_images(run, model, [Prompt("a dog")], settings)


def test_a_set_says_how_it_was_drawn_where_that_was_not_in_full(
    model: SDXLModel, settings: GenerateConfig, tmp_path: Path
) -> None:
    plain = draw_set(model, tmp_path / "plain", settings)
    short = settings.model_copy(update={"guidance_interval": (0.0, 0.5), "cache_interval": 2})
    drawn = draw_set(model, tmp_path / "short", short)
    manifest = (drawn.folder / "manifest.json").read_text()
    assert '"cache_interval": 2' in manifest
    assert read_image_set(drawn.folder).pictures[0].guidance_interval == (0.0, 0.5)
    assert "interval" not in (plain.folder / "manifest.json").read_text()
    assert plain.pictures[0].sampler == "DDIM, 3 steps, guidance 3"
    assert (
        drawn.pictures[0].sampler
        == "DDIM, 3 steps, guidance 3 from 0 to 0.5, deep levels every 2 steps"
    )
    first, second = (np.asarray(Image.open(one.paths()[0])) for one in (plain, drawn))
    assert (first != second).any()


def test_settings_are_remembered_as_before_there_were_shortcuts(settings: GenerateConfig) -> None:
    known = {"schedulers", "steps", "guidance", "images_per_prompt", "first_seed"}
    assert set(settings.drawn_with) == known
    short = settings.model_copy(update={"cache_interval": 2})
    assert set(short.drawn_with) == {*known, "cache_interval"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("generate.guidance_interval=[0.8,0.2]", "begin below its end"),
        ("generate.guidance_interval=[0,2]", "less than or equal to 1"),
        ("generate.cache_interval=0", "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(sets=(given,))
