"""An adapter that we taught draws in diffusers what it draws here, whatever format it is in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image

from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import FileFormat
from dreamloom.merging.files.convert import FileForm, convert_file
from dreamloom.merging.files.merge import merge_adapters
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.models.base import Model, Sampler, Shot
from dreamloom.training.train import train_adapter
from looks import psnr_db
from studio_set import claimed, small_config

Draw = Callable[[Path | None], Image.Image]

FORMATS = get_args(FileFormat)
PROMPT = "a photo of rraj person"
SAMPLER = Sampler("ddim", steps=4, guidance=4.0)
# What each of the two reaches: attention, convolutions, and the text encoders of one.
TAUGHT: dict[str, dict[str, Any]] = {
    "mine": {"train__reach": "all", "adapter__text_encoders": True},
    "other": {"train__reach": "attention", "train__rank": 3, "seed": 1},
}


@dataclass(frozen=True)
class Studio:
    """Two taught adapters, and what the model draws with them and without."""

    folder: Path
    model: Model

    def draw(self, *active: tuple[str, float]) -> Image.Image:
        adapters = [(read_adapter(self.folder / name), weight) for name, weight in active]
        with self.model.apply_adapters(adapters):
            return self.model.sample([Shot(PROMPT, 3)], SAMPLER)[0]


@pytest.fixture(scope="module")
def studio(model: Model, sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("taught")
    for name, settings in TAUGHT.items():
        run = claimed(folder / name)
        config = small_config(model, train__learning_rate=3e-2, train__updates=6, **settings)
        train_adapter(run, model, *sets, config)
        (folder / f"{name}.safetensors").write_bytes(run.adapter.read_bytes())
    return Studio(folder, model)


@pytest.fixture(scope="module")
def plain(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.fixture
def draw_there(plain: StableDiffusionXLPipeline) -> Iterator[Draw]:
    """Draw in diffusers, with a file or with none."""

    def draw(path: Path | None) -> Image.Image:
        if path is not None:
            plain.load_lora_weights(path.parent, weight_name=path.name)
        picture: Image.Image = plain(
            PROMPT,
            num_inference_steps=SAMPLER.steps,
            guidance_scale=SAMPLER.guidance,
            height=64,
            width=64,
            generator=torch.Generator("cpu").manual_seed(3),
        ).images[0]
        return picture

    yield draw
    plain.unload_lora_weights()


def test_the_adapter_is_seen(studio: Studio, draw_there: Draw) -> None:
    """The control: without an adapter both draw one picture, and with it another one."""
    bare = studio.draw()
    assert psnr_db(draw_there(None), bare) > 45
    adapter = read_adapter(studio.folder / "mine.safetensors")
    assert {name.partition(".")[0] for name in adapter.layers} == {
        *("unet", "text_encoder", "text_encoder_2")
    }
    assert {layer.up.ndim for layer in adapter.layers.values()} == {2, 4}
    taught, weaker, other = (
        studio.draw(active)
        for active in (
            ("mine.safetensors", 1.0),
            ("mine.safetensors", 0.5),
            ("other.safetensors", 1.0),
        )
    )
    assert max(psnr_db(taught, picture) for picture in (bare, weaker, other)) < 40


@pytest.mark.parametrize("format", FORMATS)
def test_a_trained_adapter_draws_the_same_from_every_format(
    studio: Studio, draw_there: Draw, tmp_path: Path, format: FileFormat
) -> None:
    """In half precision, as adapters are shared."""
    out = tmp_path / "a.safetensors"
    convert_file(studio.folder / "mine.safetensors", out, FileForm(format, "fp16"))
    assert psnr_db(draw_there(out), studio.draw(("mine.safetensors", 1.0))) > 45


def test_a_merge_of_trained_adapters_draws_there_what_both_draw_here(
    studio: Studio, draw_there: Draw, tmp_path: Path
) -> None:
    weights = {"mine.safetensors": 0.7, "other.safetensors": 0.9}
    merged, out = tmp_path / "merged.safetensors", tmp_path / "a.safetensors"
    merge_adapters([AdapterPart(studio.folder / name, w) for name, w in weights.items()], merged)
    convert_file(merged, out, FileForm("kohya", "fp16"))
    together = studio.draw(*weights.items())
    assert psnr_db(draw_there(out), together) > 45
    assert psnr_db(studio.draw(("mine.safetensors", 0.7)), together) < 40
