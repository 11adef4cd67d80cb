"""Styles to personalize on: ways of drawing that no training set shows, of which the truth can be redrawn.

A held-out subject is one thing in many places; a held-out style is one manner over many things. As with subjects
(`subjects`), the renderer gives the oracle: any prompted thing and place, drawn in the true style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from finetune.toybox.captions import full_caption
from finetune.toybox.datasets import describe
from finetune.toybox.world import COLOURS, SCENE_NAMES, Look, Picture, draw, seconds_for

Ink = tuple[int, int, int]
NOUN = "picture"  # the plain word for a held-out style, as a class noun is for a subject; it asks for no style of the world


@dataclass(frozen=True)
class HeldStyle:
    """A style no training set shows; `paint` turns a finished picture of the world into it."""

    name: str
    starts_from: str
    paint: Callable[[Image.Image], Image.Image]


def _inks(picture: Image.Image, inks: tuple[Ink, ...], softness: float) -> Image.Image:
    """Lightness in a few inks from dark to bright; `softness` is how wide the steps between them are (1 is a ramp)."""
    light = np.asarray(picture.convert("L"), dtype=np.float32) / 255
    place = light * (len(inks) - 1)
    whole = np.floor(np.clip(place, 0, len(inks) - 1 - 1e-6))
    share = np.clip((place - whole - 0.5) / max(softness, 1e-6) + 0.5, 0, 1)[..., None]
    table = np.array(inks, dtype=np.float32)
    low, high = table[whole.astype(int)], table[whole.astype(int) + 1]
    return Image.fromarray((low * (1 - share) + high * share + 0.5).astype(np.uint8))


def blueprint(picture: Image.Image) -> Image.Image:
    """Pale lines on deep blue: an ink drawing turned over."""
    turned = Image.eval(picture.convert("L"), lambda value: 255 - value)
    return _inks(turned.convert("RGB"), ((22, 52, 120), (60, 104, 172), (238, 244, 255)), 1.0)


def riso(picture: Image.Image) -> Image.Image:
    """Four nearly flat inks, as a risograph prints: aubergine, raspberry, apricot and cream."""
    return _inks(picture, ((40, 24, 80), (196, 48, 110), (250, 150, 90), (252, 236, 206)), 0.5)


STYLES_HELD_OUT: dict[str, HeldStyle] = {
    style.name: style for style in (HeldStyle("blueprint", "drawing", blueprint), HeldStyle("riso", "photo", riso))
}


def oracle(style: HeldStyle, picture: Picture) -> Image.Image:
    """The described thing and place (64 x 64) in the true style; the description's own style does not count."""
    second = None if picture.second is None else COLOURS[picture.second]
    look = Look(picture.noun, COLOURS[picture.colour], picture.pattern, second)
    return style.paint(draw(look, picture.scene, style.starts_from, picture.jitter))


def shown_in(style: HeldStyle, count: int = 5, seed: int = 0) -> list[Picture]:
    """What the reference pictures show: different things in different places."""
    shown: list[Picture] = []
    for picture in describe(40 * count, Random(f"{style.name} {seed}").randrange(2**31)):
        fresh = len({one.noun for one in shown}) == 12 or picture.noun not in {one.noun for one in shown}
        if fresh and picture.scene not in {one.scene for one in shown[-4:]}:
            shown.append(picture)
        if len(shown) == count:
            break
    return shown


def reference_pictures(style: HeldStyle, count: int = 5, seed: int = 0) -> list[Image.Image]:
    """Pictures of different things and places in one style, as somebody would bring them."""
    return [oracle(style, picture) for picture in shown_in(style, count, seed)]


def asked_for(asked: Mapping[str, str], count: int, seed: int) -> list[Picture]:
    """Things and places that keep to the attributes a prompt names (`truth.World.parse`); what it leaves open varies."""
    found = []
    for turn, free in enumerate(describe(count, Random(f"asked {seed}").randrange(2**31), held=None)):
        colour, pattern = asked.get("colour", free.colour), asked.get("pattern", "plain" if "colour" in asked else free.pattern)
        second = None if pattern == "plain" else free.second if free.second not in (None, colour) else seconds_for(colour)[0]
        scene = asked.get("scene", SCENE_NAMES[(seed + turn) % len(SCENE_NAMES)])
        found.append(Picture(asked.get("class", free.noun), colour, second, pattern, scene, "photo", free.jitter))
    return found


def caption_of(picture: Picture) -> str:
    """What a reference picture shows, {} standing for the style: "a {} of a red mug in the snow"."""
    words = full_caption(picture)
    return "a {}" + words[words.index(" of ") :]


def save_references(style: HeldStyle, folder: Path, count: int = 5, seed: int = 0) -> list[Path]:
    """Write the reference pictures as numbered PNG files, what each shows beside it: so the style alone is left to learn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number + 1}.png" for number in range(count)]
    for path, picture in zip(paths, shown_in(style, count, seed), strict=True):
        oracle(style, picture).save(path)
        path.with_suffix(".txt").write_text(caption_of(picture) + "\n", encoding="utf-8")
    return paths
