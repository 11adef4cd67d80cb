"""What a run leaves on disk, and how it is written: temporary name, fsync, rename, fsync of the folder, manifest last.

    RUN/settings.json      resolved settings
    RUN/manifest.json      what ran, on what, at what cost; written before and after
    RUN/metrics.jsonl      one JSON object a line: step, loss, learning_rate, seconds, ... or step, validation_loss
    RUN/previews/          pictures while training
    RUN/checkpoints/NNNN/  trainables, optimizer; complete when its manifest.json is there
    RUN/artifact/          the community's files, and artifact.json that says what they are
    RUN/steps/NNNN/        artifacts along the way, with --export-every
    RUN/curve.json         how the judge scored those
    RUN/.lock              who works there; held by a living process alone
"""

from pathlib import Path

from finetune.runs.durable import atomic_folder, atomic_path, read_back, remove_folder, sweep, sync_file, sync_folder
from finetune.runs.files import fingerprint, folder_bytes, read_json, sha256, write_json, write_text
from finetune.runs.lock import locked
from finetune.runs.metrics import append_metrics, read_metrics, sync_metrics, trim_metrics
from finetune.runs.secrets import hide, hide_in, hide_in_command
from finetune.runs.space import BLOCK, DiskFull, check_room, free_bytes, room

__all__ = ["BLOCK", "DiskFull", "append_metrics", "atomic_folder", "atomic_path", "check_room", "checkpoints", "fingerprint", "folder_bytes", "free_bytes",
           "free_run_folder", "hide", "hide_in", "hide_in_command", "locked", "read_back", "read_json", "read_metrics", "remove_folder", "room", "sha256",
           "sweep", "sync_file", "sync_folder", "sync_metrics", "trim_metrics", "write_json", "write_text"]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; one that is being written has a temporary name, which begins with a dot."""
    return sorted(path.parent for path in (Path(folder) / "checkpoints").glob("[!.]*/manifest.json"))


def free_run_folder(method: str, root: Path = Path("runs")) -> Path:
    """runs/METHOD-1, -2, ...: the first that does not exist."""
    number = 1
    while (root / f"{method}-{number}").exists():
        number += 1
    return root / f"{method}-{number}"
