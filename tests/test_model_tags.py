"""Networks named in prompts: the web UI's rules, one by one."""

from __future__ import annotations

import random

import pytest

from finetune.errors import Problem
from finetune.model.tags import Tag, Use, find, uses


@pytest.mark.parametrize(("prompt", "left", "found"), [
    ("a <lora:toy:0.8> photo", "a  photo", [Tag("lora", "toy", ["0.8"])]),
    ("<hypernet:style>", "", [Tag("hypernet", "style")]),
    ("(cat <hypernet:x:0.8>:1.2)", "(cat :1.2)", [Tag("hypernet", "x", ["0.8"])]),
    ("[<lora:x:1>:0.5]", "[:0.5]", [Tag("lora", "x", ["1"])]),
    ("a <mydog:1.2> here", "a  here", [Tag("mydog", "1.2")]),
    ("a <dog> here", "a <dog> here", []),
    ("< lora:x:1> <lora:> <lo-ra:x> lora:x:1>", "< lora:x:1> <lora:> <lo-ra:x> lora:x:1>", []),
    ("<lora:a b c:1>", "", [Tag("lora", "a b c", ["1"])]),
    ("<lora:te=0.5:toy:0.9>", "", [Tag("lora", "toy", ["te=0.5", "0.9"])]),
    ("<hypernet:a=b:1>", "", [Tag("hypernet", "a=b", ["1"])]),
    ("<lora:a=b=c:1>", "", [Tag("lora", "a=b=c", ["1"])]),  # two equals signs make no named argument
    ("<lora:te=1>", "", [Tag("lora", "", ["te=1"])]),
    ("<lora::1>", "", [Tag("lora", "", ["1"])]),
    ("<lora:<x>:1>", ":1>", [Tag("lora", "<x")]),
    ("<hypernet:b:1><lora:a><hypernet:c>", "", [Tag("hypernet", "b", ["1"]), Tag("lora", "a"), Tag("hypernet", "c")]),
    ("<lora:x\n:1>", "", [Tag("lora", "x\n", ["1"])]),
    ("", "", []),
])
def test_what_is_a_tag(prompt: str, left: str, found: list[Tag]) -> None:
    assert find(prompt) == (left, found)


@pytest.mark.parametrize(("tag", "use"), [
    ("<lora:x>", Use("lora", "x", 1.0, 1.0)),
    ("<lora:x:0.5>", Use("lora", "x", unet=0.5, text=0.5)),
    ("<lora:x:0.5:0.8>", Use("lora", "x", unet=0.8, text=0.5)),
    ("<lora:x:0.5:0.8:4>", Use("lora", "x", unet=0.8, text=0.5, rank=4)),
    ("<lora:x:te=0.5>", Use("lora", "x", unet=0.5, text=0.5)),
    ("<lora:x:unet=0.3>", Use("lora", "x", unet=0.3, text=1.0)),
    ("<lora:x:0.9:0.8:te=0.1:unet=-0.2:dyn=8>", Use("lora", "x", unet=-0.2, text=0.1, rank=8)),
    ("<lora:x:1:1:1:1:1>", Use("lora", "x", 1.0, 1.0, 1)),
    ("<lyco:x:0.5>", Use("lora", "x", 0.5, 0.5)),
    ("<hypernet:x>", Use("hypernet", "x", 1.0)),
    ("<hypernet:x:0.8>", Use("hypernet", "x", 0.8)),
    ("<hypernet:x:0.8:words:that:mean:nothing>", Use("hypernet", "x", 0.8)),
    ("<hypernet:x:-1e-1>", Use("hypernet", "x", -0.1)),
])
def test_strengths_and_defaults(tag: str, use: Use) -> None:
    assert uses(find(tag)[1]) == ([use], [])


@pytest.mark.parametrize("tag", ["<lora:x:strong>", "<lora:x:1:strong>", "<lora:x:te=strong>", "<lora:x:>", "<lora:x:nan>", "<lora:x:1:inf>",
                                 "<hypernet:x:strong>", "<hypernet:x:>", "<hypernet:x:0,8>", "<lora:x:1:1:2.5>", "<lora:x:dyn=0>"])
def test_a_strength_that_is_no_number_names_the_tag(tag: str) -> None:
    with pytest.raises(Problem) as caught:
        uses(find(f"a photo {tag} of it")[1])
    assert tag in str(caught.value) and "is not a number" in str(caught.value)


@pytest.mark.parametrize("tag", ["<lora::1>", "<lora:te=1>", "<hypernet::1>", "<lora: :1>"])
def test_a_tag_without_a_name(tag: str) -> None:
    with pytest.raises(Problem, match="names no network"):
        uses(find(tag)[1])


def test_unknown_kinds_are_told_and_passed_over() -> None:
    left, found = find("a photo of <mydog:1.2> <lora:x:weird=1>")
    used, notes = uses(found)
    assert left == "a photo of  " and used == [Use("lora", "x")]
    assert "<mydog:1.2> was taken out of the prompt" in notes[0] and "<mydog>" in notes[0]
    assert "weird=1 has no meaning" in notes[1]


def test_any_text_can_be_searched() -> None:
    letters = random.Random(0)
    for _ in range(3000):
        prompt = "".join(letters.choice("<>:=.1 alora()[]\\\n<:>") for _ in range(letters.randrange(24)))
        left, found = find(prompt)
        assert len(left) <= len(prompt) and (left == prompt) == (not found)
