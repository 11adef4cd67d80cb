"""The run's folder: ours alone while we work there, swept of what a killed run left, and empty or to be resumed."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

from finetune import runs
from finetune.errors import Problem
from finetune.settings import TrainSettings

FOLDERS = ("artifact", "checkpoints", "previews", "steps")
FILES = ("metrics.jsonl", "settings.json", "curve.json", "manifest.json")  # the manifest last: until then it is a run still


def opened(settings: TrainSettings, held: contextlib.ExitStack, console: Console) -> tuple[Path, bool]:
    """The folder, and whether there is something in it to resume from; a run that never saved begins anew.

    Args:
        held: keeps the folder's lock.

    Raises:
        Problem: another process works there, a run is in it already, or there is none to resume.
    """
    folder = Path(settings.output) if settings.output else runs.free_run_folder(settings.METHOD)
    if settings.resume and not _taken(folder):
        raise Problem(f"There is no run in {folder} to resume.", "", "Name its folder with --output, or start without --resume.")
    held.enter_context(runs.locked(folder))
    runs.sweep(folder, held=True)
    if _taken(folder) and settings.overwrite:
        _clear(folder)
    elif _taken(folder) and not settings.resume:
        raise Problem(f"There is a run in {folder} already.", "It would be mixed up with the new one.",
                      "Choose another --output, go on with --resume, or clear it with --overwrite.")
    elif settings.resume and not runs.checkpoints(folder) and _status(folder) != "finished":
        console.print(f"The run in {folder} ended before its first checkpoint: it begins anew.", soft_wrap=True)
        _clear(folder)
        return folder, False
    return folder, settings.resume


def _status(folder: Path) -> str:
    """How the run in a folder ended, by its manifest; "" where that does not say."""
    told = runs.read_json(folder / "manifest.json")
    return told.get("status", "") if isinstance(told, dict) else ""


def _taken(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _clear(folder: Path) -> None:
    """Remove a run so that a killed process leaves a run that can be cleared again."""
    for name in FOLDERS:
        runs.remove_folder(folder / name)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
