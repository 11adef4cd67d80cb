"""Whole models of the real sizes with random weights: from a folder to a single file and back, and opened from both."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.cli import app
from finetune.formats.folder import finish_diffusers_folder
from finetune.formats.header import read_header
from finetune.model import configs, load, locate, render

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
# The data of an LDM file in fp16, all parameters of UNet, VAE and text encoders at two bytes (docs/formats.md); SD 2 with its 24th block.
DATA = {"sd1": 2_132_470_614, "sd2": 2_579_904_854, "sdxl": 6_937_675_734}


def write_random(folder: Path, family: str) -> None:
    """A diffusers folder of the real configuration, fp16, every tensor small random numbers."""
    told = configs.parts_of(family)
    folder.mkdir()
    configs.write_folder(folder, told, configs.PADS[family])
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for part, kind in kinds.items():
        if part not in told:
            continue
        with torch.device("meta"):
            given = {key: value for key, value in told[part].items() if key not in ("architectures", "model_type")}
            module = kind.from_config(told[part]) if part in ("unet", "vae") else kind(CLIPTextConfig(**given))
        module = module.half().to_empty(device="cpu")
        generator = torch.Generator().manual_seed(len(part))
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randint(-99, 99, value.shape, generator=generator, dtype=torch.int8) / 4096)
        module.save_pretrained(folder / part)
        del module
        gc.collect()
    finish_diffusers_folder(folder)


def word(path: Path) -> torch.Tensor:
    """What the model draws in one step at 64 pixels, as latents; the model is let go of."""
    drawn = render(load(str(path)), ["a photo of a dog"], [1], steps=1, size=64, guidance=1.0, output="latent")[0]
    gc.collect()
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("family", DATA)
def test_a_whole_model_goes_to_a_single_file_and_back(family: str, tmp_path: Path) -> None:
    folder, single, again = tmp_path / "folder", tmp_path / "single.safetensors", tmp_path / "again"
    write_random(folder, family)
    assert app.run(["export", str(folder), "--to", "single-file", "--output", str(single)]) == 0
    extra = single.stat().st_size - read_header(single).data_start - DATA[family]
    # 24th block of SD 2's text encoder, and its projection: 12,596,224 and 1,024 x 1,024 numbers; position_ids are not written.
    assert extra == (2 * (12_596_224 + 1024 * 1024) if family == "sd2" else 0)
    assert (locate(str(single)).family, locate(str(single)).variant) == (family, "plain")
    assert app.run(["convert", str(single), "--to", "diffusers", "--output", str(again)]) == 0
    for part in configs.parts_of(family):
        if part in WEIGHTS:
            with safe_open(folder / part / f"{WEIGHTS[part]}.safetensors", "pt") as one, safe_open(again / part / f"{WEIGHTS[part]}.safetensors", "pt") as other:
                assert set(one.keys()) == set(other.keys())
                assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    index = json.loads((again / "model_index.json").read_text(encoding="utf-8"))
    assert ("text_encoder_2" in index) == (family == "sdxl")
    assert torch.equal(word(folder), word(single))
