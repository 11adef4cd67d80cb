"""A loss that runs away is told while it can still be helped."""

from __future__ import annotations

# Losses of single steps differ tenfold with the timestep, so means of many are compared: 50 steps leave about a tenth of that.
WINDOW = 50
# docs/reliability.md has the largest ratio of runs that went well, and the ratios of runs with too high a rate.
BOUND = 2.0


class Watch:
    """Compares the mean loss of the newest steps with that of a run's first ones.

    Args:
        window: steps of a mean. bound: how many times the first mean is too much.
    """

    def __init__(self, window: int = WINDOW, bound: float = BOUND):
        self.window, self.bound = window, bound
        self._first: list[float] = []
        self._newest: list[float] = []
        self._told = False

    def add(self, losses: list[float]) -> float | None:
        """Losses of further steps, in order; how many times the first mean the newest one is, the first time that is too much."""
        finite = [loss for loss in losses if loss == loss]
        room = self.window - len(self._first)
        self._first += finite[:room]
        self._newest = (self._newest + finite[room:] if room > 0 else self._newest + finite)[-self.window:]
        if self._told or len(self._newest) < self.window:
            return None
        times = sum(self._newest) / max(sum(self._first), 1e-12)
        self._told = times > self.bound
        return times if self._told else None


def sentence(times: float, rate: float) -> str:
    """What is said of it."""
    return (f"The loss of the last {WINDOW} steps is {times:.1f} times that of the first {WINDOW}: training runs away. "
            f"The likely cause is the learning rate ({rate:g}); a third of it is worth trying.")
