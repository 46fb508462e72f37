"""Merging: several adapters in, one file out; and what two have to do with each other before."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from PIL import Image
from rich.markup import escape

from dreamloom.api.options import (
    AdapterLike,
    PathLike,
    refuse_unknown,
    show_progress,
    split_adapter,
)
from dreamloom.api.results import FileResult, Result
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer
from dreamloom.display.adapters import format_ranks, render_diagnosis
from dreamloom.lora.readers import tell_readers
from dreamloom.lora.writing import FileFormat
from dreamloom.merging.diagnose.advice import give_advice
from dreamloom.merging.diagnose.measuring import Diagnosis
from dreamloom.merging.diagnose.picture import draw_diagnosis
from dreamloom.merging.files.inspect import diagnose_files
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import (
    AdapterPart,
    FilePrecision,
    GivenBlocks,
    Recipe,
    name_parts,
)
from dreamloom.merging.files.verify import verify_merge
from dreamloom.merging.methods import find_method
from dreamloom.merging.ranks import parse_rank

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class MergedAdapter(FileResult):
    """One file made of several adapters; it carries its recipe, and stands for its path.

    Attributes:
        file: The .safetensors file.
        layers: How many layers it changes.
        ranks: The ranks that they have, each once, in order.
        error: What was cut off by ``rank``, relative to the uncut merge; 0 where nothing was.
        parts: The files that it was made of.
    """

    file: Path
    layers: int
    ranks: tuple[int, ...]
    error: float
    parts: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The .safetensors file."""
        return self.file

    def verify(self) -> str:
        """Merge its parts again and compare; say what came of it.

        Raises:
            AdapterError: If the file is not what its recipe makes, or a part is not there.
        """
        return str(verify_merge(self.file, files=self.parts))

    def _render(self) -> Iterator[RenderableType]:
        lost = f", {self.error:.2%} off the uncut merge" if self.error > 0 else ""
        yield f"[bold]The merged adapter:[/bold] {escape(str(self.file))}"
        yield f"{self.layers} layers, {format_ranks(self.ranks)}{lost}."
        yield escape(tell_readers(self.file))


class MergeOptions(TypedDict, total=False):
    """How adapters are merged, beside the method and the rank.

    Attributes:
        options: The method's own settings; ``dreamloom merge --methods --method NAME`` lists them.
        blocks: Weights of blocks for one part, by its name, or for all where it is no table of
            parts: ``"style=1.2, mid=0"``, a list of numbers, or a table of blocks.
        seed: Of methods that throw dice.
        format: Whose names the file has: ``auto``, ``kohya``, ``kohya-diffusers`` or ``peft``.
        precision: Of the numbers in it: ``fp32``, ``fp16`` or ``bf16``.
        base: The base model, for methods that ask it.
        prompts: What the base model is asked for each part, by its name.
        joint_prompts: What it is asked for all parts at once.
        device: Where it computes.
        overwrite: Whether an existing file is replaced.
        progress: As in `Options`.
    """

    options: Mapping[str, Any]
    blocks: GivenBlocks | Mapping[str, GivenBlocks]
    seed: int
    format: FileFormat
    precision: FilePrecision
    base: str
    prompts: Mapping[str, Sequence[str]]
    joint_prompts: Sequence[str]
    device: str
    overwrite: bool
    progress: bool | Observer


def merge(
    *adapters: AdapterLike,
    out: PathLike,
    names: Sequence[str] = (),
    method: str = "sum",
    rank: int | str = "full",
    **how: Unpack[MergeOptions],
) -> MergedAdapter:
    """Merge adapters into one file that can be loaded alone.

    The sum at full rank is exact. Files are checked, and their recipe is kept in the merge, so
    that it can be verified, and given other weights, later.

    Args:
        *adapters: Files, or pairs of a file and its weight.
        out: The .safetensors file to write.
        names: What each is called, such as ``("face", "style")``; by default as its file is.
        method: How they are merged; ``dreamloom merge --methods`` lists 23.
        rank: ``full``, a number, ``energy:0.995`` or ``budget:100MB``.
        **how: See `MergeOptions`.

    Raises:
        AdapterError: If a file cannot be read, or they belong to different base models.
        ConfigError: If the method, an option, a weight or the rank is not possible.
        BaseModelError: If the method asks the base model and it cannot be loaded.
        RunFolderError: If ``out`` exists and may not be replaced, or cannot be written.
    """
    given = dict(how)
    overwrite, progress = bool(given.pop("overwrite", False)), given.pop("progress", True)
    refuse_unknown(given, MergeOptions)
    if not adapters:
        raise ConfigError("There is nothing to merge.", "Give one adapter or more.")
    if names and len(names) != len(adapters):
        raise ConfigError(
            f"{len(names)} names were given for {len(adapters)} adapters.", "Name each, or none."
        )
    parts = [
        AdapterPart(path, weight, name)
        for (path, weight), name in zip(
            map(split_adapter, adapters), names or [""] * len(adapters), strict=True
        )
    ]
    recipe = _write_recipe(parts, method, str(rank), given)
    with show_progress({"progress": progress}) as observe:
        combined = carry_out(recipe, Path(out), overwrite, observe)
    adapter = combined.adapter
    ranks = tuple(sorted({*adapter.ranks.values()}))
    files = tuple(part.path for part in parts)
    return MergedAdapter(Path(out), len(adapter.layers), ranks, combined.error, files)


def _write_recipe(
    parts: Sequence[AdapterPart], method: str, rank: str, given: dict[str, Any]
) -> Recipe:
    named = name_parts(parts)
    blocks, prompts = given.pop("blocks", ""), given.pop("prompts", {})
    by_name = isinstance(blocks, Mapping) and {*blocks} <= {part.name for part in named}
    own = blocks if by_name else dict.fromkeys((part.name for part in named), blocks)
    strangers = sorted({*prompts} - {part.name for part in named})
    if strangers:
        raise ConfigError(
            f"There are prompts for {strangers[0]!r}, which names no part.",
            f"The parts are {', '.join(part.name for part in named)}.",
        )
    named = tuple(
        replace(
            part, blocks=own.get(part.name, ""), prompts=tuple(prompts.get(part.name, part.prompts))
        )
        for part in named
    )
    asked = given.pop("options", {})
    complete = find_method(method).read_options(asked)
    options = {name: complete[name] for name in asked}
    joint = tuple(given.pop("joint_prompts", ()))
    return Recipe(named, method, options, parse_rank(rank), joint=joint, **given)


@dataclass(frozen=True, repr=False)
class DiagnosedAdapters(Result):
    """What two adapters have to do with each other, block by block, and what to do.

    Attributes:
        diagnosis: Norms, cosines and overlaps of every layer.
    """

    diagnosis: Diagnosis

    @property
    def advice(self) -> list[str]:
        """What to do, in sentences."""
        return [*give_advice(self.diagnosis)]

    @property
    def picture(self) -> Image.Image:
        """Heat maps by block."""
        return draw_diagnosis(self.diagnosis)

    def _render(self) -> Iterator[RenderableType]:
        return render_diagnosis(self.diagnosis)

    def _repr_html_(self) -> str:
        written = BytesIO()
        self.picture.save(written, format="PNG")
        drawn = base64.b64encode(written.getvalue()).decode()
        shown = f'<img alt="heat maps by block" src="data:image/png;base64,{drawn}">'
        return super()._repr_html_() + shown


def diagnose(
    one: AdapterLike, other: AdapterLike, *, progress: bool | Observer = True
) -> DiagnosedAdapters:
    """Say what two adapters have in common, and how to merge them.

    Args:
        one: A file, or a file and its weight.
        other: The other.
        progress: As in `Options`.

    Raises:
        AdapterError: If one cannot be read, or they belong to different base models.
        ConfigError: If a weight is 0 or no finite number.
    """
    parts = [AdapterPart(*split_adapter(given)) for given in (one, other)]
    with show_progress({"progress": progress}) as observe:
        return DiagnosedAdapters(diagnose_files(parts[0], parts[1], observe))
