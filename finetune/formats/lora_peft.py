"""PEFT's own adapters, in memory and in its folders, as the kinds of `lora_kinds`.

A folder is what `finetune lora --variant ...` leaves beside the distribution file: for each network `adapter_config.json`
and `adapter_model.safetensors`, whose keys are module paths without prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.formats import lora_names
from finetune.formats.lora_keys import check_pattern, layout_of
from finetune.formats.lora_kinds import Adapter, DoraModule, InputOftModule, LohaModule, LokrModule, LoraModule
from finetune.formats.lora_read import Adapters, build
from finetune.formats.tensors import load_tensors
from finetune.runs import read_json


def live(network: nn.Module, adapter: str = "default") -> Iterator[tuple[str, nn.Module, Adapter]]:
    """The adapters PEFT put into a network: (module path, base layer, adapter), tensors detached, float32, on the CPU."""
    for name, layer in network.named_modules():
        found = of_layer(layer, adapter)
        if found is not None:
            yield name, layer.get_base_layer(), found  # type: ignore[operator]


def of_layer(layer: Any, adapter: str = "default") -> Adapter | None:
    """The adapter of one PEFT layer, or None when the module is none."""
    def held(*names: str) -> dict[str, Tensor]:
        every = {name: getattr(layer, name, {}) for name in names}
        return {name: value[adapter].detach().float().cpu() for name, value in every.items() if adapter in value}

    if adapter in getattr(layer, "lora_A", {}):
        down, up = (getattr(layer, half)[adapter].weight.detach().float().cpu() for half in ("lora_A", "lora_B"))
        pair = LoraModule(down, up, layer.scaling[adapter] * layer.r[adapter])
        if adapter not in getattr(layer, "lora_magnitude_vector", {}):
            return pair
        return DoraModule(pair, layer.lora_magnitude_vector[adapter].weight.detach().float().cpu().reshape(-1, *[1] * (up.ndim - 1)))
    if adapter in getattr(layer, "hada_w1_a", {}):
        tensors = {name.removeprefix("hada_"): value for name, value in held(*layer.adapter_layer_names).items()}
        return LohaModule(tensors, layer.scaling[adapter] * layer.r[adapter])
    tensors = {name.removeprefix("lokr_"): value for name, value in held(*[n for n in getattr(layer, "adapter_layer_names", ()) if n.startswith("lokr_")]).items()}
    if tensors:
        return lokr(tensors, layer.scaling[adapter])
    if adapter in getattr(layer, "oft_R", {}):
        module = layer.oft_R[adapter]
        return InputOftModule(_rotation(module.weight.detach().float().cpu(), vars(module)))
    return None


def lokr(tensors: Mapping[str, Tensor], scale: float) -> LokrModule:
    """PEFT multiplies every LoKr by its scale, readers of LyCORIS only one with a rank: the scale goes into the first factor."""
    first = "w1" if "w1" in tensors else "w1_a"
    inner = next((tensors[name].shape[0] for name in ("w2_b", "w1_b") if name in tensors), 1)
    return LokrModule({**tensors, first: tensors[first] * scale}, float(inner))


def is_folder(path: Path) -> bool:
    """Whether a folder holds PEFT adapters for the networks of a base."""
    return any((path / part / "adapter_config.json").is_file() for part in lora_names.COMPONENTS)


def read_folder(path: Path) -> Adapters:
    """Read PEFT's folders, one for each network.

    Raises:
        Problem: there is none, or it holds a kind of adapter that is not known here.
    """
    modules: dict[str, Adapter] = {}
    metadata: dict[str, str] = {}
    for part in lora_names.COMPONENTS:
        if not (path / part / "adapter_config.json").is_file():
            continue
        config = _config(path / part / "adapter_config.json")
        tensors, metadata = load_tensors(path / part / "adapter_model.safetensors")
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            found = layout_of(key)
            if found is None:
                raise Problem(f"{path / part} holds {key!r}, which is no adapter known here.", f"Its PEFT type is {config.get('peft_type')}.",
                              "LoRA, DoRA, LoHa, LoKr and OFT are read.")
            groups.setdefault(found[1].removeprefix("base_model.model."), {})[found[2]] = value
        for name, parts in groups.items():
            try:
                modules[lora_names.canonical(f"{part}.{name}")] = _of_parts(name, parts, config, metadata)
            except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, re.error) as error:
                raise Problem(f"{path / part / 'adapter_config.json'} does not describe the adapter beside it.", f"Module {name!r}: {error}.",
                              "Get the folder again, or export it again.") from error
    if not modules:
        raise Problem(f"{path} holds no PEFT adapters.", "Neither unet/ nor text_encoder/ has an adapter_config.json.", "Name the artifact's folder.")
    return Adapters(modules, metadata)


def _config(path: Path) -> dict[str, Any]:
    """A PEFT configuration whose patterns end: they are regular expressions, and a stranger's can run for years.

    Raises:
        Problem: it is damaged, or one of its patterns repeats what repeats.
    """
    try:
        config = read_json(path)
        patterns = [pattern for key in ("rank_pattern", "alpha_pattern") for pattern in (config.get(key) or {})]
    except (ValueError, AttributeError, TypeError) as error:
        raise Problem(f"{path} is damaged.", f"It is no PEFT configuration ({error}).", "Get the folder again.") from error
    for pattern in patterns:
        check_pattern(pattern, str(path))
    if not 1 <= config.get("num_cayley_neumann_terms", 5) <= 100:
        raise Problem(f"{path} asks for {config['num_cayley_neumann_terms']} terms of a series.", "PEFT uses 5.", "Get the folder again.")
    return config


def _of_parts(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]) -> Adapter:
    """One module of a PEFT folder, its scale from the configuration."""
    rank = _pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha", rank)))
    if "oft_R" in parts:
        return InputOftModule(_rotation(parts["oft_R"].float(), config))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if any(part.startswith("lokr_") for part in parts):
        return lokr({part.removeprefix("lokr_"): value for part, value in parts.items()}, scale)
    return build(name, parts, scale * rank, metadata)


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return next((value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), default)


def _rotation(upper: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rotations (n, b, b) from the entries above the diagonal (n, b (b - 1) / 2): Cayley's transform or its series.

    Exactly it is (1 - Q)(1 + Q)^-1 in PEFT; its default is the series 1 + 2 Q + 2 Q^2 + ..., which is the transform of -Q.
    """
    size = round((1 + math.sqrt(1 + 8 * upper.shape[1])) / 2)
    skew = upper.new_zeros(upper.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = upper
    skew = skew - skew.mT
    eye = torch.eye(size)
    if not config.get("use_cayley_neumann", True):
        return torch.linalg.solve(eye + skew, eye - skew, left=False)
    terms = config.get("num_cayley_neumann_terms", 5)
    last = {1: 0, 2: 1, 3: 3}.get(terms, max(3, terms - 1))  # as PEFT 0.21 adds them: the last power once, but Q alone twice
    rotation, power = eye.repeat(len(skew), 1, 1), skew
    for place in range(1, last + 1):
        rotation = rotation + (1 if place == last and place > 1 else 2) * power
        power = power @ skew
    return rotation
