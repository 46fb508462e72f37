"""Convert, resize (SVD to a lower rank) and extract LoRA files."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Note, Observer, Progress, StageDone, StageStarted, silent
from dreamloom.data.image_io import open_upright
from dreamloom.lora.adapter import Adapter, note_lost_timesteps
from dreamloom.lora.conversion import approximate_dora, as_lora, equal_ranks
from dreamloom.lora.folders import WEIGHTS, hash_adapter
from dreamloom.lora.reading import read_adapter, read_adapter_file
from dreamloom.lora.writing import FileFormat, choose_format, refuse_format, write_adapter
from dreamloom.merging.extract import Extracted, extract_adapter
from dreamloom.merging.files.certificate import (
    DTYPES,
    RECIPE_KEY,
    SEAL_KEY,
    forget_certificate,
    renew_certificate,
    seal_holds,
    write_sealed,
)
from dreamloom.merging.files.merge import check_out
from dreamloom.merging.files.recipe import BYTES, FilePrecision
from dreamloom.merging.merging import Combined, MergeRequest, combine
from dreamloom.merging.ranks import RankRequest
from dreamloom.models.weight_files import TensorFile, open_weights


@dataclass(frozen=True)
class FileForm:
    """How an adapter's file is written.

    Args:
        format: Whose names it uses.
        precision: Of its numbers; None keeps the source's.
        has_equal_ranks: Whether every layer gets the highest rank, filled up with zeros, for old
            versions of diffusers.
        thumbnail: A picture that other programs show beside the file, or None.
    """

    format: FileFormat = "auto"
    precision: FilePrecision | None = None
    has_equal_ranks: bool = False
    thumbnail: Path | None = None


_THUMBNAIL_PX = 256


def describe_thumbnail(picture: Path) -> dict[str, str]:
    """Write a picture, small, into the header entries where other programs look for one.

    Raises:
        PhotoError: If it cannot be read.
    """
    image = open_upright(picture)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {
        "modelspec.thumbnail": f"data:image/jpeg;base64,{encoded}",
        "ssmd_cover_images": json.dumps([encoded]),
    }


_PRECISIONS: dict[str, FilePrecision] = {"F16": "fp16", "BF16": "bf16"}


def resize_adapter(
    source: Path,
    out: Path,
    rank: RankRequest,
    format: FileFormat = "auto",
    precision: FilePrecision | None = None,
    overwrite: bool = False,
    observe: Observer = silent,
) -> Combined:
    """Cut an adapter to a rank: the nearest one there is.

    Args:
        source: A LoRA, or a LoHa or LoKr, which are LoRAs of high rank.
        out: The file to write.
        rank: How thin it may be.
        format: Of the new file; see `dreamloom.lora.writing.FileFormat`.
        precision: Of its numbers; None keeps the source's.
        overwrite: Whether an existing ``out`` may be replaced.
        observe: Told of progress.

    Returns:
        The adapter as written, and what became of each layer.

    Raises:
        AdapterError: If the source cannot be read, or is of another kind.
        ConfigError: If the rank is above what exists.
        RunFolderError: If ``out`` cannot be written, or exists and must not be overwritten.
    """
    check_out(out, [source], overwrite)
    observe(StageStarted("resize", str(source)))
    with measure_effort() as effort:
        adapter = as_lora(read_adapter(source))
        for text in note_lost_timesteps(adapter, str(source), "what it is cut to"):
            observe(Note("resize", text, warning=True))
        adapter = adapter.at_full_rank()
        refuse_format(adapter.layers, adapter.metadata, format)
        precision = precision or find_precision(source)
        combined = combine(
            [adapter],
            MergeRequest([1.0], rank=rank, bytes_per_number=BYTES[precision]),
            on_layer=lambda done, total: observe(Progress("resize", "layers", done, total)),
        )
        resized_from = {
            "file": source.name,
            "sha256": hash_adapter(source),
            "rank": str(rank),
            "error": float(f"{combined.error:.6g}"),
        }
        metadata = {
            **forget_certificate(adapter.metadata),
            "dreamloom.resized": json.dumps(resized_from),
        }
        resized = replace(combined.adapter, metadata=metadata)
        write_adapter(out, resized, DTYPES[precision], format)
    observe(StageDone("resize", effort.seconds, str(out)))
    return Combined(resized, combined.reports)


def convert_file(
    source: Path,
    out: Path,
    form: FileForm | None = None,
    base: str = "",
    rank: RankRequest | None = None,
    overwrite: bool = False,
    observe: Observer = silent,
) -> Adapter:
    """Write an adapter in another format, with the same change.

    A DoRA stays one, unless a rank is asked for: then the nearest LoRA of that rank is written,
    with its error. A merge keeps its certificate, and is sealed anew if its seal held.

    Args:
        source: A file or a folder, see `dreamloom.lora.reading.read_adapter`.
        out: The file to write.
        form: How the file is written; None is `FileForm()`.
        base: The base model, for a DoRA that shall become a LoRA, and for files of other bases
            than SDXL whose names alone do not tell the layers.
        rank: A rank or a share of energy, for a DoRA.
        overwrite: Whether an existing ``out`` may be replaced.
        observe: Told of what happens.

    Raises:
        AdapterError: If the source cannot be read, or the format cannot hold it.
        BaseModelError: If the base cannot be read.
        ConfigError: If a rank is asked for and the source is no DoRA, or no base is named.
        RunFolderError: If ``out`` cannot be written, or exists and must not be overwritten.
    """
    check_out(out, [source], overwrite)
    observe(StageStarted("convert", str(source)))
    with measure_effort() as effort:
        weights = open_weights(base) if base else None
        found = read_adapter_file(source, weights.places if weights else ())
        form = form or FileForm()
        adapter, format = found.adapter, form.format
        precision = form.precision or find_precision(source)
        if rank is not None:
            if adapter.kind != "dora":
                raise ConfigError(
                    f"{source} is no DoRA, so converting it needs no rank.",
                    "Leave out --rank, or cut it with dreamloom resize.",
                )
            if weights is None or rank.kind not in {"fixed", "energy"}:
                raise ConfigError(
                    "A DoRA is cut to a rank or a share of energy against its base model.",
                    "Name it with --base, and give --rank 32 or --rank energy:0.99.",
                )
            amount = int(rank.amount) if rank.kind == "fixed" else None
            energy = rank.amount if rank.kind == "energy" else None
            adapter, _ = approximate_dora(adapter, weights.read, amount, energy)
        if found.product is not None and format != "peft":
            stored = replace(adapter, layers={}, peft=found.product)
            # PEFT's form of it wants settings that LyCORIS' file does not tell.
            adapter = adapter if choose_format(stored) == "peft" and format == "auto" else stored
        if form.has_equal_ranks and len(set(adapter.ranks.values())) > 1:
            for text in note_lost_timesteps(adapter, str(source), "with equal ranks the file"):
                observe(Note("convert", text, warning=True))
            adapter = adapter.at_full_rank()
        if form.has_equal_ranks:
            adapter = equal_ranks(as_lora(adapter))
        if form.thumbnail is not None:
            adapter = adapter.with_metadata(**describe_thumbnail(form.thumbnail))
        certified = RECIPE_KEY in adapter.metadata
        if certified and seal_holds(source, adapter.metadata.get(SEAL_KEY, "")):
            adapter = renew_certificate(source, adapter, precision, format)
            write_sealed(out, adapter, precision, format)
        else:
            if certified:
                adapter = replace(adapter, metadata=forget_certificate(adapter.metadata))
                text = f"{source} is not as it was merged, so {out.name} does not tell its recipe."
                observe(Note("convert", text, warning=True))
            write_adapter(out, adapter, DTYPES[precision], format)
    observe(StageDone("convert", effort.seconds, str(out)))
    return adapter


def extract_file(
    models: tuple[str, str],
    out: Path,
    rank: RankRequest,
    format: FileFormat = "auto",
    precision: FilePrecision = "fp16",
    overwrite: bool = False,
    observe: Observer = silent,
) -> Extracted:
    """Write what a tuned model has changed of its base as an adapter file.

    Args:
        models: The tuned model and the one it was made from; see `open_weights`.
        out: The file to write.
        rank: How thin the adapter may be.
        format: See `dreamloom.lora.writing.write_adapter`.
        precision: Of its numbers.
        overwrite: Whether an existing ``out`` may be replaced.
        observe: Told of progress.

    Raises:
        DreamLoomError: As `extract_adapter` says, and if ``out`` cannot be written.
    """
    check_out(out, [Path(model) for model in models], overwrite)
    observe(StageStarted("extract", f"{models[0]} from {models[1]}"))
    with measure_effort() as effort:
        if format == "kohya":
            refuse_format(open_weights(models[1]).places, {}, format)
        found = extract_adapter(
            models[0],
            models[1],
            rank,
            BYTES[precision],
            lambda done, total: observe(Progress("extract", "layers", done, total)),
        )
        write_adapter(out, found.adapter, DTYPES[precision], format)
    observe(StageDone("extract", effort.seconds, str(out)))
    return found


def find_precision(source: Path) -> FilePrecision:
    """Say in which precision an adapter's numbers are stored: the highest of them."""
    file = source
    if source.is_dir():
        file = next(iter(sorted(source.rglob(WEIGHTS))), source)
    # Kohya's files keep the scale of each layer as a number of its own, often in float32.
    kinds = {entry.dtype for entry in TensorFile(file).entries.values() if entry.shape}
    return _PRECISIONS.get(next(iter(kinds)), "fp32") if len(kinds) == 1 else "fp32"
