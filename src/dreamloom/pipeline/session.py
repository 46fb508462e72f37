"""Which base model the settings mean, how it is loaded, and what they are once it is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer
from dreamloom.memory.fit import ask_memory_options
from dreamloom.models.base import MemoryOptions, Model
from dreamloom.models.schedulers import SCHEDULERS
from dreamloom.models.session import open_base
from dreamloom.training.optimizers import ONE_RATE_OPTIMIZERS, usual_rate
from dreamloom.training.trackers import choose_tracker


def choose_base(config: LoomConfig, headers: Iterable[Mapping[str, str]]) -> LoomConfig:
    """Take the base model that was asked for, or else the one that adapters' headers name."""
    named = next((header["dreamloom.base"] for header in headers if "dreamloom.base" in header), "")
    if "base" in config.model_fields_set or not named:
        return config
    return config.model_copy(update={"base": named})


def open_session(
    config: LoomConfig, runtime: Runtime | None = None, options: MemoryOptions | None = None
) -> tuple[Model, LoomConfig]:
    """Load the base model that the settings name, once per process.

    Args:
        config: Settings as given.
        runtime: Where to compute; None takes what the settings say.
        options: How the model spares memory; None takes what the settings ask for.

    Returns:
        The model, and the settings without any ``auto`` that it has advice for.

    Raises:
        BaseModelError: If it cannot be found or read.
        ConfigError: As `resolve_defaults`, or if the device is not there.
    """
    model = open_base(
        config.base,
        runtime or pick_runtime(config.device, config.precision),
        options or ask_memory_options(config),
    )
    return model, resolve_defaults(config, model)


def check_names(config: LoomConfig) -> None:
    """Check the names in the settings that need no base model, before one is loaded.

    Raises:
        ConfigError: If a scheduler, optimizer, tracker or device is unknown or not installed.
    """
    choose_tracker(config.validation.tracker)
    for name in (config.priors.scheduler, *config.generate.schedulers):
        if name not in SCHEDULERS:
            raise ConfigError(f"There is no scheduler {name!r}.", offer(name, SCHEDULERS))
    usual_rate(config.train.optimizer, 1.0)


def resolve_defaults(config: LoomConfig, model: Model) -> LoomConfig:
    """Replace every ``auto`` by what suits the base model, and check names that it must know.

    Raises:
        ConfigError: If a scheduler, optimizer or tracker is unknown or not installed.
    """
    check_names(config)
    priors, generate = config.priors, config.generate
    drawn = [*itertools.product(generate.schedulers, generate.steps)]
    for name, steps in [(priors.scheduler, priors.steps), *drawn]:
        model.check_sampler(name, steps)
    advice = vars(model.advice)
    rate = usual_rate(config.train.optimizer, advice["learning_rate"])
    if config.train.optimizer in ONE_RATE_OPTIMIZERS:
        advice = {**advice, "text_rate_share": 1.0, "token_rate_share": 1.0}
    return config.resolve({**advice, "learning_rate": rate})
