"""A single LDM checkpoint opens offline and gives the same latents as the diffusers folder it was written from.

The names of the LDM layout are written out here once more, from the original model's own structure, as an independent
reference; the widths are small, the structure (four levels, two layers each) is Stable Diffusion 1's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from finetune.model import configs, load, locate, render

SMALL_UNET = {"block_out_channels": [16, 16, 16, 16], "norm_num_groups": 8, "attention_head_dim": 2, "sample_size": 8}
SMALL_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
SMALL_TEXT = {"intermediate_size": 32, "num_hidden_layers": 1}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}


def unet_name(name: str) -> str:
    """diffusers' name of a UNet tensor to the original's."""
    plain = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
             "conv_norm_out": "out.0", "conv_out": "out.2"}
    stem, _, leaf = name.rpartition(".")
    if stem in plain:
        return f"{plain[stem]}.{leaf}"
    name = re.sub(r"(resnets\.\d+\.)(\w+)", lambda found: found[1] + RESNET[found[2]], name)
    rules = ((r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, j: f"input_blocks.{3 * b + j + 1}.{int(kind == 'attentions')}"),
             (r"down_blocks\.(\d)\.(downsamplers)\.(0)\.conv", lambda b, kind, j: f"input_blocks.{3 * b + 3}.0.op"),
             (r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, j: f"output_blocks.{3 * b + j}.{int(kind == 'attentions')}"),
             (r"up_blocks\.(\d)\.(upsamplers)\.(0)\.conv", lambda b, kind, j: f"output_blocks.{3 * b + 2}.{1 if b == 0 else 2}.conv"))
    for pattern, rule in rules:
        name = re.sub(pattern, lambda found, rule=rule: rule(int(found[1]), found[2], int(found[3])), name)
    middle = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for ours, theirs in middle.items():
        name = name.replace(ours, theirs)
    return name


def vae_entry(name: str, value: Tensor) -> tuple[str, Tensor]:
    """diffusers' name and tensor of a VAE weight to the original's: decoder levels reversed, attention as 1x1 convolutions."""
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"decoder.up.{3 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda found: f"decoder.up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        if f"mid_block.attentions.0.{ours}." in name:
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
    return name, value


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same random weights as a diffusers folder and as one LDM file."""
    for name, change in (("UNET", SMALL_UNET), ("VAE", SMALL_VAE), ("TEXT", SMALL_TEXT)):
        monkeypatch.setattr(configs, name, getattr(configs, name) | change)
    torch.manual_seed(3)
    parts = {"unet": UNet2DConditionModel.from_config(configs.UNET), "vae": AutoencoderKL.from_config(configs.VAE),
             "text_encoder": CLIPTextModel(CLIPTextConfig(**{key: value for key, value in configs.TEXT.items() if key not in ("architectures", "model_type")}))}
    folder = tmp_path / "folder"
    folder.mkdir()
    configs.write_folder(folder, {"unet": configs.UNET, "vae": configs.VAE, "text_encoder": configs.TEXT, "scheduler": configs.SCHEDULER})
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    tensors = {f"model.diffusion_model.{unet_name(name)}": value for name, value in parts["unet"].state_dict().items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in (vae_entry(*item) for item in parts["vae"].state_dict().items())}
    tensors |= {f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
                for name, value in parts["text_encoder"].state_dict().items()}
    path = tmp_path / "ünïcode name.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return folder, path


def test_single_checkpoint_gives_the_folders_latents(checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*arguments: object) -> None:
        raise AssertionError("opening a local file asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    folder, path = checkpoint
    assert locate(str(path)).family == "sd1"
    single, whole = load(str(path)), load(str(folder))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(single, part).state_dict(), getattr(whole, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), part
    assert (single.prediction, single.resolution, len(single.tokenizer)) == ("epsilon", 64, 49408)
    one, other = (render(base, ["a photo of a dog"], [1], steps=2, output="latent")[0] for base in (single, whole))
    assert torch.equal(one, other)
