"""Networks named in a prompt, `<lora:NAME:0.8>`, by the rules of AUTOMATIC1111's web UI.

A tag is `<`, word characters, `:`, anything but `>`, `>`. Everything of that shape is taken out of the prompt before
brackets are read, so brackets around a tag do not scale it and `(cat <hypernet:x:0.8>:1.2)` leaves `(cat :1.2)`.
What follows the first colon is split at colons. Where the web UI drops a network without a word because an argument is
no number, here it is a Problem.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from finetune.errors import Problem

KINDS = {"lora": "lora", "lyco": "lora", "hypernet": "hypernet"}  # as written -> what it is; the web UI reads lyco as lora
NAMED = ("te", "unet", "dyn")
_TAG = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True)
class Tag:
    """One tag as written.

    Attributes:
        kind: the word before the first colon.
        name: the first argument; for a LoRA the first that is not `word=value`. Empty when there is none.
        args: the other arguments in their order.
    """

    kind: str
    name: str
    args: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"<{':'.join([self.kind, self.name, *self.args])}>"


@dataclass(frozen=True)
class Use:
    """A network to load and how much of it.

    Attributes:
        kind: "lora" or "hypernet".
        unet: strength on the UNet; of a hypernetwork its multiplier.
        text: strength on the text encoder (LoRA only).
        rank: keep only the first `rank` of a LoRA's inner dimensions, its scale unchanged; None keeps all.
    """

    kind: str
    name: str
    unet: float = 1.0
    text: float = 1.0
    rank: int | None = None


def find(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags in order."""
    found: list[Tag] = []

    def take(match: re.Match[str]) -> str:
        kind, items = match[1], match[2].split(":")
        place = 0
        if KINDS.get(kind) == "lora":
            place = next((number for number, item in enumerate(items) if _named(item) is None), len(items))
        name = items[place] if place < len(items) else ""
        found.append(Tag(kind, name, items[:place] + items[place + 1:]))
        return ""

    return _TAG.sub(take, prompt), found


def uses(tags: list[Tag]) -> tuple[list[Use], list[str]]:
    """Tags as networks to load, in order, and a note for each thing that was passed over.

    `<lora:NAME:TE:UNET:DYN>` with `te=`, `unet=`, `dyn=` for the same; without TE it is 1, without UNET it is TE.
    `<hypernet:NAME:M>` without M is 1; what follows M has no meaning.

    Raises:
        Problem: a tag without a name, or a strength that is no number.
    """
    found: list[Use] = []
    notes: list[str] = []
    for tag in tags:
        kind = KINDS.get(tag.kind)
        if kind is None:
            notes.append(f"{tag} was taken out of the prompt: anything of that shape names a network, and {tag.kind!r} is no known kind "
                         f"(lora, hypernet). A word of your own has no colon, as in <{tag.kind}>.")
            continue
        if not tag.name.strip():
            raise Problem(f"The tag {tag} names no network.", f"The name comes first, as in <{tag.kind}:NAME:0.8>.")
        found.append(_lora(tag, notes) if kind == "lora" else Use(kind, tag.name, _number(tag, tag.args[0]) if tag.args else 1.0))
    return found, notes


def _lora(tag: Tag, notes: list[str]) -> Use:
    """Positional arguments first, then those with a name, which win."""
    places = [item for item in tag.args if _named(item) is None]
    named = dict(pair for item in tag.args if (pair := _named(item)) is not None)
    notes += [f"{tag}: {word}={value} has no meaning; known are te=, unet= and dyn=." for word, value in named.items() if word not in NAMED]
    text = _number(tag, places[0]) if places else 1.0
    text = _number(tag, named["te"]) if "te" in named else text
    unet = _number(tag, places[1]) if len(places) > 1 else text
    unet = _number(tag, named["unet"]) if "unet" in named else unet
    rank = named.get("dyn", places[2] if len(places) > 2 else None)
    return Use("lora", tag.name, unet, text, None if rank is None else _rank(tag, rank))


def _named(item: str) -> tuple[str, str] | None:
    """`word=value` as a pair; with no or several equals signs it is a plain argument."""
    word, *rest = item.split("=")
    return (word, rest[0]) if len(rest) == 1 else None


def _number(tag: Tag, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Problem(f"In the tag {tag}, {text!r} is not a number.", "A strength says how much of a network is applied.",
                      f"Write a number such as <{tag.kind}:{tag.name}:0.8>, or leave it out for 1.")
    return value


def _rank(tag: Tag, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise Problem(f"In the tag {tag}, {text!r} is not a number of dimensions.", "The fourth argument (or dyn=) cuts a LoRA to its first ranks.",
                      "Write a whole number from 1 on, or leave it out.")
    return value
