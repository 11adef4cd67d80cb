"""`finetune convert`: a file of one program's layout in the layout of another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune.cli import quiet
from finetune.cli.targets import CONVERSIONS, TITLES, Written, destinations, find, refuse
from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune convert` takes."""

    model_config = ConfigDict(extra="forbid")

    path: str = setting(..., "a LoRA, embedding, hypernetwork, checkpoint (.safetensors, .ckpt) or diffusers folder", group="arguments")
    to: Literal["kohya", "peft", "diffusers", "webui", "safetensors", "single-file"] | None = setting(
        None, "layout to write; which ones a file has: docs/exporting.md", group="what")
    output: Path | None = setting(None, "folder, or a file with the layout's ending; the web UIs' word is the file's name", group="what")
    name: str | None = setting(None, "file name without ending [default: the trigger, or the file's own name]", group="what")
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(None, "number format [default: as in the file; embeddings are always fp32]", group="what")
    like: Path | None = setting(None, "single file to folder: a diffusers folder that describes the model, for widths of no published one", group="what")
    base: str | None = setting(None, "the model a LoRA belongs to, where its layout needs it; SD 2: the original checkpoint", group="what")
    overwrite: bool = setting(False, "replace files that are there", group="what")


def run(settings: Settings, console: Console) -> None:
    """Write the other layout and print the files and what could not be carried."""
    quiet.libraries()
    from finetune.cli import writers

    source = find(settings.path)
    if settings.to is None or settings.output is None:
        raise Problem("--to or --output is missing.", f"{settings.path} is {TITLES[source.kind]}.",
                      f"Add --to {', '.join(CONVERSIONS[source.kind])}, and --output: a folder, or a file with the layout's ending.")
    layout = CONVERSIONS[source.kind].get(settings.to)
    if layout is None:
        raise refuse(source.kind, settings.to, CONVERSIONS)
    places = destinations(settings.output, (layout,), writers.stem_of(source, settings.name), settings.overwrite, source.path)
    tell(writers.write(source, places, settings.dtype, base=settings.base, like=settings.like), console)


def tell(done: Written, console: Console) -> None:
    """Print each file with its bytes, and the notes."""
    from finetune.runs import folder_bytes

    for path in done.files:
        size = folder_bytes(path) if path.is_dir() else path.stat().st_size
        console.print(f"{path}  {size:,} bytes", soft_wrap=True)
    for note in done.notes:
        console.print(f"Note: {note}", style="yellow", soft_wrap=True)
