"""What was measured to be fastest on this machine: taken once, kept on disk, so that equal runs choose equally."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import runs

MARGIN = 0.95  # of the plain way's time: what is less than a twentieth faster is not worth another way
HOPELESS = 2  # a way whose first timed run took so many times as long as the best one's is not timed again
ROUNDS = 4
_known: dict[str, dict[str, Any]] = {}


def known(question: str) -> str | None:
    """The kept answer of `fastest`, or None when this machine has not been asked."""
    times = _table().get(question)
    if times is None:
        return None
    plain, best = next(iter(times)), min(times, key=times.__getitem__)  # the plain way was asked first and is kept first
    return best if times[best] < MARGIN * times[plain] else plain


def fastest(question: str, ways: Mapping[str, Callable[[], Tensor]], tolerance: float) -> str:
    """Name of the way that does the work in least processor time, by the table or by measuring now.

    A way that fails, or gives other numbers than the first, is out. The first, plain one stays unless another is clearly faster.

    Args:
        question: names the work, with shapes; the answer is kept under it for this processor, torch and number of threads.
        ways: each does the work and returns its result. tolerance: allowed difference, as a share of the largest value.
    """
    if known(question) not in ways:
        times = _measure(ways, tolerance)
        _table()[question] = {name: round(value * 1e3, 4) for name, value in times.items()}  # ms
        with contextlib.suppress(OSError):  # a disk that cannot be written to costs a measurement at each start, nothing else
            runs.write_json(_file(), _table())
    return str(known(question))


def _measure(ways: Mapping[str, Callable[[], Tensor]], tolerance: float) -> dict[str, float]:
    """Least processor seconds of each right way. All take turns, so that other load meets all alike, and it only adds."""
    (first, plain), *others = ways.items()
    wanted, right = plain().float(), {first: plain}
    for name, work in others:
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):  # a private operator: gone or changed in this torch
            if torch.allclose(work().float(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max())):
                right[name] = work
    times: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, work in right.items():
            if times.get(name, 0) <= HOPELESS * min(times.values(), default=0):
                times[name] = min(_seconds(work), times.get(name, float("inf")))
    return times


def _seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _file() -> Path:
    root = Path(os.environ.get("FINETUNE_CACHE", "~/.cache/finetune")).expanduser()
    name = f"{_processor()}-torch{torch.__version__}-{torch.get_num_threads()}"
    return root / "kernels" / ("".join(sign if sign.isalnum() or sign in ".-" else "-" for sign in name) + ".json")


def _processor() -> str:
    """Name of the processor, and what tells two of one name apart."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table() -> dict[str, dict[str, float]]:
    """The table of this machine, read once per process."""
    file = _file()
    if str(file) not in _known:
        found: Any = {}
        with contextlib.suppress(OSError, ValueError):
            found = runs.read_json(file)
        _known[str(file)] = {key: value for key, value in (found.items() if isinstance(found, dict) else ()) if _is_entry(value)}
    return _known[str(file)]


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, float | int) for one in value.values())
