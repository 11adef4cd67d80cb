"""Room on the disk for what a run will write, from the tensors it trains."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from finetune import runs
from finetune.formats import stream
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.plan.files import disk_bytes
from finetune.settings import TrainSettings
from finetune.training import artifacts, checkpoint
from finetune.training.loop import State


def check(folder: Path, settings: TrainSettings, method: Method, base: Base, state: State, pictures: int) -> None:
    """Raise DiskFull when what the run leaves at most will not fit, before its first step."""
    each = checkpoint_bytes(state)
    artifact = artifacts.expected_bytes(method, base, artifacts.describe(settings, method, base, pictures, settings.steps))
    wanted = disk_bytes(settings, artifact, each)
    wanted.pop("class pictures", None)  # drawn by now, and elsewhere
    kept = min(settings.steps // settings.checkpoint_every, max(1, settings.keep_checkpoints) + 1) if settings.checkpoint_every else 0
    wanted["checkpoints"] = each * kept
    there = sum(runs.folder_bytes(folder / name) for name in ("artifact", "checkpoints", "steps"))
    runs.check_room(folder, max(sum(wanted.values()) - there, each if kept else 0))


def checkpoint_bytes(state: State) -> int:
    """Bytes of a checkpoint's tensors: exactly, once the optimizer has stepped; before that, as AdamW will keep them."""
    tensors, _ = checkpoint.contents(state)
    if not tensors["optimizer.safetensors"]:
        tensors["optimizer.safetensors"] = stream.of_tensors(_adamw(state))
    return sum(stream.expected_bytes(entries, None) for entries in tensors.values()) + checkpoint.MANIFEST


def _adamw(state: State) -> dict[str, Tensor]:
    """AdamW's state by the names of a checkpoint, its numbers not made yet: two averages of each tensor, and a count."""
    found = {}
    for name, value in state.parameters.items():
        found |= {f"{name}/exp_avg": value, f"{name}/exp_avg_sq": value, f"{name}/step": value.new_zeros((), device="meta")}
    return found
