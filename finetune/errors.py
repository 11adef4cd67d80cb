"""The one exception people see: what is wrong, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """A refusal with a remedy. The command line prints it and ends with code 2.

    Args:
        what: what is wrong, naming the offending value, as one sentence.
        why: why that cannot work, as one sentence.
        fix: what to do instead, as one sentence.
    """

    def __init__(self, what: str, why: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.fix) if part)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest of `choices`, or an empty string when nothing is near."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {found[0]!r}?" if found else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused: Python's, torch's on a GPU (a RuntimeError too), or torch's on a CPU."""
    said = str(error)
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory: you tried to allocate" in said
                                                   or "CUDA out of memory" in said))
