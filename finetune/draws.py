"""Common random numbers: every draw is a pure function of (seed, stream, step).

Methods consume randomness differently, so a shared generator would give each of them other noise. Here a draw
depends on its name and its place only: all methods see the same pictures with the same noise at the same step,
a resumed run needs no generator state, and drawing a preview cannot disturb training. The variance-reduction
argument is the classic one for comparing systems under common random numbers (Law, Simulation Modeling and
Analysis, ch. 11.2).
"""

from __future__ import annotations

import hashlib

import torch


def key(seed: int, stream: str, *place: int | str) -> int:
    """A 63-bit integer that is a stable hash of seed, stream name and place (step, row, process rank...)."""
    text = "\x1f".join([str(seed), stream, *map(str, place)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, *place: int | str) -> torch.Generator:
    """A CPU generator for one draw. CPU on purpose: the same numbers on every device."""
    return torch.Generator().manual_seed(key(seed, stream, *place))


def normal(shape: tuple[int, ...], seed: int, stream: str, *place: int | str) -> torch.Tensor:
    """Standard normal fp32 tensor on the CPU."""
    return torch.randn(shape, generator=generator(seed, stream, *place))


def uniform(count: int, seed: int, stream: str, *place: int | str) -> list[float]:
    """`count` numbers in [0, 1)."""
    return torch.rand(count, generator=generator(seed, stream, *place), dtype=torch.float64).tolist()


def integers(low: int, high: int, count: int, seed: int, stream: str, *place: int | str) -> torch.Tensor:
    """`count` int64 numbers in [low, high)."""
    return torch.randint(low, high, (count,), generator=generator(seed, stream, *place))


def order(count: int, seed: int, stream: str, *place: int | str) -> list[int]:
    """A permutation of range(count)."""
    return torch.randperm(count, generator=generator(seed, stream, *place)).tolist()
