"""Who works in a folder: a lock that the kernel takes back when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from finetune.errors import Problem
from finetune.runs.durable import make_folder

NAME = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def locked(folder: Path, with_children: bool = False) -> Iterator[None]:
    """While the context lasts no other process may work in the folder. The lock file stays; nobody holds it then.

    A file system without locks (some network mounts) holds nobody off.

    Args:
        with_children: processes started meanwhile hold it as well, and a child that outlives us goes on holding it.

    Raises:
        Problem: somebody works there; names the process and since when.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix system: nothing to hold
        yield
        return
    make_folder(folder)
    with open(Path(folder) / NAME, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                handle.seek(0)
                raise Problem(f"Another process works in {folder}{_described(handle.read())}.",
                              "Two writers would spoil each other's files, so it, or a process it started, holds the folder's lock.",
                              "Wait until it is done, stop it, or choose another --output.") from None
        told = {"process": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without saying whose it is
            handle.truncate(0)
            handle.write(json.dumps(told))
            handle.flush()
        os.set_inheritable(handle.fileno(), with_children)
        yield


def _described(text: str) -> str:
    """`: process 4711 since 2026-11-21 10:00:00 UTC`, or nothing when the file does not say."""
    try:
        told = json.loads(text)
        there = "" if told["host"] == socket.gethostname() else f" on {told['host']}"
        return f": process {told['process']}{there} since {datetime.fromisoformat(told['since']):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, KeyError, TypeError):
        return ""
