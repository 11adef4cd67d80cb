"""Two pictures for the documentation: what the inpainting and the depth variant make of the same picture with several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune import runs
from finetune.model import load, render
from finetune.toybox.masks import box_mask
from finetune.toybox.sheet import GAP, INK, LINE, PAPER, TYPE, fitted
from finetune.toybox.world import Picture, Shot, render_shot

ENLARGE = 2
GIVEN = (Picture("duck", "yellow", None, "plain", "beach", "photo", 3), Picture("house", "red", "white", "striped", "forest", "photo", 5),
         Picture("car", "blue", None, "plain", "city", "photo", 8))
REPAINTED = (("a photo of a red mug with white dots on the beach", "a photo of a green cat on the beach"),
             ("a photo of a blue robot in the forest", "a photo of a pink teapot with white stripes in the forest"),
             ("a photo of a yellow bottle in the city", "a photo of a black backpack in the city"))
REDRAWN = (("a watercolor painting of a red duck on the beach", "a drawing of a blue duck with white stripes on the beach"),
           ("a photo of a purple house in the snow", "pixel art of a green house with yellow dots in the forest"),
           ("a photo of a pink car at night", "a drawing of a two-tone green and white car in the city"))


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of pictures, each with its words in at most three lines below it."""
    side = 64 * ENLARGE
    wide, high = side + GAP, side + 3 * LINE + GAP
    found = Image.new("RGB", (max(map(len, rows)) * wide + GAP, len(rows) * high + GAP), PAPER)
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(size=TYPE)
    for row, pictures in enumerate(rows):
        for column, (picture, label) in enumerate(pictures):
            left, top = GAP + column * wide, GAP + row * high
            found.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, top))
            for number, line in enumerate(broken(label, font, side)[:3]):
                pen.text((left, top + side + number * LINE), fitted(line, font, side), fill=INK, font=font)
    return found


def broken(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines no wider than `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def inpainting_sheet() -> Image.Image:
    """Picture, picture with its box greyed, and two other things painted into the box."""
    base, rows = load("toybox-inpainting"), []
    for picture, prompts in zip(GIVEN, REPAINTED, strict=True):
        shot = render_shot(picture)
        mask = box_mask(shot.mask, 3)
        drawn = render(base, list(prompts), [11, 12], init=shot.picture, mask=Image.fromarray(mask.astype(np.uint8) * 255))
        rows.append([(shot.picture, "given"), (greyed(shot, mask), "what the network sees of it"), *zip(drawn, prompts, strict=True)])
    return sheet(rows)


def greyed(shot: Shot, mask: np.ndarray) -> Image.Image:
    """The picture without its masked part."""
    return Image.composite(Image.new("RGB", shot.picture.size, (128, 128, 128)), shot.picture, Image.fromarray(mask.astype(np.uint8) * 255))


def depth_sheet() -> Image.Image:
    """Picture, its depth, and two pictures with that depth."""
    base, rows = load("toybox-depth"), []
    for picture, prompts in zip(GIVEN, REDRAWN, strict=True):
        shot = render_shot(picture)
        drawn = render(base, list(prompts), [11, 12], depth=shot.depth)
        rows.append([(shot.picture, "its depth is given"), (shot.depth, "what the network sees of it"), *zip(drawn, prompts, strict=True)])
    return sheet(rows)


def main(folder: Path) -> None:
    """Write toybox-inpainting.png and toybox-depth.png."""
    for name, draw in (("toybox-inpainting", inpainting_sheet), ("toybox-depth", depth_sheet)):
        with runs.atomic_path(folder / f"{name}.png") as temporary:
            draw().save(temporary, optimize=True)


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
