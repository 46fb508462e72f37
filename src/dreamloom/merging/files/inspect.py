"""Inspect a LoRA file's metadata and certificate, and diagnose two against each other."""

from __future__ import annotations

from pathlib import Path

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer, Progress, StageDone, StageStarted, silent
from dreamloom.lora.summary import describe_adapter
from dreamloom.merging.diagnose.measuring import Diagnosis, diagnose_adapters
from dreamloom.merging.files.certificate import (
    LAYERS_KEY,
    RECIPE_KEY,
    SEAL_KEY,
    SLICES_KEY,
    read_recorded_recipe,
    seal_holds,
)
from dreamloom.merging.files.inputs import read_input, refuse_other_bases
from dreamloom.merging.files.recipe import AdapterPart, name_parts


def inspect_file(path: Path) -> dict[str, object]:
    """Summarise an adapter file in plain values; of a merge, its recipe and whether it is sealed.

    The numbers of every layer that a merge keeps in its header are left out.

    Raises:
        AdapterError: If it cannot be read.
    """
    summary = describe_adapter(path)
    metadata = summary.pop("metadata")
    assert isinstance(metadata, dict)
    entries = {key: text for key, text in metadata.items() if key not in (LAYERS_KEY, SLICES_KEY)}
    if RECIPE_KEY in entries:
        recipe = read_recorded_recipe(entries.pop(RECIPE_KEY))
        summary["recipe"] = recipe and recipe.model_dump(mode="json", exclude_defaults=True)
        summary["sealed"] = seal_holds(path, entries.pop(SEAL_KEY, ""))
        summary["can_be_remixed"] = SLICES_KEY in metadata
    return {**summary, "metadata": entries}


def diagnose_files(one: AdapterPart, other: AdapterPart, observe: Observer = silent) -> Diagnosis:
    """Read two adapters and measure what they have to do with each other.

    Raises:
        AdapterError: If one cannot be read or diagnosed, or they belong to different base models.
        ConfigError: If a weight is 0 or no finite number.
    """
    first, second = name_parts([one, other])
    observe(StageStarted("diagnose", f"{first.name} and {second.name}"))
    with measure_effort() as effort:
        adapters = [read_input(part.path) for part in (first, second)]
        refuse_other_bases([first.path, second.path], adapters)
        try:
            found = diagnose_adapters(
                adapters[0],
                adapters[1],
                (first.name, second.name),
                (first.weight, second.weight),
                lambda done, total: observe(Progress("diagnose", "layers", done, total)),
            )
        except ValueError as error:
            raise ConfigError(
                f"The weights {first.weight:g} and {second.weight:g} compare nothing.",
                "Give weights other than 0, or none.",
            ) from error
    observe(StageDone("diagnose", effort.seconds, f"{first.name} and {second.name}"))
    return found
