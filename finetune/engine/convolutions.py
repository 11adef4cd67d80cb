"""Convolutions in whichever way this processor does them fastest, for fp32 on a CPU.

torch hands oneDNN a convolution's weights in torch's order, and oneDNN reorders them at every call, forward and backward.
In the deep levels of a UNet, where pictures are small and weights large, that costs as much as the convolution. Other ways to
the same numbers, in another order of summation:

- columns: the 3 x 3 neighbourhoods of a picture as columns of a matrix (im2col, Chellapilla et al. 2006) and one product with
  the weights as they are; backward the transposed product, its columns added up (folded), or, of a frozen weight, a product
  with the kernel turned around. A 1 x 1 convolution is such a product without columns.
- packed: a frozen weight reordered once for oneDNN; the gradient of the input is a convolution with the turned kernel. The
  operators are private to torch (its compiler uses them): where they are missing or wrong the others stay.

Each direction of each layer takes what was measured to be fastest for its shape on this machine (engine.table).

B rows, I and O input and output channels, H and W height and width, K the kernel's side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetune.engine.table import fastest

LEAST_CHANNELS = 64
TOLERANCE = 1e-5  # of the largest value: another order of summation, nothing else


class Way(NamedTuple):
    """One way to do one direction of a layer.

    Attributes:
        run: (layer, kernel, what comes in, ...) -> what comes out.
        kernel: makes a copy of a frozen weight in another form, from the layer and the shape of the input; None: the weight as it is.
        fits: whether the way exists for a layer.
    """

    run: Callable[..., Tensor]
    kernel: Callable[[nn.Conv2d, Any], Tensor] | None = None
    fits: Callable[[nn.Conv2d], bool] = lambda layer: True


def quicken(unet: nn.Module) -> int:
    """Let every large convolution choose its ways at its first picture; returns how many will.

    A frozen layer's plain weight is let go (meta) once neither direction reads it, unless an adapter stands around the layer:
    some read the weight themselves (DoRA its norm).
    """
    wrapped = {id(layer.base_layer) for layer in unet.modules() if hasattr(layer, "base_layer")}
    count = 0
    for layer in unet.modules():
        if (type(layer) is nn.Conv2d and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
                and (layer.kernel_size, layer.padding, layer.stride) in (((3, 3), (1, 1), (1, 1)), ((3, 3), (1, 1), (2, 2)), ((1, 1), (0, 0), (1, 1)))
                and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
                and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"):
            layer.__class__ = ChoosingConv2d  # still a Conv2d to everybody else
            layer.chosen, layer.wrapped = {}, id(layer) in wrapped
            count += 1
    return count


class ChoosingConv2d(nn.Conv2d):
    """A convolution that measures its ways when it first sees a picture, forward and backward each."""

    chosen: dict[str, tuple[Way, Tensor | None]]
    wrapped: bool

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias, self)

    def go(self, direction: str, shape: Any, *given: Tensor) -> Tensor:
        """One direction's result, by the way chosen for it.

        Args:
            direction: of WAYS. shape: of the layer's input. given: what the direction takes.
        """
        if direction not in self.chosen:
            self.chosen[direction] = self._choose(direction, shape, *given)
            self._settle()
        way, kernel = self.chosen[direction]
        return way.run(self, kernel, *given)

    @torch.no_grad()
    def _choose(self, direction: str, shape: Any, *given: Tensor) -> tuple[Way, Tensor | None]:
        frozen = not self.weight.requires_grad
        ways = {name: way for name, way in WAYS[direction].items() if way.fits(self) and (frozen or way.kernel is None)}

        @lru_cache
        def kernel(name: str) -> Tensor | None:
            make = ways[name].kernel
            return make(self, shape) if make else None

        def work(name: str) -> Tensor:
            return ways[name].run(self, kernel(name), *given)

        side, stride = self.kernel_size[0], f" every {self.stride[0]}" if self.stride[0] > 1 else ""
        question = f"conv{side}x{side}{stride} {self.in_channels}-{self.out_channels} {tuple(shape[2:])} x{shape[0]} {direction}"
        name = fastest(question + ("" if frozen else " trained"), {name: partial(work, name) for name in ways}, TOLERANCE)
        return ways[name], kernel(name)

    def _settle(self) -> None:
        """Let the plain weight go once nothing reads it."""
        if not self.wrapped and not self.weight.requires_grad and {"ahead", "back"} <= self.chosen.keys() and all(kernel is not None for _, kernel in self.chosen.values()):
            self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)


class _Convolution(torch.autograd.Function):
    """The output, and the gradients that are asked for, each in its way; x is kept only where the weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: ChoosingConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        if weight.requires_grad:
            ctx.save_for_backward(x, weight)  # the weight so that a change in between is an error, as with torch's own
        return layer.go("ahead", x.shape, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        layer, (for_x, for_weight, for_bias, _) = ctx.layer, ctx.needs_input_grad
        kept = ctx.saved_tensors[0] if for_weight else None
        return (layer.go("back", ctx.shape, grad, _like(ctx.shape, grad)) if for_x else None,
                layer.go("weight", ctx.shape, grad, kept) if for_weight else None,
                grad.sum((0, 2, 3)) if for_bias else None, None)


def _like(shape: Any, grad: Tensor) -> Tensor:
    """A tensor of a shape without memory of its own: where only the shape is read."""
    return grad.new_empty(1).expand(shape)


def _plain(layer: nn.Conv2d, kernel: None, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H', W')
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def _plain_gradient(which: int, layer: nn.Conv2d, kernel: None, grad: Tensor, x: Tensor) -> Tensor:
    """torch's own gradient: 0 of the input, 1 of the weight."""
    wanted = [number == which for number in range(3)]
    return torch.ops.aten.convolution_backward(grad, x, layer.weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], 1, wanted)[which]


def _columns(layer: nn.Conv2d, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, I K K, H' W')
    return x.flatten(2) if layer.kernel_size == (1, 1) else F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)


def _product(layer: nn.Conv2d, kernel: None, x: Tensor) -> Tensor:
    rows = layer.weight.flatten(1).expand(len(x), -1, -1)  # (B, O, I K K)
    columns = _columns(layer, x)
    found = torch.bmm(rows, columns) if layer.bias is None else torch.baddbmm(layer.bias[:, None], rows, columns)
    return found.unflatten(2, tuple((side - 1) // layer.stride[0] + 1 for side in x.shape[2:]))


def _folded(layer: nn.Conv2d, kernel: None, grad: Tensor, x: Tensor) -> Tensor:  # (B, O, H', W') -> (B, I, H, W)
    columns = torch.bmm(layer.weight.flatten(1).t().expand(len(grad), -1, -1), grad.flatten(2))
    return columns.view(x.shape) if layer.kernel_size == (1, 1) else F.fold(columns, x.shape[2:], layer.kernel_size, padding=layer.padding, stride=layer.stride)


def _product_weight(layer: nn.Conv2d, kernel: None, grad: Tensor, x: Tensor) -> Tensor:  # -> (O, I, K, K)
    slopes, columns = grad.flatten(2), _columns(layer, x)
    found = slopes[0] @ columns[0].t()
    for slope, column in zip(slopes[1:], columns[1:], strict=True):
        found.addmm_(slope, column.t())
    return found.view(layer.weight.shape)


def turned(layer: nn.Conv2d, shape: Any) -> Tensor:
    """The kernel (I, O, K, K) of which the convolution of stride 1 with the output's gradient is the input's."""
    return layer.weight.flip(2, 3).transpose(0, 1).contiguous()


def _turned_product(layer: nn.Conv2d, kernel: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    columns = F.unfold(grad, layer.kernel_size, padding=layer.padding)
    return torch.bmm(kernel.flatten(1).expand(len(grad), -1, -1), columns).view(x.shape)


def reorder(weight: Tensor, shape: Any) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) in the layout oneDNN likes for inputs of the shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, list(shape))


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with a reordered kernel. Its layout may suit another shape better; then channels come out innermost, and are put back."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "").contiguous()


def _packable(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (3, 3) and layer.stride == (1, 1)


WAYS: dict[str, dict[str, Way]] = {  # the first of each is torch's own, the last takes most memory
    "ahead": {"plain": Way(_plain), "columns": Way(_product),
              "packed": Way(lambda layer, kernel, x: run(x, kernel, layer.bias), lambda layer, shape: reorder(layer.weight, shape), _packable)},
    "back": {"plain": Way(partial(_plain_gradient, 0)), "folded": Way(_folded), "turned": Way(_turned_product, turned, _packable),
             "packed": Way(lambda layer, kernel, grad, x: run(grad, kernel, None),
                           lambda layer, shape: reorder(turned(layer, shape), (shape[0], layer.out_channels, *shape[2:])), _packable)},
    "weight": {"plain": Way(partial(_plain_gradient, 1)), "columns": Way(_product_weight)},
}
