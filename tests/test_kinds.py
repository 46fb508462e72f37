"""Every kind of adapter and every optimizer, taught to the embedded model for a moment."""

from pathlib import Path

import numpy as np
import pytest

from dreamloom.core.config.loading import load_config
from dreamloom.core.device import pick_runtime
from dreamloom.core.events import Event, Note, Validated
from dreamloom.core.manifests import PhotoSet
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.examples import examples_folder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Model, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.training.optimizers import OPTIMIZERS
from dreamloom.training.train import train_adapter

_LIBRARIES = {"adamw": "torch", "adamw8bit": "bitsandbytes"}
_VARIETIES = {
    **{f"kind {kind}": {"adapter.kind": kind} for kind in ("lora", "dora", "loha", "lokr", "oft")},
    **{f"optimizer {name}": {"train.optimizer": name} for name in OPTIMIZERS if name != "adamw"},
    "text encoders": {"adapter.text_encoders": True},
    "new words": {"adapter.placeholder_tokens": {"rraj": "red"}},
    "rank-stabilised": {"adapter.use_rslora": True},
    "pissa": {"adapter.init_lora_weights": "pissa"},
    "LoRA+": {"adapter.loraplus_lr_ratio": 4.0},
    "average": {"train.ema_decay": 0.8},
    "huber": {"objective.loss": "huber"},
    "debiased": {"objective.weighting": "debiased"},
}
# Prodigy has to find its learning rate first, and LoHa's product of products starts slowly.
_UPDATES = {"optimizer prodigy": 60, "kind loha": 30}
# By default adapters as they are, of two other kinds, and what else is taught; the others' own
# arithmetic is tested without a model.
_SLOW = {
    *(f"optimizer {name}" for name in OPTIMIZERS),
    *("kind loha", "kind oft"),
    "average",
    *("rank-stabilised", "pissa"),  # test_peft_adapter.py trains them too
    *("LoRA+", "huber", "debiased"),  # their equations have tests of their own
}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("picturebook", pick_runtime("cpu"))


@pytest.fixture(scope="module")
def photos(model: Model, tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    run = RunFolder(tmp_path_factory.mktemp("photos"))
    run.claim()
    return load_photos(examples_folder() / "rraj", run, model.advice.resolution_px)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow if one in _SLOW else ()) for one in _VARIETIES],
)
def test_each_lowers_the_loss_and_is_saved_loaded_and_drawn(
    model: Model, photos: PhotoSet, tmp_path: Path, name: str
) -> None:
    settings, updates = _VARIETIES[name], _UPDATES.get(name, 14)
    optimizer = settings.get("train.optimizer", "adamw")
    library = _LIBRARIES.get(optimizer, "pytorch_optimizer")
    pytest.importorskip(library, reason=f"{library} is not installed")
    asked = load_config(
        overrides={
            **{"priors.kind": "none", "train.steps": updates, "train.batch_photos": 2},
            **{"train.rank": 4, "train.target_modules": "attention", "train.warmup_steps": 2},
            **{"train.lr_scheduler": "constant", "validation.every": updates},
            **{
                "validation.images": 1,
                "validation.steps": 2,
                "validation.tracker": "none",
                **settings,
            },
        }
    )
    told: list[Event] = []
    run = RunFolder(tmp_path)
    run.claim()
    train_adapter(run, model, photos, None, resolve_defaults(asked, model), told.append)
    if any("instead of adamw8bit" in event.text for event in told if isinstance(event, Note)):
        pytest.skip("bitsandbytes does not work on this machine")
    before, after = (event.loss for event in told if isinstance(event, Validated))
    assert after < before

    adapter = read_adapter(run.adapter)
    if name == "text encoders":
        text = [layer for key, layer in adapter.layers.items() if key.startswith("text_encoder")]
        assert len(text) > 10
        assert all(layer.up.abs().max() > 0 for layer in text)
    assert set(adapter.tokens) == set(settings.get("adapter.placeholder_tokens", {}))
    shot, sampler = Shot("a photo of rraj person", 0), Sampler("ddim", 4, 4.0)
    plain = np.asarray(model.sample([shot], sampler)[0], dtype=float)
    with model.apply_adapters([(adapter, 1.0)]):
        active = np.asarray(model.sample([shot], sampler)[0], dtype=float)
    assert not np.array_equal(active, plain)
    assert np.array_equal(np.asarray(model.sample([shot], sampler)[0], dtype=float), plain)
