"""Which rung of the memory ladder a run stands on, and what that costs."""

from __future__ import annotations

import torch

from finetune import engine, runs
from finetune.engine import ladder
from finetune.methods.base import Method
from finetune.settings import TrainSettings


def settled(settings: TrainSettings, method: Method, device: torch.device) -> tuple[TrainSettings, list[str]]:
    """The settings as this device and the rung have them, and a line on each thing that was changed.

    "auto" is decided once, from what is free at the start; a resumed run stands where it stood.
    """
    before = settings.output / "settings.json"
    rung = settings.memory
    if settings.resume and rung == "auto" and before.is_file():
        rung = runs.read_json(before).get("memory", "fast")
    if rung == "auto":
        rung = "fast"
    settings, notes = engine.possible(settings, device)
    found = engine.apply(settings, rung, whole=method.replaces)
    return found, notes + ladder.described(settings, found)
