"""SIGINT and SIGTERM: between steps they wait for the end of the step, before the first they end the run at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Whether the run was asked to end. True once a signal came that waits."""

    def __init__(self) -> None:
        self.waits = self.came = False

    def __bool__(self) -> bool:
        return self.came

    def wait(self) -> None:
        """From now on the first signal is only noted: there is something to save. A second one ends at once."""
        self.waits = True

    def note(self, number: int, frame: Any) -> None:
        """Called when a signal comes. Raises KeyboardInterrupt where it does not wait: what is written then is removed or stays whole."""
        if self.came or not self.waits:
            raise KeyboardInterrupt
        self.came = True


@contextlib.contextmanager
def watched() -> Iterator[Asked]:
    """While the context lasts, signals that would stop the process are ours."""
    asked = Asked()
    try:
        before = {number: signal.signal(number, asked.note) for number in SIGNALS}
    except ValueError:  # not the main thread: signals are not ours to take
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
