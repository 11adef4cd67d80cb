"""`finetune toybox`: image folders other programs load, sheets, lists, and flags that belong to the action."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.cli.app import run
from finetune.data.intake import scan
from finetune.errors import Problem
from finetune.toybox.captions import full_caption
from finetune.toybox.datasets import held_out_triples
from finetune.toybox.imagefolder import Item, picture_of, world_items, write_folder
from finetune.toybox.sheet import contact_sheet
from finetune.toybox.subjects import SUBJECTS, reference_pictures
from finetune.toybox.world import NOUN_NAMES, SCENE_NAMES, STYLES, draw, held_out, render, render_shot, shot


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def rendered(tmp_path: Path, *words: str) -> Path:
    assert run(["toybox", "render", "--output", str(tmp_path / "made"), *words]) == 0
    return tmp_path / "made"


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["toybox", *words]) == 2
    return " ".join(capfd.readouterr().err.split())


def test_every_row_draws_its_picture_again(tmp_path):
    folder = rendered(tmp_path, "--count", "30", "--seed", "5", "--masks", "--depth")
    found = rows(folder)
    assert len(found) == 30 and len(list(folder.glob("*.png"))) == 30
    for row in found:
        picture = picture_of(row)
        taken = render_shot(picture)
        assert np.array_equal(pixels(folder / row["file_name"]), np.asarray(taken.picture))
        assert np.array_equal(pixels(folder / row["mask_file_name"]), np.asarray(taken.mask))
        assert np.array_equal(pixels(folder / row["depth_file_name"]), np.asarray(taken.depth))
        assert row["text"] == full_caption(picture)
        assert row["held_out"] is held_out(picture.noun, picture.colour, picture.pattern) is False


def test_the_same_seed_makes_the_same_folder_and_a_longer_one_begins_like_a_shorter(tmp_path):
    one, two = rendered(tmp_path / "one", "--count", "8", "--seed", "3"), rendered(tmp_path / "two", "--count", "12", "--seed", "3")
    assert rows(one) == rows(two)[:8]
    for row in rows(one):
        assert (one / row["file_name"]).read_bytes() == (two / row["file_name"]).read_bytes()
    assert rows(rendered(tmp_path / "three", "--count", "8", "--seed", "4")) != rows(one)
    assert not list(tmp_path.rglob("*.part"))


def test_the_datasets_library_loads_it_with_masks_and_depth_as_columns(tmp_path, monkeypatch):
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    folder = rendered(tmp_path, "--count", "6", "--masks", "--depth")
    loaded = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 6
    assert all(isinstance(loaded.features[name], ImageColumn) for name in ("image", "mask", "depth"))
    for row, told in zip(loaded, rows(folder), strict=True):
        assert {name: row[name] for name in ("text", "noun", "colour", "second", "pattern", "scene", "style", "seed", "held_out")} == {
            name: value for name, value in told.items() if not name.endswith("file_name")}
        taken = render_shot(picture_of(row))
        assert np.array_equal(np.asarray(row["image"]), np.asarray(taken.picture))
        assert np.array_equal(np.asarray(row["mask"]), np.asarray(taken.mask))
        assert np.array_equal(np.asarray(row["depth"]), np.asarray(taken.depth))


def test_our_own_intake_reads_pictures_and_captions_and_nothing_else(tmp_path):
    folder = rendered(tmp_path, "--count", "5", "--masks", "--depth")
    found = scan(folder, 10_000)
    assert {picture.file: picture.caption for picture in found.pictures} == {row["file_name"]: row["text"] for row in rows(folder)}
    assert [file for file, _ in found.skipped] == ["depth", "masks"] and not found.notes


def test_filters_keep_to_what_was_asked_for(tmp_path):
    folder = rendered(tmp_path, "--count", "40", "--noun", "cat", "--noun", "duck", "--colour", "red", "--pattern", "striped", "--scene", "snow",
                      "--style", "drawing")
    assert {(row["noun"], row["colour"], row["pattern"], row["scene"], row["style"]) for row in rows(folder)} == {
        (noun, "red", "striped", "snow", "drawing") for noun in ("cat", "duck")}
    assert len({row["seed"] for row in rows(folder)}) == 40


def test_held_out_triples_only_when_asked_for(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = rendered(tmp_path, "--count", "60", "--held-out")
    assert all(row["held_out"] and held_out(row["noun"], row["colour"], row["pattern"]) for row in rows(folder))
    assert "held out of training" in refused(capfd, "render", "--noun", "mug", "--colour", "red", "--pattern", "plain")
    assert "None of these is held out" in refused(capfd, "render", "--noun", "mug", "--colour", "red", "--pattern", "striped", "--held-out")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_varied_captions_leave_words_out(tmp_path):
    full = list(world_items(60, seed=2))
    varied = list(world_items(60, seed=2, captions="varied"))
    assert [item.facts["seed"] for item in full] == [item.facts["seed"] for item in varied]
    assert sum(len(one.facts["text"]) > len(two.facts["text"]) for one, two in zip(full, varied, strict=True)) > 20


def test_a_subject_is_ready_to_be_personalized_on(tmp_path):
    folder = rendered(tmp_path, "--subject", "lilac-cat", "--masks")
    found = rows(folder)
    for row, picture in zip(found, reference_pictures(SUBJECTS["lilac-cat"]), strict=True):
        assert np.array_equal(pixels(folder / row["file_name"]), np.asarray(picture))
    assert found[0]["text"] == "a photo of a {} on the beach" and found[0]["words"] == "a photo of a pink cat with purple stripes on the beach"
    assert (found[0]["colour"], found[0]["subject"], found[0]["held_out"]) == ("#cea8ee", "lilac-cat", True)


def test_lora_learns_a_rendered_subject_by_its_captions(tmp_path, tiny_model):
    folder = rendered(tmp_path, "--subject", "coral-mug", "--count", "3")
    assert run(["lora", "--model", str(tiny_model), "--instance-dir", str(folder), "--class-noun", "mug", "--steps", "1", "--rank", "2",
                "--resolution", "32", "--output", str(tmp_path / "run")]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished" and manifest["pictures_seen"] == 1


def test_the_oracle_shows_the_subject_in_every_scene_and_style(tmp_path):
    folder = rendered(tmp_path, "--subject", "sky-ball", "--oracle", "--depth")
    found = rows(folder)
    assert {(row["scene"], row["style"]) for row in found} == {(scene, style) for scene in SCENE_NAMES for style in STYLES} and len(found) == 32
    look = SUBJECTS["sky-ball"].look
    for row in found[::5]:
        taken = shot(look, row["scene"], row["style"], row["seed"])
        assert np.array_equal(pixels(folder / row["file_name"]), np.asarray(draw(look, row["scene"], row["style"], row["seed"])))
        assert np.array_equal(pixels(folder / row["depth_file_name"]), np.asarray(taken.depth))
    few = rendered(tmp_path / "few", "--subject", "sky-ball", "--oracle", "--count", "2", "--scene", "snow", "--style", "drawing")
    assert [(row["scene"], row["style"]) for row in rows(few)] == [("snow", "drawing")] * 2 and rows(few)[0]["seed"] != rows(few)[1]["seed"]


def test_a_sheet_holds_every_picture_in_order(tmp_path):
    items = list(world_items(10, seed=1))
    sheet = np.asarray(contact_sheet(items, columns=4, masks=True))
    for place, item in enumerate(items):
        left, top = 8 + place % 2 * 264, 8 + place // 2 * 162
        assert np.array_equal(sheet[top : top + 128 : 2, left : left + 128 : 2], np.asarray(item.taken.picture))
        assert np.array_equal(sheet[top + 1 : top + 128 : 2, left + 129 : left + 256 : 2, 0], np.asarray(item.taken.mask))
        assert (sheet[top + 128 : top + 154, left : left + 256].min(axis=2) < 160).sum() > 40  # a label
    assert sheet.shape == (8 + 5 * 162, 8 + 2 * 264, 3)


def test_a_sheet_alone_writes_no_folder_and_both_write_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["toybox", "render", "--count", "5", "--sheet", "alone.png"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["alone.png"]
    folder = rendered(tmp_path, "--count", "5", "--sheet", "both.png")
    assert len(rows(folder)) == 5 and (tmp_path / "both.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_long_labels_are_cut(tmp_path):
    item = next(world_items(1))
    long = Item(item.name, "two-tone " * 30, item.facts, item.taken)
    sheet = np.asarray(contact_sheet([long]))
    assert (sheet[140:, -8:] == 255).all() and (sheet[138:150, 8:120].min(axis=2) < 160).any()


def test_a_folder_in_use_is_left_alone(tmp_path, capfd):
    folder = rendered(tmp_path, "--count", "2")
    before = sorted(path.name for path in folder.iterdir())
    assert "already and not empty" in refused(capfd, "render", "--count", "3", "--output", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert write_folder(world_items(1), tmp_path / "empty") == 1


def test_an_interrupted_rendering_leaves_no_folder_that_looks_complete(tmp_path):
    def broken():
        yield from world_items(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(broken(), tmp_path / "set")
    assert not list(tmp_path.iterdir())
    assert write_folder(world_items(3), tmp_path / "set") == 3 and len(rows(tmp_path / "set")) == 3


def test_the_list_fits_80_columns_and_names_everything(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["toybox", "render", "--list"]) == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for word in ("backpack", "two-tone", "watercolor", "desert", "brown", "khaki-teapot", "44 held-out triples", "red plain, orange dotted"):
        assert word in said, word
    assert all(name in said for name in SUBJECTS)


@pytest.mark.parametrize(("words", "told"), [
    (("render", "--prompts", "9"), "--prompts says nothing to `toybox render`"),
    (("evaluate", "--count", "9"), "--count says nothing to `toybox evaluate`"),
    (("evaluate", "--seed", "1"), "--seed says nothing to `toybox evaluate`"),
    (("evaluate", "v-prediction"), "v-prediction says nothing to `toybox evaluate`"),
    (("variant", "v-prediction", "--masks"), "--masks says nothing to `toybox variant`"),
    (("variant",), "needs to know which variant"),
    (("render", "depth"), "depth says nothing to `toybox render`"),
    (("evaluate", "depth", "--model", "x"), "--model says nothing to `toybox evaluate depth`"),
    (("variant", "depth", "--pictures", "900"), "--pictures says nothing to `toybox variant depth`"),
    (("variant", "v-prediction", "--rank", "4"), "--rank says nothing to `toybox variant v-prediction`"),
    (("render", "--noun", "dog"), "no noun 'dog'"),
    (("render", "--noun", "ducks"), "Did you mean 'duck'?"),
    (("render", "--subject", "lilac-dog"), "no subject 'lilac-dog'. Why: Did you mean 'lilac-cat'?"),
    (("render", "--oracle"), "--oracle needs --subject"),
    (("render", "--subject", "lilac-cat", "--colour", "red"), "--colour and --subject do not go together"),
    (("render", "--subject", "lilac-cat", "--scene", "snow"), "or add --oracle"),
])
def test_what_makes_no_sense_is_refused(words, told, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capfd, *words)
    assert not list(tmp_path.iterdir())


def test_rows_and_descriptions_are_one_to_one():
    for item in world_items(20, seed=9, held=None):
        assert np.array_equal(np.asarray(render(picture_of(item.facts))), np.asarray(item.taken.picture))
    with pytest.raises(Problem):
        next(world_items(1, only={"noun": ["mug"], "colour": ["red"], "pattern": ["plain"]}))


@pytest.mark.parametrize("words", [("toybox", "--help"), ("toybox", "variant")])
def test_help_and_refusals_import_nothing_heavy(words):
    from test_cli_start import HEAVY

    code = f"import sys\nfrom finetune.cli.app import run\nrun({list(words)!r})\nprint('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_documentation_lists_the_held_out_triples_and_the_subjects():
    page = (Path(__file__).resolve().parent.parent / "docs" / "toybox.md").read_text(encoding="utf-8")
    triples = held_out_triples()
    for noun in NOUN_NAMES:
        assert f"| {noun} | {', '.join(f'{colour} {pattern}' for thing, colour, pattern in triples if thing == noun)} |" in page
    assert all(f"| {subject.name} | {subject.words} |" in page for subject in SUBJECTS.values())
