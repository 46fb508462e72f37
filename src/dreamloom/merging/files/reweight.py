"""Reweight the LoRAs of a merged file (remix), without the files that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.core.events import Observer, StageDone, StageStarted, silent
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.merging.factors import flatten, norm
from dreamloom.merging.files.certificate import (
    Certificate,
    RecordedPart,
    RecordedRecipe,
    read_certificate,
    refuse_unsealed,
    write_sealed,
)
from dreamloom.merging.files.merge import check_out
from dreamloom.merging.merging import LayerReport


def parse_changes(texts: Iterable[str]) -> dict[str, float]:
    """Read ``NAME=WEIGHT`` words as new weights by the part's name.

    Raises:
        ConfigError: If one is not of that form, or a name comes twice.
    """
    changes: dict[str, float] = {}
    for text in texts:
        name, equals, weight = text.rpartition("=")
        try:
            number = float(weight)
            if not equals or not isfinite(number):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{text!r} gives no part a weight.", "Write NAME=WEIGHT, such as pixel=0.6."
            ) from None
        if name in changes:
            raise ConfigError(f"{name} is given two weights.", "Give it one.")
        changes[name] = number
    return changes


def list_parts(path: Path) -> tuple[tuple[RecordedPart, ...], str]:
    """List the parts of a merged file, with their weights.

    Returns:
        The parts, and in one sentence what keeps `remix_merge` from giving them other weights;
        empty if nothing does.

    Raises:
        AdapterError: If the file does not say how it was merged.
    """
    merged = read_adapter(path)
    certificate = read_certificate(path, merged)
    try:
        refuse_unsealed(path, merged)
        _check_slices(path, certificate, merged)
    except AdapterError as error:
        return certificate.recipe.parts, error.problem
    return certificate.recipe.parts, ""


def remix_merge(
    path: Path,
    changes: Mapping[str, float],
    out: Path | None = None,
    overwrite: bool = False,
    observe: Observer = silent,
) -> Adapter:
    """Give parts of a merged file other weights: what a new merge of its inputs would give.

    It is exact but for one more rounding, and needs no input, because a plain sum at full rank
    keeps its parts' factors side by side, and the file says where each begins. A weight of 0
    leaves a part out, for good. Block weights stay as they were.

    Args:
        path: A file that a merge by ``sum`` at full rank wrote.
        changes: New weights by the part's name, not factors of the old; others stay.
        out: The file to write; None changes ``path`` itself.
        overwrite: Whether an existing ``out`` may be replaced.
        observe: Told of what happens.

    Returns:
        The adapter as written.

    Raises:
        AdapterError: If the parts of the file cannot be told apart.
        ConfigError: If a name is no part's, a part is not in the file, or none is left.
        RunFolderError: If ``out`` cannot be written, or exists and must not be overwritten.
    """
    if out is not None:
        check_out(out, [path], overwrite)
    observe(StageStarted("remix", str(path)))
    with measure_effort() as effort:
        merged = read_adapter(path)
        certificate = read_certificate(path, merged)
        refuse_unsealed(path, merged)
        _check_slices(path, certificate, merged)
        weights = _find_weights(certificate.recipe, changes)
        remixed, recipe = _weigh_parts(merged, certificate, weights)
        write_sealed(out or path, remixed, recipe.precision, recipe.format)
    observe(StageDone("remix", effort.seconds, str(out or path)))
    return remixed


def _check_slices(path: Path, certificate: Certificate, merged: Adapter) -> None:
    recipe = certificate.recipe
    if recipe.method != "sum":
        raise AdapterError(
            f"{path} was merged by {recipe.method}, whose parts cannot be told apart.",
            "Only a plain sum at full rank can be remixed; merge the inputs again.",
        )
    if recipe.rank != "full":
        raise AdapterError(
            f"{path} was cut to rank {recipe.rank}, which mixes its parts.",
            "Only a plain sum at full rank can be remixed; merge the inputs again.",
        )
    ranks = {
        name: sum(own[name] for own in certificate.slices) if certificate.slices else -1
        for name in merged.layers
    }
    if len(certificate.slices) != len(recipe.parts) or ranks != merged.ranks:
        raise AdapterError(
            f"{path} does not say where its parts begin and end.",
            "It was changed after it was merged; merge the inputs again.",
        )


def _find_weights(recipe: RecordedRecipe, changes: Mapping[str, float]) -> list[float]:
    """Every part's weight after the changes."""
    listed = ", ".join(f"{part.name} ({part.weight:g})" for part in recipe.parts)
    for name, weight in changes.items():
        known = [part for part in recipe.parts if part.name == name]
        if not known:
            raise ConfigError(f"There is no part {name!r} in the file.", f"It has {listed}.")
        if weight != 0 and known[0].weight == 0:
            raise ConfigError(
                f"The part {name} is not in the file: its weight was 0.",
                "Merge the inputs again to bring it back.",
            )
    weights = [changes.get(part.name, part.weight) for part in recipe.parts]
    if not any(weights):
        raise ConfigError("Every weight is 0, so nothing is left.", "Raise a weight.")
    return weights


def _weigh_parts(
    merged: Adapter, certificate: Certificate, weights: Sequence[float]
) -> tuple[Adapter, RecordedRecipe]:
    """Give every slice its new weight; a part at 0 goes, its words and its name with it."""
    recipe = certificate.recipe
    old = [part.weight for part in recipe.parts]
    factors = [new / was if was else 0.0 for was, new in zip(old, weights, strict=True)]
    layers = {}
    for name, layer in merged.layers.items():
        ranks = [own[name] for own in certificate.slices]
        slices = zip(layer.up.split(ranks, dim=1), layer.down.split(ranks), factors, strict=True)
        kept = [(up * factor, down) for up, down, factor in slices if factor != 0]
        if any(down.shape[0] for _, down in kept):
            ups, downs = zip(*kept, strict=True)
            layers[name] = Layer(torch.cat(downs), torch.cat(ups, dim=1))
    parts = [
        (part.model_copy(update={"weight": weight}), own)
        for part, weight, own in zip(recipe.parts, weights, certificate.slices, strict=True)
        if weight != 0
    ]
    renewed = Certificate(
        recipe.model_copy(
            update={"parts": tuple(part for part, _ in parts), "remixed": recipe.remixed + 1}
        ),
        {n: LayerReport(layer.rank, norm(flatten(layer)), 0.0) for n, layer in layers.items()},
        [{name: own[name] for name in layers} for _, own in parts],
    )
    words = {word for part, _ in parts for word in part.words}
    metadata = dict(merged.metadata)
    if recipe.parts[0].name != parts[0][0].name:
        # The first part is the subject, by custom, and it is gone.
        metadata.pop("dreamloom.class_noun", None)
        metadata["dreamloom.subject"] = parts[0][0].subject
    remixed = replace(
        merged,
        layers=layers,
        metadata={**metadata, **renewed.as_metadata([*layers])},
        tokens={word: rows for word, rows in merged.tokens.items() if word in words},
    )
    return remixed, renewed.recipe
