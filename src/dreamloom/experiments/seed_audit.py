"""The seed audit: CLIP-I and CLIP-T as a faulty script computed them, fault by fault, to none.

The study at github.com/rajlm10/dreambooth_lora_merging reports CLIP-I of 0.96 to 0.98 and one
identical CLIP-T for every row. Each fault behind that is a switch here, so that anyone can see
what it is worth on pictures of their own. This is the only place where pixels reach an encoder
otherwise than through its own preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dreamloom.core.errors import EvaluationError
from dreamloom.core.toml_files import ClosedModel
from dreamloom.data.image_io import TURNS, crop_centre, open_upright, read_upright
from dreamloom.data.tensors import to_tensor
from dreamloom.evaluation.encoders.base import Familiarity, TextExtractor
from dreamloom.evaluation.encoders.clip import ClipEncoder
from dreamloom.evaluation.encoders.preprocessing import Preprocessing
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.similarity import (
    cosines,
    photo_ceiling,
    prompt_fidelity,
    subject_fidelity,
)

_SQUASHED_PX = 1024
_BATCH = 16
_MOSAICS = 6
_MOSAIC_CELLS = 16
_Means = Float[np.ndarray, " values"]

# What lays an upright picture down again as its file stores it: quarter turns undo each other.
_AS_STORED = TURNS | {6: TURNS[8], 8: TURNS[6]}


@dataclass(frozen=True)
class Faults:
    """The mistakes that a scoring makes; none by default.

    Args:
        half: Means are rounded as half precision rounds them.
        bright: Pixels arrive 127.5 times too large and not centred.
        sideways: EXIF orientation is not applied.
        squashed: Pictures are forced to a square of 1024 px, bilinear and without antialias.
        jagged: The encoder's own resize shrinks without antialias.
        full_size: Photos are not first brought to the size of the pictures.
        swapped: CLIP-T is computed on the photos.
        named: The subject's invented word stays in the text.
        one_text: All pictures are compared with one text, and count alike whatever their prompt.
    """

    half: bool = False
    bright: bool = False
    sideways: bool = False
    squashed: bool = False
    jagged: bool = False
    full_size: bool = False
    swapped: bool = False
    named: bool = False
    one_text: bool = False


EVERY_FAULT = Faults(**{switch.name: True for switch in fields(Faults)})


class FaultWords(NamedTuple):
    """A fault in words, and what is right without it."""

    wrong: str
    mended: str


FAULT_WORDS = {
    "half": FaultWords("means in half precision", "means in full precision"),
    "bright": FaultWords("pixels 127.5 times too large", "pixels at the right scale"),
    "sideways": FaultWords("photos as stored, on their side", "photos upright"),
    "squashed": FaultWords("squashed to 1024 × 1024 px", "proportions kept"),
    "jagged": FaultWords("resized without antialias", "resized smoothly"),
    "full_size": FaultWords("photos at their own size", "photos at the pictures' size"),
    "swapped": FaultWords("CLIP-T of the photos", "CLIP-T of the pictures"),
    "named": FaultWords("the invented word in the text", "the invented word left out"),
    "one_text": FaultWords("one text for all pictures", "each picture by its own prompt"),
}
"""Every fault, in the order in which they are mended."""


class AuditedImage(NamedTuple):
    """A picture or photo that is scored."""

    original: Path
    prepared: Path
    """The copy of it that an evaluation looks at; for a picture, the file itself."""


@dataclass(frozen=True)
class Wording:
    """The texts of an audit.

    Args:
        target: The one text that the faulty way compares with.
        target_without: The same without the invented word.
        prompts: Each picture's own prompt; empty unless all are known.
        prompts_without: The same without the invented word.
        seeds: Each picture's seed.
    """

    target: str
    target_without: str
    prompts: tuple[str, ...]
    prompts_without: tuple[str, ...]
    seeds: tuple[int, ...]

    def texts(self, faults: Faults, count: int) -> list[str]:
        """Give the text that each of ``count`` pictures is compared with."""
        if faults.one_text or not self.prompts:
            return [self.target if faults.named else self.target_without] * count
        return list(self.prompts if faults.named else self.prompts_without)

    def weights(self, faults: Faults, count: int) -> _Means:
        """Give each picture's share in a mean: every prompt alike, and every seed of a prompt."""
        if faults.one_text or not self.prompts:
            return np.full(count, 1.0 / count)
        noises = list(zip(self.prompts_without, self.seeds, strict=True))
        seeds = {prompt: len({n for n in noises if n[0] == prompt}) for prompt, _ in noises}
        each = [1.0 / (len(seeds) * seeds[noise[0]] * noises.count(noise)) for noise in noises]
        return np.array(each)


class AuditScores(ClosedModel):
    """What a way of scoring gives."""

    clip_i: float
    """How like the photos the pictures are."""
    clip_t: float
    """How like the text the pictures are, or the photos where the arguments are swapped."""
    photos: float | None
    """How like each other the photos are, none with itself; None for a single photo."""
    mosaics: float
    """How like the photos mosaics of random colours are."""
    floor: float | None = None
    """How like the photos the floor's pictures are; None without a floor."""


class AuditRow(ClosedModel):
    """One step of the table."""

    fault: str
    """The fault that is mended here, or that stands alone; empty where there is none."""
    says: str
    scores: AuditScores


class Audit(ClosedModel):
    """The table: from every fault to none, and each fault alone."""

    rows: tuple[AuditRow, ...]
    """Every fault, then one mended after the other; in the last none is left."""
    alone: tuple[AuditRow, ...]
    """Each fault put into the right way by itself."""
    pictures: int
    photos: int
    key: str
    """The encoder, as `dreamloom evaluate` names it."""
    warning: str | None = None
    """Why these numbers mean less than they seem to."""
    faulty_text: str
    """The text that is compared with every fault."""
    right_texts: tuple[str, ...]
    """The texts that are compared the right way."""
    verdict: str
    """How far the faults move together what differs, in words."""

    @property
    def has_floor(self) -> bool:
        """Whether other pictures were compared with the photos, too."""
        return self.rows[0].scores.floor is not None


def audit_faults(
    pictures: Sequence[AuditedImage],
    photos: Sequence[AuditedImage],
    clip: ClipEncoder,
    wording: Wording,
    *,
    floor: Sequence[AuditedImage] = (),
    familiar: Familiarity | None = None,
    on_row: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Score pictures the faulty way, mend one fault after the other, and put each in alone.

    Args:
        pictures: The drawn pictures.
        photos: The subject's photos.
        clip: Looks at both, and reads the texts.
        wording: The texts.
        floor: Pictures of the base model, or of anybody else; may be absent.
        familiar: Says which pictures CLIP knows; None if it knows every kind.
        on_row: Told how many of `count_rows` rows are done.

    Raises:
        PhotoError: If a picture cannot be read.
    """
    evaluator = _Evaluator(pictures, photos, floor, clip, wording)
    switches = _switches(wording)
    faults = replace(EVERY_FAULT, one_text="one_text" in switches)
    rows = [AuditRow(fault="", says="every fault", scores=evaluator.score(faults))]
    on_row(1)
    for name in switches:
        faults = replace(faults, **{name: False})
        scores = evaluator.score(faults)
        rows.append(AuditRow(fault=name, says=FAULT_WORDS[name].mended, scores=scores))
        on_row(len(rows))
    alone = []
    for name in switches:
        scores = evaluator.score(replace(Faults(), **{name: True}))
        alone.append(AuditRow(fault=name, says=FAULT_WORDS[name].wrong, scores=scores))
        on_row(len(rows) + len(alone))
    return Audit(
        rows=tuple(rows),
        alone=tuple(alone),
        pictures=len(pictures),
        photos=len(photos),
        key=clip.key,
        warning=_warn(photos, pictures, familiar),
        faulty_text=wording.target,
        right_texts=tuple(dict.fromkeys(wording.texts(Faults(), len(pictures)))),
        verdict=_conclude(rows[0].scores, rows[-1].scores),
    )


def score_with_faults(
    pictures: Sequence[AuditedImage],
    photos: Sequence[AuditedImage],
    clip: ClipEncoder,
    wording: Wording,
    faults: Faults,
) -> AuditScores:
    """Score pictures in one way; arguments and errors are those of `audit_faults`."""
    return _Evaluator(pictures, photos, (), clip, wording).score(faults)


def count_rows(wording: Wording) -> int:
    """Count the rows of an audit, both tables together."""
    return 1 + 2 * len(_switches(wording))


def bare_clip(clip: TextExtractor | Missing) -> ClipEncoder:
    """Give the CLIP of an evaluation without what remembers for it.

    Raises:
        EvaluationError: If it is not on this machine.
    """
    inner = getattr(clip, "inner", clip)
    if isinstance(inner, ClipEncoder):
        return inner
    reason = inner.reason if isinstance(inner, Missing) else f"{clip} takes no pixels"
    raise EvaluationError(
        f"The audit needs CLIP: {reason}.",
        "Drawings are audited with picturebook's own: --set evaluate.encoders=picturebook.",
    )


def prepare_pixels(
    image: Image.Image, faults: Faults, preprocessing: Preprocessing
) -> Float[Tensor, "3 side side"]:
    """Make an upright or sideways picture what the encoder sees.

    A value v of 0 to 255 becomes (v/255 - mean) / deviation the right way. The script took a
    generator's output in [-1, 1] for granted and computed ((v + 1)/2 - mean) / deviation, which
    is 127.5 · right + (126.5 · mean + 0.5) / deviation: no value is cut off, all are too large.

    Args:
        image: An RGB picture of any size.
        faults: Of these, ``bright``, ``squashed`` and ``jagged`` matter here.
        preprocessing: The encoder's own.
    """
    if faults.squashed:
        image = _squash(image)
    square = crop_centre(image)
    if faults.jagged:
        levels = _shrink_jagged(square, preprocessing)
    else:
        plain = replace(preprocessing, mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0))
        levels = 255.0 * plain([square])[0]
    pixels = (levels + 1.0) / 2.0 if faults.bright else levels / 255.0
    mean, deviation = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.deviation)
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def _squash(image: Image.Image) -> Image.Image:
    levels = 255.0 * to_tensor([image])
    squashed = nn.functional.interpolate(
        levels, (_SQUASHED_PX, _SQUASHED_PX), mode="bilinear", antialias=False
    )
    array = squashed[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def _shrink_jagged(image: Image.Image, to: Preprocessing) -> Float[Tensor, "3 side side"]:
    levels = 255.0 * to_tensor([image])
    size = (to.resize_px, to.resize_px)
    shrunk = nn.functional.interpolate(levels, size, mode="bicubic", antialias=False)[0]
    start = (to.resize_px - to.crop_px) // 2
    end = start + to.crop_px
    return shrunk[:, start:end, start:end]


def _read(source: AuditedImage, faults: Faults) -> Image.Image:
    # A prepared copy is upright and has forgotten how its original was stored.
    if not faults.sideways and not faults.full_size:
        return open_upright(source.prepared)
    original = read_upright(source.original)
    image = original.image if faults.full_size else open_upright(source.prepared)
    if faults.sideways and original.orientation in _AS_STORED:
        return image.transpose(_AS_STORED[original.orientation])
    return image


def draw_mosaics(side_px: int, count: int = _MOSAICS) -> list[Image.Image]:
    """Draw squares of random colours, the same every time: pictures of nothing."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (count, _MOSAIC_CELLS, _MOSAIC_CELLS, 3), dtype=np.uint8)
    size = (side_px, side_px)
    return [Image.fromarray(cell).resize(size, Image.Resampling.NEAREST) for cell in cells]


@dataclass
class _Evaluator:
    """What is scored, and its embeddings by the way that pictures reached the encoder."""

    pictures: Sequence[AuditedImage]
    photos: Sequence[AuditedImage]
    floor: Sequence[AuditedImage]
    clip: ClipEncoder
    wording: Wording
    _embedded: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def score(self, faults: Faults) -> AuditScores:
        pictures = self._embed("pictures", self.pictures, faults)
        photos = self._embed("photos", self.photos, faults)
        weights = self.wording.weights(faults, len(pictures))
        scores = {
            # The mean over all pairs is the same whichever side comes first.
            "clip_i": _mean(_likeness(pictures, photos), weights),
            "clip_t": self._clip_t(pictures, photos, weights, faults),
            "photos": _mean(photo_ceiling(photos).numpy()) if len(photos) > 1 else None,
            "mosaics": _mean(_likeness(self._embed("mosaics", (), faults), photos)),
            "floor": None,
        }
        if self.floor:
            floor = self._embed("floor", self.floor, faults)
            scores["floor"] = _mean(_likeness(floor, photos))
        if faults.half:
            scores = {
                name: None if value is None else float(np.float16(value))
                for name, value in scores.items()
            }
        return AuditScores.model_validate(scores)

    def _clip_t(self, pictures: Tensor, photos: Tensor, weights: _Means, faults: Faults) -> float:
        texts = self.wording.texts(faults, len(pictures))
        known = list(dict.fromkeys(texts))
        features = self.clip.embed_texts(known)
        places = [known.index(text) for text in texts]
        if faults.swapped:
            return _mean(cosines(features, photos).mean(dim=1).numpy()[places], weights)
        return _mean(prompt_fidelity(generated=pictures, prompts=features[places]).numpy(), weights)

    def _embed(self, name: str, sources: Sequence[AuditedImage], faults: Faults) -> Tensor:
        ways = (faults.bright, faults.sideways, faults.squashed, faults.jagged)
        key = (name, *ways, faults.full_size and name == "photos")
        if key not in self._embedded:
            rows, side_px = [], self.clip.preprocessing.crop_px
            images = draw_mosaics(2 * side_px) if name == "mosaics" else sources
            for start in range(0, len(images), _BATCH):
                pixels = [
                    prepare_pixels(
                        _read(one, faults) if isinstance(one, AuditedImage) else one,
                        faults,
                        self.clip.preprocessing,
                    )
                    for one in images[start : start + _BATCH]
                ]
                rows.append(self.clip.embed_pixels(torch.stack(pixels)))
            self._embedded[key] = torch.cat(rows)
        return self._embedded[key]


def _likeness(pictures: Tensor, photos: Tensor) -> _Means:
    return subject_fidelity(generated=pictures, photos=photos).mean(dim=1).numpy()


def _mean(values: _Means, weights: _Means | None = None) -> float:
    if weights is None:
        weights = np.full(len(values), 1.0 / len(values))
    # So that equal values give just their value, however many there are.
    return float(values[0] + weights @ (values - values[0]))


def _switches(wording: Wording) -> list[str]:
    """Name the faults that can be mended, in order; unknown prompts cannot be compared with."""
    return [name for name in asdict(EVERY_FAULT) if name != "one_text" or wording.prompts]


def _warn(
    photos: Sequence[AuditedImage], pictures: Sequence[AuditedImage], familiar: Familiarity | None
) -> str | None:
    for what, sources in (("photos", photos), ("pictures", pictures)):
        squares = [crop_centre(open_upright(source.prepared)) for source in sources]
        if familiar and 2 * familiar(squares).count(False) > len(squares):
            return (
                f"These {what} are outside picturebook's world of drawings, and its CLIP knows "
                f"only that: see here what each fault does, not how good the pictures are."
            )
    return None


def _conclude(faulty: AuditScores, right: AuditScores) -> str:
    """Say how far apart things are that differ, with every fault and the right way."""
    sentences = []
    if faulty.photos is None or right.photos is None:
        sentences.append("One photo has nothing to be compared with, so there is no ceiling.")
    else:
        sentences.append(
            f"With every fault the pictures lie {_apart(faulty.clip_i, faulty.photos)} the photos "
            f"among themselves, the right way {_apart(right.clip_i, right.photos)} them."
        )
    sentences.append(
        f"Mosaics of random colours, which show nothing, score {faulty.mosaics:.3f} with every "
        f"fault and {right.mosaics:.3f} the right way."
    )
    if faulty.floor is not None and right.floor is not None:
        sentences.append(
            f"The pictures lie {_apart(faulty.clip_i, faulty.floor)} the floor with every fault "
            f"and {_apart(right.clip_i, right.floor)} it the right way."
        )
    return " ".join(sentences)


def _apart(value: float, other: float) -> str:
    return f"{abs(value - other):.3f} {'below' if value < other else 'above'}"
