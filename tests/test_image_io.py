"""The door for pictures: whatever a phone or a scanner writes comes out upright, RGB, and bare."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from dreamloom.core.errors import PhotoError
from dreamloom.data.image_io import (
    PICTURE_SUFFIXES,
    crop_centre,
    find_marked,
    open_upright,
    read_mask,
    read_upright,
    scale_mask,
    scale_shorter_side,
    scale_to,
    to_rgb,
    to_tensor,
)

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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    assert refused(big) == (
        f"{big} has more than 2 megapixels.",
        "Save a smaller copy of it, or remove it.",
    )

    def locked(*_args, **_kwargs):
        raise PermissionError

    monkeypatch.setattr(Path, "open", locked)
    assert refused(big)[0] == f"{big} may not be read."


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
    known = set(Image.registered_extensions()) | {".heic", ".heif"}
    assert set(PICTURE_SUFFIXES) <= known
    assert list(PICTURE_SUFFIXES) == sorted(PICTURE_SUFFIXES)


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
