"""Reading image files: the one way from a picture file to numbers, always upright, always sRGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from dreamloom.core.errors import PhotoError
from dreamloom.data.picture_files import open_picture

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""

# In others, as in many phones' JPEG, further pictures are previews and maps of the same one.
_SERIAL_FORMATS = frozenset(("GIF", "PNG", "TIFF", "WEBP"))
_MARKED = 128
# Masks painted in one colour on black are in colour, too; photos are in several, everywhere.
_COLOURFUL = 16
# Large pictures are converted piece by piece, so that no whole copy is made on the way.
_STRIP_PIXELS = 2**20

_Read = TypeVar("_Read")


class Upright(NamedTuple):
    """A picture as its photographer saw it, and what its file said beside the pixels."""

    image: Image.Image
    """RGB, without any metadata."""
    orientation: int
    """How the file stored it, as EXIF counts: 1 upright, 3 upside down, 5 to 8 on its side."""
    has_location: bool
    """Whether the file says where it was taken."""
    is_series: bool = False
    """Whether the file holds further pictures: an animation, or pages."""
    original_size: tuple[int, int] = (0, 0)
    """Width and height of the whole picture when upright; a very large one is read smaller."""
    alpha: Image.Image | None = None
    """How opaque it was, as 8-bit grey; None where nothing of it is transparent."""


def open_upright(path: Path) -> Image.Image:
    """Read a picture as its photographer saw it; see `read_upright`."""
    return read_upright(path).image


def read_upright(path: Path) -> Upright:
    """Read a picture: EXIF orientation applied, colours in sRGB, transparency on white.

    Nothing of the file's metadata stays with the image, so none can reach a copy. Of a file with
    several pictures it is the first. HEIC needs pillow-heif, which ``dreamloom[heic]`` installs.
    What would take too much memory is read at a smaller size; see `open_picture`.

    Raises:
        PhotoError: If the file is missing, no picture, truncated, too large to be read in bounded
            memory, or HEIC without pillow-heif.
    """
    return _open(path, _read)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit sRGB without metadata.

    Colour profiles are applied (phones save in Display P3), 16-bit and floating point are scaled,
    CMYK and palettes are converted, and whatever is transparent shows white.
    """
    profile, scale = image.info.get("icc_profile"), _find_scale(image)
    return _convert(image, "RGB", lambda strip: _strip_to_rgb(strip, profile, scale))


def _strip_to_rgb(image: Image.Image, profile: bytes | None, scale: float) -> Image.Image:
    image = _to_8_bits(image, scale)
    if image.mode in {"P", "PA"} or image.has_transparency_data:
        image = _lay_on("white", image).convert("RGB")
    converted = _apply_profile(image, profile) if profile else None
    return image.convert("RGB") if converted is None else converted


def _convert(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert a picture strip by strip; what is made bears no metadata."""
    whole = Image.new(mode, image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        whole.paste(convert(image.crop(box)), (0, top))
    return whole


def crop_centre(image: Image.Image) -> Image.Image:
    """Cut the largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def scale_shorter_side(image: Image.Image, side_px: int) -> Image.Image:
    """Resize so that the shorter side is ``side_px``, up or down; proportions stay.

    Raises:
        ValueError: If ``side_px`` is below 1.
    """
    if side_px < 1:
        raise ValueError(f"side_px must be 1 or more, got {side_px}")
    factor = side_px / min(image.size)
    width, height = (max(side_px, round(side * factor)) for side in image.size)
    return scale_to(image, (height, width))


def scale_to(image: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize to a height and width, up or down, smoothly.

    Raises:
        ValueError: If a side is below 1.
    """
    if min(size_px) < 1:
        raise ValueError(f"both sides must be 1 px or more, got {size_px}")
    return image.resize(size_px[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)


def scale_mask(mask: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize a mask to a height and width; unlike `scale_to`, no edge overshoots."""
    return mask.resize(size_px[::-1], Image.Resampling.BILINEAR)


def read_mask(path: Path, of: Upright, *, in_grey: bool = False) -> Image.Image:
    """Read the mask of a picture: 8-bit grey of its upright size, white where the subject is.

    A mask of the upright size is taken for upright, and one of the size that the picture's file
    stores is turned as the picture was. Whatever is transparent is black.

    Args:
        path: The mask's file.
        of: The picture.
        in_grey: Whether a mask in colour is refused: it may be a photo, and a mask by name alone.

    Raises:
        PhotoError: If the file cannot be read as a picture, has another size, or marks nothing;
            or is in colour, where that is refused.
    """
    (mask, colourful), size = _open(path, _read_grey), of.original_size
    if colourful and in_grey:
        raise PhotoError(
            f"{path} is called a mask of another photo, but is in colour.",
            "Give it another name if it is a photo; a mask is called as IMG_1.mask.png is.",
        )
    if mask.size == size[::-1] != size and of.orientation >= 5:
        mask = mask.transpose(TURNS[of.orientation])
    if mask.size != size:
        raise PhotoError(
            f"The mask {path} has {mask.width} × {mask.height} pixels, but its photo has "
            f"{size[0]} × {size[1]}.",
            "Save the mask in the size of the photo.",
        )
    if find_marked(mask) is None:
        raise PhotoError(
            f"The mask {path} marks nothing: nowhere is it lighter than middle grey.",
            "Paint the subject white and the rest black, or remove the mask.",
        )
    return mask


def find_marked(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """Find the box around what a mask marks, that is, middle grey and lighter.

    Returns:
        Top, left, bottom and right; None if nothing is marked.
    """
    box = mask.point([255 * (grey >= _MARKED) for grey in range(256)]).getbbox()
    return None if box is None else (box[1], box[0], box[3], box[2])


def _open(path: Path, read: Callable[[Path], _Read]) -> _Read:
    """Read a picture file; whatever goes wrong becomes a PhotoError."""
    try:
        with warnings.catch_warnings():
            # Decoders warn of odd metadata and of many megapixels; neither hinders reading.
            warnings.simplefilter("ignore")
            return read(path)
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError(f"There is no picture at {path}.", "Check the path.") from None
    except PermissionError:
        raise PhotoError(
            f"{path} may not be read.", "Give yourself permission to read it."
        ) from None
    except UnidentifiedImageError:
        raise PhotoError(
            f"{path} is not a picture that can be read.",
            "Remove it, or save it again as JPEG or PNG.",
        ) from None
    # On damaged bytes decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        raise PhotoError(
            f"{path} cannot be read: {str(error).rstrip('.') or type(error).__name__}.",
            "It may be cut off or damaged; copy it again from the phone, or remove it.",
        ) from error


def _read(path: Path) -> Upright:
    lying, left = _decode(path)
    if left not in TURNS:
        return lying
    # Turned only now that the decoded file is let go of.
    alpha = lying.alpha.transpose(TURNS[left]) if lying.alpha else None
    size = lying.original_size[::-1] if left >= 5 else lying.original_size
    upright = lying.image.transpose(TURNS[left])
    return lying._replace(image=upright, alpha=alpha, original_size=size)


def _decode(path: Path) -> tuple[Upright, int]:
    """Read a picture as it is stored, and the orientation by which it is still to be turned."""
    with open_picture(path) as (file, size):
        # Pillow turns TIFF as it loads, so only `stored` knows; the EXIF data of PNG may stand
        # behind the pixels, so only `left` does. HEIC is turned by other means than EXIF, which
        # says nothing there: pillow-heif opens it upright.
        stored = _orientation(file)
        file.load()
        left = _orientation(file)
        orientation = stored if stored in TURNS else left if left in TURNS else 1
        facts = (orientation, _has_location(file), _is_series(file), size)
        return Upright(to_rgb(file), *facts, _find_alpha(file)), left


def _find_alpha(image: Image.Image) -> Image.Image | None:
    """Tell how opaque each pixel is; None if all are wholly so."""
    if not image.has_transparency_data:
        return None
    alpha = _convert(image, "L", lambda strip: strip.convert("RGBA").getchannel("A"))
    return None if alpha.getextrema() == (255, 255) else alpha


def _read_grey(path: Path) -> tuple[Image.Image, bool]:
    """Read a picture in grey, and say whether it is in colour."""
    with open_picture(path) as (file, _):
        file.load()
        orientation, scale = _orientation(file), _find_scale(file)
        grey = _convert(file, "L", lambda strip: _strip_to_grey(strip, scale))
        glance = np.asarray(file.resize((64, 64), Image.Resampling.NEAREST).convert("RGB"), int)
    colourful = bool((glance.max(axis=2) - glance.min(axis=2)).mean() > _COLOURFUL)
    return grey.transpose(TURNS[orientation]) if orientation in TURNS else grey, colourful


def _strip_to_grey(image: Image.Image, scale: float) -> Image.Image:
    image = _to_8_bits(image, scale)
    if image.mode in {"P", "PA"} or image.has_transparency_data:
        image = _lay_on("black", image)
    return image.convert("L")


def _lay_on(colour: str, image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))


def _find_scale(image: Image.Image) -> float:
    """Tell by what grey values of more than 8 bits are divided.

    Floating point has no fixed white: it is 1 where nothing exceeds that, and else 255 or 65535.
    """
    if image.mode != "F":
        return 257.0
    highest = float(np.nanmax(np.asarray(image), initial=0.0))
    return next((top / 255 for top in (1.0, 255.0) if highest <= top), 257.0)


def _to_8_bits(image: Image.Image, scale: float) -> Image.Image:
    if image.mode not in {"F", "I", "I;16", "I;16B", "I;16L", "I;16N"}:
        return image
    array = np.nan_to_num(np.asarray(image).astype(np.float64) / scale, posinf=255.0)
    return Image.fromarray(np.clip(array, 0, 255).round().astype(np.uint8))


def _exif(file: Image.Image) -> Image.Exif:
    """Read the EXIF data; damaged data says nothing about the pixels, so it counts as none."""
    try:
        return file.getexif()
    except Exception:
        return Image.Exif()


def _orientation(file: Image.Image) -> int:
    value = _exif(file).get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) else 1


def _is_series(file: Image.Image) -> bool:
    try:
        return file.format in _SERIAL_FORMATS and bool(getattr(file, "is_animated", False))
    except Exception:
        return False


def _has_location(file: Image.Image) -> bool:
    try:
        found = bool(_exif(file).get_ifd(ExifTags.IFD.GPSInfo).get(ExifTags.GPS.GPSLatitude))
    except Exception:
        found = False
    written = (str(file.info.get(key, "")) for key in ("xmp", "XML:com.adobe.xmp"))
    return found or any("GPSLatitude" in text for text in written)


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert from the embedded colour profile to sRGB; None if the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
