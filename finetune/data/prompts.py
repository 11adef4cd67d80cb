"""Prompt templates and how the subject's phrase is put into them.

The templates are those of textual inversion (Gal et al. 2022, sec. 3 and supplementary; from CLIP's ImageNet prompts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.data.picture import Picture

OBJECT_TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)

# Two of the nineteen (cropped, close-up) are in the original list twice, and so weigh double here as there.
STYLE_TEMPLATES = (
    "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
    "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
    "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
    "a close-up painting in the style of {}", "a bright painting in the style of {}",
    "a cropped painting in the style of {}", "a good painting in the style of {}",
    "a close-up painting in the style of {}", "a rendition in the style of {}", "a nice painting in the style of {}",
    "a small painting in the style of {}", "a weird painting in the style of {}", "a large painting in the style of {}",
)

_SLOT = re.compile(r"(?:\b(?P<determiner>an?|the|my|one)(?P<gap>\s+))?\{\}", re.IGNORECASE)
_OWN_DETERMINER = re.compile(r"(an?|the|my|your|our|his|her|their|this|that|one|some)\s", re.IGNORECASE)
# Words whose first sound is not that of their first letter.
_SOUNDS_CONSONANT = re.compile(r"(uni([^nm]|$)|us[aeu]|ut[ei]|eu|ewe|one\b|once\b|ukulele|u\b)", re.IGNORECASE)
_SOUNDS_VOWEL = re.compile(r"(hour|honest|honou?r|heir|x-ray)", re.IGNORECASE)


def fill(template: str, phrase: str) -> str:
    """Put `phrase` for every {} of `template`: "a photo of a {}" gives "a photo of an owl", "a photo of my dog".

    The article before the slot becomes a or an by the phrase's first sound, and steps back when the phrase brings a
    determiner of its own. A template without {} is returned as it is; other braces mean nothing.
    """
    def place(match: re.Match[str]) -> str:
        determiner, gap = match["determiner"], match["gap"]
        if not determiner or _OWN_DETERMINER.match(phrase):
            return phrase
        if determiner.lower() in ("a", "an"):
            determiner = determiner[0] + ("n" if _starts_with_vowel_sound(phrase) else "")
        return determiner + gap + phrase

    return _SLOT.sub(place, template)


def _starts_with_vowel_sound(phrase: str) -> bool:
    if _SOUNDS_VOWEL.match(phrase):
        return True
    return phrase[:1].lower() in ("a", "e", "i", "o", "u") and not _SOUNDS_CONSONANT.match(phrase)


def caption_candidates(pictures: Sequence[Picture], templates: Sequence[str], phrase: str) -> list[list[str]]:
    """Per picture the prompts a row may draw from: its own caption where it has one, else every template.

    Args:
        templates: with {} where the subject's phrase goes; captions may hold {} too.
    """
    usual = [fill(template, phrase) for template in templates]
    return [[fill(picture.caption, phrase)] if picture.caption else usual for picture in pictures]


def unnamed(pictures: Sequence[Picture], phrase: str) -> list[str]:
    """Files whose own caption never names the subject: what they show is then learnt for no word in particular."""
    return [picture.file for picture in pictures if picture.caption and phrase.lower() not in fill(picture.caption, phrase).lower()]
