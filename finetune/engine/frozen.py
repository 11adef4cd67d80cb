"""Frozen weights in fewer bytes: kept in bf16 or by bitsandbytes in 8 or 4 bits, computed with in the run's precision.

B rows, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.engine import quantizer
from finetune.errors import Problem
from finetune.settings import TrainSettings

Tree = TypeVar("Tree", bound=TrainSettings)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def format_of(settings: TrainSettings) -> str:
    """The number format frozen weights will have: as given, or that of the arithmetic."""
    return settings.precision if settings.frozen == "auto" else settings.frozen


def computes_bf16(device: torch.device) -> bool:
    """Whether a processor has instructions for bf16. Without them torch's bf16 is several times slower than its fp32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def possible(settings: Tree, device: torch.device) -> tuple[Tree, list[str]]:
    """The settings with a precision this device is fast in, and a line where that is another one than was asked for."""
    if settings.precision != "bf16" or computes_bf16(device):
        return settings, []
    found = settings.model_copy(update={"precision": "fp32", "frozen": "bf16" if settings.frozen == "auto" else settings.frozen})
    return found, ["this processor has no bf16 instructions: frozen weights are kept in bf16, and computed with in fp32"]


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """A context in which the network computes in the run's precision."""
    return torch.autocast(device.type, dtype=HALF.get(settings.precision, torch.bfloat16), enabled=settings.precision in HALF)


def weights_dtype(settings: TrainSettings) -> torch.dtype:
    """What to read a frozen UNet's linear and convolution weights into; what becomes 8 or 4 bits comes from bf16."""
    return torch.float32 if format_of(settings) == "fp32" else HALF.get(format_of(settings), torch.bfloat16)


def store(unet: nn.Module, settings: TrainSettings) -> None:
    """Put a frozen UNet's linear and convolution weights into the format of the settings, before anything is attached to it.

    With --precision bf16 or fp16 the layers compute in the format they are kept in. With fp32 a layer's weight is cast when
    the layer runs and when its gradient is taken, and not kept in between: half the memory and the same activations.

    Raises:
        Problem: 8 or 4 bits without bitsandbytes, or on a kind of adapter that needs whole weights.
    """
    wanted = format_of(settings)
    if wanted == "fp32":
        return
    if wanted in ("8bit", "4bit"):
        _quantize(unet, wanted, settings)
    inner = HALF.get(settings.precision)
    dtype = HALF.get(wanted, torch.bfloat16)
    for name, module in unet.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d) or name == "conv_in":  # which tells libraries the UNet's format: it stays as latents are
            continue
        module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        if inner is None:  # its class carries the casting forward; it is still a Linear or Conv2d to everybody else
            module.__class__ = StoredLinear if type(module) is nn.Linear else StoredConv2d
        elif module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)


def _quantize(unet: nn.Module, wanted: str, settings: TrainSettings) -> None:
    """Every Linear layer by bitsandbytes' own: LLM.int8 (Dettmers et al. 2022) or NF4 (Dettmers et al. 2023, sec. 3)."""
    try:
        layers = quantizer.load("nn")
    except ImportError:
        raise Problem(f"--frozen {wanted} needs the package bitsandbytes.", "It is not installed.",
                      "pip install 'finetune[memory]', or use --frozen bf16.") from None
    if getattr(settings, "variant", "lora") not in ("lora", "rslora"):
        raise Problem(f"--frozen {wanted} does not go with --variant {settings.variant}.", "That kind of adapter computes with whole weights.",
                      "Use --frozen bf16, or --variant lora.")
    found = [(name, layer) for name, layer in unet.named_modules() if type(layer) is nn.Linear]
    for name, layer in found:
        place, _, leaf = name.rpartition(".")
        device, bias = layer.weight.device, layer.bias is not None
        new: Any = (layers.Linear4bit(layer.in_features, layer.out_features, bias, compute_dtype=HALF.get(settings.precision, torch.float32),
                               quant_type="nf4") if wanted == "4bit" else
                    layers.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=6.0))
        new.load_state_dict(layer.state_dict())
        setattr(unet.get_submodule(place), leaf, new.to(device).requires_grad_(False))


class _Linear(torch.autograd.Function):
    """y = x W' + b with W cast for the moment, in both directions; only the stored W is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _Conv2d(torch.autograd.Function):
    """The same for a convolution; x (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layer = x.shape, layer
        return F.conv2d(x, weight.to(x.dtype), bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), layer = ctx.saved_tensors, ctx.layer
        found = torch.nn.grad.conv2d_input(ctx.shape, weight.to(grad.dtype), grad, layer.stride, layer.padding, layer.dilation, layer.groups)
        return found, None, None, None


class StoredLinear(nn.Linear):
    """A frozen Linear whose weight is kept in a smaller format than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class StoredConv2d(nn.Conv2d):
    """A frozen Conv2d whose weight is kept in a smaller format than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return _Conv2d.apply(x, self.weight, self.bias, self)
