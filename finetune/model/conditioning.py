"""What a prompt is to the network: text states, and for SDXL one pooled state beside them.

B prompts, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """Encoded prompts, sliced, joined and repeated as one thing.

    Attributes:
        states: (B, L, D), what cross-attention reads.
        pooled: (B, P), added to the time embedding; SDXL only (Podell et al. 2023, sec. 2.1), else None.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> Cond:
        """Some of the prompts."""
        return self._each(lambda tensor: tensor[rows])

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Several as one batch; all of one length and of one kind of model."""
        pooled = [cond.pooled for cond in conds if cond.pooled is not None]
        return Cond(torch.cat([cond.states for cond in conds]), torch.cat(pooled) if pooled else None)

    def expand(self, batch: int) -> Cond:
        """One prompt for each of `batch` rows, without copying."""
        return self._each(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def to(self, *target: Any, **named: Any) -> Cond:
        """On another device or in another dtype, as Tensor.to."""
        return self._each(lambda tensor: tensor.to(*target, **named))

    def clone(self) -> Cond:
        """A copy that shares no memory."""
        return self._each(torch.Tensor.clone)

    def _each(self, change: Any) -> Cond:
        return Cond(change(self.states), None if self.pooled is None else change(self.pooled))
