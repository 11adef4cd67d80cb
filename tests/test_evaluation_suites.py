"""The prompts that are asked, their seeds, and that the toybox suite speaks the toybox's language."""

import hashlib

import pytest

from finetune import draws
from finetune.errors import Problem
from finetune.evaluation.suites import (
    CLOTHES, OBJECT_SCENES, PROPERTIES, SCENES, TOYBOX_OTHER, TOYBOX_SUBJECT, suite, suite_of)
from finetune.toybox.captions import SCENE_WORDS, STYLE_WORDS, full_caption
from finetune.toybox.world import COLOUR_NAMES, NOUN_NAMES, PATTERNS, STYLES, Picture, held_out, seconds_for


def captions(noun: str, colour: str, pattern: str = "plain", second: str | None = None) -> set[str]:
    return {full_caption(Picture(noun, colour, second, pattern, scene, style)) for scene in SCENE_WORDS for style in STYLES}


def test_toybox_subject_prompts_are_captions_of_the_world():
    colourless = {caption.replace("red ", "") for caption in captions("mug", "red")}
    styles = {f"{STYLE_WORDS[style][0]} a mug" for style in STYLES}
    assert {template.format("mug") for template in TOYBOX_SUBJECT} <= colourless | styles
    assert len(set(TOYBOX_SUBJECT)) == 10
    for words in SCENE_WORDS.values():
        assert sum(template.endswith(words[0]) for template in TOYBOX_SUBJECT) == 1


def test_toybox_other_prompts_are_captions_of_looks_the_base_has_seen():
    for prompt in TOYBOX_OTHER:
        noun = next(noun for noun in NOUN_NAMES if noun in prompt.split())
        looks = [(colour, pattern, second) for colour in COLOUR_NAMES for pattern in PATTERNS
                 for second in (seconds_for(colour) if pattern != "plain" else (None,))]
        look = next(look for look in looks if prompt in captions(noun, look[0], look[1], look[2]))
        assert not held_out(noun, look[0], look[1]), prompt


@pytest.mark.parametrize("noun", ["mug", "backpack", "cat"])
def test_other_prompts_never_speak_of_the_subject_class(noun):
    for family in ("toybox", "sd1"):
        other = suite(family, noun).other
        assert len(other) == 12 and not any(noun in prompt.split() for prompt in other)


def test_a_style_of_the_embedded_world_is_asked_for_things_and_places():
    style = suite("toybox", "picture")
    assert style.name == "toybox-style" and len(style.subject) == 10 and style.bare == ("a picture of a mug in the grass",)
    assert style.shots("sks picture", 0)[0].prompt == "a sks picture of a red car on the beach"
    assert suite("sd1", "picture").name == "small"


def test_numbers_of_pictures():
    kinds = [shot.kind for shot in suite("toybox", "mug").shots("sks mug", 0)]
    assert [kinds.count(kind) for kind in ("subject", "class", "other")] == [40, 8, 12]
    assert len(suite("sd1", "mug").subject) == 10
    assert len(suite("sd1", "mug", "dreambench").shots("sks mug", 0)) == 25 * 4 + 8 + 12
    few = suite("toybox", "mug", seeds={"subject": 2, "class": 3}).shots("sks mug", 0)
    assert len(few) == 20 + 3 + 12 and few[1].file == "subject-00-1.png"


def test_dreambench_lists_for_things_and_for_animals():
    thing, animal = suite("sd1", "backpack", "dreambench").subject, suite("sd1", "dog", "dreambench").subject
    assert thing == SCENES + OBJECT_SCENES + PROPERTIES and animal == SCENES + CLOTHES + PROPERTIES
    assert len(set(thing)) == len(set(animal)) == 25
    assert set(suite("sd1", "dog").subject) < set(animal) and set(suite("sd1", "vase").subject) < set(thing)


def test_dreambench_words_are_the_published_ones():
    """Hash of the lines of google/dreambooth, dataset/prompts_and_classes.txt (commit 4f887af), token taken out, in their order."""
    for noun, wanted in (("vase", "351df13940ddefc3193cfa8490079cc968387fa106d5e545f899aa2217d58c11"), ("dog", "4ba00988f0dc5dfbef75592a37ef12b570521098bea589a7d9b35b9dd8fcfa71")):
        text = "\n".join(suite("sd1", noun, "dreambench").subject)
        assert hashlib.sha256(text.encode()).hexdigest() == wanted


@pytest.mark.parametrize(("noun", "live"), [("dog", True), ("big cat", True), ("stuffed animal", False), ("toy", False), ("rubber duck", False)])
def test_a_stuffed_animal_is_a_thing(noun, live):
    assert (CLOTHES[0] in suite("sd1", noun, "dreambench").subject) == live


def test_a_text_file_is_a_suite(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# about us\na photo of a {} at sea\n\na {} made of glass\na photo of a {} at sea\na horse\n", encoding="utf-8")
    own = suite("sd1", "owl", str(path))
    assert own.subject == ("a photo of a {} at sea", "a {} made of glass") and own.other == ("a horse",) and own.name == "mine.txt"
    assert own.shots("sks owl", 0)[4].prompt == "a sks owl made of glass" and own.bare == ("a photo of an owl",)
    path.write_text("a {} in a box\n", encoding="utf-8")
    assert suite_of({"family": "sd1", "class_noun": "owl", "suite": {"name": str(path)}}).other == suite("sd1", "owl").other
    path.write_text("a box\n", encoding="utf-8")
    with pytest.raises(Problem, match="asks for no subject"):
        suite("sd1", "owl", str(path))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(Problem, match="not a text file"):
        suite("sd1", "owl", str(path))


def test_prompts_name_the_subject_and_plain_texts_the_noun():
    shots = suite("toybox", "mug").shots("<toy>", 0)
    assert (shots[0].prompt, shots[0].plain) == ("a photo of a <toy> on the beach", "a photo of a mug on the beach")
    bare = [shot for shot in shots if shot.kind == "class"]
    assert {shot.prompt for shot in bare} == {shot.plain for shot in bare} == {"a photo of a mug"}
    assert suite("sd1", "owl").shots("owl", 0)[0].prompt == "an owl in the jungle"


def test_rows_share_seeds_and_prompts_do_not():
    one, two = (suite("toybox", "mug").shots(subject, 5) for subject in ("sks mug", "mug"))
    assert [shot.seed for shot in one] == [shot.seed for shot in two]
    assert len({shot.seed for shot in one}) == len(one)
    assert {shot.seed for shot in one}.isdisjoint(shot.seed for shot in suite("toybox", "mug").shots("mug", 6))
    assert one[0].seed == draws.key(5, "evaluation", "subject", 0, 0) % 2**32


def test_suite_of_a_comparison():
    plain = suite_of({"family": "toybox", "class_noun": "mug", "suite": "toybox"})
    table = suite_of({"family": "toybox", "class_noun": "mug", "suite": {"name": None, "seeds": {"subject": 1}}})
    assert plain.subject == table.subject and (plain.seeds["subject"], table.seeds["subject"]) == (4, 1)
    assert table.describe()["seeds"] == [0]


def test_refusals_name_the_value():
    with pytest.raises(Problem, match="dreambnch.*Did you mean 'dreambench'"):
        suite("sd1", "mug", "dreambnch")
    with pytest.raises(Problem, match="class noun"):
        suite("toybox", None)
    with pytest.raises(Problem, match="0 seeds for 'class'"):
        suite("toybox", "mug", seeds={"class": 0})
