"""`finetune resize FILE --rank R`: a LoRA of another rank, with what that keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune.cli import lora_tools
from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune resize` takes."""

    model_config = ConfigDict(extra="forbid")

    lora: Path = setting(..., "LoRA file or artifact", group="arguments")
    output: Path | None = setting(None, "the .safetensors to write", group="run")
    rank: int | None = setting(None, "rank to cut to", group="what", ge=1)
    energy: float | None = setting(None, "instead: the smallest rank at which every module keeps this share of its energy", group="what", gt=0, le=1)
    dtype: Literal["fp32", "bf16", "fp16"] = setting("fp16", "number format of what is written", group="run")
    verbose: bool = setting(False, "say of each module what is kept", group="run")


def run(settings: Settings, console: Console) -> None:
    """Cut every module to one rank and write; print the energy kept."""
    if (settings.rank is None) == (settings.energy is None):
        raise Problem("Give either --rank or --energy.", "One says how large the file becomes, the other what must stay.", "Add --rank 8, or --energy .95.")
    if settings.output is None:
        raise Problem("No --output was given.", "", "Add --output smaller.safetensors.")
    from finetune.formats import lora_math
    from finetune.formats.lora_read import read

    found = lora_tools.lora_at(settings.lora.expanduser())
    if found.is_dir():
        raise Problem(f"{found} holds PEFT's folders, not one file of plain pairs.", "", "Name a .safetensors file, or use `finetune merge --base --rank`.")
    pairs, metadata = read(found)
    spectra = {name: lora_math.of_pair(pair) for name, pair in pairs.items()}
    rank = settings.rank or max(spectrum.rank_for(settings.energy) for spectrum in spectra.values())
    modules, rows = {}, []
    for name, spectrum in spectra.items():
        modules[name], row = lora_tools.cut(name, spectrum, rank)
        rows.append(row)
    before = max(pair.rank for pair in pairs.values())
    console.print(f"rank {before} to {rank}")
    lora_tools.tell(console, rows, settings.verbose)
    facts = {key: metadata[key] for key in lora_tools.KEPT if key in metadata}
    lora_tools.write(settings.output, modules, facts | {"finetune.resized": f"{found.name} from rank {before}"}, settings.dtype, console)
