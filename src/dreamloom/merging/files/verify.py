"""Verify a merged file: find its inputs by hash, merge them again, compare every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamloom.core.device import measure_effort
from dreamloom.core.errors import AdapterError
from dreamloom.core.events import Observer, Progress, StageDone, StageStarted, silent
from dreamloom.core.run_folder import library_versions
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.base_names import BASE_KEY, publish_base
from dreamloom.lora.reading import read_adapter
from dreamloom.merging.factors import Factors, find_spectrum, flatten, norm, stack
from dreamloom.merging.files.base_model import Question, ask_base
from dreamloom.merging.files.certificate import (
    Certificate,
    RecordedRecipe,
    read_certificate,
    refuse_unsealed,
)
from dreamloom.merging.files.inputs import find_inputs, read_input
from dreamloom.merging.files.recipe import FilePrecision
from dreamloom.merging.merging import Uncut, merge_uncut
from dreamloom.merging.ranks import choose_rank, spend_budget

# Half the distance from 1 to the next number, and half that of the least number from 0.
_ROUNDING: Mapping[FilePrecision, tuple[float, float]] = {
    "fp32": (2.0**-24, 2.0**-150),
    "fp16": (2.0**-11, 2.0**-25),
    "bf16": (2.0**-8, 2.0**-134),
}
# Two machines that compute in float32 agree to this share of what they add up; the sums of a
# method are up to some thousands of numbers long.
_ARITHMETIC = 2e-5
# A certificate's own numbers are written with seven digits, and computed once more here.
_TOLD = 1e-3


@dataclass(frozen=True)
class Verified:
    """A merged file that is what its recipe says.

    Args:
        path: The file.
        recipe: Its recipe.
        layers: How many layers were merged again.
        error: ‖what is in the file − what the method says‖ / ‖what the method says‖ over all
            layers together, 0 or above: what the rank cut off, and what the precision rounded.
        worst: The layer with the highest such error.
        worst_error: That error.
        rank_error: What the certificate says of the rank alone, over all layers together.
    """

    path: Path
    recipe: RecordedRecipe
    layers: int
    error: float
    worst: str
    worst_error: float
    rank_error: float

    def __str__(self) -> str:
        recipe = self.recipe
        names = " and ".join(part.name for part in recipe.parts)
        begin = (
            f"{self.path} holds: merged again from {names} by {recipe.method}, its {self.layers} "
        )
        if self.rank_error <= _ARITHMETIC:
            rounding = (
                f"{self.error:.1e}, the rounding of {recipe.precision}" if self.error else "0"
            )
            return f"{begin}layers differ from what the method says by {rounding}."
        return (
            f"{begin}layers are as near to what the method says as --rank {recipe.rank} allows: "
            f"{self.error:.2%} off in all, {self.worst_error:.2%} at most, in {self.worst}."
        )


@dataclass(frozen=True)
class _Layer:
    """One layer merged again.

    Args:
        values: The singular values of what the method says.
        whole: Its Frobenius norm.
        held: The norm of what the file has.
        difference: The norm of what the file has, less what the method says.
        rounding: The highest norm that rounding can give the difference.
        together: The ranks of the parts' updates, added up.
        sides: Outputs and inputs.
    """

    values: Tensor
    whole: float
    held: float
    difference: float
    rounding: float
    together: int
    sides: tuple[int, int]


def verify_merge(
    path: Path,
    folder: Path | None = None,
    files: Sequence[Path] = (),
    question: Question | None = None,
    observe: Observer = silent,
) -> Verified:
    """Merge a file's inputs again and compare, layer by layer.

    The seal tells whether any byte of the file has changed, the inputs are known by their SHA-256,
    and each layer must be as near to what the method says as its rank and the file's precision
    allow.

    Args:
        path: The merged file.
        folder: Where the inputs lie, at any depth; by default beside the merged file.
        files: Files that are looked at first.
        question: Where the base model lies and is asked, for methods that ask it; by default as
            the file says. What it is asked, the file says.
        observe: Told of progress.

    Raises:
        AdapterError: If the file says nothing of how it was merged, an input is missing or has
            changed, or the file is not what its recipe says.
        BaseModelError: If the base model is asked and cannot be loaded.
    """
    observe(StageStarted("verify", str(path)))
    with measure_effort() as effort:
        merged = read_adapter(path)
        certificate = read_certificate(path, merged)
        refuse_unsealed(path, merged)
        recipe = certificate.recipe
        adapters = [read_input(found) for found in find_inputs(recipe, path, folder, files)]
        # The base model is asked what it was asked before, and must be the same.
        where = question or Question()
        prompts = [part.prompts for part in recipe.parts]
        known = (adapter.metadata.get(BASE_KEY, "") for adapter in adapters)
        base = next((one for one in known if publish_base(one) == recipe.base), recipe.base)
        asked = Question(where.base or base, where.device, prompts, recipe.joint)
        answer = ask_base(asked, adapters, recipe.request(), observe)
        if answer.fingerprint != recipe.base_fingerprint:
            raise AdapterError(
                f"{path} was merged with the help of {recipe.base}, and {answer.base} has other "
                "weights.",
                "Name that base model with --base.",
            )
        layers: dict[str, _Layer] = {}
        for uncut in merge_uncut(adapters, recipe.request(), answer.layers):
            layers[uncut.layer] = _compare(uncut, merged, recipe)
            observe(Progress("verify", "layers", len(layers), len(certificate.reports)))
        verified = _judge(path, certificate, layers)
    observe(StageDone("verify", effort.seconds, str(path)))
    return verified


def _compare(uncut: Uncut, merged: Adapter, recipe: RecordedRecipe) -> _Layer:
    """Compare what the method says of a layer with what stands in the file."""
    update = uncut.update
    if uncut.layer in merged.layers:
        held = flatten(merged.layers[uncut.layer])
    else:
        outputs, inputs = update.shape
        held = Factors(torch.zeros(outputs, 0), torch.zeros(0, inputs))
    if held.shape != tuple(update.shape):
        raise AdapterError(
            f"The layer {uncut.layer} is {held.shape} in the file and {tuple(update.shape)} by "
            "its recipe.",
            "Merge the parts again.",
        )
    sizes = held.up.double().norm(dim=0), held.down.double().norm(dim=1)
    added = float((sizes[0] * sizes[1]).sum())
    if isinstance(update, Factors):
        values, whole = find_spectrum(update).values, norm(update)
        # What cancels out leaves the rounding of what it was, not of what it is.
        added += float((update.up.double().norm(dim=0) * update.down.double().norm(dim=1)).sum())
        difference = norm(stack([(held, 1.0), (update, -1.0)]))
    else:
        # In the precision in which the rank was chosen, so that the choice is the same.
        values = torch.linalg.svdvals(update.float()).double()
        whole = float(update.double().norm())
        difference = float((held.multiply().double() - update.double()).norm())
    rounding = _bound_rounding(held, sizes, recipe, max(merged.ranks.values()))
    rounding += _ARITHMETIC * (whole + added)
    return _Layer(values, whole, norm(held), difference, rounding, uncut.together, held.shape)


def _bound_rounding(
    held: Factors, sizes: tuple[Tensor, Tensor], recipe: RecordedRecipe, alpha: int
) -> float:
    """Bound how far an update can be moved by rounding its factors.

    Each number moves by a share of itself, or near 0 by a fixed step, so a column u of up and its
    row d of down move by at most δu and δd, and u dᵀ by ‖u‖ δd + δu ‖d‖ + δu δd. Files with
    kohya's names hold ``up`` divided by up to ``alpha``, so that its step counts for more.
    """
    share, step = _ROUNDING[recipe.precision]
    times = 1 + recipe.remixed + recipe.converted
    up, down = sizes
    up_moves = times * (share * up + step * alpha * held.shape[0] ** 0.5)
    down_moves = times * (share * down + step * held.shape[1] ** 0.5)
    return float((up * down_moves + up_moves * down + up_moves * down_moves).sum())


def _judge(path: Path, certificate: Certificate, layers: Mapping[str, _Layer]) -> Verified:
    """Say that the file holds, or refuse it for the first thing that does not."""
    recipe, reports = certificate.recipe, certificate.reports
    if set(layers) != set(reports):
        example = sorted(set(layers) ^ set(reports))[0]
        raise _refuse(path, recipe, f"by its recipe it has other layers, such as {example}")
    # Chosen anew, from what the method says and the rank that was asked for.
    request = recipe.request()
    values = {name: layer.values for name, layer in layers.items()}
    if request.rank.kind == "budget":
        costs = {name: sum(layer.sides) for name, layer in layers.items()}
        numbers = request.rank.amount / request.bytes_per_number
        ranks = spend_budget(values, costs, numbers)
    else:
        ranks = {
            name: choose_rank(values[name], request.rank, layer.together)
            for name, layer in layers.items()
        }
    for name, layer in layers.items():
        why = _find_fault(layer, ranks[name], reports[name].error)
        if why:
            raise _refuse(path, recipe, f"{name} {why}")
    shares = {name: la.difference / la.whole if la.whole else 0.0 for name, la in layers.items()}
    worst = max(shares, key=shares.__getitem__)
    whole = sum(layer.whole**2 for layer in layers.values()) ** 0.5
    return Verified(
        path,
        recipe,
        len(layers),
        sum(layer.difference**2 for layer in layers.values()) ** 0.5 / whole,
        worst,
        shares[worst],
        sum((reports[n].error * la.whole) ** 2 for n, la in layers.items()) ** 0.5 / whole,
    )


def _find_fault(layer: _Layer, rank: int, told_error: float) -> str:
    """Say what is wrong with a layer; empty if it holds.

    Its distance from what the method says, its size and what the certificate says of it must be
    those of the nearest update of its rank. All three are the same for every such update, also
    where equal singular values leave a choice.
    """
    lost, kept = float(layer.values[rank:].norm()), float(layer.values[:rank].norm())
    whole = layer.whole or 1.0
    if not layer.difference <= lost + layer.rounding:
        return (
            f"differs by {layer.difference / whole:.1e} from what the method says, and rank and "
            f"rounding explain {(lost + layer.rounding) / whole:.1e}"
        )
    if not abs(layer.held - kept) <= layer.rounding:
        return f"has a norm of {layer.held:.4g}, and it should be {kept:.4g}"
    if not abs(told_error * layer.whole - lost) <= _TOLD * lost + layer.rounding:
        return (
            f"has an error of {lost / whole:.1e} from its rank, and the certificate says "
            f"{told_error:.1e}"
        )
    return ""


def _refuse(path: Path, recipe: RecordedRecipe, why: str) -> AdapterError:
    now = library_versions()
    other = [
        f"{name} {version} (here {now.get(name, 'none')})"
        for name, version in recipe.versions.items()
        if now.get(name) != version
    ]
    hint = (
        f"It was merged with {', '.join(other)}; verify it there."
        if other
        else "The file or its certificate was changed; merge the parts again."
    )
    return AdapterError(f"{path} is not what its recipe says: {why}.", hint)
