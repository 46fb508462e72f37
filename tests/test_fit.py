"""Settings that make a training fit: they change what it holds, not what it learns."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamloom.core.config.loading import load_config, to_toml
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Event, LossLogged
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder, write_text
from dreamloom.data.photos.prepare import load_photos
from dreamloom.lora.reading import read_adapter
from dreamloom.memory import fit
from dreamloom.memory.device_memory import DeviceMemory, read_memory
from dreamloom.memory.fit import fit_asking, fit_drawing, fit_open, fit_training
from dreamloom.models.base import MemoryOptions, Model
from dreamloom.models.families import load_model
from dreamloom.models.matrix_products import measure_matrix_rate
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.training.train import check_training, train_adapter
from studio_set import claimed, small_config

CPU = Runtime(torch.device("cpu"), torch.float32)
EXAMPLES = Path(__file__).parents[1] / "examples"


def remember(config: LoomConfig, **memory: object) -> LoomConfig:
    return config.model_copy(update={"memory": config.memory.model_copy(update=memory)})


def train(
    path: Path, model: Model, sets: tuple[PhotoSet, ClassImageSet], config: LoomConfig
) -> tuple[dict[str, torch.Tensor], list[float]]:
    told: list[Event] = []
    run = claimed(path)
    train_adapter(run, model, *sets, config, told.append)
    return load_file(run.adapter), [e.total for e in told if isinstance(e, LossLogged)]


@pytest.fixture
def twelve_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: this is what one would say of itself."""
    monkeypatch.setattr(fit, "read_device_memory", lambda device: read_memory("12GiB"))
    monkeypatch.setattr(fit, "measure_matrix_rate", lambda device, dtype: 25.0)


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_update_is_the_same_in_however_many_passes(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tmp_path: Path, most: int
) -> None:
    whole, losses = train(tmp_path / "whole", model, sets, small_config(model))
    cut, other = train(
        tmp_path / "cut", model, sets, remember(small_config(model), micro_batch_size=most)
    )
    assert other == pytest.approx(losses, rel=1e-4)
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-2, atol=1e-4)


def test_parts_that_take_turns_learn_the_same_bit_for_bit(
    model: Model, sets: tuple[PhotoSet, ClassImageSet], tiny_sdxl: Path, tmp_path: Path
) -> None:
    thrifty = load_model(str(tiny_sdxl), CPU, MemoryOptions(cpu_offload=True))
    config = small_config(model)
    (roomy, _), (in_turn, _) = (
        train(tmp_path / name, one, sets, config)
        for name, one in (("roomy", model), ("in turn", thrifty))
    )
    assert roomy.keys() == in_turn.keys()
    assert all(torch.equal(roomy[name], in_turn[name]) for name in roomy)


def test_the_record_and_the_file_say_how_the_base_was_kept(
    sets: tuple[PhotoSet, ClassImageSet], tiny_sdxl: Path, tmp_path: Path
) -> None:
    stored = load_model(str(tiny_sdxl), CPU, MemoryOptions("nf4"))
    config = remember(small_config(stored), base_quantization="nf4")
    train(tmp_path, stored, sets, config)
    record = json.loads((tmp_path / "records" / "train.json").read_text())
    assert record["settings"]["memory"]["base_quantization"] == "nf4"
    story = read_adapter(tmp_path / "adapter.safetensors").metadata
    assert story["dreamloom.base_storage"] == "nf4"
    # Another base teaches something else, so what lies there is kept.
    assert record["inputs"]["settings"] != ""
    whole = load_model(str(tiny_sdxl), CPU)
    run = RunFolder(tmp_path)
    with pytest.raises(Exception, match="already holds an adapter made with other settings"):
        train_adapter(run, whole, *sets, remember(config, base_quantization="whole"))


def test_what_takes_a_part_of_the_base_is_refused_where_it_is_stored(tiny_sdxl: Path) -> None:
    stored = load_model(str(tiny_sdxl), CPU, MemoryOptions("int8"))
    config = small_config(stored)
    config = config.model_copy(
        update={"adapter": config.adapter.model_copy(update={"init_lora_weights": "pissa"})}
    )
    with pytest.raises(ConfigError, match="which a base kept in int8 cannot give"):
        check_training(stored, [""], config)


# ------------------------------------------------------------------ fitting


@pytest.fixture
def a_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB, whatever this one has."""
    has = DeviceMemory(23 * 2**30, "23.0 GiB that this computer has free, of 24.0", is_host=True)
    monkeypatch.setattr(fit, "read_device_memory", lambda device: has)
    for module in ("work", "telling"):
        monkeypatch.setattr(f"dreamloom.memory.{module}.has_bf16_units", lambda: False)


@pytest.mark.usefixtures("a_computer")
def test_a_processor_is_planned_for_as_well() -> None:
    config = load_config(overrides={"base": "sdxl"}, sets=["photos.resolution_px=512"])
    fitted = fit_training(config, CPU, photos=6)
    assert fitted.lines[0].startswith("sdxl at 512 px, rank 16, in 23.0 GiB that this computer")
    assert fitted.runtime == CPU
    assert fitted.lasting.precision == fitted.config.precision == "fp32"
    assert fitted.lasting.memory.gradient_checkpointing == "auto"
    assert fitted.config.memory.gradient_checkpointing != "auto"
    drawn = fit_drawing(config, CPU)
    assert drawn.runtime == CPU
    assert drawn.config.memory.base_quantization == "whole"


@pytest.mark.usefixtures("a_computer")
def test_what_was_chosen_for_a_session_stays() -> None:
    """Memory that was free when a study began is taken once its base model is loaded."""
    config = load_config(overrides={"base": "sdxl"})
    first = fit_open(config, CPU, "training")
    assert first.lines
    again = fit_open(first.config, CPU, "training")
    assert again.lines == ()
    assert again.config == first.config
    assert again.runtime == first.runtime


@pytest.mark.usefixtures("a_computer")
def test_a_base_that_is_asked_for_a_merge_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fit_asking("sdxl", "cpu")
    assert (asked.memory_options.quantization, asked.runtime) == ("whole", CPU)
    assert asked.lines[0].startswith("sdxl at 1024 px, in 23.0 GiB")
    little = DeviceMemory(8 * 2**30, "8 GiB", is_host=True)
    monkeypatch.setattr(fit, "read_device_memory", lambda device: little)
    with pytest.raises(ConfigError, match="Nothing fits in 8 GiB"):
        fit_asking("sdxl", "cpu")


@pytest.mark.usefixtures("a_computer")
def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    config = load_config(overrides={"base": "sdxl"}, sets=["photos.resolution_px=512"])
    run.claim()
    begun = config.model_copy(update={"precision": "bf16"})
    write_text(run.settings_file, to_toml(begun))
    fitted = fit_training(config, CPU, photos=6, run=run)
    assert fitted.runtime.dtype == torch.bfloat16
    assert fitted.lasting.precision == "bf16"


@pytest.mark.usefixtures("twelve_gib")
def test_a_gpu_is_planned_for_and_the_run_keeps_what_its_result_depends_on() -> None:
    config = load_config(
        sets=["adapter.text_encoders=true", "train.batch_photos=1", "train.batch_priors=1"],
        overrides={"base": "sdxl"},
    )
    fitted = fit_training(config, CPU, photos=6)
    assert fitted.lines[0].startswith("sdxl at 1024 px")
    assert "at 25 TFLOP/s" in fitted.lines[-1]
    assert fitted.config.memory.gradient_checkpointing == "low"
    assert fitted.lasting.memory.gradient_checkpointing == "auto"
    assert (
        fitted.lasting.memory.base_quantization == fitted.config.memory.base_quantization == "whole"
    )
    assert fit_drawing(config, CPU).memory_options.drawn_at_once == 8


@pytest.mark.usefixtures("twelve_gib")
def test_a_run_goes_on_with_the_base_that_it_began_with(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    config = load_config(overrides={"base": "sdxl"})
    run.claim()
    write_text(run.settings_file, to_toml(remember(config, base_quantization="nf4")))
    fitted = fit_training(config, CPU, photos=6, run=run)
    assert (
        fitted.config.memory.base_quantization == fitted.lasting.memory.base_quantization == "nf4"
    )
    assert fitted.memory_options.quantization == "nf4"


@pytest.mark.usefixtures("twelve_gib")
def test_a_small_base_is_not_planned_for() -> None:
    fitted = fit_training(load_config(), CPU, photos=6)
    assert fitted.lines == ()
    assert fitted.memory_options == MemoryOptions()


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert 0.0001 < measure_matrix_rate(CPU.device, torch.float32, side=256) < 100


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "near"), [("int8", 0.005), ("nf4", 0.03)])
def test_picturebook_in_fewer_bits_learns_nearly_as_well(kind: str, near: float, tmp_path: Path):
    last = {}
    for quantization in ("whole", kind):
        model = load_model("picturebook", pick_runtime("cpu"), MemoryOptions(quantization))  # type: ignore[arg-type]
        asked = ["train.steps=24", "priors.kind=none", "train.lr_scheduler=constant"]
        config = resolve_defaults(
            load_config(sets=[*asked, f"memory.base_quantization={quantization}"]), model
        )
        run = claimed(tmp_path / quantization)
        photos = load_photos(EXAMPLES / "rraj", run, int(config.photos.resolution_px))
        told: list[Event] = []
        train_adapter(run, model, photos, None, config, told.append)
        losses = [event.total for event in told if isinstance(event, LossLogged)]
        last[quantization] = statistics.mean(losses[-8:])
    assert last[kind] == pytest.approx(last["whole"], rel=near)
