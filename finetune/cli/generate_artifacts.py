"""Artifacts of `finetune generate`: from flags, from tags and words in prompts, loaded once for each set.

    --artifact PATH[:STRENGTH]      a file or folder, or a name inside --artifacts-dir
    <lora:NAME:0.8>, <hypernet:NAME>    in the prompt, found inside --artifacts-dir and nowhere else
    <my-dog>                        in the prompt: an embedding of --artifacts-dir whose word it is
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.cli import named
from finetune.errors import Problem

KINDS = {method: kind for kind, method in named.METHOD.items()}  # method -> kind in prompts and hashes


@dataclass(frozen=True)
class Artifact:
    """One artifact to load.

    Attributes:
        path: as the user named it, or below --artifacts-dir.
        text: strength on the text encoders where it is another (LoRA only). rank: keep only so many dimensions (LoRA only).
        origin: whether a flag or the prompt asked for it.
        alias: the file's stem where the prompt calls an embedding by it, as web UIs do, and not by its own word.
    """

    path: Path
    strength: float = 1.0
    text: float | None = None
    rank: int | None = None
    origin: Literal["flag", "prompt"] = "flag"
    alias: str | None = None

    @property
    def label(self) -> str:
        """The name with its strength, for sheets."""
        name = self.path.parent.name if self.path.name == "artifact" else self.path.stem
        return name if self.strength == 1 and self.text is None else f"{name}:{self.strength:g}"


@dataclass(frozen=True)
class Ready:
    """A base with a set of artifacts on it, and what each turned out to be."""

    base: Any
    loaded: tuple[Any, ...]


def of_flags(words: list[str], strengths: list[float], folder: Path | None) -> list[Artifact]:
    """What --artifact and --strength name.

    Raises:
        Problem: nothing there, or strengths that belong to nothing.
    """
    found = [parse(word, folder) for word in words]
    if len(strengths) not in (0, 1, len(found)) or strengths and not found:
        raise Problem(f"{len(strengths)} strengths were given for {len(found)} artifacts.", "Which belongs to which cannot be told.",
                      "Give --strength once for all, or once for each --artifact.")
    if strengths and (twice := next((word for word, one in zip(words, found, strict=True) if one.strength != 1), None)):
        raise Problem(f"--artifact {twice} says a strength, and so does --strength.", "Which is meant cannot be told.", "Give one of them.")
    each = strengths * len(found) if len(strengths) == 1 else strengths
    return [replace(one, strength=strength) for one, strength in zip(found, each, strict=True)] if each else found


def parse(word: str, folder: Path | None) -> Artifact:
    """PATH, PATH:STRENGTH, NAME or NAME:STRENGTH; a name is looked up in `folder`.

    Raises:
        Problem: neither a path nor a name of anything.
    """
    place, _, number = word.rpartition(":")
    strength = _number(number) if place and not Path(word).expanduser().exists() else None
    name = place if strength is not None else word
    path = Path(name).expanduser()
    if not path.exists():
        if folder is None:
            raise Problem(f"There is no artifact at {path}.", "", "Name the `artifact` folder of a run, or a file in it.")
        path = _by_name(name, folder)
    return Artifact(path, 1.0 if strength is None else strength)


def _number(text: str) -> float | None:
    """A finite number, or None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _by_name(name: str, folder: Path) -> Path:
    """The artifact of that name of whatever kind; of several kinds the first."""
    first: Problem | None = None
    for kind in KINDS.values():
        try:
            return named.resolve(kind, name, folder)
        except Problem as problem:
            first = first or problem
    raise Problem(f"There is no artifact {name!r}, neither as a path nor in {folder}.", str(first), "Check the name.")


def of_prompt(prompt: str, folder: Path | None) -> tuple[str, list[Artifact], list[str]]:
    """The prompt without its tags, the artifacts it names, and notes on what was passed over.

    Raises:
        Problem: a tag without --artifacts-dir, or of nothing that is there.
    """
    from finetune.model import tags

    text, found = tags.find(prompt)
    uses, notes = tags.uses(found)
    if uses and folder is None:
        raise Problem(f"The prompt names the {named.TITLE[uses[0].kind]} {uses[0].name!r}.", "Names are looked up in one folder, and none was given.",
                      "Add --artifacts-dir FOLDER, or give the file with --artifact PATH.")
    artifacts = [Artifact(named.resolve(use.kind, use.name, folder), use.unet, use.text if use.kind == "lora" and use.text != use.unet else None,
                          use.rank, "prompt")
                 for use in uses]
    if folder is not None:
        if not folder.is_dir():
            raise Problem(f"There is no folder {folder}.", "--artifacts-dir names where artifacts are looked up.", "Check the path.")
        words = [Artifact(path, origin="prompt") for _, path in named.words([text], folder)]
        artifacts += words + stems(text, folder, {one.path for one in words})
    return text, artifacts, notes


def stems(text: str, folder: Path, known: set[Path]) -> list[Artifact]:
    """Embeddings that the text calls by their file's stem, which is what web UIs do, where that is not their own word."""
    found: dict[Path, Artifact] = {}
    for stem in sorted({path.stem for suffix in named.SUFFIXES for path in folder.rglob(f"*{suffix}")}):
        if re.search(alone(stem), text):
            with contextlib.suppress(Problem):  # of another kind, or a word of several files: then it is a word like any other
                path = named.resolve("embedding", stem, folder)
                if path not in known:
                    found[path] = Artifact(path, origin="prompt", alias=stem)
    return list(found.values())


def alone(stem: str) -> str:
    """A pattern for a stem as a whole word, not as a part of `<stem>` or of a longer one."""
    return rf"(?<![\w<-]){re.escape(stem)}(?![\w>-])"


def spelled(text: str, ready: Ready, chosen: tuple[Artifact, ...]) -> str:
    """The text with stems of embeddings replaced by the words the model was taught for them."""
    for one, loaded in zip(chosen, ready.loaded, strict=True):
        if one.alias and loaded.trigger:
            text = re.sub(alone(one.alias), lambda match, word=loaded.trigger: word, text)
    return text


def load(model: str, device: str, precision: str, artifacts: tuple[Artifact, ...]) -> Ready:
    """A fresh base with the artifacts on it, in their order (whole networks first, hypernetworks chained)."""
    import torch

    from finetune.cli import quiet

    quiet.libraries()
    from finetune.methods import load_artifacts
    from finetune.methods.base import Strength
    from finetune.model import load as load_base
    from finetune.model.base import pick_device

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    base = load_base(model, pick_device(device), kinds[precision])
    return Ready(base, tuple(load_artifacts(base, [(one.path, Strength(one.strength, one.text, one.rank)) for one in artifacts])))


def facts(artifact: Artifact, loaded: Any) -> dict[str, Any]:
    """What a picture says of an artifact: enough to find it again and to know that it is the same."""
    path, kind = loaded.path, KINDS.get(loaded.method, loaded.method)
    name = artifact.path.parent.name if artifact.path.name == "artifact" else artifact.path.stem
    return {"path": str(path), "name": path.stem if path.is_file() else name, "kind": kind, "strength": artifact.strength,
            "text_strength": artifact.text, "rank": artifact.rank, "origin": artifact.origin, "alias": artifact.alias, "word": loaded.trigger,
            "hash": fingerprint(path), "short": named.hashes(path, kind)}


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or over names and contents of a folder's weights."""
    import hashlib

    from finetune import runs

    if path.is_file():
        return runs.sha256(path)
    listing = [f"{file.relative_to(path).as_posix()} {runs.sha256(file)}" for file in sorted(path.glob("*/*.safetensors"))]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def found_again(told: dict[str, Any], folder: Path | None) -> Artifact:
    """The artifact a picture tells of, if it is there and the same.

    Args:
        told: what `facts` wrote, read from somebody's picture: believed only where path and hash agree.

    Raises:
        Problem: gone or changed.
    """
    path, fix = Path(str(told["path"])), "Name it with --artifact PATH, or another picture with --like."
    if not path.exists() and folder is not None and (folder / path.name).exists():
        path = folder / path.name
    if not (path.is_file() or path.is_dir()):
        raise Problem(f"The artifact {told['name']!r} of that picture is not at {path}.", "The picture holds its path and hash, not its weights.", fix)
    if fingerprint(path) != told["hash"]:
        raise Problem(f"{path} is no longer the artifact that picture was made with.", "Its hash is another.", fix)
    return Artifact(path, float(told["strength"]), told.get("text_strength"), told.get("rank"), told.get("origin", "flag"), told.get("alias"))
