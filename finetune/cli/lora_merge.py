"""`finetune merge A[:STRENGTH] B[:STRENGTH]`: several LoRAs as one, or folded into a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from finetune import runs
from finetune.cli import lora_tools
from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    """What `finetune merge` takes."""

    model_config = ConfigDict(extra="forbid")

    lora: list[str] = setting(..., "LoRA files or artifacts, each with :STRENGTH if it is not 1", group="arguments")
    output: Path | None = setting(None, "the merged .safetensors, or with --into the folder to write", group="run")
    into: str | None = setting(None, "fold them into this base and write a whole diffusers folder: toybox, folder, file or hub id", group="what")
    rank: int | None = setting(None, "rank of the merged LoRA [default: the sum of ranks, which is exact]", group="what", ge=1)
    base: str | None = setting(None, "base of LoRAs that are not plain pairs (DoRA, LoHa, LoKr, OFT) or number their modules", group="what")
    dtype: Literal["fp32", "bf16", "fp16"] = setting("fp16", "number format of what is written", group="run")
    verbose: bool = setting(False, "say of each module what is kept", group="run")


def run(settings: Settings, console: Console) -> None:
    """Merge and write; print what was kept."""
    given = [lora_tools.with_strength(word) for word in settings.lora]
    if settings.output is None:
        raise Problem("No --output was given.", "", "Add --output merged.safetensors, or with --into a folder.")
    if settings.into is not None:
        fold(given, settings, console)
        return
    base = lora_tools.load_base(settings.base) if settings.base else None
    opened = [(path, strength, lora_tools.open_lora(path, base)) for path, strength in given]
    modules, rows = merged([(lora_tools.pairs(adapters, base, path), strength) for path, strength, adapters in opened], settings.rank)
    metadata = shared_facts([adapters.metadata for *_, adapters in opened]) | {"finetune.merged": told(given)}
    if rows:
        lora_tools.tell(console, rows, settings.verbose)
    else:
        console.print("exact: the ranks were put side by side", style="dim")
    lora_tools.write(settings.output, modules, metadata, settings.dtype, console)


def merged(loras: list[tuple[dict[str, Any], float]], rank: int | None) -> tuple[dict[str, Any], list[lora_tools.Row]]:
    """One pair for each module that any of the LoRAs changes.

    Args:
        loras: name -> (pair, None) or (None, difference), with the strength of each.
        rank: to cut to; None puts ranks side by side.

    Returns: modules, and what each kept where something was cut.

    Raises:
        Problem: a whole difference and no rank, or a width that differs between the LoRAs.
    """
    from finetune.formats import lora_math

    modules, rows = {}, []
    for name in sorted({name for found, _ in loras for name in found}):
        here = [(*found[name], strength) for found, strength in loras if name in found]
        plain = [(pair, strength) for pair, _, strength in here if pair is not None]
        whole = [strength * difference for _, difference, strength in here if difference is not None]
        if whole and rank is None:
            raise Problem(f"{name} is no low-rank pair, so its rank must be chosen.", "The exact rank would be that of the whole layer.", "Add --rank R.")
        if whole:
            joined = lora_math.join(plain).change(whole[0]) if plain else 0
            spectrum = lora_math.of_matrix(sum(whole) + joined)
        else:
            modules[name] = lora_math.join(plain)
            if rank is None:
                continue
            spectrum = lora_math.of_pair(modules[name])
        modules[name], row = lora_tools.cut(name, spectrum, rank)
        rows.append(row)
    return modules, rows


def fold(given: list[tuple[Path, float]], settings: Settings, console: Console) -> None:
    """Add the LoRAs to a base's weights and write it as a diffusers folder.

    Raises:
        Problem: the folder is taken, or a LoRA does not fit.
    """
    from finetune.methods import get

    folder = settings.output
    assert folder is not None and settings.into is not None
    if folder.exists():
        raise Problem(f"--output {folder} exists.", "A merged model is written into a folder of its own.", "Name another folder, or remove it.")
    if settings.dtype == "bf16" or settings.rank or settings.base:
        raise Problem("--into takes neither --rank nor --base nor --dtype bf16.", "The LoRAs are added whole to the weights of the base.", "Leave them out.")
    base = lora_tools.load_base(settings.into)
    loaded = [get("lora").load(base, lora_tools.lora_at(path), strength) for path, strength in given]
    dreambooth = get("dreambooth")
    method = dreambooth(dreambooth.Settings(prior="none", ema_decay=0, export_dtype=settings.dtype))
    method.attach(base)
    metadata = shared_facts([one.metadata for one in loaded]) | {
        "finetune.base": base.known_as, "finetune.base_hash": base.hash, "finetune.prediction_type": base.prediction, "finetune.merged": told(given)}
    with runs.atomic_folder(folder) as fresh:
        method.export(base, fresh, metadata)
    console.print(f"{folder}: {base.name} with {told(given)}, {runs.folder_bytes(folder):,} bytes", soft_wrap=True)


def told(given: list[tuple[Path, float]]) -> str:
    """`name:strength` of each, as the metadata says what was merged."""
    return ", ".join(f"{path.name if path.suffix else '/'.join(path.parts[-2:])}:{strength:g}" for path, strength in given)


def shared_facts(sources: list[dict[str, str]]) -> dict[str, str]:
    """What the sources' metadata agree on, and all their triggers."""
    facts = {key: sources[0][key] for key in lora_tools.KEPT if key in sources[0] and all(one.get(key) == sources[0][key] for one in sources)}
    triggers = list(dict.fromkeys(one["finetune.trigger"] for one in sources if one.get("finetune.trigger")))
    return facts | ({"finetune.trigger": ", ".join(triggers)} if triggers else {})
