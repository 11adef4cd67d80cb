"""Held-out styles: deterministic, unlike every style of the world, and showing the thing that was described."""

import numpy as np
import pytest

from finetune.toybox.datasets import describe
from finetune.toybox.styles import STYLES_HELD_OUT, _inks, asked_for, oracle, reference_pictures, save_references, shown_in
from finetune.toybox.truth import World
from finetune.toybox.world import STYLES, Picture, render
from PIL import Image


@pytest.mark.parametrize("style", STYLES_HELD_OUT.values(), ids=STYLES_HELD_OUT)
def test_a_held_out_style_has_its_own_colours_whatever_is_drawn(style):
    def mean(picture):
        return np.asarray(picture, dtype=float).mean((0, 1))

    own = np.array([mean(oracle(style, picture)) for picture in describe(40, seed=3)])
    for name in STYLES:
        theirs = np.array([mean(render(Picture(**{**vars(one), "style": name}))) for one in describe(40, seed=3)])
        apart = np.linalg.norm(own.mean(0) - theirs.mean(0))
        assert apart > 2 * np.linalg.norm(own.std(0)) or apart > 60


@pytest.mark.parametrize("style", STYLES_HELD_OUT.values(), ids=STYLES_HELD_OUT)
def test_references_show_different_things_and_never_change(style, tmp_path):
    pictures = reference_pictures(style, 10)
    assert len(pictures) == 10 and len({picture.tobytes() for picture in pictures}) == 10
    assert [picture.tobytes() for picture in reference_pictures(style, 10)] == [picture.tobytes() for picture in pictures]
    paths = save_references(style, tmp_path, 3)
    assert [path.name for path in paths] == ["1.png", "2.png", "3.png"]
    for path, picture in zip(paths, shown_in(style, 3), strict=True):
        asked = World().parse(path.with_suffix(".txt").read_text().format("picture"))
        assert "style" not in asked and asked["class"] == picture.noun and asked["scene"] == picture.scene and asked["colour"] == picture.colour
    assert np.array_equal(np.asarray(Image.open(paths[0])), np.asarray(reference_pictures(style, 3)[0]))


@pytest.mark.parametrize("style", STYLES_HELD_OUT.values(), ids=STYLES_HELD_OUT)
def test_the_truth_of_a_style_keeps_to_the_prompt_and_leaves_the_rest_free(style):
    world = World()
    assert world.knows(style.name)
    asked = world.parse("a picture of a black robot with red dots in the grass")
    for picture in asked_for(asked, 6, seed=3):
        assert (picture.noun, picture.colour, picture.pattern, picture.scene) == ("robot", "black", "dotted", "grass") and picture.second != "black"
    free = asked_for(world.parse("a picture of a mug"), 12, seed=3)
    assert {picture.noun for picture in free} == {"mug"} and len({picture.scene for picture in free}) > 5 and len({picture.colour for picture in free}) > 3
    drawn = world.true_pictures("a picture of a red car on the beach", style.name, 3, seed=1)
    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in world.true_pictures("a picture of a red car on the beach", style.name, 3, seed=1)]
    assert len({one.tobytes() for one in drawn}) == 3


def test_the_pictures_of_a_style_are_recognised(tmp_path):
    for style in STYLES_HELD_OUT.values():
        assert World().subject_of(save_references(style, tmp_path / style.name)) == style.name


def test_inks_meet_their_colours_at_black_and_white():
    inks = ((10, 20, 30), (100, 110, 120), (200, 210, 220))
    ends = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    assert np.asarray(_inks(ends, inks, 1.0)).tolist() == [[[10, 20, 30], [200, 210, 220]]]
    grey = Image.fromarray(np.full((1, 1, 3), 64, dtype=np.uint8))  # halfway between the first two inks
    assert np.abs(np.asarray(_inks(grey, inks, 1.0))[0, 0].astype(int) - [55, 65, 75]).max() <= 1
