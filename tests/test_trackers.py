"""What trackers are told, and which of them may be asked for."""

from pathlib import Path

import pytest

from dreamloom.core.errors import ConfigError
from dreamloom.core.events import (
    GradientNoiseMeasured,
    LossLogged,
    Note,
    Validated,
    ValidationSampled,
)
from dreamloom.training.trackers import choose_tracker, describe, track


def test_figures_go_by_name_and_update() -> None:
    assert describe(LossLogged(3, 1.0, 0.6, 0.4, 1e-4)) == (
        {"loss/total": 1.0, "loss/subject": 0.6, "learning_rate": 1e-4, "loss/prior": 0.4},
        3,
    )
    assert "loss/prior" not in describe(LossLogged(3, 1.0, 1.0, None, 1e-4))[0]
    assert describe(Validated(5, 0.2, held_out=True)) == ({"validation/held-out photos": 0.2}, 5)
    assert describe(ValidationSampled(5, "x", {"identity": 0.5})) == ({"score/identity": 0.5}, 5)
    noise = {"gradient/signal_to_noise": 0.5, "gradient/noise_scale": 8.0}
    assert describe(GradientNoiseMeasured(4, 0.5, 8.0)) == (noise, 4)
    assert describe(GradientNoiseMeasured(4, None, None)) == ({}, 4)
    assert describe(Note("train", "text")) == ({}, 0)


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="tensorbord") as caught:
        choose_tracker("tensorbord")
    assert "tensorboard" in caught.value.hint


def test_none_tells_nobody(tmp_path: Path) -> None:
    assert choose_tracker("none") == "none"
    with track("none", "run", tmp_path / "logs", {}) as observe:
        observe(LossLogged(1, 1.0, 1.0, None, 1e-4))
    assert not (tmp_path / "logs").exists()


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert choose_tracker("auto") == choose_tracker("tensorboard") == "tensorboard"
    with track("tensorboard", "run", tmp_path, {"train.rank": 4, "generate.steps": [30]}) as told:
        told(LossLogged(1, 1.5, 1.0, 0.5, 1e-4))
        told(LossLogged(2, 1.25, 1.0, 0.25, 1e-4))
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss/total")] == [(1, 1.5), (2, 1.25)]


def test_a_tracker_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="not installed") as caught:
        choose_tracker("tensorboard")
    assert "pip install" in caught.value.hint
