"""Trainings that end once validations bring nothing better: when, and what is left of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError, RunFolderError, TrainingError
from dreamloom.core.events import (
    Event,
    LossLogged,
    Note,
    StageSkipped,
    ValidationSampled,
)
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import Record, RunFolder
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.experiments.study.question import Study
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Model
from dreamloom.pipeline import train as pipeline
from dreamloom.training.train import train_adapter
from dreamloom.training.validation_samples import ScoreImages, ValidationSampler
from studio_set import claimed, small_config

Sets = tuple[PhotoSet, ClassImageSet]


def patient(model: Model, patience: int | None = 2, **settings: Any) -> LoomConfig:
    watched = {"validation__every": 1, "validation__images": 1, "validation__steps": 1, **settings}
    small = {"train__batch_photos": 1, "train__prior_weight": 0.0, "priors__kind": "none"}
    return small_config(model, train__steps=5, validation__patience=patience, **small, **watched)


def card(lift: float | None, note: str = "") -> Scorecard:
    score = Score(value=lift, n=1, floor=0.0, ceiling=1.0, lift=lift, note=note)
    rest = {"photos": 3, "confidence": 0.95, "resamples": 100, "pictures": ()}
    return Scorecard(scores={"identity": score}, encoders="picturebook", **rest)


@pytest.fixture
def judge_by_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float | None]], Any]:
    """A judge who knows after how many updates he is asked, also when asked again."""
    seen: list[int] = []
    run_validation = ValidationSampler.run_validation

    def note(self: ValidationSampler, updates_done: int) -> None:
        seen.append(updates_done)
        run_validation(self, updates_done)

    monkeypatch.setattr(ValidationSampler, "run_validation", note)
    return lambda lifts: lambda images, floor: card(lifts[seen[-1]])


def train(
    run: RunFolder, model: Model, sets: Sets, config: LoomConfig, judge: ScoreImages | None
) -> tuple[Record, list[Event]]:
    told: list[Event] = []
    return train_adapter(run, model, sets[0], None, config, told.append, judge), told


def looks(told: list[Event]) -> list[int]:
    return [event.update for event in told if isinstance(event, ValidationSampled)]


LIFTS = (0.0, 0.8, 0.7, 0.5, 0.9, 0.9)


def test_it_ends_where_so_many_validations_brought_nothing_better(
    model: Model, sets: Sets, tmp_path: Path, judge_by_update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when it had ended, it ends there again, though later validations lie there by then."""
    run, judge = claimed(tmp_path / "stopped"), judge_by_update(LIFTS)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dreamloom.training.train._write", kill)
        with pytest.raises(KeyboardInterrupt):
            train(run, model, sets, patient(model), judge)
    checkpoints = sorted(run.checkpoints.iterdir())
    assert [one.name for one in checkpoints] == [f"update-000000{n}.safetensors" for n in (2, 3)]
    checkpoints[-1].unlink()
    record, told = train(run, model, sets, patient(model), judge)
    assert looks(told) == []
    assert [event.update for event in told if isinstance(event, LossLogged)] == [3]
    assert record.results["updates"] == 3
    assert record.results["photo_exposures"] == 3
    why = "2 validations in a row brought no better adapter than that after update 1"
    assert record.results["stopped"] == {"update": 3, "why": why}
    assert record.results["recommended"]["update"] == 1
    notes = [event.text for event in told if isinstance(event, Note)]
    assert f"ended after update 3 of 5: {why}, and validation.patience is 2" in notes
    assert any(text.startswith("recommended: ") for text in notes)
    assert read_adapter(run.adapter).metadata["ss_steps"] == "3"
    # It is finished: the same call does not go on.
    again, later = train(run, model, sets, patient(model), judge)
    assert again == record
    assert isinstance(later[0], StageSkipped)
    # Another patience would have ended elsewhere.
    with pytest.raises(RunFolderError, match="already holds an adapter made with other early st"):
        train(run, model, sets, patient(model, 3), judge)

    # Weights and rates are those of a training that does not end there.
    whole = claimed(tmp_path / "whole")
    config = patient(model, None, validation__every=3)
    entire, events = train(whole, model, sets, config, judge)
    assert entire.results["updates"] == 5
    assert "stopped" not in entire.results
    there = load_file(whole.validation_samples / "000003" / "adapter.safetensors")
    assert all((there[key] == one).all() for key, one in load_file(run.adapter).items())
    rates = [event.learning_rate for event in events if isinstance(event, LossLogged)]
    assert [e.learning_rate for e in told if isinstance(e, LossLogged)] == rates[2:3]


@pytest.fixture
def sampler(tmp_path: Path) -> Callable[..., str]:
    """Ask for the reason to stop, of lifts found after 10, 20, … updates."""

    def ask(lifts: Sequence[float | None], patience: int | None = 2) -> str:
        run = claimed(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        for number, lift in enumerate(lifts, start=1):
            folder = run.validation_samples / f"{number * 10:06d}"
            folder.mkdir(parents=True)
            (folder / "adapter.safetensors").touch()
            one = card(lift, "" if lift is not None else "not measured: no photo shows a face")
            (folder / "scores.json").write_text(one.model_dump_json())
        sets = ("validation.every=10", f"validation.patience={patience or 'none'}")
        config = load_config(sets=sets)
        made = ValidationSampler(run, None, config, None, None, print)  # type: ignore[arg-type]
        return made.find_reason_to_stop(len(lifts) * 10)

    return ask


def test_it_waits_while_scores_rise_and_takes_what_is_close_for_equal(
    sampler: Callable[..., str],
) -> None:
    assert sampler((0.2, 0.4, 0.6, 0.8, 0.9), 1) == ""
    assert sampler((0.5, 0.4), 2) == ""
    assert sampler((0.5, 0.4, 0.3), 2).startswith("2 validations in a row brought no better")
    assert sampler((0.5, 0.4), 1).startswith("1 validation brought no better adapter than that aft")
    # As the recommendation does: of nearly equal ones the earliest is best.
    assert sampler((0.5, 0.505, 0.51), 2) != ""
    assert sampler((0.5, 0.515, 0.53, 0.545), 2) == ""
    assert sampler((0.5, 0.4, 0.3, 0.2), None) == ""


def test_a_validation_without_a_score_is_refused(sampler: Callable[..., str]) -> None:
    with pytest.raises(TrainingError, match="after update 10 has none: no photo shows a face"):
        sampler((None,))
    # One among others brought nothing better, and no more than that.
    assert sampler((0.5, None), 2) == ""
    assert sampler((0.5, None, None), 2) != ""


@pytest.mark.parametrize(
    ("settings", "judged", "words"),
    [
        ({"validation__every": None}, True, "but nothing is ever validated"),
        ({"validation__scores": False}, True, "but nothing is scored while it runs"),
        ({}, False, "but nothing is scored while it runs"),
        ({"validation__keep": 2}, True, "but validation.keep = 2 lets some go"),
    ],
)
def test_patience_without_scores_is_refused(
    model: Model, sets: Sets, tmp_path: Path, settings: Any, judged: bool, words: str
) -> None:
    judge = (lambda images, floor: card(0.5)) if judged else None
    with pytest.raises(ConfigError, match=words):
        train(claimed(tmp_path), model, sets, patient(model, **settings), judge)
    assert not (tmp_path / "checkpoints").exists()


def test_two_photos_are_too_few_to_score_by(model: Model, sets: Sets, tmp_path: Path) -> None:
    photos = sets[0].model_copy(update={"photos": sets[0].photos[:2]})
    with pytest.raises(ConfigError, match="take 3 photos or more; there are 2"):
        train(
            claimed(tmp_path),
            model,
            (photos, sets[1]),
            patient(model),
            lambda images, floor: card(0.5),
        )


def test_a_missing_encoder_is_refused_before_anything_is_made(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody:
        identity = Missing("its weights are not here")

    monkeypatch.setattr(pipeline, "pick_encoders", lambda *_: Nobody())
    with pytest.raises(ConfigError, match="nothing here can tell who is shown: its weights are"):
        pipeline._check_judged(patient(model), model)
    pipeline._check_judged(patient(model, None), model)


def test_a_study_trains_to_the_end() -> None:
    study = Study.model_validate(
        {
            "question": "Does it?",
            "answer": "compare",
            "photos": "photos",
            "subject": "rraj person",
            "settings": {"validation.patience": 2},
            "arms": [{"name": "a"}, {"name": "b"}],
        }
    )
    with pytest.raises(ConfigError, match="trains every arm to its end"):
        study.configure(study.arms[0], 0)


@pytest.mark.parametrize("given", ["0", "-1", "soon"])
def test_a_patience_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"validation\.patience"):
        load_config(sets=(f"validation.patience={given}",))
