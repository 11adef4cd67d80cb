"""Every kind of base opens offline, from a folder and from a single LDM file, as what it is.

Single files are written by tests/ldm_by_hand.py. Widths are small; the structure (levels, layers, both text encoders) and what
the program tells the kinds by are the published models'.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import ldm_by_hand
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import methods
from finetune.diffusion import zero_terminal_snr
from finetune.errors import Problem
from finetune.model import base as base_room
from finetune.model import configs, delta, families, load, locate, render
from finetune.model.text import encode, token_ids
from finetune.training import train

SMALL_UNET: dict[str, Any] = {"block_out_channels": [16] * 4, "norm_num_groups": 8, "attention_head_dim": 2, "sample_size": 8}
SMALL_VAE: dict[str, Any] = {"block_out_channels": [8] * 4, "norm_num_groups": 4}
SMALL_TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "sd1": {"unet": SMALL_UNET, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT | {"num_hidden_layers": 2}},
    "sd2": {"unet": SMALL_UNET, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT},  # all 23 layers, for the 24th is told by its number
    "sdxl": {"unet": SMALL_UNET | {"block_out_channels": [16] * 3, "cross_attention_dim": 40, "transformer_layers_per_block": [1, 2, 1],
                                   "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24},
             "vae": SMALL_VAE, "text_encoder": SMALL_TEXT | {"num_hidden_layers": 2},
             "text_encoder_2": SMALL_TEXT | {"hidden_size": 24, "num_hidden_layers": 3, "projection_dim": 24}}}
KINDS = [("sd1", "plain", "epsilon"), ("sd1", "inpainting", "epsilon"), ("sd2", "plain", "epsilon"), ("sd2", "plain", "v_prediction"),
         ("sd2", "inpainting", "epsilon"), ("sd2", "depth", "epsilon"), ("sdxl", "plain", "epsilon"), ("sdxl", "plain", "v_prediction"),
         ("sdxl", "inpainting", "epsilon")]


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small widths of the published structures; any step towards the network fails."""
    real = configs.parts_of

    def small(family: str, variant: str = "plain") -> dict[str, dict[str, Any]]:
        return {part: config | SMALL[family].get(part, {}) for part, config in real(family, variant).items()}

    def no_network(*arguments: object) -> None:
        raise AssertionError("opening a local file asked for the network")

    monkeypatch.setattr(configs, "parts_of", small)
    monkeypatch.setattr(socket.socket, "connect", no_network)


def networks(family: str, variant: str = "plain", **text: Any) -> dict[str, torch.nn.Module]:
    """Random networks of a kind."""
    told = configs.parts_of(family, variant)
    torch.manual_seed(3)
    parts: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel.from_config(told["unet"]), "vae": AutoencoderKL.from_config(told["vae"])}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if name in told:
            config = {key: value for key, value in (told[name] | text).items() if key not in ("architectures", "model_type")}
            parts[name] = kind(CLIPTextConfig(**config))
    return parts


def write_folder(folder: Path, parts: dict[str, torch.nn.Module], family: str, variant: str = "plain") -> Path:
    """The same as a diffusers folder."""
    folder.mkdir()
    configs.write_folder(folder, configs.parts_of(family, variant), configs.PADS[family])
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("family", "variant", "prediction"), KINDS)
def test_single_files_of_every_kind(family: str, variant: str, prediction: str, tmp_path: Path) -> None:
    parts = networks(family, variant)
    tensors = ldm_by_hand.checkpoint(parts, family)
    if prediction == "v_prediction":
        if family == "sdxl":
            tensors |= {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
        else:
            parts["unet"].up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias.data = torch.linspace(-0.3, 0.3, 16)
            tensors = ldm_by_hand.checkpoint(parts, family)
    path = tmp_path / "ünïcode name.safetensors"
    save_file(tensors, path)
    found = locate(str(path))
    assert (found.kind, found.family, found.variant) == ("single-file", family, variant)
    base = load(str(path))
    assert base.modules().keys() == parts.keys()
    for name, part in parts.items():
        ours, theirs = base.modules()[name].state_dict(), part.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    assert base.prediction == prediction
    assert base.resolution == (768 if (family, prediction) == ("sd2", "v_prediction") else 64)
    assert base.unet.config.in_channels == families.CHANNELS[variant]
    pads = [token_ids(base, ["a dog"], tokenizer)[0, -1].item() for _, _, tokenizer in base.encoders()]
    assert pads == {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[family]  # OpenCLIP fills up with zeros
    if (family, prediction) == ("sdxl", "v_prediction"):
        assert base.schedule[-1] == 0 and base.schedule[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert type(base.pipeline()).__name__ == {
        "sd1": {"plain": "StableDiffusionPipeline", "inpainting": "StableDiffusionInpaintPipeline"},
        "sd2": {"plain": "StableDiffusionPipeline", "inpainting": "StableDiffusionInpaintPipeline", "depth": "StableDiffusionDepth2ImgPipeline"},
        "sdxl": {"plain": "StableDiffusionXLPipeline", "inpainting": "StableDiffusionXLInpaintPipeline"}}[family][variant]


@pytest.mark.parametrize("family", ["sdxl", "toybox"])
def test_single_file_and_folder_draw_the_same(family: str, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "folder", networks(family), family)) if family == "sdxl" else "toybox"
    whole = load(folder)
    tensors = ldm_by_hand.checkpoint(whole.modules(), "sdxl" if family == "sdxl" else "sd1")
    save_file(tensors, tmp_path / "single.safetensors")
    single = load(str(tmp_path / "single.safetensors"))
    assert single.family == whole.family == family
    assert torch.equal(encode(single, ["a red dog"]).states, encode(whole, ["a red dog"]).states)
    one, other = (render(base, ["a photo of a dog"], [1], steps=2, output="latent")[0] for base in (single, whole))
    assert torch.equal(one, other)


def test_zero_terminal_schedule_is_diffusers(tiny_model: Path) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    base = load(str(tiny_model))
    betas = DDIMScheduler.from_config(base.scheduler_config).betas
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(zero_terminal_snr(base.schedule), theirs, atol=1e-6, rtol=1e-4)


def test_folders_of_variants_and_schedulers(tmp_path: Path) -> None:
    """A folder is what its configurations say; a scheduler file of another class without clip_sample does not clip latents."""
    folder = write_folder(tmp_path / "depth", networks("sd2", "depth"), "sd2", "depth")
    told = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    assert locate(str(folder)).variant == "depth"
    base = load(str(folder))
    assert (base.family, base.prediction, base.scheduler_config["clip_sample"]) == ("sd2", "v_prediction", False)
    assert base.schedule[-1] == 0


def test_toybox_variants_come_from_a_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = families.TOYBOX, tmp_path / "weights"
    fake.mkdir()
    for part in (*families.COMPONENTS, "model_index.json"):
        (fake / part).symlink_to(real / part)
    monkeypatch.setattr(families, "TOYBOX", fake)
    with pytest.raises(Problem, match=r"'toybox-depth' is not in this installation.*depth\.safetensors is missing.*finetune toybox variant depth"):
        load("toybox-depth")
    plain = load("toybox")
    wider = torch.nn.Conv2d(5, plain.unet.conv_in.out_channels, 3, padding=1)
    wider.weight.data[:, :4], wider.bias.data = plain.unet.conv_in.weight, plain.unet.conv_in.bias
    (fake / "variants").mkdir()
    delta.write(fake / "variants" / "depth.safetensors", wider, {}, variant="depth", base=plain.hash, facts={})
    base = load("toybox-depth")
    assert (base.family, base.location.variant, base.unet.config.in_channels) == ("toybox", "depth", 5)
    assert base.hash != plain.hash and families.family_of("toybox-depth") == "toybox"
    torch.manual_seed(0)
    noisy, depth, cond = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 8, 8), encode(plain, ["a red mug"])
    times = torch.tensor([500])
    kept = base.unet.conv_in.weight[:, :4] - plain.unet.conv_in.weight
    assert kept.abs().max() < 1e-3
    assert not torch.allclose(base.ask(noisy, times, cond, extra=depth), base.ask(noisy, times, cond, extra=-depth))
    torch.testing.assert_close(base.ask(noisy, times, cond, extra=0 * depth), plain.ask(noisy, times, cond), atol=5e-3, rtol=0)


def test_training_on_a_variant_is_refused_before_anything_is_written(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "painter"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    assert locate(str(folder)).variant == "inpainting"
    settings = methods.get("lora").Settings(model=str(folder), instance_dir=pictures_dir, class_noun="box", output=tmp_path / "run")
    with pytest.raises(Problem, match=r"takes 9 latent channels, not 4.*needs masks or depth maps.*plain text-to-image base"):
        train(settings, Console(quiet=True))
    assert not (tmp_path / "run").exists()


KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(("tensors", "words"), [
    ({"conditioner.embedders.0.model.ln_final.weight": (2,), KEY: (2, 1280)}, r"is the SDXL refiner.*Use the SDXL base"),
    ({KEY: (2, 2048)}, r"SDXL network without its text encoders.*conditioner\.embedders\.1"),
    ({KEY: (2, 768), families.CHANNELS_KEY: (2, 8, 3, 3)}, r"takes 8 latent channels.*4 \(text to image\), 9 \(inpainting\) and 5 \(depth\)"),
    ({"something": (2,)}, r"no model\.diffusion_model"),
])
def test_single_files_that_are_refused(tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(Problem, match=words):
        locate(str(tmp_path / "x.safetensors"))


def test_pickles_and_unknown_widths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(Problem, match=r"can run code when opened.*finetune convert .*old\.ckpt --to single-file --output .*old\.safetensors"):
        locate(str(tmp_path / "old.ckpt"))
    save_file({KEY: torch.zeros(2, 500)}, tmp_path / "odd.safetensors")
    with pytest.raises(Problem, match=r"of no known family.*1\.x, 2\.x and XL"):
        load(str(tmp_path / "odd.safetensors"))


def test_the_refiners_folder_and_half_an_sdxl_folder(tiny_xl_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_xl_model, half)
    shutil.rmtree(half / "tokenizer_2")
    with pytest.raises(Problem, match="lacks tokenizer_2"):
        locate(str(half))
    shutil.rmtree(half / "text_encoder")
    config = json.loads((half / "unet" / "config.json").read_text())
    (half / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 1280}))
    with pytest.raises(Problem, match="is the SDXL refiner"):
        locate(str(half))


def test_damaged_single_file_is_named(tmp_path: Path) -> None:
    tensors = ldm_by_hand.checkpoint(networks("sdxl"), "sdxl")
    del tensors["conditioner.embedders.1.model.ln_final.weight"]
    save_file({key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}, tmp_path / "half.safetensors")
    with pytest.raises(Problem, match=r"half\.safetensors cannot be loaded.*Failed to load AutoencoderKL"):
        base_room.load(str(tmp_path / "half.safetensors"))


def test_files_that_leave_the_machine_say_no_path(tiny_model: Path) -> None:
    base = load(str(tiny_model))
    assert base.known_as == tiny_model.name and "/" not in base.known_as
    assert dataclasses.replace(base, name="toybox").known_as == "toybox"
    assert dataclasses.replace(base, name="stable-diffusion-v1-5/stable-diffusion-v1-5").known_as == "stable-diffusion-v1-5/stable-diffusion-v1-5"
