"""The single-file ("LDM") layout written out from the original models' own structure: a reference that shares nothing with the package."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}
PLAIN = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
         "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def unet_name(name: str, up_block_types: tuple[str, ...], layers: int = 2) -> str:
    """diffusers' name of a UNet tensor to the original's.

    Args:
        up_block_types: an upsampler stands second in a block without attention, third in one with it.
        layers: resnets of a block; every published model has 2.
    """
    bare, step = [number for number, kind in enumerate(up_block_types) if "CrossAttn" not in kind], layers + 1
    stem, _, leaf = name.rpartition(".")
    if stem in PLAIN:
        return f"{PLAIN[stem]}.{leaf}"
    name = re.sub(r"(resnets\.\d+\.)(\w+)", lambda found: found[1] + RESNET[found[2]], name)
    rules = ((r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, j: f"input_blocks.{step * b + j + 1}.{int(kind == 'attentions')}"),
             (r"down_blocks\.(\d)\.(downsamplers)\.(0)\.conv", lambda b, kind, j: f"input_blocks.{step * b + step}.0.op"),
             (r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda b, kind, j: f"output_blocks.{step * b + j}.{int(kind == 'attentions')}"),
             (r"up_blocks\.(\d)\.(upsamplers)\.(0)\.conv", lambda b, kind, j: f"output_blocks.{step * b + layers}.{1 if b in bare else 2}.conv"))
    for pattern, rule in rules:
        name = re.sub(pattern, lambda found, rule=rule: rule(int(found[1]), found[2], int(found[3])), name)
    middle = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for ours, theirs in middle.items():
        name = name.replace(ours, theirs)
    return name


def vae_entry(name: str, value: Tensor, levels: int = 4) -> tuple[str, Tensor]:
    """diffusers' name and tensor of a VAE weight to the original's: decoder levels reversed, attention as 1x1 convolutions."""
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda found: f"decoder.up.{levels - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        if f"mid_block.attentions.0.{ours}." in name:
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
    return name, value


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIP text encoder in OpenCLIP's names: q, k, v in one matrix, the projection transposed."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    plain = {"embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
    found = {theirs: state[ours] for ours, theirs in plain.items()}
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for name, value in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            continue
        block, stem, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if stem in OPEN_CLIP:
            found[f"{block}.{OPEN_CLIP[stem]}.{leaf}"] = value
        elif stem == "self_attn.q_proj":
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
    return found


def checkpoint(parts: dict[str, nn.Module], family: str) -> dict[str, Tensor]:
    """Networks as one LDM dictionary.

    Args:
        parts: unet, vae, text_encoder and, for "sdxl", text_encoder_2.
        family: "sd1", "sd2" or "sdxl".
    """
    form, levels = parts["unet"].config, len(parts["vae"].config.block_out_channels)
    tensors = {f"model.diffusion_model.{unet_name(name, form.up_block_types, form.layers_per_block)}": value
               for name, value in parts["unet"].state_dict().items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in (vae_entry(*item, levels) for item in parts["vae"].state_dict().items())}
    text = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in parts["text_encoder"].state_dict().items()}
    if family == "sd2":
        state = open_clip(text)
        state |= {name.replace("resblocks.22", "resblocks.23"): value for name, value in state.items() if ".22." in name}  # the block nobody reads
        state |= {"text_projection": torch.eye(len(state["ln_final.bias"])), "logit_scale": torch.tensor(4.6)}
        tensors |= {f"cond_stage_model.model.{name}": value for name, value in state.items()}
    else:
        prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
        tensors |= {prefix + name: value for name, value in text.items()}
    if family == "sdxl":
        second = open_clip(parts["text_encoder_2"].state_dict()) | {"logit_scale": torch.tensor(4.6)}
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}
