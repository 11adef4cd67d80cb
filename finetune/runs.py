"""What a run leaves on disk, and how it is written: temporary name, fsync, rename, manifest last.

    RUN/settings.json      resolved settings
    RUN/manifest.json      what ran, on what, at what cost; written before and after
    RUN/metrics.jsonl      one JSON object a line: step, loss, learning_rate, seconds, ... or step, validation_loss
    RUN/previews/          pictures while training
    RUN/checkpoints/NNNN/  trainables, optimizer; complete when its manifest.json is there
    RUN/artifact/          the community's files, and artifact.json that says what they are
    RUN/steps/NNNN/        artifacts along the way, with --export-every
    RUN/curve.json         how the judge scored those
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the final name, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`, whole, and the old one goes."""
    path = Path(path)
    fresh, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable (a rename is only safe once its folder is on disk)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, stable and readable. Paths become text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: Path, start: int = 0) -> str:
    """Hex SHA-256 of a file from a byte on."""
    with open(path, "rb") as handle:
        handle.seek(start)
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(paths: list[Path]) -> str:
    """16 hex digits over weights files: their sizes and, of each, the first, middle and last 4 MiB.

    Small files are read whole; of a 4 GB checkpoint this reads 12 MB. Training moves every weight, so a model that was
    trained further never has the same middle.
    """
    digest, part = hashlib.sha256(), 4 * 2**20
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{size}".encode())
        with open(path, "rb") as handle:
            for start in sorted({0, max(0, size // 2 - part // 2), max(0, size - part)}):
                handle.seek(start)
                digest.update(handle.read(part))
    return digest.hexdigest()[:16]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def append_metrics(folder: Path, **values: Any) -> None:
    """Append one line to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps(values) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl; a line cut off by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def trim_metrics(folder: Path, step: int) -> None:
    """Drop lines later than `step`, so that a resumed run writes each step once."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_text(Path(folder) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def free_run_folder(method: str, root: Path = Path("runs")) -> Path:
    """runs/METHOD-1, -2, ...: the first that does not exist."""
    number = 1
    while (root / f"{method}-{number}").exists():
        number += 1
    return root / f"{method}-{number}"
