"""What makes training fast changes nothing of what is learned."""

from pathlib import Path

import pytest
import torch

from dreamloom.core.config.loading import load_config
from dreamloom.core.events import Event, Validated
from dreamloom.pipeline.train import train_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def teach_picturebook(folder: Path) -> float:
    """Teach picturebook for 100 updates as it is usually taught; return the validation loss."""
    told: list[Event] = []
    config = load_config(
        sets=("subject.phrase=rraj person", "train.steps=100", "validation.every=100"),
        overrides={"base": "picturebook", "device": "cpu", "validation.scores": False},
    )
    train_folder(EXAMPLES / "rraj", config, folder / "run", observe=told.append)
    (last,) = (one for one in told if isinstance(one, Validated) and one.update == 100)
    return last.loss


@pytest.mark.slow  # two trainings of picturebook, two minutes each
def test_the_validation_loss_after_100_updates_is_the_plain_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = teach_picturebook(tmp_path / "fast")
    # PEFT's own layers one by one, and torch's own optimizer weight by weight.
    monkeypatch.setattr("dreamloom.models.peft_adapter.can_be_fused", lambda base: False)
    monkeypatch.setattr("dreamloom.training.optimizers.FlatAdamW", torch.optim.AdamW)
    plain = teach_picturebook(tmp_path / "plain")
    assert fast == pytest.approx(plain, rel=1e-3)
    # Two ways indeed: they round otherwise.
    files = [tmp_path / name / "run" / "adapter.safetensors" for name in ("fast", "plain")]
    assert files[0].read_bytes() != files[1].read_bytes()
