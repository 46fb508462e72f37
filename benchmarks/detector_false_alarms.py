"""How often the detectors are wrong: on good pictures, and on ones that were broken on purpose.

Give folders of real photos; nothing of them is kept. Drawings are made on the spot, from world
seeds that nothing was trained on. Prints one table a source.

    python benchmarks/detector_false_alarms.py --people DIR --objects DIR --model FILE
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dreamloom.data.image_io import open_upright
from dreamloom.data.picture_files import PICTURE_SUFFIXES
from dreamloom.evaluation.detectors.colour import LUMINANCE, to_lab, to_light
from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.detectors.eyes import iris_difference, read_iris
from dreamloom.evaluation.detectors.flagging import Flagging, Shown, flag_pictures
from dreamloom.evaluation.detectors.judges import PHOTO, DetectorName, FaceView, Wanted, usable_eyes
from dreamloom.evaluation.detectors.landmarks import Eye, FaceSource
from dreamloom.evaluation.detectors.mediapipe_faces import load_mediapipe
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.stats.intervals import wilson_interval
from dreamloom.picturebook.world import (
    EYE_COLOURS,
    JUDGING_SEED_START,
    Drawing,
    sample_drawing,
    vary,
)
from tools.picturebook.drawing import draw

NO_FACE = Wanted("photo", "no", frozenset())
IRIS_PAINT = {"green": (96, 132, 72), "blue": (88, 132, 176), "brown": (96, 56, 32)}
LARGEST_PX = 2400
"""Larger photos are scaled down before they are broken, which takes long enough."""
CLEARLY = 15.0
"""An iris counts as recoloured if its paint is this far from its own colour."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=Path, help="photos that show one face each")
    parser.add_argument("--objects", type=Path, help="photos without a face, folders inside too")
    parser.add_argument("--model", type=Path, help="MediaPipe's face_landmarker.task")
    parser.add_argument("--drawings", type=int, default=300, help="how many drawings to judge")
    asked = parser.parse_args()
    source = load_mediapipe(asked.model)
    if isinstance(source, Missing):
        print(f"Photographs: not measured: {source.reason}\n")
    else:
        print(f"Photographs, {source.key}\n")
        measure_photos(source, list_pictures(asked.people), list_pictures(asked.objects))
    print(f"\nDrawings of 128 px, {DrawnFaces.key}\n")
    measure_drawings(asked.drawings)


def list_pictures(folder: Path | None) -> list[Path]:
    """List a folder's pictures, folders inside too."""
    if folder is None:
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def show(name: str, flagged: int, n: int, note: str = "") -> None:
    """Print one line of a table."""
    span = wilson_interval(flagged, n)
    shown = "not measured" if span is None else f"{span[0]:.1%} to {span[1]:.1%}"
    print(f"{name:58s} {flagged:4d} of {n:4d}   {shown}   {note}")


def show_all(kind: str, flaggings: Sequence[Flagging]) -> None:
    """Print a line for each detector."""
    for one in flaggings:
        if one.missing:
            print(f"{kind}: {one.label}: not measured: {one.missing}")
        else:
            why = "; ".join(f"{count}: {reason}" for reason, count in one.abstained.items())
            show(f"{kind}: {one.label}", len(one.flagged), one.judged, why)


def measure_photos(source: FaceSource, people: list[Path], objects: list[Path]) -> None:
    """Judge real photos as they are, then broken ones."""
    as_is = [Shown(path.name, path, PHOTO) for path in people]
    show_all("false alarms, people", flag_pictures(as_is, [], source, experimental=True))
    things = [Shown(str(path), path, NO_FACE) for path in objects]
    show_all(
        "false alarms, objects",
        flag_pictures(things, [], source, of_person=False, experimental=True),
    )
    controls: dict[str, tuple[DetectorName, Callable[..., Iterator[Image.Image]]]] = {
        "one iris recoloured": ("eye_colours", recolour_irises),
        "one iris enlarged 1.5 times": ("eye_shape", enlarge_irises),
        "one iris moved by 0.7 of its radius": ("eye_shape", move_irises),
        "the photo doubled side by side": ("extra_faces", double),
        "the face covered": ("missing_face", cover_face),
    }
    for name, (detector, break_it) in controls.items():
        seen, caught, lost = 0, 0, 0
        for path in people:
            image = open_upright(path)
            image.thumbnail((LARGEST_PX, LARGEST_PX))
            view = FaceView.at(image, source.find(image), PHOTO, source.least_iris_px)
            for broken in break_it(image, view):
                one = flag_one(broken, source, detector)
                seen += one.judged
                caught += len(one.flagged)
                lost += 1 - one.judged
        show(f"found, {name}", caught, seen, f"{lost} more could not be judged")


def flag_one(image: Image.Image, source: FaceSource, detector: DetectorName) -> Flagging:
    """Let one detector judge one picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        image.save(path)
        flaggings = flag_pictures([Shown("picture", path, PHOTO)], [], source, experimental=True)
    return next(one for one in flaggings if one.detector == detector)


def eyes_of(view: FaceView) -> tuple[Eye, ...]:
    """Give the eyes that can be judged; none where they cannot."""
    eyes = usable_eyes(view)
    return eyes if isinstance(eyes, tuple) else ()


def recolour_irises(image: Image.Image, view: FaceView) -> Iterator[Image.Image]:
    """Paint one iris in turn with each colour that is clearly not its own, in the eye's light."""
    for eye in eyes_of(view):
        own = read_iris(view.pixels, eye)
        if not isinstance(own, tuple):
            continue
        for paint in IRIS_PAINT.values():
            light = to_light(np.array(paint) / 255)
            lightness, green_red, blue_yellow = to_lab(light)
            wanted = (float(lightness), float(green_red), float(blue_yellow))
            if iris_difference(own, wanted) >= CLEARLY:
                yield paint_iris(image, eye, light)


def paint_iris(image: Image.Image, eye: Eye, paint: np.ndarray) -> Image.Image:
    """Give an iris another colour; its light and shade stay, and so does its pupil."""
    light = to_light(np.asarray(image, dtype=float) / 255)
    rows, columns = np.indices(light.shape[:2])
    rings = np.hypot(columns - eye.centre[0], rows - eye.centre[1]) / eye.radius_px
    iris = (rings > 0.4) & (rings < 1.0)
    beside = (np.abs(rows - eye.centre[1]) < 0.4 * eye.radius_px) & (rings > 1.2) & (rings < 1.6)
    white = np.median(light[beside], axis=0)
    bright = light @ LUMINANCE
    shade = np.clip(bright / max(float(np.median(bright[iris])), 1e-4), 0, 2.5)[..., None]
    painted = np.where(iris[..., None], np.minimum(paint * white * shade / 0.7, 1.0), light)
    srgb = np.where(
        painted <= 0.0031308, painted * 12.92, 1.055 * painted.clip(1e-9) ** (1 / 2.4) - 0.055
    )
    return Image.fromarray((srgb * 255).round().clip(0, 255).astype(np.uint8))


def warp(image: Image.Image, eye: Eye, zoom: float, move: float) -> Image.Image:
    """Enlarge an iris, or move it to the right in radii; what is 2.2 radii away stays."""
    pixels = np.asarray(image)
    rows, columns = np.indices(pixels.shape[:2]).astype(float)
    right, down = columns - eye.centre[0], rows - eye.centre[1]
    rings = np.hypot(right, down) / eye.radius_px
    hold = np.clip((2.2 - rings) / 1.0, 0, 1)
    scale = 1 + hold * (1 / zoom - 1)
    from_x = eye.centre[0] + right * scale - hold * move * eye.radius_px
    from_y = eye.centre[1] + down * scale
    height, width = pixels.shape[:2]
    x = from_x.round().astype(int).clip(0, width - 1)
    y = from_y.round().astype(int).clip(0, height - 1)
    return Image.fromarray(pixels[y, x])


def enlarge_irises(image: Image.Image, view: FaceView) -> Iterator[Image.Image]:
    """Enlarge one iris in turn."""
    for eye in eyes_of(view):
        yield warp(image, eye, 1.5, 0.0)


def move_irises(image: Image.Image, view: FaceView) -> Iterator[Image.Image]:
    """Move one iris in turn, to either side."""
    for eye in eyes_of(view):
        yield warp(image, eye, 1.0, 0.7)
        yield warp(image, eye, 1.0, -0.7)


def double(image: Image.Image, _: FaceView) -> Iterator[Image.Image]:
    """Set the photo beside itself."""
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(image, (0, 0))
    both.paste(image, (image.width, 0))
    yield both


def cover_face(image: Image.Image, view: FaceView) -> Iterator[Image.Image]:
    """Lay a grey box over the face."""
    for face in view.found.faces[:1]:
        covered = image.copy()
        covered.paste((128, 128, 128), tuple(round(end) for end in face.box))
        yield covered


def measure_drawings(count: int) -> None:
    """Judge drawings as they are, then ones with one iris of another colour."""
    drawings = [
        sample_drawing(JUDGING_SEED_START + 500_000 + number, "person", view="front",
                       glasses="none", medium="photo")
        for number in range(count)
    ]  # fmt: skip
    show_all("false alarms", judge_drawings([draw(drawing) for drawing in drawings], []))
    rng = random.Random("other eyes")
    broken = [mix_eyes(drawing, rng) for drawing in drawings]
    show_all("found, one iris recoloured", judge_drawings(broken, [])[:1])
    same, other = [], []
    for drawing in drawings[: count // 5]:
        photos = [draw(plain(vary(drawing, rng))) for _ in range(5)]
        pictures = [draw(plain(vary(drawing, rng))) for _ in range(3)]
        same.append(judge_drawings(pictures, photos)[1])
        impostors = [draw(plain(recolour(vary(drawing, rng), rng))) for _ in range(3)]
        other.append(judge_drawings(impostors, photos)[1])
    for name, results in (("false alarms", same), ("found, both irises recoloured", other)):
        flagged, judged = sum(len(one.flagged) for one in results), sum(r.judged for r in results)
        show(f"{name}: {results[0].label}", flagged, judged, f"{len(results)} persons, 5 photos")


def plain(drawing: Drawing) -> Drawing:
    """Show somebody from the front, as a photo, without glasses."""
    return replace(drawing, view="front", glasses="none", medium="photo")


def recolour(drawing: Drawing, rng: random.Random) -> Drawing:
    """Give somebody another eye colour."""
    others = [eyes for eyes in EYE_COLOURS if eyes != drawing.identity.eyes]
    return replace(drawing, identity=replace(drawing.identity, eyes=rng.choice(others)))


def mix_eyes(drawing: Drawing, rng: random.Random) -> Image.Image:
    """Draw somebody whose right half has another eye colour."""
    image, other = draw(drawing), draw(recolour(drawing, rng))
    middle = round(image.width * (0.5 + drawing.shift_x))
    image.paste(other.crop((middle, 0, other.width, other.height)), (middle, 0))
    return image


def judge_drawings(
    pictures: Sequence[Image.Image], photos: Sequence[Image.Image]
) -> tuple[Flagging, ...]:
    """Let the detectors judge drawings."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(len(pictures) + len(photos))]
        for path, image in zip(paths, [*pictures, *photos], strict=True):
            image.save(path)
        shown = [Shown(path.name, path, PHOTO) for path in paths[: len(pictures)]]
        return flag_pictures(shown, paths[len(pictures) :], DrawnFaces(), experimental=True)


if __name__ == "__main__":
    main()
