"""`finetune dreambooth | textual-inversion | lora | hypernetwork | ...`: train one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from finetune import runs
from finetune.cli import quiet
from finetune.cli.failures import INTERRUPTED
from finetune.methods import get


def of_method(name: str) -> tuple[type, Callable[..., None]]:
    """Settings of the method of that name, and what to do with them."""
    return get(name).Settings, run


def run(settings: Any, console: Console) -> None:
    """Train. A run that was interrupted has saved its checkpoint and said so; the exit code tells it as well."""
    from finetune.training import train

    quiet.libraries()
    folder = train(settings, console)
    if runs.read_json(folder / "manifest.json")["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)
