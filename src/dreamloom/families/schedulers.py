"""Schedulers by the names that users know, built from a base model's own configuration."""

from __future__ import annotations

from typing import Any

import diffusers

from dreamloom.errors import ConfigError

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

# SDXL's published scheduler file says so; a base whose file lacks a key would otherwise get the
# class's own default, and DDIM's clips latents to [-1, 1]: pale green noise.
LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """Build a scheduler for sampling from the base model's scheduler configuration.

    Raises:
        ConfigError: If there is no scheduler of that name.
    """
    if name not in SCHEDULERS:
        raise ConfigError(
            f"There is no scheduler {name!r}.", f"Choose from: {', '.join(SCHEDULERS)}."
        )
    class_name, extra = SCHEDULERS[name]
    # Keys that a base's file merely inherited as class defaults are listed by diffusers under
    # _use_default_values; only what the file itself says may override SDXL's own choices.
    inherited = set(config.get("_use_default_values", ()))
    missing = {k: v for k, v in LATENT_DEFAULTS.items() if k not in config or k in inherited}
    return getattr(diffusers, class_name).from_config(config, **{**missing, **extra})
