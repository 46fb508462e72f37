"""The one door through which a picture file becomes numbers: always upright, always sRGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from dreamloom.errors import PhotoError

PICTURE_SUFFIXES = (".bmp", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Names that end so are taken for pictures."""

# A picture that stops half-way must be refused, not filled up with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

# What undoes each EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = frozenset(b"heic heim heis heix hevc hevm hevs hevx mif1 msf1".split())


class Upright(NamedTuple):
    """A picture as its photographer saw it, and what its file said beside the pixels."""

    image: Image.Image
    """RGB, without any metadata."""
    orientation: int
    """How the file stored it, as EXIF counts: 1 upright, 3 upside down, 5 to 8 on its side."""
    has_location: bool
    """Whether the file says where it was taken."""


def open_upright(path: Path) -> Image.Image:
    """Read a picture as its photographer saw it; see `read_upright`."""
    return read_upright(path).image


def read_upright(path: Path) -> Upright:
    """Read a picture: EXIF orientation applied, colours in sRGB, transparency on white.

    Nothing of the file's metadata stays with the image, so none can reach a copy. Of a file with
    several pictures it is the first. HEIC needs pillow-heif, which ``dreamloom[heic]`` installs.

    Raises:
        PhotoError: If the file is missing, no picture, truncated, too large to be a photo, or
            HEIC without pillow-heif.
    """
    try:
        if _is_heif(path) and not _learn_heif():
            raise PhotoError(
                f"{path} is a HEIC picture, which needs one more library.",
                "Run: pip install 'dreamloom[heic]' – or save it as JPEG.",
            )
        with warnings.catch_warnings():
            # Decoders warn of odd metadata and of many megapixels; neither hinders reading.
            warnings.simplefilter("ignore")
            return _read(path)
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
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise PhotoError(
            f"{path} has more than {limit} megapixels.", "Save a smaller copy of it, or remove it."
        ) from None
    # On damaged bytes decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        raise PhotoError(
            f"{path} cannot be read: {str(error).rstrip('.') or type(error).__name__}.",
            "It may be cut off or damaged; copy it again from the phone, or remove it.",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit sRGB without metadata.

    Colour profiles are applied (phones save in Display P3), 16-bit is scaled, CMYK and palettes
    are converted, and whatever is transparent shows white.
    """
    profile = image.info.get("icc_profile")
    if image.mode in {"I", "I;16", "I;16B", "I;16L"}:
        array = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(array / 257.0, 0, 255).round().astype(np.uint8))
    if image.mode in {"P", "PA"} or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    converted = _apply_profile(image, profile) if profile else None
    plain = image.convert("RGB") if converted is None else converted
    plain.info = {}
    return plain


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
    size = (max(side_px, round(image.width * factor)), max(side_px, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "images 3 height width"]:
    """Stack RGB pictures of one size as numbers in [0, 1].

    Raises:
        ValueError: If there is none, a picture is not RGB, or the sizes differ.
    """
    if not images:
        raise ValueError("there must be at least one picture")
    modes, sizes = {image.mode for image in images}, {image.size for image in images}
    if modes != {"RGB"} or len(sizes) != 1:
        raise ValueError(f"pictures must be RGB and of one size, got {modes} and {sizes}")
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255.0


def _read(path: Path) -> Upright:
    with Image.open(path) as file:
        # Pillow turns TIFF as it loads, so only `stored` knows; the EXIF data of PNG may stand
        # behind the pixels, so only `left` does. HEIC is turned by other means than EXIF, which
        # says nothing there: pillow-heif opens it upright.
        stored = _orientation(file)
        file.load()
        left = _orientation(file)
        image = file.transpose(_TURNS[left]) if left in _TURNS else file.copy()
        orientation = stored if stored in _TURNS else left if left in _TURNS else 1
        return Upright(to_rgb(image), orientation, _has_location(file))


def _is_heif(path: Path) -> bool:
    """Look at the first bytes: phones' HEIC files are often renamed to .jpg."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _learn_heif() -> bool:
    """Let Pillow read HEIC, if the library for it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _exif(file: Image.Image) -> Image.Exif:
    """Read the EXIF data; damaged data says nothing about the pixels, so it counts as none."""
    try:
        return file.getexif()
    except Exception:
        return Image.Exif()


def _orientation(file: Image.Image) -> int | None:
    value = _exif(file).get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) else None


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
