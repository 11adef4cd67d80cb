"""Sentences about pictures of the rendered world, and what each sentence gives away.

A caption names the style, the colour, the pattern and the place, or leaves some of them out, so that the base learns
prompts of every length. Some captions of photographs use the wording of the Textual Inversion templates (Gal et al.,
2022), so that "a close-up photo of the ..." is familiar when a subject is taught with it.
"""

from dataclasses import dataclass
from random import Random

from finetune.toybox.world import COLOUR_NAMES, NOUN_NAMES, PATTERNS, SCENE_NAMES, STYLES, Picture

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of",),
    "drawing": ("a drawing of",),
    "pixel art": ("pixel art of",),
    "watercolor": ("a watercolor painting of", "a watercolor of"),
}
PHOTO_ADJECTIVES = ("cropped", "close-up", "bright", "dark", "good", "clean")
THING_ADJECTIVES = ("nice", "small", "large", "cool", "weird", "clean", "dirty")
SCENE_WORDS: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow",),
    "forest": ("in the forest",),
    "night": ("at night",),
    "city": ("in the city",),
    "table": ("on a table", "on the table"),
    "grass": ("in the grass", "on the grass"),
    "desert": ("in the desert",),
}
IDENTIFIERS = ("sks", "ohwx", "zwx", "vqz", "rdk", "qtj", "xbn", "fgw")

# Leave an attribute out of a caption this often.
DROPS = {"colour": 0.12, "pattern": 0.15, "scene": 0.15, "style": 0.10}
KINDS: dict[str, tuple[str, ...]] = {
    "class": NOUN_NAMES,
    "colour": COLOUR_NAMES,
    "pattern": PATTERNS,
    "scene": SCENE_NAMES,
    "style": STYLES,
}


@dataclass(frozen=True)
class Said:
    """A caption and the attributes it names; None where it is silent ('plain' is never named)."""

    text: str
    noun: str
    colour: str | None
    second: str | None
    pattern: str | None
    scene: str | None
    style: str | None


def attributes(picture: Picture) -> dict[str, int]:
    """Positions of a picture's class, colour, pattern, scene and style in KINDS."""
    values = (picture.noun, picture.colour, picture.pattern, picture.scene, picture.style)
    return {kind: KINDS[kind].index(value) for kind, value in zip(KINDS, values, strict=True)}


def thing_words(noun: str, colour: str | None, second: str | None, pattern: str | None) -> str:
    """The noun with its look, without an article: 'red mug with white stripes', 'two-tone red and white mug'."""
    named = f"{colour} {noun}" if colour else noun
    if pattern == "striped":
        return f"{named} with {second} stripes"
    if pattern == "dotted":
        return f"{named} with {second} dots"
    if pattern == "two-tone":
        return f"two-tone {colour} and {second} {noun}" if colour else f"two-tone {noun}"
    return named


def full_caption(picture: Picture) -> str:
    """The caption that names everything, in its most usual wording."""
    thing = thing_words(picture.noun, picture.colour, picture.second, picture.pattern)
    return f"{STYLE_WORDS[picture.style][0]} a {thing} {SCENE_WORDS[picture.scene][0]}".replace(" a orange", " an orange")


def caption(picture: Picture, random: Random, drops: dict[str, float] = DROPS, identifiers: float = 0.0) -> Said:
    """One caption of a picture, with attributes left out at random.

    Args:
        picture: what is drawn.
        random: source of every choice.
        drops: probability of leaving out each attribute.
        identifiers: probability of a rare identifier before the noun phrase, as personalization prompts have.
    """
    colour = None if random.random() < drops["colour"] else picture.colour
    pattern = None if random.random() < drops["pattern"] or picture.pattern == "plain" else picture.pattern
    scene = None if random.random() < drops["scene"] else picture.scene
    style = None if random.random() < drops["style"] else picture.style
    second = picture.second if pattern and not (pattern == "two-tone" and colour is None) else None
    thing = thing_words(picture.noun, colour, second, pattern)
    if random.random() < 0.08:
        thing = f"{random.choice(THING_ADJECTIVES)} {thing}"
    if random.random() < identifiers:
        thing = f"{random.choice(IDENTIFIERS)} {thing}"
    article = "the" if random.random() < 0.10 else ("an" if thing.startswith("orange") else "a")
    words = [f"{article} {thing}"]
    if style:
        opening = random.choice(STYLE_WORDS[style])
        if style == "photo" and random.random() < 0.15:
            opening = f"a {random.choice(PHOTO_ADJECTIVES)} photo of"
        words.insert(0, opening)
    if scene:
        words.append(random.choice(SCENE_WORDS[scene]))
    return Said(" ".join(words), picture.noun, colour, second, pattern, scene, style)
