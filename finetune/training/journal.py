"""metrics.jsonl as a run goes on: what a step cost and lost, and what is to be said of it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from finetune import runs
from finetune.training import divergence
from finetune.training.loop import Progress


class Journal:
    """Sums over the steps of a run, from its first process to this one, one line every so many steps.

    Args:
        writes: whether this process writes the file and talks.

    Attributes:
        seconds, cpu_seconds: inside the steps so far. skipped: steps left out for a broken number.
        read: the lines that were there when the run was resumed.
    """

    def __init__(self, folder: Path, console: Console, writes: bool):
        self._folder, self._console, self._writes = folder, console, writes
        self.read = runs.read_metrics(folder)
        last = next((line for line in reversed(self.read) if "seconds" in line), {})
        self.seconds, self.cpu_seconds, self._before = (last.get(key, 0) for key in ("seconds", "cpu_seconds", "left_out"))
        self.skipped = self._before
        self._watch = divergence.Watch(next((line["validation_loss"] for line in self.read if "validation_loss" in line), None))
        self._losses: list[torch.Tensor] = []

    def step(self, progress: Progress) -> None:
        """Add a finished step."""
        self.seconds += progress.seconds
        self.cpu_seconds += progress.cpu_seconds
        self.skipped = self._before + progress.skipped
        self._losses.append(progress.loss)
        self._say(*progress.told)

    def line(self, progress: Progress) -> float | None:
        """Write the line of a step and return the mean loss since the last one; None where all of them were broken."""
        found = torch.stack(self._losses)
        found = found[torch.isfinite(found)]
        self._losses.clear()
        mean = float(found.mean()) if len(found) else None
        norm = None if not progress.grad_norm else float(progress.grad_norm)  # stepping in the backward pass has none
        if self._writes:
            runs.append_metrics(self._folder, step=progress.step, loss=mean, learning_rate=progress.learning_rate,
                                grad_norm=norm if norm is not None and math.isfinite(norm) else None, seconds=round(self.seconds, 4),
                                cpu_seconds=round(self.cpu_seconds, 4), **({"left_out": self.skipped} if self.skipped else {}))
        self._warn(self._watch.add(found.tolist()), progress.learning_rate)
        return mean

    def look(self, step: int, loss: float, rate: float) -> None:
        """Note the loss on the fixed set after a step."""
        if self._writes:
            runs.append_metrics(self._folder, step=step, validation_loss=loss)
        self._warn(self._watch.look(loss), rate)

    def _warn(self, trouble: str | None, rate: float) -> None:
        if trouble:
            self._say(f"{trouble} {divergence.advice(rate)}")

    def _say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)
