"""Broken numbers stop a run before the optimizer has seen them, without waiting for the device at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.errors import Problem


class Guard:
    """Watches losses and gradients of a run.

    On a CPU a value is looked at when it comes. On a GPU that would make every step wait for the one before, so the answer
    stays there: torch's fused AdamW leaves out a step whose `found_inf` is set, and the values are looked at where the loop
    looks at numbers anyway. The weights are then those of the last good step.

    Args:
        optimizer: of the run. waits: put the look off; only where the optimizer can be told on the device.
    """

    def __init__(self, optimizer: Any, waits: bool):
        self._optimizer = optimizer
        self._waits = waits and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._noted: list[tuple[str, int, list[str], Tensor]] = []

    def note(self, what: str, step: int, value: Tensor, batch: Any) -> None:
        """A loss or a gradient's norm of a step from 0.

        Raises:
            Problem: it is not finite, and looks are not put off.
        """
        good = torch.isfinite(value)
        if not self._waits:
            if not good:
                raise not_finite(what, step, batch.names)
            return
        self._noted.append((what, step, batch.names, good))

    def arm(self) -> None:
        """Before the optimizer's step: tell it whether to take it."""
        if self._waits and self._noted:
            step = self._noted[-1][1]
            good = torch.stack([good for _, at, _, good in self._noted if at == step]).all()
            self._optimizer.found_inf, self._optimizer.grad_scale = (~good).float(), None

    def look(self) -> None:
        """Look at everything noted since the last time.

        Raises:
            Problem: the first of it that is not finite.
        """
        noted, self._noted = self._noted, []
        if noted and not torch.stack([good for *_, good in noted]).all():
            what, step, names, _ = next(one for one in noted if not one[3])
            raise not_finite(what, step, names)


def not_finite(what: str, step: int, names: list[str]) -> Problem:
    """The refusal to train on a broken number, naming the pictures at hand."""
    return Problem(f"The {what} at step {step + 1} is not a finite number.", f"The pictures were {', '.join(dict.fromkeys(names))}.",
                   "Lower --learning-rate, or use --precision fp32; the last checkpoint is good.")
