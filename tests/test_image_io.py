"""The door for pictures: whatever a phone or a scanner writes comes out upright, RGB, and bare."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ExifTags, Image, ImageCms, ImageFile, ImageOps

from dreamloom.core.errors import PhotoError
from dreamloom.data import image_io, picture_files
from dreamloom.data.image_io import (
    crop_centre,
    find_marked,
    open_upright,
    read_mask,
    read_upright,
    scale_mask,
    scale_shorter_side,
    scale_to,
    to_rgb,
)
from dreamloom.data.picture_files import FOREIGN_SUFFIXES, PICTURE_SUFFIXES, count_bytes
from dreamloom.data.tensors import to_tensor

# Stored pixels that, turned as the orientation says, give `quarters()`.
UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters(width=64, height=48):
    """Red and green above blue and white: no turn and no mirror leaves it as it is."""
    image = Image.new("RGB", (width, height), "white")
    image.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    return image


def orientation_of(number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return exif


def assert_close(image, other, tolerance=6.0):
    assert image.size == other.size
    difference = np.abs(np.asarray(image, float) - np.asarray(other, float))
    assert difference.mean() < tolerance


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", UNDO)
def test_every_orientation_comes_out_upright(tmp_path, orientation, suffix):
    stored = quarters()
    if UNDO[orientation] is not None:
        stored = stored.transpose(UNDO[orientation])
    path = tmp_path / f"photo{suffix}"
    stored.save(path, exif=orientation_of(orientation), quality=95)

    upright = read_upright(path)

    assert_close(upright.image, quarters())
    assert upright.orientation == orientation
    with Image.open(path) as file:
        file.load()
        assert upright.image.tobytes() == ImageOps.exif_transpose(file).convert("RGB").tobytes()


@pytest.mark.parametrize("number", [0, 9, 77])
def test_an_unknown_orientation_counts_as_upright(tmp_path, number):
    quarters().save(tmp_path / "a.png", exif=orientation_of(number))
    upright = read_upright(tmp_path / "a.png")
    assert upright.orientation == 1
    assert upright.image.tobytes() == quarters().tobytes()


def test_an_orientation_in_xmp_counts(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    quarters().transpose(UNDO[6]).save(tmp_path / "a.jpg", xmp=xmp, quality=95)
    assert_close(open_upright(tmp_path / "a.jpg"), quarters())


def test_damaged_exif_data_does_not_hinder_reading(tmp_path):
    quarters().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00neither II nor MM", quality=95)
    upright = read_upright(tmp_path / "a.jpg")
    assert_close(upright.image, quarters())
    assert (upright.orientation, upright.has_location) == (1, False)


def test_location_is_noticed_in_exif_and_xmp_and_left_behind(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 7.0, 52.9)
    quarters().save(tmp_path / "exif.jpg", exif=exif)
    quarters().save(tmp_path / "xmp.jpg", xmp=b'<a exif:GPSLatitude="48,7.88N"/>')
    quarters().save(tmp_path / "none.jpg", exif=orientation_of(1))
    for name, has_location in (("exif", True), ("xmp", True), ("none", False)):
        upright = read_upright(tmp_path / f"{name}.jpg")
        assert upright.has_location is has_location
        assert upright.image.info == {}
        assert not upright.image.getexif()


def png(path, colour_type, depth, rows):
    """Write a PNG of kinds that Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    width = len(rows[0]) // (channels * depth // 8)
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def pixels_of(path):
    image = open_upright(path)
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def test_16_bit_grey_is_scaled(tmp_path):
    png(tmp_path / "a.png", 0, 16, [struct.pack(">3H", 0, 0x8080, 0xFFFF)])
    assert pixels_of(tmp_path / "a.png") == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_16_bit_colour_is_scaled(tmp_path):
    png(tmp_path / "a.png", 2, 16, [struct.pack(">3H", 0xFFFF, 0x8080, 0)])
    assert pixels_of(tmp_path / "a.png") == [(255, 128, 0)]


def test_16_bit_tiff_is_scaled(tmp_path):
    grey = np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert pixels_of(tmp_path / "a.tif") == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_16_bit_grey_with_alpha_is_laid_on_white(tmp_path):
    png(tmp_path / "a.png", 4, 16, [struct.pack(">4H", 0, 0xFFFF, 0, 0)])
    assert pixels_of(tmp_path / "a.png") == [(0, 0, 0), (255, 255, 255)]


def test_grey_and_black_and_white(tmp_path):
    Image.new("L", (2, 1), 77).save(tmp_path / "grey.png")
    assert pixels_of(tmp_path / "grey.png") == [(77, 77, 77)] * 2
    Image.new("1", (2, 1), 1).save(tmp_path / "fax.tif")
    assert pixels_of(tmp_path / "fax.tif") == [(255, 255, 255)] * 2


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_shows_white(tmp_path, mode):
    clear, solid = ((0, 0), (0, 255)) if mode == "LA" else ((0, 0, 0, 0), (0, 0, 0, 255))
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), solid)
    image.save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png") == [(255, 255, 255), (0, 0, 0)]


def test_a_palette_with_transparency_shows_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels_of(tmp_path / "a.png") == [(255, 255, 255), (200, 100, 50)]


def test_a_colour_marked_transparent_shows_white(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (200, 100, 50))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels_of(tmp_path / "a.png") == [(255, 255, 255), (200, 100, 50)]


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    quarters().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert_close(open_upright(tmp_path / "print.jpg"), quarters())


def swapped_profile():
    """A profile whose red is sRGB's green and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "odds".encode("utf-16-be"))
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    swapped = bytearray(profile)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(swapped)


def test_a_colour_profile_is_applied(tmp_path):
    Image.new("RGB", (1, 1), (250, 10, 10)).save(tmp_path / "a.png", icc_profile=swapped_profile())
    red, green, blue = pixels_of(tmp_path / "a.png")[0]
    assert green > 200
    assert max(red, blue) < 100


def ink_profile():
    """A profile for print, in which cyan ink alone looks red, and every other mixture white."""

    def tag(kind, data):
        return kind + bytes(4) + data

    red, white = (136, 208, 195), (255, 128, 128)
    # Corners of the cube of inks, black changing fastest: cyan alone is number 8.
    corners = [red if number == 8 else white for number in range(16)]
    ramp = bytes(range(256))
    unity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = bytes(byte for corner in corners for byte in corner)
    tags = {
        b"A2B0": tag(b"mft1", bytes([4, 3, 2, 0]) + unity + ramp * 4 + table + ramp * 3),
        b"desc": tag(b"desc", struct.pack(">I", 4) + b"ink\0" + bytes(78)),
        b"wtpt": tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061)),
    }
    place = 128 + 4 + 12 * len(tags)
    index, body = b"", b""
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        index += name + struct.pack(">2I", place + len(body), len(data))
        body += padded
    head = struct.pack(
        ">I4sI4s4s4s", place + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def test_the_profile_of_a_cmyk_picture_is_applied(tmp_path):
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    ink.save(tmp_path / "plain.tif")
    ink.save(tmp_path / "print.tif", icc_profile=ink_profile())
    assert open_upright(tmp_path / "plain.tif").getpixel((0, 0)) == (0, 255, 255)
    red, green, blue = open_upright(tmp_path / "print.tif").getpixel((0, 0))
    assert red > 200
    assert max(green, blue) < 60


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(open_upright(tmp_path / "a.png")) == noise).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_useless_colour_profile_is_passed_over(tmp_path, mode):
    """Damaged, or, for the grey picture, one for colours."""
    profile = b"no profile" if mode == "RGB" else swapped_profile()
    Image.new(mode, (1, 1), 77 if mode == "L" else (77, 77, 77)).save(
        tmp_path / "a.png", icc_profile=profile
    )
    assert pixels_of(tmp_path / "a.png") == [(77, 77, 77)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_a_series_the_first_picture_is_read_and_the_others_are_told(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    colours = [Image.new("RGB", (16, 16), name) for name in ("red", "lime", "blue")]
    colours[0].save(path, save_all=True, append_images=colours[1:], duration=40)
    upright = read_upright(path)
    assert upright.is_series
    assert_close(upright.image, colours[0])
    colours[0].save(path)
    assert not read_upright(path).is_series


def test_previews_beside_a_phones_photo_are_no_series(tmp_path):
    quarters().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[quarters(16, 12)])
    upright = read_upright(tmp_path / "a.jpg")
    assert not upright.is_series
    assert_close(upright.image, quarters())


def test_a_series_whose_rest_is_damaged_is_still_read(tmp_path):
    frames = [Image.effect_noise((64, 64), 80).convert("P") for _ in range(3)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "whole.gif").read_bytes()
    first = read_upright(tmp_path / "whole.gif").image
    cut = damaged(tmp_path, "cut.gif", whole[: len(whole) * 2 // 3])
    assert read_upright(cut).image.tobytes() == first.tobytes()


@pytest.fixture
def heif():
    return pytest.importorskip("pillow_heif", reason="needs pillow-heif: dreamloom[heic]")


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "renamed.jpg"])
def test_heic_is_read_whatever_its_name(tmp_path, heif, name):
    heif.from_pillow(quarters()).save(tmp_path / name, quality=95)
    assert_close(open_upright(tmp_path / name), quarters())


def test_heic_comes_out_upright(tmp_path, heif):
    """pillow-heif writes the turn into the container and leaves EXIF's number as a remark."""
    stored = heif.from_pillow(quarters().transpose(UNDO[6]))
    stored.save(tmp_path / "a.heic", exif=orientation_of(6).tobytes(), quality=95)
    assert_close(open_upright(tmp_path / "a.heic"), quarters())


def test_heic_without_its_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PhotoError, match=r"a\.heic is a HEIC picture") as error:
        open_upright(tmp_path / "a.heic")
    assert "pip install 'dreamloom[heic]'" in error.value.hint


def damaged(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def encoded(suffix, image=None):
    buffer = io.BytesIO()
    (image or quarters()).save(buffer, Image.registered_extensions()[suffix])
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
def test_a_truncated_picture_is_refused(tmp_path, suffix):
    whole = encoded(suffix, Image.effect_noise((64, 64), 80).convert("RGB"))
    path = damaged(tmp_path, f"half{suffix}", whole[: len(whole) // 2])
    with pytest.raises(PhotoError, match=rf"half\{suffix} ") as error:
        open_upright(path)
    assert error.value.hint


def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path, monkeypatch):
    def refused(path):
        with pytest.raises(PhotoError) as error:
            open_upright(path)
        return error.value.problem, error.value.hint

    assert refused(tmp_path / "none.jpg") == (
        f"There is no picture at {tmp_path / 'none.jpg'}.",
        "Check the path.",
    )
    for name, content in (("empty.jpg", b""), ("text.jpg", b"Dear diary, " * 9)):
        path = damaged(tmp_path, name, content)
        assert refused(path) == (
            f"{path} is not a picture that can be read.",
            "Remove it, or save it again as JPEG or PNG.",
        )
    assert "cannot be read" in refused(tmp_path)[0]

    big = tmp_path / "big.png"
    quarters(3000, 1000).save(big)
    monkeypatch.setattr(picture_files, "MOST_BYTES", 2**23)
    assert refused(big) == (
        f"{big} has 3000 × 1000 pixels, which take 25.7 MiB of memory to read; 8 MiB are allowed.",
        "Save a smaller copy of it, or remove it.",
    )

    def locked(*_args, **_kwargs):
        raise PermissionError

    monkeypatch.setattr(Path, "open", locked)
    assert refused(big)[0] == f"{big} may not be read."


FOREIGN = ["DDS", "DIB", "EPS", "ICNS", "ICO", "JPEG2000", "MSP", "PCX", "PPM", "SGI", "TGA"]


@pytest.mark.parametrize("form", FOREIGN)
def test_a_format_that_is_not_named_is_not_opened_whatever_the_files_name(tmp_path, form):
    Image.init()
    image = Image.new("1" if form == "MSP" else "RGB", (128, 128))
    image.save(tmp_path / "holiday.jpg", form)
    with Image.open(tmp_path / "holiday.jpg") as file:
        assert file.format == form
    with pytest.raises(PhotoError, match=r"holiday\.jpg is not a picture that can be read"):
        open_upright(tmp_path / "holiday.jpg")


@pytest.mark.skipif(os.name == "nt", reason="the program that would run is a shell script")
def test_no_program_is_run_on_a_picture(tmp_path, monkeypatch):
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\necho 10.0\ntouch '{tmp_path / 'ran'}'\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (64, 64)).save(tmp_path / "holiday.jpg", "EPS")
    with pytest.raises(PhotoError, match="is not a picture"):
        open_upright(tmp_path / "holiday.jpg")
    quarters().save(tmp_path / "a.png")
    upright = read_upright(tmp_path / "a.png")
    with pytest.raises(PhotoError, match="is not a picture"):
        read_mask(tmp_path / "holiday.jpg", upright)
    assert not (tmp_path / "ran").exists()


def claim_size(path, side):
    """Let a PNG or BMP say that it is larger than it is."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".png":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        content[18:26] = struct.pack("<ii", side, side)
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_a_picture_beyond_the_memory_is_refused_before_any_pixel_is_decoded(
    tmp_path, suffix, monkeypatch
):
    path = tmp_path / f"a{suffix}"
    quarters().save(path)
    claim_size(path, 30000)
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", loads.append)
    with pytest.raises(PhotoError, match=r"has 30000 × 30000 pixels, which take .* GiB of memory"):
        open_upright(path)
    assert not loads


def test_the_memory_is_that_of_the_whole_way(tmp_path):
    """WebP is decoded through two canvases, so fewer of its pixels are taken."""
    taken = {}
    for name in ("a.webp", "a.png", "a.jpg"):
        quarters(800, 600).save(tmp_path / name)
        with Image.open(tmp_path / name) as file:
            taken[name] = count_bytes(file) / (800 * 600)
    assert taken["a.webp"] > 16 > taken["a.jpg"] > taken["a.png"] >= 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        (".jpg", "RGB", {"exif": orientation_of(6)}),
        (".jpg", "RGB", {"progressive": True, "subsampling": 0}),
        (".png", "RGBA", {}),
        (".tif", "CMYK", {"compression": "tiff_lzw"}),
        (".gif", "P", {}),
        (".webp", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
        (".avif", "RGBA", {"speed": 10}),
    ],
)
def test_no_more_memory_is_taken_than_was_counted(tmp_path, suffix, mode, options):
    path = tmp_path / f"a{suffix}"
    quarters(6000, 4000).convert(mode).save(path, **options)
    code = (
        "import sys, pathlib\n"
        "from dreamloom.data.image_io import read_upright\n"
        "from dreamloom.data.picture_files import count_bytes, open_picture\n"
        "def peak():\n"
        "    line = [l for l in open('/proc/self/status') if 'VmHWM' in l][0]\n"
        "    return int(line.split()[1]) * 1024\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with open_picture(path) as (file, _): counted = count_bytes(file)\n"
        "before = peak()\n"
        "read_upright(path)\n"
        "print(counted, peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    counted, taken = map(int, run.stdout.split())
    assert counted / 2 < taken < counted + 2**26


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_very_large_jpeg_is_read_smaller_and_says_how_large_it_was(
    tmp_path, monkeypatch, orientation
):
    stored = quarters(800, 600)
    if UNDO[orientation] is not None:
        stored = stored.transpose(UNDO[orientation])
    stored.save(tmp_path / "a.jpg", exif=orientation_of(orientation), quality=95)
    whole = read_upright(tmp_path / "a.jpg")
    assert whole.original_size == whole.image.size == (800, 600)
    monkeypatch.setattr(picture_files, "MOST_BYTES", 800 * 600 * 4)
    upright = read_upright(tmp_path / "a.jpg")
    assert upright.image.size == (200, 150)
    assert upright.original_size == (800, 600)
    assert_close(upright.image, whole.image.resize((200, 150)), 2)
    monkeypatch.setattr(picture_files, "MOST_BYTES", 800 * 600)
    with pytest.raises(PhotoError, match=r"pixels, which take .* are allowed"):
        read_upright(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_very_large_heic_is_read_smaller(tmp_path, heif, monkeypatch, mode):
    image = quarters(800, 602)
    if mode == "RGBA":
        image.putalpha(quarters(800, 602).getchannel("R"))
    heif.from_pillow(image).save(tmp_path / "a.heic", quality=95)
    whole = read_upright(tmp_path / "a.heic")
    monkeypatch.setattr(picture_files, "MOST_BYTES", 800 * 602 * 8)
    upright = read_upright(tmp_path / "a.heic")
    assert upright.original_size == (800, 602)
    assert upright.image.size == ((400, 301) if mode == "RGB" else (200, 151))
    assert (upright.alpha is None) == (mode == "RGB")
    assert_close(upright.image, whole.image.resize(upright.image.size), 3)


def test_a_mask_of_a_photo_that_is_read_smaller_has_the_size_of_the_whole(tmp_path, monkeypatch):
    quarters(800, 600).save(tmp_path / "a.jpg")
    corner("L", 0, 255).resize((800, 600), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    monkeypatch.setattr(picture_files, "MOST_BYTES", 800 * 600 * 7)
    upright = read_upright(tmp_path / "a.jpg")
    assert upright.image.size == (400, 300)
    mask = read_mask(tmp_path / "mask.png", upright)
    assert (mask.size, find_marked(mask)) == ((800, 600), (0, 0, 75, 100))


def test_200_megapixels_are_read():
    """What phones give at most, as JPEG and as HEIC."""
    for form, bands in (("JPEG", 3), ("HEIF", 3)):
        file = Image.new("RGB", (1, 1))
        file.format, file._size = form, (16320, 12240)
        file.layer = [(1, 2, 2, 0), (2, 1, 1, 0), (3, 1, 1, 0)][:bands]
        assert any(count_bytes(file, scale) < picture_files.MOST_BYTES for scale in (1, 2, 4))


@pytest.mark.parametrize("highest", [1.0, 255.0, 65535.0])
def test_floating_point_is_scaled_by_its_range(tmp_path, highest):
    grey = np.array([[0, 0.5, 1.0]], dtype=np.float32) * highest
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert [pixel[0] for pixel in pixels_of(tmp_path / "a.tif")] == [0, 128, 255]


def test_strips_leave_no_seam(monkeypatch):
    monkeypatch.setattr(image_io, "_STRIP_PIXELS", 500)
    image = Image.effect_noise((64, 48), 80).convert("RGBA")
    image.putalpha(Image.effect_noise((64, 48), 80))
    white = Image.new("RGBA", image.size, "white")
    whole = Image.alpha_composite(white, image).convert("RGB")
    assert to_rgb(image).tobytes() == whole.tobytes()


def test_alpha_is_told_where_something_is_transparent(tmp_path):
    image = quarters().convert("RGBA")
    image.save(tmp_path / "solid.png")
    assert read_upright(tmp_path / "solid.png").alpha is None
    image.putpixel((3, 2), (0, 0, 0, 0))
    image.transpose(UNDO[6]).save(tmp_path / "clear.png", exif=orientation_of(6))
    alpha = read_upright(tmp_path / "clear.png").alpha
    assert (alpha.mode, alpha.size) == ("L", (64, 48))
    assert alpha.getpixel((3, 2)) == 0
    assert sum(alpha.tobytes()) == 255 * (64 * 48 - 1)


@pytest.mark.parametrize("name", ["a.avif", "a.jfif", "a.jpe", "a.mpo", "renamed.jpg"])
def test_further_names_and_formats_are_read(tmp_path, name):
    form = "AVIF" if name in {"a.avif", "renamed.jpg"} else "JPEG"
    quarters().save(tmp_path / name, form, quality=95)
    assert Path(name).suffix in PICTURE_SUFFIXES
    assert_close(open_upright(tmp_path / name), quarters())


def test_avif_in_a_container_of_many_brands_needs_no_other_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    content = encoded(".avif")
    assert content[8:12] == b"avif"
    path = damaged(tmp_path, "a.avif", content[:8] + b"mif1" + content[12:])
    assert_close(open_upright(path), quarters())


def test_many_megapixels_are_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    quarters().save(tmp_path / "a.png")
    assert open_upright(tmp_path / "a.png").size == (64, 48)


@settings(max_examples=60)
@given(
    suffix=st.sampled_from([".jpg", ".png", ".webp", ".tif", ".bmp", ".gif"]),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.02, 1),
)
def test_damage_gives_a_picture_or_a_photo_error(tmp_path_factory, suffix, changes, kept):
    content = bytearray(encoded(suffix, quarters(16, 16)))
    for place, byte in changes:
        content[int(place * len(content))] = byte
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(content[: max(1, int(kept * len(content)))])
    try:
        image = open_upright(path)
    except PhotoError as refusal:
        said = (str(path) in refusal.problem, refusal.hint != "")
    else:
        said = (image.mode == "RGB", image.info == {})
    assert said == (True, True)


def test_suffixes_are_those_that_pillow_and_its_helper_read():
    known = set(Image.registered_extensions()) | {".heic", ".heif", ".hif"}
    assert set(PICTURE_SUFFIXES) <= known
    assert list(PICTURE_SUFFIXES) == sorted(PICTURE_SUFFIXES)
    assert not FOREIGN_SUFFIXES & set(PICTURE_SUFFIXES)


def test_to_rgb_leaves_its_argument_alone():
    image = Image.new("RGB", (2, 2), "red")
    image.info["comment"] = "mine"
    assert to_rgb(image).info == {}
    assert image.info == {"comment": "mine"}


@pytest.mark.parametrize(("size", "box"), [((7, 4), (1, 0, 5, 4)), ((4, 9), (0, 2, 4, 6))])
def test_crop_centre_cuts_the_middle(size, box):
    noise = Image.effect_noise(size, 80)
    assert crop_centre(noise).tobytes() == noise.crop(box).tobytes()


@given(width=st.integers(1, 90), height=st.integers(1, 90), side_px=st.integers(1, 60))
def test_the_shorter_side_gets_its_size_and_proportions_stay(width, height, side_px):
    scaled = scale_shorter_side(Image.new("RGB", (width, height)), side_px)
    assert min(scaled.size) == side_px
    assert abs(scaled.width * height - scaled.height * width) <= max(width, height)


def test_a_side_of_zero_is_refused():
    with pytest.raises(ValueError, match="side_px must be 1 or more, got 0"):
        scale_shorter_side(quarters(), 0)


def test_to_tensor_stacks_numbers_from_0_to_1():
    images = to_tensor([quarters(4, 2), quarters(4, 2)])
    assert images.shape == (2, 3, 2, 4)
    assert images.dtype == torch.float32
    assert images[1, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert images[0, :, 1, 3].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one picture"),
        ([Image.new("L", (2, 2))], "must be RGB"),
        ([Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))], "of one size"),
    ],
)
def test_to_tensor_refuses_what_does_not_stack(images, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(images)


@given(width=st.integers(1, 40), height=st.integers(1, 40))
def test_pictures_and_masks_get_the_size_that_is_asked_for(width, height):
    assert scale_to(quarters(), (height, width)).size == (width, height)
    mask = scale_mask(Image.new("L", (64, 48), 255), (height, width))
    assert (mask.size, mask.getextrema()) == ((width, height), (255, 255))


def test_no_edge_of_a_scaled_mask_overshoots():
    mask = Image.new("L", (64, 64))
    mask.paste(200, (0, 0, 30, 64))
    grey = np.asarray(scale_mask(mask, (23, 23)), int)
    assert grey.max() == 200
    assert (np.diff(grey, axis=1) <= 0).all()


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"both sides must be 1 px or more, got \(0, 8\)"):
        scale_to(quarters(), (0, 8))


def test_what_is_middle_grey_or_lighter_is_marked():
    mask = Image.new("L", (20, 10), 127)
    assert find_marked(mask) is None
    mask.paste(128, (3, 2, 7, 9))
    assert find_marked(mask) == (2, 3, 9, 7)
    mask.putpixel((19, 0), 255)
    assert find_marked(mask) == (0, 3, 9, 20)


def corner(mode, dark, light):
    """A mask that marks its upper left corner."""
    mask = Image.new(mode, (64, 48), dark)
    mask.paste(light, (0, 0, 8, 6))
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        corner("1", 0, 1),
        corner("L", 0, 255),
        corner("L", 0, 255).convert("P"),
        corner("RGB", (0, 0, 0), (255, 255, 255)),
        corner("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
        corner("LA", (255, 0), (255, 255)),
        corner("I;16", 0, 65535),
    ],
    ids=lambda mask: mask.mode,
)
def test_a_mask_of_any_kind_becomes_grey(tmp_path, mask):
    quarters().save(tmp_path / "a.png")
    mask.save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", read_upright(tmp_path / "a.png"))
    assert read.mode == "L"
    assert read.info == {}
    assert sorted(set(read.tobytes())) == [0, 255]
    assert find_marked(read) == (0, 0, 6, 8)


def test_a_mask_that_says_itself_how_it_lies_is_turned_so(tmp_path):
    quarters().save(tmp_path / "a.png")
    lying = corner("L", 0, 255).transpose(UNDO[6])
    lying.save(tmp_path / "mask.png", exif=orientation_of(6))
    read = read_mask(tmp_path / "mask.png", read_upright(tmp_path / "a.png"))
    assert find_marked(read) == (0, 0, 6, 8)


def test_a_missing_or_broken_mask_is_a_photo_error(tmp_path):
    quarters().save(tmp_path / "a.png")
    upright = read_upright(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"There is no picture at .*mask\.png"):
        read_mask(tmp_path / "mask.png", upright)
    broken = damaged(tmp_path, "mask.png", encoded(".png", corner("L", 0, 255))[:70])
    with pytest.raises(PhotoError, match=r"mask\.png cannot be read"):
        read_mask(broken, upright)
