"""`finetune inspect FILE`: what an artifact, run folder or weight file is, from headers alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune inspect` takes."""

    model_config = ConfigDict(extra="forbid")

    path: Path = setting(..., "file or folder: an artifact, a run, a LoRA, an embedding, a hypernetwork, a model", group="arguments")


def run(settings: Settings, console: Console) -> None:
    """Print what it is, which base it fits, and what reads it. Runs no code of the file."""
    from finetune.formats.inspect import inspect
    from finetune.formats.inspection import lines

    path = settings.path.expanduser()
    if not path.exists():
        raise Problem(f"There is no file or folder {path}.", "", "Check the path.")
    table = Table.grid(padding=(0, 2))
    for label, text in lines(inspect(path)):
        table.add_row(Text(label, "yellow" if label.strip() == "warning" else "bold"), Text(text, overflow="fold"))
    console.print(table)
