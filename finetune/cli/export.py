"""`finetune export`: a run, an artifact or a model as the file a program loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune.cli import quiet
from finetune.cli.convert import tell
from finetune.cli.targets import EXPORTS, Written, destinations, find, refuse
from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune export` takes."""

    model_config = ConfigDict(extra="forbid")

    path: str = setting(..., "a run, an artifact (folder or file), or a model: toybox, a folder, a checkpoint, a hub id", group="arguments")
    to: Literal["diffusers", "webui", "kohya", "single-file"] | None = setting(
        None, "who shall load it; webui is AUTOMATIC1111, Forge and ComfyUI; which targets a method has: docs/exporting.md", group="what")
    output: Path | None = setting(None, "folder, or a file with the ending of what is written", group="what")
    name: str | None = setting(None, "file name without ending [default: the subject or trigger, safe letters only]", group="what")
    dtype: Literal["fp32", "bf16", "fp16"] = setting("fp16", "number format; embeddings are always fp32", group="what")
    base: str | None = setting(None, "SD 2: the original checkpoint, for the text block diffusers drops; OFT: the base model", group="what")
    overwrite: bool = setting(False, "replace files that are there", group="what")
    push_to_hub: str | None = setting(None, "upload the artifact with a model card to this hub repository (OWNER/NAME); nothing is uploaded without it",
                                      group="hub")
    card: Path | None = setting(None, "write the model card to this file, without uploading", group="hub")


def run(settings: Settings, console: Console) -> None:
    """Write the target's files; print them, and what could not be carried."""
    if settings.to is None and not (settings.card or settings.push_to_hub):
        raise Problem("No target was given.", "There is nothing to write.", "Add --to diffusers, webui, kohya or single-file, and --output.")
    if settings.to is not None and settings.output is None:
        raise Problem("No --output was given.", "There is nowhere to write to.", "Name a folder, or a file with the ending of what is written.")
    quiet.libraries()
    source = find(settings.path)
    if settings.to is not None:
        layouts = EXPORTS[source.kind].get(settings.to)
        if layouts is None:
            raise refuse(source.kind, settings.to, EXPORTS)
        from finetune.cli import writers

        assert settings.output is not None
        places = destinations(settings.output, layouts, writers.stem_of(source, settings.name), settings.overwrite, source.path)
        done: Written = writers.write(source, places, settings.dtype, base=settings.base)
        tell(done, console)
    if settings.card or settings.push_to_hub:
        from finetune.cli import hub

        if settings.card:
            hub.write_card(Path(settings.path), settings.card)
            console.print(str(settings.card), soft_wrap=True)
        if settings.push_to_hub:
            hub.push(Path(settings.path), settings.push_to_hub, console)
