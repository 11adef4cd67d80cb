"""Artifacts: the community's files and artifact.json, written whole or not at all, at the end and along the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

import finetune
from finetune import runs
from finetune.errors import Problem
from finetune.formats import pickles, stream
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.settings import TrainSettings
from finetune.training.loop import State, at_rest

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
HEADERS, FOLDER = 256 * 1024, 8 * 2**20  # bytes allowed beside the weights: headers; of a whole pipeline configurations and tokenizers too


def export(folder: Path, settings: TrainSettings, method: Method, base: Base, pictures: int, step: int) -> None:
    """Write FOLDER/artifact as the model is after `step`: averaged where the method exports an average, without dropout.

    It is built beside, read back, and takes the old one's place. Nothing is drawn and nothing of the run is changed.

    Args:
        pictures: how many the method learns from.

    Raises:
        DiskFull: no room for it. Problem: what came back from the disk is not an artifact.
    """
    metadata = describe(settings, method, base, pictures, step)
    with runs.room(folder / "artifact", expected_bytes(method, base, metadata)), runs.atomic_folder(folder / "artifact") as fresh:
        with at_rest(base, method), _length(method, step):
            method.export(base, fresh, metadata)
        files = [path for path in sorted(fresh.rglob("*")) if path.is_file()]
        for path in files:
            _read_back(path)
        if method.find(fresh) is None:
            raise Problem(f"What was written to {fresh} is no artifact of {method.title}.", "It was read back, and its own reader does not know it.",
                          "Go on from the last checkpoint with --resume; if it happens again, report it.")
        runs.write_json(fresh / "artifact.json", {
            "method": method.name, "trigger": method.trigger, "subject": method.subject, "class_noun": method.noun, "step": step,
            "metadata": metadata,
            "files": [{"file": str(path.relative_to(fresh)), "bytes": path.stat().st_size, "sha256": runs.sha256(path)} for path in files]})


def expected_bytes(method: Method, base: Base, metadata: dict[str, str]) -> int:
    """About what `export` writes: weights exactly, headers and small files by a bound."""
    return method.expected_bytes(base) + sum(method.added_files(base, metadata).values()) + (FOLDER if method.replaces else HEADERS)


def _read_back(path: Path) -> None:
    """Read a file of the artifact from the disk as a stranger would: every byte, in its format. Raises Problem where that fails."""
    runs.sync_file(path)
    try:
        if path.suffix == ".safetensors":
            for name, value in stream.each(path):
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise ValueError(f"{name} holds values that are not finite")
        elif path.suffix in (".pt", ".bin"):
            pickles.load_restricted(path)
        elif path.suffix == ".json":
            runs.read_json(path)
        else:
            path.read_bytes()
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read back: {error}.", "The artifact before it, if there was one, is untouched.",
                      "Go on from the last checkpoint with --resume.") from error


def describe(settings: TrainSettings, method: Method, base: Base, pictures: int, step: int) -> dict[str, str]:
    """The `finetune.*` metadata every file of the artifact carries. No date: equal runs give equal bytes."""
    return {"finetune.method": method.name, "finetune.base": runs.hide(base.known_as), "finetune.base_hash": base.hash,
            "finetune.prediction_type": base.prediction, "finetune.steps": str(step), "finetune.seed": str(settings.seed),
            "finetune.trigger": method.trigger, "finetune.class_noun": method.noun, "finetune.resolution": str(settings.resolution),
            "finetune.pictures": str(pictures), "finetune.licence": "that of the base model",
            "finetune.versions": ", ".join([f"finetune {finetune.__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)])}


def check_targets(settings: TrainSettings, method: Method) -> None:
    """Refuse what --export names and the method has no files for, before anything is read."""
    for target in settings.export:
        if target not in method.targets():
            have = ", ".join(method.targets()) or "finetune alone"
            raise Problem(f"--export {target} is not available for {method.title} as it is set.", f"Its files are for {have}.",
                          "Leave it out; docs/exporting.md says which method reaches which program, and what to train instead.")


def along_the_way(folder: Path, step: int) -> Path:
    """Where the artifact of a step lies: RUN/steps/0000100, which holds artifact/."""
    return folder / "steps" / f"{step:07d}"


def drop_later(folder: Path, state: State) -> None:
    """Remove artifacts of steps a resumed run has not reached, so that none stays from another way of going on."""
    for place in (folder / "steps").glob("*/artifact"):
        if place.parent.name.isdecimal() and int(place.parent.name) > state.step:
            runs.remove_folder(place.parent)


def count(settings: TrainSettings) -> int:
    """How many artifacts a run of full length leaves under RUN/steps: every so many steps, and the last."""
    return -(-settings.steps // settings.export_every) if settings.export_every else 0


@contextlib.contextmanager
def _length(method: Method, step: int) -> Iterator[None]:
    """Some file formats hold the number of steps, and methods read it from their settings: here it is the true one."""
    planned = method.settings
    method.settings = planned.model_copy(update={"steps": step})
    try:
        yield
    finally:
        method.settings = planned
