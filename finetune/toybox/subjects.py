"""Subjects to personalize on: looks outside the palette, never in any training set, of whom the truth can be redrawn.

No photograph has an oracle. Here the renderer can draw the true subject in every prompted scene and style, so that
fidelity is measured against the truth, with a known ceiling.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from finetune.toybox.world import SCENE_NAMES, Look, draw


@dataclass(frozen=True)
class Subject:
    """A held-out individual: its class noun, its look, and how one would describe it in words of the world."""

    name: str
    noun: str
    look: Look
    words: str


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "teal-backpack",
            "backpack",
            Look("backpack", (0, 158, 156), "dotted", (255, 150, 40), (("pocket", (252, 218, 60)),)),
            "green backpack with orange dots",
        ),
        Subject(
            "lilac-cat",
            "cat",
            Look("cat", (206, 168, 238), "striped", (66, 44, 140)),
            "pink cat with purple stripes",
        ),
        Subject(
            "coral-mug",
            "mug",
            Look("mug", (255, 120, 96), "two-tone", (18, 36, 96), (("handle", (18, 36, 96)),)),
            "two-tone orange and blue mug",
        ),
        Subject(
            "lime-robot",
            "robot",
            Look("robot", (170, 226, 46), "dotted", (112, 32, 92), (("antenna", (255, 110, 180)),)),
            "yellow robot with purple dots",
        ),
        Subject(
            "turquoise-duck",
            "duck",
            Look("duck", (84, 214, 204), "striped", (178, 28, 84), (("wing", (250, 206, 70)),)),
            "blue duck with red stripes",
        ),
    )
}

# Photographs of a subject are taken in these places; the others stay unseen, to be asked for in prompts.
REFERENCE_SCENES = ("beach", "forest", "city", "table", "grass")
UNSEEN_SCENES = tuple(scene for scene in SCENE_NAMES if scene not in REFERENCE_SCENES)


def reference_pictures(subject: Subject, count: int = 5, seed: int = 0) -> list[Image.Image]:
    """Photographs (64 x 64) of a subject in different places, as a user would bring them."""
    random = Random(f"{subject.name} {seed}")
    scenes = [REFERENCE_SCENES[place % len(REFERENCE_SCENES)] for place in range(count)]
    return [draw(subject.look, scene, "photo", random.randrange(2**31)) for scene in scenes]


def oracle(subject: Subject, scene: str, style: str = "photo", seed: int = 0) -> Image.Image:
    """The true subject (64 x 64) in a scene and style; the seed settles place, size and light."""
    random = Random(f"{subject.name} {scene} {style} {seed}")
    return draw(subject.look, scene, style, random.randrange(2**31))


def save_references(subject: Subject, folder: Path, count: int = 5, seed: int = 0) -> list[Path]:
    """Write the reference pictures as PNG files named after their scenes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, picture in enumerate(reference_pictures(subject, count, seed)):
        path = folder / f"{place + 1}-{REFERENCE_SCENES[place % len(REFERENCE_SCENES)]}.png"
        picture.save(path)
        paths.append(path)
    return paths
