"""Which rung of the memory ladder a run stands on, and what that costs."""

from __future__ import annotations

from typing import Any

import torch

from finetune import engine, runs
from finetune.engine import ladder
from finetune.engine.speed import LARGE
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.settings import TrainSettings

WORTH_A_PLAN = 300.0  # seconds of training


def settled(settings: TrainSettings, method: Method, device: torch.device) -> tuple[TrainSettings, list[str]]:
    """The settings as this device and the rung have them, and a line on each thing that was changed.

    "auto" is decided once, from what is free at the start; a resumed run stands where it stood.
    """
    before = settings.output / "settings.json"
    rung = settings.memory
    if settings.resume and rung == "auto" and before.is_file():
        rung = runs.read_json(before).get("rung", "fast")
    if rung == "auto":
        from finetune.plan.estimate import choose

        rung = choose(settings)
    settings, notes = engine.possible(settings, device)
    found = engine.apply(settings, rung, whole=method.replaces)
    return found, notes + ladder.described(settings, found)


def beside_the_plan(settings: TrainSettings, base: Base, manifest: dict[str, Any]) -> list[str]:
    """What was planned beside what was, after runs long enough that a plan's seconds are nothing."""
    if manifest["seconds"]["training"] < WORTH_A_PLAN or sum(value.numel() for value in base.unet.parameters()) < LARGE:
        return []
    from finetune.plan import estimate, reality
    from finetune.plan.skeleton import skeleton

    try:
        return reality.compare(estimate.predict(settings, skeleton(settings.model), device=base.device.type), manifest)
    except Exception as error:  # noqa: BLE001 - the run is done and saved; a plan that fails afterwards is worth one line
        return [f"The plan could not be made: {error}"]
