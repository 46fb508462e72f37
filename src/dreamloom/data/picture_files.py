"""Opening picture files: the formats that are read, each by its own decoder, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from dreamloom.core.errors import PhotoError

PICTURE_SUFFIXES = (
    *(".apng", ".avif", ".avifs", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe"),
    *(".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"),
)
"""Names that end so are taken for pictures."""
FORMATS = "AVIF, BMP, GIF, HEIC, JPEG, PNG, TIFF and WebP"
FOREIGN_SUFFIXES = frozenset(
    ".3fr .ai .arw .cr2 .cr3 .crw .dds .dib .dng .emf .eps .erf .exr .hdr .icns .ico .j2c .j2k "
    ".jp2 .jpf .jpx .jxl .jxr .kra .mrw .nef .nrw .orf .pbm .pcx .pdf .pef .pgm .pnm .ppm .ps "
    ".psb .psd .qoi .raf .raw .rw2 .sr2 .srw .svg .tga .wmf .x3f .xcf".split()
)
"""Names that end so are pictures in formats that are not read."""

MOST_BYTES = 3 * 2**29
"""A picture that would take more memory on its way from the file to RGB is not decoded."""

# A picture that stops half-way must be refused, not filled up with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

_HEAD_BYTES = 64
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEIF_BRANDS = frozenset(b"heic heim heis heix hevc hevm hevs hevx mif1 msf1".split())
_SCALES = (1, 2, 4, 8)
# What Pillow keeps of a pixel; all other modes take four bytes.
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
# What decoders hold of a pixel beside the picture that they give: measured, and rounded up.
_DECODER_BYTES = {"AVIF": 6, "GIF": 3, "HEIF": 2, "PNG": 1, "TIFF": 4, "WEBP": 12}
_RGB_BYTES, _ALPHA_BYTES, _COEFFICIENT_BYTES = 4, 1, 2
# Of HEIC read smaller: its planes of light and colour, beside the bytes that they give.
_HEIF_PLANE_BYTES, _HEIF_STRIP_ROWS = 2, 512

_Decoder: TypeAlias = Callable[[IO[bytes], str], ImageFile.ImageFile]


class OpenedPicture(NamedTuple):
    """A picture file whose header was read and found to be within bounds."""

    file: Image.Image
    """The picture: ``load`` decodes it, perhaps to a smaller size."""
    size: tuple[int, int]
    """Width and height as they are stored, whatever size is decoded."""


@contextmanager
def open_picture(path: Path) -> Iterator[OpenedPicture]:
    """Open a picture file by the decoder of the format that its first bytes show.

    No other of Pillow's decoders is ever asked: some run programs on what they are given. Where
    the whole picture would take more than `MOST_BYTES`, JPEG and HEIC are read at a half, a
    quarter or an eighth of their sides.

    Raises:
        PhotoError: If it takes too much memory all the same, or is HEIC without pillow-heif.
        UnidentifiedImageError: If it is in no format that is read, or its header is damaged.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        stream.seek(0)
        decoder = _find_decoder(path, head)
        try:
            file = decoder(stream, str(path))
        except SyntaxError as error:
            raise UnidentifiedImageError(str(error)) from None
        except Image.DecompressionBombError:
            raise _too_large(path) from None
        size = file.size
        yield OpenedPicture(_spare_memory(path, file), size)


def count_bytes(file: ImageFile.ImageFile, scale: int = 1) -> int:
    """Count the memory that a picture takes on its way to RGB, from its header alone.

    Args:
        file: The opened picture, set to decode its full size.
        scale: By what its sides are divided while they are decoded.

    Returns:
        Bytes: what the decoder holds, what it gives, and the RGB made of it with its alpha.
    """
    form = "JPEG" if file.format == "MPO" else file.format or ""
    clear = _ALPHA_BYTES if file.has_transparency_data else 0
    made: float = _MODE_BYTES.get(file.mode, 4) + _RGB_BYTES + clear
    held: float = _DECODER_BYTES.get(form, 0)
    if form == "JPEG":
        # A file of several scans is held whole as coefficients, however small it is decoded.
        blocks = [across * down for _, across, down, _ in getattr(file, "layer", ())] or [1]
        held = _COEFFICIENT_BYTES * sum(blocks) / max(blocks)
    elif form == "HEIF" and scale > 1:
        held = len(file.getbands()) + _HEIF_PLANE_BYTES
    return round(file.width * file.height * (held + made / scale**2))


def _spare_memory(path: Path, file: ImageFile.ImageFile) -> Image.Image:
    """Let a large picture be read at a smaller size, or refuse it."""
    scales = _SCALES if file.format in {"HEIF", "JPEG", "MPO"} else _SCALES[:1]
    scale = next((scale for scale in scales if count_bytes(file, scale) <= MOST_BYTES), None)
    if scale is None:
        raise _too_large(path, file.size, count_bytes(file, scales[-1]))
    if scale == 1:
        return file
    if file.format == "HEIF":
        return _read_heif(path, file, scale)
    size = file.size
    file.draft(file.mode, (size[0] // scale, size[1] // scale))
    if file.size == size:
        raise _too_large(path, size, count_bytes(file))
    return file


def _read_heif(path: Path, file: ImageFile.ImageFile, scale: int) -> Image.Image:
    """Decode HEIC and reduce it strip by strip, so that it never lies in memory as Pillow's."""
    import pillow_heif

    heif = pillow_heif.open_heif(path, convert_hdr_to_8bit=True)
    (width, height), mode, rows = heif.size, heif.mode, _HEIF_STRIP_ROWS
    data, stride = memoryview(heif.data), heif.stride
    small = Image.new(mode, (-(-width // scale), -(-height // scale)))
    for top in range(0, height, rows):
        size = (width, min(rows, height - top))
        part = bytes(data[top * stride : (top + size[1]) * stride])
        strip = Image.frombytes(mode, size, part, "raw", mode, stride)
        small.paste(strip.reduce(scale), (0, top // scale))
    small.info = dict(file.info)
    return small


def _too_large(path: Path, size: tuple[int, int] | None = None, taken: int = 0) -> PhotoError:
    given = f"{size[0]} × {size[1]} pixels" if size else "too many pixels"
    need = f", which take {_say_bytes(taken)} of memory to read" if taken else ""
    return PhotoError(
        f"{path} has {given}{need}; {_say_bytes(MOST_BYTES)} are allowed.",
        "Save a smaller copy of it, or remove it.",
    )


def _say_bytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"


def _find_decoder(path: Path, head: bytes) -> _Decoder:
    """Choose by a file's first bytes, whatever its name says."""
    for start, decoder in _STARTS:
        if head.startswith(start):
            return decoder
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if head[4:8] == b"ftyp":
        length = min(int.from_bytes(head[:4]), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))}
        if brands & _AVIF_BRANDS:
            return AvifImagePlugin.AvifImageFile
        if head[8:12] in _HEIF_BRANDS:
            return _heif_decoder(path)
    raise UnidentifiedImageError(str(path))


def _heif_decoder(path: Path) -> _Decoder:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise PhotoError(
            f"{path} is a HEIC picture, which needs one more library.",
            "Run: pip install 'dreamloom[heic]' – or save it as JPEG.",
        ) from None
    decoder: _Decoder = HeifImageFile
    return decoder


_STARTS: tuple[tuple[bytes, _Decoder], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((start, TiffImagePlugin.TiffImageFile) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
