"""Every setting: its name, default, limits and its one description."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from dreamloom.core.config.aliases import RENAMED, list_earlier_names, use_current_names
from dreamloom.core.config.sections import (
    NONE,
    AdapterConfig,
    EvaluateConfig,
    GenerateConfig,
    MemoryConfig,
    ObjectiveConfig,
    PhotosConfig,
    Preset,
    PriorsConfig,
    Section,
    SubjectConfig,
    TrainConfig,
    ValidationConfig,
)
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Note, Observer, silent

__all__ = [
    "NOT_TAUGHT",
    "PRESETS",
    "AdapterConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "LoomConfig",
    "MemoryConfig",
    "ObjectiveConfig",
    "PhotosConfig",
    "PriorsConfig",
    "SubjectConfig",
    "TrainConfig",
    "ValidationConfig",
    "describe_settings",
    "load_config",
    "setting_names",
    "to_toml",
]


NOT_TAUGHT = (
    "preset",
    "device",
    "generate.",
    "evaluate.",
    "train.checkpointing_steps",
    "memory.limit",
    "memory.gradient_checkpointing",
    "memory.micro_batch_size",
    "memory.cpu_offload",
    "validation.tracker",
)
"""Beginnings of the names of settings that change nothing of what is taught."""


class LoomConfig(Section):
    """Every setting of a run."""

    preset: Preset = "standard"
    """How much effort."""
    base: str = "picturebook"
    """The base model: picturebook, sdxl, a hub id, a folder or a .safetensors checkpoint."""
    seed: int = Field(0, ge=0)
    """Seed of every random draw of the run."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen base model; adapters are always float32."""
    subject: SubjectConfig = SubjectConfig()
    photos: PhotosConfig = PhotosConfig()
    priors: PriorsConfig = PriorsConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def photo_prompt(self) -> str:
        """The prompt that photos are trained with."""
        return self.subject.photo_prompt.format(subject=self.subject.phrase)

    def class_prompt(self) -> str:
        """The prompt that class images are drawn and trained with."""
        return self.subject.class_prompt.format(class_noun=self.subject.class_noun)

    def flat(self) -> dict[str, Any]:
        """Every setting's value by its dotted name, such as ``train.rank``."""
        values: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                values |= {f"{name}.{inner}": item for inner, item in value.items()}
            else:
                values[name] = value
        return values

    def resolve(self, advice: Mapping[str, Any]) -> LoomConfig:
        """Replace every 'auto' that the base model has advice for.

        What depends on the machine or the encoders (device, precision, memory.*,
        evaluate.encoders) stays as it was given.

        Args:
            advice: resolution_px, guidance, learning_rate, target_modules and weighting, as
                `models.base.Advice`.
        """
        rate = self.train.learning_rate
        if rate == "auto":
            rate = advice["learning_rate"]
        sections = {
            "photos": {
                "resolution_px": advice["resolution_px"],
                "shape": advice.get("shape", "square"),
            },
            "priors": {"guidance": advice["guidance"]},
            "train": {
                "learning_rate": rate,
                "text_learning_rate": rate * advice.get("text_rate_share", 0.5),
                "token_learning_rate": rate * advice.get("token_rate_share", 10.0),
                "target_modules": advice["target_modules"],
                "alpha": float(self.train.rank),
            },
            "objective": {"weighting": advice.get("weighting", "none")},
            "generate": {"guidance": advice["guidance"]},
        }
        changed = {}
        for name, values in sections.items():
            section = getattr(self, name)
            missing = {
                key: value for key, value in values.items() if getattr(section, key) == "auto"
            }
            changed[name] = section.model_copy(update=missing)
        return self.model_copy(update=changed)


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
    sources = [_read_toml(file)] if file else []
    sources += [
        _nest(name, value) for name, value in (overrides or {}).items() if value is not None
    ]
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {text} has no value.", "Write it as --set name=value, like train.rank=32."
            )
        sources.append(_nest(name.strip(), _parse(value.strip())))
    asked: dict[str, Any] = {}
    for source in sources:
        for earlier in list_earlier_names(source):
            observe(Note("settings", f"{earlier} is now called {RENAMED[earlier]}"))
        try:
            _merge(asked, use_current_names(source))
        except ValueError as error:
            raise ConfigError(f"{error}.", "Leave the earlier name out.") from None
    preset = str(asked.get("preset", preset))
    if preset not in PRESETS:
        raise ConfigError(
            f"There is no preset {preset!r}.", f"Choose one of: {', '.join(PRESETS)}."
        )
    values: dict[str, Any] = {}
    _merge(values, {**PRESETS[preset], "preset": preset})
    _merge(values, asked)
    try:
        return LoomConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no settings file {file}.", "Check the path.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.", "Name a file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.", "Mend that line.") from None


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
    names: list[str] = []
    for name, info in LoomConfig.model_fields.items():
        if isinstance(info.default, Section):
            names += [f"{name}.{inner}" for inner in type(info.default).model_fields]
        else:
            names.append(name)
    return names


def describe_settings() -> list[tuple[str, str, str]]:
    """Every setting as (dotted name, default, description with the words it allows)."""
    rows = []
    for name, info in LoomConfig.model_fields.items():
        if isinstance(info.default, Section):
            fields = type(info.default).model_fields.items()
            rows += [_describe(f"{name}.{inner}", field) for inner, field in fields]
        else:
            rows.append(_describe(name, info))
    return rows


def _describe(name: str, field: FieldInfo) -> tuple[str, str, str]:
    text = " ".join((field.description or "").split())
    words = allowed_words(field.annotation)
    if words and (words != ["auto"] or "auto" not in text):
        text += f" {'Or' if words == ['auto'] else 'One of'}: {', '.join(words)}."
    return name, str(field.get_default(call_default_factory=True)), text


def allowed_words(annotation: Any) -> list[str]:
    """List the words that a setting's type allows by name: ``auto`` and what else it spells out."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inner = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else ()
    words = [word for one in inner for word in allowed_words(one)]
    # Words beside true and false are not all that is allowed.
    return ["true", "false", *words] if bool in inner and words != ["auto"] else words


def _explain(error: ValidationError) -> ConfigError:
    """Turn pydantic's findings into one sentence per setting, all at once."""
    unknown: list[str] = []
    given: dict[str, Any] = {}
    reasons: dict[str, dict[str, None]] = {}
    for finding in error.errors():
        place = ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "extra_forbidden":
            unknown += _leaves(place, finding["input"])
            continue
        # Behind the setting's own name, pydantic names the alternative or the item it tried.
        within = [name for name in setting_names() if f"{place}.".startswith(f"{name}.")]
        name = (within or [place])[0]
        reason = _REASONS.get(finding["type"]) or finding["msg"].removeprefix("Value error, ")
        given.setdefault(name, finding["input"])
        reasons.setdefault(name, {})[reason[0].lower() + reason[1:]] = None
    problems = [
        f"{name} = {value!r} is not allowed: {', or '.join(reasons[name])}."
        for name, value in given.items()
    ]
    problems += [f"There is no setting {name!r}." for name in unknown]
    meant = {name: text for name, _, text in describe_settings()}
    hints = [f"{name}: {meant[name]}" for name in given if name in meant]
    hints += dict.fromkeys(_suggest(name) for name in unknown)
    return ConfigError(" ".join(problems), " ".join(hints))


_REASONS = {
    "model_type": "it is a group of settings, such as train.rank",
    "tuple_type": "input should be a list, such as [25, 50]",
}


def _leaves(name: str, value: Any) -> list[str]:
    """Name what was typed: ``trian.rank`` where only the group ``trian`` is unknown."""
    if not isinstance(value, Mapping) or not value:
        return [name]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]


def _suggest(name: str) -> str:
    names = setting_names()
    group, _, last = name.rpartition(".")
    same_last = [known for known in names if known.rpartition(".")[2] == last]
    close = same_last or difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if not close:
        # A bare name is compared with bare names: "lerning_rate" is near "train.learning_rate".
        near = difflib.get_close_matches(last, [known.rpartition(".")[2] for known in names], n=2)
        close = [known for known in names if known.rpartition(".")[2] in near]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    siblings = [known for known in names if group and known.startswith(f"{group}.")]
    return f"Known settings: {', '.join(siblings or names)}."


def to_toml(config: LoomConfig) -> str:
    """Write every setting, resolved, so that presets may change without changing old runs."""
    lines, tables = [], []
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]"] + [f"{k} = {_toml(v)}" for k, v in value.items()]
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, save that they want DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)
