"""Runs killed at random moments (SIGKILL), most of them while something is written, then resumed, killed again, and finished.

    python benchmarks/kills.py --kills 200 --json kills.json

A process that has the libraries loaded forks a child for every run, so that a start costs no imports. Half of the kills come at a
random time, half at a random file operation of the run and up to some milliseconds after it. After each kill every file that has its
final name is read: hashes of complete checkpoints and artifacts, JSON, pictures, metrics; and no checkpoint that was complete is gone.
At the end of each run its artifacts and losses are compared with those of a run that nobody killed, to the byte.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

OWN: dict[str, dict[str, Any]] = {
    "dreambooth": {"prior": "images", "class_images": 2, "class_steps": 1, "ema_decay": 0.9, "learning_rate": 1e-4},
    "textual-inversion": {"placeholder": "<my-dog>", "learning_rate": 1e-2},
    "lora": {"rank": 4, "learning_rate": 1e-3},
    "hypernetwork": {"learning_rate": 1e-3},
}
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
AFTER = 0.004  # seconds within which a kill follows the file operation it was bound to
PATIENCE = 300.0  # seconds for a run that nobody kills
LIVES = 8  # kills after which a run is left alone to finish


def main() -> None:
    """Kill, check, resume, compare; print and write what came out. Ends with an error at the first file that cannot be trusted."""
    found = common.parser(__doc__.splitlines()[0])
    common.add_model(found, "tiny")
    found.add_argument("--kills", type=int, default=200, help="how many")
    found.add_argument("--methods", nargs="+", choices=list(OWN), default=list(OWN), help="taken in turn")
    found.add_argument("--steps", type=int, default=6, help="steps of each run; a checkpoint at every one")
    found.add_argument("--seed", type=int, default=0, help="of the moments")
    options = found.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        result = trial(Path(place), options)
    rows = [[name, str(told["runs"]), str(told["kills"]), str(told["in_a_write"]), str(told["resumed"])] for name, told in result["methods"].items()]
    total = [str(sum(int(row[column]) for row in rows)) for column in range(1, 5)]
    common.show("Killed runs", ["method", "runs", "kills", "in a write", "resumed from a checkpoint"], [*rows, ["all", *total]])
    print("No complete file was unreadable, no complete checkpoint lost, every artifact and loss equal to the byte. "
          f"{result['seconds']:.0f} s, {result['cleaned']} temporaries cleaned.")
    common.write(result, options.json)


def preload() -> None:
    """Have every library in memory that a run imports, and no thread that a fork would lose."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import peft  # noqa: F401
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import finetune.training  # noqa: F401
    from finetune import methods
    from finetune.cli import quiet

    quiet.libraries()
    torch.set_num_threads(1)
    for name in OWN:
        methods.get(name)


def trial(place: Path, options: Any) -> dict[str, Any]:
    """All kills; returns the counts."""
    started, chance = time.perf_counter(), random.Random(options.seed)
    given = common.settings_of(options)
    given["instance_dir"] = options.pictures or common.pictures_folder(options.cache, side=64)
    whole = {name: Whole(name, place / "whole" / name, given, options.steps) for name in options.methods}
    counts: dict[str, Counter[str]] = {name: Counter() for name in options.methods}
    cleaned, number = 0, 0
    while sum(told["kills"] for told in counts.values()) < options.kills:
        name = options.methods[number % len(options.methods)]
        left = options.kills - sum(told["kills"] for told in counts.values())
        told, gone = one_run(whole[name], place / f"run-{number}", chance, min(left, LIVES))
        counts[name] += told
        cleaned += gone
        number += 1
    return {"kills": options.kills, "methods": {name: {key: told[key] for key in ("runs", "kills", "in_a_write", "resumed")} for name, told in counts.items()},
            "unreadable": 0, "different": 0, "cleaned": cleaned, "seconds": time.perf_counter() - started, "steps": options.steps, "seed": options.seed}


class Whole:
    """A run that nobody kills: what the others must equal, how long it takes, and how many file operations it has."""

    def __init__(self, name: str, place: Path, given: dict[str, Any], steps: int):
        self.name, self.given, self.steps = name, given, steps
        started = time.perf_counter()
        code, self.operations = life(self, place, resume=False, deadline=None, operation=None)
        if code:
            raise SystemExit(f"the run of {name} that nobody kills failed: {(place / 'said').read_text()[-2000:]}")
        self.seconds = time.perf_counter() - started
        self.left = left_by(place / "run")

    def settings(self, place: Path, resume: bool) -> Any:
        from finetune import methods

        return methods.get(self.name).Settings(**{
            **self.given, "resolution": self.given["resolution"], "batch_size": 1, "steps": self.steps, "output": place / "run", "checkpoint_every": 1,
            "keep_checkpoints": 2, "export_every": 2, "log_every": 1, "validate_every": 0, "latent_cache": "disk", "resume": resume, **OWN[self.name]})


def one_run(whole: Whole, place: Path, chance: random.Random, lives: int) -> tuple[Counter[str], int]:
    """One run, killed up to `lives` times, and finished; (counts, temporaries that a later start had to clean)."""
    told, cleaned, newest = Counter(runs=1), 0, -1
    folder = place / "run"
    for turn in range(lives + 1):
        resume = (folder / "manifest.json").is_file()
        last = turn == lives
        timed = chance.random() < 0.5
        share = chance.random() * (0.9 if resume else 1.0)
        code, _ = life(whole, place, resume, deadline=share * whole.seconds if timed and not last else None,
                       operation=None if timed or last else (1 + int(share * whole.operations), chance.random() * AFTER))
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(f"{whole.name}: the run did not resume (exit code {code}): {(place / 'said').read_text()[-3000:]}")
        there = temporaries(place)
        cleaned += len(there)
        now = check(place)
        if now < newest:
            raise SystemExit(f"{folder}: the complete checkpoint of step {newest} is gone, the newest is of step {now}")
        newest = now
        told.update(kills=1, in_a_write=bool(there), resumed=now > 0)
    if left_by(folder) != whole.left:
        raise SystemExit(f"{folder}: what the killed run left differs from what the whole one left")
    if temporaries(folder):
        raise SystemExit(f"{folder}: temporaries are left: {temporaries(folder)}")
    shutil.rmtree(place)
    return told, cleaned


def life(whole: Whole, place: Path, resume: bool, deadline: float | None, operation: tuple[int, float] | None) -> tuple[int, int]:
    """One process from its start to its end, however it ends; (exit code, file operations it came to)."""
    place.mkdir(parents=True, exist_ok=True)
    shared = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        _live(whole, place, resume, operation, shared)
    return wait(child, deadline), struct.unpack("q", shared[:8])[0]


def wait(child: int, deadline: float | None) -> int:
    """Wait for a child, which is killed at the deadline; returns its exit code, negative for a signal."""
    end = time.monotonic() + (PATIENCE if deadline is None else deadline)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if deadline is not None else -signal.SIGALRM
        time.sleep(0.0005)


def _live(whole: Whole, place: Path, resume: bool, operation: tuple[int, float] | None, shared: mmap.mmap) -> None:
    """In the child: count file operations, perhaps die at one of them, train. Never returns."""
    code = 1
    try:
        said = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ["FINETUNE_CACHE"] = str(place / "cache")
        sys.addaudithook(counter(str(place), shared, operation))
        from rich.console import Console

        from finetune.training import train

        train(whole.settings(place, resume), Console(file=open(os.devnull, "w"), width=80))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reads it
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def counter(place: str, shared: mmap.mmap, operation: tuple[int, float] | None) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook (PEP 578) that counts what changes files under a folder, and dies at the one it was given or shortly after."""
    done = [0]

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event not in WRITES or not isinstance(given[0], (str, bytes, os.PathLike)) or not os.fsdecode(given[0]).startswith(place):
            return
        if event == "open" and isinstance(given[1], str) and not set(given[1]) & set("wax+"):
            return
        done[0] += 1
        shared[:8] = struct.pack("q", done[0])
        if operation and done[0] == operation[0]:
            threading.Thread(target=lambda: (time.sleep(operation[1]), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()

    return note


def check(place: Path) -> int:
    """Read everything that has its final name; returns the newest complete checkpoint's step, 0 when there is none.

    Raises:
        SystemExit: something cannot be read, or is not what its manifest says.
    """
    from PIL import Image
    from safetensors.torch import load_file

    from finetune import runs

    folder = place / "run"
    for one in [path for path in place.rglob("*") if path.is_file() and not hidden(path, place)]:
        if one.suffix == ".json":
            read(one, runs.read_json)
        elif one.suffix == ".safetensors":
            read(one, load_file)
        elif one.suffix == ".png":
            read(one, lambda path: Image.open(path).load())
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    for line in lines[:-1]:
        read(line, json.loads)
    found = runs.checkpoints(folder)
    for one in found:
        for name, digest in runs.read_json(one / "manifest.json")["files"].items():
            same(one / name, digest)
    for one in [folder / "artifact", *folder.glob("steps/[!.]*/artifact")]:
        for entry in runs.read_json(one / "artifact.json")["files"] if one.is_dir() else ():
            same(one / entry["file"], entry["sha256"])
    with runs.locked(folder):  # a dead process holds nothing
        pass
    return int(found[-1].name) if found else 0


def read(what: Any, reader: Callable[[Any], Any]) -> None:
    try:
        reader(what)
    except Exception as error:  # noqa: BLE001 - any failure is the finding
        raise SystemExit(f"{what} has its final name and cannot be read: {type(error).__name__}: {error}") from error


def same(path: Path, digest: str) -> None:
    from finetune import runs

    if not path.is_file() or runs.sha256(path) != digest:
        raise SystemExit(f"{path} is not what its manifest says")


def hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def temporaries(place: Path) -> list[Path]:
    """What is not there under its final name."""
    from finetune.runs.durable import SET_ASIDE, TEMPORARY

    return [path for path in place.rglob(".*") if TEMPORARY.fullmatch(path.name) or SET_ASIDE.fullmatch(path.name)]


def left_by(folder: Path) -> dict[str, Any]:
    """Hashes of all artifacts, and every loss."""
    from finetune import runs

    found: dict[str, Any] = {str(one.relative_to(folder)): [(entry["file"], entry["sha256"]) for entry in runs.read_json(one)["files"]]
                             for one in sorted([folder / "artifact" / "artifact.json", *folder.glob("steps/[!.]*/artifact/artifact.json")])}
    found["losses"] = [(line["step"], line["loss"], line["grad_norm"]) for line in runs.read_metrics(folder)]
    found["status"] = runs.read_json(folder / "manifest.json")["status"]
    return found


if __name__ == "__main__":
    main()
