"""How fast this processor's kernels are for Stable Diffusion's shapes: GFLOP/s of products, convolutions and attention.

What it answers: whether fp32 products run at the processor's speed, whether packing a convolution's weights pays at a
level of the UNet, whether bf16 is any faster than fp32 here.

    python benchmarks/kernels.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import torch
from torch.nn import functional as F

LINEARS = ((1024, 320, 320), (1024, 320, 1280), (256, 640, 640), (64, 1280, 1280), (64, 1280, 10240))  # rows, in, out
CONVS = ((320, 32, 320), (640, 16, 640), (1280, 8, 1280), (1280, 4, 1280))  # in, side, out
ATTENTIONS = ((1024, 40), (256, 80), (64, 160))  # tokens, width of each of 8 heads


def main() -> None:
    found = common.parser("GFLOP/s of kernels at the shapes of Stable Diffusion 1.5, 256 px, batch 1.")
    found.add_argument("--repeats", type=int, default=5, help="runs of each; the fastest counts")
    found.add_argument("--few", action="store_true", help="only the first shape of each kind")
    options = found.parse_args()
    end = 1 if options.few else None
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        results |= {f"linear {m} x {k} -> {n}": _linear(m, k, n, options.repeats) for m, k, n in LINEARS[:end]}
        results |= {f"conv 3x3 {c} -> {o}, {s} x {s}": _conv(c, s, o, options.repeats) for c, s, o in CONVS[:end]}
    results |= {f"attention {tokens}, 8 x {width}": _attention(tokens, width, options.repeats) for tokens, width in ATTENTIONS[:end]}
    columns = ("fp32", "packed", "fp32 back", "bf16", "bf16 back")
    common.show("GFLOP/s", ("", *columns), [(name, *(f"{one[key]:.0f}" if key in one else "" for key in columns)) for name, one in results.items()])
    common.write({"gigaflops": results}, options.json)


def _linear(rows: int, wide: int, out: int, repeats: int) -> dict[str, float]:
    x, weight = torch.randn(rows, wide), torch.randn(out, wide)
    work = 2e-9 * rows * wide * out
    found = {"fp32": work / _best(lambda: F.linear(x, weight), repeats), "bf16": work / _best(_bf16(F.linear, x, weight), repeats)}

    def reorder() -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def run(packed: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return found | _packed(run, reorder, work, repeats)


def _conv(channels: int, side: int, out: int, repeats: int) -> dict[str, float]:
    x, weight, grad = torch.randn(1, channels, side, side), torch.randn(out, channels, 3, 3), torch.randn(1, out, side, side)
    work, ones = 2e-9 * channels * out * 9 * side * side, [1, 1]

    def back() -> Any:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, ones, ones, ones, False, [0, 0], 1, [True, False, False])

    found = {"fp32": work / _best(lambda: F.conv2d(x, weight, padding=1), repeats), "fp32 back": work / _best(back, repeats),
             "bf16": work / _best(_bf16(lambda a, b: F.conv2d(a, b, padding=1), x, weight), repeats)}

    def reorder() -> Any:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, ones, ones, ones, 1, list(x.shape))

    def run(packed: Any) -> Any:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, None, ones, ones, ones, 1, "none", [], "")

    return found | _packed(run, reorder, work, repeats)


def _attention(tokens: int, width: int, repeats: int) -> dict[str, float]:
    found, work = {}, 4e-9 * 8 * tokens * tokens * width
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        parts = [torch.randn(1, 8, tokens, width, dtype=kind, requires_grad=True) for _ in range(3)]
        grad = torch.ones_like(parts[0])
        ahead = _best(lambda parts=parts: F.scaled_dot_product_attention(*parts), repeats)
        both = _best(lambda parts=parts, grad=grad: torch.autograd.grad(F.scaled_dot_product_attention(*parts), parts, grad), repeats)
        found |= {name: work / ahead, f"{name} back": 2.5 * work / max(both - ahead, 1e-9)}  # flash recomputes the scores: 5 products for 2
    return found


def _packed(run: Callable[[Any], Any], reorder: Callable[[], Any], work: float, repeats: int) -> dict[str, float]:
    """The rate with weights in oneDNN's order, where this torch has the private operators."""
    try:
        packed = reorder()
        return {"packed": work / _best(lambda: run(packed), repeats)}
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}


def _bf16(work: Callable[..., Any], *parts: torch.Tensor) -> Callable[[], Any]:
    rounded = [part.bfloat16() for part in parts]
    return lambda: work(*rounded)


def _best(work: Callable[[], Any], repeats: int) -> float:
    """Least seconds of a few runs after a first one."""
    work()
    return min(getattr(common.measure(work), common.clock()) for _ in range(repeats)) or 1e-9


if __name__ == "__main__":
    main()
