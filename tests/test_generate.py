"""Drawing sets of pictures with a small random SDXL."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamloom.core.config.settings import GenerateConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import AdapterError, BaseModelError, ConfigError, RunFolderError
from dreamloom.core.events import Event, Note, Progress, StageSkipped
from dreamloom.core.manifests import ImageSet, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import make_class_images
from dreamloom.inference.generate import (
    ActiveAdapter,
    Prompt,
    check_request,
    generate_images,
    parse_active_adapter,
    read_composition,
)
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.models.families import load_model
from dreamloom.models.lora_schedule import Composition, Curve, parse_curve
from looks import psnr_db
from studio_set import claimed, small_config
from tiny import make_tiny_sdxl

PROMPTS = [Prompt("a photo of rraj person", "photo"), Prompt("a dog")]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Model:
    return load_model(str(tiny_sdxl), pick_runtime("cpu"))


@pytest.fixture(scope="module")
def settings(model: Model) -> GenerateConfig:
    return small_config(model).generate


def write_random_adapter(model: Model, path: Path, seed: int) -> Path:
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", seed))
    fresh = model.read_adapter()
    model.detach_adapter()
    rng = torch.Generator().manual_seed(seed)
    layers = {
        name: Layer(layer.down, 0.3 * torch.randn(layer.up.shape, generator=rng))
        for name, layer in fresh.layers.items()
    }
    story = {
        "dreamloom.base": "tiny",
        "dreamloom.base_fingerprint": model.identity.fingerprint,
    }
    write_adapter(path, Adapter(layers, story))
    return path


@pytest.fixture
def adapter(model: Model, tmp_path: Path) -> Path:
    return write_random_adapter(model, tmp_path / "one.safetensors", seed=0)


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


class StoppedError(Exception):
    """Somebody pressed Ctrl-C."""


def draw_until(run: RunFolder, model: Model, settings: GenerateConfig, pictures: int) -> None:
    """Begin a set and stop once so many of its pictures lie there."""

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= pictures:
            raise StoppedError

    with pytest.raises(StoppedError):
        generate_images(run, model, PROMPTS, settings, observe=watch)


def stamps_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_an_interrupted_set_goes_on_picture_by_picture(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run, pairs = claimed(tmp_path / "run"), settings.model_copy(update={"batch": 2})
    folder = run.images / "pictures"
    draw_until(run, model, pairs, 2)
    before = stamps_of(folder)
    assert sorted(before) == ["0000.png", "0001.png"]
    (folder / "0001.png").unlink()  # as if it had been stopped within a batch
    told: list[Event] = []
    images = generate_images(run, model, PROMPTS, pairs, observe=told.append)
    assert stamps_of(folder)["0000.png"] == before["0000.png"]
    assert next(event.done for event in told if isinstance(event, Progress)) == 1
    whole = generate_images(claimed(tmp_path / "whole"), model, PROMPTS, pairs)
    assert [path.read_bytes() for path in images.paths()] == [
        path.read_bytes() for path in whole.paths()
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(path.name for path in whole.paths()), "manifest.json"]
    )
    told.clear()
    generate_images(run, model, PROMPTS, pairs, observe=told.append)
    assert isinstance(told[0], StageSkipped)


def test_an_interrupted_set_of_other_inputs_is_refused_by_name(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run, singles = claimed(tmp_path), settings.model_copy(update={"batch": 1})
    draw_until(run, model, singles, 2)
    before = stamps_of(run.images / "pictures")
    with pytest.raises(RunFolderError, match=r"pictures already holds .* other prompts\."):
        generate_images(run, model, PROMPTS[:1], singles)
    more = singles.model_copy(update={"steps": (3,)})
    with pytest.raises(RunFolderError, match=r"pictures already holds .* other settings\."):
        generate_images(run, model, PROMPTS, more)
    assert stamps_of(run.images / "pictures") == before


def test_what_is_not_finite_is_refused_before_any_file(
    tiny_sdxl: Path, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    """A decoder that overflows drew black pictures, and class images that were trained on."""
    broken = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    worn = [ActiveAdapter(adapter, 1e30)]
    run = claimed(tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=r"seed \d+ is not finite: its denoiser") as caught:
        generate_images(run, broken, PROMPTS, settings, worn)
    assert "lower its weight" in caught.value.hint
    assert not run.images.exists()
    with torch.no_grad():
        broken._pipeline.vae.decoder.conv_in.weight.mul_(1e38)
    run = claimed(tmp_path / "decoder")
    with pytest.raises(BaseModelError, match=r"is not finite: its autoencoder's decoder"):
        generate_images(run, broken, PROMPTS, settings)
    assert not run.images.exists()
    config = small_config(broken)
    with pytest.raises(BaseModelError, match="is not finite"):
        make_class_images(run, broken, "a photo of a person", config.priors, 0, 64)
    assert list(run.path.rglob("*.png")) == []
    assert run.read_record("priors") is None


def test_another_set_may_begin_where_none_was_drawn(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    draw_until(run, model, settings, 0)
    assert generate_images(run, model, PROMPTS[:1], settings).pictures


def test_a_folder_of_the_users_own_is_refused_and_left_alone(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    own = run.images / "holiday"
    own.mkdir(parents=True)
    (own / "0000.png").write_bytes(b"a beach")
    (own / "notes").mkdir()
    with pytest.raises(RunFolderError, match=r"holiday holds what no record .*: 0000\.png, notes"):
        generate_images(run, model, PROMPTS, settings, name="holiday")
    assert (own / "0000.png").read_bytes() == b"a beach"
    assert sorted(path.name for path in own.iterdir()) == ["0000.png", "notes"]


def test_a_picture_put_into_an_interrupted_set_is_not_overwritten(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run, folder = claimed(tmp_path), tmp_path / "images" / "pictures"
    singles = settings.model_copy(update={"batch": 1})
    draw_until(run, model, singles, 1)
    (folder / "0002.png").write_bytes(b"a beach")
    with pytest.raises(RunFolderError, match=r"changed since it was drawn: 0002\.png"):
        generate_images(run, model, PROMPTS, singles)
    assert (folder / "0002.png").read_bytes() == b"a beach"


def test_a_finished_set_with_a_changed_picture_is_refused_and_a_lost_one_drawn_again(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    images = generate_images(run, model, PROMPTS, settings)
    lost, kept = images.paths()[1].read_bytes(), stamps_of(images.folder)
    images.paths()[1].unlink()
    assert generate_images(run, model, PROMPTS, settings) == images
    assert images.paths()[1].read_bytes() == lost
    assert stamps_of(images.folder) | {"0001.png": 0} == kept | {"0001.png": 0}
    images.paths()[1].write_bytes(b"retouched")
    with pytest.raises(RunFolderError, match=r"changed since it was drawn: 0001\.png"):
        generate_images(run, model, PROMPTS, settings)
    assert images.paths()[1].read_bytes() == b"retouched"


def test_a_record_with_another_versions_field_still_tells_what_was_drawn(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    images = generate_images(run, model, PROMPTS, settings)
    record = run.record_file("generate-pictures")
    record.write_text(json.dumps({**json.loads(record.read_text()), "colour": 1}))
    before = stamps_of(images.folder)
    assert generate_images(run, model, PROMPTS, settings) == images
    record.write_text("cut o")
    with pytest.raises(RunFolderError, match="holds what no record here lists"):
        generate_images(run, model, PROMPTS, settings)
    assert stamps_of(images.folder) == before


def test_weights_scale_what_is_applied(
    model: Model, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    drawn = {}
    for weight in (0.0, 0.5, 1.0):
        run = claimed(tmp_path / f"run{weight}")
        images = generate_images(
            run, model, PROMPTS[:1], settings, [ActiveAdapter(adapter, weight)]
        )
        drawn[weight] = Image.open(images.paths()[0])
        assert images.adapters[0].weight == weight
    base = generate_images(claimed(tmp_path / "base"), model, PROMPTS[:1], settings)
    plain = Image.open(base.paths()[0])
    assert psnr_db(drawn[0.0], plain) == float("inf")
    assert psnr_db(drawn[0.5], plain) > psnr_db(drawn[1.0], plain)


def test_a_set_is_checked_without_applying_a_plain_adapter(
    model: Model, settings: GenerateConfig, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To apply one to SDXL in float32 took 6.5 s and 2.8 GiB, and each set was checked twice."""
    applied: list[object] = []
    apply = model.apply_adapters
    monkeypatch.setattr(model, "apply_adapters", lambda parts: applied.append(1) or apply(parts))
    check_request(model, PROMPTS[:1], settings, [ActiveAdapter(adapter, 0.5)], "set")
    assert not applied
    curve = parse_curve("-1@0,0.5@1")
    check_request(model, PROMPTS[:1], settings, [ActiveAdapter(adapter, curve)], "set")
    assert applied


def read_pixels(images: ImageSet) -> list[bytes]:
    return [Image.open(path).tobytes() for path in images.paths()]


@pytest.fixture
def other(model: Model, tmp_path: Path) -> Path:
    return write_random_adapter(model, tmp_path / "two.safetensors", seed=1)


def test_a_schedule_is_kept_in_the_manifest_and_draws_another_set(
    model: Model, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    run, falling = claimed(tmp_path / "run"), parse_curve("-1@0,0.5@1")
    images = generate_images(run, model, PROMPTS[:1], settings, [ActiveAdapter(adapter, falling)])
    assert images.adapters[0].weight == -1
    assert images.adapters[0].lora_schedule == "-1@0,0.5@1"
    assert read_image_set(images.folder) == images
    told: list[Event] = []
    again = generate_images(
        run, model, PROMPTS[:1], settings, [ActiveAdapter(adapter, falling)], observe=told.append
    )
    assert isinstance(told[0], StageSkipped)
    assert again == images
    for weight in (-1.0, parse_curve("-1@0,0.4@1")):
        with pytest.raises(RunFolderError, match="already holds pictures drawn with other"):
            generate_images(run, model, PROMPTS[:1], settings, [ActiveAdapter(adapter, weight)])
    plain = generate_images(
        run, model, PROMPTS[:1], settings, [ActiveAdapter(adapter, -1.0)], name="plain"
    )
    assert read_pixels(plain) != read_pixels(images)


def test_each_composition_draws_a_set_of_its_own_and_is_recorded(
    model: Model, settings: GenerateConfig, adapter: Path, other: Path, tmp_path: Path
) -> None:
    run, active = claimed(tmp_path / "run"), [ActiveAdapter(adapter), ActiveAdapter(other, 0.5)]
    drawn = {}
    for name, composition in {
        "sum": Composition(),
        "switch": Composition("switch"),
        "k-lora": Composition("k-lora", alpha=1.0, beta=0.75),
        "conditional": Composition(conditional_only=True),
    }.items():
        images = generate_images(
            run, model, PROMPTS[:1], settings, active, name, composition=composition
        )
        drawn[name] = read_pixels(images)[0], [active.lora_schedule for active in images.adapters]
        record = run.read_record(f"generate-{name}")
        assert record is not None
        assert Composition(**record.settings["manner"]) == composition
        assert [entry.weight for entry in images.adapters] == [1.0, 0.5]
    assert len({pixels for pixels, _ in drawn.values()}) == 4
    assert {name: lora_schedules for name, (_, lora_schedules) in drawn.items()} == {
        "sum": ["", ""],
        "switch": ["1@0; turn 1 of 2, 1 steps each", "0.5@0; turn 2 of 2, 1 steps each"],
        "k-lora": [
            "1@0; k-lora subject, alpha 1, beta 0.75",
            "0.5@0; k-lora style, alpha 1, beta 0.75",
        ],
        "conditional": ["1@0; conditional only", "0.5@0; conditional only"],
    }
    composition = Composition("switch", conditional_only=True)
    with pytest.raises(RunFolderError, match="already holds pictures"):
        generate_images(
            run, model, PROMPTS[:1], settings, active, "switch", composition=composition
        )


def test_manners_that_change_nothing_are_refused(
    model: Model, settings: GenerateConfig, adapter: Path, other: Path, tmp_path: Path
) -> None:
    run, both = claimed(tmp_path / "run"), [ActiveAdapter(adapter), ActiveAdapter(other)]

    def draw(
        active: list[ActiveAdapter], composition: Composition, config: GenerateConfig = settings
    ) -> None:
        generate_images(run, model, PROMPTS, config, active, composition=composition)

    with pytest.raises(ConfigError, match="switch takes turns between two adapters or more, not 1"):
        draw(both[:1], Composition("switch"))
    with pytest.raises(ConfigError, match="k-lora takes two adapters, subject and style, not 3"):
        draw([*both, both[0]], Composition("k-lora"))
    with pytest.raises(ConfigError, match="without an adapter"):
        draw([], Composition(conditional_only=True))
    unguided = settings.model_copy(update={"guidance": 1.0})
    with pytest.raises(ConfigError, match="At a guidance of 1 there is no unconditional half"):
        draw(both, Composition(conditional_only=True), unguided)
    steps = settings.model_copy(update={"steps": (9, 3)})
    with pytest.raises(ConfigError, match=r"In 3 steps .* two\.safetensors would never have its"):
        draw(both, Composition("switch", every=3), steps)
    assert not run.images.exists()


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("a.safetensors", ActiveAdapter(Path("a.safetensors"))),
        ("a.safetensors:-0.5", ActiveAdapter(Path("a.safetensors"), -0.5)),
        ("a:b.safetensors:1", ActiveAdapter(Path("a:b.safetensors"), 1.0)),
        ("C:/x/a.safetensors", ActiveAdapter(Path("C:/x/a.safetensors"))),
        (
            "a.safetensors:1@0,0.4@0.5,0@1",
            ActiveAdapter(Path("a.safetensors"), Curve(((0.0, 1.0), (0.5, 0.4), (1.0, 0.0)))),
        ),
    ],
)
def test_an_applied_adapter_is_read_as_typed(text: str, active: ActiveAdapter) -> None:
    assert parse_active_adapter(text) == active


def test_a_file_whose_name_looks_like_a_weight_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").touch()
    assert parse_active_adapter(str(tmp_path / "a:0.5")) == ActiveAdapter(tmp_path / "a:0.5")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a:heavy", r"'a:heavy' ends in 'heavy', which is not a weight\. Write FILE:0\.8"),
        ("a:", r"which is not a weight\. "),
        ("a:nan", r"which is not a weight\. "),
        ("a:1@0,much@1", r"not a weight: 'much@1' is no WEIGHT@PROGRESS\. "),
        ("a:1@0,0@2", r"not a weight: the progress 2 is not between 0 and 1\. "),
    ],
)
def test_a_weight_that_is_none_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_active_adapter(text)


def test_an_unknown_way_to_compose_is_explained() -> None:
    assert read_composition("switch:2", True) == Composition("switch", 2, conditional_only=True)
    complaint = r"--compose swich is not possible: 'swich' is none of .*\. Write sum, switch"
    with pytest.raises(ConfigError, match=complaint):
        read_composition("swich")
    with pytest.raises(ConfigError, match="a turn of 0 steps is none; take 1 or more"):
        read_composition("switch:0")


def test_bad_requests_are_explained_and_leave_nothing(
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
    layers = read_adapter(adapter).layers
    wide = {name: Layer(torch.ones(2, 9), torch.ones(9, 2)) for name in layers}
    write_adapter(foreign, Adapter(wide))
    with pytest.raises(AdapterError, match="does not fit"):
        generate_images(run, model, PROMPTS, settings, [ActiveAdapter(foreign)])
    assert not run.images.exists()


def test_an_adapter_of_other_weights_of_the_same_shapes_draws_with_a_note(
    tiny_sdxl: Path, settings: GenerateConfig, adapter: Path, tmp_path: Path
) -> None:
    """People train on a base and draw with its fine-tunes."""
    tuned = make_tiny_sdxl(tmp_path / "tuned", seed=1)
    other = load_model(str(tuned), pick_runtime("cpu"))
    told: list[Event] = []
    worn = [ActiveAdapter(adapter)]
    generate_images(
        claimed(tmp_path / "a"), other, PROMPTS[:1], settings, worn, observe=told.append
    )
    (note,) = [event for event in told if isinstance(event, Note)]
    assert note.warning
    assert "one.safetensors was made for the base model tiny (" in note.text
    # Another program puts a variant and the single file into the same folder.
    shared = tmp_path / "shared"
    shutil.copytree(tiny_sdxl, shared)
    weights = "unet/diffusion_pytorch_model"
    shutil.copyfile(shared / f"{weights}.safetensors", shared / f"{weights}.fp16.safetensors")
    shutil.copyfile(shared / f"{weights}.safetensors", shared / "all_in_one.safetensors")
    same, earlier = load_model(str(shared), pick_runtime("cpu")), tmp_path / "earlier.safetensors"
    known = read_adapter(adapter)
    assert same.identity.fingerprint == known.metadata["dreamloom.base_fingerprint"]
    assert same.identity.earlier_fingerprint != same.identity.fingerprint
    remembers = {"dreamloom.base_fingerprint": same.identity.earlier_fingerprint}
    write_adapter(earlier, known.with_metadata(**remembers))
    told.clear()
    for number, file in enumerate((adapter, earlier)):
        run, worn = claimed(tmp_path / f"same{number}"), [ActiveAdapter(file)]
        images = generate_images(run, same, PROMPTS[:1], settings, worn, observe=told.append)
        assert images.base.keys() == {"name", "family", "fingerprint", "revision"}
    assert not any(isinstance(event, Note) for event in told)


def test_class_images_depend_on_their_number_not_on_how_many(model: Model, tmp_path: Path) -> None:
    config = small_config(model).priors
    side = model.advice.resolution_px
    few = make_class_images(claimed(tmp_path / "few"), model, "a person", config, 3, side)
    more = make_class_images(
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
    again = make_class_images(
        claimed(tmp_path / "few"), model, "a person", config, 3, side, told.append
    )
    assert isinstance(told[0], StageSkipped)
    assert again == few
    other = make_class_images(claimed(tmp_path / "few"), model, "a dog", config, 3, side)
    assert other.made_from != few.made_from


def test_an_unknown_scheduler_for_class_images_is_explained(model: Model, tmp_path: Path) -> None:
    config = small_config(model).priors.model_copy(update={"scheduler": "ddin"})
    with pytest.raises(ConfigError, match=r"priors\.scheduler = 'ddin' is unknown"):
        make_class_images(claimed(tmp_path), model, "a person", config, 0, 64)


def test_negative_prompt_size_and_weights_are_drawn_with_and_recorded(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run, prompts = claimed(tmp_path), [Prompt("a (dog:1.6) in the snow")]
    plain = generate_images(run, model, prompts, settings)
    text = (plain.folder / "manifest.json").read_text()
    assert not any(name in text for name in ("negative_prompt", "prompt_weights", "size_px"))
    known = {"schedulers", "steps", "guidance", "images_per_prompt", "first_seed"}
    assert set(settings.drawn_with) == known
    for name, changed, told in (
        ("negative", {"negative_prompt": "a painting"}, 'negative prompt "a painting"'),
        ("weights", {"prompt_weights": True}, "prompt weights read"),
        ("wide", {"width_px": 96, "height_px": 48}, "96 × 48 px"),
    ):
        config = GenerateConfig(**{**settings.model_dump(), **changed})
        images = generate_images(run, model, prompts, config, name=name)
        assert read_image_set(images.folder) == images
        assert images.pictures[0].sampler.endswith(told)
        assert read_pixels(images)[0] != read_pixels(plain)[0]
        with pytest.raises(RunFolderError, match="already holds pictures"):
            generate_images(run, model, prompts, config)
    with Image.open(images.paths()[0]) as picture:
        assert picture.size == (96, 48)


def test_the_models_own_size_is_no_other_set(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    side = model.advice.resolution_px
    config = settings.model_copy(update={"width_px": side})
    images = generate_images(claimed(tmp_path / "a"), model, PROMPTS[:1], config)
    plain = generate_images(claimed(tmp_path / "b"), model, PROMPTS[:1], settings)
    assert images.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"width_px": 100}, "generate.width_px = 100 does not fit"),
        ({"height_px": 61}, "generate.height_px = 61 does not fit"),
        ({"negative_prompt": "blurry", "guidance": 1.0}, "a negative prompt would change nothing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    changed: dict[str, object], says: str, model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    run = claimed(tmp_path)
    with pytest.raises(ConfigError, match=says):
        generate_images(run, model, PROMPTS, settings.model_copy(update=changed))
    assert not run.images.exists()


def test_long_and_foreign_prompts_are_told_of_while_drawing(
    model: Model, settings: GenerateConfig, tmp_path: Path
) -> None:
    told: list[Event] = []
    prompts = [Prompt("a dog " * 50), Prompt("a (dog:1.2)")]
    config = settings.model_copy(update={"negative_prompt": "a painting, " * 50})
    generate_images(claimed(tmp_path), model, prompts, config, observe=told.append)
    notes = [event.text for event in told if isinstance(event, Note)]
    assert len(notes) == 3
    assert "has 100 tokens" in notes[0]
    assert '"a painting' in notes[1]
    assert "(dog:1.2) is taken literally" in notes[2]
