"""`finetune recipes`: list, show or copy the packaged recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from finetune import runs
from finetune.errors import Problem, nearest
from finetune.settings import recipes, setting


class Settings(BaseModel):
    """What `finetune recipes` takes."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["list", "show", "copy"] = setting("list", "list them, show one, or copy one to edit", group="arguments")
    name: str | None = setting(None, "name of the recipe to show or copy", group="arguments")
    destination: Path | None = setting(None, "where to copy it [default: NAME.toml here]", group="arguments")


def run(settings: Settings, console: Console) -> None:
    """List, show or copy."""
    found = recipes()
    if settings.action == "list":
        table = Table.grid(padding=(0, 2))
        for name, path in found.items():
            table.add_row(f"[bold cyan]{name}[/]", headline(path.read_text(encoding="utf-8")))
        console.print(table)
        console.print("\nUse one with --recipe NAME; `finetune recipes copy NAME my.toml` makes your own.", style="dim")
        return
    name = (settings.name or "").removesuffix(".toml")
    if name not in found:
        raise Problem(f"There is no packaged recipe {settings.name!r}." if name else f"`recipes {settings.action}` needs a recipe's name.",
                      nearest(name, found), "`finetune recipes` lists them.")
    text = found[name].read_text(encoding="utf-8")
    if settings.action == "show":
        console.print(text, markup=False, soft_wrap=True, end="")
        return
    target = settings.destination or Path(f"{name}.toml")
    target = target / f"{name}.toml" if target.is_dir() else target
    if target.exists():
        raise Problem(f"{target} is there already.", "Copying would replace it.", "Name another file, or remove it first.")
    runs.write_text(target, text)
    console.print(f"Copied to {target}. Use it with --recipe {target}.", soft_wrap=True)


def headline(text: str) -> str:
    """The recipe's own first comment line."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""
