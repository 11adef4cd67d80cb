"""Text in pictures: the web UI's form byte for byte, JSON, and what strangers may put there."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetune.cli import png
from finetune.errors import Problem

LORA = {"path": "arts/toy.safetensors", "name": "toy", "kind": "lora", "strength": 0.8, "text_strength": None, "rank": None, "origin": "flag",
        "alias": None, "word": "sks toy", "hash": "ab" * 32, "short": "ab12cd34ef56"}
FACTS = {"finetune": "0.1.0", "prompt": "a photo of a (dog:1.2), sitting", "negative": "blurry, grey", "seed": 7, "steps": 25, "guidance": 4.0,
         "sampler": "dpm++", "spacing": None, "own_spacing": "leading", "karras": True, "clip_skip": 2, "size": "64x96", "model": "bases/my: model.safetensors",
         "model_hash": "0123456789abcdef", "model_short": "0123456789", "precision": "fp32", "artifacts": [LORA], "init_image": {"path": "a.png", "hash": "00"},
         "denoising_strength": 0.5, "mask": None, "depth": None, "depth_model": None, "batch": 1}
WRITTEN = """a photo of a (dog:1.2), sitting <lora:toy:0.8>
Negative prompt: blurry, grey
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 7, Size: 64x96, Model hash: 0123456789, Model: "my: model", \
Denoising strength: 0.5, Clip skip: 2, Lora hashes: "toy: ab12cd34ef56", Version: finetune 0.1.0"""

# As AUTOMATIC1111's web UI 1.10 writes them (README and wiki of the project; field names from its infotext).
FOREIGN = """a castle, (stone:1.3)
on two lines
Negative prompt: blurry,
low quality
Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 3141592653, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2, Hires upscaler: Latent, \
Lora hashes: "toy: ab12, other: cd34", TI hashes: "easyneg: \\"q\\"", Version: v1.10.1"""


def with_text(path, **chunks):
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name.replace("__", "."), text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_parameters_are_the_web_ui_s():
    assert png.parameters(FACTS) == WRITTEN


def test_round_trip_through_a_file(tmp_path):
    png.write(tmp_path / "a.png", Image.new("RGB", (8, 8)), FACTS | {"prompt": "ein Hügel, 山 <my-dog>"})
    facts, text = png.read(tmp_path / "a.png")
    assert facts == FACTS | {"prompt": "ein Hügel, 山 <my-dog>"} and text.startswith("ein Hügel, 山 <my-dog> <lora:toy:0.8>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_our_own_parameters_read_as_the_web_ui_s():
    values, rest = png.parse(WRITTEN)
    assert values == {"prompt": "a photo of a (dog:1.2), sitting <lora:toy:0.8>", "negative": "blurry, grey", "steps": 25, "seed": 7, "guidance": 4.0,
                      "clip_skip": 2, "denoising_strength": 0.5, "size": "64x96", "sampler": "dpm++", "karras": True}
    assert rest == {"Model": "my: model"}


def test_foreign_parameters():
    values, rest = png.parse(FOREIGN)
    assert values == {"prompt": "a castle, (stone:1.3)\non two lines", "negative": "blurry,\nlow quality", "steps": 20, "seed": 3141592653, "guidance": 6.5,
                      "clip_skip": 2, "denoising_strength": 0.7, "size": "512x768", "sampler": "dpm++-sde", "karras": True}
    assert rest == {"Model": "v1-5-pruned-emaonly", "Hires upscale": "2", "Hires upscaler": "Latent"}


@pytest.mark.parametrize(("sampler", "schedule", "found", "left"), [
    ("DPM++ 2M Karras", None, {"sampler": "dpm++", "karras": True}, []), ("Euler a", "Automatic", {"sampler": "euler-a"}, ["Schedule type"]),
    ("Euler", "SGM Uniform", {"sampler": "euler", "spacing": "trailing"}, []), ("DDIM", "Uniform", {"sampler": "ddim"}, ["Schedule type"]),
    ("UniPC", None, {"sampler": "unipc"}, []), ("DPM fast", "Karras", {}, ["Sampler", "Schedule type"])])
def test_samplers_of_the_web_ui(sampler, schedule, found, left):
    line = f"Steps: 20, Sampler: {sampler}, {f'Schedule type: {schedule}, ' if schedule else ''}CFG scale: 7, Seed: 1"
    values, rest = png.parse(f"a dog\n{line}")
    assert {key: values[key] for key in ("sampler", "karras", "spacing") if key in values} == found and list(rest) == left


def test_a_prompt_alone_and_a_last_line_that_is_prompt():
    assert png.parse("a dog, sitting")[0] == {"prompt": "a dog, sitting", "negative": ""}
    assert png.parse("a dog\ncolours: red, blue")[0]["prompt"] == "a dog\ncolours: red, blue"
    assert png.parse("Steps: 20, Seed: 1, CFG scale: 3")[0] == {"prompt": "", "negative": "", "steps": 20, "seed": 1, "guidance": 3.0}


@pytest.mark.parametrize("text", ["", ",,,:::\n\"\"\"", "Steps: x, Seed: 99999999999999999999, Size: 0x, CFG scale: nan, a: \"", "\n".join(["("] * 999),
                                  "Steps: " + "9" * 400 + ", Seed: 1, Size: 1x1"])
def test_no_text_breaks_the_reader(text):
    values, _ = png.parse(text)
    assert isinstance(values["prompt"], str)


@pytest.mark.parametrize("told", ["[]", "{", "7", "null", '{"prompt": 3}', json.dumps(FACTS | {"seed": "7"}), json.dumps(FACTS | {"artifacts": ["x"]}),
                                  "[" * 100_000])
def test_settings_changed_into_something_else_are_refused(tmp_path, told):
    with pytest.raises(Problem, match="cannot be read"):
        png.read(with_text(tmp_path / "a.png", finetune__settings=told))


def test_what_holds_no_text_is_refused(tmp_path):
    with pytest.raises(Problem, match="does not say how it was made"):
        png.read(with_text(tmp_path / "a.png"))
    with pytest.raises(Problem, match="contact sheet"):
        png.read(with_text(tmp_path / "b.png", finetune__settings='{"sheet": {}}'))
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match="cannot be read as a picture"):
        png.read(tmp_path / "c.png")
    with pytest.raises(Problem, match="There is no picture"):
        png.read(tmp_path / "d.png")
