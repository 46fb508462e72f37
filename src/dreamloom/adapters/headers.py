"""The header of a safetensors file, put in order after it was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def sort_header(path: Path, hash_key: str = "") -> None:
    """Put the header's entries in order, so that equal adapters are equal files.

    safetensors writes the entries of the metadata in an order of chance. Only the header changes;
    the tensors' offsets count from its end.

    Args:
        path: The file.
        hash_key: Also enter the SHA-256 of all tensors under this name, if it is not empty.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = content[8 + length :]
    story = header["__metadata__"]
    if hash_key:
        story[hash_key] = f"0x{hashlib.sha256(tensors).hexdigest()}"
    header["__metadata__"] = dict(sorted(story.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust((len(text) + 7) // 8 * 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + tensors)
