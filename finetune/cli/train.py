"""`finetune dreambooth | textual-inversion | lora | hypernetwork | ...`: train one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from finetune.methods import get


def of_method(name: str) -> tuple[type, Callable[..., None]]:
    """Settings of the method of that name, and what to do with them."""
    return get(name).Settings, run


def run(settings: Any, console: Console) -> None:
    """Train, and say where the artifact is and how to use it."""
    from finetune.training import train

    folder = train(settings, console)
    console.print(f"Artifact: {folder / 'artifact'}", soft_wrap=True)
