"""Drawing sets of pictures with a small random SDXL."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamloom.adapters import Adapter, Layer, write_adapter
from dreamloom.config import GenerateConfig
from dreamloom.errors import AdapterError, ConfigError, RunFolderError
from dreamloom.events import Event, Progress, StageSkipped
from dreamloom.families import load_model
from dreamloom.families.base import AdapterSpec, Model
from dreamloom.generate import Prompt, Worn, generate_images
from dreamloom.pictures import read_image_set
from dreamloom.priors import make_priors
from dreamloom.runtime import pick_runtime
from looks import psnr_db
from studio_set import claimed, small_config

PROMPTS = [Prompt("a photo of rraj person", "photo"), Prompt("a dog")]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Model:
    return load_model(str(tiny_sdxl), pick_runtime("cpu"))


@pytest.fixture(scope="module")
def settings(model: Model) -> GenerateConfig:
    return small_config(model).generate


@pytest.fixture
def adapter(model: Model, tmp_path: Path) -> Path:
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))
    fresh = model.read_adapter()
    model.detach_adapter()
    layers = {
        name: Layer(layer.down, 0.3 * torch.randn(layer.up.shape))
        for name, layer in fresh.layers.items()
    }
    story = {
        "dreamloom.base": "tiny",
        "dreamloom.base_fingerprint": model.identity.fingerprint,
    }
    write_adapter(tmp_path / "one.safetensors", Adapter(layers, story))
    return tmp_path / "one.safetensors"


def test_every_prompt_is_drawn_with_every_seed_scheduler_and_step(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    grid = settings.model_copy(update={"schedulers": ("ddim", "euler"), "steps": (2, 3)})
    told: list[Event] = []
    images = generate_images(claimed(tmp_path), model, PROMPTS, grid, observe=told.append)
    assert len(images.pictures) == 2 * 2 * 2 * 2
    assert len({p.model_dump_json(exclude={"file"}) for p in images.pictures}) == 16
    assert images.pictures[0].category == "photo"
    side = model.advice.resolution_px
    for path in images.paths():
        with Image.open(path) as picture:
            assert picture.size == (side, side)
            assert not picture.getexif()
    counts = [event.done for event in told if isinstance(event, Progress)]
    assert counts[0] == 0
    assert counts[-1] == 16
    assert read_image_set(images.folder) == images
    assert images.select(steps=3, scheduler="euler").pictures == images.pictures[12:]


def test_the_batch_changes_no_picture(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    one = settings.model_copy(update={"batch": 1})
    sets = [
        generate_images(claimed(tmp_path / name), model, PROMPTS, config)
        for name, config in (("a", settings), ("b", one))
    ]
    for first, second in zip(sets[0].paths(), sets[1].paths(), strict=True):
        assert psnr_db(Image.open(first), Image.open(second)) > 45


def test_a_set_that_exists_is_kept_and_never_overwritten(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    first = generate_images(run, model, PROMPTS, settings)
    stamps = [path.stat().st_mtime_ns for path in first.paths()]
    told: list[Event] = []
    again = generate_images(run, model, PROMPTS, settings, observe=told.append)
    assert isinstance(told[0], StageSkipped)
    assert again == first
    with pytest.raises(RunFolderError, match="already holds pictures drawn with other prompts"):
        generate_images(run, model, PROMPTS[:1], settings)
    assert stamps == [path.stat().st_mtime_ns for path in first.paths()]


def test_an_unfinished_set_is_drawn_anew(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    leftover = run.images / "pictures" / "9999.png"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"cut off")
    images = generate_images(run, model, PROMPTS, settings)
    assert not leftover.exists()
    assert len(list(images.folder.iterdir())) == len(images.pictures) + 1


def test_weights_scale_what_is_worn(
    model: Model, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    drawn = {}
    for weight in (0.0, 0.5, 1.0):
        run = claimed(tmp_path / f"run{weight}")
        images = generate_images(run, model, PROMPTS[:1], settings, [Worn(adapter, weight)])
        drawn[weight] = Image.open(images.paths()[0])
        assert images.adapters[0].weight == weight
    base = generate_images(claimed(tmp_path / "base"), model, PROMPTS[:1], settings)
    plain = Image.open(base.paths()[0])
    assert psnr_db(drawn[0.0], plain) == float("inf")
    assert psnr_db(drawn[0.5], plain) > psnr_db(drawn[1.0], plain)


def test_bad_wishes_are_explained_and_leave_nothing(
    model: Model, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    run = claimed(tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing to draw"):
        generate_images(run, model, [], settings)
    unknown = settings.model_copy(update={"schedulers": ("dimm",)})
    with pytest.raises(ConfigError, match="no scheduler 'dimm'"):
        generate_images(run, model, PROMPTS, unknown)
    with pytest.raises(ConfigError, match="cannot name a set"):
        generate_images(run, model, PROMPTS, settings, name="../out")
    foreign = tmp_path / "foreign.safetensors"
    from dreamloom.adapters import read_adapter

    story = {"dreamloom.base": "sdxl", "dreamloom.base_fingerprint": "0" * 64}
    write_adapter(foreign, Adapter(read_adapter(adapter).layers, story))
    with pytest.raises(AdapterError, match="made for the base model sdxl, not for"):
        generate_images(run, model, PROMPTS, settings, [Worn(foreign)])
    assert not run.images.exists()


def test_class_images_depend_on_their_number_not_on_how_many(model: Model, tmp_path: Path) -> None:
    config = small_config(model).priors
    side = model.advice.resolution_px
    few = make_priors(claimed(tmp_path / "few"), model, "a person", config, 3, side)
    more = make_priors(
        claimed(tmp_path / "more"),
        model,
        "a person",
        config.model_copy(update={"count": 10}),
        3,
        side,
    )
    for first, second in zip(few.paths(), more.paths(), strict=False):
        assert psnr_db(Image.open(first), Image.open(second)) > 45
    assert few.made_from == more.made_from
    told: list[Event] = []
    again = make_priors(claimed(tmp_path / "few"), model, "a person", config, 3, side, told.append)
    assert isinstance(told[0], StageSkipped)
    assert again == few
    other = make_priors(claimed(tmp_path / "few"), model, "a dog", config, 3, side)
    assert other.made_from != few.made_from


def test_an_unknown_scheduler_for_class_images_is_explained(model: Model, tmp_path: Path) -> None:
    config = small_config(model).priors.model_copy(update={"scheduler": "ddin"})
    with pytest.raises(ConfigError, match=r"priors\.scheduler = 'ddin' is unknown"):
        make_priors(claimed(tmp_path), model, "a person", config, 0, 64)
