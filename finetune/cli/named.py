"""Artifacts by name inside --artifacts-dir, and never outside it.

A name is a path below the folder, a file's stem, the `ss_output_name` kohya's trainers write, or the name of a run or
artifact folder; looked for in that order. Names come from prompts, and prompts come from other people's pictures, so a
name can choose among the files below the folder and nothing else.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from finetune import runs
from finetune.errors import Problem

METHOD = {"lora": "lora", "hypernet": "hypernetwork", "embedding": "textual-inversion"}  # kind in prompts -> method
TITLE = {"lora": "LoRA", "hypernet": "hypernetwork", "embedding": "embedding"}
SUFFIXES = (".safetensors", ".pt", ".bin")  # in the order of preference
ALONG_THE_WAY = ("steps", "checkpoints")  # folders of a run that repeat the names of its artifact
LARGEST_EMBEDDING = 16 * 2**20  # bytes; 32 vectors for both encoders of SDXL are 0.26 MB


def resolve(kind: str, name: str, folder: Path) -> Path:
    """The file (or, of a LoRA in PEFT's own form, the folder) of an artifact.

    Args:
        kind: "lora", "hypernet" or "embedding".
        name: as written in a prompt.

    Raises:
        Problem: not found, found twice, of another kind, or a name that leads out of the folder.
    """
    if kind not in METHOD:
        raise Problem(f"There is no kind of artifact {kind!r}.", f"Known are {', '.join(METHOD)}.")
    _check_name(name)
    if not folder.is_dir():
        raise Problem(f"There is no folder {folder} to look for {name!r} in.", "", "Name the folder of your artifacts with --artifacts-dir.")
    root, other = folder.resolve(), None
    for places in _levels(name, root):
        fitting = []
        for place in places:
            if not _inside(place, root):
                raise Problem(f"{name!r} in {folder} is a link that leads out of the folder.", "What lies elsewhere is not found by name.",
                              "Give it with --artifact PATH.")
            found = _artifact(kind, place)
            fitting += [found] if found is not None else []
            other = other or (place if found is None else None)
        if fitting:
            return _only(kind, name, fitting, root)
    if other is not None:
        raise Problem(f"{name!r} in {folder} is not a {TITLE[kind]}.", _what_it_is(other, name), f"`finetune inspect {other}` says what is in it.")
    raise _unknown(kind, name, root, folder)


def words(prompts: Iterable[str], folder: Path) -> list[tuple[str, Path]]:
    """Learned words that stand in the prompts, with the embedding file of each: what the folder's embeddings answer to.

    A word answers where it stands alone; of two that overlap the longer one. `<my-dog>` of our own files wins over
    `my-dog`, the stem that web UIs read.

    Raises:
        Problem: two embeddings in different folders answer to one word.
    """
    if not folder.is_dir():
        return []
    root, known = folder.resolve(), {}
    for path in _files(root):
        if _inside(path, root) and not _along_the_way(path, root) and (trigger := _trigger(path)):
            known.setdefault(trigger, []).append(path)
    text, found = "\n".join(prompts), []
    for trigger in sorted(known, key=lambda word: (-len(word), word)):
        pattern = r"(?<!\w)" * trigger[0].isalnum() + re.escape(trigger) + r"(?!\w)" * trigger[-1].isalnum()
        if re.search(pattern, text):
            text = re.sub(pattern, "\n", text)
            found.append((trigger, _only("embedding", trigger, known[trigger], root)))
    return found


def hashes(path: Path, kind: str = "") -> str:
    """The short SHA-256 that web UIs show and search by.

    10 digits over the whole file for hypernetworks and models; 12 for embeddings; for a LoRA in safetensors 12 over the
    tensors alone, so that edited metadata does not change it. Of a folder: 10 digits over its weights files.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*.safetensors")):
            digest.update(bytes.fromhex(runs.sha256(file)))
        return digest.hexdigest()[:10]
    if kind == "lora" and path.suffix == ".safetensors":
        with open(path, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
        return runs.sha256(path, start)[:12]
    return runs.sha256(path)[:12 if kind in ("lora", "embedding") else 10]


def _check_name(name: str) -> None:
    """Refuse whatever is not a plain name or a path downwards, on any system."""
    windows = PureWindowsPath(name)
    parts = re.split(r"[/\\]", name)
    if (not name.strip() or any(ord(sign) < 32 or ord(sign) == 127 for sign in name) or "\\" in name or name.startswith(("/", "~"))
            or windows.drive or windows.root or any(part.strip() in ("", ".", "..") for part in parts)):
        raise Problem(f"{name!r} is no name of an artifact.", "Names choose among the files below --artifacts-dir and cannot lead out of it.",
                      "Give a file from elsewhere with --artifact PATH.")


def _inside(place: Path, root: Path) -> bool:
    """A link may point elsewhere: what counts is where it leads."""
    try:
        return place.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself leads nowhere
        return False


def _levels(name: str, root: Path) -> Iterator[list[Path]]:
    """Candidates by path, by stem, by kohya's name and by folder; each level is only looked at when those before had none."""
    direct = [root / name, *(root / f"{name}{suffix}" for suffix in SUFFIXES)]
    yield [place for place in direct if _exists(place)]
    files = list(_files(root))
    yield _main([path for path in files if name in (path.stem, path.name)], root)
    yield _main([path for path in files if _output_name(path) == name], root)
    yield _main([path for path in _folders(root) if path.name == name], root)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name too long for the file system is the name of nothing
        return False


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk in a fixed order, hidden entries left out, links to folders not followed."""
    for where, folders, files in os.walk(root):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        yield Path(where), folders, sorted(entry for entry in files if not entry.startswith("."))


def _files(root: Path) -> Iterator[Path]:
    for where, _, files in _walk(root):
        yield from sorted((where / entry for entry in files if entry.endswith(SUFFIXES)), key=lambda path: SUFFIXES.index(path.suffix))


def _folders(root: Path) -> Iterator[Path]:
    for where, folders, _ in _walk(root):
        yield from (where / entry for entry in folders)


def _along_the_way(path: Path, root: Path) -> bool:
    return any(part in ALONG_THE_WAY for part in path.relative_to(root).parts)


def _main(places: list[Path], root: Path) -> list[Path]:
    """Without the copies along a run's way, unless there is nothing else."""
    return [path for path in places if not _along_the_way(path, root)] or places


def _output_name(path: Path) -> str | None:
    """What kohya's trainers and ours wrote as the file's name, whatever it is called now."""
    from finetune.formats import header

    if path.suffix != ".safetensors":
        return None
    with contextlib.suppress(Problem, OSError):
        return header.read_header(path).metadata.get("ss_output_name")
    return None


def _artifact(kind: str, place: Path) -> Path | None:
    """What the method of a kind reads at a place; None when it is of another kind or damaged."""
    from finetune.methods import get

    if (place / "artifact").is_dir():
        place = place / "artifact"
    with contextlib.suppress(Problem, OSError):
        return get(METHOD[kind]).find(place)
    return None


def _what_it_is(place: Path, name: str) -> str:
    other = next((kind for kind in METHOD if _artifact(kind, place) is not None), None)
    if other is None:
        return "It holds no artifact of a known kind."
    return f"It is a {TITLE[other]}, " + ("used by writing its word." if other == "embedding" else f"written <{other}:{name}>.")


def _only(kind: str, name: str, found: list[Path], root: Path) -> Path:
    """The one artifact; files side by side are one artifact in several layouts, and the first is taken."""
    homes = list(dict.fromkeys(path.parent for path in found))
    if len(homes) > 1:
        listed = ", ".join(str(path.relative_to(root)) for path in dict.fromkeys(found))
        fix = ("Rename one, or give the one you mean with --artifact." if kind == "embedding" else
               f"Name it with its folder, as in <{kind}:{found[0].relative_to(root).with_suffix('').as_posix()}>.")
        raise Problem(f"{len(homes)} artifacts answer to {name!r}: {listed}.", "Which one is meant cannot be told.", fix)
    return found[0]


def _unknown(kind: str, name: str, root: Path, folder: Path) -> Problem:
    """Not found: name the nearest of this kind, or some that are there."""
    places = {path.stem: path for path in _files(root)} | {path.parent.name: path.parent for path in _folders(root) if path.name == "artifact"}
    known = sorted(label for label, place in places.items() if label and _artifact(kind, place) is not None)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not known:
        return Problem(f"There is no {TITLE[kind]} {name!r} in {folder}.", f"It holds no {TITLE[kind]} at all.",
                       "Name the folder of your artifacts with --artifacts-dir.")
    told = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It holds {', '.join(known[:8])}{', ...' * (len(known) > 8)}."
    return Problem(f"There is no {TITLE[kind]} {name!r} in {folder}.", told)


def _trigger(path: Path) -> str | None:
    """The word an embedding file answers to, None for other files."""
    from finetune.formats import embedding
    from finetune.methods.textual_inversion import word_of

    if path.stat().st_size > LARGEST_EMBEDDING or _artifact("embedding", path) is None:
        return None
    with contextlib.suppress(Problem):
        return word_of(path, embedding.read(path))
    return None
