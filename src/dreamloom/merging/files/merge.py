"""Merge LoRA files into one, with a certificate of how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import AdapterError, ConfigError, RunFolderError
from dreamloom.core.events import Note, Observer, Progress, StageDone, StageStarted, silent
from dreamloom.core.run_folder import Record, RunFolder, library_versions
from dreamloom.lora.adapter import Adapter, note_lost_timesteps
from dreamloom.lora.base_names import publish_base
from dreamloom.lora.folders import hash_adapter
from dreamloom.lora.modelspec import join_descriptions
from dreamloom.lora.writing import choose_format, refuse_format
from dreamloom.merging.factors import flatten, norm
from dreamloom.merging.files.base_model import Answer, Question, ask_base, asks_base
from dreamloom.merging.files.certificate import (
    Certificate,
    RecordedPart,
    RecordedRecipe,
    write_sealed,
)
from dreamloom.merging.files.inputs import Loaded, load_parts
from dreamloom.merging.files.recipe import BYTES, AdapterPart, Recipe
from dreamloom.merging.merging import Combined, MergeRequest, combine
from dreamloom.merging.methods import find_method

# Float32 factors cancel to about this share of themselves, not to 0.
_NOTHING = 1e-6
_VERSIONS = ("dreamloom", "torch")


def merge_adapters(
    parts: Sequence[AdapterPart],
    out: Path,
    method: str = "sum",
    overwrite: bool = False,
    observe: Observer = silent,
) -> Adapter:
    """Combine adapter files into one that can be loaded alone; see `carry_out` for more settings.

    Returns:
        The merged adapter, as written to ``out``.

    Raises:
        DreamLoomError: As `carry_out`.
    """
    return carry_out(Recipe(tuple(parts), method), out, overwrite, observe).adapter


def carry_out(
    recipe: Recipe, out: Path, overwrite: bool = False, observe: Observer = silent
) -> Combined:
    """Merge as a recipe says, and write the file with its certificate.

    Returns:
        The merged adapter as written to ``out``, and what became of each layer.

    Raises:
        AdapterError: If a file cannot be read, is not finite, is another than the recipe names, or
            the adapters belong to different base models.
        ConfigError: If the method, an option, the weights or the rank are not possible, or the
            weights cancel each other out.
        BaseModelError: If the method asks the base model and it cannot be loaded.
        RunFolderError: If ``out`` cannot be written, or exists and must not be overwritten.
    """
    check_out(out, [part.path for part in recipe.parts], overwrite)
    find_method(recipe.method).read_options(recipe.options)
    prompts = [part.prompts for part in recipe.parts]
    if not asks_base(recipe.method) and (recipe.joint or any(prompts)):
        raise ConfigError(
            f"The method {recipe.method} asks no base model, so prompts change nothing.",
            "Leave them out, or choose a method that asks, such as ssr.",
        )
    observe(StageStarted("merge", count_adapters(recipe.parts)))
    with measure_effort() as effort:
        loaded = load_parts(recipe.parts)
        for part, adapter in zip(loaded.parts, loaded.adapters, strict=True):
            for text in note_lost_timesteps(adapter, str(part.path), "the merge"):
                observe(Note("merge", text, warning=True))
        inherited = _inherit_metadata(loaded.adapters)
        names = {name for adapter in loaded.adapters for name in adapter.layers}
        refuse_format(sorted(names), inherited, recipe.format)
        request = make_request(recipe, loaded)
        given = prompts if any(prompts) else ()
        question = Question(recipe.base, recipe.device, given, recipe.joint)
        answer = ask_base(question, loaded.adapters, request, observe)
        combined = combine(
            loaded.adapters,
            request,
            answer.layers,
            on_layer=lambda done, total: observe(Progress("merge", "layers", done, total)),
        )
        refuse_cancelled(loaded, combined)
        if recipe.format == "auto":
            merged = combined.adapter.with_metadata(**inherited)
            recipe = replace(recipe, format=choose_format(merged))
        recorded = _record_recipe(recipe, loaded, answer)
        certificate = Certificate(recorded, combined.reports, cut_slices(request, loaded.adapters))
        metadata = {
            **inherited,
            "dreamloom.kind": "merge",
            "dreamloom.method": recipe.method,
            **certificate.as_metadata([*combined.adapter.layers]),
        }
        merged = combined.adapter.with_metadata(**metadata)
        write_sealed(out, merged, recipe.precision, recipe.format)
    observe(StageDone("merge", effort.seconds, str(out)))
    return Combined(merged, combined.reports)


def count_adapters(parts: Sequence[AdapterPart]) -> str:
    """Say how many there are."""
    return "1 adapter" if len(parts) == 1 else f"{len(parts)} adapters"


def check_out(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse a place where nothing can or may be written.

    Args:
        out: The file to write.
        inputs: The files it is made from; none of them may be lost.
        overwrite: Whether an existing file may be replaced.

    Raises:
        RunFolderError: If it is a folder, lies in no folder, is an input, or exists and may not be
            replaced.
        AdapterError: If it does not end in .safetensors.
    """
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder.", "Name a .safetensors file.")
    if not out.parent.is_dir():
        raise RunFolderError(f"There is no folder {out.parent}.", "Make it, or name another.")
    if out.suffix != ".safetensors":
        raise AdapterError(f"{out} does not end in .safetensors.", "Name it so.")
    if any(path.exists() and out.exists() and path.samefile(out) for path in inputs):
        raise RunFolderError(
            f"{out} is one of the inputs, which would be lost.", "Name another file to write."
        )
    if out.exists() and not overwrite:
        raise RunFolderError(f"{out} exists already.", "Name another file, or add --overwrite.")


def make_request(recipe: Recipe, loaded: Loaded) -> MergeRequest:
    """Say how the adapters shall be merged, as `combine` takes it; options are complete."""
    return MergeRequest(
        weights=[part.weight for part in loaded.parts],
        method=recipe.method,
        options=find_method(recipe.method).read_options(recipe.options),
        rank=recipe.rank,
        blocks=loaded.blocks,
        seed=recipe.seed,
        bytes_per_number=BYTES[recipe.precision],
    )


def refuse_cancelled(loaded: Loaded, combined: Combined) -> None:
    """Refuse a merge of which nothing but rounding is left.

    Raises:
        ConfigError: If ‖ΔW‖ is below a millionth of Σ |wᵢ| ‖ΔWᵢ‖.
    """
    together = 0.0
    for part, adapter, blocks in zip(loaded.parts, loaded.adapters, loaded.blocks, strict=True):
        squares = [
            (blocks.of(name) * norm(flatten(layer))) ** 2 for name, layer in adapter.layers.items()
        ]
        together += abs(part.weight) * math.sqrt(sum(squares))
    left = math.sqrt(sum(report.norm**2 for report in combined.reports.values()))
    if left <= _NOTHING * together:
        raise ConfigError(
            "The weights cancel each other out, so nothing is left of the adapters.",
            "Change a weight.",
        )


def cut_slices(request: MergeRequest, adapters: Sequence[Adapter]) -> list[Mapping[str, int]]:
    """Tell each part's share of each layer's rank in a plain sum at full rank.

    There the parts' factors stand side by side, in their order. Anything else cannot be taken
    apart again, and gives an empty list.
    """
    if request.method != "sum" or request.rank.kind != "full":
        return []
    return [
        {name: rank for name, rank in adapter.ranks.items() if request.weight_of(number, name) != 0}
        for number, adapter in enumerate(adapters)
    ]


def _record_recipe(recipe: Recipe, loaded: Loaded, answer: Answer) -> RecordedRecipe:
    """Say how the file was made, so that it can tell when it is found alone in a folder."""
    versions = library_versions()
    return RecordedRecipe(
        parts=tuple(
            RecordedPart(
                name=part.name,
                file=part.path.name,
                sha256=part.sha256,
                weight=part.weight,
                blocks=tuple(blocks.rules),
                subject=adapter.metadata.get("dreamloom.subject", ""),
                words=tuple(adapter.tokens),
                prompts=tuple(answer.prompts[number]) if answer.prompts else (),
            )
            for number, (part, adapter, blocks) in enumerate(
                zip(loaded.parts, loaded.adapters, loaded.blocks, strict=True)
            )
        ),
        method=recipe.method,
        options=find_method(recipe.method).read_options(recipe.options),
        rank=str(recipe.rank),
        seed=recipe.seed,
        format=recipe.format,
        precision=recipe.precision,
        base=publish_base(answer.base),
        base_fingerprint=answer.fingerprint,
        runtime=answer.runtime,
        joint=tuple(answer.joint),
        versions={name: versions[name] for name in _VERSIONS if name in versions},
    )


def _inherit_metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What the merged file says as its parts do: whose adapter it is, and what it draws."""
    # The first part is the subject, by custom; its words still name it in the merge.
    metadata = {}
    for key in (
        "dreamloom.base",
        "dreamloom.base_fingerprint",
        "dreamloom.subject",
        "dreamloom.class_noun",
        "dreamloom.layout",
        "dreamloom.prediction",
        "dreamloom.zero_terminal_snr",
    ):
        found = [adapter.metadata[key] for adapter in adapters if key in adapter.metadata]
        if found:
            metadata[key] = found[0]
    return {**metadata, **join_descriptions([adapter.metadata for adapter in adapters])}


def record_merge(
    run: RunFolder, parts: Sequence[AdapterPart], out: Path, merged: Adapter, seconds: float
) -> Record:
    """Write the record of a merge that lies inside a run."""
    root = run.path.resolve()
    # Every run calls its adapter the same, so a file of this run is named by its place there.
    files = [part.path.resolve() for part in parts]
    record = Record(
        stage="merge",
        inputs={f"part{i}": hash_adapter(part.path) for i, part in enumerate(parts)},
        settings={
            "method": merged.metadata["dreamloom.method"],
            "weights": [part.weight for part in parts],
            "files": [
                file.relative_to(root).as_posix() if file.is_relative_to(root) else part.path.name
                for part, file in zip(parts, files, strict=True)
            ],
        },
        outputs=run.hash_outputs(out),
        results={
            "layers": len(merged.layers),
            "ranks": sorted(set(merged.ranks.values())),
            "norm": merged.norm(),
        },
        seconds=seconds,
    )
    run.write_record(record)
    return record
