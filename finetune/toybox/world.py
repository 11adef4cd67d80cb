"""The rendered world: one thing, with one look, in one place, in one style, as a 64 x 64 picture.

Everything is drawn three times larger with Pillow and averaged down. A picture is a pure function of its description,
jitter included, so a data set is a list of descriptions and every experiment can redraw the truth (see `subjects`).
With each picture come, where they are asked for, the true mask of the thing and the true depth (`Shot`).
"""

from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from finetune.toybox.scenes import LIGHT, SCENES, SIDE, Canvas, backdrop
from finetune.toybox.shapes import BLACK, NOUNS, RGB, Part

ZOOM = 3
COLOURS: dict[str, RGB] = {
    "red": (216, 36, 40),
    "orange": (246, 136, 28),
    "yellow": (250, 214, 50),
    "green": (42, 156, 66),
    "blue": (36, 84, 208),
    "purple": (136, 58, 182),
    "pink": (246, 138, 184),
    "white": (244, 244, 240),
    "black": (46, 44, 52),
    "brown": (134, 82, 46),
}
PATTERNS = ("plain", "striped", "dotted", "two-tone")
STYLES = ("photo", "drawing", "pixel art", "watercolor")
NOUN_NAMES, COLOUR_NAMES, SCENE_NAMES = tuple(NOUNS), tuple(COLOURS), tuple(SCENES)

# Second colours too near to the first are never drawn: neither people nor a judge could name the pattern.
_MINIMUM_CONTRAST = 125.0


@dataclass(frozen=True)
class Look:
    """What a thing looks like: a noun of the world, its colours and pattern, and parts painted otherwise."""

    noun: str
    body: RGB
    pattern: str = "plain"
    second: RGB | None = None
    parts: tuple[tuple[str, RGB], ...] = ()


@dataclass(frozen=True)
class Picture:
    """Description of one picture in the world's own words; `jitter` seeds place, size, light and shade of colour."""

    noun: str
    colour: str
    second: str | None
    pattern: str
    scene: str
    style: str
    jitter: int = 0
    flipped: bool = field(default=False)


def seconds_for(colour: str) -> tuple[str, ...]:
    """Colours that stand out clearly against `colour`."""
    first = np.array(COLOURS[colour], dtype=float)
    far = {name: float(np.linalg.norm(first - np.array(other))) for name, other in COLOURS.items()}
    return tuple(name for name, distance in far.items() if distance >= _MINIMUM_CONTRAST)


def held_out(noun: str, colour: str, pattern: str) -> bool:
    """True for the eleventh of all (noun, colour, pattern) triples that no training set ever shows.

    With positions n, c, p in NOUN_NAMES, COLOUR_NAMES and PATTERNS the rule is 7n + 5c + 3p = 0 modulo 11, so that
    every noun, every colour and every pattern keeps most of its company.
    """
    place = 7 * NOUN_NAMES.index(noun) + 5 * COLOUR_NAMES.index(colour) + 3 * PATTERNS.index(pattern)
    return place % 11 == 0


@dataclass(frozen=True)
class Shot:
    """A picture and what is true of it, each 64 x 64.

    Attributes:
        picture: RGB.
        mask: share of each pixel that the thing covers, ink and rim included, L, 255 for all of it.
        depth: disparity, L: 255 is the ground at the lower edge, 0 the sky. See `scenes` for the camera.
    """

    picture: Image.Image
    mask: Image.Image
    depth: Image.Image

    def mirrored(self) -> "Shot":
        """All three, left and right exchanged."""
        return Shot(*(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (self.picture, self.mask, self.depth)))


def render(picture: Picture) -> Image.Image:
    """Draw a description as a 64 x 64 RGB picture."""
    image = draw(_look_of(picture), picture.scene, picture.style, picture.jitter)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if picture.flipped else image


def render_shot(picture: Picture) -> Shot:
    """The picture `render` draws, with its mask and depth."""
    taken = shot(_look_of(picture), picture.scene, picture.style, picture.jitter)
    return taken.mirrored() if picture.flipped else taken


def draw(look: Look, scene: str, style: str, seed: int) -> Image.Image:
    """Draw any look, inside the palette or not, in a scene and a style; the seed settles place, size and light."""
    return _composed(look, scene, style, seed, depth=False)[0]


def shot(look: Look, scene: str, style: str, seed: int) -> Shot:
    """The picture `draw` draws, with its mask and depth."""
    picture, canvas, mask, feet = _composed(look, scene, style, seed, depth=True)
    small = (SIDE // 2, SIDE // 2)
    behind = canvas.disparities()
    if style == "pixel art":
        blocks = _blocks(mask).filter(ImageFilter.MaxFilter(3))  # the rim is part of the thing
        cover = blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        behind = behind.reshape(small[0], 2, small[1], 2).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    else:
        cover = mask.reduce(ZOOM)
    share = np.asarray(cover, dtype=np.float32) / 255
    depth = behind * (1 - share) + canvas.disparity(feet[1]) * share
    return Shot(picture, cover, _image(depth * 255))


def _composed(
    look: Look, scene: str, style: str, seed: int, depth: bool
) -> tuple[Image.Image, Canvas, Image.Image, tuple[float, float, float]]:
    """Picture, scene, enlarged mask of the thing, and its feet."""
    random = Random(seed)
    canvas = backdrop(scene, random, ZOOM, depth)
    ground = canvas.image
    thing, mask, feet = _place(look, random, outlined=style == "drawing")
    if style == "drawing":
        return _drawing(ground, thing, mask), canvas, mask, feet
    light = random.uniform(0.92, 1.06)
    if style == "pixel art":
        return _pixel_art(ground, thing, mask), canvas, mask, feet
    picture = _photo(ground, thing, mask, feet, light, LIGHT[scene])
    if style == "watercolor":
        picture = _watercolor(picture, random)
    return picture, canvas, mask, feet


def _look_of(picture: Picture) -> Look:
    """The palette's colours, each a little off."""
    random = Random(picture.jitter * 7919 + 13)
    second = None if picture.second is None else _shade_of(COLOURS[picture.second], random)
    return Look(picture.noun, _shade_of(COLOURS[picture.colour], random), picture.pattern, second)


# ---- the thing ------------------------------------------------------------------------------------------------------


def _place(look: Look, random: Random, outlined: bool) -> tuple[Image.Image, Image.Image, tuple[float, float, float]]:
    """Draw the thing alone. Returns picture and mask, enlarged, and its feet (x, y, half width) in pixels."""
    half = random.uniform(0.34, 0.45) * SIDE * ZOOM
    x = (0.5 + random.uniform(-0.06, 0.06)) * SIDE * ZOOM
    y = (0.97 - random.uniform(0.02, 0.07)) * SIDE * ZOOM - 0.95 * half
    mirror = random.choice((-1, 1))
    size = (SIDE * ZOOM, SIDE * ZOOM)
    fabric = _fabric(look, size, x, y, half)
    thing, mask = Image.new("RGB", size, look.body), Image.new("L", size)
    pen, mask_pen = ImageDraw.Draw(thing), ImageDraw.Draw(mask)
    painted = dict(look.parts)
    for part in NOUNS[look.noun]:
        outline = [(x + mirror * px * half, y + py * half) for px, py in part.outline]
        hole = [(x + mirror * px * half, y + py * half) for px, py in part.hole]
        stencil = None
        if part.fill == "body" and part.name not in painted and look.pattern != "plain":
            stencil = fabric
        _paint(thing, pen, mask, mask_pen, outline, hole, _fill(part, look, painted), stencil)
        if outlined and part.lined:
            for loop in (outline, hole):
                if loop:
                    pen.line([*loop, loop[0], loop[1]], fill=BLACK, width=4, joint="curve")
                    mask_pen.line([*loop, loop[0], loop[1]], fill=255, width=4, joint="curve")
    return thing, mask, (x / ZOOM, (y + 0.92 * half) / ZOOM, 0.72 * half / ZOOM)


def _paint(thing, pen, mask, mask_pen, outline, hole, fill: RGB, stencil: Image.Image | None) -> None:
    """Fill one part, with plain colour or with the patterned fabric, leaving its hole open."""
    if stencil is None and not hole:
        pen.polygon(outline, fill=fill)
        mask_pen.polygon(outline, fill=255)
        return
    area = Image.new("L", thing.size)
    area_pen = ImageDraw.Draw(area)
    area_pen.polygon(outline, fill=255)
    if hole:
        area_pen.polygon(hole, fill=0)
    box = area.getbbox()
    if box is None:
        return
    area = area.crop(box)
    thing.paste(stencil.crop(box) if stencil is not None else fill, box, area)
    mask.paste(255, box, area)


def _fabric(look: Look, size: tuple[int, int], x: float, y: float, half: float) -> Image.Image:
    """The pattern as an endless sheet, hung so that it moves and grows with the thing."""
    sheet = Image.new("RGB", size, look.body)
    pen = ImageDraw.Draw(sheet)
    second = look.second or look.body
    if look.pattern == "striped":
        for row in range(-3, 4):
            top = y + (row * 0.46 + 0.10) * half
            pen.rectangle([0, top, size[0], top + 0.22 * half], fill=second)
    elif look.pattern == "dotted":
        for row in range(-4, 5):
            for column in range(-4, 5):
                dot_x = x + (column * 0.46 + (0.23 if row % 2 else 0.0)) * half
                dot_y = y + (row * 0.36 + 0.06) * half
                reach = 0.125 * half
                pen.ellipse([dot_x - reach, dot_y - reach, dot_x + reach, dot_y + reach], fill=second)
    elif look.pattern == "two-tone":
        pen.rectangle([0, y + 0.14 * half, size[0], size[1]], fill=second)
    return sheet


def _fill(part: Part, look: Look, painted: dict[str, RGB]) -> RGB:
    if part.name in painted:
        return painted[part.name]
    if part.fill == "dark":
        # Black has no darker shade: its trim is a lighter grey, so that handles and roofs stay visible.
        return _mix(look.body, (120, 120, 128), 0.5) if sum(look.body) < 200 else _scale(look.body, 0.66)
    if part.fill == "light":
        return _mix(look.body, (255, 255, 255), 0.45) if sum(look.body) < 680 else _scale(look.body, 0.82)
    return look.body if part.fill == "body" else part.fill


def _shade_of(colour: RGB, random: Random) -> RGB:
    return tuple(max(0, min(255, round(value + random.uniform(-9, 9)))) for value in colour)


def _mix(one: RGB, other: RGB, share: float) -> RGB:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def _scale(colour: RGB, factor: float) -> RGB:
    return tuple(round(value * factor) for value in colour)


# ---- styles ---------------------------------------------------------------------------------------------------------

_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
_VIGNETTE = (1 - 0.16 * (((_COLUMNS - 32) / 45) ** 2 + ((_ROWS - 32) / 45) ** 2))[..., None]


def _reduced(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(ZOOM), dtype=np.float32)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _photo(ground, thing, mask, feet, light: float, tint: tuple[float, float, float]) -> Image.Image:
    """Soft contact shadow, light from the upper left, the scene's tint on the thing, a slight vignette."""
    x, y, width = feet
    below = np.exp(-(((_COLUMNS - x) / width) ** 2 + ((_ROWS - y) / (0.16 * width)) ** 2) ** 1.5)
    pixels = _reduced(ground) * (1 - 0.45 * below)[..., None]
    cover = _reduced(mask)[..., None] / 255
    across = (_COLUMNS - x) / width * 0.5 + (_ROWS - y + width) / width * 0.4
    shading = np.clip(1.06 - 0.17 * across, 0.72, 1.15)
    glow = np.exp(-(((_COLUMNS - x + 0.40 * width) / (0.42 * width)) ** 2 + ((_ROWS - y + 1.75 * width) / (0.42 * width)) ** 2))
    solid = _reduced(thing) * shading[..., None] * np.array(tint, np.float32)
    solid = solid + (255 - solid) * (0.26 * glow)[..., None]
    pixels = pixels * (1 - cover) + solid * cover
    return _image(pixels * light * _VIGNETTE)


def _drawing(ground, thing, mask) -> Image.Image:
    """Flat colour and thick ink on a pale page."""
    page = _reduced(ground) * 0.36 + 255 * 0.64
    cover = _reduced(mask)[..., None] / 255
    return _image(page * (1 - cover) + _reduced(thing) * cover)


def _pixel_art(ground, thing, mask) -> Image.Image:
    """Blocks of two pixels in a small palette (six levels per channel), with a dark rim around the thing."""
    page = ground.reduce(ZOOM * 2)
    cover = _blocks(mask)
    rim = ImageChops.subtract(cover.filter(ImageFilter.MaxFilter(3)), cover)
    page.paste(BLACK, mask=rim)
    page.paste(thing.reduce(ZOOM * 2), mask=cover)
    step = 51
    page = page.point(lambda value: min(255, (value + step // 2) // step * step))
    return page.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _blocks(mask: Image.Image) -> Image.Image:
    """Which blocks of pixel art the thing fills, 32 x 32."""
    return mask.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX).point(lambda value: 255 if value > 110 else 0)


def _watercolor(photo: Image.Image, random: Random) -> Image.Image:
    """Flattened colour under a wash of paper, heavier towards the edges, in large uneven pools."""
    flat = np.asarray(photo.filter(ImageFilter.MedianFilter(3)), dtype=np.float32)
    pools = Image.new("L", (5, 5))
    pools.putdata([random.randrange(256) for _ in range(25)])
    pool = np.asarray(pools.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    edge = (np.maximum(abs(_COLUMNS - 32), abs(_ROWS - 32)) / 32)[..., None]
    wash = np.clip(0.04 + 0.18 * pool + 1.5 * np.clip(edge - 0.78 + 0.10 * (pool - 0.5), 0, 1), 0, 0.96)
    bright = np.clip(flat * 1.05 + 4, 0, 255)
    return _image(bright + (np.array((252, 248, 238), np.float32) - bright) * wash)
