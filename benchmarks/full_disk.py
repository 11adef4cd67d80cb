"""A disk that is really full: runs in a small memory file system, which somebody else fills before, and in the middle of, a save.

    unshare --user --map-root-user --mount python benchmarks/full_disk.py

Needs Linux and the right to mount a file system in a namespace of its own. Of each method: the run stops with the bytes needed, the
bytes free and the path, the last checkpoint stays complete, and after room is made it goes on with --resume to the same bytes.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common
import kills

SIZES = {"textual-inversion": 2, "lora": 4, "hypernetwork": 24, "dreambooth": 64}  # MiB of the file system
STEPS = 3


def main() -> None:
    """Both ways to be full, for each method; print and write what was said."""
    found = common.parser(__doc__.splitlines()[0])
    common.add_model(found, "tiny")
    found.add_argument("--methods", nargs="+", choices=list(SIZES), default=["textual-inversion", "lora"])
    options = found.parse_args()
    kills.preload()
    told = {}
    with tempfile.TemporaryDirectory(prefix="full-disk-") as place:
        os.environ["FINETUNE_CACHE"] = f"{place}/cache"
        for name in options.methods:
            mount = Path(place) / name
            mount.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZES[name]}m", "tmpfs", str(mount)], check=True)
            try:
                told[name] = [trial(name, mount, way, options) for way in ("before a save", "in the middle of a save")]
            finally:
                subprocess.run(["umount", str(mount)], check=True)
    for name, lines in told.items():
        for way, said in lines:
            print(f"{name}, full {way}: {said}\n  The checkpoint before it was whole; after room was made the run went on to the same bytes.")
    common.write({"told": told, "mebibytes": SIZES}, options.json)


def trial(name: str, mount: Path, way: str, options: Any) -> tuple[str, str]:
    """One run that meets a full disk; returns (way, what it said)."""
    from finetune import runs
    from finetune.training import checkpoint, train
    from finetune.training import run as room

    straight, folder, filler = mount / "whole", mount / "run", mount / "filler"
    train(settings(name, straight, options), silent())
    whole = kills.left_by(straight)
    runs.remove_folder(straight)
    real_fit, real_save = room.fit, checkpoint.stream.save

    def fit(*given: Any) -> Any:
        for progress in real_fit(*given):
            if progress.step == 2 and way.startswith("before"):
                fill(filler, 0)
            yield progress

    def save(path: Path, *given: Any, **more: Any) -> None:
        if way.startswith("in") and ".0000002." in str(path) and path.name == "trained.safetensors":
            fill(filler, 4096)  # it was asked a moment ago, and there was room
        real_save(path, *given, **more)

    room.fit, checkpoint.stream.save = fit, save
    try:
        train(settings(name, folder, options), silent())
        raise SystemExit(f"{name}: nothing was noticed of a full disk")
    except runs.DiskFull as error:
        said = str(error).replace(str(mount), "DISK")
    finally:
        room.fit, checkpoint.stream.save = real_fit, real_save
    filler.unlink()
    if [one.name for one in runs.checkpoints(folder)] != ["0000001"] or kills.temporaries(folder):
        raise SystemExit(f"{name}: {[one.name for one in runs.checkpoints(folder)]} and {kills.temporaries(folder)} are there")
    kills.check(mount)
    train(settings(name, folder, options, resume=True), silent())
    if kills.left_by(folder) != whole:
        raise SystemExit(f"{name}: the run went on to other bytes")
    runs.remove_folder(folder)
    return way, said


def fill(path: Path, left: int) -> None:
    """Take all room but so many bytes."""
    with path.open("wb") as file:
        found = os.statvfs(path.parent)
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - left))


def settings(name: str, folder: Path, options: Any, **more: Any) -> Any:
    from finetune import methods

    own = {**kills.OWN[name], **({"prior": "none"} if name == "dreambooth" else {})}
    return methods.get(name).Settings(**{**common.settings_of(options), "batch_size": 1, "steps": STEPS, "output": folder, "checkpoint_every": 1,
                                         "validate_every": 0, "log_every": 1, **own, **more})


def silent() -> Any:
    from rich.console import Console

    return Console(file=open(os.devnull, "w"), width=80)  # noqa: SIM115 - lives as long as the console


if __name__ == "__main__":
    main()
