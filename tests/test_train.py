"""Training on a small random SDXL: what is learned from, in which order, and how it goes on."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import join_processes
from dreamloom.core.errors import AdapterError, ConfigError, RunFolderError, TrainingError
from dreamloom.core.events import (
    Event,
    LossLogged,
    Note,
    StageSkipped,
    Validated,
    ValidationSampled,
)
from dreamloom.core.manifests import ClassImageSet, ImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder, file_sha256
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import AdapterSpec, Latents, Model
from dreamloom.training.provenance import name_inputs
from dreamloom.training.train import _begin_from, check_training, train_adapter
from studio_set import claimed, compute_loss, make_lesson, small_config


def train(
    path: Path,
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet | None],
    config: LoomConfig | None = None,
) -> tuple[dict[str, torch.Tensor], list[Event]]:
    told: list[Event] = []
    run = claimed(path)
    train_adapter(run, model, *sets, config or small_config(model), told.append)
    return load_file(run.adapter), told


@pytest.fixture(scope="module")
def begun(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An adapter's file to begin from."""
    folder = tmp_path_factory.mktemp("begun")
    train(folder, model, sets)
    return folder / "adapter.safetensors"


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_training_moves_every_layer_and_signs_the_file(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    config = small_config(model, train__target_modules="all")
    weights, told = train(tmp_path, model, sets, config)
    moved = [key for key in weights if key.endswith("lora_up.weight")]
    assert moved
    assert all(weights[key].abs().max() > 0 for key in moved)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    story = read_adapter(tmp_path / "adapter.safetensors").metadata
    assert story["dreamloom.subject"] == "rraj person"
    assert story["dreamloom.base_fingerprint"] == model.identity.fingerprint
    losses = [event for event in told if isinstance(event, LossLogged)]
    assert [event.update for event in losses] == [1, 2, 3, 4]
    assert all(event.prior is not None for event in losses)


def test_the_same_call_gives_the_same_weights_bit_for_bit(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    every_layer = small_config(model, train__target_modules="all")
    first, _ = train(tmp_path / "a", model, sets, every_layer)
    torch.manual_seed(12345)
    second, _ = train(tmp_path / "b", model, sets, every_layer)
    other, _ = train(tmp_path / "c", model, sets, every_layer.model_copy(update={"seed": 1}))
    assert equal(first, second)
    assert not equal(first, other)


def test_a_stopped_run_goes_on_to_the_same_weights(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    whole, _ = train(tmp_path / "whole", model, sets)
    run = claimed(tmp_path / "stopped")

    def interrupt(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match="Stopped after update 3 of 4; nothing is lost"):
        train_adapter(run, model, *sets, small_config(model), interrupt)
    assert not run.adapter.exists()
    resumed, told = train(run.path, model, sets)
    assert [event.update for event in told if isinstance(event, LossLogged)] == [4]
    assert equal(whole, resumed)
    assert not any(run.checkpoints.iterdir())


VARIED = {
    "train__text_learning_rate": 2e-3,
    "train__text_encoder_2_learning_rate": 5e-4,
    "train__learning_rate_pattern": {"attn2": 5e-3},
    "train__lr_scheduler": "cosine_restarts",
    "train__lr_num_cycles": 2,
    "photos__caption_lines": "choose",
    "photos__shuffle_caption": True,
    "photos__caption_tag_dropout_rate": 0.3,
    "objective__multires_noise_iterations": 4,
}


@pytest.mark.parametrize("trains_text", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_of_several_rates_and_varied_captions_goes_on_to_the_same_weights(
    trains_text: bool, model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    captioned = tuple(
        photo.model_copy(update={"caption": f"a rraj person, red, {number}\nrraj, hat, smiling"})
        for number, photo in enumerate(sets[0].photos)
    )
    photos = sets[0].model_copy(update={"photos": captioned})
    config = small_config(
        model,
        adapter__text_encoders=trains_text,
        priors__kind="none",
        train__steps=2,
        **VARIED,
    )
    whole, _ = train(tmp_path / "whole", model, (photos, None), config)
    run = claimed(tmp_path / "stopped")

    def interrupt(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match="Stopped after update"):
        train_adapter(run, model, photos, None, config, interrupt)
    resumed, _ = train(run.path, model, (photos, None), config)
    assert equal(whole, resumed)


@pytest.mark.parametrize("name", VARIED)
def test_a_run_of_other_rates_captions_or_noise_is_another_run(
    name: str, model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    plain, changed = small_config(model), small_config(model, **{name: VARIED[name]})
    one, other = (
        name_inputs(model, *sets, config, join_processes()) for config in (plain, changed)
    )
    assert {key for key in one if one[key] != other[key]} == {"settings"}


def test_settings_that_came_later_leave_earlier_runs_known(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    config = small_config(model, train__learning_rate=1e-3)
    inputs = name_inputs(model, *sets, config, join_processes())
    # Computed before there were rates by layer, varied captions and multires noise.
    assert inputs["settings"] == "d95a75585fe8222f888b822294b9146721700a2010730c0dc541de2b4ec494b6"


@pytest.mark.slow  # resuming has its tests beside it
def test_the_mean_loss_of_a_resumed_run_counts_the_whole_run(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    config = small_config(model, train__updates=20, train__batch_photos=1, train__batch_priors=1)
    train(tmp_path / "whole", model, sets, config)
    run = claimed(tmp_path / "stopped")

    def interrupt(event: Event) -> None:
        if isinstance(event, LossLogged) and event.update == 19:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match="Stopped after update 19"):
        train_adapter(run, model, *sets, config, interrupt)
    train(run.path, model, sets, config)
    whole, resumed = (one.read_record("train") for one in (RunFolder(tmp_path / "whole"), run))
    assert whole is not None
    assert resumed is not None
    assert resumed.results["mean_loss_last_tenth"] == whole.results["mean_loss_last_tenth"]


def test_an_adapter_cut_off_to_nothing_is_trained_again(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    lazy, _ = train(tmp_path, model, sets)
    whole = {key: tensor.clone() for key, tensor in lazy.items()}  # not mapped from the file
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    again, _ = train(tmp_path, model, sets)
    assert equal(whole, again)


def test_a_run_that_is_killed_goes_on_to_the_same_weights_bit_for_bit(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    """SIGKILL leaves no time to save anything: what was saved before must be enough."""
    config = small_config(
        model,
        train__updates=12,
        train__accumulate=2,
        train__average_decay=0.9,
        train__target_modules="all",
        adapter__text_encoders=True,
        photos__flip=True,
    )
    whole, _ = train(tmp_path / "whole", model, sets, config)
    run = claimed(tmp_path / "killed")
    for last in sorted(random.Random(0).sample(range(2, 13), 3)):
        child = os.fork()
        if child == 0:

            def die(event: Event, last: int = last) -> None:
                if isinstance(event, LossLogged) and event.update == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            train_adapter(run, model, *sets, config, die)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not run.adapter.exists()
    resumed, told = train(run.path, model, sets, config)
    assert len([event for event in told if isinstance(event, LossLogged)]) < 12
    assert equal(whole, resumed)


def test_looking_changes_nothing_and_recommends(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    plain, _ = train(tmp_path / "plain", model, sets)
    config = small_config(model, watch__every=2, watch__images=1, watch__steps=2)
    seen: list[tuple[int, bool]] = []

    def judge(images: ImageSet, floor: ImageSet | None) -> Scorecard:
        seen.append((len(images.pictures), floor is not None))
        lift = {1: 0.0, 2: 0.8, 3: 0.3}[len(seen)]
        score = Score(value=lift, n=1, floor=0.0, ceiling=1.0, lift=lift)
        return Scorecard(
            scores={"identity": score},
            encoders="picturebook",
            photos=3,
            confidence=0.95,
            resamples=100,
            pictures=(),
        )

    run, told = claimed(tmp_path / "watched"), []
    record = train_adapter(run, model, *sets, config, told.append, judge)
    assert equal(plain, load_file(run.adapter))
    assert seen == [(1, False), (1, True), (1, True)]
    assert [event.update for event in told if isinstance(event, ValidationSampled)] == [0, 2, 4]
    losses = {event.update: event.loss for event in told if isinstance(event, Validated)}
    assert losses.keys() == {0, 2, 4}
    assert losses[0] != losses[2]
    assert record.results["recommended"]["update"] == 2
    kept = run.validation_samples / "000002" / "adapter.safetensors"
    assert not equal(plain, load_file(kept))
    assert equal(plain, load_file(run.validation_samples / "000004" / "adapter.safetensors"))


def test_of_many_validations_the_last_and_the_best_are_kept(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    config = small_config(
        model, watch__every=1, watch__images=1, watch__steps=2, validation__keep=1, train__steps=4
    )
    lifts = iter((0.0, 0.8, 0.3, 0.2, 0.1))

    def judge(images: ImageSet, floor: ImageSet | None) -> Scorecard:
        lift = next(lifts)
        score = Score(value=lift, n=1, floor=0.0, ceiling=1.0, lift=lift)
        return Scorecard(
            scores={"identity": score},
            encoders="picturebook",
            photos=3,
            confidence=0.95,
            resamples=100,
            pictures=(),
        )

    run, told = claimed(tmp_path), []
    record = train_adapter(run, model, *sets, config, told.append, judge)
    assert [e.update for e in told if isinstance(e, ValidationSampled)] == [0, 1, 2, 3, 4]
    kept = sorted(path.name for path in run.validation_samples.iterdir())
    assert kept == ["000000", "000001", "000004"]
    assert record.results["recommended"]["update"] == 1


def warnings_of(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Note) and event.warning]


def test_a_usual_training_is_not_doubted(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    assert warnings_of(train(tmp_path, model, sets)[1]) == []


def test_prodigy_at_a_rate_of_adamw_is_doubted_first_and_last_and_its_rate_is_told(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    pytest.importorskip("pytorch_optimizer")

    def teach(name: str, rate: float) -> list[Event]:
        config = small_config(
            model, train__optimizer="prodigy", train__learning_rate=rate, train__warmup_steps=0
        )
        return train(tmp_path / name, model, sets, config)[1]

    told = teach("low", 1e-4)
    doubt, idle = warnings_of(told)
    assert "train.learning_rate, which is 0.0001: so little learns next to nothing" in doubt
    assert idle.startswith("the adapter changed hardly anything")
    first = next(at for at, event in enumerate(told) if isinstance(event, LossLogged))
    assert told.index(Note("train", doubt, warning=True)) < first
    rates = [event.learning_rate for event in told if isinstance(event, LossLogged)]
    assert 0 < max(rates) < 1e-8
    assert not any("finds the learning rate" in text for text in warnings_of(teach("usual", 1.0)))


def test_a_warm_up_that_never_ends_is_doubted(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    config = small_config(model, train__warmup_steps=100, train__learning_rate=1e-9)
    doubt, idle = warnings_of(train(tmp_path, model, sets, config)[1])
    assert doubt.startswith("train.warmup_steps = 100 is more than the 4 updates: ")
    assert "ends at 4% of 1e-09" in doubt
    assert "changed hardly anything" in idle


def test_validation_repeats_and_is_of_photos_that_are_not_trained_on(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    def validations(name: str, **settings: object) -> list[Validated]:
        watched = {"watch__every": 2, "watch__images": 1, "watch__steps": 2, **settings}
        config = small_config(model, watch__held_out_photos=1, **watched)
        _, told = train(tmp_path / name, model, sets, config)
        return [event for event in told if isinstance(event, Validated)]

    first, again = validations("a"), validations("b")
    assert first == again
    assert all(event.held_out for event in first)
    # What makes training robust does not blur what it is measured by.
    other = validations(
        "c",
        objective__noise_offset=0.3,
        objective__multires_noise_iterations=4,
        objective__weighting="min_snr",
    )
    assert other[0] == first[0]
    assert other[1].loss != first[1].loss


def test_a_checkpoint_of_other_settings_is_refused_and_kept(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    run = claimed(tmp_path)

    def interrupt(event: Event) -> None:
        if isinstance(event, LossLogged):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError, match="Stopped after update 1"):
        train_adapter(run, model, *sets, small_config(model), interrupt)
    with pytest.raises(TrainingError, match="made with other seed"):
        train_adapter(run, model, *sets, small_config(model, seed=5))
    resumed, _ = train(tmp_path, model, sets)
    assert resumed


def test_a_finished_run_is_not_done_again_nor_overwritten(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    first, _ = train(tmp_path, model, sets)
    again, told = train(tmp_path, model, sets)
    assert isinstance(told[0], StageSkipped)
    with pytest.raises(RunFolderError, match="already holds an adapter made with other settings"):
        train(tmp_path, model, sets, small_config(model, train__rank=3))
    assert equal(first, again)
    assert equal(first, load_file(tmp_path / "adapter.safetensors"))


def test_a_loss_that_is_not_finite_stops_with_the_update_named(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    wild = small_config(model, train__learning_rate=1e30, train__warmup_updates=0)
    run = claimed(tmp_path)
    with pytest.raises(TrainingError, match=r"not finite at update \d"):
        train_adapter(run, model, *sets, wild)
    assert not run.adapter.exists()
    assert run.read_record("train") is None


def test_a_full_disk_at_the_end_loses_nothing(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = train(tmp_path / "whole", model, sets)
    run = claimed(tmp_path / "full")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dreamloom.training.train.write_adapter", refuse)
        with pytest.raises(TrainingError, match="holds all of the training"):
            train_adapter(run, model, *sets, small_config(model))
    again, told = train(run.path, model, sets)
    assert not any(isinstance(event, LossLogged) for event in told)
    assert equal(whole, again)
    assert not any(run.checkpoints.iterdir())


def test_a_held_out_photo_may_have_a_caption_of_its_own(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    photos = sets[0].model_copy(
        update={
            "photos": tuple(
                photo.model_copy(update={"caption": f"photo {number}"})
                for number, photo in enumerate(sets[0].photos)
            )
        }
    )
    watched = {"watch__every": 4, "watch__images": 1, "watch__steps": 2}
    config = small_config(model, watch__held_out_photos=1, **watched)
    assert train(tmp_path, model, (photos, None), config)[0]


def test_a_training_can_begin_from_an_adapter(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    first, _ = train(tmp_path / "first", model, sets)
    file = tmp_path / "first" / "adapter.safetensors"
    config = small_config(model, train__init_adapter=str(file))
    still, _ = train(
        tmp_path / "still",
        model,
        sets,
        small_config(
            model, train__init_adapter=str(file), train__learning_rate=1e-12, train__weight_decay=0
        ),
    )
    assert all((still[key] - first[key]).abs().max() < 1e-9 for key in first)
    went_on, _ = train(tmp_path / "second", model, sets, config)
    assert not equal(went_on, first)
    header = read_adapter(tmp_path / "second" / "adapter.safetensors").metadata
    assert header["dreamloom.init_adapter_sha256"] == file_sha256(file)
    assert str(tmp_path) not in str(header)
    record = claimed(tmp_path / "second").read_record("train")
    assert record is not None
    assert record.inputs["adapter to begin from"] == file_sha256(file)
    with pytest.raises(RunFolderError, match="made with other adapter to begin from"):
        train(tmp_path / "second", model, sets)
    # Where it lies does not matter, and its name is remembered nowhere else.
    file.rename(tmp_path / "moved.safetensors")
    moved = small_config(model, train__init_adapter=str(tmp_path / "moved.safetensors"))
    _, told = train(tmp_path / "second", model, sets, moved)
    assert isinstance(told[0], StageSkipped)


def test_runs_that_begin_anew_are_recorded_as_before(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    train(tmp_path, model, sets)
    record = claimed(tmp_path).read_record("train")
    assert record is not None
    assert "init_adapter" not in record.settings
    assert "adapter to begin from" not in record.inputs
    assert "init_adapter" not in str(read_adapter(tmp_path / "adapter.safetensors").metadata)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train.rank": 3}, r"has rank 2 in unet.*where rank 3 is trained"),
        ({"train.target_modules": "all"}, r"other layers than are trained here: unet"),
        ({"adapter.text_encoders": True}, r"other layers than are trained here: text_encoder"),
        ({"adapter.kind": "dora"}, "Only a LoRA that begins by default"),
        ({"adapter.init_lora_weights": "pissa"}, "Only a LoRA that begins by default"),
        ({"adapter.placeholder_tokens": {"<me>": "dog"}}, "other new words: <me>"),
        ({"objective.zero_terminal_snr": True}, "was trained with objective.zero_terminal_snr"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_trained(
    changed: dict[str, object],
    says: str,
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    begun: Path,
) -> None:
    config = small_config(
        model,
        **{"train.init_adapter": str(begun), "subject.phrase": "<me> person", **changed},
    )
    # The tiny model predicts noise, and would say so first.
    is_noise = config.objective.zero_terminal_snr
    with pytest.raises((AdapterError, ConfigError), match=says):
        (
            _begin_from(str(begun), model, config)
            if is_noise
            else check_training(model, [""], config)
        )
    # Nothing is left on the model.
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))
    model.detach_adapter()


def test_captions_of_several_lengths_are_trained_whole_and_told_of(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path
) -> None:
    """What stands behind the text encoders' length changes what is learned."""

    def train_on(end: str) -> tuple[dict[str, torch.Tensor], list[Event]]:
        texts = ("a photo of a dog", f"{'a dog ' * 40}{end}", "a person " * 80)
        captioned = tuple(
            photo.model_copy(update={"caption": text})
            for photo, text in zip(sets[0].photos, texts, strict=True)
        )
        photos = sets[0].model_copy(update={"photos": captioned})
        config = small_config(model, train__steps=2, train__batch_photos=3)
        return train(tmp_path / end, model, (photos, sets[1]), config)

    (snow, told), (painting, _) = train_on("snow"), train_on("painting")
    assert not equal(snow, painting)
    notes = [event.text for event in told if isinstance(event, Note)]
    assert ["in 2 chunks" in notes[0], "in 3 chunks" in notes[1], len(notes)] == [True, True, 2]


def test_a_broken_photo_is_named_with_its_update(
    model: Model,
    sets: tuple[PhotoSet, ClassImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, seen = model.encode_images, []

    def spoil(pixels: torch.Tensor) -> Latents:
        latents = encode(pixels)
        seen.append(len(pixels))
        return (
            Latents(latents.mean * float("nan"), latents.deviation) if len(seen) == 2 else latents
        )

    monkeypatch.setattr(model, "encode_images", spoil)
    run = claimed(tmp_path)
    with pytest.raises(
        TrainingError, match=r"not finite at update \d, for IMG_1.jpg;.*Look at that picture"
    ):
        train_adapter(run, model, *sets, small_config(model))
    assert not run.adapter.exists()


def test_photos_meet_the_same_rng_with_and_without_class_images(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    """Else a comparison of the two would compare luck as well."""
    config = small_config(model)
    photos, priors = sets
    with_prior = make_lesson(model, photos, priors, config)
    without = make_lesson(model, photos, None, config)
    for update in range(3):
        one = compute_loss(model, with_prior, update, config)
        other = compute_loss(model, without, update, config)
        torch.testing.assert_close(one.subject, other.subject)
        assert one.prior is not None
        assert other.prior is None


def test_base_predictions_stand_in_for_class_images(
    model: Model, sets: tuple[PhotoSet, ClassImageSet]
) -> None:
    config = small_config(model, priors__kind="base")
    batches = make_lesson(model, sets[0], None, config)
    weights = model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))
    fresh = compute_loss(model, batches, 0, config)
    assert fresh.prior is not None
    assert fresh.prior.item() == pytest.approx(0, abs=1e-9)
    for weight in (p for one in weights for p in one.parameters):
        torch.nn.init.normal_(weight.data, std=0.3)
    changed = compute_loss(model, batches, 0, config)
    model.detach_adapter()
    assert changed.prior is not None
    assert changed.prior.item() > 1e-4
