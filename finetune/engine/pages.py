"""What becomes of memory that was freed: it stays with the process, which is faster, or goes back to the system, which is smaller."""

from __future__ import annotations

import ctypes
import sys

from finetune.settings import TrainSettings

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt(3)
PIECE = 2**20  # bytes: what is larger is a mapping of its own under "return"
LARGEST_PIECE = 2**25  # glibc's largest threshold for that of its own (DEFAULT_MMAP_THRESHOLD_MAX)
MODES = {
    "keep": {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1},
    "return": {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: PIECE, M_TRIM_THRESHOLD: PIECE},
    "library": {},  # as it is, in a process where nothing was changed
}


def freed_memory(settings: TrainSettings, whole: bool) -> str:
    """What `--freed-memory auto` means for a run: a key of MODES.

    Keep: a full fine-tuning step of SD 1.5 frees and asks again for 3.4 GB of gradients: a million page faults, a third of its
    time. Return: where memory is short. A heap that is never given back grows by holes: 2.5 GB in four steps of full
    training with the optimizer in the backward pass.

    Args:
        whole: the whole UNet trains.
    """
    if settings.freed_memory != "auto":
        return settings.freed_memory
    if settings.memory in ("low", "lowest") or settings.step_in_backward:
        return "return"
    return "keep" if whole else "library"


def set_pages(mode: str) -> bool:
    """Tell glibc what to do with freed memory from now on; the numbers are the same. Returns whether it was told.

    Elsewhere than on glibc nothing is done. "library" after another mode in the same process leaves that one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(MODES[mode]) and all(bool(libc.mallopt(option, value)) for option, value in MODES[mode].items())
    except (OSError, AttributeError):  # another C library
        return False
