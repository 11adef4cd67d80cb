"""Text, JSON, hashes and sizes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.runs.durable import atomic_path


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
