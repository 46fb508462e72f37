"""The certificate in a merged file's metadata: its recipe, what became of each layer, a seal.

All of it stands in the header, so that the file is still an ordinary adapter to everyone else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from dreamloom.core.errors import AdapterError, DreamLoomError
from dreamloom.core.run_folder import TEMPORARY, explain_write_errors, file_sha256
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.writing import FileFormat, choose_format, move_adapter, write_adapter
from dreamloom.merging.blocks import BlockWeights
from dreamloom.merging.files.recipe import BYTES, FilePrecision
from dreamloom.merging.merging import LayerReport, MergeRequest
from dreamloom.merging.method import Value
from dreamloom.merging.ranks import parse_rank

RECIPE_KEY = "dreamloom.recipe"
LAYERS_KEY = "dreamloom.layers"
SLICES_KEY = "dreamloom.slices"
SEAL_KEY = "dreamloom.seal"
CERTIFICATE_KEYS = (RECIPE_KEY, LAYERS_KEY, SLICES_KEY, SEAL_KEY)
"""What is true of a merge as it was written, and of nothing that is made from it later."""

DTYPES: Mapping[FilePrecision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_COARSENESS: Sequence[FilePrecision] = ("fp32", "fp16", "bf16")
_UNSEALED = "0" * 64
_CHUNK = 2**22


# What reading a header that anybody may have written can end in.
_NONSENSE = (
    *(ValidationError, ValueError, KeyError, TypeError, AttributeError, OverflowError),
    *(RecursionError, DreamLoomError),
)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecordedPart(_Closed):
    """An input of a merge, as the merged file names it."""

    name: str
    file: str
    """Its name without folders: those are the user's own affair."""
    sha256: str
    weight: float
    blocks: tuple[tuple[str, float], ...] = ()
    """Weights of single layers by pattern; the last pattern that matches counts."""
    subject: str = ""
    words: tuple[str, ...] = ()
    """New words that this adapter teaches."""
    prompts: tuple[str, ...] = ()
    """What the base model was asked for it, by methods that ask."""


class RecordedRecipe(_Closed):
    """A recipe as the merged file records it, with everything that the result depends on."""

    parts: tuple[RecordedPart, ...]
    method: str
    options: dict[str, Value]
    rank: str
    seed: int
    format: FileFormat
    precision: FilePrecision
    remixed: int = 0
    """How often weights were changed afterwards; each time, numbers were rounded once more."""
    converted: int = 0
    """How often it was written in another precision afterwards; each time the same holds."""
    base: str = ""
    """The base model that was asked, by methods that ask."""
    base_fingerprint: str = ""
    runtime: str = ""
    """Where it computed, and how precisely."""
    joint: tuple[str, ...] = ()
    """What it was asked for all parts at once."""
    versions: dict[str, str]

    def request(self) -> MergeRequest:
        """How the adapters were merged, as `combine` takes it."""
        return MergeRequest(
            weights=[part.weight for part in self.parts],
            method=self.method,
            options=self.options,
            rank=parse_rank(self.rank),
            blocks=[BlockWeights(part.blocks) for part in self.parts],
            seed=self.seed,
            bytes_per_number=BYTES[self.precision],
        )


@dataclass(frozen=True)
class Certificate:
    """What a merged file says of itself.

    Args:
        recipe: Its recipe.
        reports: What became of each layer, also of those where nothing is left.
        slices: For each part, its share of each layer's rank, layers in order of their names;
            empty where the parts cannot be told apart.
    """

    recipe: RecordedRecipe
    reports: Mapping[str, LayerReport]
    slices: Sequence[Mapping[str, int]] = ()

    def as_metadata(self, layers: Sequence[str]) -> dict[str, str]:
        """Write it as entries of a header, still without a seal.

        Args:
            layers: The names of the layers that the file holds.
        """
        held = sorted(set(layers))
        entries = {
            RECIPE_KEY: self.recipe.model_dump_json(exclude_defaults=True),
            # Rows without names: the names of what is held stand in the file.
            LAYERS_KEY: _compact(
                {
                    "ranks": _squeeze([self.reports[name].rank for name in held]),
                    "norms": [_shorten(self.reports[name].norm) for name in held],
                    "errors": _squeeze([_shorten(self.reports[name].error) for name in held]),
                    "empty": {
                        name: _shorten(self.reports[name].error)
                        for name in sorted(set(self.reports) - set(held))
                    },
                }
            ),
            SEAL_KEY: _UNSEALED,
        }
        if self.slices:
            rows = [_squeeze([ranks.get(name, 0) for name in held]) for ranks in self.slices]
            entries[SLICES_KEY] = _compact(rows)
        return entries


def _shorten(number: float) -> float:
    return float(f"{number:.7g}")


def _squeeze(row: list[Any]) -> Any:
    """Write a row of equal values as one."""
    return row[0] if row and all(value == row[0] for value in row) else row


def _spread(row: Any, count: int) -> list[Any]:
    whole = row if isinstance(row, list) else [row] * count
    if len(whole) != count:
        raise ValueError("a row has another length than there are layers")
    return whole


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read_certificate(path: Path, adapter: Adapter) -> Certificate:
    """Read what a merged file says of itself.

    Raises:
        AdapterError: If it says nothing, or what it says does not fit the file.
    """
    if RECIPE_KEY not in adapter.metadata:
        raise AdapterError(
            f"{path} does not say how it was merged.",
            "Only files that this version of dreamloom merge wrote do; merge the parts again.",
        )
    held = sorted(adapter.layers)
    try:
        recipe = RecordedRecipe.model_validate_json(adapter.metadata[RECIPE_KEY])
        packed = json.loads(adapter.metadata[LAYERS_KEY])
        rows = (_spread(packed[key], len(held)) for key in ("ranks", "norms", "errors"))
        reports = {
            name: LayerReport(int(rank), float(norm), float(error))
            for name, rank, norm, error in zip(held, *rows, strict=True)
        }
        reports |= {name: LayerReport(0, 0.0, float(e)) for name, e in packed["empty"].items()}
        slices = [
            dict(zip(held, map(int, _spread(row, len(held))), strict=True))
            for row in json.loads(adapter.metadata.get(SLICES_KEY, "[]"))
        ]
        recipe.request()
    except _NONSENSE as error:
        raise AdapterError(
            f"What {path} says of how it was merged does not fit the file.",
            "It was changed after it was merged; merge the parts again.",
        ) from error
    return Certificate(recipe, reports, slices)


def read_recorded_recipe(text: str) -> RecordedRecipe | None:
    """Read the recipe in a header's entry; None if it is none."""
    try:
        return RecordedRecipe.model_validate_json(text)
    except _NONSENSE:
        return None


def refuse_unsealed(path: Path, adapter: Adapter) -> None:
    """Refuse a merged file that is not as it was written.

    Raises:
        AdapterError: If its bytes do not fit its seal.
    """
    if not seal_holds(path, adapter.metadata.get(SEAL_KEY, "")):
        raise AdapterError(
            f"{path} is not as it was written: its bytes do not fit its seal.",
            "It was damaged, edited or converted; name the file that the merge wrote.",
        )


def forget_certificate(metadata: Mapping[str, str]) -> dict[str, str]:
    """Leave out what is no longer true once a merged file is changed into another."""
    return {key: text for key, text in metadata.items() if key not in CERTIFICATE_KEYS}


def renew_certificate(
    path: Path, adapter: Adapter, precision: FilePrecision, format: FileFormat
) -> Adapter:
    """Let a merged file's certificate describe the same merge in another format or precision.

    Args:
        path: The merged file, whose seal holds.
        adapter: What it holds.
        precision: Of the file to be written; what a lower one has lost stays lost.
        format: Of the file to be written.

    Raises:
        AdapterError: If the certificate does not fit the file.
    """
    certificate = read_certificate(path, adapter)
    recipe = certificate.recipe
    coarsest = max(recipe.precision, precision, key=_COARSENESS.index)
    recipe = recipe.model_copy(
        update={
            "format": choose_format(adapter) if format == "auto" else format,
            "precision": coarsest,
            "converted": recipe.converted + (precision != recipe.precision),
        }
    )
    held = [sum(own[name] for own in certificate.slices) for name in adapter.layers]
    # Ranks that were filled up with zeros are no longer their parts' side by side.
    slices = certificate.slices if held == [*adapter.ranks.values()] else ()
    renewed = replace(certificate, recipe=recipe, slices=slices)
    metadata = forget_certificate(adapter.metadata) | renewed.as_metadata([*adapter.layers])
    return replace(adapter, metadata=metadata)


def write_sealed(out: Path, adapter: Adapter, precision: FilePrecision, format: FileFormat) -> None:
    """Write an adapter whose metadata holds a certificate, and seal the file.

    The file appears under its name only when all is done; so do its new words beside it.

    Raises:
        RunFolderError: If it cannot be written.
    """
    with (
        explain_write_errors(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=TEMPORARY) as workplace,
    ):
        fresh = Path(workplace) / out.name
        write_adapter(fresh, adapter, DTYPES[precision], format)
        # The SHA-256 of the whole file, as it is without a seal, goes in the seal's place.
        mark = f'"{SEAL_KEY}":"{_UNSEALED}"'.encode()
        with fresh.open("r+b") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
            place = header.index(mark) + len(mark) - len(_UNSEALED) - 1
            stream.seek(8 + place)
            stream.write(file_sha256(fresh).encode())
            stream.flush()
            os.fsync(stream.fileno())
        move_adapter(fresh, out)


def seal_holds(path: Path, seal: str) -> bool:
    """Say whether a file's bytes are those that were sealed.

    The seal finds what was damaged or edited. It is no signature: whoever changes a file on
    purpose can seal it anew, and only merging the inputs again tells.

    Args:
        path: The file.
        seal: What its header gives as the seal.
    """
    mark = f'"{SEAL_KEY}":"{seal}"'.encode()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        if len(seal) != len(_UNSEALED) or header.count(mark) != 1:
            return False
        blank = f'"{SEAL_KEY}":"{_UNSEALED}"'.encode()
        digest.update(start + header.replace(mark, blank))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == seal
