"""The kinds of adapters a LoRA file can hold, and the change each makes to the weight of a layer.

Every kind answers one question: `change(weight)`, the tensor to add to the layer's weight at strength 1, in float32; at
strength s it is s times that. Sources: LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, 2402.09353), LoHa
and LoKr (Yeh et al. 2023, LyCORIS, 2309.14859), OFT (Qiu et al. 2023, 2306.07280). O outputs, I inputs, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


class Adapter(ABC):
    """What a file holds for one layer."""

    kind: ClassVar[str]
    needs_weight: ClassVar[bool] = False  # whether the change depends on the weight it is added to

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """What to add to `weight` (O, I) or (O, I, kh, kw) at strength 1, in float32 and of its shape.

        Raises:
            RuntimeError: the adapter is for a layer of another shape.
        """


@dataclass(frozen=True)
class LoraModule(Adapter):
    """One low-rank pair: W' = W + (alpha / r) up @ down.

    Attributes:
        down: (r, I) for a linear module, (r, I, kh, kw) for a convolution.
        up: (O, r), or (O, r, 1, 1).
        alpha: scale is alpha / r.
    """

    down: Tensor
    up: Tensor
    alpha: float
    kind: ClassVar[str] = "LoRA"

    @property
    def rank(self) -> int:
        """Inner dimension of the pair."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """Change of the weight at strength 1 in float32, (O, I) or (O, I, kh, kw)."""
        flat = self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)
        return flat.reshape(self.up.shape[0], *self.down.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        return self.delta().to(weight.device).reshape(weight.shape)


@dataclass(frozen=True)
class DoraModule(Adapter):
    """A pair and the length each row (or column) of the new weight has: W' = m (W + D) / norm.

    Attributes:
        pair: gives D.
        magnitude: (O, 1) or (O, 1, 1, 1) for rows, which is PEFT's way; (1, I) or (1, I, 1, 1) for columns, LyCORIS' first.
        norm: of what the norm is taken: "merged", W + D, as the paper, PEFT and LyCORIS say; "base", W alone, as ComfyUI
            computes it for rows.
    """

    pair: LoraModule
    magnitude: Tensor
    norm: Literal["merged", "base"] = "merged"
    kind: ClassVar[str] = "DoRA"
    needs_weight: ClassVar[bool] = True

    def change(self, weight: Tensor) -> Tensor:
        weight = weight.float()
        merged = weight + self.pair.change(weight)
        length = self.lengths(weight if self.norm == "base" and self.by_row(weight) else merged)
        return merged * (self.magnitude.to(weight) / (length + torch.finfo(torch.float32).eps)) - weight

    def by_row(self, weight: Tensor) -> bool:
        """Whether a length belongs to an output; otherwise to an input."""
        return self.magnitude.shape[0] == weight.shape[0]

    def lengths(self, weight: Tensor) -> Tensor:
        """Norms of rows or columns, in the shape of the magnitude."""
        kept = 0 if self.by_row(weight) else 1
        return torch.linalg.vector_norm(weight, dim=[axis for axis in range(weight.ndim) if axis != kept], keepdim=True)

    def with_norm(self, norm: Literal["merged", "base"], weight: Tensor) -> DoraModule:
        """The same change of `weight`, with magnitudes for a reader that divides by the other norm."""
        if norm == self.norm or not self.by_row(weight):
            return self
        weight = weight.float()
        merged, base = self.lengths(weight + self.pair.change(weight)), self.lengths(weight)
        factor = base / merged if norm == "base" else merged / base
        return DoraModule(self.pair, self.magnitude.to(weight) * factor, norm)


@dataclass(frozen=True)
class LohaModule(Adapter):
    """Hadamard product of two pairs: W' = W + (alpha / r) (w1_a @ w1_b) * (w2_a @ w2_b).

    Attributes:
        tensors: w1_a, w2_a (O, r), w1_b, w2_b (r, I kh kw); with t1, t2 (r, r, kh, kw) the four are (r, O) and (r, I).
        alpha: scale is alpha / r; None is scale 1.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None
    kind: ClassVar[str] = "LoHa"

    @property
    def scale(self) -> float:
        """alpha / rank, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.tensors["w1_b"].shape[0]

    def change(self, weight: Tensor) -> Tensor:
        part = {name: value.float() for name, value in self.tensors.items()}
        if "t1" in part:
            first, second = (tucker(part[f"t{n}"], part[f"w{n}_a"], part[f"w{n}_b"]) for n in (1, 2))
        else:
            first, second = part["w1_a"] @ part["w1_b"], part["w2_a"] @ part["w2_b"]
        return (self.scale * first * second).to(weight.device).reshape(weight.shape)


@dataclass(frozen=True)
class LokrModule(Adapter):
    """Kronecker product: W' = W + scale kron(w1, w2), either factor whole or as a pair.

    Attributes:
        tensors: w1 (a, c) or w1_a (a, r), w1_b (r, c); w2 (b, d) or (b, d, kh, kw), or w2_a (b, r), w2_b (r, d kh kw), or
            with t2 (r, r, kh, kw) w2_a (r, b) and w2_b (r, d). O = ab, I = cd.
        alpha: scale is alpha / r when a factor is a pair (that of w2 counts); with two whole factors the scale is 1.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None
    kind: ClassVar[str] = "LoKr"

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 when nothing has a rank."""
        inner = next((self.tensors[name].shape[0] for name in ("w2_b", "w1_b") if name in self.tensors), None)
        return 1.0 if inner is None or self.alpha is None else self.alpha / inner

    def change(self, weight: Tensor) -> Tensor:
        part = {name: value.float() for name, value in self.tensors.items()}
        first = part["w1"] if "w1" in part else part["w1_a"] @ part["w1_b"]
        if "w2" in part:
            second = part["w2"]
        else:
            second = tucker(part["t2"], part["w2_a"], part["w2_b"]) if "t2" in part else part["w2_a"] @ part["w2_b"]
        if second.ndim == 4:
            first = first[:, :, None, None]
        return (self.scale * torch.kron(first, second.contiguous())).to(weight.device).reshape(weight.shape)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution (O, I, kh, kw) from its core (r, r, kh, kw), a (r, O) and b (r, I)."""
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


@dataclass(frozen=True)
class OftModule(Adapter):
    """Rotation of the outputs, block by block: W' = R^T W, R = (1 + Q)(1 - Q)^-1, Q = blocks - blocks^T.

    Attributes:
        blocks: (n, b, b) with O = nb.
        bound: largest Frobenius norm of all Q together, None for any; Q is shrunk to it.
        rescale: (O, 1, ...), a factor for each output after the rotation, or None.
    """

    blocks: Tensor
    bound: float | None = None
    rescale: Tensor | None = None
    kind: ClassVar[str] = "OFT"
    needs_weight: ClassVar[bool] = True

    def skew(self) -> Tensor:
        """Q within its bound, (n, b, b) in float32."""
        skew = self.blocks.float() - self.blocks.float().transpose(1, 2)
        length = skew.norm().item()
        return skew * (self.bound / length) if self.bound is not None and length > self.bound else skew

    def change(self, weight: Tensor) -> Tensor:
        weight, skew = weight.float(), self.skew().to(weight.device)
        eye = torch.eye(skew.shape[1], device=skew.device)
        rotation = torch.linalg.solve(eye - skew, eye + skew, left=False)  # (n, b, b)
        new = torch.einsum("knm,kni->kmi", rotation, weight.reshape(*skew.shape[:2], -1)).reshape(weight.shape)
        if self.rescale is not None:
            new = new * self.rescale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
        return new - weight


@dataclass(frozen=True)
class InputOftModule(Adapter):
    """Rotation of the inputs, block by block, which is PEFT's OFT: W' = W R^T.

    Attributes:
        rotation: (n, b, b) with I kh kw = nb, or (1, b, b), one block for all; already evaluated, not its parameters.
    """

    rotation: Tensor
    kind: ClassVar[str] = "OFT of inputs"
    needs_weight: ClassVar[bool] = True

    def change(self, weight: Tensor) -> Tensor:
        flat = weight.float().reshape(weight.shape[0], -1, self.rotation.shape[1])  # (O, n, b)
        rotation = self.rotation.to(flat).expand(flat.shape[1], -1, -1)
        return torch.einsum("okm,knm->okn", flat, rotation).reshape(weight.shape) - weight.float()


@dataclass(frozen=True)
class FullModule(Adapter):
    """The whole difference: W' = W + diff. `diff` has the weight's shape; a bias's difference is `bias` (O,) or None."""

    diff: Tensor
    bias: Tensor | None = None
    kind: ClassVar[str] = "full difference"

    def change(self, weight: Tensor) -> Tensor:
        return self.diff.to(weight.device).float().reshape(weight.shape)
