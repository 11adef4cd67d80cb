"""The memory ladder: three rungs, each slower and smaller than the one before, as plain changes of settings."""

from __future__ import annotations

from typing import Any, TypeVar

from finetune.engine import quantizer
from finetune.settings import TrainSettings

RUNGS = ("fast", "low", "lowest")
COSTS = {
    "adamw8bit": "optimizer state in 8 bits: a quarter of its memory; on a CPU its steps are many times slower",
    "bf16": "frozen weights in bf16: half their memory, rounded to 8 bits of mantissa",
    "4bit": "frozen linear layers in 4 bits (NF4): an eighth of their memory, rounded",
    "gradient_checkpointing": "activations computed twice: about a third more time, the same numbers",
    "batch_size": "one picture at a time, gradients summed: the same mean, slower on a GPU",
}

Tree = TypeVar("Tree", bound=TrainSettings)


def changes(settings: TrainSettings, rung: str, whole: bool) -> dict[str, Any]:
    """What a rung asks for, whatever was given.

    Args:
        whole: the method trains the whole UNet, so that its optimizer is what fills memory; otherwise frozen weights do.
    """
    installed = quantizer.available()
    found: dict[str, Any] = {}
    if rung == "fast":
        return found
    if whole and installed:
        found["optimizer"] = "adamw8bit"
    if not whole:
        found["frozen"] = "4bit" if rung == "lowest" and installed else "bf16"
    if rung == "lowest":
        found["gradient_checkpointing"] = True
        if settings.batch_size > 1:
            found |= {"batch_size": 1, "accumulate": settings.batch_size * settings.accumulate}
    return found


def apply(settings: Tree, rung: str, whole: bool) -> Tree:
    """A copy of the settings on that rung. What the user or a recipe gave stays as it was given."""
    given = settings.model_fields_set
    asked = changes(settings, rung, whole)
    if {"batch_size", "accumulate"} & asked.keys() and "accumulate" in given:  # then the batch is what was asked for as well
        asked = {key: value for key, value in asked.items() if key not in ("batch_size", "accumulate")}
    kept = {key for key in asked if key in given and key != "batch_size"}
    found = settings.model_copy(update={"memory": rung, **{key: value for key, value in asked.items() if key not in kept}})
    found.__pydantic_fields_set__ = set(given)
    return found


def described(before: TrainSettings, after: TrainSettings) -> list[str]:
    """What a rung changed and what that costs, a line each."""
    lines = []
    for key in ("optimizer", "frozen", "gradient_checkpointing", "batch_size"):
        now = getattr(after, key)
        if now != getattr(before, key):
            lines.append(COSTS[key] if key in COSTS else COSTS[now])
    return lines
