"""Drawing: prompts and adapters in, pictures out that show themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from PIL import Image
from rich.markup import escape

from dreamloom.api.options import (
    AdapterLike,
    Options,
    PathLike,
    list_adapters,
    list_texts,
    load_settings,
    show_progress,
)
from dreamloom.api.results import Result
from dreamloom.core.device import pick_runtime
from dreamloom.core.manifests import ImageSet
from dreamloom.data.image_io import open_upright
from dreamloom.display.layout import table
from dreamloom.evaluation.scoring import read_pictures
from dreamloom.pipeline.draw import GenerateRequest, draw
from dreamloom.report.gallery import embed

if TYPE_CHECKING:
    from rich.console import RenderableType

_THUMBNAIL_PX = 160
# A notebook keeps all that it shows; more than this is better looked at in the folder.
_SHOWN_PROMPTS, _SHOWN_EACH = 12, 8


@dataclass(frozen=True, repr=False)
class Pictures(Result, Sequence[Image.Image]):
    """A set of drawn pictures; a sequence of them, opened when they are asked for.

    Attributes:
        images: The manifest: for each picture its file, prompt, seed, scheduler, steps.
        floor: What the base model drew of the same prompts and seeds, where that was asked for.
    """

    images: ImageSet
    floor: Pictures | None = None

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return self.images.folder

    @property
    def prompts(self) -> list[str]:
        """The prompts, each once, in order."""
        return list(dict.fromkeys(picture.prompt for picture in self.images.pictures))

    def select(self, **wanted: Any) -> Pictures:
        """Keep the pictures whose fields equal the given ones, such as ``seed=0, steps=25``."""
        floor = self.floor.select(**wanted) if self.floor else None
        return Pictures(self.images.select(**wanted), floor)

    def __len__(self) -> int:
        return len(self.images.pictures)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        paths = self.images.paths()
        if isinstance(index, slice):
            return [open_upright(path) for path in paths[index]]
        return open_upright(paths[index])

    def _render(self) -> Iterator[RenderableType]:
        yield escape(f"{len(self)} pictures in {self.folder}")
        rows = []
        for prompt in self.prompts:
            of_it = self.images.select(prompt=prompt).pictures
            rows.append((escape(prompt), str(len(of_it)), _say_seeds(one.seed for one in of_it)))
        yield table(("prompt", "pictures", "seeds"), rows)

    def _repr_html_(self) -> str:
        return _lay_out_rows([(prompt, self._of(prompt)) for prompt in self.prompts])

    def _of(self, prompt: str) -> list[Path]:
        return self.images.select(prompt=prompt).paths()


@dataclass(frozen=True, repr=False)
class SideBySide(Result):
    """Several sets beside each other: the same prompts and seeds, a column for each set.

    Attributes:
        sets: By the name over the column.
        each: How many pictures of each prompt are shown.
    """

    sets: Mapping[str, Pictures]
    each: int = 1

    def _render(self) -> Iterator[RenderableType]:
        rows = [(escape(name), escape(str(one.folder))) for name, one in self.sets.items()]
        yield table(("column", "folder"), rows)

    def _repr_html_(self) -> str:
        first = next(iter(self.sets.values()))
        head = "".join(f"<th>{escape_html(name)}</th>" for name in self.sets)
        rows = []
        for prompt in first.prompts:
            for picture in first.images.select(prompt=prompt).pictures[: self.each]:
                cells = "".join(
                    f"<td>{_show_all(one.images.select(**_moment(picture)).paths()[:1])}</td>"
                    for one in self.sets.values()
                )
                said = f"{escape_html(prompt)}<br><small>seed {picture.seed}</small>"
                rows.append(f"<tr><td style='text-align:left'>{said}</td>{cells}</tr>")
        return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _moment(picture: Any) -> dict[str, Any]:
    return {name: getattr(picture, name) for name in ("prompt", "seed", "scheduler", "steps")}


def side_by_side(sets: Mapping[str, Pictures], each: int = 1) -> SideBySide:
    """Put sets of pictures beside each other, for a notebook.

    Args:
        sets: By the name to stand over each column, such as ``{"base model": …, "taught": …}``;
            the first says which prompts and seeds are shown.
        each: How many pictures of each prompt.
    """
    if not sets:
        raise ValueError("side_by_side needs one set of pictures or more")
    return SideBySide(dict(sets), each)


class DrawOptions(Options, total=False):
    """What drawing takes beside that.

    Attributes:
        base: The base model; by default the one that the adapters were made for.
        class_noun: What the subject is one of; by default as the first adapter says.
        schedulers: One name or several: ddim, ddpm, pndm, euler, euler_a, dpm++, dpm++karras,
            unipc, heun.
        steps: Denoising steps, one number or several; each scheduler draws with each.
        seeds: Pictures of each prompt.
        first_seed: Their seeds are this one and those that follow.
        guidance: Classifier-free guidance, 0 or more.
        negative_prompt: What guidance leads away from.
        prompt_weights: Whether (word:1.2), (word) and [word] are read as weights.
        size_px: Width and height in pixels; by default the base model's own.
        compose: How several adapters share a drawing: ``sum``, ``switch[:STEPS]`` or
            ``k-lora[:ALPHA,BETA]``.
        conditional_only: Keep adapters out of guidance's other half.
    """

    base: PathLike
    class_noun: str
    schedulers: str | Sequence[str]
    steps: int | Sequence[int]
    seeds: int
    first_seed: int
    guidance: float
    negative_prompt: str
    prompt_weights: bool
    size_px: tuple[int, int]
    compose: str
    conditional_only: bool


_REQUEST = ("class_noun", "compose", "conditional_only")
_SETTINGS = {
    "base": "base",
    "schedulers": "generate.schedulers",
    "steps": "generate.steps",
    "seeds": "generate.images_per_prompt",
    "first_seed": "generate.first_seed",
    "guidance": "generate.guidance",
    "negative_prompt": "generate.negative_prompt",
    "prompt_weights": "generate.prompt_weights",
}


def generate(
    prompts: str | Sequence[str] = (),
    *,
    out: PathLike,
    adapters: AdapterLike | Sequence[AdapterLike] = (),
    packs: str | Sequence[str] = (),
    subject: str | None = None,
    name: str = "pictures",
    floor: bool = False,
    **options: Unpack[DrawOptions],
) -> Pictures:
    """Draw prompts with adapters, or with the base model alone.

    Each picture depends on its prompt and seed and not on what else is drawn; pictures that are
    there already are not drawn again.

    Args:
        prompts: One or several; ``{subject}`` stands for the subject's phrase.
        out: A run's folder, or a new one.
        adapters: Files, or pairs of a file and its weight, such as ``[face, (style, 0.8)]``.
        packs: Names of prompt packs, such as ``person-v1``.
        subject: The subject's phrase; None takes what the first adapter says of itself.
        name: The set's name; its folder is ``out/images/name``.
        floor: Whether the base model draws the same, too, to compare with.
        **options: See `DrawOptions`.

    Returns:
        The pictures, with the base model's as their ``floor`` if it was asked for.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit the base model.
        ConfigError: If nothing is to be drawn, or it cannot be drawn so.
        RunFolderError: If ``out`` holds other files, or a set of that name drawn otherwise.
    """
    own: dict[str, Any] = dict(options)
    words = {key: own.pop(key) for key in _REQUEST if key in own}
    width, height = own.pop("size_px", None) or (None, None)
    given = {setting: own.pop(key) for key, setting in _SETTINGS.items() if key in own}
    for setting in ("generate.schedulers", "generate.steps"):
        if isinstance(given.get(setting), (str, int)):
            given[setting] = (given[setting],)
    sides = {"generate.width_px": width, "generate.height_px": height}
    config = load_settings(own, {**given, **sides})
    request = GenerateRequest(
        tuple(f"{path}:{weight!r}" for path, weight in list_adapters(adapters)),
        list_texts(prompts),
        list_texts(packs),
        subject,
        floor,
        name,
        Path(out),
        **words,
    )
    with show_progress(options) as observe:
        folders = draw(request, config, pick_runtime(config.device, config.precision), observe)
    drawn = [Pictures(read_pictures(folder)) for folder in folders]
    return Pictures(drawn[0].images, drawn[1] if len(drawn) > 1 else None)


def _say_seeds(seeds: Iterable[int]) -> str:
    """Write seeds as a range where they are one."""
    listed = sorted({*seeds})
    if len(listed) > 2 and listed == [*range(listed[0], listed[-1] + 1)]:
        return f"{listed[0]} to {listed[-1]}"
    return ", ".join(map(str, listed))


def _lay_out_rows(rows: Sequence[tuple[str, Sequence[Path]]]) -> str:
    """Lay out rows of pictures with their prompts above, and say what is left out."""
    shown = "".join(
        f"<div>{escape_html(prompt)}</div><div>{_show_all(paths[:_SHOWN_EACH])}</div>"
        for prompt, paths in rows[:_SHOWN_PROMPTS]
    )
    left = len(rows) - _SHOWN_PROMPTS
    return shown + (f"<div>and {left} prompts more</div>" if left > 0 else "")


def _show_all(paths: Sequence[Path]) -> str:
    return "".join(
        f'<img alt="" style="margin:2px" src="{embed(path, _THUMBNAIL_PX)[0]}">' for path in paths
    )
