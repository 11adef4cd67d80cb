"""Every kind of file becomes the same upright RGB, with exact pixel values, or a reason why not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from finetune.data import fit
from finetune.data.picture import Unreadable, decode

LIMIT = 100_000_000
UPRIGHT = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
# How a camera stores UPRIGHT (rows, columns) under each EXIF orientation, from the tables of the EXIF standard.
STORED = {
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1), 7: np.rot90(UPRIGHT.transpose(1, 0, 2), 2), 8: np.rot90(UPRIGHT, -1),
}


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def pixels(buffer, limit=LIMIT):
    image, notes = decode(buffer, limit)
    assert image.mode == "RGB"
    return np.asarray(image), "; ".join(notes)


def png_header(width, height):
    """A PNG of a few bytes that claims to be huge."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
@pytest.mark.parametrize("orientation", STORED)
def test_all_orientations_give_the_same_upright_picture(orientation, kind, options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found, note = pixels(encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), kind, exif=exif, **options))
    np.testing.assert_array_equal(found, UPRIGHT)
    assert (f"EXIF orientation {orientation}" in note) == (orientation > 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_spoils_no_picture(kind):
    found, note = pixels(encoded(Image.new("RGB", (8, 4), (90, 90, 90)), kind, exif=b"Exif\0\0garbage"))
    np.testing.assert_allclose(found, np.full((4, 8, 3), 90), atol=2)
    assert note in ("", "EXIF is damaged, so not turned")


def test_damaged_bytes_never_escape_as_another_error():
    chosen = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "ICO", "AVIF"):
        whole = encoded(Image.effect_noise((24, 24), 80).convert("RGB"), kind).getvalue()
        for _ in range(40):
            broken = bytearray(whole)
            for place in chosen.integers(0, min(len(broken), 300), 4):
                broken[place] = chosen.integers(0, 256)
            try:
                image, _ = decode(io.BytesIO(bytes(broken)), 10_000)
            except Unreadable as error:
                assert str(error)
            else:
                assert image.mode == "RGB" and image.width * image.height <= 10_000


def grey(values, dtype):
    return Image.fromarray(np.array([values], dtype=dtype))


def palette(**options):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return encoded(image, **options)


def alpha(mode, data):
    image = Image.new(mode, (len(data), 1))
    image.putdata(data)
    return encoded(image)


@pytest.mark.parametrize("buffer, wanted, said", [
    (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), [(1, 2, 3)], ""),
    (encoded(grey([0, 7, 255], np.uint8)), [(0,) * 3, (7,) * 3, (255,) * 3], "greyscale"),
    (encoded(Image.new("1", (1, 1), 1)), [(255, 255, 255)], "black and white"),
    (palette(), [(10, 20, 30), (40, 50, 60)], "palette"),
    (palette(transparency=0), [(255, 255, 255), (40, 50, 60)], "palette, transparency laid on white"),
    (palette(transparency=bytes([128, 255])), [(132, 137, 142), (40, 50, 60)], "transparency laid on white"),
    (alpha("RGBA", [(0, 100, 200, 255), (0, 100, 200, 128), (9, 9, 9, 0)]), [(0, 100, 200), (127, 177, 227), (255,) * 3], "on white"),
    (alpha("RGBA", [(5, 6, 7, 255)]), [(5, 6, 7)], "opaque alpha channel dropped"),
    (alpha("LA", [(40, 255), (40, 0)]), [(40,) * 3, (255,) * 3], "greyscale, transparency laid on white"),
    (encoded(Image.new("RGB", (1, 1), (9, 8, 7)), transparency=(9, 8, 7)), [(255,) * 3], "transparency laid on white"),
    (encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)], "CMYK"),
    (encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF"), [(0, 0, 0)], "CMYK"),
    (encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "JPEG", quality=100), [(0, 255, 255)], "CMYK"),
    (encoded(grey([0, 257, 32896, 65535], np.uint16)), [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3], "16-bit"),
    (encoded(grey([0, 257, 65535], np.int32), "TIFF"), [(0,) * 3, (1,) * 3, (255,) * 3], "32-bit"),
    (encoded(grey([3, 200], np.int32), "TIFF"), [(3,) * 3, (200,) * 3], "0..255"),
    (encoded(grey([-100, 0, 100], np.int32), "TIFF"), [(0,) * 3, (128,) * 3, (255,) * 3], "-100..100 stretched"),
    (encoded(grey([0, 0.2, 1], np.float32), "TIFF"), [(0,) * 3, (51,) * 3, (255,) * 3], "floating-point"),
    (encoded(grey([0, 51, 255], np.float32), "TIFF"), [(0,) * 3, (51,) * 3, (255,) * 3], "0..255"),
    (encoded(grey([-1, 0.6, 1], np.float32), "TIFF"), [(0,) * 3, (204,) * 3, (255,) * 3], "stretched"),
])
def test_colour_modes_to_exact_pixels(buffer, wanted, said):
    found, note = pixels(buffer)
    np.testing.assert_array_equal(found[0], np.array(wanted))
    assert said in note and bool(said) == bool(note)


def test_sixteen_bits_a_channel_are_noted():
    raw = b"".join(struct.pack(">3H", 0x1234, 0x00FF, 0xFFFF) for _ in range(2))
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
           + chunk(b"IDAT", zlib.compress(b"\0" + raw)) + chunk(b"IEND", b""))
    found, note = pixels(io.BytesIO(png))
    np.testing.assert_array_equal(found[0], [(0x12, 0x00, 0xFF)] * 2)
    assert note == "16 bits a channel cut to 8"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    found, note = pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert tuple(found[3, 3]) == (250, 0, 0)
    assert "first frame of several" in note


def test_lab_comes_back_near_its_srgb_colour():
    lab = ImageCms.profileToProfile(Image.new("RGB", (2, 2), (255, 0, 0)), ImageCms.createProfile("sRGB"),
                                    ImageCms.createProfile("LAB"), outputMode="LAB")
    found, note = pixels(encoded(lab, "TIFF"))
    np.testing.assert_allclose(found[0, 0], (255, 0, 0), atol=6)
    assert note == "LAB to RGB"


@pytest.mark.parametrize("width, height", [(12_000, 12_000), (50_000, 50_000)])
def test_bombs_are_refused_before_decoding(width, height, monkeypatch):
    """144 MP is where Pillow only warns; 2500 MP where it raises by itself."""
    def never(self):
        raise AssertionError("decoded")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    with pytest.raises(Unreadable, match=f"{width * height} pixels are more than --max-pixels {LIMIT}"):
        decode(io.BytesIO(png_header(width, height)), LIMIT)


def test_the_limit_is_exact_and_pillows_is_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    buffer = encoded(Image.new("RGB", (10, 10)))
    assert decode(buffer, 100)[0].size == (10, 10)
    with pytest.raises(Unreadable, match="100 pixels are more than --max-pixels 99"):
        decode(buffer, 99)
    assert Image.MAX_IMAGE_PIXELS == before


def test_a_bomb_inside_an_icon_is_refused():
    inner = png_header(20_000, 20_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(Unreadable, match="400000000 pixels"):
        decode(io.BytesIO(icon), LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_off_files_are_unreadable(kind):
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind).getvalue()
    with pytest.raises(Unreadable):
        decode(io.BytesIO(whole[: len(whole) // 2]), LIMIT)


def ramp(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


@pytest.mark.parametrize("crop, place, left, top", [
    ("center", (0.9, 0.9), 2, 0), ("random", (0.0, 0.0), 0, 0), ("random", (0.999, 0.5), 4, 0), ("random", (1.0, 1.0), 4, 0),
])
def test_fit_cuts_the_promised_square(crop, place, left, top):
    found = np.asarray(fit(ramp(12, 8), 8, crop, place))
    np.testing.assert_array_equal(found, np.asarray(ramp(12, 8))[top:top + 8, left:left + 8])


def test_fit_resizes_the_short_side_with_lanczos_and_none_squeezes():
    image = Image.effect_noise((90, 60), 60).convert("RGB")
    whole = image.resize((30, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(fit(image, 20, "center")), np.asarray(whole.crop((5, 0, 25, 20))))
    np.testing.assert_array_equal(np.asarray(fit(image, 20, "none")), np.asarray(image.resize((20, 20), Image.Resampling.LANCZOS)))
    assert fit(Image.new("RGB", (3, 1000)), 16, "center").size == (16, 16)


def test_random_places_reach_every_offset_equally():
    offsets = [np.asarray(fit(ramp(12, 8), 8, "random", (u, 0.5)))[0, 0, 0] for u in np.linspace(0, 1, 1000, endpoint=False)]
    assert np.bincount(offsets).tolist() == [200] * 5
