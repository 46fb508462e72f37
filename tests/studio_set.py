"""Small photo sets and settings for tests of the stages."""

from pathlib import Path

from PIL import Image, ImageDraw

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import make_class_images
from dreamloom.data.photos.prepare import load_photos
from dreamloom.models.base import Model
from dreamloom.training.batches import BatchShare, TrainingBatches, prepare_batches
from dreamloom.training.losses import LossParts
from dreamloom.training.step import BatchErrors, add_up_errors, measure_batch, share_update
from dreamloom.training.train import plan_batches


def make_photos(folder: Path, count: int = 3, size: tuple[int, int] = (96, 72)) -> Path:
    """Write a few different JPEG photos of a coloured shape; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", size, (40 + 50 * number, 90, 200 - 40 * number))
        pen = ImageDraw.Draw(image)
        pen.ellipse((20 + 4 * number, 10, 70, 60), fill=(220, 60 + 30 * number, 40))
        pen.line((0, 5 * number, size[0], size[1]), fill="white", width=2)
        image.save(folder / f"IMG_{number}.jpg", quality=92)
    return folder


def small_config(model: Model, **overrides: object) -> LoomConfig:
    """Settings for seconds of work, resolved for the model."""
    settings = {
        "base": model.identity.name,
        "train.steps": 4,
        "train.checkpointing_steps": 2,
        "train.rank": 2,
        "train.target_modules": "attention",
        "train.batch_photos": 2,
        "train.batch_priors": 2,
        "train.warmup_steps": 1,
        "train.caption_dropout": 0.0,
        "train.prior_target": "images",
        "train.final_scale": 1.0,
        "priors.count": 3,
        "priors.steps": 2,
        "priors.prompts": (),
        "generate.steps": (2,),
        "generate.images_per_prompt": 2,
        "evaluate.resamples": 100,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    return load_config(overrides=settings).resolve(vars(model.advice))


def make_sets(model: Model, folder: Path) -> tuple[PhotoSet, ClassImageSet]:
    """Prepare a few photos and class images for the model, in a run of their own."""
    run, config = claimed(folder / "run"), small_config(model)
    side = model.advice.resolution_px
    photos = load_photos(make_photos(folder / "photos"), run, side)
    return photos, make_class_images(run, model, config.class_prompt(), config.priors, 0, side)


def make_lesson(
    model: Model, photos: PhotoSet, priors: ClassImageSet | None, config: LoomConfig
) -> TrainingBatches:
    return prepare_batches(
        model, photos, priors, (config.photo_prompt(), config.class_prompt()), plan_batches(config)
    )


def measure_errors(
    model: Model,
    batches: TrainingBatches,
    update: int,
    config: LoomConfig,
    share: BatchShare | None = None,
) -> list[BatchErrors]:
    """Measure the errors of one batch of an update, or of the only one."""
    drawn = batches.make_batches(update, share or share_update(config, batches))
    return [measure_batch(model, batches, batch, update, config) for batch in drawn]


def compute_loss(
    model: Model,
    batches: TrainingBatches,
    update: int,
    config: LoomConfig,
    share: BatchShare | None = None,
) -> LossParts:
    """Compute one batch's share of an update's loss, as the training loop does."""
    parts = measure_errors(model, batches, update, config, share)
    return add_up_errors(parts, config, batches, share or share_update(config, batches))


def claimed(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.claim()
    return run
