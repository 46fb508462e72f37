"""The family contract, held by SDXL in a small random form and by picturebook."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch.nn.functional import mse_loss

from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import AdapterError, BaseModelError, ConfigError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Framing, Model, Sampler, Shot, WeightGroup
from dreamloom.models.families import load_model
from dreamloom.models.loading import fingerprint_weights
from dreamloom.models.schedulers import SCHEDULERS, make_scheduler
from dreamloom.models.sdxl import SDXLModel
from dreamloom.models.target_modules import list_layers
from looks import psnr_db

FAST = Sampler("ddim", steps=3, guidance=4.0)


@pytest.fixture(scope="module", params=["tiny_sdxl", "picturebook"])
def model(request: pytest.FixtureRequest, tiny_sdxl: Path) -> Model:
    base = "picturebook" if request.param == "picturebook" else str(tiny_sdxl)
    return load_model(base, pick_runtime("cpu"))


@pytest.fixture(scope="module")
def tiny(tiny_sdxl: Path) -> SDXLModel:
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    return model


def weights_of(model: SDXLModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._pipeline.unet.state_dict().items()}


def flat(groups: list[WeightGroup]) -> list[torch.nn.Parameter]:
    return [weight for group in groups for weight in group.parameters]


def make_adapter(
    model: Model, strength: float = 0.2, seed: int = 0, target_modules: str = "all"
) -> Adapter:
    model.attach_adapter(AdapterSpec(rank=2, alpha=2.0, target_modules=target_modules, seed=seed))
    fresh = model.read_adapter()
    model.detach_adapter()
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: Layer(layer.down, strength * torch.randn(layer.up.shape, generator=rng))
            for name, layer in fresh.layers.items()
        }
    )


def test_a_loaded_model_keeps_the_contract(model: Model) -> None:
    assert isinstance(model, Model)
    assert len(model.identity.fingerprint) == 64
    assert set(model.schedulers) == set(SCHEDULERS)


def test_encoding_gives_latents_of_the_models_own_size(model: Model) -> None:
    side = model.advice.resolution_px
    latents = model.encode_images(torch.zeros(2, 3, side, side))
    assert latents.mean.shape == latents.deviation.shape
    assert latents.mean.shape[-1] == side // model.pixels_per_latent
    assert (latents.deviation > 0).all()


def test_prediction_has_the_shape_of_the_latents(model: Model) -> None:
    side = model.advice.resolution_px
    latents = model.encode_images(torch.zeros(2, 3, side, side)).mean
    prompts = model.encode_prompts(["a dog", "a cat"])
    assert len(prompts) == 2
    timesteps = torch.tensor([10, 900])
    noisy = model.add_noise(latents, torch.randn_like(latents), timesteps)
    rows = prompts.take(torch.tensor([1, 0]))
    predicted = model.predict(noisy, timesteps, rows, [Framing((side, side))] * 2)
    assert predicted.shape == latents.shape


def test_each_image_is_predicted_with_its_own_framing(model: Model) -> None:
    side = model.advice.resolution_px
    latents = model.encode_images(torch.zeros(2, 3, side, side)).mean
    prompts = model.encode_prompts(["a dog"]).take(torch.tensor([0, 0]))
    at = torch.tensor([500, 500])
    plain, cut = Framing((side, side)), Framing((side, 2 * side), (0, side // 2))
    both = model.predict(latents, at, prompts, [plain, cut])
    alone = model.predict(latents[:1], at[:1], prompts.take(torch.tensor([0])), [cut])
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    assert mse_loss(both[0], both[1]) > 0


def test_signal_to_noise_falls_with_the_timestep(model: Model) -> None:
    snr = model.snr(torch.arange(0, model.train_timesteps, 100))
    assert (snr[1:] < snr[:-1]).all()
    assert (snr > 0).all()


def test_the_same_seed_draws_the_same_picture_whatever_the_batch(model: Model) -> None:
    shots = [Shot("a photo of a person", seed) for seed in range(3)]
    together = model.sample(shots, FAST, batch=3)
    one_by_one = model.sample(shots, FAST, batch=1)
    for first, second in zip(together, one_by_one, strict=True):
        assert psnr_db(first, second) > 45
    assert psnr_db(together[0], together[1]) < 45


def test_drawing_tells_its_progress(model: Model) -> None:
    told: list[tuple[int, int]] = []
    shots = [Shot("a cat", seed) for seed in range(3)]
    model.sample(shots, FAST, batch=2, on_picture=lambda done, total: told.append((done, total)))
    assert told == [(2, 3), (3, 3)]


def test_a_fresh_lora_changes_nothing_and_leaves_no_trace(model: Model) -> None:
    side = model.advice.resolution_px
    latents = model.encode_images(torch.zeros(1, 3, side, side)).mean
    prompts, at = model.encode_prompts(["a dog"]), torch.tensor([300])
    framing = [Framing((side, side))]
    before = model.predict(latents, at, prompts, framing)
    weights = flat(
        model.attach_adapter(AdapterSpec(rank=4, alpha=4.0, target_modules="all", seed=1))
    )
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in weights)
    # Frozen weights lie otherwise now, and their products are rounded otherwise.
    found = model.predict(latents, at, prompts, framing)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)
    model.detach_adapter()
    assert torch.equal(model.predict(latents, at, prompts, framing), before)


def test_a_loras_first_weights_depend_on_its_seed_alone(model: Model) -> None:
    found = []
    for seed, disturbance in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(disturbance)
        model.attach_adapter(AdapterSpec(rank=2, alpha=2.0, target_modules="attention", seed=seed))
        found.append(next(iter(model.read_adapter().layers.values())).down)
        model.detach_adapter()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_alpha_is_folded_into_what_is_read(tiny: SDXLModel) -> None:
    weights = flat(
        tiny.attach_adapter(AdapterSpec(rank=2, alpha=6.0, target_modules="attention", seed=0))
    )
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0.5)
    layer = next(iter(tiny.read_adapter().layers.values()))
    tiny.detach_adapter()
    torch.testing.assert_close(layer.up, torch.full_like(layer.up, 0.5 * 6.0 / 2))


def test_the_lora_can_be_switched_off_for_a_block(tiny: SDXLModel) -> None:
    side = tiny.advice.resolution_px
    latents = tiny.encode_images(torch.zeros(1, 3, side, side)).mean
    prompts, at = tiny.encode_prompts(["a dog"]), torch.tensor([300])
    framing = [Framing((side, side))]
    before = tiny.predict(latents, at, prompts, framing)
    for weight in flat(
        tiny.attach_adapter(AdapterSpec(rank=2, alpha=2.0, target_modules="all", seed=0))
    ):
        torch.nn.init.normal_(weight.data, std=0.3)
    assert mse_loss(tiny.predict(latents, at, prompts, framing), before) > 1e-4
    with tiny.disable_adapter():
        found = tiny.predict(latents, at, prompts, framing)
        torch.testing.assert_close(found, before, rtol=0, atol=1e-4)
    assert mse_loss(tiny.predict(latents, at, prompts, framing), before) > 1e-4
    tiny.detach_adapter()


def test_recomputing_any_levels_gives_the_same_gradients(tiny: SDXLModel) -> None:
    side = tiny.advice.resolution_px
    latents = tiny.encode_images(torch.zeros(1, 3, side, side)).mean
    prompts, at = tiny.encode_prompts(["a dog"]), torch.tensor([300])
    gradients = []
    for gradient_checkpointing in ("none", "high", "low", "full"):
        spec = AdapterSpec(2, 2.0, "attention", 0)
        weights = flat(tiny.attach_adapter(spec, gradient_checkpointing))
        tiny.predict(latents, at, prompts, [Framing((side, side))]).square().mean().backward()
        gradients.append([w.grad.clone() for w in weights if w.grad is not None])
        tiny.detach_adapter()
    assert gradients[0]
    for kept, *recomputed in zip(*gradients, strict=True):
        for gradient in recomputed:
            torch.testing.assert_close(gradient, kept, rtol=1e-5, atol=1e-8)


def test_applied_adapters_change_pictures_and_leave_the_base_bit_for_bit(tiny: SDXLModel) -> None:
    adapter, before = make_adapter(tiny), weights_of(tiny)
    shots = [Shot("a dog", 0)]
    plain = tiny.sample(shots, FAST)[0]
    with tiny.apply_adapters([(adapter, 1.0)]):
        active = tiny.sample(shots, FAST)[0]
    assert psnr_db(plain, active) < 40
    after = weights_of(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert psnr_db(tiny.sample(shots, FAST)[0], plain) == float("inf")


def test_the_base_comes_back_even_if_the_block_fails(tiny: SDXLModel) -> None:
    before = weights_of(tiny)
    with pytest.raises(ZeroDivisionError), tiny.apply_adapters([(make_adapter(tiny), 1.0)]):
        _ = 1 / 0
    after = weights_of(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_half_precision_base_keeps_adapters_beside_its_weights(tiny_sdxl: Path) -> None:
    half = load_model(str(tiny_sdxl), Runtime(torch.device("cpu"), torch.bfloat16))
    assert isinstance(half, SDXLModel)
    adapter = make_adapter(half, strength=1e-3)
    before = weights_of(half)
    with half.apply_adapters([(adapter, 0.5), (adapter, 0.5)]):
        lora_branches = [
            name for name, _ in half._pipeline.unet.named_parameters() if "lora_A" in name
        ]
        assert len(lora_branches) == 2 * len(adapter.layers)
    after = weights_of(half)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_of_another_base_is_refused_with_a_layers_name(tiny: SDXLModel) -> None:
    foreign = Adapter({"unet.mid_block.nowhere": Layer(torch.ones(1, 4), torch.ones(4, 1))})
    complaint = r"does not fit .* unet\.mid_block\.nowhere"
    with pytest.raises(AdapterError, match=complaint), tiny.apply_adapters([(foreign, 1.0)]):
        pass
    name = next(iter(make_adapter(tiny).layers))
    misshapen = Adapter({name: Layer(torch.ones(1, 3), torch.ones(3, 1))})
    with (
        pytest.raises(AdapterError, match="another shape"),
        tiny.apply_adapters([(misshapen, 1.0)]),
    ):
        pass


@pytest.mark.parametrize("base", ["tiny", "picturebook"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_plain_diffusers_draws_the_same_picture(
    base: str, scheduler: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """The published promise: adapter and base load in plain diffusers and draw what we draw."""
    model = load_model(str(tiny_sdxl) if base == "tiny" else base, pick_runtime("cpu"))
    adapter = make_adapter(model, strength=0.05)
    write_adapter(tmp_path / "adapter.safetensors", adapter)
    prompt, seed, steps, guidance = "a photo of rraj person", 7, 6, 4.0
    with model.apply_adapters([(adapter, 1.0)]):
        ours = model.sample([Shot(prompt, seed)], Sampler(scheduler, steps, guidance))[0]

    from dreamloom.picturebook import weights_folder

    folder = tiny_sdxl if base == "tiny" else weights_folder()
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).to(
        torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    import diffusers

    class_name, _ = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    theirs = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=model.advice.resolution_px,
        width=model.advice.resolution_px,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    assert psnr_db(ours, theirs) > 45


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_clips_latents(name: str) -> None:
    """DDIM's own default clips to [-1, 1] and draws pale noise where a base's file is silent."""
    silent_file = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = make_scheduler(name, silent_file)
    assert not scheduler.config.get("clip_sample", False)
    outspoken = make_scheduler("ddim", {**silent_file, "clip_sample": True})
    assert outspoken.config["clip_sample"]


def test_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no scheduler 'ddin'.*ddim, ddpm, pndm"):
        make_scheduler("ddin", {})


def test_target_modules_widens_from_attention_to_all(tiny: SDXLModel) -> None:
    unet = tiny._pipeline.unet
    attention, linear, everything = (
        set(list_layers(unet, target_modules)) for target_modules in ("attention", "linear", "all")
    )
    assert attention < linear < everything
    assert all(".attn" in name for name in attention)
    assert not any(name.startswith(("conv_in", "time_embedding")) for name in everything)


def test_a_base_that_is_not_here_is_explained(tmp_path: Path) -> None:
    runtime = pick_runtime("cpu")
    with pytest.raises(BaseModelError, match=r"sdxl is not on this machine.*picturebook"):
        load_model("sdxl", runtime)
    with pytest.raises(BaseModelError, match="someone/some-model is not on this machine"):
        load_model("someone/some-model", runtime)
    with pytest.raises(BaseModelError, match="no checkpoint at"):
        load_model(str(tmp_path / "gone.safetensors"), runtime)
    with pytest.raises(BaseModelError, match=r"no model_index\.json"):
        load_model(str(tmp_path), runtime)
    with pytest.raises(BaseModelError, match="There is no base model"):
        load_model("no such thing", runtime)


def test_a_damaged_base_is_explained(tiny_sdxl: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "base"
    shutil.copytree(tiny_sdxl, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="cannot be loaded as SDXL"):
        load_model(str(copy), pick_runtime("cpu"))


def test_the_fingerprint_tells_other_weights_apart(tiny_sdxl: Path, tmp_path: Path) -> None:
    from tiny import make_tiny_sdxl

    same = fingerprint_weights(make_tiny_sdxl(tmp_path / "same", seed=0))
    assert same == fingerprint_weights(tiny_sdxl)
    assert same != fingerprint_weights(make_tiny_sdxl(tmp_path / "other", seed=1))


def test_pictures_are_square_rgb(model: Model) -> None:
    picture = model.sample([Shot("a robot", 0)], FAST)[0]
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    assert picture.size == (model.advice.resolution_px,) * 2
