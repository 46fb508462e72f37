"""Commands that span several stages, as library calls: runs, settings, drawing, scoring."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamloom.core.config.loading import load_config
from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    PhotoError,
    RunFolderError,
)
from dreamloom.core.events import Event, Note
from dreamloom.core.manifests import read_class_image_set, read_image_set, read_photo_set
from dreamloom.data.prompts.packs import read_pack
from dreamloom.evaluation.scoring import Floor
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.writing import write_adapter
from dreamloom.models.families import load_model
from dreamloom.pipeline.draw import GenerateRequest, draw, pack_prompts
from dreamloom.pipeline.score import score
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import (
    name_differences,
    name_folder,
    open_run,
    prepare_run,
    train_subject,
)
from studio_set import make_photos

SMALL = {
    "train.steps": 2,
    "train.rank": 2,
    "train.batch_photos": 1,
    "train.batch_priors": 1,
    "priors.count": 2,
    "priors.steps": 2,
    "generate.steps": (2,),
    "generate.images_per_prompt": 1,
    "evaluate.resamples": 100,
}


@pytest.fixture
def runtime() -> Runtime:
    return pick_runtime("cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_photos_to_adapter_to_pictures_to_scores(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    asked = load_config(overrides={"base": str(tiny_sdxl), "subject.phrase": "sks dog", **SMALL})
    run, model, config = prepare_run(tmp_path / "run", asked, runtime, photos)
    record = train_subject(run, model, photos, config)
    assert record.results["class_images"] == 2
    assert record.results["photo_exposures"] == 2
    for name in ("photos", "priors", "train"):
        assert run.read_record(name) is not None
    assert run.events_file.read_text().count("LossLogged") == 2

    request = GenerateRequest(
        (str(run.adapter),), ("a {subject} at night",), ("seed-v1",), None, True, "p", run.path
    )
    pictures, floor = draw(request, load_config(overrides=SMALL), runtime)
    drawn = read_image_set(pictures)
    assert drawn.pictures[0].prompt == "a sks dog at night"
    assert len(drawn.pictures) == 1 + len(read_pack("seed-v1").prompts)
    assert read_image_set(floor).adapters == ()

    card = score(pictures, photos, asked, floor)
    assert card.photos == 3
    assert card.scores["identity"].value is None
    assert card.scores["identity"].note
    # The run's class images are the strangers, until others are named.
    base = read_image_set(floor)
    known = Floor(base, read_class_image_set(run.priors).paths())
    assert run.read_record(f"evaluate-{pictures.name}").inputs["floor"] == known.fingerprint
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    for path in sorted(photos.iterdir()):
        with Image.open(path) as photo:
            photo.convert("RGB").rotate(90).save(strangers / f"{path.stem}.png")
    score(pictures, photos, asked, floor, strangers)
    others = Floor(base, sorted(strangers.iterdir()))
    assert run.read_record(f"evaluate-{pictures.name}").inputs["floor"] == others.fingerprint
    assert len({known.fingerprint, others.fingerprint, base.fingerprint}) == 3


def test_bad_input_makes_no_folder(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    out = tmp_path / "run"
    good = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotoError):
        prepare_run(out, good, runtime, tmp_path / "empty")
    (photos / "IMG_9.jpg").write_bytes((photos / "IMG_0.jpg").read_bytes()[:900])
    with pytest.raises(PhotoError, match=r"IMG_9\.jpg"):
        prepare_run(out, good, runtime, photos)
    (photos / "IMG_9.jpg").unlink()
    with pytest.raises(BaseModelError):
        prepare_run(out, load_config(overrides={"base": "sdxl"}), runtime, photos)
    wrong = load_config(overrides={"base": str(tiny_sdxl), "priors.scheduler": "ddin"})
    with pytest.raises(ConfigError, match="no scheduler 'ddin'"):
        prepare_run(out, wrong, runtime, photos)
    assert not out.exists()


def test_a_folder_with_other_things_is_left_alone(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    config = load_config(overrides={"base": str(tiny_sdxl)})
    before = sorted(photos.iterdir())
    with pytest.raises(RunFolderError, match="already holds other files"):
        prepare_run(photos, config, runtime, photos)
    with pytest.raises(RunFolderError, match="is a file"):
        prepare_run(before[0], config, runtime, photos)
    assert sorted(photos.iterdir()) == before


def test_another_run_in_the_folder_is_refused_by_its_differences(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    first = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    run, model, config = prepare_run(tmp_path / "run", first, runtime, photos)
    train_subject(run, model, photos, config)
    changed = load_config(overrides={"base": str(tiny_sdxl), **SMALL, "train.rank": 3})
    with pytest.raises(RunFolderError, match=r"train\.rank is 2 there and 3 here"):
        prepare_run(run.path, changed, runtime, photos)
    others = make_photos(tmp_path / "others", count=4)
    with pytest.raises(RunFolderError, match="its photos are not those in"):
        prepare_run(run.path, first, runtime, others)
    drawing_only = load_config(overrides={"base": str(tiny_sdxl), **SMALL, "generate.steps": (9,)})
    prepare_run(run.path, drawing_only, runtime, photos)


def test_a_run_from_before_there_were_some_settings_goes_on_without_them(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    first = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    run, _, _ = prepare_run(tmp_path / "run", first, runtime, photos)
    lines = run.settings_file.read_text().splitlines()
    later = ("text_encoder_2_learning_rate", "lr_num_cycles", "shuffle_caption", "multires_noise")
    kept = [line for line in lines if not line.startswith(later)]
    assert len(lines) - len(kept) == 5
    run.settings_file.write_text("\n".join(kept))
    prepare_run(run.path, first, runtime, photos)
    other = load_config(
        overrides={"base": str(tiny_sdxl), **SMALL, "train.text_encoder_2_learning_rate": 0.5}
    )
    with pytest.raises(RunFolderError, match=r"encoder_2_learning_rate is .* there and 0\.5 here"):
        prepare_run(run.path, other, runtime, photos)


def test_lines_of_captions_reach_training_and_are_looked_through_one_by_one(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    (photos / "IMG_0.txt").write_text("a photo of sks dog, red\n\na dog\n")
    asked = {"base": str(tiny_sdxl), "subject.phrase": "sks dog", **SMALL, "priors.kind": "none"}
    chosen = load_config(overrides={**asked, "photos.caption_lines": "choose"})
    run, model, config = prepare_run(tmp_path / "run", chosen, runtime, photos)
    told: list[Event] = []
    train_subject(run, model, photos, config, told.append)
    assert read_photo_set(run.photos).photos[0].caption == "a photo of sks dog, red\na dog"
    warned = [event.text for event in told if isinstance(event, Note) and event.warning]
    assert any(text.startswith("1 of 2 captions never name the subject") for text in warned)
    # The run is known again, and no other reading of its photos is.
    prepare_run(run.path, chosen, runtime, photos)
    with pytest.raises(RunFolderError, match="caption_lines is 'choose' there and 'join' here"):
        prepare_run(run.path, load_config(overrides=asked), runtime, photos)


def test_what_is_given_with_resume_is_taken_or_refused_by_name(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    first = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    run, _, begun = prepare_run(tmp_path / "run", first, runtime, photos)
    settings = run.settings_file.read_text()
    for other, told in (
        ({"subject.phrase": "zzz dog"}, r"subject\.phrase is 'rraj person' there and 'zzz dog'"),
        ({"seed": 7}, "seed is 0 there and 7 here"),
        ({"base": "picturebook"}, "base is .* there and 'picturebook' here"),
        ({"train.updates": 300}, r"train\.steps is 2 there and 300 here"),
        ({"train.learning_rate": 0.5}, r"train\.learning_rate is .* there and 0\.5 here"),
        ({"preset": "quick"}, "there and .* here"),
    ):
        with pytest.raises(RunFolderError, match=told) as caught:
            prepare_run(run.path, load_config(overrides=other), runtime, photos, resume=True)
        assert "was begun with other settings" in caught.value.problem
    free = {
        "device": "cpu",
        "train.checkpointing_steps": 1,
        "memory.micro_batch_size": 1,
        "generate.steps": (9,),
        "seed": 0,
    }
    _, _, taken = prepare_run(run.path, load_config(overrides=free), runtime, photos, resume=True)
    flat = taken.flat()
    assert {name: flat[name] for name in free} == free
    same = set(flat) - set(free)
    assert {name: flat[name] for name in same} == {name: begun.flat()[name] for name in same}
    prepare_run(run.path, load_config(), runtime, photos, resume=True)
    assert run.settings_file.read_text() == settings


def test_resume_takes_the_runs_own_settings(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    with pytest.raises(RunFolderError, match=r"no run in .* to go on with"):
        prepare_run(tmp_path / "none", load_config(), runtime, photos, resume=True)
    first = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    run, _, config = prepare_run(tmp_path / "run", first, runtime, photos)
    _, _, again = prepare_run(run.path, load_config(), runtime, photos, resume=True)
    assert again == config


def test_a_run_of_before_there_were_settings_goes_on_as_it_was_begun(
    tiny_sdxl: Path, photos: Path, tmp_path: Path, runtime: Runtime
) -> None:
    """The base model's advice may have changed since; the run's settings have not."""
    later = {"train.prior_target": "images", "train.final_scale": 1.0, "train.caption_dropout": 0.0}
    given = {"base": str(tiny_sdxl), **SMALL, "priors.prompts": (), **later}
    run, model, begun = prepare_run(tmp_path / "run", load_config(overrides=given), runtime, photos)
    lines = run.settings_file.read_text().splitlines()
    names = tuple(name.partition(".")[2] for name in later)
    run.settings_file.write_text("\n".join(one for one in lines if not one.startswith(names)))
    _, _, again = prepare_run(run.path, load_config(), runtime, photos, resume=True)
    assert again == begun
    advised = load_config(overrides={name: v for name, v in given.items() if name not in later})
    assert resolve_defaults(advised, model).train.final_scale == 0.7
    with pytest.raises(
        RunFolderError, match=r"train\.prior_target is 'images' there and 'base_pre"
    ):
        prepare_run(run.path, advised, runtime, photos)


def test_settling_leaves_nothing_automatic(tiny_sdxl: Path, runtime: Runtime) -> None:
    model = load_model(str(tiny_sdxl), runtime)
    config = resolve_defaults(load_config(), model)
    assert config.photos.resolution_px == 64
    assert config.train.target_modules == "all"
    assert config.train.alpha == 16.0


def test_a_run_writes_its_settings_once(tmp_path: Path) -> None:
    config = load_config()
    run = open_run(tmp_path / "run", config)
    assert load_config(file=run.settings_file) == config
    stamp = run.settings_file.stat().st_mtime_ns
    open_run(tmp_path / "run", config)
    assert run.settings_file.stat().st_mtime_ns == stamp


def test_a_run_without_a_folder_is_named_after_its_subject() -> None:
    assert name_folder(load_config(overrides={"subject.phrase": "Sks Dog!"})) == Path(
        "runs/sks-dog"
    )
    assert name_folder(load_config(overrides={"subject.phrase": "???"})) == Path("runs/run")


def test_differences_are_named_with_both_values() -> None:
    one = load_config()
    other = load_config(overrides={"subject.phrase": "sks dog", "device": "cpu"})
    assert name_differences(one, other) == [
        "subject.phrase is 'rraj person' there and 'sks dog' here",
        "subject.class_noun is 'person' there and 'dog' here",
    ]


def test_packs_are_filled_with_the_subject() -> None:
    prompts = pack_prompts("seed-v1", "sks dog")
    assert prompts[0].text == "a photo of sks dog"
    assert all("sks dog" in prompt.text and prompt.category for prompt in prompts)
    assert pack_prompts("class-v1", "sks dog")[0].text == "a photo of a dog"
    assert pack_prompts("class-v1", "sks", "owl")[0].text == "a photo of an owl"
    texts = [prompt.text for prompt in pack_prompts("class-v1", "rraj woman")]
    assert texts.count("a photo of a woman") == 1
    with pytest.raises(ConfigError, match=r"no prompt pack 'seed'.*seed-v1"):
        pack_prompts("seed", "x")


def test_a_prompt_that_names_nobody_is_explained(tmp_path: Path, runtime: Runtime) -> None:
    nobody = GenerateRequest((), ("a photo of {subject}",), (), None, False, "p", tmp_path / "out")
    with pytest.raises(ConfigError, match="nobody is named"):
        draw(nobody, load_config(), runtime)
    nothing = GenerateRequest((), (), (), None, False, "p", tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw(nothing, load_config(), runtime)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_fit_leaves_no_folder(
    tiny_sdxl: Path, tmp_path: Path, runtime: Runtime
) -> None:
    foreign = Adapter({"unet.nowhere": Layer(torch.ones(1, 4), torch.ones(4, 1))})
    write_adapter(tmp_path / "foreign.safetensors", foreign)
    config = load_config(overrides={"base": str(tiny_sdxl), **SMALL})
    out = tmp_path / "out"
    request = GenerateRequest(
        (str(tmp_path / "foreign.safetensors"),), ("x",), (), None, False, "p", out
    )
    with pytest.raises(AdapterError, match="does not fit"):
        draw(request, config, runtime)
    bad_name = GenerateRequest((), ("x",), (), None, False, "../p", out)
    with pytest.raises(ConfigError, match="cannot name a set"):
        draw(bad_name, config, runtime)
    assert not out.exists()
