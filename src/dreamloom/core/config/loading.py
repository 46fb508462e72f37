"""Settings put together and written: presets, a TOML file, options and ``--set`` in order."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamloom.core.config.aliases import (
    RENAMED,
    list_earlier_names,
    use_current_names,
    values_of_before,
)
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Note, Observer, silent
from dreamloom.core.toml_files import check_section, list_fields, offer, read_toml, to_toml_value

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "priors": {"count": 24, "steps": 15},
        # So few updates teach too little of a subject if the rate falls on the way, or if nearly
        # clean pictures count as much as the noisy ones, in which is chosen who is drawn.
        "train": {"steps": 120, "lr_scheduler": "constant", "checkpointing_steps": 60},
        "objective": {"weighting": "debiased"},
        "generate": {"images_per_prompt": 4, "steps": (25,)},
        "evaluate": {"resamples": 1000},
    },
    "standard": {},
    "thorough": {
        "priors": {"count": 200, "steps": 50},
        "train": {"steps": 1000},
        "generate": {"images_per_prompt": 16},
        "evaluate": {"resamples": 10_000},
    },
}


def load_config(
    preset: str = "standard",
    file: Path | None = None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    observe: Observer = silent,
) -> LoomConfig:
    """Put the settings together: preset, then file, then the command's options, then ``--set``.

    Args:
        preset: quick, standard or thorough; a preset named by any of the others goes before it.
        file: A TOML file with any of the settings.
        sets: Texts such as ``train.rank=32``; the value is read as TOML, or else as plain text.
        overrides: Settings by dotted name, such as ``{"subject.phrase": "sks dog"}``; None is
            ignored.
        observe: Told of settings that are given under an earlier name.

    Raises:
        ConfigError: If a name is unknown (with the nearest known ones), or a value not allowed.
    """
    sources = [_nest(name, value) for name, value in (overrides or {}).items() if value is not None]
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                f"--set {text} has no {'name' if equals else 'value'}.",
                "Write it as --set name=value, like train.rank=32.",
            )
        sources.append(_nest(name.strip(), _parse(value.strip())))
    asked = _put_together([read_toml(file, "settings file")] if file else [], observe)
    typed = _put_together(sources, observe)
    _let_noun_follow_phrase(asked, typed)
    _merge(asked, typed)
    preset = str(asked.get("preset", preset))
    if preset not in PRESETS:
        raise ConfigError(f"There is no preset {preset!r}.", offer(preset, PRESETS))
    values: dict[str, Any] = {}
    _merge(values, {**PRESETS[preset], "preset": preset})
    _merge(values, asked)
    return check_section(LoomConfig, values)


def name_prior(prior: str) -> dict[str, str]:
    """Name the settings that say where class images come from.

    Args:
        prior: ``generated``, ``base`` or ``none``; anything else is a folder of one's own.
    """
    if prior in {"generated", "base", "none"}:
        return {"priors.kind": prior}
    return {"priors.kind": "folder", "priors.folder": prior}


def load_run_settings(file: Path) -> LoomConfig:
    """Read the settings that a run wrote; what it does not name means what was done before.

    Raises:
        ConfigError: As `load_config`.
    """
    written = read_toml(file, "settings file")
    earlier = {
        name: value
        for name, value in values_of_before().items()
        if name.partition(".")[2] not in written.get(name.partition(".")[0], {})
    }
    return load_config(file=file, overrides=earlier)


def _put_together(sources: Sequence[Mapping[str, Any]], observe: Observer) -> dict[str, Any]:
    """Merge settings in their order, under today's names."""
    asked: dict[str, Any] = {}
    for source in sources:
        for earlier in list_earlier_names(source):
            observe(Note("settings", f"{earlier} is now called {RENAMED[earlier]}"))
        try:
            _merge(asked, use_current_names(source))
        except ValueError as error:
            raise ConfigError(f"{error}.", "Leave the earlier name out.") from None
    return asked


def _let_noun_follow_phrase(asked: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """Forget a file's class noun where the command names another subject and no noun."""
    old, new = asked.get("subject"), typed.get("subject")
    if (
        isinstance(old, dict)
        and isinstance(new, dict)
        and "class_noun" not in new
        and new.get("phrase", old.get("phrase")) != old.get("phrase")
    ):
        old.pop("class_noun", None)


def _nest(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def _merge(target: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def _parse(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def setting_names() -> list[str]:
    """Every setting by its dotted name, in order."""
    return list(list_fields(LoomConfig))


def to_toml(config: LoomConfig) -> str:
    """Write every setting, resolved, so that presets may change without changing old runs."""
    lines, tables = [], []
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]"] + [f"{k} = {to_toml_value(v)}" for k, v in value.items()]
        else:
            lines.append(f"{name} = {to_toml_value(value)}")
    return "\n".join(lines + tables) + "\n"
