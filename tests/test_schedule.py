"""What base models predict, and how much noise each timestep means."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import BaseModelError, ConfigError
from dreamloom.lora.adapter import Adapter
from dreamloom.models.base import Framing, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.schedule import NoiseSchedule, end_in_noise, read_prediction
from dreamloom.models.schedulers import SCHEDULERS, list_schedulers, make_scheduler
from dreamloom.models.sdxl import SDXLModel
from dreamloom.models.session import follow_noise_schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VELOCITY = {**BETAS, "prediction_type": "v_prediction"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def signal_of(config: dict[str, Any] = BETAS) -> torch.Tensor:
    roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000)
    return torch.cumprod(1 - roots.double() ** 2, dim=0)


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 2, 2, generator=rng) for _ in range(2))
    return latents, noise, torch.tensor([0, 500, 999])


@pytest.mark.parametrize(
    ("config", "prediction"),
    [
        ({}, "noise"),
        ({"prediction_type": "epsilon"}, "noise"),
        (VELOCITY, "velocity"),
        ({"prediction_type": "sample"}, "picture"),
        ({"prediction_type": "flow_prediction"}, "flow"),
        (FLOW, "flow"),
    ],
)
def test_the_scheduler_file_says_what_is_predicted(config: dict, prediction: str) -> None:
    assert read_prediction(config) == prediction
    assert NoiseSchedule(config).prediction == prediction


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"'guess'.*epsilon"):
        read_prediction({"prediction_type": "guess"})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusions_mix_and_aim_as_the_papers_say(prediction: str) -> None:
    schedule = NoiseSchedule({**BETAS, "prediction_type": prediction})
    latents, noise, at = draw()
    a = signal_of()[at].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, at),
        a.sqrt() * latents + (1 - a).sqrt() * noise,
        rtol=1e-4,
        atol=1e-5,
    )
    wanted = {
        "epsilon": noise,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * latents,
        "sample": latents,
    }[prediction]
    torch.testing.assert_close(schedule.target(latents, noise, at), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.snr(at), (a / (1 - a)).flatten(), rtol=1e-3, atol=1e-6)
    assert torch.equal(schedule.model_timesteps(at), at)


def test_flows_mix_along_a_straight_line() -> None:
    schedule = NoiseSchedule(FLOW)
    latents, noise, at = draw()
    share = torch.tensor([0.001, 0.501, 1.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, at), (1 - share) * latents + share * noise
    )
    torch.testing.assert_close(schedule.target(latents, noise, at), noise - latents)
    torch.testing.assert_close(schedule.snr(at), (((1 - share) / share) ** 2).flatten())
    assert schedule.model_timesteps(at).tolist() == [1, 501, 1000]


def test_a_rescaled_schedule_ends_in_pure_noise_and_keeps_its_beginning() -> None:
    """Lin et al., algorithm 1: shift and stretch sqrt(a) so that the last is 0."""
    root = signal_of().sqrt()
    wanted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    schedule = NoiseSchedule(end_in_noise(VELOCITY))
    snr = schedule.snr(torch.arange(1000))
    assert snr[-1] == 0
    torch.testing.assert_close(snr[:-1], (wanted / (1 - wanted)).float()[:-1], rtol=2e-3, atol=1e-7)
    latents, noise, at = draw()
    assert torch.equal(schedule.add_noise(latents, noise, at)[2], noise[2])
    torch.testing.assert_close(schedule.target(latents, noise, at)[2], -latents[2])


def test_noise_prediction_cannot_end_in_pure_noise() -> None:
    with pytest.raises(ConfigError, match="zero_terminal_snr needs"):
        end_in_noise(BETAS)
    assert end_in_noise(FLOW) == FLOW


def test_schedulers_that_know_nothing_of_pure_noise_are_left_out() -> None:
    known = list_schedulers(end_in_noise(VELOCITY))
    assert {"ddim", "euler", "dpm++"} <= set(known) < set(SCHEDULERS)
    assert "heun" not in known
    with pytest.raises(ConfigError, match="'heun' for this base model"):
        make_scheduler("heun", end_in_noise(VELOCITY))
    for name in known:
        scheduler = make_scheduler(name, end_in_noise(VELOCITY))
        scheduler.set_timesteps(5)
        assert int(scheduler.timesteps[0]) == 999


@pytest.mark.parametrize("name", list_schedulers(FLOW))
def test_flow_schedulers_follow_a_straight_line_to_its_end(name: str) -> None:
    """On the flow from noise to one picture every step is exact, whatever the solver."""
    latents, noise, _ = draw()
    scheduler = make_scheduler(name, {**FLOW, "shift": 1.0})
    scheduler.set_timesteps(8)
    state = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        state = scheduler.step(noise - latents, timestep, state).prev_sample
    torch.testing.assert_close(state, latents, rtol=1e-2, atol=1e-2)


def change_scheduler(base: Path, folder: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def load(folder: Path) -> SDXLModel:
    model = load_model(str(folder), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    return model


def test_a_velocity_base_trains_and_draws(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = load(change_scheduler(tiny_sdxl, tmp_path / "v", {"prediction_type": "v_prediction"}))
    assert model.prediction == "velocity"
    latents, noise, at = draw()
    assert not torch.equal(model.target(latents, noise, at), noise)
    fast = Sampler("euler", steps=2, guidance=2.0)
    plain = model.sample([Shot("a dog", 0)], fast)[0]
    assert model.snr(torch.tensor([999])) > 0
    model.set_zero_terminal_snr(True)
    model.set_zero_terminal_snr(True)
    assert model.snr(torch.tensor([999])) == 0
    assert "heun" not in model.schedulers
    assert model.sample([Shot("a dog", 0)], fast)[0].tobytes() != plain.tobytes()
    model.set_zero_terminal_snr(False)
    assert "heun" in model.schedulers
    assert model.sample([Shot("a dog", 0)], fast)[0].tobytes() == plain.tobytes()


def test_a_model_follows_the_noise_schedule_of_its_adapters(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    model = load(change_scheduler(tiny_sdxl, tmp_path / "v", {"prediction_type": "v_prediction"}))
    plain, trained = Adapter({}), Adapter({}, {"dreamloom.zero_terminal_snr": "true"})
    last = torch.tensor([999])
    for adapters, ends_in_noise in (([trained, plain], True), ([plain], False), ([], False)):
        follow_noise_schedule(model, adapters)
        assert (float(model.snr(last)) == 0) is ends_in_noise


@pytest.mark.parametrize("how", ["a flow's own scheduler", "a prediction type"])
def test_a_flow_base_is_told_its_time_and_draws(how: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flow"
    if how == "a prediction type":
        change_scheduler(tiny_sdxl, folder, {"prediction_type": "flow_prediction"})
    else:
        shutil.copytree(tiny_sdxl, folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", FLOW["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
    model = load(folder)
    assert model.prediction == "flow"
    told: list[torch.Tensor] = []
    model._pipeline.unet.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    conditioning = model.encode_prompts(["a dog"])
    model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([499]), conditioning, [Framing((64, 64))])
    assert told[0].tolist() == [500]
    for name in model.schedulers:
        model.sample([Shot("a dog", 0)], Sampler(name, steps=2, guidance=2.0))


def test_a_noise_base_refuses_to_end_in_pure_noise(tiny_sdxl: Path) -> None:
    model = load(tiny_sdxl)
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        model.set_zero_terminal_snr(True)
    assert model.snr(torch.tensor([999])) > 0
