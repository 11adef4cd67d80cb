"""What was measured to be faster on this machine: taken once, kept on disk, so that equal runs choose equally."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import runs

MARGIN = 0.95  # of the plain way's time: what is less than a twentieth faster is not worth another way
_known: dict[str, dict[str, Any]] = {}


def known(question: str) -> bool | None:
    """The kept answer of `faster`, or None when this machine has not been asked."""
    found = _table().get(question)
    return None if found is None else found["other"] < MARGIN * found["plain"]


def faster(question: str, plain: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether `other` does the same work in clearly less processor time than `plain`, by the table or by measuring now.

    Args:
        question: names the work, with shapes; the answer is kept under it for this processor, torch and number of threads.
    """
    table = _table()
    if question not in table:
        times = {"plain": _best(plain), "other": _best(other)}
        table[question] = {name: round(value * 1e3, 4) for name, value in times.items()}  # ms
        with contextlib.suppress(OSError):  # a disk that cannot be written to costs a measurement at each start, nothing else
            runs.write_json(_file(), table)
    return bool(known(question))


def _best(work: Callable[[], Any], times: int = 3) -> float:
    """Least processor seconds of a few runs after a first one: other load only adds."""
    work()
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


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


def _table() -> dict[str, Any]:
    """The table of this machine, read once per process."""
    file = _file()
    if str(file) not in _known:
        found: Any = {}
        with contextlib.suppress(OSError, ValueError):
            found = runs.read_json(file)
        _known[str(file)] = {key: value for key, value in (found.items() if isinstance(found, dict) else ())
                             if isinstance(value, dict) and {"plain", "other"} <= value.keys()}
    return _known[str(file)]
