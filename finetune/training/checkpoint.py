"""Checkpoints: trainables and optimizer state as safetensors, complete when their manifest is there.

Draws are functions of seed and step, so no generator state is needed to go on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune import runs
from finetune.errors import Problem
from finetune.formats import stream
from finetune.training.loop import State

# Settings that change what is computed; a checkpoint made under others cannot be continued exactly.
HARMLESS = {"steps", "output", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "log_every", "validate_every",
            "preview_every", "preview_prompt", "export_dtype", "device", "stop", "stop_window", "stop_threshold", "export_every", "keep",
            "judge", "clip", "encoder", "export", "push_to_hub", "memory", "memory_limit", "free_encoders", "latent_cache", "freed_memory", "lean", "step_in_backward",
            "gradient_checkpointing", "resume_anyway", "on_nonfinite", "skip_at_most"}
FILES = ("trained.safetensors", "optimizer.safetensors")
# What a checkpoint's tensors mean nothing without.
ESSENTIAL = {"method", "model_hash", "optimizer"}


MANIFEST = 256 * 1024  # bytes allowed for manifest.json, plain values of the optimizer included


def save(folder: Path, state: State, settings: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/STEP and drop older complete ones beyond `keep`.

    It is built under a temporary name, each file read back from the disk, its manifest last, and then takes its name; until then
    the ones before it stay. Lines of metrics up to it are on disk before it is.

    Raises:
        DiskFull: no room for it.
    """
    target = folder / "checkpoints" / f"{state.step:07d}"
    files, plain = contents(state)
    runs.sync_metrics(folder)
    with runs.room(target, sum(stream.expected_bytes(entries, None) for entries in files.values()) + MANIFEST), runs.atomic_folder(target) as fresh:
        for name, entries in files.items():
            stream.save(fresh / name, entries, None, finite=False)
        runs.write_json(fresh / "manifest.json", {"step": state.step, "settings": settings, "optimizer": plain,
                                                  "files": {name: runs.sha256(fresh / name) for name in files}})
    for old in complete(folder)[:-keep]:
        runs.remove_folder(old)
    return target


def contents(state: State) -> tuple[dict[str, dict[str, stream.Lazy]], dict[str, Any]]:
    """A checkpoint's two files as tensors that are fetched when they are written, and the optimizer's plain values."""
    trained = {f"parameter/{name}": value for name, value in state.parameters.items()} | {f"extra/{name}": value for name, value in state.extra.items()}
    tensors, plain = _optimizer_tensors(state)
    return {"trained.safetensors": stream.of_tensors(trained), "optimizer.safetensors": stream.of_tensors(tensors)}, plain


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return runs.checkpoints(folder)


def check(folder: Path, facts: dict[str, Any], anyway: bool = False) -> list[str]:
    """Look whether the newest complete checkpoint of a run continues as what `facts` say; nothing is changed.

    Args:
        facts: settings and what else the computation follows from, as `save` was given them. What only one side knows of,
            as programs of different age do, is not compared.
        anyway: let differences pass that leave the tensors their meaning.

    Returns: the differences that were let pass, for people.

    Raises:
        Problem: there is no checkpoint, or it was made under settings that change the computation (they are listed).
    """
    newest = _newest(folder)
    before = _manifest(newest)["settings"]
    differing = [key for key in facts if key in before and key not in HARMLESS and before[key] != facts[key]]
    listed = [f"{key} (was {before[key]!r}, is {facts[key]!r})" for key in differing]
    if differing and not anyway:
        helped = not ESSENTIAL & set(differing)
        raise Problem(f"The checkpoint {newest} was made under other settings.", "They differ in " + "; ".join(listed) + ".",
                      "Resume with the old settings, or start a new run with another --output" +
                      ("; --resume-anyway goes on if the tensors fit." if helped else "."))
    if ESSENTIAL & set(differing):
        raise Problem(f"The checkpoint {newest} cannot be continued like this, not even with --resume-anyway.",
                      "They differ in " + "; ".join(listed) + ".", "Start a new run with another --output.")
    return listed


def restore(folder: Path, state: State) -> None:
    """Continue `state` from the newest complete checkpoint of a run, which `check` has looked at.

    Raises:
        Problem: none there, damaged, or its tensors are not those of the run.
    """
    newest = _newest(folder)
    manifest = _manifest(newest)
    for name in FILES:
        if not (newest / name).is_file() or runs.sha256(newest / name) != manifest["files"].get(name):
            raise Problem(f"The checkpoint file {newest / name} is damaged.", "Its SHA-256 is not the one in its manifest.",
                          f"Remove {newest} to fall back to the one before.")
    trained, optimizer = (load_file(newest / name) for name in FILES)
    live = {f"{prefix}/{name}": value for prefix, values in (("parameter", state.parameters), ("extra", state.extra)) for name, value in values.items()}
    wrong = [name for name in trained.keys() | live.keys()
             if name not in trained or name not in live or trained[name].shape != live[name].shape]
    if wrong:
        raise Problem(f"The checkpoint {newest} does not fit this run.", f"{len(wrong)} tensors are missing or of another shape, {min(wrong)!r} for one.",
                      "Resume with the settings it was made under, or start a new run with another --output.")
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(trained[name])
    _restore_optimizer(state, optimizer, manifest["optimizer"])
    state.step = manifest["step"]


def _newest(folder: Path) -> Path:
    found = complete(folder)
    if not found:
        raise Problem(f"There is no complete checkpoint in {folder}.", "A run keeps one every --checkpoint-every steps, and when it is interrupted.",
                      "Start again with --overwrite instead of --resume.")
    return found[-1]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        found = runs.read_json(checkpoint / "manifest.json")
        return {key: found[key] for key in ("step", "settings", "optimizer", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{checkpoint / 'manifest.json'} is damaged.", f"It does not read as a checkpoint's manifest ({error}).",
                      f"Remove {checkpoint} to fall back to the one before.") from None


def _optimizer_tensors(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's per-parameter state, tensors by "name/key" and the rest as plain values."""
    names = list(state.parameters)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in state.optimizer.state_dict()["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{names[index]}/{key}"] = value
            else:
                plain[f"{names[index]}/{key}"] = value
    return tensors, plain


def _flat(entries: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values; what lies in an inner table (bitsandbytes' quantized state) by "table|key"."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}|")
        else:
            yield before + key, value


def _restore_optimizer(state: State, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    places = {name: index for index, name in enumerate(state.parameters)}
    entries: dict[int, dict[str, Any]] = {}
    for label, value in {**tensors, **plain}.items():
        name, _, key = label.rpartition("/")
        *tables, leaf = key.split("|")
        table = entries.setdefault(places[name], {})
        for inner in tables:
            table = table.setdefault(inner, {})
        table[leaf] = value
    current = state.optimizer.state_dict()
    state.optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})

