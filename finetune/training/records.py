"""What a run says of itself: manifest.json before, after and when it fails, and what its checkpoints are bound to."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import resource
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

import finetune
from finetune import data, runs
from finetune.errors import Problem
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.settings import TrainSettings
from finetune.training.artifacts import LIBRARIES
from finetune.training.loop import State


def opening(settings: TrainSettings, method: Method, base: Base, intake: Any, accelerator: Accelerator) -> dict[str, Any]:
    """What is known before the first step."""
    return runs.hide_in({
        "finetune": finetune.__version__, "method": method.name, "title": method.title, "paper": method.paper, "row": Path(settings.output).name, "status": "running",
        "model": {"name": base.name, "family": base.family, "hash": base.hash, "prediction": base.prediction},
        "subject": method.subject, "class_noun": method.noun, "instance_prompt": data.fill(method.templates()[0], method.subject),
        **length(settings, settings.steps, accelerator), "batch_size": settings.batch_size,
        **({"processes": accelerator.num_processes} if accelerator.num_processes > 1 else {}),
        "pictures": [{"file": picture.file, "sha256": picture.sha256, "note": picture.note} for picture in intake.pictures],
        "skipped": [{"file": str(file), "reason": reason} for file, reason in intake.skipped],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(base.device), "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "command": runs.hide_in_command(["finetune", *sys.argv[1:]]),
    })


def facts(settings: TrainSettings, method: Method, base: Base, intake: Any, accelerator: Accelerator) -> dict[str, Any]:
    """All that a run's numbers follow from: a checkpoint made under others is not continued by mistake."""
    pictures = hashlib.sha256("".join(picture.sha256 for picture in intake.pictures).encode()).hexdigest()
    return runs.hide_in(settings.model_dump(mode="json")) | {"method": method.name, "model_hash": base.hash, "processes": accelerator.num_processes,
                                               "pictures": f"{len(intake.pictures)} of SHA-256 {pictures[:16]}"}


def resumed_with(differing: list[str], console: Console) -> dict[str, Any]:
    """What the manifest of a run says that was resumed under other settings."""
    if not differing:
        return {}
    console.print(f"[yellow]Resumed under other settings: {escape('; '.join(differing))}[/yellow]", soft_wrap=True)
    return {"resumed_under_other_settings": differing}


def length(settings: TrainSettings, steps: int, accelerator: Accelerator) -> dict[str, int]:
    """Steps and the pictures all processes see in them, as the manifest has them."""
    return {"steps": steps, "pictures_seen": steps * settings.batch_size * settings.accumulate * accelerator.num_processes}


def close(folder: Path, manifest: dict[str, Any], state: State, seconds: dict[str, float], console: Console) -> None:
    """The manifest with what the run cost and left."""
    made = runs.read_json(folder / "artifact" / "artifact.json")
    size = sum(entry["bytes"] for entry in made["files"])
    memory = torch.cuda.max_memory_allocated() if manifest["device"].startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    manifest |= {"status": "finished", "trainable_parameters": sum(value.numel() for value in state.parameters.values()),
                 "seconds": {key: round(value, 4) for key, value in seconds.items()}, "peak_memory_bytes": memory,
                 "artifact": {"bytes": size, "files": made["files"], "trigger": made["trigger"]},
                 "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    runs.write_json(folder / "manifest.json", manifest)
    console.print(f"[bold]{folder / 'artifact'}[/bold]  {size:,} bytes, {seconds['training']:.0f} s of training, "
                  f"peak memory {memory / 2**20:,.0f} MiB")


@contextlib.contextmanager
def finish_on_failure(folder: Path, manifest: dict[str, Any], writes: bool) -> Iterator[None]:
    """A run that fails says so in its manifest."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError, Problem):  # where there is no room even for this, the error says so
            if writes:
                runs.write_json(folder / "manifest.json", manifest | {"status": "failed", "reason": runs.hide(str(error)) or type(error).__name__})
        raise


def note_stop(folder: Path, manifest: dict[str, Any], state: State, console: Console) -> None:
    runs.write_json(folder / "manifest.json", manifest | {"status": "interrupted", "step": state.step})
    console.print(f"Stopped after step {state.step}; a checkpoint and the artifact as it is now are in {folder}. Go on with the same command and "
                  f"[bold]--output {folder} --resume[/bold].", soft_wrap=True)
