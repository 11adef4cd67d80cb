"""LoRA files written: kohya's layout with LyCORIS' kinds (what people exchange) and the PEFT layout (what diffusers writes).

Effect of one plain module: W' = W + strength * (alpha / rank) * up @ down (Hu et al. 2021, arXiv:2106.09685, section 4.1).
The other kinds are in `lora_kinds`; reading is in `lora_read`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import Problem
from finetune.formats import lora_names
from finetune.formats.families import SDXL, Family, family_of_width, modelspec
from finetune.formats.lora_kinds import (
    Adapter,
    DoraModule,
    FullModule,
    InputOftModule,
    LohaModule,
    LokrModule,
    LoraModule,
    OftModule,
)
from finetune.formats.lora_math import pad
from finetune.formats.lora_read import Adapters, check_pair, read, read_adapters
from finetune.formats.tensors import save_tensors

__all__ = ["Adapters", "LoraModule", "context_width", "for_readers", "full", "read", "read_adapters", "uniform", "write_kohya", "write_peft"]

HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
OF_ONE_FILE = ("lora_adapter_metadata", "finetune.scale", "finetune.ignored", "finetune.dora_norm")  # says how another file was written
# ss_network_module and LyCORIS' `algo` of each kind
MODULES = {
    "LoRA": ("networks.lora", None),
    "DoRA": ("lycoris.kohya", {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
    "LoHa": ("lycoris.kohya", {"algo": "loha"}),
    "LoKr": ("lycoris.kohya", {"algo": "lokr"}),
    "OFT": ("lycoris.kohya", {"algo": "diag-oft"}),
    "full difference": ("lycoris.kohya", {"algo": "full"}),
}


def uniform(modules: Mapping[str, LoraModule], dtype: torch.dtype) -> tuple[dict[str, LoraModule], int, float]:
    """The same effect with one rank and one alpha, because readers disagree about mixed ones.

    Smaller modules are padded with zeros up to the largest rank, which is exact. Alpha is the number that leaves most
    modules' scale untouched and that `dtype` holds exactly; the others' `up` absorbs the difference.

    Returns: modules cast to `dtype`, rank, alpha.
    """
    if not modules:
        raise Problem("There are no LoRA modules to write.", fix="Choose at least one target.")
    for name, module in modules.items():
        check_pair(name, module)
    rank = max(module.rank for module in modules.values())
    scale = Counter(module.scale for module in modules.values()).most_common(1)[0][0]
    alpha = torch.tensor(scale * rank, dtype=dtype).item()
    even = {}
    for name, module in modules.items():
        factor = module.scale / (alpha / rank)
        up = module.up if factor == 1.0 else module.up.float() * factor
        even[name] = LoraModule(pad(module.down, 0, rank).to(dtype), pad(up, 1, rank).to(dtype), alpha)
    return even, rank, alpha


def write_kohya(
    path: Path | str, modules: Mapping[str, Adapter], metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Write the layout that A1111, ComfyUI, Forge and diffusers all read; other kinds than LoRA in LyCORIS' spelling of it.

    Args:
        modules: canonical or `text_model.` names to adapters.
        metadata: the common `finetune.*` fields; `ss_*` and `modelspec.*` are added. Given ones win, but for what
            describes the tensors themselves (rank, alpha, module, hashes), which may come from another file.
        dtype: of weights and alpha; float16 is the custom.

    Raises:
        Problem: nothing to write, values that are not finite, or a kind this layout cannot express.
    """
    modules = {lora_names.canonical(name): module for name, module in modules.items()}
    pairs = {name: module.pair if isinstance(module, DoraModule) else module for name, module in modules.items()}
    pairs = {name: pair for name, pair in pairs.items() if isinstance(pair, LoraModule)}
    even, rank, alpha = uniform(pairs, dtype) if pairs or not modules else ({}, 0, 0.0)
    family = _family(modules, metadata)
    two = family is SDXL or any(name.startswith("text_encoder_2.") for name in modules)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        key = lora_names.to_kohya(name, two)
        tensors |= {f"{key}.{part}": value for part, value in _parts(name, module, even.get(name), dtype).items()}
    described = {
        **_described(Path(path).stem, family, metadata),
        **{key: value for key, value in metadata.items() if key not in OF_ONE_FILE},
        **_network(modules),
        "ss_network_dim": str(rank) if pairs else "None",
        "ss_network_alpha": f"{alpha:g}" if pairs else "None",
    }
    if any(isinstance(module, DoraModule) for module in modules.values()):
        described["finetune.dora_norm"] = _one_norm(modules)
    save_tensors(path, tensors, described, HASHES)


def _parts(name: str, module: Adapter, even: LoraModule | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module by the last part of their keys.

    Args:
        even: the module's pair with the file's rank and alpha.

    Raises:
        Problem: the layout has no form for this kind.
    """
    match module:
        case LoraModule() | DoraModule():
            assert even is not None
            found = {"lora_down.weight": even.down, "lora_up.weight": even.up, "alpha": torch.tensor(even.alpha)}
            if isinstance(module, DoraModule):
                found["dora_scale"] = module.magnitude
        case LohaModule() | LokrModule():
            found = _hadamard_or_kronecker(module, dtype)
        case OftModule():
            skew = module.skew()  # readers bound it in different ways; it is within its bound here, and the alpha below binds nowhere
            found = {"oft_blocks": skew.triu(1), "alpha": torch.tensor(float(math.ceil(skew.norm().item()) + 1))}
            if module.rescale is not None:
                found["rescale"] = module.rescale
        case FullModule():
            found = {"diff": module.diff} | ({} if module.bias is None else {"diff_b": module.bias})
        case InputOftModule():
            raise Problem(f"PEFT's OFT cannot be written as `oft_blocks` (module {name!r}).",
                          "It rotates a layer's inputs; kohya's and LyCORIS' readers rotate its outputs, and no such rotation equals it.",
                          "Export the whole difference with its base (`.diff` keys, read by the same programs), or plain pairs by "
                          "`finetune merge ... --rank R`, or train --variant lora, dora, loha or lokr.")
        case _:
            raise Problem(f"There is no file layout for {module.kind} (module {name!r}).", fix="Export plain LoRA.")
    # a length stays float32: it multiplies the whole weight, so half precision would cost more than most adapters change
    return {part: value.float() if part == "dora_scale" else value.to(dtype) for part, value in found.items()}


def _hadamard_or_kronecker(module: LohaModule | LokrModule, dtype: torch.dtype) -> dict[str, Tensor]:
    """LoHa's and LoKr's tensors. What `dtype` cannot hold of the scale goes into the first factor.

    LoKr's scale goes there whole, with alpha = rank: LyCORIS and the others disagree on when it applies.
    """
    prefix, tensors = ("hada_", dict(module.tensors)) if isinstance(module, LohaModule) else ("lokr_", dict(module.tensors))
    first = next(name for name in ("w1", "w1_a") if name in tensors)
    inner = next((tensors[name].shape[0] for name in ("w2_b", "w1_b") if name in tensors), 1)
    held = inner * module.scale if isinstance(module, LohaModule) else float(inner)
    alpha = torch.tensor(held, dtype=dtype)
    factor = module.scale / (alpha.item() / inner)
    if factor != 1.0:
        tensors[first] = tensors[first].float() * factor
    return {**{f"{prefix}{name}": value for name, value in tensors.items()}, "alpha": alpha}


def _one_norm(modules: Mapping[str, Adapter]) -> str:
    """Of what the norm is taken, which a file can say only once."""
    norms = {module.norm for module in modules.values() if isinstance(module, DoraModule)}
    if len(norms) > 1:
        raise Problem("DoRA modules of two conventions cannot be written into one file.", "Some divide by the base's norm, some by the merged one's.",
                      "Write two files.")
    return norms.pop()


def for_readers(module: Adapter, weight: Tensor | None = None) -> Adapter:
    """The same change of `weight` in the form that ComfyUI computes equally.

    DoRA's lengths are divided there by the norm of the base's rows, not of the merged ones. PEFT's OFT they do not know: it
    becomes the whole difference. Others pass unchanged.
    """
    if weight is not None and isinstance(module, DoraModule):
        return module.with_norm("base", weight)
    if weight is not None and isinstance(module, InputOftModule):
        return FullModule(module.change(weight).cpu())
    return module


def full(modules: Mapping[str, Adapter], weights: Mapping[str, Tensor]) -> dict[str, FullModule]:
    """The same adapters as whole differences, which every reader of LyCORIS files adds alike: exact for any kind, but large.

    Args:
        weights: canonical name to the base's weight.

    Raises:
        Problem: the base lacks a module.
    """
    missing = [name for name in modules if name not in weights]
    if missing:
        raise Problem(f"The base has no module {missing[0]}.", f"{len(missing)} of {len(modules)} modules are not there.",
                      "Name the base the adapter was trained on.")
    return {name: FullModule(module.change(weights[name]).cpu()) for name, module in modules.items()}


def write_peft(
    path: Path | str, modules: Mapping[str, Adapter], metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Write diffusers' own layout. alpha / rank is baked into `lora_B`, for this layout has no alpha tensor.

    Adapter metadata is left out on purpose: readers then take alpha = rank, which is now true, on every version.

    Raises:
        Problem: there is a module that is no plain pair.
    """
    modules = {lora_names.canonical(name): module for name, module in modules.items()}
    other = next((module for module in modules.values() if not isinstance(module, LoraModule)), None)
    if other is not None:
        raise Problem(f"{other.kind} cannot be written in the PEFT layout.", "diffusers reads only plain low-rank pairs from one file.",
                      "Write the kohya layout, or approximate by plain pairs: `finetune merge FILE --rank R --output lora.safetensors`.")
    even, rank, alpha = uniform(modules, torch.float32)  # type: ignore[arg-type]
    tensors = {}
    for name, module in even.items():
        key = ".".join(lora_names.foreign_path(name))
        tensors[f"{key}.lora_A.weight"] = module.down.to(dtype)
        tensors[f"{key}.lora_B.weight"] = (module.up * (alpha / rank)).to(dtype)
    own = {name: value for name, value in metadata.items() if name not in (*OF_ONE_FILE, *HASHES) and not name.startswith("ss_network_")}
    save_tensors(path, tensors, {"format": "pt", **own, "finetune.scale": "alpha / rank is part of lora_B"})


def context_width(modules: Mapping[str, Adapter]) -> int | None:
    """Width of the text states, from any cross-attention key or value module; None when none shows it."""
    for name, module in modules.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            width = _input_width(module)
            if width is not None:
                return width
    return None


def _input_width(module: Adapter) -> int | None:
    match module:
        case LoraModule():
            return module.down.shape[1]
        case DoraModule():
            return module.pair.down.shape[1]
        case LohaModule():
            return module.tensors["w1_b"].shape[1]
        case LokrModule(tensors=parts):
            first = parts["w1"] if "w1" in parts else parts["w1_b"]
            second = parts["w2"] if "w2" in parts else parts["w2_b"]
            return first.shape[1] * second.shape[1]
        case FullModule():
            return module.diff.shape[1]
    return None  # OFT's blocks show the outputs alone


def _family(modules: Mapping[str, Adapter], metadata: Mapping[str, str]) -> Family:
    """The base family, from a cross-attention module; else from the metadata or the presence of a second encoder."""
    width = context_width(modules)
    if width is None and (metadata.get("ss_base_model_version", "").startswith("sdxl_") or any(name.startswith("text_encoder_2.") for name in modules)):
        return SDXL
    return family_of_width(width, metadata)


def _network(modules: Mapping[str, Adapter]) -> dict[str, str]:
    """Which trainer's module would make such a file."""
    kinds = {module.kind for module in modules.values()}
    network, arguments = MODULES[kinds.pop() if len(kinds) == 1 else "full difference"]
    return {"ss_network_module": network, "ss_network_args": json.dumps(arguments or {})}


def _described(stem: str, family: Family, metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's `ss_*` and the modelspec fields of a file."""
    found = {
        "ss_v2": str(family.key.startswith("sd2")),
        "ss_base_model_version": family.kohya,
        "ss_output_name": stem,
        "ss_steps": metadata.get("finetune.steps", "None"),
        "ss_learning_rate": metadata.get("finetune.learning_rate", "None"),
        "ss_seed": metadata.get("finetune.seed", "None"),
        "ss_sd_model_name": metadata.get("finetune.base", "None"),
        "ss_sd_model_hash": metadata.get("finetune.base_hash", "None"),
        "ss_num_train_images": metadata.get("finetune.pictures", "None"),
        "ss_resolution": metadata.get("finetune.resolution", "None"),
        **modelspec(family, "lora", stem, metadata),
    }
    if family is SDXL:
        found["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
    return found
