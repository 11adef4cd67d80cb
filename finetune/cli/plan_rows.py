"""The plans of one page: the methods asked for in full, rungs and other methods as rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import engine, methods
from finetune.errors import Problem
from finetune.plan import process
from finetune.plan.estimate import HEADROOM, Prediction, predict
from finetune.plan.files import artifact_bytes, checkpoint_bytes, disk_bytes
from finetune.plan.pace import Pace, class_seconds, step_seconds
from finetune.plan.skeleton import skeleton
from finetune.settings import TrainSettings


@dataclass
class Plan:
    """One method on one rung. Seconds are None without a calibration."""

    prediction: Prediction
    settings: TrainSettings
    step_seconds: float | None = None
    measured: float = 0.0  # share of a step's time that was measured, the rest is taken at its rates
    class_seconds: float | None = None
    artifact: int | None = None
    checkpoint: int | None = None
    disk: dict[str, int] = field(default_factory=dict)
    limit: int = 0

    @property
    def fits(self) -> bool | None:
        """Whether the largest moment stays under the limit; None where no limit is known."""
        return self.prediction.peak <= self.limit if self.limit else None

    @property
    def tight(self) -> bool:
        """Whether it fits by less than predictions were off."""
        return bool(self.fits) and HEADROOM * self.prediction.peak > self.limit

    @property
    def total_seconds(self) -> float | None:
        """Steps and class pictures."""
        return None if self.step_seconds is None else self.step_seconds * self.settings.steps + (self.class_seconds or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.prediction.as_dict() | {
            "step_seconds": self.step_seconds, "measured_share": round(self.measured, 3), "class_seconds": self.class_seconds,
            "total_seconds": self.total_seconds, "artifact_bytes": self.artifact, "checkpoint_bytes": self.checkpoint, "disk_bytes": self.disk,
            "fits": self.fits, "tight": self.tight}


@dataclass
class Page:
    """What was found: plans in full, and rows of the table."""

    full: list[Plan]
    rows: list[Plan]
    limit: int
    limit_given: bool
    refused: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"limit_bytes": self.limit, "plans": [plan.as_dict() for plan in self.full], "table": [plan.as_dict() for plan in self.rows],
                "refused": self.refused}


class Planner:
    """Makes plans on one base and one machine.

    Args:
        model: see `finetune.plan.skeleton`. device: as --device.
        seconds: of calibration; 0 for none.
        limit: as --memory-limit; None takes nine tenths of what is free.
        pictures: how many the run will learn from, where the settings name no folder.
    """

    def __init__(self, model: str, device: str, seconds: float, limit: str | None, pictures: int):
        self.base = skeleton(model)
        self.device = _device(device)
        self.own = process.own()
        self.pace = Pace(seconds) if seconds else None
        self.limit = process.parse_bytes(limit) if limit else _free(self.device)
        self.given, self.pictures = limit is not None, pictures

    def plans(self, asked: dict[str, TrainSettings], others: dict[str, TrainSettings], table: bool) -> Page:
        """Plans in full of what was asked, and a row for each rung of it; of the other methods down to the first rung that fits."""
        refused: dict[str, Problem] = {}
        full = [plan for settings in asked.values() if (plan := self._try(refused, settings, self.full))]
        rows = []
        for settings in [*asked.values(), *others.values()] if table else []:
            for rung in engine.RUNGS:
                done = next((plan for plan in full if plan.prediction.method == settings.METHOD and plan.prediction.rung == rung), None)
                plan = done or self._try(refused, settings.model_copy(update={"memory": rung}), self.plain)
                rows += [plan] if plan else []
                if settings.METHOD not in asked and plan and plan.fits is not False:
                    break
        if not full:
            raise next(iter(refused.values()))
        return Page(full, rows, self.limit, self.given, {name: problem.what for name, problem in refused.items()})

    def _try(self, refused: dict[str, Problem], settings: TrainSettings, make: Callable[[TrainSettings], Plan]) -> Plan | None:
        try:
            methods.get(settings.METHOD)(settings).check()
            return make(settings)
        except Problem as error:
            refused[settings.METHOD] = error
            return None

    def plain(self, settings: TrainSettings) -> Plan:
        """Memory and time."""
        prediction = predict(settings, self.base, device=self.device, process=self.own, record=self.pace is not None)
        plan = Plan(prediction, settings, limit=self.limit)
        if self.pace and self.device == "cpu":
            on_rung = engine.apply(settings, prediction.rung, whole=methods.get(settings.METHOD).replaces)
            plan.step_seconds, plan.measured = step_seconds(self.pace, prediction.rehearsal, on_rung, self.base)
            if prediction.class_images:
                plan.class_seconds = class_seconds(self.pace, prediction.rehearsal, on_rung)
        return plan

    def full(self, settings: TrainSettings) -> Plan:
        """Files as well."""
        plan = self.plain(settings)
        plan.artifact = artifact_bytes(settings, self.base, self._metadata(settings))
        plan.checkpoint = checkpoint_bytes(plan.prediction.rehearsal)
        plan.disk = disk_bytes(settings, plan.artifact, plan.checkpoint)
        return plan

    def _metadata(self, settings: TrainSettings) -> dict[str, str]:
        from finetune.training.artifacts import describe

        folder, count = settings.instance_dir, self.pictures
        if folder and Path(folder).is_dir():
            from finetune import data

            count = len(data.intake(settings).pictures)
        return describe(settings, methods.get(settings.METHOD)(settings), self.base, count, settings.steps)


def _device(name: str) -> str:
    from finetune.model.base import pick_device

    return pick_device(name).type


def _free(device: str) -> int:
    """Nine tenths of what this process could have."""
    if device == "cuda":
        import torch

        return int(0.9 * torch.cuda.mem_get_info()[0])
    return int(0.9 * (process.free() + process.resident())) if process.free() else 0
