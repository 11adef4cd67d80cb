"""`finetune report OUT`: the report again, from what is on disk."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune report` takes."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = setting(..., "output folder of `finetune compare`", group="arguments")


def run(settings: Settings, console: Console) -> None:
    """Write report.html and its tables; print the table and the path."""
    check_comparison(settings.folder)
    if not (settings.folder / "scores.json").is_file():
        raise Problem(f"{settings.folder} has no scores.json.", "The comparison was not scored.",
                      f"Run `finetune evaluate {settings.folder}`.")
    show(settings.folder, console)


def show(folder: Path, console: Console) -> None:
    """Write the report, print its table and where it is."""
    from finetune import report

    page = report.write(folder)
    console.print(report.terminal_table(folder))
    console.print(f"\nReport: {page.resolve()}", soft_wrap=True)


def check_comparison(folder: Path) -> None:
    """Refuse a folder that `finetune compare` did not write."""
    if not (folder / "comparison.json").is_file():
        raise Problem(f"{folder} is not a comparison.", "It has no comparison.json." if folder.is_dir() else "There is no such folder.",
                      "Name the --output folder of `finetune compare`.")
