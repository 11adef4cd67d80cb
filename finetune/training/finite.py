"""Broken numbers are caught before the optimizer has seen them, without waiting for the device at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.errors import Problem
from finetune.settings import TrainSettings
from finetune.training import processes

# fp16's loss scale begins at 65,536 and is halved at every overflow: 24 more of these than scale-ups have been.
SMALLEST_SCALE = 2.0**-8


@dataclass(frozen=True)
class Noted:
    """A value that was looked at, or will be: what it is, at which step from 0, on which micro-batches, and whether it is finite."""

    what: str
    step: int
    batches: Sequence[Any]
    good: Tensor


class Guard:
    """Watches losses and gradients of a run, and stops it or leaves steps out, as --on-nonfinite says.

    On a CPU a value is looked at when it comes. On a GPU that would make every step wait for the one before, so the answer
    stays there: torch's fused AdamW leaves out a step whose `found_inf` is set, and the values are looked at where the loop
    looks at numbers anyway. The weights are then those of the last good step. Several processes answer as one.

    Args:
        optimizer: of the run.
        timesteps: those of a micro-batch, for the message.
    """

    def __init__(self, settings: TrainSettings, optimizer: Any, accelerator: Accelerator, timesteps: Callable[[Any], Tensor]):
        self.settings, self.optimizer, self.accelerator, self.timesteps = settings, optimizer, accelerator, timesteps
        # put the look off only where the optimizer can be told on the device
        self._waits = accelerator.device.type != "cpu" and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._noted: list[Noted] = []
        self._bad: list[int] = []  # steps that were left out
        self._told: list[str] = []

    def passes(self, what: str, step: int, value: Tensor, batches: Sequence[Any]) -> bool:
        """Whether training may go on with the loss or gradient's norm of a step from 0; True where the look is put off.

        Raises:
            Problem: it is not finite, and steps are not left out, or too many were.
        """
        one = Noted(what, step, batches, processes.everyone(self.accelerator, torch.isfinite(value)))
        if self._waits:
            self._noted.append(one)
            return True
        if not one.good:
            self._leave_out(one)
        return bool(one.good)

    def arm(self) -> None:
        """Before the optimizer's step: tell it whether to take it."""
        if self._waits and self._noted:
            step = self._noted[-1].step
            good = torch.stack([one.good for one in self._noted if one.step == step]).all()
            self.optimizer.found_inf, self.optimizer.grad_scale = (~good).float(), None

    def look(self) -> list[str]:
        """Look at everything noted since the last time; what is to be told of steps left out.

        Raises:
            Problem: as in `passes`.
        """
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
            raise Problem("No gradient has been a finite number for many steps, however small fp16's loss was scaled.",
                          f"The scale has fallen to {scaler.get_scale():.2g}; those steps were left out.",
                          "Lower --learning-rate, or use --precision bf16 or fp32; the last checkpoint is good.")
        noted, self._noted = self._noted, []
        if noted and not torch.stack([one.good for one in noted]).all():
            for one in noted:
                if not one.good and one.step not in self._bad:
                    self._leave_out(one)
        told, self._told = self._told, []
        return told

    @property
    def skipped(self) -> int:
        """Steps left out so far."""
        return len(self._bad)

    def _leave_out(self, one: Noted) -> None:
        told = self._describe(one)
        if self.settings.on_nonfinite == "stop":
            raise Problem(told[0], told[1], "Lower --learning-rate, use --precision fp32, or leave such steps out with --on-nonfinite skip; "
                          "the last checkpoint is good.")
        self._bad.append(one.step)
        most = self.settings.skip_at_most
        if self._bad[-most - 1:] == list(range(one.step - most, one.step + 1)):
            raise Problem(f"{told[0][:-1]}, nor was it at the {most} steps before.", f"{told[1]} --skip-at-most {most} is the limit in a row.",
                          "Lower --learning-rate, or use --precision fp32; the last checkpoint is good.")
        self._told.append(f"Step {one.step + 1} is left out: {told[0][0].lower()}{told[0][1:]} {told[1]}")

    def _describe(self, one: Noted) -> tuple[str, str]:
        """What is broken, and on which pictures and timesteps, of all processes."""
        rows = [(name, int(timestep)) for batch in one.batches for name, timestep in zip(batch.names, self.timesteps(batch), strict=True)]
        rows = processes.gathered(self.accelerator, rows)
        listed = ", ".join(f"{name} at timestep {timestep}" for name, timestep in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        return f"The {one.what} at step {one.step + 1} is not a finite number.", f"The pictures were {listed}."
