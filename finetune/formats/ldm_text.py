"""Text encoders in a single file: OpenCLIP's tensors for SD 2.x and SDXL's second encoder, transformers' names for the rest.

OpenCLIP (Ilharco et al. 2021) keeps query, key and value as one matrix, in this order, and its text projection as a bare
parameter that multiplies from the other side. SD 2's encoder has one block more than diffusers keeps: readers take the state
before the last block, so its numbers never matter, but its names must be there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from finetune.formats import ldm_names as names
from finetune.formats.stream import Lazy

TEXT_LEVEL = "text_model."
_QKV = ("q_proj", "k_proj", "v_proj")


def plain(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Names without the `text_model.` level and without `position_ids`, which readers make themselves."""
    return {name.removeprefix(TEXT_LEVEL): entry for name, entry in state.items() if not name.endswith("position_ids")}


def to_open_clip(state: Mapping[str, Lazy], strange: list[str]) -> dict[str, Lazy]:
    """An encoder's tensors (transformers' names, without `text_model.`) under OpenCLIP's names.

    Args:
        strange: receives names the layout has no place for.
    """
    found: dict[str, Lazy] = {}
    for name, entry in state.items():
        qkv = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if qkv is not None:
            if qkv[2] == "q":
                parts = [state[name.replace("q_proj", part)] for part in _QKV]
                shape = (3 * entry.shape[0], *entry.shape[1:])
                found[f"transformer.resblocks.{qkv[1]}.attn.in_proj_{qkv[3]}"] = Lazy(
                    entry.dtype, shape, lambda parts=parts: torch.cat([part.load() for part in parts]))
        elif name == "text_projection.weight":
            found["text_projection"] = entry.map(entry.shape[::-1], lambda value: value.T.contiguous())
        elif (key := names.open_clip_name(name)) is not None:
            found[key] = entry
        else:
            strange.append(name)
    return found


def from_open_clip(state: Mapping[str, Lazy], strange: list[str]) -> dict[str, Lazy]:
    """The way back: transformers' names without `text_model.`; `logit_scale`, which Stable Diffusion never uses, is left out."""
    found: dict[str, Lazy] = {}
    for key, entry in state.items():
        if key == "logit_scale":
            continue
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if fused is not None:
            width = entry.shape[0] // 3
            for number, part in enumerate(_QKV):
                found[f"encoder.layers.{fused[1]}.self_attn.{part}.{fused[2]}"] = entry.map(
                    (width, *entry.shape[1:]), lambda value, start=number * width, width=width: value[start : start + width].clone())
        elif key == "text_projection":
            found["text_projection.weight"] = entry.map(entry.shape[::-1], lambda value: value.T.contiguous())
        elif (name := names.open_clip_name_back(key)) is not None:
            found[name] = entry
        else:
            strange.append(key)
    return found


def last_block(state: Mapping[str, Lazy], original: Mapping[str, Lazy] | None) -> dict[str, Lazy]:
    """What SD 2's original encoder has beyond diffusers': its last block, `text_projection` and `logit_scale`.

    Args:
        state: the encoder in OpenCLIP's names.
        original: the base checkpoint's encoder in OpenCLIP's names, from which all three are copied; without it the block
            before is repeated and the projection is ones, as kohya's scripts have it. `logit_scale`, one number of CLIP's
            training, is then left out: there is none to tell, and no reader asks for it.
    """
    count = blocks(state)
    block = {key.replace(f"resblocks.{count - 1}.", f"resblocks.{count}."): entry for key, entry in state.items()
             if f"resblocks.{count - 1}." in key}
    some = state["token_embedding.weight"]
    width = some.shape[1]
    extra = {**block, "text_projection": Lazy(some.dtype, (width, width), lambda: torch.ones(width, width))}
    if original is not None and blocks(original) == count + 1:
        extra |= {key: original[key] for key, entry in extra.items() if key in original and original[key].shape == entry.shape}
        extra |= {"logit_scale": original["logit_scale"]} if "logit_scale" in original else {}
    return {key: entry for key, entry in extra.items() if key not in state}


def blocks(state: Mapping[str, Any]) -> int:
    """Blocks of an encoder in OpenCLIP's names."""
    return len({found[1] for key in state if (found := re.match(r"transformer\.resblocks\.(\d+)\.", key))})
