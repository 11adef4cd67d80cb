"""Running one row in a process of its own, with its output shown as it comes; and who may work in a folder."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from finetune import runs
from finetune.cli.failures import INTERRUPTED

HEADS = ("Problem:", "Error:")


def train(*words: str) -> str | None:
    """Run `finetune WORDS` in a fresh process of this interpreter.

    Its standard output is ours (so a terminal sees the progress bar); its errors are shown and remembered.

    An interrupted child saves a checkpoint first; then we stop as well.

    Returns: None when it succeeded, else one line saying what went wrong.
    """
    sys.stdout.flush()
    child = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", bufsize=1,
                             close_fds=False)  # so that it holds the folder's lock as long as it lives
    said: list[str] = []
    reader = threading.Thread(target=tee, args=(child.stderr, said), daemon=True)
    reader.start()
    with forwarding(child):
        code = child.wait()
    reader.join()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return None if code == 0 else last_words(said, code)


def command(*words: str) -> list[str]:
    """`finetune WORDS` by this interpreter."""
    return [sys.executable, "-m", "finetune", *words]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While the context lasts, and as long as any process started in it lives, no other one may work in the folder.

    A killed comparison leaves the row it was training behind for a while; two writers would spoil its files. What dead processes
    left half written is removed first.

    Raises:
        Problem: somebody works there.
    """
    with runs.locked(folder, with_children=True):
        runs.sweep(folder)
        yield


@contextlib.contextmanager
def forwarding(child: subprocess.Popen[str]) -> Iterator[None]:
    """While the context lasts, what would stop us stops the child, and we wait for it to finish tidily."""

    def note(number: int, frame: object) -> None:
        # A terminal's Ctrl-C has reached the child already; a second one would end it without a checkpoint.
        if number != signal.SIGINT:
            child.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tee(stream: object, said: list[str]) -> None:
    """Show each line on our own stderr and keep it."""
    for line in stream:  # type: ignore[attr-defined]
        sys.stderr.write(line)
        sys.stderr.flush()
        said.append(line.rstrip())


def last_words(said: list[str], code: int) -> str:
    """What a failed process said last, as one line: its last block, else its last line, else its exit code."""
    lines = [line for line in said if line.strip()]
    start = next((number for number in range(len(lines) - 1, -1, -1) if lines[number].lstrip().startswith(HEADS)), None)
    if start is not None:
        return runs.hide(" ".join(part.strip() for part in lines[start:]))
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{runs.hide(lines[-1].strip())} ({ended})" if lines else f"no message ({ended})"
