"""`finetune dreambooth | textual-inversion | lora | hypernetwork | ...`: train one method."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from finetune import runs
from finetune.cli import quiet
from finetune.cli.failures import INTERRUPTED
from finetune.methods import get

JUDGES = ("judge", "clip", "encoder")


def of_method(name: str) -> tuple[type, Callable[..., None]]:
    """Settings of the method of that name, and what to do with them."""
    return get(name).Settings, run


def run(settings: Any, console: Console) -> None:
    """Train, and keep the best artifact where that was asked for.

    A run that was interrupted has saved its checkpoint and said so; the exit code tells it as well.
    """
    from finetune.training import train

    quiet.libraries()
    if settings.push_to_hub:
        from finetune.cli import hub

        hub.check_name(settings.push_to_hub)
    best = settings.keep == "best" and not of_comparison(settings.output)
    if best:  # a judge that is not to be had is a reason not to begin
        from finetune.cli.generate import OTHERS, SAMPLING
        from finetune.evaluation import curves, open_judge
        from finetune.model import family_of

        open_judge(family_of(settings.model), settings.judge, settings.clip, settings.encoder)
    folder = train(settings, console)
    if int(os.environ.get("RANK", "0")):  # of several processes the first one does the rest
        return
    if runs.read_json(folder / "manifest.json")["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if best:
        steps, guidance = SAMPLING.get(family_of(settings.model), OTHERS)
        curves.trace_run(folder, console, sampler={"steps": steps, "guidance": guidance}, judge={key: getattr(settings, key) for key in JUDGES})
    if settings.push_to_hub:
        hub.push(folder, settings.push_to_hub, console)


def of_comparison(output: Path | None) -> bool:
    """Whether a folder is a row of a comparison, which judges its rows itself, all by one judge and sampler.

    A comparison writes OUT/recipes/ROW.toml before it trains OUT/ROW.
    """
    return output is not None and (output.parent / "recipes" / f"{output.name}.toml").is_file()
