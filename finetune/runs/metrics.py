"""metrics.jsonl: one JSON object a line. Lines up to a checkpoint are on disk before the checkpoint is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from finetune.runs.durable import sync_file
from finetune.runs.files import write_text
from finetune.runs.space import room

NAME = "metrics.jsonl"


def append_metrics(folder: Path, **values: Any) -> None:
    """Append one line to metrics.jsonl."""
    path = Path(folder) / NAME
    with room(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(values) + "\n")


def sync_metrics(folder: Path) -> None:
    """Have all lines on disk: whoever resumes from a checkpoint finds every line up to it."""
    with contextlib.suppress(FileNotFoundError):
        sync_file(Path(folder) / NAME)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl; a line cut off by a crash is left out."""
    path = Path(folder) / NAME
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def trim_metrics(folder: Path, step: int) -> None:
    """Drop lines later than `step`, so that a resumed run writes each step once."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_text(Path(folder) / NAME, "".join(json.dumps(line) + "\n" for line in kept))
