"""Pictures inside the page: data URIs, small ones untouched as PNG, larger ones as JPEG, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from finetune.report.read import Comparison, Row

SMALL = 96  # pixels: up to here a PNG is as small as a JPEG and shows every pixel
BUDGET = 4_300_000  # characters of the grid's data URIs; everything else on the page needs about one million
# (side of a large picture in pixels, JPEG quality, seeds shown of each prompt): the first that fits the budget is taken.
LADDER = ((384, 88, 4), (256, 88, 4), (256, 85, 2), (192, 82, 2), (192, 80, 1), (128, 78, 1))


@dataclass(frozen=True)
class Shrink:
    """How pictures are embedded: one step of the ladder."""

    side: int
    quality: int
    seeds: int


def data_uri(path: Path, side: int = 384, quality: int = 88) -> str:
    """`data:image/...;base64,...` of a picture, upright, at most `side` pixels; empty when it cannot be read."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    out = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    image.save(out, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def locate(comparison: Comparison, row: Row, file: str) -> Path | None:
    """A scored picture on disk, wherever its name is relative to: the comparison, the row or the row's images; none from elsewhere."""
    bases, whole = (comparison.folder, row.folder, row.folder / "images"), comparison.folder.resolve()
    return next((base / file for base in bases if (base / file).is_file() and (base / file).resolve().is_relative_to(whole)), None)


def instance_path(comparison: Comparison, file: str) -> Path | None:
    """A training picture by its path or bare name: one of those that comparison.json lists."""
    known = [Path(one) for one in comparison.info.get("instance_files", [])]
    return next((path for path in known if (str(path) == str(file) or path.name == Path(file).name) and path.is_file()), None)


def choose(paths: dict[int, list[Path]]) -> Shrink:
    """The first step of the ladder at which the grid stays within the budget.

    Args:
        paths: pictures of the grid by the rank of their seed within its prompt (0 the first).
    """
    for side, quality, seeds in LADDER:
        shown = [path for rank, group in paths.items() if rank < seeds for path in group]
        if _estimate(shown, side, quality) <= BUDGET:
            return Shrink(side, quality, seeds)
    return Shrink(*LADDER[-1])


def _estimate(paths: list[Path], side: int, quality: int) -> int:
    """Weight from a sample of sixteen spread over the list: encoding all of them at every step would take a minute."""
    if not paths:
        return 0
    sample = paths[:: max(1, len(paths) // 16)][:16]
    return sum(len(data_uri(path, side, quality)) for path in sample) * len(paths) // len(sample)
