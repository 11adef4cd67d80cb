"""Frozen convolutions with their weights in oneDNN's own layout, for fp32 on a CPU.

torch hands oneDNN a convolution's weights in torch's order, and oneDNN reorders them at every call, forward and backward.
In the deep levels of a UNet, where pictures are small and weights large, that costs as much as the convolution. A frozen
layer's weights can be reordered once: for the forward pass, and turned around for the gradient of the input, which of a
convolution with stride 1 is a convolution again. The operators are private to torch (its compiler uses them): where they are
missing, wrong or not faster for a shape, the plain ones stay.

B rows, I and O input and output channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.engine.table import faster

LEAST_CHANNELS = 64
TOLERANCE = 1e-5  # of the largest value: another order of summation, nothing else


def pack(unet: nn.Module) -> int:
    """Let every frozen 3 x 3 convolution of stride 1 decide at its first picture whether to be packed; returns how many may.

    A packed layer's plain weight is let go (meta): nothing of a frozen layer is read again but by itself.
    """
    count = 0
    for layer in unet.modules():
        if (type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.stride == (1, 1) and layer.padding == (1, 1)
                and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
                and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
                and not layer.weight.requires_grad and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"):
            layer.__class__ = PackedConv2d  # still a Conv2d to everybody else
            layer.packed = None
            count += 1
    return count


class PackedConv2d(nn.Conv2d):
    """A frozen convolution that packs itself, or turns back into a plain one, when it first sees a picture."""

    packed: tuple[Tensor, Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None and not self._decide(x):
            self.__class__ = nn.Conv2d
            return F.conv2d(x, self.weight, self.bias, padding=1)
        if x.dtype != torch.float32:
            raise RuntimeError("a packed convolution computes in float32")
        return _Packed.apply(x, self)

    @torch.no_grad()
    def _decide(self, x: Tensor) -> bool:
        """Pack if it is right and faster for pictures like x."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        turned = self.weight.flip(2, 3).transpose(0, 1).contiguous()
        grad = torch.ones(len(x), self.out_channels, *x.shape[2:])
        wanted = F.conv2d(x, self.weight, self.bias, padding=1)
        try:
            found = reorder(self.weight, x), reorder(turned, grad)
            same = all(torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max())) for one, other in (
                (run(x, found[0], self.bias), wanted), (run(grad, found[1], None), _input_gradient(x, self.weight, grad))))
        except (RuntimeError, AttributeError, NotImplementedError):  # private operators: gone or changed in this torch
            return False
        question = f"conv3x3 {self.in_channels}-{self.out_channels} {tuple(x.shape[2:])} x{len(x)}"
        if not same or not faster(question, lambda: (F.conv2d(x, self.weight, self.bias, padding=1), _input_gradient(x, self.weight, grad)),
                                  lambda: (run(x, found[0], self.bias), run(grad, found[1], None))):
            return False
        self.packed = found
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        return True


class _Packed(torch.autograd.Function):
    """y = x * W + b, and x's gradient; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedConv2d) -> Tensor:  # (B, I, H, W) -> (B, O, H, W)
        ctx.layer = layer
        return run(x, layer.packed[0], layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return run(grad, ctx.layer.packed[1], None), None


def reorder(weight: Tensor, x: Tensor) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) in the layout oneDNN likes for inputs like x."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, list(x.shape))


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with a reordered kernel."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def _input_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=1)
