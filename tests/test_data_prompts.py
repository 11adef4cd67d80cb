"""Templates and the article before the subject."""

from pathlib import Path

import pytest

from finetune.data import OBJECT_TEMPLATES, STYLE_TEMPLATES, Picture, caption_candidates, fill, unnamed


@pytest.mark.parametrize("template, phrase, wanted", [
    ("a photo of a {}", "sks dog", "a photo of a sks dog"),
    ("a photo of a {}", "owl", "a photo of an owl"),
    ("a photo of an {}", "dog", "a photo of a dog"),
    ("a photo of a {}", "unicorn", "a photo of a unicorn"),
    ("a photo of a {}", "umbrella", "a photo of an umbrella"),
    ("a photo of a {}", "uninspired cat", "a photo of an uninspired cat"),
    ("a photo of a {}", "hourglass", "a photo of an hourglass"),
    ("a photo of a {}", "<toy>", "a photo of a <toy>"),
    ("a photo of a {}", "my dog", "a photo of my dog"),
    ("a photo of the {}", "an owl", "a photo of an owl"),
    ("a photo of my {}", "owl", "a photo of my owl"),
    ("A {} on a {}", "owl", "An owl on an owl"),
    ("a {0} photo of {}", "x", "a {0} photo of x"),
    ("a painting in the style of {}", "<ink>", "a painting in the style of <ink>"),
    ("panda {}", "owl", "panda owl"),
    ("nothing to fill", "owl", "nothing to fill"),
    ("a {}", r"\1 back\slash", r"a \1 back\slash"),
])
def test_fill(template, phrase, wanted):
    assert fill(template, phrase) == wanted


def test_templates_are_the_usual_ones():
    assert len(OBJECT_TEMPLATES) == len(set(OBJECT_TEMPLATES)) == 27
    assert len(STYLE_TEMPLATES) == 19
    assert all(template.count("{}") == 1 for template in OBJECT_TEMPLATES + STYLE_TEMPLATES)
    assert all("in the style of {}" in template for template in STYLE_TEMPLATES)


def pictures_with(*captions):
    return [Picture(name, Path(name), caption, "", "", (1, 1)) for name, caption in zip("abcd", captions, strict=False)]


def test_own_captions_win_over_templates():
    pictures = pictures_with(None, "a {} in a field", "a red car")
    assert caption_candidates(pictures, ["a photo of a {}", "the {}"], "owl") == [
        ["a photo of an owl", "the owl"], ["an owl in a field"], ["a red car"]]


def test_captions_that_never_name_the_subject():
    assert unnamed(pictures_with(None, "a {} in a field", "a red car", "An OWL"), "owl") == ["c"]
