"""What every training stage of the toybox shares: a log, a learning-rate curve, checkpoints that survive a kill."""

import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Log:
    """Append JSON lines to a file and echo them; seconds count from the first start, across restarts."""

    def __init__(self, path: Path, before: float = 0.0) -> None:
        self.path, self._start = Path(path), time.monotonic() - before
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, **values: float | int | str | dict) -> None:
        line = {"seconds": round(self.seconds, 1)}
        line.update({key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()})
        text = json.dumps(line)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Factor on the learning rate: a linear rise, then half a cosine to zero at `steps` (Loshchilov & Hutter, 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_atomically(payload: dict, path: Path) -> None:
    """Write with torch.save under a temporary name, then rename: a kill leaves the old checkpoint or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class Checkpoint:
    """Model, optimizer, step and seconds on disk, written at most once a minute and removed when the stage is done."""

    def __init__(self, path: Path, every_seconds: float = 60.0) -> None:
        self.path, self.every_seconds, self._last = Path(path), every_seconds, time.monotonic()

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Load what is there. Returns the next step and the seconds spent before."""
        if not self.path.exists():
            return 0, 0.0
        payload = torch.load(self.path, map_location="cpu", weights_only=True)
        model.load_state_dict(payload["model"])
        optimizer.load_state_dict(payload["optimizer"])
        return payload["step"], payload["seconds"]

    def maybe(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
        if time.monotonic() - self._last < self.every_seconds:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        save_atomically(state, self.path)
        self._last = time.monotonic()

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def draw_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of `count` examples step `step` sees: a pure function of the step, so that a restart changes nothing."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(count, (batch,), generator=generator)
