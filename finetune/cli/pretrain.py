"""`finetune pretrain toybox`: the embedded base and its judge from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune pretrain` takes."""

    model_config = ConfigDict(extra="forbid")

    what: Literal["toybox"] = setting(..., "what to build: toybox, the embedded base and judge", group="arguments")
    work: Path = setting(Path("toybox-work"), "folder for data, checkpoints and log; run again to go on", group="run")


def run(settings: Settings, console: Console) -> None:
    """Build it, restartable."""
    from finetune.toybox.pretrain import pretrain

    pretrain(settings.work, console)
