"""Reading image files: the one way from a picture file to numbers, always upright, always sRGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from dreamloom.core.errors import PhotoError

PICTURE_SUFFIXES = (
    *(".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)
"""Names that end so are taken for pictures."""

# A picture that stops half-way must be refused, not filled up with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

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

_HEIF_BRANDS = frozenset(b"heic heim heis heix hevc hevm hevs hevx mif1 msf1".split())
# In others, as in many phones' JPEG, further pictures are previews and maps of the same one.
_SERIAL_FORMATS = frozenset(("GIF", "PNG", "TIFF", "WEBP"))
_MARKED = 128

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
    return _open(path, _read)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit sRGB without metadata.

    Colour profiles are applied (phones save in Display P3), 16-bit is scaled, CMYK and palettes
    are converted, and whatever is transparent shows white.
    """
    profile = image.info.get("icc_profile")
    image = _to_8_bits(image)
    if image.mode in {"P", "PA"} or image.has_transparency_data:
        image = _lay_on("white", image).convert("RGB")
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


def read_mask(path: Path, of: Upright) -> Image.Image:
    """Read the mask of a picture: 8-bit grey of its upright size, white where the subject is.

    A mask of the upright size is taken for upright, and one of the size that the picture's file
    stores is turned as the picture was. Whatever is transparent is black.

    Args:
        path: The mask's file.
        of: The picture.

    Raises:
        PhotoError: If the file cannot be read as a picture, has another size, or marks nothing.
    """
    mask = _open(path, _read_grey)
    if mask.size == of.image.size[::-1] != of.image.size and of.orientation >= 5:
        mask = mask.transpose(TURNS[of.orientation])
    if mask.size != of.image.size:
        raise PhotoError(
            f"The mask {path} has {mask.width} × {mask.height} pixels, but its photo has "
            f"{of.image.width} × {of.image.height}.",
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


def _open(path: Path, read: Callable[[Path], _Read]) -> _Read:
    """Read a picture file; whatever goes wrong becomes a PhotoError."""
    try:
        if _is_heif(path) and not _learn_heif():
            raise PhotoError(
                f"{path} is a HEIC picture, which needs one more library.",
                "Run: pip install 'dreamloom[heic]' – or save it as JPEG.",
            )
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


def _read(path: Path) -> Upright:
    with Image.open(path) as file:
        # Pillow turns TIFF as it loads, so only `stored` knows; the EXIF data of PNG may stand
        # behind the pixels, so only `left` does. HEIC is turned by other means than EXIF, which
        # says nothing there: pillow-heif opens it upright.
        stored = _orientation(file)
        file.load()
        left = _orientation(file)
        image = file.transpose(TURNS[left]) if left in TURNS else file.copy()
        orientation = stored if stored in TURNS else left if left in TURNS else 1
        return Upright(to_rgb(image), orientation, _has_location(file), _is_series(file))


def _read_grey(path: Path) -> Image.Image:
    with Image.open(path) as file:
        file.load()
        orientation = _orientation(file)
        image = file.transpose(TURNS[orientation]) if orientation in TURNS else file.copy()
    image = _to_8_bits(image)
    if image.mode in {"P", "PA"} or image.has_transparency_data:
        image = _lay_on("black", image)
    grey = image.convert("L")
    grey.info = {}
    return grey


def _lay_on(colour: str, image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode not in {"I", "I;16", "I;16B", "I;16L"}:
        return image
    array = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(array / 257.0, 0, 255).round().astype(np.uint8))


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
