"""LoRA files: kohya's layout (what people exchange) and the PEFT layout (what diffusers writes).

Effect of one module: W' = W + strength * (alpha / rank) * up @ down (Hu et al. 2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.errors import Problem
from finetune.formats import lora_names
from finetune.formats.families import SDXL, family_of_width, modelspec
from finetune.formats.lora_keys import adapter_alphas, sort_keys
from finetune.formats.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class LoraModule:
    """One low-rank pair.

    Attributes:
        down: (rank, in) for a linear module, (rank, in, kh, kw) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        alpha: scale is alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner dimension of the pair."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """Change of the weight at strength 1 in float32, (out, in) or (out, in, kh, kw)."""
        flat = self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)
        return flat.reshape(self.up.shape[0], *self.down.shape[1:])


def uniform(modules: Mapping[str, LoraModule], dtype: torch.dtype) -> tuple[dict[str, LoraModule], int, float]:
    """The same effect with one rank and one alpha, because readers disagree about mixed ones.

    Smaller modules are padded with zeros up to the largest rank, which is exact. Alpha is the number that leaves most
    modules' scale untouched and that `dtype` holds exactly; the others' `up` absorbs the difference.

    Returns: modules cast to `dtype`, rank, alpha.
    """
    if not modules:
        raise Problem("There are no LoRA modules to write.", fix="Choose at least one target.")
    for name, module in modules.items():
        _check(name, module)
    rank = max(module.rank for module in modules.values())
    scale = Counter(module.scale for module in modules.values()).most_common(1)[0][0]
    alpha = torch.tensor(scale * rank, dtype=dtype).item()
    even = {}
    for name, module in modules.items():
        factor = module.scale / (alpha / rank)
        up = module.up if factor == 1.0 else module.up.float() * factor
        even[name] = LoraModule(_pad(module.down, 0, rank).to(dtype), _pad(up, 1, rank).to(dtype), alpha)
    return even, rank, alpha


def _pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Append zeros along `dim` up to `size`."""
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return tensor if missing[dim] == 0 else torch.cat([tensor, tensor.new_zeros(missing)], dim=dim)


def _check(name: str, module: LoraModule) -> None:
    down, up = tuple(module.down.shape), tuple(module.up.shape)
    if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or up[2:] not in ((), (1, 1)):
        raise Problem(
            f"LoRA module {name!r} has down {list(down)} and up {list(up)}, which do not fit together.",
            "down is (rank, in, ...) and up (out, rank, ...).",
            "The file is damaged or of another adapter type.",
        )
    if module.alpha == 0:
        raise Problem(
            f"LoRA module {name!r} has alpha 0.",
            "Some programs read 0 as 'switched off', others as 'equal to the rank'.",
            "Leave the module out, or give a positive alpha.",
        )


def write_kohya(
    path: Path | str, modules: Mapping[str, LoraModule], metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Write the layout that A1111, ComfyUI, Forge and diffusers all read.

    Args:
        modules: canonical or `text_model.` names to pairs.
        metadata: the common `finetune.*` fields; `ss_*` and `modelspec.*` are added, given ones win.
        dtype: of weights and alpha; float16 is the custom.
    """
    modules = {lora_names.canonical(name): module for name, module in modules.items()}
    even, rank, alpha = uniform(modules, dtype)
    two = any(name.startswith("text_encoder_2.") for name in even)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in even.items():
        key = lora_names.to_kohya(name, two)
        tensors[f"{key}.lora_down.weight"] = module.down
        tensors[f"{key}.lora_up.weight"] = module.up
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    family = family_of_width(context_width(even), metadata)
    described = {
        "ss_v2": str(family.key.startswith("sd2")),
        "ss_base_model_version": family.kohya,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps({}),
        "ss_output_name": Path(path).stem,
        "ss_steps": metadata.get("finetune.steps", "None"),
        "ss_sd_model_name": metadata.get("finetune.base", "None"),
        **modelspec(family, "lora", Path(path).stem, metadata),
        **metadata,
    }
    if family is SDXL:
        described["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
    save_tensors(path, tensors, described, {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"})


def write_peft(
    path: Path | str, modules: Mapping[str, LoraModule], metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Write diffusers' own layout. alpha / rank is baked into `lora_B`, for this layout has no alpha tensor.

    Adapter metadata is left out on purpose: readers then take alpha = rank, which is now true, on every version.
    """
    modules = {lora_names.canonical(name): module for name, module in modules.items()}
    even, rank, alpha = uniform(modules, torch.float32)
    tensors = {}
    for name, module in even.items():
        key = ".".join(lora_names.foreign_path(name))
        tensors[f"{key}.lora_A.weight"] = module.down.to(dtype)
        tensors[f"{key}.lora_B.weight"] = (module.up * (alpha / rank)).to(dtype)
    save_tensors(path, tensors, {"format": "pt", "finetune.scale": "alpha / rank is part of lora_B", **metadata})


def context_width(modules: Mapping[str, LoraModule]) -> int | None:
    """Width of the text states, from any cross-attention key or value module; None when none is there."""
    for name, module in modules.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            return module.down.shape[1]
    return None


def read(path: Path | str, module_names: Iterable[str] | None = None) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """Read a LoRA in any common layout: kohya, PEFT with or without adapter metadata, `.lora.down|up`.

    Args:
        module_names: the model's dotted names, each beginning with its component, to resolve kohya's underscores
            exactly; None uses the grammar of Stable Diffusion's module names.

    Returns: canonical name to pair (tensors as stored), and the file's metadata. Embeddings bundled in the file are
        left out and named in metadata "finetune.ignored".

    Raises:
        Problem: for other adapter types and layouts, naming the key.
    """
    tensors, metadata = load_tensors(path)
    groups, ignored = sort_keys(Path(path).name, tensors)
    known = None if module_names is None else lora_names.index_names(module_names)
    declared = adapter_alphas(metadata)
    modules: dict[str, LoraModule] = {}
    for key, parts in groups.items():
        for part in ("down", "up"):
            if part not in parts:
                raise Problem(
                    f"{Path(path).name}: LoRA module {key!r} has no {part} weight.",
                    "A module needs both halves.",
                    "The file is incomplete: export it again.",
                )
        name = lora_names.canonical(key) if "." in key else lora_names.from_kohya(key, known)
        rank = parts["down"].shape[0]
        alpha = parts["alpha"].reshape(-1)[0].item() if "alpha" in parts else declared(key, rank)
        module = LoraModule(parts["down"], parts["up"], float(alpha))
        _check(name, module)
        if name in modules:
            raise Problem(f"{Path(path).name} holds {name!r} twice, under two spellings.", fix="Export it again.")
        modules[name] = module
    if ignored:
        metadata = {**metadata, "finetune.ignored": ", ".join(ignored)}
    return modules, metadata
