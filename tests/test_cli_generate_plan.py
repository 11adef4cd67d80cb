"""Axes, the pictures they cross to, and sheets whose labels can be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.cli.generate_artifacts import Artifact
from finetune.cli.generate_plan import Job, axis, plan
from finetune.cli.generate_sheet import GAP, font, sheet, wrap
from finetune.errors import Problem

FIRST = Job(1, "", "", (), 0, 25, 4.0, "dpm++", 1.0)


def planned(prompts=("a dog",), seeds=(0,), x=None, y=None, first=FIRST, told=None):
    return plan(first, list(prompts), list(seeds), x and axis("--x", x, set(), None), y and axis("--y", y, set(), None),
                told or {prompt: (prompt, ()) for prompt in prompts})


def test_without_axes_prompts_go_down_and_seeds_across():
    jobs, sheets = planned(["a dog", "a cat"], [3, 4, 5])
    assert [job.file for job in jobs] == ["01-3.png", "01-4.png", "01-5.png", "02-3.png", "02-4.png", "02-5.png"]
    assert [job.place for job in jobs] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)]
    assert sheets.columns == ("seed 3", "seed 4", "seed 5") and sheets.rows == ("a dog", "a cat") and sheets.titles == ("",)


def test_two_axes_cross_and_say_so_in_the_name():
    jobs, sheets = planned(x="steps=5,10", y="guidance=1,7.5")
    assert [(job.guidance, job.steps) for job in jobs] == [(1, 5), (1, 10), (7.5, 5), (7.5, 10)]
    assert [job.file for job in jobs] == ["01-0-guidance1-steps5.png", "01-0-guidance1-steps10.png", "01-0-guidance7.5-steps5.png",
                                          "01-0-guidance7.5-steps10.png"]
    assert sheets.columns == ("5 steps", "10 steps") and sheets.rows == ("guidance 1", "guidance 7.5") and sheets.titles == ("a dog; seed 0",)


def test_what_is_not_on_a_side_makes_sheets():
    jobs, sheets = planned(["a dog", "a cat"], [1, 2], x="sampler=ddim,euler-a", y="denoising-strength=0.5,1")
    assert len(jobs) == 16 and len({job.file for job in jobs}) == 16 and len({job.place for job in jobs}) == 16
    assert sheets.titles == ("a dog; seed 1", "a dog; seed 2", "a cat; seed 1", "a cat; seed 2")


@pytest.mark.parametrize(("prompts", "seeds", "rows"), [(["a", "b"], [0], ("a", "b")), (["a"], [0, 1], ("seed 0", "seed 1")), (["a"], [0], ("",))])
def test_one_axis_gets_the_more_numerous_beside_it(prompts, seeds, rows):
    _, sheets = planned(prompts, seeds, x="steps=1,2")
    assert sheets.columns == ("1 steps", "2 steps") and sheets.rows == rows


def test_artifact_and_strength_axes(tmp_path):
    for name in ("toy", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    fixed = Artifact(tmp_path / "toy.safetensors", 0.3)
    told = {"a dog": ("a dog", (Artifact(tmp_path / "other.safetensors", 0.9, 0.1, origin="prompt"),))}
    jobs, sheets = planned(x=f"artifact=none,{tmp_path}/other.safetensors:0.5", y="strength=0,2", first=Job(1, "", "", (fixed,), 0, 1, 1, "ddim", 1), told=told)
    assert sheets.columns == ("no artifact", "other:0.5") and sheets.rows == ("strength 0", "strength 2")
    assert [[one.strength for one in job.artifacts] for job in jobs] == [[0, 0], [0, 0, 0], [2, 2], [2, 2, 2]]
    assert all(one.text is None for job in jobs for one in job.artifacts)
    assert [[one.path.stem for one in job.artifacts] for job in jobs[:2]] == [["toy", "other"], ["toy", "other", "other"]]


def test_prompts_with_commas_are_split_by_bars():
    found = axis("--x", "prompt=a dog, sitting|a cat", set(), None)
    assert found.values == ("a dog, sitting", "a cat")


@pytest.mark.parametrize(("told", "given", "words"), [
    ("stesp=1", set(), "Did you mean 'steps'"), ("steps", set(), "Write AXIS=V1,V2"), ("steps=1,,2", set(), "empty value"), ("steps=1.5", set(), "without a fraction"),
    ("guidance=x", set(), "not a number"), ("denoising-strength=2", set(), "between 0 and 1"), ("guidance=nan", set(), "out of bounds"),
    ("sampler=eulr", set(), "Did you mean 'euler'"), ("steps=1,2", {"steps"}, "--steps were both given"), ("seed=1", {"count"}, "--count were both given"),
    ("artifact=nowhere", set(), "no artifact at nowhere")])
def test_axes_that_make_no_sense_are_refused(told, given, words):
    with pytest.raises(Problem) as caught:
        axis("--x", told, given, None)
    assert words in str(caught.value)


def test_the_same_axis_twice_is_refused():
    with pytest.raises(Problem, match="both steps"):
        planned(x="steps=1", y="steps=2")


def test_wrapped_labels_lose_no_letter_and_fit():
    letters = font(13)
    for text in ("a photo of sks dog in the snow at night", "Donaudampfschifffahrtsgesellschaftskapitän", "山" * 40, ""):
        lines = wrap(text, letters, 90)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "") and all(letters.getlength(line) <= 90 for line in lines)


def test_sheet_holds_every_picture_enlarged_and_every_label():
    pictures = [[Image.new("RGB", (32, 16), (40 * row, 60 * column, 200)) for column in range(3)] for row in range(2)]
    pictures[1][2] = None
    found = np.asarray(sheet(pictures, ["one", "two", "three"], ["a rather long label of a row that wraps onto several lines", "b"], "what all share"))
    for row in range(2):
        for column in range(3):
            colour = (40 * row, 60 * column, 200)
            assert (found == colour).all(-1).sum() == (0 if (row, column) == (1, 2) else 160 * 80)
    bare = np.asarray(sheet(pictures, ["", "", ""], ["", ""]))
    assert bare.shape == (2 * 80 + 3 * GAP, 3 * 160 + 4 * GAP, 3)
    assert (found < 64).all(-1).sum() > 300  # letters


def test_large_pictures_are_not_enlarged():
    assert sheet([[Image.new("RGB", (512, 512))]], [""], [""]).size == (512 + 2 * GAP, 512 + 2 * GAP)
