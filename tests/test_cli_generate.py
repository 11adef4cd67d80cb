"""`finetune generate` as a user types it, on a tiny random base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from finetune.cli import app

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def arts(tmp_path_factory) -> Path:
    """A LoRA, a hypernetwork and an embedding as other programs write them. Do not write into it."""
    folder = tmp_path_factory.mktemp("arts")
    draw = torch.Generator().manual_seed(1)
    save_file({f"{LAYER}.lora_down.weight": torch.randn(2, 48, generator=draw), f"{LAYER}.lora_up.weight": torch.randn(32, 2, generator=draw),
               f"{LAYER}.alpha": torch.tensor(2.0), "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.randn(2, 48, generator=draw),
               "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.randn(48, 2, generator=draw),
               "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(2.0)}, folder / "toy.safetensors")
    for name in ("style", "mood"):
        pair = [{"linear.0.weight": torch.randn(96, 48, generator=draw), "linear.0.bias": torch.zeros(96), "linear.1.weight": torch.randn(48, 96, generator=draw),
                 "linear.1.bias": torch.zeros(48)} for _ in range(2)]
        torch.save({48: tuple(pair), "layer_structure": [1, 2, 1], "activation_func": "linear", "is_layer_norm": False, "activate_output": False,
                    "use_dropout": False, "name": name, "step": 1}, folder / f"{name}.pt", _use_new_zipfile_serialization=False)
    save_file({"<my-dog>": torch.randn(2, 48, generator=draw)}, folder / "my-dog.safetensors")
    return folder


@pytest.fixture()
def generate(tiny_model, tmp_path, monkeypatch):
    """Runs the command in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, model: object = tiny_model) -> int:
        return app.run(["generate", *(["--model", str(model)] if model else []), *map(str, words)])

    return call


def pixels(path="pics/01-0.png") -> np.ndarray:
    return np.asarray(Image.open(path))


def told(path="pics/01-0.png") -> dict:
    return json.loads(Image.open(path).info["finetune.settings"])


def refusal(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_tags_and_flags_give_the_same_picture(generate, arts):
    words = ["--steps", 2, "--artifacts-dir", arts]
    assert generate("--prompt", "a <lora:toy:0.5> dog <hypernet:style:0.7> in snow", *words) == 0
    assert generate("--prompt", "a  dog  in snow", "--artifact", f"{arts}/toy.safetensors:0.5", "--artifact", arts / "style.pt", "--strength", 0.5,
                    "--strength", 0.7, "--steps", 2, "--output", "flags") == 2  # a strength twice
    assert generate("--prompt", "a  dog  in snow", "--artifact", f"{arts}/toy.safetensors:0.5", "--artifact", "style:0.7", *words, "--output", "flags") == 0
    assert np.array_equal(pixels(), pixels("flags/01-0.png"))
    assert generate("--prompt", "a dog in snow", "--steps", 2, "--output", "base") == 0
    assert not np.array_equal(pixels(), pixels("base/01-0.png"))
    assert Image.open("flags/01-0.png").info["parameters"].startswith("a  dog  in snow <lora:toy:0.5> <hypernet:style:0.7>\nSteps: 2, ")
    assert [(one["kind"], one["strength"], one["origin"]) for one in told()["artifacts"]] == [("lora", 0.5, "prompt"), ("hypernet", 0.7, "prompt")]


def test_hypernetworks_are_chained_in_order(generate, arts):
    for first, second in (("style", "mood"), ("mood", "style")):
        assert generate("--prompt", f"a dog <hypernet:{first}> <hypernet:{second}>", "--artifacts-dir", arts, "--steps", 2, "--output", first) == 0
    assert not np.array_equal(pixels("style/01-0.png"), pixels("mood/01-0.png"))


def test_text_encoder_and_unet_have_strengths_of_their_own(generate, arts):
    found = {}
    for tag in ("toy:1", "toy:0:1", "toy:1:0", "toy:0.5:1", "toy:0:0"):
        assert generate("--prompt", f"a dog <lora:{tag}>", "--artifacts-dir", arts, "--steps", 1) == 0
        found[tag] = pixels().tobytes()
    assert generate("--prompt", "a dog ", "--steps", 1) == 0
    assert len(set(found.values())) == 5 and found["toy:0:0"] == pixels().tobytes()


def test_learned_words_by_word_and_by_stem(generate, arts):
    for place, word in enumerate(("<my-dog>", "my-dog")):
        assert generate("--prompt", f"a photo of {word}", "--artifacts-dir", arts, "--steps", 2, "--output", place) == 0
        assert [one["word"] for one in told(f"{place}/01-0.png")["artifacts"]] == ["<my-dog>"]
    assert np.array_equal(pixels("0/01-0.png"), pixels("1/01-0.png"))
    assert generate("--prompt", "a photo of my-dogs", "--artifacts-dir", arts, "--steps", 2) == 0 and told()["artifacts"] == []


def test_like_repeats_a_picture_byte_for_byte(generate, arts, tmp_path, capfd):
    shutil.copytree(arts, "arts")
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)).save("in.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    assert generate("--prompt", "a (dog:1.3) <lora:toy:0.5:0.7> of my-dog", "--artifact", "arts/style.pt:0.4", "--artifacts-dir", "arts", "--negative", "x", "--seed", 5,
                    "--steps", 3, "--guidance", 3, "--sampler", "euler-a", "--spacing", "trailing", "--clip-skip", 2, "--init-image", "in.png", "--mask", "mask.png",
                    "--denoising-strength", 0.7, "--size", "32x48") == 0
    picture = Path("pics/01-5.png")
    assert generate("--like", picture, "--output", "again", model=None) == 0
    assert Path("again/01-5.png").read_bytes() == picture.read_bytes()
    assert generate("--like", picture, "--seed", 6, "--artifact", "arts/mood.pt", "--output", "other", model=None) == 0
    assert told("other/01-6.png")["artifacts"][0]["name"] == "mood" and told("other/01-6.png")["guidance"] == 3
    assert generate("--like", picture, "--x", "seed=5,6", "--output", "sheet", model=None) == 0 and Path("sheet/grid.png").is_file()
    assert np.array_equal(pixels("sheet/01-5.png"), pixels(picture))
    capfd.readouterr()
    (tmp_path / "in.png").write_bytes((tmp_path / "mask.png").read_bytes())
    assert generate("--like", picture, model=None) == 2 and "in.png is no longer what --init-image was" in refusal(capfd)
    save_file({"<my-dog>": torch.zeros(2, 48)}, "arts/my-dog.safetensors")
    assert generate("--like", picture, "--init-image", "mask.png", model=None) == 2
    assert "arts/my-dog.safetensors is no longer the artifact that picture was made with" in refusal(capfd)


@pytest.fixture(scope="module")
def honest(tiny_model, tmp_path_factory) -> dict:
    """What one picture says."""
    folder = tmp_path_factory.mktemp("honest")
    assert app.run(["generate", "--model", str(tiny_model), "--prompt", "a dog", "--steps", "1", "--output", str(folder)]) == 0
    return told(folder / "01-0.png")


def forged(path: Path, facts: dict) -> None:
    """A picture with such text in it, as anybody could write it."""
    info = PngInfo()
    info.add_text("finetune.settings", json.dumps(facts))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": "somebody/some-model"}, "not on this machine"), ({"model": "toybox"}, "is not the one"), ({"model": "/dev/zero"}, "not on this machine"),
    ({"artifacts": [{"path": "/dev/zero", "name": "x", "hash": "00", "strength": 1}]}, "is not at /dev/zero"),
    ({"artifacts": [{"path": "secret.safetensors", "name": "x", "hash": "00", "strength": 1}]}, "no longer the artifact"),
    ({"init_image": {"path": "secret.safetensors", "hash": "00"}}, "no longer what --init-image was"), ({"mask": 7}, "cannot be read"),
    ({"sampler": "__import__('os')"}, "--sampler does not accept"), ({"size": "9999999x1"}, "no size"), ({"steps": -1}, "--steps"), ({"seed": -4}, "--seed"),
    ({"seed": 2**63}, "too large"), ({"guidance": float("nan")}, "--guidance")])
def test_a_forged_picture_makes_nothing_be_read(generate, honest, tmp_path, capfd, monkeypatch, changes, words):
    Path("secret.safetensors").write_bytes(b"secret")
    forged(tmp_path / "forged.png", honest | changes)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    capfd.readouterr()
    assert generate("--like", "forged.png", "--output", "out", model=None) == 2
    assert words in refusal(capfd) and not Path("out").exists()


def test_like_a_picture_of_the_web_ui(generate, capfd):
    info = PngInfo()
    info.add_text("parameters", "a (dog:1.2)\nNegative prompt: cat\nSteps: 2, Sampler: Euler a, Schedule type: SGM Uniform, CFG scale: 3, Seed: 9, "
                                "Size: 32x48, Model: other, Hires upscale: 2, Version: v1.10.1")
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    assert generate("--like", "theirs.png", "--steps", 3) == 0
    facts = told("pics/01-9.png")
    assert [facts[key] for key in ("prompt", "negative", "steps", "sampler", "spacing", "guidance", "size")] == [
        "a (dog:1.2)", "cat", 3, "euler-a", "trailing", 3, "32x48"]
    said = " ".join(capfd.readouterr().out.split())
    assert "not repeated: Hires upscale" in said and "draws its noise otherwise" in said


def test_prompts_from_a_file_size_and_a_long_prompt(generate, capfd):
    Path("prompts.txt").write_text("# two\na dog\n\n  a cat, " + "very " * 40 + "small\n", encoding="utf-8")
    assert generate("--prompts-file", "prompts.txt", "--prompt", "a mug", "--steps", 1, "--size", "48x32", "--count", 2, "--grid") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "parts of 30" in said and said.count("Note:") == 1
    assert sorted(path.name for path in Path("pics").iterdir()) == ["01-0.png", "01-1.png", "02-0.png", "02-1.png", "03-0.png", "03-1.png", "grid.png"]
    assert Image.open("pics/01-0.png").size == (48, 32) and told()["prompt"] == "a mug" and told()["size"] == "48x32"


def test_an_axis_of_strengths_begins_at_the_base(generate, arts):
    assert generate("--prompt", "a dog", "--artifact", arts / "toy.safetensors", "--x", "strength=0,1", "--y", "sampler=ddim,euler", "--steps", 2) == 0
    assert generate("--prompt", "a dog", "--sampler", "ddim", "--steps", 2, "--output", "base") == 0
    assert np.array_equal(pixels("pics/01-0-ddim-strength0.png"), pixels("base/01-0.png"))
    assert not np.array_equal(pixels("pics/01-0-ddim-strength1.png"), pixels("base/01-0.png"))
    assert "sheet" in told("pics/grid.png") and Image.open("pics/grid.png").width > 2 * 144


def test_depth_from_a_picture_by_an_estimator(tmp_path):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    from finetune.model.depth import estimate

    with torch.random.fork_rng():
        torch.manual_seed(0)
        DPTForDepthEstimation(DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False, readout_type="ignore")).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 5, dtype=np.uint8), (32, 1))).convert("RGB")
    found = estimate(tmp_path, ramp)
    assert found.size == (48, 32) and found.mode == "F" and np.ptp(np.asarray(found)) > 0


REFUSED = [
    (["--mask", "in.png"], "--mask was given without --init-image"), (["--denoising-strength", "0.5"], "without --init-image"),
    (["--init-image", "in.png", "--denoising-strength", "2"], "not between 0 and 1"), (["--init-image", "in.png", "--mask", "small.png"], "16x16"),
    (["--depth", "in.png"], "reads no depth map"), (["--depth-model", "."], "without a picture"), (["--init-image", "none.png"], "no such file"),
    (["--size", "33x32"], "33 is no multiple of 2"), (["--size", "big"], "no size"), (["--karras", "--sampler", "ddim"], "--karras cannot be combined"),
    (["--artifact", "nowhere.safetensors"], "no artifact at nowhere"), (["--strength", "1"], "1 strengths were given for 0 artifacts"),
    (["--prompts-file", "none.txt"], "no such file"), (["--x", "prompt=a|b"], "--prompt were both given"), (["--like", "in.png"], "does not say how"),
    (["--prompt", "x <lora:toy:1>"], "Add --artifacts-dir"), (["--prompt", "x <lora:../toy:1>", "--artifacts-dir", "."], "cannot lead out"),
    (["--clip-skip", "9"], "CLIP skip 9"), (["--steps", "2000"], "2000"), (["--artifacts-dir", "none"], "no folder none")]


@pytest.mark.parametrize(("words", "wanted"), REFUSED)
def test_bad_combinations_end_in_one_sentence(generate, capfd, words, wanted):
    Image.new("RGB", (32, 32)).save("in.png")
    Image.new("L", (16, 16)).save("small.png")
    assert generate("--prompt", "a dog", *words) == 2
    assert wanted in refusal(capfd) and not Path("pics").exists()


def test_no_prompt_is_refused(generate, capfd):
    assert generate() == 2 and "No prompt was given" in refusal(capfd)
