"""What the world says of prompts and pictures, and that evaluation finds it by the family's name."""

import json

import numpy as np
from PIL import Image

from finetune.evaluation import open_judge
from finetune.evaluation.suites import TOYBOX_OTHER, suite
from finetune.evaluation.truth import open_truth
from finetune.toybox.captions import KINDS, attributes, caption, full_caption
from finetune.toybox.datasets import describe
from finetune.toybox.subjects import SUBJECTS, oracle, reference_pictures, save_references
from finetune.toybox.truth import WEIGHTS, World, open_truth as world_truth
from finetune.toybox.world import render

WORLD = World()


def test_full_captions_are_read_back():
    for picture in describe(300, 5, held=None):
        named = {kind: KINDS[kind][place] for kind, place in attributes(picture).items()}
        if picture.pattern == "plain":
            del named["pattern"]  # never named
        assert WORLD.parse(full_caption(picture)) == named


def test_captions_with_words_left_out_ask_only_for_what_they_name():
    from random import Random

    for place, picture in enumerate(describe(300, 6, held=None)):
        said = caption(picture, Random(place), identifiers=0.3)
        named = {"class": said.noun, "colour": said.colour, "pattern": said.pattern, "scene": said.scene, "style": said.style}
        assert WORLD.parse(said.text) == {kind: value for kind, value in named.items() if value}, said.text


def test_every_prompt_of_the_suite_names_something():
    for shot in suite("toybox", "backpack").shots("backpack", 0):
        asked = WORLD.parse(shot.plain)
        assert asked["style"] and (shot.kind == "other" or asked["class"] == "backpack")
    assert WORLD.parse(TOYBOX_OTHER[6]) == {"class": "robot", "colour": "black", "pattern": "dotted", "scene": "night", "style": "photo"}
    assert WORLD.parse("an oil painting of a sailing ship at sea") == {}


def test_the_ruler_reads_true_pictures_of_any_size():
    pictures = describe(60, 8)
    shown = [render(picture) for picture in pictures]
    read = WORLD.read(shown)
    right = [KINDS["scene"][attributes(picture)["scene"]] == one["scene"] for picture, one in zip(pictures, read, strict=True)]
    assert np.mean(right) > 0.95 and set(read[0]) == set(KINDS)
    assert WORLD.read([shown[0].resize((512, 512), Image.Resampling.NEAREST)])[0]["scene"] == read[0]["scene"]
    assert WORLD.read([]) == []


def test_subjects_are_known_by_their_pictures(tmp_path):
    files = save_references(SUBJECTS["teal-backpack"], tmp_path / "ten", 10)
    assert WORLD.subject_of(files) == WORLD.subject_of(files[3:4]) == "teal-backpack"
    shipped = sorted((WEIGHTS.parent / "pictures" / "cat").glob("*.png"))
    assert WORLD.subject_of(shipped) == "lilac-cat"
    assert WORLD.subject_of([*files, shipped[0]]) is None and WORLD.subject_of([]) is None
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert WORLD.subject_of([*files, tmp_path / "broken.png"]) is None


def test_true_pictures_are_the_subject_as_asked():
    night = WORLD.true_pictures("a photo of a backpack at night", "teal-backpack", 3, 7)
    wanted = oracle(SUBJECTS["teal-backpack"], "night", "photo", 7000)
    assert np.array_equal(np.asarray(night[0]), np.asarray(wanted)) and len(night) == 3
    places = [one["scene"] for one in WORLD.read(WORLD.true_pictures("a drawing of a backpack", "teal-backpack", 8, 7))]
    assert len(set(places)) >= 7
    real = {picture.tobytes() for picture in reference_pictures(SUBJECTS["teal-backpack"], 10)}
    assert not any(picture.tobytes() in real for picture in night)


def test_only_a_family_with_a_world_has_a_truth():
    assert isinstance(open_truth("toybox"), World) and isinstance(world_truth(), World)
    assert [open_truth(family) for family in ("sd1", "sd2", "cli", "report", "../toybox", "toybox.truth", "")] == [None] * 7


def test_errors_hold_for_the_measured_judge_alone(tmp_path):
    judge = open_judge("toybox")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "ruler.safetensors").write_bytes((WEIGHTS / "ruler.safetensors").read_bytes())
    world = World(weights)
    assert world.errors(judge) == {}
    noted = {"judge": judge.fingerprint(), "ruler": world.fingerprint(), "metrics": {"dino": {"rate": 0.1, "pairs": 10}}}
    (weights / "metrics.json").write_text(json.dumps(noted))
    assert world.errors(judge) == noted["metrics"]
    (weights / "metrics.json").write_text(json.dumps({**noted, "judge": "another"}))
    assert world.errors(judge) == {}
    (weights / "metrics.json").write_text(json.dumps({**noted, "ruler": "another"}))
    assert world.errors(judge) == {}


def test_the_shipped_rates_are_of_the_shipped_judge():
    errors = WORLD.errors(open_judge("toybox"))
    assert errors, "the judge or the ruler was trained again: run python -m finetune.toybox.foils --output finetune/toybox/weights/metrics.json"
    for key in ("clip_i", "dino", "clip_t", "asked", "other_drift", "kept", "leak", "diversity", "copy", "oracle", "kid"):
        assert errors[key]["pairs"] >= 500 and errors[key]["low"] <= errors[key]["rate"] <= errors[key]["high"]
