"""The recipes: settings that load, fit together, and train."""

from pathlib import Path

import pytest

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.events import Event, Note
from dreamloom.pipeline.train import prepare_run, train_subject
from studio_set import make_photos

PAIR = ("without-prior", "with-prior")
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def exposures(config: LoomConfig) -> int:
    return config.train.steps * config.train.batch_photos * config.train.gradient_accumulation_steps


def test_the_study_gave_half_the_looks_with_class_images_and_the_fair_pair_does_not() -> None:
    named = {path.stem: load_config(file=path) for path in RECIPES}
    assert named.keys() == {f"{s}-{k}" for s in ("study", "fair") for k in PAIR}
    study, fair = ([named[f"{s}-{kind}"] for kind in PAIR] for s in ("study", "fair"))
    assert [exposures(config) for config in study] == [4000, 2000]
    assert [exposures(config) for config in fair] == [2000, 2000]
    one, other = (config.model_dump(exclude={"priors"}) for config in fair)
    assert one == other


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_trains_and_says_what_this_machine_replaced(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dreamloom.training.optimizers._why_no_8bit", lambda device: "it is not here"
    )
    short = {"base": "picturebook", "train.steps": 2, "priors.count": 2, "priors.steps": 2}
    asked = load_config(file=path, overrides=short)
    told: list[Event] = []
    photos = make_photos(tmp_path / "photos")
    runtime = pick_runtime("cpu", asked.precision)
    run, model, config = prepare_run(tmp_path / "run", asked, runtime, photos)
    record = train_subject(run, model, photos, config, told.append)
    assert record.results["photo_exposures"] == exposures(config)
    notes = " ".join(event.text for event in told if isinstance(event, Note))
    assert "adamw instead of adamw8bit" in notes
    assert "computes in fp32" in notes
