"""A study's file: the question, what is varied, what is drawn, and how the answer is found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dreamloom.core.config.aliases import RENAMED
from dreamloom.core.config.loading import load_config, setting_names
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import Section, check_section, read_toml, suggest
from dreamloom.evaluation.metrics.measures import MEASURE
from dreamloom.pipeline.draw import find_pack
from dreamloom.pipeline.subject import require_noun

AnswerKind = Literal["compare", "plateau", "choose", "weak_spots"]
_FEWEST_ARMS: dict[AnswerKind, int] = {"compare": 2, "plateau": 3, "choose": 2, "weak_spots": 1}
# A validation draws and writes; more of them than this would cost more than the training.
_MOST_VALIDATIONS = 32


def _refuse_doubles(given: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(given)) < len(given):
        raise ValueError("each training seed may be named once")
    return given


class Arm(Section):
    """One of the things compared; whatever it does not name is as in ``[settings]``."""

    name: str = Field(min_length=1)
    """What tables and the answer call it."""
    photo_count: Annotated[int, Field(ge=1)] | None = None
    """Train with so many of the photos; more photos include those of fewer."""
    checkpoint: float = Field(1.0, gt=0, le=1)
    """Draw with the adapter as it was after this share of the updates."""
    weight: float = 1.0
    """Weight of the adapter."""
    scheduler: str = ""
    """The scheduler to draw with; empty takes that of generate.schedulers."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps to draw with; none takes those of generate.steps."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Any setting of a run, by name."""


class Study(Section):
    """A question that is answered by doing the same thing in several ways."""

    question: str = Field(min_length=1)
    """What is asked, as the answer's heading."""
    answer: AnswerKind
    """compare arms with the first; find a plateau among arms in order; choose one on some seeds
    and compare on others; or look for weak_spots among prompt categories."""
    decide_by: tuple[str, ...] = Field(("identity", "clip_t"), min_length=1)
    """Measures that the answer rests on; all others are shown beside it."""
    base: str = "picturebook"
    """The base model, as --base takes it."""
    photos: str
    """The subject's photos; a relative path counts from the study's file."""
    references: str = ""
    """Photos to score against, best ones that are never trained on; empty takes ``photos``."""
    subject: str = Field("rraj person", min_length=1)
    """The subject as prompts name it."""
    class_noun: str = ""
    """What the subject is one of; empty takes the phrase's last word."""
    preset: Literal["quick", "standard", "thorough"] = "standard"
    """How much effort a run takes, before ``[settings]``."""
    train_seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_refuse_doubles)
    ] = Field((0,), min_length=1)
    """Every arm is trained once with each. Three or more let the answer speak of the settings."""
    packs: tuple[str, ...] = ()
    """Prompt packs to draw."""
    prompts: tuple[str, ...] = ()
    """More prompts to draw; {subject} stands for the phrase, {class_noun} for the noun. Those of
    the class without the subject tell how much of it leaks."""
    floor: bool = True
    """Whether the base model draws the same, as the floor."""
    workers: int = Field(1, ge=1)
    """Processes of one thread each; 1 works in this process, with all its threads."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that all arms share."""
    arms: tuple[Arm, ...] = ()
    """What is compared, one by one."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """Or lists of values, each combination of which is an arm; the last name varies fastest."""

    def list_arms(self) -> tuple[Arm, ...]:
        """Give the arms, those of the grid made out."""
        return self.arms or tuple(_make_arms(self.grid))

    def configure(self, arm: Arm, train_seed: int) -> LoomConfig:
        """Put together the settings with which an arm is trained and drawn.

        Raises:
            ConfigError: If a setting is unknown or its value not allowed.
        """
        given = {
            **_flatten(self.settings),
            **_flatten(arm.settings),
            "preset": self.preset,
            "base": self.base,
            "subject.phrase": self.subject,
            "seed": train_seed,
        }
        if self.class_noun:
            given["subject.class_noun"] = self.class_noun
        if arm.scheduler:
            given["generate.schedulers"] = (arm.scheduler,)
        if arm.steps:
            given["generate.steps"] = (arm.steps,)
        config = load_config(overrides=given)
        if config.validation.patience is not None:
            raise ConfigError(
                "A study trains every arm to its end, to compare them at equal exposure, so "
                f"validation.patience = {config.validation.patience} has no place.",
                "Set validation.patience to none.",
            )
        every = self._validate_every(config.train.steps)
        if every is None:
            return config
        rare = {"every": every, "images": 1, "scores": False, "keep": None}
        return config.model_copy(update={"validation": config.validation.model_copy(update=rare)})

    def _validate_every(self, updates: int) -> int | None:
        """Find how often the adapter must be kept for every checkpoint that an arm asks for."""
        shares = {arm.checkpoint for arm in self.list_arms()}
        if shares == {1.0}:
            return None
        asked = [count_updates(share, updates) for share in shares]
        every = math.gcd(updates, *asked)
        if updates > _MOST_VALIDATIONS * every:
            raise ConfigError(
                f"Checkpoints after {', '.join(map(str, sorted(asked)))} of {updates} updates "
                f"would be kept every {every} updates.",
                "Choose shares such as 0.25, 0.5 and 1, and updates that they divide.",
            )
        return every


ARM_WORDS = tuple(name for name in Arm.model_fields if name not in ("name", "settings"))
"""What an arm or a grid may vary beside settings."""


def _part_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part an arm's own words from settings; both stand side by side in a file."""
    own = {name: value for name, value in given.items() if name in ARM_WORDS}
    return own, {name: value for name, value in given.items() if name not in ARM_WORDS}


def count_updates(share: float, updates: int) -> int:
    """Count the updates after which a checkpoint was kept: at least one.

    Example:
        >>> count_updates(0.25, 120)
        30
    """
    return max(1, round(share * updates))


@dataclass(frozen=True)
class Changes:
    """What a command changes of a study's file; empty values change nothing.

    Args:
        base: Another base model.
        photos: Another folder of photos, from where the command runs.
        subject: Another phrase.
        packs: Other prompt packs, instead of the file's packs and prompts.
        workers: Another number of processes.
        quick: Take the quick preset for whatever the file's ``[settings]`` leave open.
    """

    base: str | None = None
    photos: Path | None = None
    subject: str | None = None
    packs: tuple[str, ...] = ()
    workers: int | None = None
    quick: bool = False

    def apply(self, given: dict[str, Any]) -> dict[str, Any]:
        """Put the changes over what the file says."""
        named = {"base": self.base, "subject": self.subject, "workers": self.workers}
        changed = {**given, **{name: value for name, value in named.items() if value is not None}}
        if self.packs:
            changed |= {"packs": list(self.packs), "prompts": []}
        if self.photos is not None:
            # References and the class noun belong to the subject of the file.
            changed |= {"photos": str(self.photos.absolute()), "references": ""}
        if self.subject is not None:
            changed.pop("class_noun", None)
        if self.quick:
            changed["preset"] = "quick"
        return changed


def read_study(file: Path, changes: Changes = Changes()) -> Study:
    """Read a study's file, and check all of it.

    Args:
        file: A TOML file, such as those in ``recipes/questions``.
        changes: What the command says otherwise.

    Raises:
        ConfigError: If the file cannot be read, a name is unknown (with the nearest known one), a
            value is not allowed, or the arms do not fit the kind of answer.
    """
    given = changes.apply(read_toml(file, "study file"))
    if isinstance(arms := given.get("arms"), list):
        given["arms"] = [_nest_settings(arm) if isinstance(arm, dict) else arm for arm in arms]
    study = check_section(Study, given)
    if changes.photos is not None and "subject" not in study.model_fields_set:
        raise ConfigError(
            f"Neither {file} nor the command says whom or what the photos show.",
            'Give --subject, a rare word and what it is one of, like "rraj person".',
        )
    study = study.model_copy(
        update={
            "photos": str(file.parent / study.photos),
            "references": str(file.parent / study.references) if study.references else "",
        }
    )
    _check(study)
    return study


def _nest_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Put the settings of an arm, which stand beside its own words, into a table of their own."""
    own, settings = _part_settings(given)
    own |= {name: settings.pop(name) for name in ("name", "settings") if name in settings}
    _refuse_other_names(settings)
    if isinstance(nested := own.get("settings", {}), dict):
        own["settings"] = nested | settings
    return own


_OWN_WORDS = {
    "preset": "preset",
    "base": "base",
    "seed": "train_seeds",
    "subject.phrase": "subject",
    "subject.class_noun": "class_noun",
}
"""Settings that a study gives by words of its own."""


def _refuse_other_names(given: Mapping[str, Any]) -> None:
    known = setting_names()
    for name in _flatten(given):
        if name in _OWN_WORDS:
            raise ConfigError(
                f"{name} is the same for the whole study.",
                f"Write {_OWN_WORDS[name]} at the top of the file.",
            )
        if RENAMED.get(name, name) not in known:
            hint = suggest(name, (*ARM_WORDS, *known))
            raise ConfigError(f"There is no setting {name!r}.", hint)


def _flatten(given: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Name settings by dotted names; a setting that is itself a table stays one."""
    known = {*setting_names(), *RENAMED}
    flat: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and name not in known:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


_LABELS: dict[str, Callable[[Any], str]] = {
    "photo_count": lambda value: f"{value} photo" if value == 1 else f"{value} photos",
    "checkpoint": lambda value: f"after {value:.0%} of the updates",
    "weight": lambda value: f"weight {value}",
    "scheduler": str,
    "steps": lambda value: f"{value} steps",
}


def _make_arms(grid: Mapping[str, Any]) -> Iterable[Arm]:
    own, settings = _part_settings(grid)
    axes = own | _flatten(settings)
    # In the file's own order, which says what varies fastest and what comes first of equals.
    order = [name for key in grid for name in axes if name == key or name.startswith(f"{key}.")]
    for values in itertools.product(*(axes[name] for name in order)):
        chosen = dict(zip(order, values, strict=True))
        name = ", ".join(
            _LABELS[key](value) if key in _LABELS else f"{key} = {value}"
            for key, value in chosen.items()
        )
        own, settings = _part_settings(chosen)
        yield check_section(Arm, {"name": name, **own, "settings": settings})


def _check(study: Study) -> None:
    """Refuse what would only be found out after hours of work."""
    _refuse_other_names(study.settings)
    _check_grid(study)
    arms = study.list_arms()
    if len(arms) < _FEWEST_ARMS[study.answer]:
        raise ConfigError(
            f"A study that answers by {study.answer!r} needs {_FEWEST_ARMS[study.answer]} arms or "
            f"more, and this has {len(arms)}.",
            "Add [[arms]], or a [grid] of lists.",
        )
    if study.answer == "weak_spots" and (len(arms) > 1 or not study.floor):
        raise ConfigError(
            "Weak spots are those of one arm, compared with the base model.",
            "Leave one arm, and floor = true.",
        )
    for measure in study.decide_by:
        if measure not in MEASURE:
            raise ConfigError(f"There is no measure {measure!r}.", suggest(measure, MEASURE))
    if study.answer == "choose" and MEASURE[study.decide_by[0]].better == "neither":
        raise ConfigError(
            f"Nothing can be chosen by {study.decide_by[0]}: neither more nor less is better.",
            "Begin decide_by with another measure.",
        )
    names = [arm.name for arm in arms]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"Two arms are called {twice[0]!r}.", "Give each a name of its own.")
    if not study.packs and not study.prompts:
        raise ConfigError("The study draws nothing.", "Name packs or prompts.")
    for text in study.prompts:
        try:
            text.format(subject="", class_noun="")
        except (KeyError, IndexError, ValueError):
            raise ConfigError(
                f"The prompt {text!r} cannot be filled in.",
                "The only words in braces may be {subject} and {class_noun}.",
            ) from None
    for pack in study.packs:
        find_pack(pack)
    for arm in arms:
        _check_drawing(study, study.configure(arm, study.train_seeds[0]))


def _check_grid(study: Study) -> None:
    if study.arms and study.grid:
        raise ConfigError("The study has both [[arms]] and a [grid].", "Keep one of them.")
    own, settings = _part_settings(study.grid)
    _refuse_other_names(settings)
    for name, values in (own | _flatten(settings)).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"grid.{name} = {values!r} is not a list of values.",
                f"Write it as {name} = [first, second].",
            )
    study.list_arms()


def _check_drawing(study: Study, config: LoomConfig) -> None:
    require_noun(config.subject)
    samplers = len(config.generate.schedulers) * len(config.generate.steps)
    if samplers > 1:
        raise ConfigError(
            f"Each arm is drawn with one scheduler and one number of steps, not {samplers}.",
            "Vary them with scheduler and steps in the arms or the grid.",
        )
    if study.answer == "choose" and config.generate.images_per_prompt < 2:
        raise ConfigError(
            "To choose on some seeds and report on others, a prompt needs two pictures or more.",
            "Raise generate.images_per_prompt.",
        )
