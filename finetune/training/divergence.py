"""A loss that runs away is told while it can still be helped."""

from __future__ import annotations

import math

# Losses of single steps differ tenfold with the timestep, so means of many are compared. The first ones are few, because a
# rate that is far too high has done its harm within tens of steps.
FIRST, NEWEST, BOUND = 20, 50, 4.0
# The fixed set has the same noise at every look, so less is already much. docs/reliability.md has the largest ratios of
# runs that went well, and those of rates that are too high.
BOUND_FIXED = 1.5


class Watch:
    """Compares the mean loss of the newest steps with that of a run's first ones, and losses on the fixed set with its first.

    Args:
        start: the loss on the fixed set before the first step, where it was looked at.
    """

    def __init__(self, start: float | None = None):
        self.start = start
        self._first: list[float] = []
        self._newest: list[float] = []
        self._told = False

    def add(self, losses: list[float]) -> str | None:
        """Losses of further steps, in order; what is to be said, once."""
        finite = [loss for loss in losses if not math.isnan(loss)]
        room = max(0, FIRST - len(self._first))
        self._first += finite[:room]
        self._newest = (self._newest + finite[room:])[-NEWEST:]
        if len(self._newest) < NEWEST:
            return None
        return self._tell(sum(self._newest) / NEWEST, sum(self._first) / FIRST, BOUND, f"The mean loss of the last {NEWEST} steps", f"the first {FIRST}")

    def look(self, fixed: float) -> str | None:
        """The loss on the fixed set; what is to be said, once."""
        if self.start is None:
            self.start = fixed
        return self._tell(fixed, self.start, BOUND_FIXED, "The loss on the fixed set", "the first look")

    def _tell(self, now: float, first: float, bound: float, what: str, which: str) -> str | None:
        times = now / max(first, 1e-12)
        if self._told or not times > bound:
            return None
        self._told = True
        return f"{what} is {times:.1f} times that of {which}: training runs away."


def advice(rate: float) -> str:
    """What to do about it."""
    return f"The likely cause is the learning rate ({rate:g}); a third of it is worth trying."
