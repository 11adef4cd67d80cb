"""What is taken from a folder or a data set, what is left out, and what the user is told."""

import datasets
import numpy as np
import pytest
from PIL import Image

from finetune.data import describe_intake, intake
from finetune.errors import Problem
from finetune.settings import TrainSettings


def paint(path, colour=(1, 2, 3), size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def take(folder, **settings):
    return intake(TrainSettings(instance_dir=folder, **{"resolution": 16, **settings}))


def captions(found):
    return {picture.file: picture.caption for picture in found.pictures}


def test_a_mixed_folder(tmp_path):
    folder = tmp_path / "my pictures ünï 猫"
    paint(folder / "b ö.png", (1, 2, 3))
    paint(folder / "a.jpg", (9, 9, 9))
    paint(folder / "without suffix", (7, 7, 7), format="PNG")
    paint(folder / "z copy.png", (1, 2, 3))
    paint(folder / ".hidden.png")
    paint(folder / "sub" / "deep.png")
    paint(folder / "small.png", (5, 5, 5), size=(12, 20))
    paint(folder / "large.png", size=(40, 40))
    whole = paint(folder / "noise.jpg", size=(64, 64)).read_bytes()
    (folder / "noise.jpg").unlink()
    (folder / "cut off.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / "notes.md").write_text("shopping")
    (folder / "raw.nef").write_bytes(whole)
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    found = take(folder, max_pixels=1000)

    assert [picture.file for picture in found.pictures] == ["a.jpg", "b ö.png", "small.png", "without suffix"]
    assert np.asarray(found.pictures[1].load())[0, 0].tolist() == [1, 2, 3]
    assert [picture.note for picture in found.pictures] == ["", "", "enlarged from 12 x 20", ""]
    reasons = dict(found.skipped)
    assert set(reasons) == {"cut off.jpg", "large.png", "lost.png", "notes.md", "phone.heic", "raw.nef", "sub", "z copy.png"}
    assert "cut off" in reasons["cut off.jpg"]
    assert "1600 pixels are more than --max-pixels 1000" in reasons["large.png"]
    assert reasons["z copy.png"] == "the same file as b ö.png, kept once"
    assert reasons["phone.heic"] == "Pillow here cannot read HEIC; save it as JPEG or PNG"
    assert "camera raw" in reasons["raw.nef"] and "sub-folder" in reasons["sub"] and "link" in reasons["lost.png"]
    lines = "\n".join(describe_intake(found))
    assert lines.startswith("4 pictures to learn from")
    assert all(f"left out {file}: {reason}" in lines for file, reason in found.skipped)
    assert "small.png: enlarged from 12 x 20" in lines
    assert "captions: no picture has its own; all 4 take the prompt template" in lines


def test_two_hundred_pictures(tmp_path):
    for i in range(200):
        paint(tmp_path / f"{i:03}.png", (i, 0, 0))
    assert [picture.file for picture in take(tmp_path).pictures] == [f"{i:03}.png" for i in range(200)]


@pytest.mark.parametrize("settings, said", [
    ({}, "Neither --instance-dir nor --dataset is given"),
    ({"instance_dir": "x", "dataset": "y"}, "Both --instance-dir x and --dataset y are given"),
    ({"instance_dir": "/no such/folder"}, "--instance-dir /no such/folder does not exist"),
])
def test_no_or_two_sources(settings, said):
    with pytest.raises(Problem) as refused:
        intake(TrainSettings(**settings))
    assert said in str(refused.value) and refused.value.fix


def test_folders_without_pictures(tmp_path):
    with pytest.raises(Problem, match="is not a folder"):
        take(paint(tmp_path / "file.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Problem, match="no readable picture. It is empty"):
        take(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    with pytest.raises(Problem, match="no readable picture. broken.jpg: "):
        take(tmp_path / "bad")


def test_a_picture_that_vanishes_later_is_named(tmp_path):
    found = take(paint(tmp_path / "a.png").parent)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Problem, match="a.png can no longer be read"):
        found.pictures[0].load()


def test_captions_beside_the_pictures(tmp_path):
    for i, name in enumerate(["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]):
        paint(tmp_path / name, (i, 0, 0))
    (tmp_path / "a.txt").write_text("\ufeffa  dog\non a beach \n", encoding="utf-8")
    (tmp_path / "a.caption").write_text("loses to a.txt")
    (tmp_path / "b.caption").write_text("eine Katze, größer")
    (tmp_path / "c.txt").write_bytes("gr\xf6\xdfer".encode("latin-1"))
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "stray.txt").write_text("no such picture")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,loses\ne.png,"one, two"\nc.png,\nmissing.png,x\n')
    found = take(tmp_path)
    assert captions(found) == {"a.png": "a dog on a beach", "b.png": "eine Katze, größer", "c.png": None, "d.png": None,
                               "e.png": "one, two", "f.png": None}
    notes = "\n".join(found.notes)
    assert "c.txt is not UTF-8" in notes and "d.txt is empty" in notes
    assert "given for stray," in notes and "given for missing.png," in notes
    assert "captions: 3 of 6 pictures have their own; the prompt template serves the rest (c.png, d.png, f.png)" in notes
    assert found.skipped == []


def test_caption_tables_as_json_lines(tmp_path):
    for i, name in enumerate(["a.png", "b.png"]):
        paint(tmp_path / name, (i, 0, 0))
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "caption": "first"}\nnot json\n\n{"file_name": "b.png", "caption": "second"}\n')
    found = take(tmp_path)
    assert captions(found) == {"a.png": "first", "b.png": "second"}
    assert found.notes == ["metadata.jsonl line 2 is not a JSON object and is left out", "captions: all 2 pictures have their own"]
    table.write_text('{"file": "a.png", "prompt": "first"}\n')
    assert "needs the columns file_name and text (or caption); it has file, prompt" in take(tmp_path).notes[0]
    template = take(tmp_path, captions="template")
    assert captions(template) == {"a.png": None, "b.png": None}
    assert "not read" in template.notes[0] and "--captions template" in template.notes[1]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A data set on disk with pictures as bytes: two good, one broken, one twice, one without."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    def data(colour):
        return paint(tmp_path / "pictures" / f"{colour}.png", (colour, 0, 0)).read_bytes()
    images = [{"bytes": content, "path": None} if content else None for content in (data(1), data(2), b"broken", data(1), None)]
    table = datasets.Dataset.from_dict({"photo": images, "words": ["one", " ", "x", "x", "x"], "number": list(range(5))})
    table.cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set(saved):
    found = intake(TrainSettings(dataset=str(saved), image_column="photo", caption_column="words", resolution=32))
    assert captions(found) == {"row 0": "one", "row 1": None}
    assert [np.asarray(picture.load())[0, 0].tolist() for picture in found.pictures] == [[1, 0, 0], [2, 0, 0]]
    assert found.pictures[0].note == "enlarged from 16 x 16"
    assert dict(found.skipped) == {"row 2": "not a picture in a format Pillow reads", "row 3": "the same file as row 0, kept once",
                                   "row 4": "the row holds no picture"}


def test_a_folder_as_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paint(tmp_path / "set" / "a.png", (1, 0, 0))
    paint(tmp_path / "set" / "b.png", (2, 0, 0))
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "first"}\n{"file_name": "b.png", "text": "second"}\n')
    found = intake(TrainSettings(dataset=str(tmp_path / "set")))
    assert sorted(captions(found).values()) == ["first", "second"]
    assert sorted(np.asarray(picture.load())[0, 0, 0] for picture in found.pictures) == [1, 2]


@pytest.mark.parametrize("settings, said", [
    ({}, "no column 'image'. It has photo, words, number."),
    ({"image_column": "phot"}, "Did you mean 'photo'?"),
    ({"image_column": "number"}, "'number' of --dataset .* holds no pictures"),
    ({"image_column": "photo", "caption_column": "text"}, "no column 'text'. It has photo, words, number."),
    ({"image_column": "photo", "dataset": "/no/such/data"}, "--dataset /no/such/data cannot be loaded"),
])
def test_data_set_refusals(saved, settings, said):
    with pytest.raises(Problem, match=said):
        intake(TrainSettings(**{"dataset": str(saved), **settings}))


def test_missing_caption_column_by_default_is_only_noted(saved):
    found = intake(TrainSettings(dataset=str(saved), image_column="photo"))
    assert captions(found) == {"row 0": None, "row 1": None}
    assert "no column 'text' for captions (it has photo, words, number)" in found.notes[0]
