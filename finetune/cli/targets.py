"""What `finetune export` and `finetune convert` share: finding out what is at a path, and the table of kinds and layouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune import runs
from finetune.errors import Problem

Kind = Literal["lora", "embedding", "hypernetwork", "model"]
KINDS: dict[str, Kind] = {"lora": "lora", "textual-inversion": "embedding", "hypernetwork": "hypernetwork", "dreambooth": "model"}
TITLES = {"lora": "a LoRA", "embedding": "an embedding", "hypernetwork": "a hypernetwork", "model": "a whole model"}

# kind -> target of `finetune export` -> layouts written
EXPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "lora": {"diffusers": ("peft",), "webui": ("kohya",), "kohya": ("kohya",)},
    "embedding": {"diffusers": ("token",), "webui": ("table", "dict"), "kohya": ("table",)},
    "hypernetwork": {"webui": ("pairs",)},
    "model": {"diffusers": ("folder",), "webui": ("single",), "kohya": ("single",), "single-file": ("single",)},
}
# kind -> --to of `finetune convert` -> the one layout written
CONVERSIONS: dict[str, dict[str, str]] = {
    "lora": {"kohya": "kohya", "webui": "kohya", "peft": "peft", "diffusers": "peft"},
    "embedding": {"webui": "dict", "safetensors": "table", "kohya": "table", "diffusers": "token"},
    "hypernetwork": {"webui": "pairs", "safetensors": "ours"},
    "model": {"diffusers": "folder", "single-file": "single", "safetensors": "single", "webui": "single", "kohya": "single"},
}
# layout -> file name ("{}" stands for the stem); a folder has none
FILES = {"kohya": "{}.safetensors", "peft": "pytorch_lora_weights.safetensors", "token": "learned_embeds.safetensors", "table": "{}.safetensors",
         "dict": "{}.pt", "pairs": "{}.pt", "ours": "{}.safetensors", "single": "{}.safetensors", "folder": ""}
DTYPES = {"fp16": "F16", "fp32": "F32", "bf16": "BF16"}  # as typed, as safetensors spells it
WHY_NOT = {
    ("lora", "single-file"): ("A LoRA is a change to a model, not a model.", "Fold it in: finetune merge BASE LORA --output merged.safetensors."),
    ("embedding", "single-file"): ("An embedding is a word; a single file holds networks.", "Use --to webui, kohya or diffusers."),
    ("hypernetwork", "diffusers"): ("diffusers has no hypernetworks.", "Use --to webui, or train a LoRA for diffusers."),
    ("hypernetwork", "kohya"): ("kohya's scripts dropped hypernetworks.", "Use --to webui, or train a LoRA for them."),
    ("hypernetwork", "single-file"): ("A hypernetwork is a change to a model, and no single file has a place for it.", "Use --to webui."),
}


@dataclass(frozen=True)
class Source:
    """What is to be written elsewhere.

    Attributes:
        path: the file or folder to read; of a model by name, the name.
        run: the run or artifact folder it came from, for its model card.
        told: `finetune.*` metadata that is at hand without opening the weights.
    """

    kind: Kind
    path: Path
    name: str
    run: Path | None = None
    told: dict[str, str] = field(default_factory=dict)


@dataclass
class Written:
    """Files written, and in sentences what could not be carried."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(name: str) -> Source:
    """What lies at a path: a run, an artifact, a file of another program, or a model (also by name).

    Raises:
        Problem: nothing, or nothing that can be written in another layout.
    """
    path = Path(name).expanduser()
    place = path / "artifact" if (path / "artifact" / "artifact.json").is_file() else path
    run = path if place is not path or (path / "artifact.json").is_file() else None
    told = _told(place / "artifact.json") if (place / "artifact.json").is_file() else {}
    if (path / "manifest.json").is_file() and not (path / "artifact").is_dir():
        raise Problem(f"The run {path} has no artifact yet.", "It did not finish.", "Go on with the same command and --resume.")
    if path.suffix == ".ckpt" and path.is_file():
        return Source("model", path, name)
    if place.exists():
        from finetune.methods import get, names

        for method in names():
            if method in KINDS and (found := get(method).find(place)) is not None:
                return Source(KINDS[method], found, name, run, told)
    from finetune.model import locate

    located = locate(name)
    return Source("model", Path(name) if located.delta or name.startswith("toybox") else located.path, name, run, told)


def _told(path: Path) -> dict[str, str]:
    """The metadata of an artifact.json, which may be anybody's; empty where it has none."""
    found = runs.read_json(path)
    metadata = found.get("metadata") if isinstance(found, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def refuse(kind: str, target: str, table: dict[str, dict]) -> Problem:
    """Why a kind cannot be written to a target, and what can."""
    why, fix = WHY_NOT.get((kind, target), ("That layout has no place for it.", f"Use --to {', '.join(table[kind])}."))
    return Problem(f"{TITLES[kind][:1].upper()}{TITLES[kind][1:]} cannot be written as {target}.", why, fix)


def destinations(output: Path, layouts: tuple[str, ...], stem: str, overwrite: bool, source: Path) -> dict[str, Path]:
    """Where each layout goes: into the folder `output`, or to `output` itself when it has the layout's ending.

    Raises:
        Problem: a file is there already, or the ending does not fit.
    """
    found = {}
    for layout in layouts:
        pattern = FILES[layout]
        if not pattern:
            found[layout] = output
        elif output.suffix in (".safetensors", ".pt", ".bin", ".ckpt", ".pth"):
            if Path(pattern).suffix != output.suffix or len(layouts) > 1:
                ending = ", ".join(pattern.format(stem) for pattern in (FILES[layout] for layout in layouts))
                raise Problem(f"--output {output} does not fit.", f"What is written is {ending}.", "Name a folder, or a file with that ending.")
            found[layout] = output
        else:
            found[layout] = output / pattern.format(stem)
    for path in found.values():
        if path.exists() and (path.is_file() or any(path.iterdir())) and (not overwrite or path.resolve() == source.resolve()):
            fix = "Choose another --output." if path.resolve() == source.resolve() or path.is_dir() else "Choose another --output, or add --overwrite."
            raise Problem(f"{path} is there already.", "It would be replaced.", fix)
    return found
