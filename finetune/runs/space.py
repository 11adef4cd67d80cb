"""Room on the disk: asked for before something is written, and a full disk told with bytes needed, bytes free and the path."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import Problem

BLOCK = 4096  # bytes: what a small file takes on most file systems
FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNS = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")  # libraries that lose the number
NEARLY = 64 * 1024  # bytes: with fewer free, a write that failed for no stated reason failed for this one


class DiskFull(Problem):
    """Not enough room.

    Args:
        path: what was to be written.
        needed: its bytes, or None where nobody knows before it is written.
        free: bytes free in its place.
    """

    def __init__(self, path: Path, needed: int | None, free: int):
        wants = f"{needed:,} bytes are needed for {path}" if needed is not None and needed > free else f"{path} needs more than that"
        super().__init__(f"The disk is full: {free:,} bytes are free, and {wants}.",
                         "What was there before is whole: a new file takes its place only when it is complete.",
                         "Make room there or name a place on another disk; a training run then goes on with --resume.")
        self.path, self.needed, self.free = path, needed, free


def free_bytes(path: Path) -> int:
    """Bytes this user may still write where `path` is, or would be."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize if found.f_blocks else 2**62  # some network file systems do not tell


def check_room(path: Path, needed: int) -> None:
    """Raise DiskFull where fewer than `needed` bytes are free."""
    free = free_bytes(path)
    if free < needed:
        raise DiskFull(path, needed, free)


@contextlib.contextmanager
def room(path: Path, needed: int | None = None) -> Iterator[None]:
    """Check first, where the bytes are known; then tell a disk that fills while the context lasts.

    Raises:
        DiskFull: before anything is written, or in the middle; what the context wrote should then be gone.
    """
    if needed is not None:
        check_room(path, needed)
    try:
        yield
    except DiskFull as error:
        raise DiskFull(path, needed, error.free) from error
    except Exception as error:
        free = free_bytes(path)
        if not _full(error, free):
            raise
        raise DiskFull(path, needed, free) from error


def _full(error: Exception, free: int) -> bool:
    """Whether a failed write failed for want of room. Pillow's encoders and Rust libraries do not pass the number on."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(sign in str(error) for sign in SIGNS) or isinstance(error, OSError) and free < NEARLY
