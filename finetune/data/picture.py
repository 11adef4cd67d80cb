"""One picture: from a file of any kind to upright 8-bit RGB, and from there to a training square.

Order of treatment: size limit (before decoding), decode, first frame, EXIF orientation, colour profile, then RGB. What was done
is said in `Picture.note`, so that nothing happens silently.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from finetune.data import profiles
from finetune.errors import Problem

# What Pillow's decoders raise on broken files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
          zlib.error, MemoryError, RuntimeError)
STRIP = 32  # times as long as high, from which on a picture is cut before it is enlarged
# Formats that hold no single picture, or that Pillow hands to an outside program (EPS goes to Ghostscript).
REFUSED_FORMATS = {"EPS", "WMF", "PDF", "MPEG", "GRIB", "HDF5", "BUFR"}
# EXIF orientation to the turn that makes the picture upright; `ImageOps.exif_transpose` also rewrites the EXIF block,
# which fails on camera files with damaged maker notes.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """Why one file is left out, as half a sentence for the list of skipped files."""


@dataclass
class Picture:
    """A picture that can be read, and what is known of it.

    Args:
        file: name to print.
        path: where it lies, or None for a row of a dataset (then `data` yields the file's bytes).
        caption: its own caption, or None.
        note: treatments that were needed, "" when none.
        sha256: of the file's bytes.
        size: (width, height) in pixels, upright.
    """

    file: str
    path: Path | None
    caption: str | None
    note: str
    sha256: str
    size: tuple[int, int]
    data: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    max_pixels: int = field(default=100_000_000, repr=False, compare=False)

    def load(self) -> Image.Image:
        """Decode to upright RGB.

        Raises:
            Problem: the file has changed or gone since the intake looked at it.
        """
        try:
            return decode(self.path if self.data is None else io.BytesIO(self.data()), self.max_pixels)[0]
        except Unreadable as error:
            raise Problem(f"The picture {self.file} can no longer be read.", f"It was fine at the start, now: {error}.",
                          "Put it back, or start again without it.") from error


def decode(source: Path | io.BytesIO, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """Upright RGB picture and the list of treatments it needed.

    Raises:
        Unreadable: not a picture, broken, or more than `max_pixels` pixels (seen in the header, before decoding).
    """
    try:
        with _pixel_limit(max_pixels), Image.open(source) as image:
            if image.format in REFUSED_FORMATS:
                raise Unreadable(f"{image.format} files are not decoded; save it as PNG or JPEG")
            return _upright_rgb(image)
    except Image.UnidentifiedImageError:
        raise Unreadable("not a picture in a format Pillow reads") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise Unreadable(f"{pixels[0] if pixels else 'its pixels'} are more than --max-pixels {max_pixels}; make it smaller") from None
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"damaged or cut off ({reason})") from error


@contextlib.contextmanager
def _pixel_limit(pixels: int) -> Iterator[None]:
    """Make Pillow's bomb check ours: it only warns up to twice its limit, so the warning becomes an error.

    Pillow compares the header's size with it when it opens a file, and again for pictures inside containers (ICO,
    ICNS), some of which it decodes while opening. So the limit must stand before `Image.open`.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF and the like; what matters to us raises
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _upright_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Decode an opened file: first frame, orientation, RGB."""
    notes = []
    deep_channels = ";16" in str(image.tile) and not image.mode.startswith(("I", "F"))
    if getattr(image, "is_animated", False):
        notes.append("first frame of several")
    turned = _orientation(image) if image.format == "TIFF" else 1  # Pillow turns TIFF itself while it loads
    image.load()
    orientation = _orientation(image)
    if orientation in _TURNS:
        image, turned = image.transpose(_TURNS[orientation]), orientation
    if turned in _TURNS:
        notes.append(f"turned upright (EXIF orientation {turned})")
    if orientation is None:
        notes.append("EXIF is damaged, so not turned")
    if deep_channels:
        notes.append("16 bits a channel cut to 8")
    image, note = profiles.to_srgb(image)
    notes += [note] * bool(note)
    image, note = to_rgb(image)
    return image, notes + [note] * bool(note)


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 where there is none, None where the EXIF block is damaged (which spoils no pixel)."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return None


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Any Pillow mode to 8-bit RGB, and what was done ("" for RGB).

    Transparency of every kind (alpha channel, palette entry, PNG colour key) is laid on white. Colour profiles were
    applied before (`finetune.data.profiles`).
    """
    mode = image.mode
    if mode.startswith(("I", "F")):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image
        rgba = image.convert("RGBA")
        opaque = rgba.getchannel("A").getextrema()[0] == 255
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        kind = "palette, " if mode in ("P", "PA") else "greyscale, " if mode in ("L", "LA", "La") else ""
        return flat, kind + ("opaque alpha channel dropped" if opaque else "transparency laid on white")
    said = {"RGB": "", "L": "greyscale to RGB", "1": "black and white to RGB", "P": "palette to RGB",
            "CMYK": "CMYK to RGB without a colour profile"}
    return image.convert("RGB"), said.get(mode, f"{mode} to RGB")


def _from_deep_grey(image: Image.Image) -> tuple[Image.Image, str]:
    """Greyscale of 16 or 32 bits or floating point to 8 bits.

    16-bit values are divided by 257. 32-bit and float values are taken for the narrowest usual range that holds
    them (float: 0..1; then 0..255; then 0..65535); beyond all of these they are stretched from lowest to highest.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        ceiling, name = 65535.0, "16-bit greyscale"
    else:
        name = "32-bit greyscale" if image.mode == "I" else "floating-point greyscale"
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        ceiling = next((top for top in ranges if low >= 0 and high <= top), 0.0)
    if ceiling:
        scaled, how = values * 255.0 / ceiling, f"0..{ceiling:.0f} scaled to 8 bits"
    else:
        scaled, how = (values - low) * 255.0 / max(high - low, 1e-12), f"{low:g}..{high:g} stretched to 8 bits"
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB"), f"{name}, {how}"


def fit(image: Image.Image, resolution: int, crop: str, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A square of `resolution` pixels, resampled with LANCZOS (Pillow low-passes first when it shrinks).

    Args:
        crop: "center" or "random" cut a square after the short side is resized; "none" squeezes the whole picture.
        place: for "random", where the square lies in what sticks out: (0, 0) left and top, towards (1, 1) right
            and bottom; every offset in pixels is equally likely when both are uniform in [0, 1).
    """
    if crop == "none":
        return image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return cut(shrink(image, resolution), resolution, place if crop == "random" else (0.5, 0.5))


def shrink(image: Image.Image, resolution: int) -> Image.Image:
    """Resize so that the short side is `resolution` pixels, keeping the aspect ratio.

    A strip stays as it is, and `cut` enlarges no more of it than the square: 20,000 x 10 pixels would become a million wide.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > STRIP * short:
        return image
    size = (max(resolution, round(width * resolution / short)), max(resolution, round(height * resolution / short)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def cut(image: Image.Image, resolution: int, place: tuple[float, float]) -> Image.Image:
    """The square of `resolution` pixels at `place` (see `fit`)."""
    if min(image.size) != resolution:  # a strip, see `shrink`
        side = min(image.size)
        left, top = (share * (long - side) for share, long in zip(place, image.size, strict=True))
        return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    left, top = (min(int(share * (side - resolution + 1)), side - resolution)
                 for share, side in zip(place, image.size, strict=True))
    return image.crop((left, top, left + resolution, top + resolution))
