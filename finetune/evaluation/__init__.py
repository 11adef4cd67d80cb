"""Same prompts, same seeds, every artifact and the base: pictures, scores, intervals. Importing this is torch-free.

    suites      what is asked: prompts with the subject, with its bare class, with other things
    images      render them, only what is missing or changed
    judge       the two encoders that look at pictures
    scores      one number per picture: fidelity, text agreement, drift, leak, diversity, copying
    statistics  intervals and paired differences that respect which pictures belong together
    scoring     a comparison folder -> scores.json
"""

from __future__ import annotations

from typing import Any

__all__ = ["Judge", "Shot", "Suite", "open_judge", "render_comparison", "render_row", "score", "suite", "suite_of"]

_HOMES = {
    "Suite": "suites", "Shot": "suites", "suite": "suites", "suite_of": "suites",
    "render_row": "images", "render_comparison": "images",
    "Judge": "judge", "open_judge": "judge",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"finetune.evaluation.{_HOMES[name]}"), name)
