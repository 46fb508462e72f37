"""Noise schedule of a base model's training: how much at each timestep, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from dreamloom.core.errors import BaseModelError, ConfigError
from dreamloom.models.base import Prediction
from dreamloom.models.schedulers import LATENT_DEFAULTS

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "noise",
    "v_prediction": "velocity",
    "flow_prediction": "flow",
    "sample": "picture",
}


def read_prediction(config: Mapping[str, Any]) -> Prediction:
    """Read from a scheduler's configuration what the base model predicts.

    Raises:
        BaseModelError: If it is nothing that DreamLoom knows.
    """
    if "FlowMatch" in str(config.get("_class_name", "")):
        return "flow"
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise BaseModelError(
            f"The base model's scheduler file says prediction_type {kind!r}.",
            f"DreamLoom knows {', '.join(_PREDICTIONS)}.",
        )
    return _PREDICTIONS[kind]


class NoiseSchedule:
    """The training schedule of a diffusion (noise, velocity or picture predicted) or a flow.

    Timesteps count from 0 to ``timesteps`` - 1, from least to most noise. In a flow, timestep t
    means the share of noise (t + 1) / ``timesteps``, whatever shift the scheduler file names: that
    one only chooses where to look.

    Args:
        config: The base model's scheduler configuration.

    Source:
        DDPM (arXiv:2006.11239), Eq. 4; velocity (arXiv:2202.00512), appendix D; rectified flow
        (arXiv:2209.03003), Eq. 1.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.prediction = read_prediction(config)
        known = {k: v for k, v in config.items() if k != "prediction_type" and k[0] != "_"}
        if self.prediction == "flow":
            known = {"num_train_timesteps": config.get("num_train_timesteps", 1000)}
        self._diffusion: Any = DDPMScheduler.from_config(known, **LATENT_DEFAULTS)
        self.timesteps = int(self._diffusion.config["num_train_timesteps"])

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix: sqrt(a) x + sqrt(1 - a) e; in a flow (1 - s) x + s e."""
        if self.prediction == "flow":
            share = (timesteps + 1).to(latents.device, latents.dtype) / self.timesteps
            share = share.view(-1, *[1] * (latents.ndim - 1))
            return (1 - share) * latents + share * noise
        mixed: Tensor = self._diffusion.add_noise(latents, noise, timesteps)
        return mixed

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise e, the velocity sqrt(a) e - sqrt(1 - a) x, the flow e - x, or the picture x."""
        if self.prediction == "flow":
            return noise - latents
        if self.prediction == "velocity":
            velocity: Tensor = self._diffusion.get_velocity(latents, noise, timesteps)
            return velocity
        return noise if self.prediction == "noise" else latents

    def snr(self, timesteps: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        """Signal-to-noise ratio: a / (1 - a); in a flow ((1 - s) / s)²."""
        if self.prediction == "flow":
            share = (timesteps + 1).float() / self.timesteps
            return ((1 - share) / share) ** 2
        signal: Tensor = self._diffusion.alphas_cumprod.to(timesteps.device)[timesteps]
        return signal / (1 - signal)

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """What the denoiser is told: a flow's time, from above 0 to the number of timesteps."""
        return timesteps + 1 if self.prediction == "flow" else timesteps


def end_in_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rescale a schedule so that its last timestep is pure noise, for training and sampling.

    Raises:
        ConfigError: If the base predicts noise, which says nothing about a picture there.

    Source:
        Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed
        (arXiv:2305.08891), algorithm 1 and section 3.3; diffusers computes it.
    """
    prediction = read_prediction(config)
    if prediction == "flow":
        return dict(config)
    if prediction == "noise":
        raise ConfigError(
            "zero_terminal_snr needs a base model that predicts velocity; this one predicts noise, "
            "and from pure noise that says nothing.",
            "Leave zero_terminal_snr out, or choose a v-prediction base model.",
        )
    inherited = set(config.get("_use_default_values", ()))
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**config, **changes, "_use_default_values": sorted(inherited - set(changes))}
