"""Schedulers by the names that users know, built from a base model's own configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# SDXL's pipeline asks a scheduler for things that diffusers' own flow schedulers lack. On the
# straight paths of a flow the solver of first order is Euler's method.
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("DPMSolverMultistepScheduler", {**_FLOW, "solver_order": 1}),
    "dpm++": ("DPMSolverMultistepScheduler", _FLOW),
    "unipc": ("UniPCMultistepScheduler", _FLOW),
}

# SDXL's published scheduler file says so; a base whose file lacks a key would otherwise get the
# class's own default, and DDIM's clips latents to [-1, 1]: pale green noise.
LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}


def list_schedulers(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """List the schedulers that can draw with a base model, by name.

    Flows need their own; a schedule that ends in pure noise needs those that know of it.
    """
    if "FlowMatch" in str(config.get("_class_name", "")) or (
        config.get("prediction_type") == "flow_prediction"
    ):
        return FLOW_SCHEDULERS
    if config.get("rescale_betas_zero_snr"):
        return {
            name: made
            for name, made in SCHEDULERS.items()
            if "rescale_betas_zero_snr"
            in inspect.signature(getattr(diffusers, made[0]).__init__).parameters
        }
    return SCHEDULERS


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Build a scheduler for sampling from the base model's scheduler configuration.

    Raises:
        ConfigError: If there is no scheduler of that name for this base model.
    """
    known = list_schedulers(config)
    if name not in known:
        where = " for this base model" if name in SCHEDULERS else ""
        raise ConfigError(f"There is no scheduler {name!r}{where}.", offer(name, known))
    class_name, extra = known[name]
    if known is FLOW_SCHEDULERS:
        own = {k: config[k] for k in ("num_train_timesteps",) if k in config}
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return getattr(diffusers, class_name).from_config(own, flow_shift=shift, **extra)
    # Keys that a base's file merely inherited as class defaults are listed by diffusers under
    # _use_default_values; only what the file itself says may override SDXL's own choices.
    inherited = set(config.get("_use_default_values", ()))
    missing = {k: v for k, v in LATENT_DEFAULTS.items() if k not in config or k in inherited}
    return getattr(diffusers, class_name).from_config(dict(config), **{**missing, **extra})


def check_steps(name: str, steps: int, config: Mapping[str, Any]) -> None:
    """Find out whether a scheduler takes a number of steps, by walking them without a model.

    Near the length of the base model's schedule some count past its end.

    Raises:
        ConfigError: As `make_scheduler`; or if it does not, with the most that it takes.
    """
    if not _walks(make_scheduler(name, config), steps):
        length = int(config.get("num_train_timesteps", 1000))
        most = next(
            (
                n
                for n in range(min(steps - 1, length), 0, -1)
                if _walks(make_scheduler(name, config), n)
            ),
            0,
        )
        raise ConfigError(
            f"{name} cannot draw in {steps} steps with this base model.",
            f"It takes at most {most}.",
        )


def _walks(scheduler: Any, steps: int) -> bool:
    """Take all steps with a picture of one number."""
    nothing = torch.zeros(1, 4, 1, 1)
    dice = torch.Generator().manual_seed(0)
    takes_dice = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": dice} if takes_dice else {}
    try:
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(nothing, timestep)
            scheduler.step(nothing, timestep, nothing, **extra)
    except Exception:  # a library says it in many ways
        return False
    return True
