"""Files and folders that are there whole or not at all: temporary name, fsync, rename, fsync of the folder.

A process that is killed leaves the old one or the new one, and perhaps a temporary beside it, which `sweep` removes.
Crash consistency of rename: Pillai et al. 2014, "All File Systems Are Not Created Equal" (OSDI).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import Problem
from finetune.runs.space import room

TEMPORARY = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.part(\.[^.]*)?", re.DOTALL)
SET_ASIDE = re.compile(r"\.(?P<name>.+)\.old", re.DOTALL)
LONGEST = 120  # bytes of the final name that the temporary one repeats: names may have 255
FOREIGN = 86400.0  # seconds after which another machine's temporary is taken for abandoned
EXCHANGE = 2  # RENAME_EXCHANGE of Linux' renameat2(2), RENAME_SWAP of macOS' renamex_np(2)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the final name, else it is removed.

    Raises:
        DiskFull: there was no room for it.
    """
    path = Path(path)
    with room(path):
        make_folder(path.parent)
        temporary = _beside(path)
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success all in it is synced and it takes the place of `path`, whole.

    Where the system can, old and new change names in one step; elsewhere the old one is set aside for a moment, and
    `sweep` puts it back when that moment was the last. On failure the new one is removed and the old one stays.

    Raises:
        DiskFull: there was no room for it.
    """
    path = Path(path)
    with room(path):
        make_folder(path.parent)
        fresh = _beside(path, folder=True)
        fresh.mkdir()
        try:
            yield fresh
            sync_tree(fresh)
            _take_place(fresh, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # on success: the old one, if it changed names with the new


def _take_place(fresh: Path, path: Path) -> None:
    """Give `fresh` the name `path`; what was there goes, or has the other name now."""
    if not path.exists():
        fresh.rename(path)
    elif not _exchange(fresh, path):
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        fresh.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    call = _exchanger()
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@functools.cache
def _exchanger():  # noqa: ANN202 - a function of the C library, or None
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return lambda one, other: library.renameat2(here, one, here, other, EXCHANGE)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda one, other: library.renamex_np(one, other, EXCHANGE)
    return None


def remove_folder(path: Path) -> None:
    """Remove a folder so that a killed process leaves it whole or under a temporary name, never half of it under its own."""
    gone = _beside(path, folder=True)
    try:
        Path(path).rename(gone)
    except FileNotFoundError:
        return
    sync_folder(gone.parent)
    shutil.rmtree(gone, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each entry durable."""
    folder = Path(folder)
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Have the file's bytes on disk, and out of the page cache, so that who reads it next reads the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable (a rename is only safe once its folder is on disk)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder under a folder, and the folder."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def sweep(folder: Path, held: bool = False) -> list[Path]:
    """Remove temporaries that dead processes left under a folder, and put back what was set aside for a moment.

    Args:
        held: the caller holds the folder's lock, so whatever is there is nobody's. Otherwise only temporaries of
            processes that are gone are removed, and of other machines those older than a day.

    Returns: what was removed or put back.
    """
    found = []
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            told = TEMPORARY.fullmatch(name)
            aside = SET_ASIDE.fullmatch(name) if name in folders else None
            if aside and held:
                final = path.with_name(aside["name"])
                shutil.rmtree(path, ignore_errors=True) if final.exists() else path.rename(final)
            elif told and (held or _abandoned(path, told)):
                shutil.rmtree(path, ignore_errors=True) if name in folders else path.unlink(missing_ok=True)
            else:
                continue
            found.append(path)
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name) and not SET_ASIDE.fullmatch(name)]
    return found


def _abandoned(path: Path, told: re.Match[str]) -> bool:
    if told["host"] != _host():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > FOREIGN
        return False
    return int(told["process"]) == os.getpid() or not alive(int(told["process"]))


def alive(process: int) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def read_back(path: Path, digest: str, start: int = 0) -> None:
    """Raise a Problem unless the file's bytes from `start` on have this SHA-256, read from the disk and not from memory."""
    from finetune.runs.files import sha256

    sync_file(path)
    if sha256(path, start) != digest:
        raise Problem(f"{path} did not come back from the disk as it was written.", "The disk or its cable loses bytes.",
                      "Write to another disk, and check this one.")


@functools.cache
def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _beside(path: Path, folder: bool = False) -> Path:
    """A name of this process for what will be `path`; a file keeps its ending, by which libraries know what to write."""
    stem, suffix = (path.name, "") if folder else (path.stem, path.suffix)
    stem = stem.encode()[:LONGEST].decode(errors="ignore")
    return path.with_name(f".{stem}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part{suffix}")
