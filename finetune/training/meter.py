"""Progress bars: loss, steps per second and time left on a terminal, nothing where the output is not one."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    """Steps per second (or seconds per step when slow)."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="cyan")


class Meter:
    """A context with one progress bar.

    Args:
        title: word before the bar. total: steps. start: steps done before.
    """

    def __init__(self, console: Console, title: str, total: int, start: int = 0):
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), _Speed(),
                                  TextColumn("{task.fields[loss]}"), TimeRemainingColumn(compact=True),
                                  console=console, disable=not console.is_terminal, transient=False)
        self._task = self._progress.add_task(title, total=total, completed=start, loss="")

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._progress.stop()

    def to(self, done: int, loss: float | None = None, total: int | None = None) -> None:
        """Move the bar, with the loss beside it; `total` where it was not known before."""
        fields = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self._progress.update(self._task, completed=done, total=total, **fields)
