"""Base models: find them, load them, encode prompts, render pictures. Importing this package does not import torch."""

from __future__ import annotations

from typing import Any

from finetune.model.families import Location, family_of, locate

__all__ = ["Base", "Location", "encode", "family_of", "load", "locate", "render"]

_HOMES = {"Base": "finetune.model.base", "load": "finetune.model.base", "encode": "finetune.model.text", "render": "finetune.model.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
