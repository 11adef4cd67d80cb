"""One run in several processes, started by torchrun or `accelerate launch`: every process trains, the first one writes.

Each process takes rows of its own (see `finetune.data.rows`), gradients are averaged, so all hold the same weights after
every step. What must be one and the same everywhere, such as the run's folder or a signal, is agreed upon here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, patch_environment
from rich.console import Console

from finetune import engine
from finetune.errors import Problem
from finetune.settings import TrainSettings

Value = TypeVar("Value")


def start(settings: TrainSettings, device: torch.device) -> Accelerator:
    """The accelerator of a run: its precision as far as the device has it, this process among all.

    Raises:
        Problem: settings that several processes cannot share.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)  # a process may train several times, in several precisions
    if alone and device.type == "cuda":
        torch.cuda.set_device(device)
    precision = engine.possible(settings, device)[0].precision
    # of several processes each takes the GPU of its number; one alone takes the device it was given, not the first
    with patch_environment(**{"ACCELERATE_TORCH_DEVICE": device} if alone else {}):
        accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision), cpu=device.type == "cpu")
    if accelerator.num_processes > 1 and settings.step_in_backward:
        raise Problem("--step-in-backward trains in one process only.", "A gradient would be gone before the processes had averaged it.",
                      "Leave it out, or start without torchrun.")
    return accelerator


def console_of(accelerator: Accelerator, console: Console) -> Console:
    """The console for the process that talks, silence for the others."""
    return console if accelerator.is_main_process else Console(file=open(os.devnull, "w", encoding="utf-8"))


def shared(accelerator: Accelerator, make: Callable[[], Value]) -> Value:
    """What the first process makes, for all of them. The others wait; what they get was pickled by a process of this very run."""
    if accelerator.num_processes == 1:
        return make()
    found = [make() if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def anyone(accelerator: Accelerator, value: bool) -> bool:
    """Whether it is true in any process. All of them must ask."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(float(value), device=accelerator.device), "sum")) > 0


def everyone(accelerator: Accelerator, good: torch.Tensor) -> torch.Tensor:
    """Whether it is true in all processes, as a tensor on the device, which is not waited for. All of them must ask."""
    return good if accelerator.num_processes == 1 else accelerator.reduce(good.float(), "sum") == accelerator.num_processes


def gathered(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The lists of all processes, one behind the other. All of them must ask."""
    return values if accelerator.num_processes == 1 else gather_object(values)
