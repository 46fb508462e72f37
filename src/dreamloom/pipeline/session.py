"""Which base model the settings mean, how it is loaded, and what they are once it is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Note, Observer, silent
from dreamloom.core.toml_files import offer
from dreamloom.memory.fit import fit_open
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
    config: LoomConfig,
    runtime: Runtime | None = None,
    options: MemoryOptions | None = None,
    *,
    work: Literal["training", "drawing"] = "training",
    observe: Observer = silent,
) -> tuple[Model, LoomConfig]:
    """Load the base model that the settings name, once per process.

    Args:
        config: Settings as given.
        runtime: Where to compute; None takes what the settings say.
        options: How the model spares memory; None plans it where the settings leave it open.
        work: What memory is planned for.
        observe: Told what was planned.

    Returns:
        The model, and the settings without any ``auto`` that it has advice for.

    Raises:
        BaseModelError: If it cannot be found or read.
        ConfigError: As `resolve_defaults`, if the device is not there, or if nothing fits there.
    """
    runtime = runtime or pick_runtime(config.device, config.precision)
    if options is None:
        fitted = fit_open(config, runtime, work)
        for line in fitted.lines:
            observe(Note("memory", line))
        config, runtime, options = fitted.config, fitted.runtime, fitted.memory_options
    model = open_base(config.base, runtime, options)
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
