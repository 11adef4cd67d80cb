"""Kohya's underscore names and the dotted diffusers paths they stand for, both ways, with no model at hand.

Inside finetune a LoRA module is called "unet.<dotted path>" or "text_encoder.<dotted path without text_model.>".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetune.errors import Problem

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_PREFIX_COMPONENT = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# Words of a path that contain an underscore themselves; every other underscore was a dot.
_COMPOUND = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj "
    "conv_shortcut time_embedding add_embedding linear_1 linear_2 conv_in conv_out text_model self_attn q_proj k_proj "
    "v_proj out_proj text_projection"
).split()
_SIMPLE = (
    "attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 conv2 encoder layers mlp fc1 fc2"
).split()
_WORD = re.compile("(" + "|".join(sorted(_COMPOUND + _SIMPLE, key=len, reverse=True)) + r"|\d+)(?:_|$)")
# The original SDXL spelling: block number n counts resnets and samplers together, two resnets a level.
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)")
_ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


def canonical(name: str) -> str:
    """The name used inside finetune: the text encoder's `text_model.` level taken out.

    Raises:
        Problem: when the name does not start with a known component.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path:
        raise Problem(
            f"LoRA module {name!r} belongs to no known component.",
            f"Names begin with {', '.join(part + '.' for part in COMPONENTS)}.",
            "Rename it.",
        )
    if component != "unet":
        path = path.removeprefix("text_model.")
    return f"{component}.{path}"


def foreign_path(name: str) -> tuple[str, str]:
    """Component and the path other programs expect: `text_model.` put back, which transformers >= 5.6 dropped (docs/formats.md, "Traps")."""
    component, _, path = canonical(name).partition(".")
    if component != "unet" and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        path = "text_model." + path
    return component, path


def to_kohya(name: str, two_encoders: bool = False) -> str:
    """`unet.down_blocks.0...to_k` becomes `lora_unet_down_blocks_0_..._to_k`.

    Args:
        two_encoders: SDXL calls the first encoder `lora_te1_`; everything else says `lora_te_`.
    """
    component, path = foreign_path(name)
    prefix = "lora_te1_" if two_encoders and component == "text_encoder" else KOHYA_PREFIX[component]
    return prefix + path.replace(".", "_")


def from_kohya(key: str, known: dict[str, str] | None = None) -> str:
    """The canonical dotted name of a kohya module key (the part before the first dot).

    Args:
        known: underscore name to canonical name from `index_names`; None parses by the grammar of Stable Diffusion.

    Raises:
        Problem: for names that the model or the grammar does not have.
    """
    prefix = next((prefix for prefix in _PREFIX_COMPONENT if key.startswith(prefix)), None)
    if prefix is None:
        raise Problem(
            f"LoRA key {key!r} starts with none of {', '.join(_PREFIX_COMPONENT)}.",
            "It is not in the kohya layout.",
            "Convert the file with the program that made it.",
        )
    component, rest = _PREFIX_COMPONENT[prefix], key[len(prefix) :]
    rest = _from_original(rest) if component == "unet" else rest.removeprefix("text_model_")
    if known is not None:
        if f"{component}.{rest}" in known:
            return known[f"{component}.{rest}"]
        raise Problem(
            f"The LoRA changes {key!r}, a module this base model does not have.",
            "It was trained for another base model.",
            "Use the base family it names (`finetune inspect` shows it).",
        )
    return canonical(f"{component}.{_parse(key, rest)}")


def index_names(module_names: Iterable[str]) -> dict[str, str]:
    """Lookup for `from_kohya` from a model's dotted names, each beginning with its component."""
    index = {}
    for name in map(canonical, module_names):
        component, _, path = name.partition(".")
        index[f"{component}.{path.replace('.', '_')}"] = name
    return index


def _parse(key: str, rest: str) -> str:
    words, position = [], 0
    while position < len(rest):
        match = _WORD.match(rest, position)
        if match is None:
            raise Problem(
                f"LoRA key {key!r} is not a Stable Diffusion module name (stuck at {rest[position:]!r}).",
                "Underscores stand for dots in this layout, so unknown names cannot be resolved without the model.",
                "Load it onto the model it was trained for.",
            )
        words.append(match.group(1))
        position = match.end()
    return ".".join(words)


def _from_original(rest: str) -> str:
    """SDXL files by kohya use the original UNet names; other names pass unchanged."""
    match = _ORIGINAL.fullmatch(rest)
    if match is None:
        return rest
    part, number, place, leaf = match.group(1), int(match.group(2)), match.group(3), match.group(4)
    if part == "middle_block":  # middle_block_N_leaf: the optional group took nothing that was not a number
        leaf = f"{place}_{leaf}" if place is not None else leaf
        kind = "attentions_0" if number == 1 else f"resnets_{number // 2}"
        return f"mid_block_{kind}_{_ORIGINAL_RESNET.get(leaf, leaf)}"
    if part == "input_blocks":
        level, slot = divmod(number - 1, 3)
        block, sampler = f"down_blocks_{level}", slot == 2
        if sampler:
            return f"{block}_downsamplers_0_conv"
    else:
        level, slot = divmod(number, 3)
        block = f"up_blocks_{level}"
        if leaf == "conv":
            return f"{block}_upsamplers_0_conv"
    kind = "attentions" if place == "1" else "resnets"
    return f"{block}_{kind}_{slot}_{_ORIGINAL_RESNET.get(leaf, leaf)}"
