"""Open a safetensors file after checking its header, and sort the header of one written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import atomic_path, explain_write_errors

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that can run code when they are opened."""


def refuse_pickles(path: Path) -> None:
    """Refuse a pickle by its name, before it is opened.

    Raises:
        AdapterError: If it is one.
    """
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path} is a pickle ({path.suffix}), which can run code when it is opened.",
            "DreamLoom reads .safetensors only; ask its author for that format.",
        )


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, in the file's precision, and its header's metadata.

    Raises:
        AdapterError: If the file is missing, a pickle, empty, cut off or damaged.
    """
    refuse_pickles(path)
    if not path.is_file():
        raise AdapterError(f"There is no adapter at {path}.", "Check the path.")
    try:
        check_layout(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # The file itself is no mapping: it has keys, and no iterator over them.
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors: {error}.",
            "The file may be cut off; copy or download it again.",
        ) from error
    return tensors, metadata


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read the shapes of a safetensors file's tensors and its header's metadata, and no tensor.

    Raises:
        AdapterError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # A safetensors file is no mapping: its keys have to be asked for.
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}.", "") from error


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    hash_keys: Sequence[str] = (),
) -> None:
    """Write a safetensors file, its header's entries in order; see `sort_header`.

    Raises:
        RunFolderError: If it cannot be written, for example because the disk is full.
    """
    with explain_write_errors(path), atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        sort_header(temporary, hash_keys)


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor of any precision holds neither NaN nor infinity."""
    return bool(torch.isfinite(tensor.float()).all())


_LENGTH_BYTES = 8
# SDXL has about a thousand layers of up to ten tensors; a merge tells of each layer in its header.
_MOST_TENSORS = 50_000
_MOST_HEADER_BYTES = 2**24


# How a pickle of any protocol since 2 begins, and the archive that torch puts one in.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def check_layout(path: Path) -> None:
    """Check that a file has the lengths that a safetensors file promises of itself.

    Raises:
        AdapterError: If it is empty, a pickle, cut off, or its header lies about a length.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if not start:
            raise _explain(path, "it is empty", "Copy or download it again.")
        length = int.from_bytes(start, "little")
        if length > size - _LENGTH_BYTES or length == 0:
            # Only here: a header of 640 bytes begins like a pickle, too.
            if start.startswith(_PICKLE_STARTS):
                raise _explain(
                    path,
                    "it is a pickle under another name, which can run code when it is opened",
                    "Ask its author for safetensors.",
                )
            raise _explain(
                path,
                f"its header claims {length:,} bytes, and the whole file has {size:,}",
                "It is cut off, or no safetensors file; copy or download it again.",
            )
        if length > _MOST_HEADER_BYTES:
            raise _explain(
                path,
                f"its header has {length:,} bytes, and no adapter of SDXL needs more than "
                f"{_MOST_HEADER_BYTES:,}",
                "It is no adapter, or made to do harm; get it from elsewhere.",
            )
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        ends = [entry["data_offsets"][1] for n, entry in entries.items() if n != "__metadata__"]
        promised = _LENGTH_BYTES + length + max((int(end) for end in ends), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _explain(
            path, "its header makes no sense", "It is damaged; copy or download it again."
        ) from error
    if len(entries) > _MOST_TENSORS:
        raise _explain(
            path,
            f"it holds {len(entries):,} tensors, and no adapter of SDXL has {_MOST_TENSORS:,}",
            "It is no adapter, or made to do harm; get it from elsewhere.",
        )
    if promised != size:
        raise _explain(
            path,
            f"its header promises {promised:,} bytes, and it has {size:,}",
            "It is cut off or damaged; copy or download it again."
            if promised > size
            else "Something was added to it; copy or download it again.",
        )


def _explain(path: Path, reason: str, hint: str) -> AdapterError:
    return AdapterError(f"{path} cannot be read as safetensors: {reason}.", hint)


def sort_header(path: Path, hash_keys: Sequence[str] = ()) -> None:
    """Put the header's entries in order, so that equal adapters are equal files.

    safetensors writes the entries of the metadata in an order of chance. Only the header changes;
    the tensors' offsets count from its end.

    Args:
        path: The file.
        hash_keys: Also enter the SHA-256 of all tensors under these names, under ModelSpec's with
            the 0x that it asks for.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = content[8 + length :]
    metadata = header["__metadata__"]
    if hash_keys:
        digest = hashlib.sha256(tensors).hexdigest()
        for key in hash_keys:
            metadata[key] = f"0x{digest}" if key.startswith("modelspec.") else digest
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust((len(text) + 7) // 8 * 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + tensors)
