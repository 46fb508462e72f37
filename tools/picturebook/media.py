"""Five media: how a drawn scene and its figure become a photo, a painting, a sketch or pixels.

Painted media never move strokes far across a figure: its face must stay readable. Strokes are
noise smeared along a direction field (line integral convolution), which costs a few
milliseconds where thousands of drawn lines would cost tens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dreamloom.picturebook.world import Medium

SUPERSAMPLING = 2

_Floats = NDArray[np.floating]
_STROKE_ROWS = 128
_PIXEL_ART_ROWS = 24
_PIXEL_ART_COLOURS = 16


class Layers(NamedTuple):
    """An RGB scene and an RGBA figure, ``SUPERSAMPLING`` times as large as the picture."""

    scene: Image.Image
    figure: Image.Image

    def reduced(self) -> "Layers":
        """Shrink both layers to the picture's size."""
        return Layers(self.scene.reduce(SUPERSAMPLING), self.figure.reduce(SUPERSAMPLING))


def apply_medium(layers: Layers, medium: Medium, seed: int) -> Image.Image:
    """Merge the layers into one RGB picture in the given medium; ``seed`` places its strokes."""
    return _MEDIA[medium](layers, seed)


def _photo(layers: Layers, seed: int) -> Image.Image:
    del seed  # a photo has no strokes
    layers = layers.reduced()
    height_px = layers.scene.height
    backdrop = layers.scene.filter(ImageFilter.GaussianBlur(height_px * 0.013))
    alpha = layers.figure.getchannel("A")
    soft = _floats(alpha.filter(ImageFilter.GaussianBlur(height_px * 0.05))) / 255
    step = max(1, round(height_px * 0.025))
    padded = np.pad(soft, step, mode="edge")
    shadow = padded[: -2 * step, : -2 * step]
    # The slope of the blurred silhouette lights the figure from the upper left.
    slope = padded[2 * step :, 2 * step :] - shadow
    mask = _floats(alpha)[..., None] / 255
    lit = (
        _floats(layers.figure.convert("RGB")) * (1 + 0.22 * slope[..., None])
        + 14 * slope[..., None]
    )
    behind = _floats(backdrop) * (1 - 0.22 * shadow[..., None])
    return _image((behind * (1 - mask) + lit * mask) * _vignette(layers.scene.size))


def _painting(layers: Layers, seed: int) -> Image.Image:
    layers = layers.reduced()
    width_px, height_px = layers.scene.size
    rng = np.random.default_rng(seed)
    rows, columns = _stroke_shape(width_px, height_px)
    angle = 0.6 + 0.8 * _smooth_noise(rng, rows, columns, 3)
    flow_x, flow_y = np.cos(angle), np.sin(angle)
    merged, mask = _flatten(layers)
    strokes = _enlarge(_smear(rng, flow_x, flow_y, length=12, grain=3.2), merged)
    tint = _enlarge(_smear(rng, flow_x, flow_y, length=12, grain=4.5), merged)
    wobble_px = 0.008 * height_px
    flat = _displace(merged, strokes * wobble_px, tint * wobble_px)
    strength = (17 - 8 * mask)[..., None]
    warmth = np.array([0.7, 0.1, -0.8], np.float32) * tint[..., None] * strength
    canvas = np.array([250, 230, 192], np.float32)
    return _image(flat * 0.86 + canvas * 0.14 + strokes[..., None] * strength + warmth)


def _van_gogh(layers: Layers, seed: int) -> Image.Image:
    layers = layers.reduced()
    width_px, height_px = layers.scene.size
    rng = np.random.default_rng(seed)
    rows, columns = _stroke_shape(width_px, height_px)
    flow_x, flow_y = _swirls(rng, rows, columns)
    strokes = _smear(rng, flow_x, flow_y, length=11, grain=3.2)
    merged, mask = _flatten(layers)
    relief = _enlarge(strokes, merged)
    calm = 1 - 0.6 * mask
    drift = 0.014 * height_px * relief * calm
    flat = _displace(merged, _enlarge(flow_y, merged) * drift, -_enlarge(flow_x, merged) * drift)
    light = flat @ np.array([0.3, 0.59, 0.11], np.float32) / 255
    night, wheat = np.array([24, 52, 140], np.float32), np.array([255, 214, 70], np.float32)
    palette = night + (wheat - night) * light[..., None]
    share = (0.42 - 0.24 * mask)[..., None]
    painted = flat * (1 - share) + palette * share
    ridge = relief[..., None] * (30 - 18 * mask)[..., None]
    painted = painted + ridge * np.array([1.0, 0.95, 0.55], np.float32)
    outline = _contour(layers.figure.getchannel("A"), height_px)[..., None]
    return _image(painted * (1 - outline) + np.array([18, 30, 78], np.float32) * outline)


def _sketch(layers: Layers, seed: int) -> Image.Image:
    fine, fine_mask = _flatten(layers)
    # Neighbours of equal lightness may differ in hue, so the strongest channel counts.
    slope = np.maximum(
        np.abs(np.diff(fine, axis=0, append=fine[-1:])),
        np.abs(np.diff(fine, axis=1, append=fine[:, -1:])),
    ).max(axis=2)
    lines = np.clip(slope * 2.6 - 20, 0, 235) * (0.4 + 0.6 * fine_mask)
    # A pencil is as thick on a large sheet as on a small one, relative to the sheet.
    thick_px = layers.scene.height / 256 * 0.6
    soft_lines = _image(lines).filter(ImageFilter.GaussianBlur(thick_px)).reduce(SUPERSAMPLING)
    width_px, height_px = soft_lines.size
    merged, mask = _flatten(layers.reduced())
    across = np.full(_stroke_shape(width_px, height_px), -0.7, np.float32)
    hatching = _smear(np.random.default_rng(seed), -across, across, length=12, grain=2.6)
    light = merged @ np.array([0.3, 0.59, 0.11], np.float32)
    tone = (255 - light) * (0.2 + 0.36 * mask)
    grain = _enlarge(hatching, merged) * (1 + 0.1 * tone)
    paper = np.array([249, 246, 239], np.float32)
    graphite = (_floats(soft_lines) * 1.15 + tone + grain)[..., None]
    return _image(np.maximum(paper - graphite * np.array([1.0, 0.98, 0.93], np.float32), 26))


def _pixel_art(layers: Layers, seed: int) -> Image.Image:
    del seed  # blocks leave no room for strokes
    width_px, height_px = (side // SUPERSAMPLING for side in layers.scene.size)
    merged, _ = _flatten(layers)
    columns = max(1, round(_PIXEL_ART_ROWS * width_px / height_px))
    few = _image(merged).quantize(
        _PIXEL_ART_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    cell = 8
    samples = few.resize((columns * cell, _PIXEL_ART_ROWS * cell), Image.Resampling.NEAREST)
    cells = np.asarray(samples).reshape(_PIXEL_ART_ROWS, cell, columns, cell)
    # Each block takes its commonest colour: an average would muddy the faces.
    counts = np.stack([(cells == i).sum(axis=(1, 3)) for i in range(_PIXEL_ART_COLOURS)])
    blocks = Image.fromarray(counts.argmax(axis=0).astype(np.uint8), "P")
    blocks.putpalette(few.getpalette() or [])
    return blocks.convert("RGB").resize((width_px, height_px), Image.Resampling.NEAREST)


_MEDIA: dict[Medium, Callable[[Layers, int], Image.Image]] = {
    "photo": _photo,
    "painting": _painting,
    "sketch": _sketch,
    "van gogh": _van_gogh,
    "pixel art": _pixel_art,
}


def _floats(image: Image.Image) -> _Floats:
    return np.asarray(image, dtype=np.float32)


def _image(pixels: _Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _flatten(layers: Layers) -> tuple[_Floats, _Floats]:
    """Merge the layers; return pixels (height, width, 3) and the figure's mask (0 to 1)."""
    alpha = layers.figure.getchannel("A")
    merged = layers.scene.copy()
    merged.paste(layers.figure, mask=alpha)
    return _floats(merged), _floats(alpha) / 255


def _vignette(size_px: tuple[int, int]) -> _Floats:
    x = np.linspace(-1, 1, size_px[0], dtype=np.float32)
    y = np.linspace(-1, 1, size_px[1], dtype=np.float32)[:, None]
    return (1.03 - 0.07 * (x**2 + y**2) - 0.03 * (x + y))[..., None]


def _stroke_shape(width_px: int, height_px: int) -> tuple[int, int]:
    """Size the stroke field: strokes keep their size relative to the picture's height."""
    return _STROKE_ROWS, max(1, round(_STROKE_ROWS * width_px / height_px))


def _smooth_noise(rng: np.random.Generator, rows: int, columns: int, cells: int) -> _Floats:
    """Return soft noise of about -1 to 1 (rows, columns), ``cells`` patches from top to bottom."""
    across = max(2, round(cells * columns / rows)) + 1
    coarse = rng.uniform(-1, 1, (cells + 1, across)).astype(np.float32)
    image = Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC)
    return _floats(image)


def _smear(
    rng: np.random.Generator, flow_x: _Floats, flow_y: _Floats, *, length: int, grain: float
) -> _Floats:
    """Smear noise along a unit direction field: strokes of about -1 to 1 (rows, columns).

    Line integral convolution (Cabral & Leedom, 1993) with nearest sampling. Strokes reach
    ``length`` field pixels to each side and are about ``grain`` wide.
    """
    rows, columns = flow_x.shape
    small = (max(1, round(columns / grain)), max(1, round(rows / grain)))
    coarse = rng.uniform(-1, 1, (small[1], small[0])).astype(np.float32)
    noise = _floats(
        Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC)
    ).ravel()
    total = noise.copy()
    start_y, start_x = np.indices((rows, columns), dtype=np.float32)
    flat_x, flat_y = flow_x.ravel(), flow_y.ravel()
    for direction in (-1.5, 1.5):
        x, y = start_x.ravel(), start_y.ravel()
        here: NDArray[np.int32] = np.arange(rows * columns, dtype=np.int32)
        for _ in range(round(length / 1.5)):
            x = np.clip(x + direction * flat_x[here], 0, columns - 1)
            y = np.clip(y + direction * flat_y[here], 0, rows - 1)
            here = (y + 0.5).astype(np.int32) * columns + (x + 0.5).astype(np.int32)
            total += noise[here]
    strokes: _Floats = np.clip(total / (2 * total.std()), -1, 1).astype(np.float32)
    return strokes.reshape(rows, columns)


def _swirls(rng: np.random.Generator, rows: int, columns: int) -> tuple[_Floats, _Floats]:
    """Return a unit direction field (x and y) of a drifting sky with a few large vortices."""
    y, x = np.indices((rows, columns), dtype=np.float32)
    flow_x = np.full((rows, columns), 0.55, np.float32)
    flow_y = 0.5 * np.sin(x / 23 + rng.uniform(0, 6)).astype(np.float32)
    for _ in range(max(4, round(5 * columns / rows))):
        centre_x, centre_y = rng.uniform(0, columns), rng.uniform(0, rows)
        offset_x, offset_y = x - centre_x, y - centre_y
        near = np.exp(-(offset_x**2 + offset_y**2) / (2 * 21.0**2))
        pull = rng.choice((-1.0, 1.0)) * 3.2 * near / 21
        flow_x -= pull * offset_y
        flow_y += pull * offset_x
    norm = np.hypot(flow_x, flow_y) + 1e-6
    return (flow_x / norm).astype(np.float32), (flow_y / norm).astype(np.float32)


def _enlarge(field: _Floats, like: _Floats) -> _Floats:
    """Resize a field (rows, columns) to the height and width of ``like``."""
    if field.shape == like.shape[:2]:
        return field
    size_px = (like.shape[1], like.shape[0])
    return _floats(Image.fromarray(field).resize(size_px, Image.Resampling.BICUBIC))


def _displace(pixels: _Floats, by_x_px: _Floats, by_y_px: _Floats) -> _Floats:
    """Sample each pixel from a place moved by the given offsets (bilinear)."""
    height_px, width_px = pixels.shape[:2]
    y, x = np.indices((height_px, width_px), dtype=np.float32)
    x = np.clip(x + by_x_px, 0, width_px - 1.001)
    y = np.clip(y + by_y_px, 0, height_px - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    right, bottom = np.minimum(left + 1, width_px - 1), np.minimum(top + 1, height_px - 1)
    share_x, share_y = (x - left)[..., None], (y - top)[..., None]
    upper = pixels[top, left] * (1 - share_x) + pixels[top, right] * share_x
    lower = pixels[bottom, left] * (1 - share_x) + pixels[bottom, right] * share_x
    sampled: _Floats = upper * (1 - share_y) + lower * share_y
    return sampled


def _contour(alpha: Image.Image, height_px: int) -> _Floats:
    """Return the figure's dark outline as a mask, 0 to 0.75 (height, width)."""
    soft = _floats(alpha.filter(ImageFilter.GaussianBlur(height_px * 0.009))) / 255
    outline: _Floats = np.clip(4 * soft * (1 - soft) - 0.25, 0, 0.75)
    return outline
