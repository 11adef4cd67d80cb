"""Low-rank algebra in float64: singular values of a pair from its factors, truncation, joining, extraction.

The best approximation of rank r, in the Frobenius norm, keeps the r largest singular values; its squared error is the
sum of the squares of the others (Eckart & Young 1936). O outputs, I inputs (kh kw included), r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import Problem
from finetune.formats.lora_kinds import LoraModule


@dataclass(frozen=True)
class Spectrum:
    """A matrix (O, I) as left (O, k), singular values (k,) falling, right (k, I), all float64.

    Attributes:
        shape: of the layer's weight, (O, I) or (O, I, kh, kw).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the matrix."""
        return self.values.square().sum().item()

    def lost(self, rank: int) -> float:
        """Squared error of the best approximation of this rank: the tail of the squared singular values."""
        return self.values[rank:].square().sum().item()

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps `share` of the energy (0 to 1); 1 for a matrix of zeros."""
        kept = self.values.square().cumsum(0)
        if not self.energy:
            return 1
        return min(int((kept < share * kept[-1] * (1 - 1e-12)).sum().item()) + 1, len(self.values))


def of_factors(up: Tensor, down: Tensor, scale: float = 1.0) -> Spectrum:
    """Singular values of scale * up @ down, without ever building the O x I matrix.

    up = Q1 R1 and down^T = Q2 R2, so up @ down = Q1 (R1 R2^T) Q2^T: only a core of at most r x r is decomposed.
    """
    q1, r1 = torch.linalg.qr(up.double().flatten(1))
    q2, r2 = torch.linalg.qr(down.double().flatten(1).mT)
    left, values, right = torch.linalg.svd(scale * r1 @ r2.mT, full_matrices=False)
    return Spectrum(q1 @ left, values, right @ q2.mT, (up.shape[0], *down.shape[1:]))


def of_pair(pair: LoraModule) -> Spectrum:
    """Singular values of what a pair adds at strength 1."""
    return of_factors(pair.up, pair.down, pair.scale)


def of_matrix(weight: Tensor) -> Spectrum:
    """Singular values of a weight or a difference of weights, convolutions flattened to (O, I kh kw)."""
    left, values, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    return Spectrum(left, values, right, tuple(weight.shape))


def truncate(spectrum: Spectrum, rank: int, clamp: float | None = None) -> LoraModule:
    """The best pair of a rank, alpha = rank, float32; rows beyond the matrix's own rank are zero.

    The singular values are shared evenly between the factors (a square root each), so that neither leaves float16's
    range. With `clamp`, kohya's convention: all in `up`, then every entry of both factors limited to this quantile.

    Args:
        clamp: a quantile, 0 to 1, such as kohya's .99; it makes the approximation worse and outliers smaller.
    """
    kept = min(rank, len(spectrum.values))
    left, values, right = spectrum.left[:, :kept], spectrum.values[:kept], spectrum.right[:kept]
    if clamp is None or clamp >= 1:
        up, down = left * values.sqrt(), values.sqrt()[:, None] * right
    else:
        up, down = left * values, right
        limit = quantile(torch.cat([up.flatten(), down.flatten()]), clamp)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    up, down = pad(up, 1, rank), pad(down, 0, rank)
    out, inputs, *kernel = spectrum.shape
    return LoraModule(down.reshape(rank, inputs, *kernel).float(), up.reshape(out, rank, *[1] * len(kernel)).float(), float(rank))


def pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along `dim` up to `size`."""
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return tensor if missing[dim] == 0 else torch.cat([tensor, tensor.new_zeros(missing)], dim=dim)


def quantile(values: Tensor, share: float) -> float:
    """The quantile with linear interpolation; torch's own refuses more than 2^24 values."""
    place = share * (values.numel() - 1)
    ordered = values.sort().values
    below = int(place)
    above = min(below + 1, values.numel() - 1)
    return (ordered[below] + (place - below) * (ordered[above] - ordered[below])).item()


def error(spectrum: Spectrum, pair: LoraModule) -> float:
    """Squared Frobenius distance between a decomposed matrix and a pair's effect, again from factors alone."""
    up = torch.cat([spectrum.left * spectrum.values, -pair.scale * pair.up.double().flatten(1)], dim=1)
    down = torch.cat([spectrum.right, pair.down.double().flatten(1)], dim=0)
    return of_factors(up, down).energy


def join(pairs: Sequence[tuple[LoraModule, float]]) -> LoraModule:
    """One pair with the sum of several effects, exactly: ranks are put side by side.

    Args:
        pairs: each with its strength, which goes into `up`; alpha becomes the sum of ranks, so the scale is 1.

    Raises:
        Problem: they are for layers of different shapes.
    """
    first = pairs[0][0]
    if any((pair.up.shape[0], pair.down.shape[1:]) != (first.up.shape[0], first.down.shape[1:]) for pair, _ in pairs):
        raise Problem("The LoRAs change layers of different widths.", "They were trained for different bases.",
                      "Merge LoRAs of one base only.")
    up = torch.cat([pair.up.float() * (pair.scale * strength) for pair, strength in pairs], dim=1)
    down = torch.cat([pair.down.float() for pair, _ in pairs], dim=0)
    return LoraModule(down, up, float(down.shape[0]))
