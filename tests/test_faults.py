"""The faults of the scripts that people train with today, one test each, by their number.

The numbers are those of docs/trainers.md, which says where each fault was seen. A fault that has
no counterpart here has no test, and the page says why.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.events import Event, LossLogged
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.models.base import AdapterSpec, Framing, Model
from dreamloom.models.families import load_model
from dreamloom.training.batches import BatchShare
from dreamloom.training.losses import timestep_weights
from dreamloom.training.train import train_adapter
from studio_set import (
    claimed,
    compute_loss,
    make_lesson,
    make_photos,
    make_sets,
    measure_errors,
    small_config,
)


@dataclass
class RecordedRecipe:
    """What the model was given to predict from."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    framings: list[tuple[Framing, ...]] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def told(model: Model, monkeypatch: pytest.MonkeyPatch) -> RecordedRecipe:
    """Listen to every call of the model's `predict`."""
    heard, predict = RecordedRecipe(), model.predict

    def hook_activations(noisy: Any, timesteps: Any, conditioning: Any, framings: Any) -> Any:
        heard.tokens.append(conditioning.tokens)
        heard.framings.append(tuple(framings))
        heard.timesteps.append(timesteps)
        return predict(noisy, timesteps, conditioning, framings)

    monkeypatch.setattr(model, "predict", hook_activations)
    return heard


def train(path: Path, model: Model, sets: Any, config: LoomConfig) -> dict[str, torch.Tensor]:
    run = claimed(path)
    train_adapter(run, model, *sets, config)
    return load_file(run.adapter)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_fault_01_every_picture_trains_with_its_own_prompt(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], told: RecordedRecipe, batch: int
) -> None:
    config = small_config(model, train__batch_photos=batch, train__batch_priors=batch)
    compute_loss(model, make_lesson(model, *sets, config), 0, config)
    photo, prior = model.encode_prompts([config.photo_prompt(), config.class_prompt()]).tokens
    assert not torch.equal(photo, prior)
    expected = torch.stack([photo] * batch + [prior] * batch)
    torch.testing.assert_close(told.tokens[0], expected)


def test_fault_02_class_images_have_a_size_and_crop_of_their_own(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], told: RecordedRecipe
) -> None:
    config = small_config(model)
    compute_loss(model, make_lesson(model, *sets, config), 0, config)
    *photos, first, second = told.framings[0]
    assert first == second == Framing((64, 64), (0, 0))
    assert all(framing.original_px == (72, 96) for framing in photos)
    assert all(framing.crop_top_left_px[1] > 0 for framing in photos)


def test_fault_03_each_picture_is_weighed_by_its_own_timestep(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], told: RecordedRecipe
) -> None:
    plain = small_config(model)
    batches = make_lesson(model, *sets, plain)
    (errors,) = measure_errors(model, batches, 1, plain)
    weighed = compute_loss(model, batches, 1, small_config(model, objective__weighting="min_snr"))
    weights = timestep_weights("min_snr", model.snr(told.timesteps[0]))
    assert len(weights.unique()) > 1
    expected = (errors.values * weights).view(2, 2).mean(dim=1)
    assert weighed.prior is not None
    torch.testing.assert_close(weighed.subject, expected[0])
    torch.testing.assert_close(weighed.prior, expected[1])


def test_fault_04_adapters_are_trained_in_float32_on_a_half_precision_base(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    half = load_model(str(tiny_sdxl), pick_runtime("cpu", "bf16"))
    photos, priors = make_sets(half, tmp_path / "sets")
    config = small_config(
        half, train__updates=30, train__learning_rate=1e-4, train__warmup_updates=0
    )
    fresh = half.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))
    assert {p.dtype for one in fresh for p in one.parameters} == {torch.float32}
    half.detach_adapter()
    taught = train(tmp_path / "run", half, (photos, priors), config)
    assert {tensor.dtype for tensor in taught.values()} == {torch.float32}
    ups = torch.cat([t.flatten() for name, t in taught.items() if "lora_up" in name])
    # In bf16 a weight of 1e-3 does not move by steps of 1e-4 x a few.
    assert (ups.abs() > 1e-5).float().mean() > 0.9
    assert (ups != ups.bfloat16().float()).float().mean() > 0.9


def test_fault_05_latents_captions_and_framings_stay_together(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    photos = sets[0].model_copy(
        update={
            "photos": tuple(
                photo.model_copy(update={"caption": f"photo {number}"})
                for number, photo in enumerate(sets[0].photos)
            )
        }
    )
    batches = make_lesson(model, photos, None, small_config(model))
    alone = {}
    for update in range(20):
        (batch,) = batches.make_batches(update, BatchShare(2, 0))
        for row, sample in enumerate(batch.samples):
            assert batch.prompts[row] == f"photo {sample.picture}"
            key = (sample.picture, sample.place)
            alone.setdefault(key, batch.latents.mean[row])
            assert torch.equal(alone[key], batch.latents.mean[row])
    # Different pictures have different latents, so the agreement means something.
    assert len({tensor.sum().item() for tensor in alone.values()}) == len(alone)


def test_fault_06_crops_change_from_round_to_round(model: Model, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "wide", size=(240, 72))
    photos = load_photos(folder, claimed(tmp_path / "run"), model.advice.resolution_px)
    batches = make_lesson(model, photos, None, small_config(model, photos__flip=True))
    samples = [c for u in range(30) for c in batches.draw_samples(u, BatchShare(3, 0))]
    for photo in range(3):
        places = {sample.place for sample in samples if sample.picture == photo}
        assert len({place[:2] for place in places}) > 4
        assert {mirrored for _, _, mirrored in places} == {True, False}


def test_fault_07_faces_are_not_mirrored_unless_asked(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    batches = make_lesson(model, *sets, small_config(model))
    assert not any(
        sample.place[2]
        for update in range(30)
        for sample in batches.draw_samples(update, BatchShare(3, 3))
    )


def test_fault_08_encoders_leave_the_device_before_each_prediction(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    for name in ("encode_images", "encode_prompts", "release_encoders", "predict"):
        real = getattr(model, name)

        def hook_activations(*args: Any, name: str = name, real: Any = real, **how: Any) -> Any:
            called.append(name)
            return real(*args, **how)

        monkeypatch.setattr(model, name, hook_activations)
    config = small_config(model, train__updates=6, photos__flip=True, watch__every=3)
    train(tmp_path, model, sets, config)
    predictions = [place for place, name in enumerate(called) if name == "predict"]
    assert len(predictions) > 6
    for place in predictions:
        before = [name for name in called[:place] if name != "predict"]
        assert before[-1] == "release_encoders"


@pytest.mark.gpu
def test_fault_08_text_encoders_leave_the_device(tiny_sdxl: Path) -> None:
    model = load_model(str(tiny_sdxl), pick_runtime("cuda"))
    model.encode_prompts(["a photo"])
    before = torch.cuda.memory_allocated()
    model.release_encoders()
    assert torch.cuda.memory_allocated() < before


def test_fault_09_the_autoencoder_rests_once_the_crops_are_known(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_lesson(model, *sets, small_config(model))
    for update in range(40):
        batches.make_batches(update, BatchShare(3, 3))

    def refuse(pixels: torch.Tensor) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(model, "encode_images", refuse)
    for update in range(40):
        batches.make_batches(update, BatchShare(3, 3))


def test_fault_10_the_end_loads_no_second_pipeline(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import DiffusionPipeline

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded a pipeline")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    config = small_config(model, watch__every=4, watch__images=1, watch__steps=2)
    assert train(tmp_path, model, sets, config)


def test_fault_12_new_words_class_images_and_frozen_encoders_go_together(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    config = small_config(
        model,
        subject__phrase="<rraj> person",
        adapter__new_words={"<rraj>": "person"},
        train__updates=4,
        train__checkpoint_every=2,
    )
    whole = train(tmp_path / "deep" / "er" / "whole", model, sets, config)
    stopped = claimed(tmp_path / "stopped")

    def stop(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapter(stopped, model, *sets, config, stop)
    resumed = train(stopped.path, model, sets, config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    words = [load_words(path.parent) for path in (stopped.adapter, tmp_path / "deep/er/whole/x")]
    assert words[0].keys() == words[1].keys() != set()
    assert all(torch.equal(words[0][name], words[1][name]) for name in words[0])


def load_words(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*-tokens/*.safetensors")
    return load_file(file)


def test_fault_13_a_resumed_run_meets_what_it_has_not_seen_yet(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path, told: RecordedRecipe
) -> None:
    config = small_config(model, train__updates=6, train__checkpoint_every=2)
    train(tmp_path / "whole", model, sets, config)
    expected = [steps.tolist() for steps in told.timesteps]
    told.timesteps.clear()
    run = claimed(tmp_path / "stopped")

    def stop(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapter(run, model, *sets, config, stop)
    told.timesteps.clear()
    train(run.path, model, sets, config)
    assert [steps.tolist() for steps in told.timesteps] == expected[4:]


def test_fault_14_class_images_of_another_prompt_are_never_reused(
    model: Model, tmp_path: Path
) -> None:
    run, config = claimed(tmp_path), small_config(model)
    side = model.advice.resolution_px
    cats = make_class_images(run, model, "a photo of a cat", config.priors, 0, side)
    old = [path.read_bytes() for path in cats.paths()]
    (run.priors / ".DS_Store").write_bytes(b"junk")
    dogs = make_class_images(run, model, "a photo of a dog", config.priors, 0, side)
    new = [path.read_bytes() for path in dogs.paths()]
    assert len(set(new)) == len(new) == config.priors.count
    assert not set(old) & set(new)
    assert all(path.suffix == ".png" for path in dogs.paths())


def test_fault_15_class_images_neither_stretch_the_run_nor_have_a_photo_each(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    counted: list[Event] = []
    run, config = claimed(tmp_path), small_config(model)
    train_adapter(run, model, *sets, config, counted.append)
    assert sum(isinstance(event, LossLogged) for event in counted) == config.train.steps
    batches = make_lesson(model, *sets, config)
    pairs = Counter()
    for update in range(24):
        photo, prior = batches.draw_samples(update, BatchShare(1, 1))
        pairs[photo.picture, prior.picture] += 1
    assert len(pairs) > 3


def test_fault_16_stray_files_do_no_harm_and_alpha_is_free(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    folder = make_photos(tmp_path / "photos")
    for stray in (".DS_Store", "Thumbs.db", "notes.md"):
        (folder / stray).write_bytes(b"junk")
    (folder / ".ipynb_checkpoints").mkdir()
    photos = load_photos(folder, claimed(tmp_path / "run"), 64)
    assert [photo.source for photo in photos.photos] == [f"IMG_{n}.jpg" for n in range(3)]
    half = train(tmp_path / "a", model, sets, small_config(model, train__alpha=1.0))
    full = train(tmp_path / "b", model, sets, small_config(model, train__alpha=2.0))
    assert any(not torch.equal(half[name], full[name]) for name in half)
    for text in ("False", "false", "no"):
        assert load_config(sets=[f"photos.flip={text}"]).photos.flip is False


def test_fault_17_frozen_embeddings_gather_no_gradient(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    config = small_config(model, adapter__text_encoders=True)
    batches = make_lesson(model, *sets, config)
    weights = model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, text_encoders=True))
    try:
        compute_loss(model, batches, 0, config).total.backward()
        taught = {id(p) for one in weights for p in one.parameters}
        text = [p for one in weights if one.role.startswith("text") for p in one.parameters]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in text)
        for part in frozen_parts(model):
            for parameter in part.parameters():
                assert id(parameter) in taught or parameter.grad is None
    finally:
        model.detach_adapter()


def frozen_parts(model: Any) -> Iterator[torch.nn.Module]:
    pipeline = model._pipeline
    yield from (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)


def test_fault_18_the_file_says_how_it_was_made(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    train(tmp_path, model, sets, small_config(model))
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        story = file.metadata()
    assert story["dreamloom.subject"] == "rraj person"
    assert story["dreamloom.base_fingerprint"] == model.identity.fingerprint
    assert story["dreamloom.seed"] == "0"
    assert json.loads(story["dreamloom.settings"])["rank"] == 2
    told = json.loads(story["dreamloom.config"])
    assert told["objective"]["weighting"] == model.advice.weighting == "debiased"
    assert str(tmp_path) not in json.dumps(told)
