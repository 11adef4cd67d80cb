"""Contact sheets: pictures in rows and columns, each row and column with its label, long labels wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GAP = 8
SMALLEST = 144  # pixels a cell is wide at least: smaller pictures are enlarged, or no label could be read


def sheet(pictures: list[list[Any]], columns: list[str], rows: list[str], title: str = "") -> Any:
    """One picture of all.

    Args:
        pictures: rows of PIL pictures, all of one row count; None leaves a cell empty. Sizes may differ; cells are as large as the largest.
        columns, rows: labels, as many as there are; empty ones take no room.
        title: what all have in common, above everything.
    """
    from PIL import Image, ImageDraw

    there = [picture for row in pictures for picture in row if picture is not None]
    enlarged = max(1, -(-SMALLEST // max(picture.width for picture in there)))
    wide, high = (enlarged * max(getattr(picture, side) for picture in there) for side in ("width", "height"))
    letters = font(max(13, min(24, wide // 20)))
    line = sum(letters.getmetrics())
    aside = min(max((letters.getlength(label) for label in rows), default=0), max(150, wide * 3 // 4))
    left = int(aside) + 2 * GAP if any(rows) else GAP
    whole = left + len(columns) * (wide + GAP)
    heads, sides = [wrap(label, letters, wide) for label in columns], [wrap(label, letters, aside) for label in rows]
    above = wrap(title, letters, whole - 2 * GAP)
    top = GAP + (len(above) * line + GAP if title else 0)
    first = top + (max(len(lines) for lines in heads) * line + GAP // 2 if any(columns) else 0)
    heights = [max(high, len(lines) * line) for lines in sides]
    paper = Image.new("RGB", (whole, first + sum(heights) + GAP * len(heights)), "white")
    pen = ImageDraw.Draw(paper)
    write(pen, above, (GAP, GAP), letters, line)
    for place, lines in enumerate(heads):
        middle = left + place * (wide + GAP) + wide // 2
        for number, text in enumerate(lines):
            pen.text((middle, first - GAP // 2 - (len(lines) - number) * line), text, fill="black", font=letters, anchor="ma")
    y = first
    for row, lines, height in zip(pictures, sides, heights, strict=True):
        write(pen, lines, (GAP, y + (height - len(lines) * line) // 2), letters, line)
        for place, picture in enumerate(row):
            if picture is not None:
                large = picture.convert("RGB").resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST)
                paper.paste(large, (left + place * (wide + GAP) + (wide - large.width) // 2, y + (height - large.height) // 2))
        y += height + GAP
    return paper


def write(pen: Any, lines: list[str], corner: tuple[int, int], letters: Any, line: int) -> None:
    """Lines of text, the first at `corner`."""
    for number, text in enumerate(lines):
        pen.text((corner[0], corner[1] + number * line), text, fill="black", font=letters)


def font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings: it has the letters of most languages' prompts."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def wrap(text: str, letters: Any, width: float) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider alone is broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and letters.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        lines.append("")
        for sign in word:
            if lines[-1] and letters.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
    return lines
