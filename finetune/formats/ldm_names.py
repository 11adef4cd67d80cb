"""Names of a single-file ("LDM") checkpoint and of diffusers' folders, both ways. Torch-free.

The original Stable Diffusion numbers the UNet's resnets and samplers through (`input_blocks.7.0`); diffusers numbers
blocks and layers within them. A block has L resnets on the way down and L + 1 on the way up (L = 2 in every published
model, 1 in toybox). The autoencoder's decoder is numbered the other way round. docs/formats.md, "Single checkpoint", has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."  # SD 1.x: transformers' names
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x: OpenCLIP's names
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."

_PLAIN = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
          "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "conv_shortcut": "skip_connection"}
_PLAIN_BACK, _RESNET_BACK = ({new: old for old, new in table.items()} for table in (_PLAIN, _RESNET))
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_MIDDLE_BACK = {number: f"{kind}.{place}" for (kind, place), number in _MIDDLE.items()}

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
                  "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # the last four: folders saved before diffusers 0.17
_VAE_ATTENTION_BACK = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
_OPEN_CLIP_BACK = {new: old for old, new in _OPEN_CLIP.items()}
_OPEN_CLIP_PLAIN = {"embeddings.token_embedding.weight": "token_embedding.weight",
                    "embeddings.position_embedding.weight": "positional_embedding",
                    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
                    "text_projection.weight": "text_projection"}  # the last one transposed
_OPEN_CLIP_PLAIN_BACK = {new: old for old, new in _OPEN_CLIP_PLAIN.items()}


@dataclass(frozen=True)
class Structure:
    """What the numbering depends on.

    Attributes:
        layers: resnets of a UNet block on the way down.
        attention: for each UNet block on the way up, whether it has attention (its upsampler then stands third, not second).
        vae_blocks: levels of the autoencoder.
    """

    layers: int = 2
    attention: tuple[bool, ...] = (False, True, True, True)
    vae_blocks: int = 4


def structure(unet: dict, vae: dict) -> Structure:
    """From diffusers' configurations of UNet and autoencoder."""
    return Structure(unet["layers_per_block"], tuple("CrossAttn" in kind for kind in unet["up_block_types"]), len(vae["block_out_channels"]))


def structure_of(keys: Iterable[str]) -> Structure:
    """From the names of a single file alone."""
    keys = list(keys)
    samplers = [int(found[1]) for key in keys if (found := re.match(re.escape(UNET) + r"input_blocks\.(\d+)\.0\.op\.", key))]
    last = max((int(found[1]) for key in keys if (found := re.match(re.escape(UNET) + r"input_blocks\.(\d+)\.", key))), default=2)
    layers = min(samplers) - 1 if samplers else last
    ups = {int(found[1]) for key in keys if (found := re.match(re.escape(UNET) + r"output_blocks\.(\d+)\.", key))}
    with_attention = {int(found[1]) // (layers + 1) for key in keys
                      if (found := re.match(re.escape(UNET) + r"output_blocks\.(\d+)\.1\.(?!conv\.)", key))}
    levels = {int(found[1]) for key in keys if (found := re.match(re.escape(VAE) + r"encoder\.down\.(\d+)\.", key))}
    attention = tuple(block in with_attention for block in range(len(ups) // (layers + 1)))
    return Structure(layers, attention, len(levels))


def unet_name(name: str, form: Structure) -> str | None:
    """diffusers' name of a UNet tensor to the original's (without prefix); None for one the layout has no place for."""
    stem, _, leaf = name.rpartition(".")
    if stem in _PLAIN:
        return f"{_PLAIN[stem]}.{leaf}"
    if (found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.(\w+)", name)) is not None:
        block = int(found[2])
        if found[1] == "down":
            return f"input_blocks.{(form.layers + 1) * (block + 1)}.0.op.{found[4]}"
        return f"output_blocks.{(form.layers + 1) * block + form.layers}.{1 + form.attention[block]}.conv.{found[4]}"
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    inner = found[5]
    if found[3] == "resnets":
        part, _, leaf = inner.rpartition(".")
        if part not in _RESNET:
            return None
        inner = f"{_RESNET[part]}.{leaf}"
    if found[1] is None:
        place = _MIDDLE.get((found[3], int(found[4])))
        return None if place is None else f"middle_block.{place}.{inner}"
    number = (form.layers + 1) * int(found[2]) + int(found[4]) + (found[1] == "down")
    return f"{'input' if found[1] == 'down' else 'output'}_blocks.{number}.{int(found[3] == 'attentions')}.{inner}"


def unet_name_back(key: str, form: Structure) -> str | None:
    """The original's name (without prefix) to diffusers'; None for one no UNet of this layout has."""
    stem, _, leaf = key.rpartition(".")
    if stem in _PLAIN_BACK:
        return f"{_PLAIN_BACK[stem]}.{leaf}"
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", key)
    if found is None:
        return None
    number, rest = int(found[2]), found[3]
    if found[1] == "middle_block":
        place = _MIDDLE_BACK.get(number)
        return None if place is None else _inner_back(f"mid_block.{place}", rest)
    block, slot = divmod(number - (found[1] == "input_blocks"), form.layers + 1)
    where = f"{'down' if found[1] == 'input_blocks' else 'up'}_blocks.{block}"
    kind, _, rest = rest.partition(".")
    if rest.startswith("op."):
        return f"{where}.downsamplers.0.conv.{rest[3:]}"
    if rest.startswith("conv."):
        return f"{where}.upsamplers.0.{rest}"
    return _inner_back(f"{where}.{'attentions' if kind == '1' else 'resnets'}.{slot}", rest)


def _inner_back(place: str, rest: str) -> str | None:
    if ".attentions." in place:
        return f"{place}.{rest}"
    part, _, leaf = rest.rpartition(".")
    return f"{place}.{_RESNET_BACK[part]}.{leaf}" if part in _RESNET_BACK else None


def vae_name(name: str, form: Structure) -> str | None:
    """diffusers' name of an autoencoder tensor to the original's (without prefix)."""
    if name.startswith(("quant_conv.", "post_quant_conv.")) or re.fullmatch(r"(en|de)coder\.conv_(in|out)\.\w+", name):
        return name
    if (found := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(\w+)", name)) is not None:
        return f"{found[1]}.norm_out.{found[2]}"
    if (found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name)) is not None:
        part = _VAE_ATTENTION.get(found[2])
        return None if part is None else f"{found[1]}.mid.attn_1.{part}.{found[3]}"
    if (found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name)) is not None:
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{_shortcut(found[3])}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets\.(\d+)|(?:down|up)samplers\.0)\.(.+)", name)
    if found is None:
        return None
    level = int(found[3]) if found[2] == "down" else form.vae_blocks - 1 - int(found[3])
    inner = f"block.{found[5]}" if found[5] is not None else f"{found[2]}sample"
    return f"{found[1]}.{found[2]}.{level}.{inner}.{_shortcut(found[6])}"


def vae_name_back(key: str, form: Structure) -> str | None:
    """The original's name of an autoencoder tensor (without prefix) to diffusers'."""
    if key.startswith(("quant_conv.", "post_quant_conv.")) or re.fullmatch(r"(en|de)coder\.conv_(in|out)\.\w+", key):
        return key
    if (found := re.fullmatch(r"(encoder|decoder)\.norm_out\.(\w+)", key)) is not None:
        return f"{found[1]}.conv_norm_out.{found[2]}"
    if (found := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", key)) is not None:
        part = _VAE_ATTENTION_BACK.get(found[2])
        return None if part is None else f"{found[1]}.mid_block.attentions.0.{part}.{found[3]}"
    if (found := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", key)) is not None:
        return f"{found[1]}.mid_block.resnets.{int(found[2]) - 1}.{_shortcut_back(found[3])}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block\.(\d+)|(?:down|up)sample)\.(.+)", key)
    if found is None:
        return None
    block = int(found[3]) if found[2] == "down" else form.vae_blocks - 1 - int(found[3])
    inner = f"resnets.{found[5]}" if found[5] is not None else f"{found[2]}samplers.0"
    return f"{found[1]}.{found[2]}_blocks.{block}.{inner}.{_shortcut_back(found[6])}"


def _shortcut(name: str) -> str:
    return name.replace("conv_shortcut.", "nin_shortcut.")


def _shortcut_back(name: str) -> str:
    return name.replace("nin_shortcut.", "conv_shortcut.")


def open_clip_name(name: str) -> str | None:
    """transformers' name (without `text_model.`) to OpenCLIP's; None for query, key and value, which are one tensor there."""
    if name in _OPEN_CLIP_PLAIN:
        return _OPEN_CLIP_PLAIN[name]
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[2] not in _OPEN_CLIP:
        return None
    return f"transformer.resblocks.{found[1]}.{_OPEN_CLIP[found[2]]}.{found[3]}"


def open_clip_name_back(key: str) -> str | None:
    """OpenCLIP's name to transformers' (without `text_model.`); None for `in_proj`, which is three tensors there."""
    if key in _OPEN_CLIP_PLAIN_BACK:
        return _OPEN_CLIP_PLAIN_BACK[key]
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if found is None or found[2] not in _OPEN_CLIP_BACK:
        return None
    return f"encoder.layers.{found[1]}.{_OPEN_CLIP_BACK[found[2]]}.{found[3]}"
