"""What every artifact and the base are asked: prompts with the subject, with its bare class, and with other things.

Wording of the published suites is that of DreamBench (Ruiz et al., "DreamBooth", CVPR 2023; google/dreambooth,
dataset/prompts_and_classes.txt); the toybox suite uses the words its base was trained on; a text file brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import draws
from finetune.data import fill
from finetune.errors import Problem, nearest

KINDS = ("subject", "class", "other")
SEEDS = {"subject": 4, "class": 8, "other": 1}

TOYBOX_SUBJECT = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the forest",
    "a photo of a {} at night",
    "a photo of a {} in the city",
    "a photo of a {} on a table",
    "a photo of a {} in the grass",
    "a photo of a {} in the desert",
    "a drawing of a {}",
    "a watercolor painting of a {}",
)
STYLE_NOUN = "picture"  # of the embedded world's held-out styles
TOYBOX_STYLE = (
    "a {} of a red car on the beach",
    "a {} of a blue duck in the snow",
    "a {} of a green bottle in the forest",
    "a {} of a white house at night",
    "a {} of a yellow cat in the city",
    "a {} of a purple mug on a table",
    "a {} of a black robot with red dots in the grass",
    "a {} of a pink fish with blue stripes in the desert",
    "a {} of a brown tree on the beach",
    "a {} of an orange teapot in the snow",
)
TOYBOX_OTHER = (
    "a photo of a red car in the city",
    "a photo of a blue duck on the beach",
    "a photo of a green bottle on a table",
    "a photo of a brown house in the snow",
    "a photo of a white cat in the grass",
    "a photo of a yellow ball in the desert",
    "a photo of a black robot with red dots at night",
    "a photo of a purple teapot on a table",
    "a photo of a green tree in the forest",
    "a photo of a pink fish with blue stripes on the beach",
    "a photo of a white mug with green stripes in the snow",
    "a drawing of a red backpack in the grass",
    "a watercolor painting of a blue car in the desert",
)
SCENES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
OBJECT_SCENES = (
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
)
CLOTHES = (
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
)
PROPERTIES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
SMALL_OBJECT = (*SCENES[:4], SCENES[5], SCENES[7], OBJECT_SCENES[2], OBJECT_SCENES[3], PROPERTIES[0], PROPERTIES[4])
SMALL_LIVE = (*SCENES[:4], SCENES[5], SCENES[7], CLOTHES[1], CLOTHES[4], PROPERTIES[1], PROPERTIES[3])
PHOTO_OTHER = (
    "a photo of a red car parked on a street",
    "a photo of a brown horse in a field",
    "a photo of a wooden chair in a living room",
    "a photo of a bowl of fruit on a table",
    "a photo of a lighthouse at sunset",
    "a photo of a yellow bicycle against a wall",
    "a photo of a man reading a newspaper",
    "a photo of a city street at night",
    "a photo of a mountain lake in autumn",
    "a photo of a blue bird on a branch",
    "a photo of a plate of pasta",
    "an oil painting of a sailing ship at sea",
    "a photo of a white cat on a sofa",
    "a photo of a dog running on grass",
)
OTHER_PROMPTS = 12
LIVE = frozenset(
    "animal baby bear bird boy cat child cow dog duck elephant fox girl hamster horse kitten lion man monkey parrot "
    "person pig puppy rabbit sheep tiger woman wolf".split()
)
# A stuffed animal wears no outfit in DreamBench: these words before the noun make a thing of it.
LIFELESS = frozenset("stuffed plush plushie toy rubber ceramic wooden paper plastic".split())
NAMES = ("toybox", "toybox-style", "small", "dreambench")


@dataclass(frozen=True)
class Shot:
    """One picture to render.

    Attributes:
        kind: subject, class or other.
        place, turn: number of the prompt within its kind, number of the seed within the prompt.
        prompt: what the model is asked.
        plain: the same with the class noun in place of the subject phrase: what CLIP-T compares with, because a
            judge cannot know a trained word.
        seed: seed of the starting noise.
    """

    kind: str
    place: int
    turn: int
    prompt: str
    plain: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.kind}-{self.place:02d}-{self.turn}.png"


@dataclass(frozen=True)
class Suite:
    """Prompts of the three kinds and how many seeds each prompt gets. Subject templates hold {} for the phrase."""

    name: str
    class_noun: str
    subject: tuple[str, ...]
    bare: tuple[str, ...]
    other: tuple[str, ...]
    seeds: Mapping[str, int] = field(default_factory=lambda: dict(SEEDS))

    def shots(self, subject: str, seed: int) -> list[Shot]:
        """Every picture of a row, in order.

        Every prompt has its own seeds, the same for every row, so that prompts are independent of one another and
        rows are comparable picture by picture. They come from a stream of their own: none was seen in training.

        Args:
            subject: phrase that names the subject, "sks backpack"; the class noun for the untouched base.
            seed: the comparison's seed.
        """
        texts = {"subject": self.subject, "class": self.bare, "other": self.other}
        return [
            Shot(kind, place, turn, fill(text, subject), fill(text, self.class_noun),
                 draws.key(seed, "evaluation", kind, place, turn) % 2**32)
            for kind in KINDS for place, text in enumerate(texts[kind]) for turn in range(self.seeds[kind])
        ]

    def describe(self) -> dict[str, Any]:
        """The suite as scores.json holds it; `seeds` numbers the seeds of a subject prompt (values: with each picture)."""
        return {"name": self.name, "subject": list(self.subject), "class": list(self.bare), "other": list(self.other),
                "seeds": list(range(self.seeds["subject"])), "seeds_per_prompt": dict(self.seeds)}


def suite(family: str, class_noun: str | None, name: str | None = None, *, seeds: Mapping[str, int] | None = None) -> Suite:
    """The evaluation suite for a base family and a class noun.

    Args:
        family: of the base; toybox has its own words.
        class_noun: the plain word for the subject.
        name: toybox, toybox-style (the subject is a way of drawing), small (10 prompts), dreambench (25 prompts), or a text file
            (see `read_prompts`); by default those of toybox on toybox, else small.
        seeds: pictures per prompt by kind, over the defaults 4 (subject), 8 (class) and 1 (other).

    Raises:
        Problem: no class noun, no suite of that name, a file without prompts, or an impossible number of seeds.
    """
    if not class_noun:
        raise Problem("The evaluation needs a class noun.", "Prompts for the untouched base and for the text score name the subject by it.",
                      "Give --class-noun, for example backpack.")
    name = name or ("small" if family != "toybox" else "toybox-style" if class_noun == STYLE_NOUN else "toybox")
    if name not in NAMES and not Path(name).expanduser().is_file():
        raise Problem(f"There is no suite {name!r}.", f"Known are {', '.join(NAMES)}, and text files of prompts.", nearest(name, NAMES))
    counts = {**SEEDS, **(seeds or {})}
    for kind, count in counts.items():
        if kind not in KINDS or int(count) < 1:
            raise Problem(f"{count!r} seeds for {kind!r} prompts are impossible.", f"The kinds are {', '.join(KINDS)}, with at least one seed each.")
    usual = _others(TOYBOX_OTHER if family == "toybox" else PHOTO_OTHER, class_noun)
    bare = (fill("a photo of a {}", class_noun),)
    if name not in NAMES:
        subject, other = read_prompts(Path(name).expanduser())
        return Suite(Path(name).name, class_noun, subject, bare, other or usual, counts)
    if name == "toybox-style":
        return Suite(name, class_noun, TOYBOX_STYLE, (fill("a {} of a mug in the grass", class_noun),), _others(TOYBOX_OTHER, class_noun), counts)
    if name == "toybox":
        return Suite(name, class_noun, TOYBOX_SUBJECT, bare, _others(TOYBOX_OTHER, class_noun), counts)
    live = is_live(class_noun)
    full = (*SCENES, *(CLOTHES if live else OBJECT_SCENES), *PROPERTIES)
    subject = full if name == "dreambench" else SMALL_LIVE if live else SMALL_OBJECT
    return Suite(name, class_noun, subject, bare, _others(PHOTO_OTHER, class_noun), counts)


def is_live(class_noun: str) -> bool:
    """Whether a class gets DreamBench's prompts for living subjects: a dog does, a stuffed animal does not."""
    words = class_noun.lower().split()
    return words[-1] in LIVE and not LIFELESS & set(words[:-1])


def read_prompts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts about the subject and about other things, from a text file.

    One prompt a line, {} standing for the subject; a line without {} is about something else. Lines that begin with # do
    not count.

    Raises:
        Problem: it is no text, or no line has {}.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Problem(f"The suite {path} is not a text file.", f"{error}.", "Write one prompt a line, with {} for the subject.") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.strip().startswith("#")))
    subject = tuple(prompt for prompt in prompts if "{}" in prompt)
    if not subject:
        raise Problem(f"The suite {path} asks for no subject.", "None of its lines has {} where the subject is to stand.",
                      "Write one prompt a line, such as: a photo of a {} on the beach")
    return subject, tuple(prompt for prompt in prompts if "{}" not in prompt)


def suite_of(comparison: Mapping[str, Any]) -> Suite:
    """The suite a comparison.json asks for: a name, or a table with name and seeds (by kind)."""
    asked = comparison.get("suite")
    table = dict(asked) if isinstance(asked, Mapping) else {"name": asked}
    return suite(comparison["family"], comparison.get("class_noun"), table.get("name"), seeds=table.get("seeds"))


def _others(prompts: tuple[str, ...], class_noun: str) -> tuple[str, ...]:
    """The first twelve prompts that do not speak of the subject's class."""
    words = set(class_noun.lower().split())
    return tuple(prompt for prompt in prompts if not words & set(prompt.split()))[:OTHER_PROMPTS]
