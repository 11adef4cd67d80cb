"""Faster ways to the same numbers, put onto a UNet after a method has attached."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.engine.attention import attend
from finetune.engine.convolutions import quicken
from finetune.settings import TrainSettings

LARGE = 100_000_000

def speed_up(unet: nn.Module, settings: TrainSettings) -> list[str]:
    """Switch on what the settings ask for and what pays here; returns a line on each that was."""
    notes = []
    if settings.lean:
        lean_adapters(unet)
    if settings.lean or settings.attention != "sdpa":
        attend(unet, settings.attention)
    if settings.pack == "on" or settings.pack == "auto" and _is_large(unet):
        count = quicken(unet) if settings.precision == "fp32" else 0
        notes += [f"{count} convolutions in the fastest of several ways"] if count else []
    if settings.channels_last:
        unet.to(memory_format=torch.channels_last)
        notes.append("channels innermost in memory")
    if settings.compile:
        unet.compile()
        notes.append("compiled: the first step takes minutes")
    return notes


def _is_large(unet: nn.Module) -> bool:
    """Whether arithmetic outweighs the calls: in networks of a few million numbers every other way costs more than it saves."""
    return sum(value.numel() for value in unet.parameters()) >= LARGE


def lean_adapters(network: nn.Module) -> int:
    """Give PEFT's plain LoRA layers a forward without the wrapper's checks; returns how many.

    result = base(x) + B(A x) * scale, in PEFT's own order and so to the bit its result. Layers with dropout, biases of their
    own, several adapters or another variant (DoRA) keep PEFT's forward.
    """
    if "peft" not in sys.modules:
        return 0
    from peft.tuners.lora.layer import Linear

    count = 0
    for layer in network.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.forward = _lean_forward(layer)
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    return (name in layer.lora_A and len(layer.lora_A) == 1 and not layer.merged and name not in layer.lora_variant
            and isinstance(layer.lora_dropout[name], nn.Identity) and layer.lora_B[name].bias is None)


def _lean_forward(layer: Any) -> Any:
    name = layer.active_adapters[0]
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]

    def forward(x: Tensor) -> Tensor:
        result = base(x)
        if layer.disable_adapters:
            return result
        change, scale = F.linear(F.linear(x.to(down.weight.dtype), down.weight), up.weight), layer.scaling[name]
        return (result + (change if scale == 1 else change * scale)).to(result.dtype)

    return forward
