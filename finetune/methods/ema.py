"""Exponential moving average of trained tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Shadow copies that follow the parameters: shadow = d shadow + (1 - d) value (Polyak & Juditsky 1992).

    Args:
        parameters: what to follow, by name.
        decay: d; ramped up as min(decay, (1 + step) / (10 + step)) so that early averages are not of the start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = dict(parameters), decay
        self.shadow = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters' present values; once per optimizer step."""
        self.steps += 1
        step = int(self.steps)
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), weight)

    def state(self) -> dict[str, Tensor]:
        """Live tensors for a checkpoint."""
        return {"steps": self.steps, **{f"shadow.{name}": value for name, value in self.shadow.items()}}

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside the context the parameters hold the averages."""
        kept = {name: value.detach().clone() for name, value in self.parameters.items()}
        try:
            for name, value in self.parameters.items():
                value.copy_(self.shadow[name])
            yield
        finally:
            for name, value in self.parameters.items():
                value.copy_(kept[name])
