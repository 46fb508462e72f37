"""Train the picturebook from nothing: ``python -m tools.picturebook.pretrain --work DIR``.

Every stage continues where it was stopped, and may run in a process of its own beside others.
``--stage unpack`` lays the shipped weights into the work folder, and the stages after it train
those on instead of beginning from nothing.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamloom.core.device import prepare_threads
from dreamloom.picturebook import weights_folder
from dreamloom.picturebook.judges import AttributeReader, IdentityEncoder
from tools.picturebook.dataset import Collection, PictureStore, draw_ahead
from tools.picturebook.export import export_weights, read_averages, unpack_weights
from tools.picturebook.models import build_text_encoders, build_unet
from tools.picturebook.pretrain_autoencoder import polish_decoder, train_autoencoder
from tools.picturebook.pretrain_clip import save_clip, train_clip
from tools.picturebook.pretrain_denoiser import Share, encode_ahead, mix_portraits, train_denoiser
from tools.picturebook.pretrain_judges import Stores, train_judges
from tools.picturebook.pretrain_text import TextEncoders, train_text_encoders
from tools.picturebook.tokenizer import train_tokenizer
from tools.picturebook.training import Schedule

_PICTURES = 61_440
_PEOPLE_PICTURES = 24_576
_PORTRAITS = 32_768

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a stage is told.

    Args:
        work: The folder for drawings, latents and checkpoints; about 4 GB.
        out: Where the trained weights go.
        device: Where to train.
        updates: Optimizer updates of the stage; None for its default.
        threads: Processes that draw, or torch's threads.
    """

    work: Path
    out: Path
    device: torch.device
    updates: int | None
    threads: int

    def updates_or(self, default: int) -> int:
        """Return how many updates to do."""
        return default if self.updates is None else self.updates


def unpack_stage(job: Job) -> None:
    """Begin from the weights that ship."""
    unpack_weights(job.out, job.work)


def draw_stage(job: Job) -> None:
    """Draw the training pictures."""
    counts: dict[Collection, int] = {
        "pictures": _PICTURES,
        "people": _PEOPLE_PICTURES,
        "portraits": _PORTRAITS,
    }
    for collection, count in counts.items():
        draw_ahead(job.work, collection, count, job.threads, lambda n: logger.info("drew %d", n))


def tokenizer_stage(job: Job) -> None:
    """Learn the tokenizer."""
    train_tokenizer(job.work / "tokenizer")


def autoencoder_stage(job: Job) -> None:
    """Train the autoencoder."""
    store = PictureStore(job.work, "pictures")
    folder = job.work / "autoencoder"
    start = AutoencoderKL.from_pretrained(folder) if folder.exists() else None
    model = train_autoencoder(job.work, store, job.updates_or(5400), job.device, start)
    model.save_pretrained(job.work / "autoencoder")


def text_stage(job: Job) -> None:
    """Teach the text encoders to read."""
    tokenizer = _tokenizer(job)
    torch.manual_seed(2)
    encoders = build_text_encoders(tokenizer)
    train_text_encoders(job.work, encoders, tokenizer, job.updates_or(1500), job.device)
    for number, encoder in enumerate(encoders):
        encoder.save_pretrained(job.work / f"text_encoder_{number}")


def latents_stage(job: Job) -> None:
    """Encode the training pictures."""
    model = AutoencoderKL.from_pretrained(job.work / "autoencoder").to(job.device)
    for store in (PictureStore(job.work, "pictures"), PictureStore(job.work, "portraits")):
        encode_ahead(job.work, store, model)


def denoiser_stage(job: Job) -> None:
    """Train the denoiser and the text encoders."""
    shares = [Share(PictureStore(job.work, "pictures"))]
    plan = ("denoiser", Schedule(8e-4, job.updates_or(4850)))
    train_denoiser(job.work, shares, _read_parts(job), _tokenizer(job), plan, job.device)


def portraits_stage(job: Job) -> None:
    """Train them on, nearly half of each batch being what `a photo of a person` may show."""
    parts = _read_parts(job)
    if (trained := job.work / "denoiser.safetensors").exists():
        read_averages(trained, (parts[0], *parts[1]))
    shares = mix_portraits(PictureStore(job.work, "pictures"), PictureStore(job.work, "portraits"))
    plan = ("portraits", Schedule(4e-4, job.updates_or(7000)))
    train_denoiser(job.work, shares, parts, _tokenizer(job), plan, job.device)


def decoder_stage(job: Job) -> None:
    """Polish the autoencoder's decoder."""
    model = AutoencoderKL.from_pretrained(job.work / "autoencoder").to(job.device)
    store = PictureStore(job.work, "pictures")
    model = polish_decoder(job.work, store, model, job.updates_or(1000))
    model.save_pretrained(job.work / "autoencoder-polished")


def judges_stage(job: Job) -> None:
    """Train the identity encoder and the attribute reader."""
    folders = job.work / "judges" / "identity", job.work / "judges" / "reader"
    start = None
    if all(folder.exists() for folder in folders):
        start = IdentityEncoder.load(folders[0]), AttributeReader.load(folders[1])
    updates = job.updates_or(2000)
    identity, reader = train_judges(job.work, _stores(job), updates, job.device, start)
    identity.cpu().save(folders[0])
    reader.cpu().save(folders[1])


def clip_stage(job: Job) -> None:
    """Train the judges' CLIP."""
    tokenizer = _tokenizer(job)
    model = train_clip(job.work, _stores(job), tokenizer, job.updates_or(4000), job.device)
    save_clip(model.cpu(), tokenizer, job.work / "judges" / "clip")


def export_stage(job: Job) -> None:
    """Write what ships."""
    export_weights(job.work, job.out)


STAGES: dict[str, Callable[[Job], None]] = {
    "unpack": unpack_stage,
    "draw": draw_stage,
    "tokenizer": tokenizer_stage,
    "text": text_stage,
    "autoencoder": autoencoder_stage,
    "latents": latents_stage,
    "denoiser": denoiser_stage,
    "portraits": portraits_stage,
    "decoder": decoder_stage,
    "judges": judges_stage,
    "clip": clip_stage,
    "export": export_stage,
}
FROM_NOTHING = tuple(name for name in STAGES if name != "unpack")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Work folder.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Where the weights go; the package's own folder if not given.",
)
@click.option(
    "--stage",
    "stages",
    type=click.Choice(list(STAGES)),
    multiple=True,
    help="Stages to run; if none is given all of them, in order, from nothing.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to train.")
@click.option(
    "--updates",
    type=click.IntRange(min=1),
    default=None,
    help="Optimizer updates of the stage, instead of its default.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Drawing processes, or torch's threads.",
)
def main(
    work: Path,
    out: Path | None,
    stages: tuple[str, ...],
    device: str,
    updates: int | None,
    threads: int,
) -> None:
    """Train the embedded base model and its judges."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare_threads(threads)
    job = Job(work, out or weights_folder(), torch.device(device), updates, threads)
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages or FROM_NOTHING:
        logger.info("stage %s", stage)
        STAGES[stage](job)


def _tokenizer(job: Job) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(job.work / "tokenizer")


def _read_parts(job: Job) -> tuple[UNet2DConditionModel, TextEncoders]:
    """Read what the denoiser's training begins from."""
    torch.manual_seed(5)
    folder = job.work / "unet"
    unet = UNet2DConditionModel.from_pretrained(folder) if folder.exists() else build_unet()
    first = CLIPTextModel.from_pretrained(job.work / "text_encoder_0")
    second = CLIPTextModelWithProjection.from_pretrained(job.work / "text_encoder_1")
    return unet, (first, second)


def _stores(job: Job) -> Stores:
    return Stores(PictureStore(job.work, "people"), PictureStore(job.work, "pictures"))


if __name__ == "__main__":
    main()
