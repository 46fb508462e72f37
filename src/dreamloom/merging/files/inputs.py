"""The LoRA files that go into a merge: read, compared, and found again by their SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.lora.conversion import as_lora
from dreamloom.lora.folders import CONFIG, hash_adapter
from dreamloom.lora.modelspec import refuse_other_predictions
from dreamloom.lora.reading import read_adapter
from dreamloom.merging.blocks import BlockWeights, read_blocks
from dreamloom.merging.files.certificate import RecordedRecipe
from dreamloom.merging.files.recipe import AdapterPart, name_parts


@dataclass(frozen=True)
class Loaded:
    """The adapters of a recipe, read and found fit to be merged.

    Args:
        parts: The recipe's parts, each with a name of its own and its file's SHA-256.
        adapters: The adapters, in the same order.
        blocks: Their block weights.
    """

    parts: tuple[AdapterPart, ...]
    adapters: Sequence[Adapter]
    blocks: Sequence[BlockWeights]


def load_parts(
    parts: Sequence[AdapterPart], read: Callable[[Path], Adapter] | None = None
) -> Loaded:
    """Read the adapters of a recipe.

    Args:
        parts: The adapters.
        read: How; None reads LoRAs alone, see `read_input`.

    Raises:
        AdapterError: If one cannot be read or merged, is another than the recipe means, or they
            belong to different base models.
        ConfigError: If two parts bear one name, or block weights cannot be read.
    """
    named = name_parts(parts)
    blocks = [read_blocks(part.blocks) for part in named]
    adapters = [(read or read_input)(part.path) for part in named]
    refuse_other_bases([part.path for part in named], adapters)
    complete = []
    for part in named:
        found = hash_adapter(part.path)
        if part.sha256 and part.sha256 != found:
            raise AdapterError(
                f"{part.path} is not the file that the recipe means: its SHA-256 begins with "
                f"{found[:12]}, and the recipe says {part.sha256[:12]}.",
                "Get that file, or take sha256 out of the recipe.",
            )
        complete.append(replace(part, sha256=found))
    return Loaded(tuple(complete), adapters, blocks)


def read_input(path: Path) -> Adapter:
    """Read an adapter as a LoRA: a LoHa or a LoKr becomes one, exactly.

    Raises:
        AdapterError: If it cannot be read, or is of another kind.
    """
    adapter = read_adapter(path)
    if adapter.kind in {"loha", "lokr"}:
        return as_lora(adapter)
    refuse_other_kinds(adapter, str(path), "can be merged")
    return adapter


def refuse_other_bases(paths: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that say they were made for different base models.

    Raises:
        AdapterError: If so, naming each with its base, or with what its base predicts.
    """
    refuse_other_predictions(
        {str(path): adapter.metadata for path, adapter in zip(paths, adapters, strict=True)}
    )
    known = {
        adapter.metadata["dreamloom.base_fingerprint"]: (path, adapter)
        for path, adapter in zip(paths, adapters, strict=True)
        if "dreamloom.base_fingerprint" in adapter.metadata
    }
    if len(known) > 1:
        names = [a.metadata.get("dreamloom.base", "unknown") for _, a in known.values()]
        # Where bases are called the same, their weights tell them apart.
        weights = [f", weights {own[:8]}" if len({*names}) < len(names) else "" for own in known]
        listed = ", ".join(
            f"{path} ({name}{own})"
            for (path, _), name, own in zip(known.values(), names, weights, strict=True)
        )
        raise AdapterError(
            f"The adapters were made for different base models: {listed}.",
            "Only adapters of one base model can be merged.",
        )


def find_inputs(
    recipe: RecordedRecipe, path: Path, folder: Path | None = None, files: Sequence[Path] = ()
) -> list[Path]:
    """Find the files that were merged, by their SHA-256.

    Args:
        recipe: The recipe.
        path: The merged file.
        folder: Where to look, at any depth; by default beside the merged file.
        files: Where to look first.

    Raises:
        AdapterError: If one is missing, or only another file of its name is there.
    """
    found: dict[str, Path] = {}
    wanted = {part.sha256 for part in recipe.parts}
    seen: dict[Path, str] = {}
    for file in _list_candidates(recipe, path, folder, files):
        if wanted <= found.keys():
            break
        if file not in seen:
            seen[file] = hash_adapter(file)
            found.setdefault(seen[file], file)
    for part in recipe.parts:
        if part.sha256 in found:
            continue
        # Every training's file is called the same: another input is no changed one.
        namesakes = [file for file, own in seen.items() if file.name == part.file]
        namesakes = [file for file in namesakes if seen[file] not in wanted]
        if namesakes:
            raise AdapterError(
                f"{namesakes[0]} is not the file that was merged: its SHA-256 begins with "
                f"{seen[namesakes[0]][:12]}, and the recipe says {part.sha256[:12]}.",
                "It is another of that name, or has changed since; name the folder of the one that "
                "was merged with --inputs.",
            )
        where = f"in {folder}" if folder else f"beside {path}"
        raise AdapterError(
            f"The input {part.file} (SHA-256 {part.sha256[:12]}…) is not {where}.",
            "Name the folder where it lies with --inputs.",
        )
    return [found[part.sha256] for part in recipe.parts]


def _list_candidates(
    recipe: RecordedRecipe, path: Path, folder: Path | None, files: Sequence[Path]
) -> Iterator[Path]:
    """List what may be an input: what is named so before what is named otherwise."""
    yield from (file for file in files if file.exists())
    place = folder or path.parent
    if not place.is_dir():
        raise AdapterError(f"There is no folder {place}.", "Name the folder of the inputs.")
    listed = sorted(place.rglob("*.safetensors") if folder else place.glob("*.safetensors"))
    listed = [file for file in listed if file.is_file() and not file.samefile(path)]
    listed += [config.parent for config in sorted(place.rglob(CONFIG))] if folder else []
    names = {part.file for part in recipe.parts}
    yield from (file for file in listed if file.name in names)
    yield from (file for file in listed if file.name not in names)
