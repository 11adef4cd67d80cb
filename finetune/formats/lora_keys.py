"""Sorting the keys of a LoRA file by module, whatever layout it has. Torch-free, so `inspect` shares it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from finetune.errors import Problem
from finetune.formats.header import told_json

Value = TypeVar("Value")

# How each layout spells the tensors of a module. Longer suffixes first: ".lora.down" ends other spellings too.
PARTS = {
    "kohya": {
        ".lora_down.weight": "down",
        ".lora_up.weight": "up",
        ".lora_mid.weight": "mid",
        ".dora_scale": "magnitude",
        ".alpha": "alpha",
    },
    "peft": {
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora_A.default.weight": "down",
        ".lora_B.default.weight": "up",
        ".lora_magnitude_vector.default.weight": "row_magnitude",
        ".lora_magnitude_vector.weight": "row_magnitude",
        ".lora_magnitude_vector": "row_magnitude",
        ".oft_R.weight": "oft_R",
    },
    "lycoris": {
        **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        ".oft_blocks": "oft_blocks",
        ".rescale": "rescale",
        ".diff": "diff",
        ".diff_b": "diff_b",
        ".w_norm": "diff",
        ".b_norm": "diff_b",
    },
    "diffusers": {
        ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
    },
    "diffusers (attention processors)": {"_lora.down.weight": "down", "_lora.up.weight": "up"},
}
NUMBERED = re.compile(r"((?:unet|text_encoder):\d+):(up|down)")  # cloneofsimo's: modules by position
# What shows the kind of a module, and what else it needs.
KINDS = {
    "hada_w1_a": ("LoHa", ("hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "hada_w1_b": ("LoHa", ("hada_w1_a", "hada_w2_a", "hada_w2_b")),
    "lokr_w1": ("LoKr", ()),
    "lokr_w1_a": ("LoKr", ("lokr_w1_b",)),
    "lokr_w1_b": ("LoKr", ("lokr_w1_a",)),
    "oft_blocks": ("OFT", ()),
    "oft_R": ("OFT of inputs", ()),
    "diff": ("full difference", ()),
    "magnitude": ("DoRA", ("down", "up")),
    "row_magnitude": ("DoRA", ("down", "up")),
}
_OTHER_ADAPTERS = {
    ".oft_diag": "old OFT",
    ".a1.weight": "GLoRA",
    ".on_input": "IA3",
    ".lokr_t1": "LoKr with two Tucker cores",
}
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")


def layout_of(key: str) -> tuple[str, str, str] | None:
    """(layout, module, part) of one key, or None when it belongs to no LoRA layout."""
    if match := NUMBERED.fullmatch(key):
        return "cloneofsimo", match.group(1), match.group(2)
    for layout, suffixes in PARTS.items():
        for suffix, part in suffixes.items():
            if key.endswith(suffix):
                return layout, key[: -len(suffix)], part
    return None


def sort_keys(
    file: str, tensors: Mapping[str, Value], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, dict[str, Value]], list[str]]:
    """Group a file's entries by module.

    Args:
        file: its name, for messages.
        tensors: key to anything (tensors, or header entries).
        metadata: of the file; cloneofsimo's says "<embed>" of a tensor that is a learned word.

    Returns: module key to {"down", "up", "alpha", ...}, and the keys that are no adapters (embeddings in the same file).

    Raises:
        Problem: for a key of another adapter type or layout.
    """
    groups: dict[str, dict[str, Value]] = {}
    ignored = []
    for key, value in tensors.items():
        if key.startswith("bundle_emb.") or (metadata or {}).get(key) == "<embed>":
            ignored.append(key)
            continue
        found = layout_of(key)
        if found is None:
            raise _unknown(file, key)
        layout, module, part = found
        groups.setdefault(_module_name(layout, module), {})[part] = value
    return groups, ignored


def kind_of(parts: Iterable[str]) -> str:
    """The kind of adapter a module's parts make: LoRA, DoRA, LoHa, LoKr, OFT, OFT of inputs, full difference."""
    parts = set(parts)
    return next((kind for part, (kind, _) in KINDS.items() if part in parts), "LoRA")


def missing_part(parts: Iterable[str]) -> str | None:
    """The name of a part without which a module cannot be read, or None when it is whole."""
    parts = set(parts)
    wanted = next((others for part, (_, others) in KINDS.items() if part in parts), ("down", "up"))
    if kind_of(parts) == "LoKr" and not ({"lokr_w2"} & parts or {"lokr_w2_a", "lokr_w2_b"} <= parts):
        wanted = (*wanted, "lokr_w2")
    return next((part for part in wanted if part not in parts), None)


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
                "LoRA, LoCon, DoRA, LoHa, LoKr, OFT and full differences are read here.",
                "Merge it into a checkpoint with the program that made it, and use that as the base.",
            )
    return Problem(
        f"{file} has the key {key!r}, which belongs to no LoRA layout known here.",
        "kohya (lora_unet_*, lora_te_*), LyCORIS, PEFT (unet.*.lora_A), diffusers (.lora.down) and cloneofsimo's (unet:0:up) are read.",
        "Convert it to the kohya layout with the program that made it.",
    )


def check_pattern(pattern: str, where: str) -> None:
    """PEFT's patterns are regular expressions, and a stranger's can run for years.

    Raises:
        Problem: it is long, or repeats what repeats.
    """
    if len(pattern) > 500 or re.search(r"[)\]}*+?]\s*[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise Problem(f"{where} has a pattern that may never end: {pattern[:60]!r}.", "It repeats what repeats.", "Write plain module names into it.")


def adapter_alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """How a file without alpha tensors declares them: PEFT's `lora_adapter_metadata`, else alpha = rank.

    Returns: function of (module key, rank) giving alpha.
    """
    declared = told_json("the LoRA", metadata, "lora_adapter_metadata")

    def alpha_of(key: str, rank: int) -> float:
        try:
            return declared_alpha(key, rank)
        except (TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
            raise Problem("The metadata lora_adapter_metadata of the LoRA are damaged.", f"For {key} they say no number ({error}).", "Get the file again.") from error

    def declared_alpha(key: str, rank: int) -> float:
        component, _, path = key.partition(".")
        alpha = declared.get(f"{component}.lora_alpha")
        if alpha is None:
            return float(rank)
        for pattern, value in declared.get(f"{component}.alpha_pattern", {}).items():
            check_pattern(pattern, "The LoRA's metadata")
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = value
        stabilised = declared.get(f"{component}.use_rslora", False)  # scale alpha / sqrt(rank), Kalajdzievski 2023
        return float(alpha) * rank**0.5 if stabilised else float(alpha)

    return alpha_of
