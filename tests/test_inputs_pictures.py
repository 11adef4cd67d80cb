"""The intake table of docs/reliability.md: each kind of file in a folder with its stated result. Exact pixels are in test_data_picture.py."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data import fit, scan
from finetune.data.picture import cut, decode, shrink
from finetune.data.profiles import plain

LIMIT = 100_000_000
GREY = Image.new("RGB", (16, 12), (90, 120, 200))


def saved(kind: str = "PNG", image: Image.Image = GREY, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved("JPEG", exif=exif)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(64)))
            + chunk(b"IEND", b""))


def several(kind: str) -> bytes:
    return saved(kind, save_all=True, append_images=[Image.new("RGB", (16, 12), "red")])


def deep() -> Image.Image:
    return Image.fromarray(np.full((12, 16), 257 * 200, dtype=np.uint16))


KEPT = {  # file -> (bytes, what the note says)
    **{f"exif-{number}.jpg": ((lambda number=number: turned(number)), "" if number == 1 else f"orientation {number}") for number in range(1, 9)},
    "alpha.png": (lambda: saved(image=Image.new("RGBA", (16, 12), (1, 2, 3, 0))), "transparency laid on white"),
    "l.png": (lambda: saved(image=GREY.convert("L")), "greyscale to RGB"),
    "la.png": (lambda: saved(image=Image.new("LA", (16, 12), (9, 0))), "greyscale, transparency laid on white"),
    "p.png": (lambda: saved(image=GREY.convert("P"), transparency=0), "palette, "),
    "cmyk.jpg": (lambda: saved("JPEG", GREY.convert("CMYK")), "CMYK to RGB without a colour profile"),
    "i16.png": (lambda: saved(image=deep()), "16-bit greyscale, 0..65535 scaled to 8 bits"),
    "float.tif": (lambda: saved("TIFF", Image.fromarray(np.full((12, 16), 0.5, dtype=np.float32))), "floating-point greyscale, 0..1 scaled"),
    "animated.gif": (lambda: several("GIF"), "first frame of several"),
    "animated.webp": (lambda: several("WEBP"), "first frame of several"),
    "animated.png": (lambda: several("PNG"), "first frame of several"),
    "dot.png": (lambda: saved(image=Image.new("RGB", (1, 1), "red")), ""),
    "strip.png": (lambda: saved(image=Image.new("RGB", (20_000, 10), "red")), ""),
    "png-in-truth.jpg": (lambda: saved("PNG"), ""),
    "no suffix": (lambda: saved("PNG", Image.new("RGB", (16, 12), "blue")), ""),
}
LEFT_OUT = {  # file -> (bytes, the reason)
    "truncated.jpg": (lambda: saved("JPEG")[:300], "damaged or cut off"),
    "truncated.png": (lambda: saved("PNG", Image.effect_noise((16, 12), 90))[:150], "damaged or cut off"),
    "zero.png": (lambda: b"", "not a picture in a format Pillow reads"),
    "words.png": (lambda: b"<html>not found</html>", "not a picture in a format Pillow reads"),
    "pillow-warns.png": (lambda: bomb(11_000, 10_000), "110000000 pixels are more than --max-pixels 100000000"),
    "pillow-raises.png": (lambda: bomb(40_000, 40_000), "1600000000 pixels are more than --max-pixels 100000000"),
    "pillow-fails.png": (lambda: bomb(2**31 - 1, 2**31 - 1), "more than --max-pixels 100000000"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str, tmp_path: Path) -> None:
    made, said = KEPT[name]
    (tmp_path / name).write_bytes(made())
    found = scan(tmp_path, LIMIT)
    assert [picture.file for picture in found.pictures] == [name] and not found.skipped
    assert said in found.pictures[0].note if said else found.pictures[0].note == ""
    square = fit(found.pictures[0].load(), 32, "center")
    assert square.size == (32, 32) and square.mode == "RGB"


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(name: str, tmp_path: Path) -> None:
    made, reason = LEFT_OUT[name]
    (tmp_path / name).write_bytes(made())
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = scan(tmp_path, LIMIT)
    assert not found.pictures and reason in found.skipped[0][1] and found.skipped[0][0] == name
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64 and time.process_time() - begin < 1


def test_a_bomb_on_which_pillow_stays_silent(tmp_path: Path) -> None:
    """80 million pixels are less than Pillow warns of; a lower --max-pixels is what counts."""
    (tmp_path / "large.png").write_bytes(bomb(8_000, 10_000))
    assert 80_000_000 < Image.MAX_IMAGE_PIXELS
    assert scan(tmp_path, 50_000_000).skipped[0][1] == "80000000 pixels are more than --max-pixels 50000000; make it smaller"


def test_links_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    """A folder from a stranger could otherwise make captions, which are published, out of any file of this machine."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "private"
    folder.mkdir(), elsewhere.mkdir()
    (elsewhere / "face.png").write_bytes(saved())
    (elsewhere / "key").write_text("secret")
    (folder / "a.png").write_bytes(saved(image=Image.new("RGB", (16, 12), "blue")))
    (folder / "b.png").symlink_to(elsewhere / "face.png")
    (folder / "c.png").symlink_to("../private/face.png")
    (folder / "a.txt").symlink_to(elsewhere / "key")
    (folder / "metadata.csv").symlink_to(elsewhere / "key")
    (folder / "d.png").symlink_to("a.png")
    (folder / "e.png").symlink_to("e.png")
    found = scan(folder, LIMIT)
    assert [(picture.file, picture.caption) for picture in found.pictures] == [("a.png", None)]
    reasons = dict(found.skipped)
    assert {name for name, reason in reasons.items() if "leads out of the folder" in reason} == {"b.png", "c.png", "a.txt", "metadata.csv"}
    assert "same file as a.png" in reasons["d.png"] and "leads nowhere" in reasons["e.png"]
    linked = tmp_path / "link"
    linked.symlink_to(folder)  # the folder itself may be one
    assert [picture.file for picture in scan(linked, LIMIT).pictures] == ["a.png"]


def test_ten_thousand_files(tmp_path: Path) -> None:
    """All are looked at, those with the same bytes once; memory holds no pixels."""
    for number in range(10_000):
        (tmp_path / f"{number:05}.ppm").write_bytes(b"P6 1 1 255\n" + bytes((number % 200, number // 200 % 25, 7)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = scan(tmp_path, LIMIT)
    assert (len(found.pictures), len(found.skipped)) == (5_000, 5_000)
    assert found.skipped[0] == ("05000.ppm", "the same file as 00000.ppm, kept once")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


def test_a_strip_is_cut_before_it_is_enlarged() -> None:
    """20,000 x 10 would become 1,024,000 x 512, 1.6 GB; its middle square is what is wanted."""
    strip = Image.new("RGB", (20_000, 10), "red")
    strip.paste("blue", (9_995, 0, 10_005, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = np.asarray(fit(strip, 512, "center"))
    assert square.shape == (512, 512, 3) and (square[:, 192:-192] == (0, 0, 255)).all()  # three source pixels from the edge
    assert shrink(strip, 512).size == strip.size
    assert np.asarray(cut(shrink(strip, 64), 64, (0.0, 0.0))).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64**2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64


# -- colour profiles ---------------------------------------------------------------------------------------------------

P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # Display P3 to XYZ (D50), ICC
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # sRGB to XYZ (D50), ICC


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2.1) of a display, by its specification."""
    text = b"test\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text" + bytes(4) + b"none\0",
            b"wtpt": xyz(0.9642, 1.0, 0.8249), **tags}
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    return head + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + struct.pack(">I", len(tags)) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def display(matrix: np.ndarray, power: float) -> bytes:
    colours = {f"{name}XYZ".encode(): xyz(*matrix[:, place]) for place, name in enumerate("rgb")}
    return profile(b"RGB ", colours | {f"{name}TRC".encode(): gamma(power) for name in "rgb"})


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def shown(content: bytes) -> tuple[np.ndarray, str]:
    image, notes = decode(io.BytesIO(content), LIMIT)
    return np.asarray(image), "; ".join(notes)


def test_a_wide_profile_becomes_srgb_by_the_matrices() -> None:
    """Against the arithmetic of the specification: linear, through XYZ, with sRGB's curve."""
    colours = np.array([[[200, 100, 50], [30, 60, 90], [128, 128, 128], [250, 250, 250], [90, 160, 140]]], dtype=np.uint8)
    found, note = shown(saved(image=Image.fromarray(colours), icc_profile=display(P3, 2.2)))
    linear = (colours / 255.0) ** 2.2 @ (np.linalg.inv(SRGB) @ P3).T
    np.testing.assert_allclose(found, 255 * srgb_curve(linear), atol=1.5)
    assert note == "colours from 'test' to sRGB" and abs(int(found[0, 0, 0]) - 200) > 8


def test_a_grey_profile_and_transparency() -> None:
    """128 of linear grey is 188 of sRGB; what is see-through stays so."""
    grey = profile(b"GRAY", {b"kTRC": gamma(1.0)})
    found, note = shown(saved(image=Image.new("L", (4, 4), 128), icc_profile=grey))
    np.testing.assert_allclose(found, 255 * srgb_curve(np.array(128 / 255)), atol=1.0)
    assert "to sRGB" in note
    half = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    found, note = shown(saved(image=half, icc_profile=display(P3, 2.2)))
    assert (found == 255).all() and "transparency laid on white" in note


@pytest.mark.parametrize(("made", "said"), [
    (lambda: {"icc_profile": b"no profile at all"}, "damaged, so not applied"),
    (lambda: {"icc_profile": display(P3, 2.2)[:200]}, "damaged, so not applied"),
    (lambda: {"icc_profile": profile(b"GRAY", {b"kTRC": gamma(1.0)})}, "for other pixels, so not applied"),
    (lambda: {"icc_profile": _srgb()}, ""),
])
def test_profiles_that_change_nothing(made: Callable[[], dict[str, bytes]], said: str) -> None:
    found, note = shown(saved(**made()))
    assert (found == np.asarray(GREY)).all() and (said in note if said else note == "")


def _srgb() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_profiles_name_is_one_plain_line() -> None:
    assert plain("Evil\n\x1b[31m" + "x" * 100) == "Evil[31m" + "x" * 52 and plain(None) == "without a name" and plain("\ud800") == "?"
