"""What the rendered world knows, for `finetune.evaluation.truth`: prompts read, subjects drawn, pictures read by the ruler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from finetune.evaluation.judge import Judge
from finetune.toybox import styles
from finetune.toybox.captions import KINDS, SCENE_WORDS, STYLE_WORDS
from finetune.toybox.ruler import Ruler
from finetune.toybox.scenes import SIDE
from finetune.toybox.styles import STYLES_HELD_OUT
from finetune.toybox.subjects import SUBJECTS, Subject, oracle, reference_pictures
from finetune.toybox.world import COLOUR_NAMES, NOUN_NAMES, SCENE_NAMES

WEIGHTS = Path(__file__).resolve().parent / "weights"
MOST_REFERENCES = 10


class World:
    """The truth of the rendered world; see `finetune.evaluation.truth.Truth`.

    Args:
        weights: folder with `ruler.safetensors` and, where the judge was measured, `metrics.json` (see `foils`).
    """

    note = "The world is drawn, so the truth is known: it can be drawn for any prompt, and read from any picture."

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self.weights = Path(weights)

    def parse(self, prompt: str) -> dict[str, str]:
        """The attributes a prompt names, by the kinds of `captions.KINDS`; a silent prompt asks for nothing."""
        words = prompt.lower().replace(",", " ").split()
        text = f" {' '.join(words)} "
        found: dict[str, str] = {}
        noun = next((place for place, word in enumerate(words) if word in NOUN_NAMES), None)
        if noun is not None:
            found["class"] = words[noun]
            if words[noun - 1] in COLOUR_NAMES and noun > 0:
                found["colour"] = words[noun - 1]
        if "two-tone" in words:
            place = words.index("two-tone")
            found["pattern"] = "two-tone"
            found.pop("colour", None)  # the word before the noun is the second colour
            if words[place + 1 : place + 2] and words[place + 1] in COLOUR_NAMES:
                found["colour"] = words[place + 1]
        elif "stripes" in words or "dots" in words:
            found["pattern"] = "striped" if "stripes" in words else "dotted"
        for kind, table in (("scene", SCENE_WORDS), ("style", STYLE_WORDS)):
            for value, phrases in table.items():
                if any(f" {phrase} " in text for phrase in phrases):
                    found[kind] = value
        if "style" not in found and " photo of " in text:
            found["style"] = "photo"
        return {kind: found[kind] for kind in KINDS if kind in found}

    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """Every attribute of each picture, by the ruler; pictures of other sizes are reduced to the world's."""
        if not pictures:
            return []
        squares = [picture.convert("RGB") for picture in pictures]
        squares = [one if one.size == (SIDE, SIDE) else one.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in squares]
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in squares])).permute(0, 3, 1, 2).float() / 255
        found = self._ruler.read(pixels)
        return [{kind: values[int(found[kind][place])] for kind, values in KINDS.items()} for place in range(len(pictures))]

    def subject_of(self, files: Sequence[Path]) -> str | None:
        """The subject all of whose given pictures are its own reference pictures, pixel by pixel."""
        shown = []
        for file in files:
            try:
                with Image.open(file) as picture:
                    shown.append(_digest(picture) if picture.size == (SIDE, SIDE) else "")
            except (OSError, UnidentifiedImageError):
                return None  # whoever needs the picture refuses it with a better sentence
        return next((name for name, own in self._references.items() if shown and own.issuperset(shown)), None)

    def knows(self, subject: str) -> bool:
        """Whether there is a subject or a held-out style of this name."""
        return subject in SUBJECTS or subject in STYLES_HELD_OUT

    def true_pictures(self, prompt: str, subject: str, count: int, seed: int) -> list[Image.Image]:
        """The true subject as a prompt asks for it, in a photo where no style is named and in each place in turn where none is.

        Of a held-out style: the thing and place asked for, drawn in it.
        """
        if subject in STYLES_HELD_OUT:
            style = STYLES_HELD_OUT[subject]
            return [styles.oracle(style, picture) for picture in styles.asked_for(self.parse(prompt), count, seed)]
        return draw_asked(SUBJECTS[subject], self.parse(prompt), count, seed)

    def errors(self, judge: Judge) -> Mapping[str, Mapping[str, Any]]:
        """What `finetune.toybox.foils` measured, if it was this judge and this ruler that it measured."""
        path = self.weights / "metrics.json"
        if not path.is_file():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["judge"] == judge.fingerprint() and found["ruler"] == self.fingerprint()
        return found["metrics"] if same else {}

    def fingerprint(self) -> str:
        """Hash of the ruler's weights."""
        return hashlib.sha256((self.weights / "ruler.safetensors").read_bytes()).hexdigest()[:16]

    @cached_property
    def _ruler(self) -> Ruler:
        return Ruler.load(self.weights / "ruler.safetensors")

    @cached_property
    def _references(self) -> dict[str, set[str]]:
        own = {name: reference_pictures(subject, MOST_REFERENCES) for name, subject in SUBJECTS.items()}
        own |= {name: styles.reference_pictures(style, MOST_REFERENCES) for name, style in STYLES_HELD_OUT.items()}
        return {name: {_digest(picture) for picture in pictures} for name, pictures in own.items()}


def open_truth() -> World:
    """The world as it is shipped."""
    return World()


def draw_asked(subject: Subject, asked: Mapping[str, str], count: int, seed: int) -> list[Image.Image]:
    """A subject (64 x 64) in the scene and style that are asked for; each place in turn where none is."""
    scenes = [asked["scene"]] * count if "scene" in asked else [SCENE_NAMES[(seed + turn) % len(SCENE_NAMES)] for turn in range(count)]
    return [oracle(subject, scene, asked.get("style", "photo"), seed * 1000 + turn) for turn, scene in enumerate(scenes)]


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
