"""Sorting the keys of a LoRA file by module, whatever layout it has. Torch-free, so `inspect` shares it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from finetune.errors import Problem

Value = TypeVar("Value")

# How each layout spells the two halves and alpha. Longer suffixes first: ".lora.down" ends other spellings too.
PARTS = {
    "kohya": {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"},
    "peft": {
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora_A.default.weight": "down",
        ".lora_B.default.weight": "up",
    },
    "diffusers": {
        ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
    },
    "diffusers (attention processors)": {"_lora.down.weight": "down", "_lora.up.weight": "up"},
}
_OTHER_ADAPTERS = {
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid.weight": "LoCon with a middle weight",
    ".oft_diag": "OFT",
    ".oft_blocks": "OFT",
}
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


def layout_of(key: str) -> tuple[str, str, str] | None:
    """(layout, module, part) of one key, or None when it belongs to no LoRA layout."""
    for layout, suffixes in PARTS.items():
        for suffix, part in suffixes.items():
            if key.endswith(suffix):
                return layout, key[: -len(suffix)], part
    return None


def sort_keys(file: str, tensors: Mapping[str, Value]) -> tuple[dict[str, dict[str, Value]], list[str]]:
    """Group a file's entries by module.

    Args:
        file: its name, for messages.
        tensors: key to anything (tensors, or header entries).

    Returns: module key to {"down", "up", "alpha"}, and the keys left out (bundled embeddings).

    Raises:
        Problem: for a key of another adapter type or layout.
    """
    groups: dict[str, dict[str, Value]] = {}
    ignored = []
    for key, value in tensors.items():
        if key.startswith("bundle_emb."):
            ignored.append(key)
            continue
        found = layout_of(key)
        if found is None:
            raise _unknown(file, key)
        layout, module, part = found
        groups.setdefault(_module_name(layout, module), {})[part] = value
    return groups, ignored


def _module_name(layout: str, module: str) -> str:
    """Undo the older diffusers spellings, which hang the pair on an attention processor and drop `to_out`'s `.0`."""
    if layout == "diffusers (attention processors)":
        module = _PROCESSOR.sub(r".\1", module)
        module = module + ".0" if module.endswith(".to_out") else module
    return module


def _unknown(file: str, key: str) -> Problem:
    for suffix, kind in _OTHER_ADAPTERS.items():
        if suffix in key:
            return Problem(
                f"{file} is a {kind} adapter (key {key!r}).",
                "Only plain LoRA pairs are read here.",
                "Merge it into a checkpoint with the program that made it, and use that as the base.",
            )
    if re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key):
        return Problem(
            f"{file} is in cloneofsimo's first layout (key {key!r}).",
            "It numbers modules by position, so it fits only the model object it was trained in.",
            "Merge it into a diffusers folder with that project's `lora_add --mode upl`, and use the folder as the base.",
        )
    return Problem(
        f"{file} has the key {key!r}, which belongs to no LoRA layout known here.",
        "kohya (lora_unet_*, lora_te_*), PEFT (unet.*.lora_A) and diffusers (.lora.down) are read.",
        "Convert it to the kohya layout with the program that made it.",
    )


def adapter_alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """How a file without alpha tensors declares them: PEFT's `lora_adapter_metadata`, else alpha = rank.

    Returns: function of (module key, rank) giving alpha.
    """
    declared = json.loads(metadata.get("lora_adapter_metadata", "{}"))

    def alpha_of(key: str, rank: int) -> float:
        component, _, path = key.partition(".")
        alpha = declared.get(f"{component}.lora_alpha")
        if alpha is None:
            return float(rank)
        for pattern, value in declared.get(f"{component}.alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = value
        stabilised = declared.get(f"{component}.use_rslora", False)  # scale alpha / sqrt(rank), Kalajdzievski 2023
        return float(alpha) * rank**0.5 if stabilised else float(alpha)

    return alpha_of
