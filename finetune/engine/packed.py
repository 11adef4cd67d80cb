"""Frozen convolutions in the form oneDNN or BLAS likes, for fp32 on a CPU.

torch hands oneDNN a convolution's weights in torch's order, and oneDNN reorders them at every call, forward and backward.
In the deep levels of a UNet, where pictures are small and weights large, that costs as much as the convolution. A frozen
layer's weights can be reordered once: for the forward pass, and turned around for the gradient of the input, which of a
convolution with stride 1 is a convolution again. The operators are private to torch (its compiler uses them): where they are
missing, wrong or not faster for a shape, the plain ones stay. A 1 x 1 convolution is a product of matrices, and as such often
faster as well.

B rows, I and O input and output channels, H and W height and width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.engine.table import faster, known

LEAST_CHANNELS = 64
TOLERANCE = 1e-5  # of the largest value: another order of summation, nothing else


def pack(unet: nn.Module) -> int:
    """Let every frozen convolution of stride 1 choose its form at its first picture; returns how many may.

    A packed layer's plain weight is let go (meta): nothing of a frozen layer is read again but by itself.
    """
    count = 0
    for layer in unet.modules():
        if (type(layer) is nn.Conv2d and layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
                and (layer.kernel_size, layer.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
                and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
                and not layer.weight.requires_grad and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"):
            layer.__class__ = PackedConv2d if layer.kernel_size == (3, 3) else ProductConv2d  # still a Conv2d to everybody else
            layer.chosen = None
            count += 1
    return count


class ChoosingConv2d(nn.Conv2d):
    """A frozen convolution that takes another form, or turns back into a plain one, when it first sees a picture."""

    chosen: Any

    def forward(self, x: Tensor) -> Tensor:
        if self.chosen is None and not self._choose(x):
            self.__class__ = nn.Conv2d
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return _Other.apply(x, self)

    @torch.no_grad()
    def _choose(self, x: Tensor) -> bool:
        """Take the other form if it is right and faster for pictures like x."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        side = self.kernel_size[0]
        question = f"conv{side}x{side} {self.in_channels}-{self.out_channels} {tuple(x.shape[2:])} x{len(x)}"
        answer = known(question)  # of an earlier run: then the two ways were compared on this machine, with this torch
        if answer is False:
            return False
        try:
            self.chosen = self.form(x)
            right = bool(answer) or self._same(x, question)
        except (RuntimeError, AttributeError, NotImplementedError):  # private operators: gone or changed in this torch
            right = False
        if not right:
            self.chosen = None
            return False
        self.settle()
        return True

    def _same(self, x: Tensor, question: str) -> bool:
        """Whether both directions give the convolution's numbers, in less time."""
        some = x.detach().clone()
        grad = torch.ones(len(x), self.out_channels, *x.shape[2:])

        def plain() -> tuple[Tensor, Tensor]:
            return F.conv2d(some, self.weight, self.bias, padding=self.padding), torch.nn.grad.conv2d_input(some.shape, self.weight, grad, padding=self.padding)

        def other() -> tuple[Tensor, Tensor]:
            return self.ahead(some), self.back(grad)

        same = all(torch.allclose(one, right, rtol=0, atol=TOLERANCE * float(right.abs().max())) for one, right in zip(other(), plain(), strict=True))
        return same and faster(question, plain, other)

    def form(self, x: Tensor) -> Any:
        """What the other way computes with, made of the weight."""
        return True

    def settle(self) -> None:
        """Called once the other form is taken."""

    @abstractmethod
    def ahead(self, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H, W)
        """The output in the other form."""

    @abstractmethod
    def back(self, grad: Tensor) -> Tensor:  # (B, O, H, W) -> (B, I, H, W)
        """The gradient of the input in the other form."""


class PackedConv2d(ChoosingConv2d):
    """3 x 3, with both kernels in oneDNN's layout."""

    def form(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned = self.weight.flip(2, 3).transpose(0, 1).contiguous()
        return reorder(self.weight, x), reorder(turned, x.new_empty(len(x), self.out_channels, *x.shape[2:]))

    def settle(self) -> None:
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)

    def ahead(self, x: Tensor) -> Tensor:
        return run(x, self.chosen[0], self.bias)

    def back(self, grad: Tensor) -> Tensor:
        return run(grad, self.chosen[1], None)


class ProductConv2d(ChoosingConv2d):
    """1 x 1, as a product over all places of a picture."""

    def ahead(self, x: Tensor) -> Tensor:
        found = torch.matmul(self.weight[:, :, 0, 0], x.flatten(2)).unflatten(2, x.shape[2:])
        return found if self.bias is None else found.add_(self.bias[:, None, None])

    def back(self, grad: Tensor) -> Tensor:
        return torch.matmul(self.weight[:, :, 0, 0].t(), grad.flatten(2)).unflatten(2, grad.shape[2:])


class _Other(torch.autograd.Function):
    """The output in the other way, and x's gradient; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ChoosingConv2d) -> Tensor:
        ctx.layer = layer
        return layer.ahead(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(grad), None


def reorder(weight: Tensor, x: Tensor) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) in the layout oneDNN likes for inputs like x."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, list(x.shape))


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with a reordered kernel."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")
