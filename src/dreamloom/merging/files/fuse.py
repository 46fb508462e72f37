"""Fuse adapters into a full checkpoint: the base's own files again, with changed weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import AdapterError, BaseModelError, RunFolderError
from dreamloom.core.events import Note, Observer, Progress, StageDone, StageStarted, silent
from dreamloom.core.run_folder import atomic_folder, atomic_path, explain_write_errors
from dreamloom.lora.adapter import Adapter, note_lost_timesteps
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.sdxl_layers import COMPONENTS, respell_text
from dreamloom.merging.factors import frobenius
from dreamloom.merging.files.inputs import Loaded, load_parts
from dreamloom.merging.files.merge import count_adapters
from dreamloom.merging.files.recipe import AdapterPart
from dreamloom.models.weight_files import (
    BaseWeights,
    TensorFile,
    TensorPlace,
    fingerprint_every_weight,
    fingerprint_weights,
    open_weights,
)

FUSED_KEY = "dreamloom.baked"
# What files say of their own tensors, which are others now.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class FusedCheckpoint:
    """What became of a checkpoint.

    Args:
        path: The checkpoint: a file, or a folder in diffusers' layout.
        layers: How many layers have changed.
        rounding: ‖what was written − (base + adapters)‖ / ‖adapters‖ over all layers together:
            how much of the change the base's precision has rounded away.
    """

    path: Path
    layers: int
    rounding: float


class _Fuser:
    """Adds the adapters' updates to tensors, and counts what rounding takes from them."""

    def __init__(self, loaded: Loaded, places: Mapping[str, Sequence[TensorPlace]]) -> None:
        self._loaded = loaded
        self._by_tensor: dict[tuple[Path, str], list[tuple[str, TensorPlace]]] = {}
        self.names = _match_layers(loaded, places)
        for name in self.names:
            for place in places[name]:
                self._by_tensor.setdefault((place.file.path, place.key), []).append((name, place))
        self._lost = self._whole = 0.0

    @property
    def rounding(self) -> float:
        return (self._lost / self._whole) ** 0.5 if self._whole > 0 else 0.0

    def changes(self, file: TensorFile, key: str) -> bool:
        return (file.path, key) in self._by_tensor

    def change(self, file: TensorFile, key: str) -> Tensor:
        """Read a tensor and add what the adapters change of it, in its own precision."""
        tensor = file.read(key)
        for name, place in self._by_tensor[file.path, key]:
            part = place.pick(tensor)
            update = torch.zeros(part.shape)
            for adapted, adapter, blocks in zip(
                self._loaded.parts, self._loaded.adapters, self._loaded.blocks, strict=True
            ):
                own = self.names[name].get(adapted.name)
                weight = adapted.weight * blocks.of(name)
                if own is not None and weight != 0:
                    _add_change(update, adapter, own, part, weight)
            exact = part.float() + update
            rounded = exact.to(part.dtype)
            if not torch.isfinite(rounded).all():
                raise AdapterError(
                    f"With the adapters, {name} is not finite in the base's precision.",
                    "Lower a weight.",
                )
            part.copy_(rounded)
            self._lost += frobenius(exact.sub_(part)) ** 2
            self._whole += frobenius(update) ** 2
        return tensor


def _add_change(update: Tensor, adapter: Adapter, name: str, base: Tensor, weight: float) -> None:
    """Add what an adapter changes of a layer, times its weight."""
    if adapter.peft is None:
        layer = adapter.layers[name]
        up, down = layer.up.flatten(1), layer.down.flatten(1)
        update.flatten(1).addmm_(up, down, alpha=weight)
        return
    # PEFT takes a second to load, and LoRAs need none of it.
    from dreamloom.models.peftstate import change_of

    update.add_(change_of(adapter.peft, name, base), alpha=weight)


def fuse_into_checkpoint(
    parts: Sequence[AdapterPart],
    base: str,
    out: Path,
    overwrite: bool = False,
    observe: Observer = silent,
) -> FusedCheckpoint:
    """Add adapters to a base model's weights and write the whole as a model of its own.

    The files are laid out as the base's: the same names, order, shapes and precision. One tensor
    is read, changed and written at a time, so beyond the adapters no more memory is needed than
    for a few copies of the largest layer.

    Args:
        parts: The adapters, of any kind; what they add up to is their plain sum, each being the
            change of the base as it is.
        base: See `open_weights`.
        out: A folder if the base is one, otherwise a .safetensors file.
        overwrite: Whether an existing ``out`` may be replaced.
        observe: Told of progress.

    Raises:
        AdapterError: If an adapter cannot be read, or changes layers that the base has not, or of
            other shapes.
        BaseModelError: If the base cannot be read.
        RunFolderError: If ``out`` cannot be written, or exists and must not be overwritten.
    """
    observe(StageStarted("bake", f"{count_adapters(parts)} into {base}"))
    with measure_effort() as effort:
        weights = open_weights(base)
        _check_place(out, weights.path, overwrite)
        loaded = load_parts(parts, partial(read_adapter, layer_names=weights.places))
        _warn(loaded, weights, observe)
        fuser = _Fuser(loaded, weights.places)
        listed = [
            {"name": p.name, "file": p.path.name, "sha256": p.sha256, "weight": p.weight}
            for p in loaded.parts
        ]
        metadata = {FUSED_KEY: json.dumps(listed)}
        total = sum(len(file.entries) for file in weights.files)
        done = iter(range(1, total + 1))

        def progress() -> None:
            observe(Progress("bake", "tensors", next(done), total))

        if weights.path.is_file():
            with explain_write_errors(out), atomic_path(out) as temporary:
                _write_file(weights.files[0], temporary, fuser, metadata, progress)
        else:
            with explain_write_errors(out), atomic_folder(out) as fresh:
                _copy_beside(weights.path, fresh)
                for file in weights.files:
                    place = fresh / file.path.relative_to(weights.path)
                    _write_file(file, place, fuser, metadata, progress)
    observe(StageDone("bake", effort.seconds, str(out)))
    return FusedCheckpoint(out, len(fuser.names), fuser.rounding)


def _check_place(out: Path, base: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise RunFolderError(f"There is no folder {out.parent}.", "Make it, or name another.")
    if out.exists() and out.samefile(base):
        raise RunFolderError(f"{out} is the base model itself.", "Name another place to write.")
    if base.is_file() and (out.is_dir() or out.suffix != ".safetensors"):
        raise RunFolderError(
            f"{out} is no .safetensors file, and the base is one.", "Name a .safetensors file."
        )
    if base.is_dir() and (out.is_file() or out.suffix == ".safetensors"):
        raise RunFolderError(
            f"{out} names a file, and the base is a folder in diffusers' layout.", "Name a folder."
        )
    if base.is_dir() and out.resolve().is_relative_to(base.resolve()):
        raise RunFolderError(f"{out} lies inside the base model.", "Name another place to write.")
    if out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise RunFolderError(
            f"{out} holds other things than a model.", "Name a new or empty folder."
        )
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise RunFolderError(f"{out} exists already.", "Name another, or add --overwrite.")


def _warn(loaded: Loaded, weights: BaseWeights, observe: Observer) -> None:
    own = {fingerprint_weights(weights.path), fingerprint_every_weight(weights.path)}
    for part, adapter in zip(loaded.parts, loaded.adapters, strict=True):
        made_of = adapter.metadata.get("dreamloom.base_fingerprint")
        if made_of and made_of not in own:
            made_for = adapter.metadata.get("dreamloom.base", "another base model")
            text = f"{part.path} was made for other weights than these: those of {made_for}."
            observe(Note("bake", text, True))
        for text in note_lost_timesteps(adapter, str(part.path), "the checkpoint"):
            observe(Note("bake", text, True))
        if adapter.tokens:
            words = ", ".join(adapter.tokens)
            observe(
                Note(
                    "bake",
                    f"The new words of {part.path} ({words}) stay in the file beside it: a "
                    "checkpoint has no place for them.",
                    True,
                )
            )


def _match_layers(
    loaded: Loaded, places: Mapping[str, Sequence[TensorPlace]]
) -> dict[str, dict[str, str]]:
    """Find each layer's name in each adapter, and refuse what the base has not."""
    names: dict[str, dict[str, str]] = {}
    for part, adapter in zip(loaded.parts, loaded.adapters, strict=True):
        missing = [name for name in adapter.layer_names if respell_text(name) not in places]
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            raise AdapterError(
                f"{part.path} changes {len(missing)} layers that the base model has not: {shown}.",
                "Name the base model that it was made for.",
            )
        for name in adapter.layer_names:
            own = respell_text(name)
            layer = adapter.layers.get(name)
            # Whether another kind than LoRA fits, its change tells when it is computed.
            shape = (layer.up.shape[0], *layer.down.shape[1:]) if layer else places[own][0].shape
            if places[own][0].shape != shape:
                raise AdapterError(
                    f"{part.path} changes {name} as {shape}, and in the base model it is "
                    f"{places[own][0].shape}.",
                    "Name the base model that it was made for.",
                )
            names.setdefault(own, {})[part.name] = name
    return {name: names[name] for name in sorted(names)}


def _write_file(
    file: TensorFile,
    out: Path,
    fuser: _Fuser,
    fused: Mapping[str, str],
    progress: Callable[[], None],
) -> None:
    """Write a file again, tensor by tensor where each was, with changed weights."""
    entries = sorted(file.entries.items(), key=lambda item: item[1].start)
    begin = entries[0][1].start if entries else 0
    metadata = {key: text for key, text in file.metadata.items() if key not in _HASHES}
    if any(fuser.changes(file, key) for key in file.entries):
        metadata |= fused
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for key, entry in entries:
        header[key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start - begin, entry.stop - begin],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, _ in entries:
            if fuser.changes(file, key):
                content = fuser.change(file, key).contiguous().view(torch.uint8)
                content.numpy().tofile(stream)
            else:
                stream.writelines(file.chunks(key))
            progress()


def _copy_beside(base: Path, fresh: Path) -> None:
    """Copy configurations and tokenizers, and weights that no adapter changes."""
    for file in sorted(base.rglob("*")):
        inside = file.relative_to(base)
        top = inside.parts[0]
        if not file.is_file() or file.suffix in _PICKLES or top in {"judges", ".git", ".cache"}:
            continue
        # Beside a pipeline's folders may lie the same model as one file, unchanged.
        if file.suffix == ".safetensors" and (top in COMPONENTS or len(inside.parts) == 1):
            continue
        place = fresh / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            source = file.open("rb")
        except OSError as error:
            raise BaseModelError(
                f"{file} cannot be read: {error.strerror}.", "Mend the base model's folder."
            ) from error
        with source, place.open("wb") as target:
            shutil.copyfileobj(source, target)
