"""What the engine does to networks and optimizer that tensors without memory cannot go through: bitsandbytes' own kernels.

The stand-ins hold the same bytes and keep the same things for the backward pass; numbers they have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune import engine
from finetune.engine import attention, convolutions
from finetune.engine.optimizer import InBackward
from finetune.engine.table import known
from finetune.settings import TrainSettings

BLOCK_4BIT, BLOCK_8BIT = 64, 256  # numbers that share one scale: NF4 weights, 8-bit optimizer state (bitsandbytes' defaults)
SMALLEST_8BIT = 4096  # a tensor of fewer numbers keeps its optimizer state in 32 bits


def store(unet: nn.Module, settings: TrainSettings) -> None:
    """`engine.store` for a UNet of fake tensors: the engine's own, with stand-ins where it would quantize."""
    wanted = engine.format_of(settings)
    if wanted in ("8bit", "4bit"):
        for layer in unet.modules():
            if type(layer) is nn.Linear:
                layer.weight = nn.Parameter(_packed(layer.weight, wanted), requires_grad=False)
                layer.__class__ = Quantized4 if wanted == "4bit" else Quantized8
        settings = settings.model_copy(update={"frozen": "bf16"})
    engine.store(unet, settings)


def _packed(weight: Tensor, wanted: str) -> Tensor:
    """Bytes of a quantized weight with its scales, in the weight's shape: half a byte or one a number, and float32 scales."""
    numbers = weight.numel()
    scales = 4 * (weight.shape[0] if wanted == "8bit" else -(-numbers // BLOCK_4BIT))
    whole = torch.empty((numbers if wanted == "8bit" else numbers // 2) + scales, dtype=torch.uint8)
    return whole[:1].expand(weight.shape)


class _Quantized(torch.autograd.Function):
    """x W' + b with W made whole for the moment, in both directions.

    4 bits: nothing but the weight is kept. 8 bits: bitsandbytes keeps the input as well (its MatMul8bitLt), and computes in fp16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        ctx.shape, ctx.kept = weight.shape, x if keep else None
        whole = torch.empty(weight.shape, dtype=torch.float16 if keep else x.dtype)
        return torch.nn.functional.linear(x.to(whole.dtype), whole).to(x.dtype) + (0 if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None, None, None


class Quantized4(nn.Linear):
    """A Linear by bitsandbytes in 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _Quantized.apply(x, self.weight, self.bias, False)


class Quantized8(nn.Linear):
    """A Linear by bitsandbytes in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _Quantized.apply(x, self.weight, self.bias, True)


class Adam8(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit without arithmetic: the state it makes at the first step."""

    def __init__(self, params: Any, **more: Any):
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        """State for every tensor that has a gradient."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None and not self.state[value]:
                    self.state[value] = eight_bit_state(value)


def eight_bit_state(value: Tensor) -> dict[str, Tensor]:
    """Two moments in 8 bits with a scale for each block and their code books, or in 32 bits where the tensor is small."""
    if value.numel() < SMALLEST_8BIT:
        return {key: torch.zeros_like(value, dtype=torch.float32) for key in ("state1", "state2")}
    blocks = -(-value.numel() // BLOCK_8BIT)
    found = {key: torch.zeros_like(value, dtype=torch.uint8) for key in ("state1", "state2")}
    return found | {key: torch.zeros(256) for key in ("qmap1", "qmap2")} | {key: torch.zeros(blocks) for key in ("absmax1", "absmax2")}


def make_optimizer(groups: Iterable[Any], settings: TrainSettings) -> Any:
    """`engine.make_optimizer`, with a stand-in for bitsandbytes'."""
    if settings.optimizer != "adamw8bit":
        return engine.make_optimizer(groups, settings)
    listed = [{"params": list(group.parameters.values())} for group in groups]
    return InBackward(listed, Adam8) if settings.step_in_backward else Adam8(listed)


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """Inside the context what needs real tensors is done on paper.

    Kernels are chosen by what is known of this machine, and by the last way where nothing is known: it takes most memory.
    Private operators of oneDNN give results of the right shape. And `module.to(...)` takes fake tensors that are where they
    are made there, or in that number format: torch would exchange them, and refuses because its own fake mode remembers them.
    """
    def swap(mine: Tensor, other: Tensor) -> None:
        if (mine.dtype, mine.device) != (other.dtype, other.device):
            mine.data = other.data

    def fastest(question: str, ways: Mapping[str, Any], tolerance: float) -> str:
        answer = known(question)
        return answer if answer in ways else list(ways)[-1]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(x, weight, bias, padding=1)

    changes = [(torch.utils, "swap_tensors", swap), (convolutions, "fastest", fastest), (attention, "fastest", fastest),
               (convolutions, "reorder", lambda weight, shape: torch.empty_like(weight)), (convolutions, "run", run)]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for place, name, value in changes:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
