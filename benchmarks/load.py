"""A long run on many pictures, and many pictures from one base: memory, open files, and whether log and metrics are whole.

    python benchmarks/load.py --json load.json

Both run as the command line does, each in a process of its own, which is looked at from outside twice a second (/proc, Linux).
"Flat" is the largest resident memory after the warm-up over the smallest, and the last tenth over the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import common

WARM = 0.1  # share of the time that counts as warm-up
GLANCE = 0.5  # seconds
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run both, print and write what was seen; end with an error where memory grew by more than --bound or something is missing."""
    found = common.parser(__doc__.splitlines()[0])
    common.add_model(found, "tiny")
    found.add_argument("--count", type=int, default=1000, help="pictures with captions to train on")
    found.add_argument("--steps", type=int, default=20_000, help="of training")
    found.add_argument("--method", default="lora")
    found.add_argument("--log-every", type=int, default=10)
    found.add_argument("--draw", type=int, default=500, help="pictures to generate")
    found.add_argument("--bound", type=float, default=0.02, help="share by which memory may grow")
    found.add_argument("--only", choices=["training", "generate"], help="one of the two")
    options = found.parse_args()
    model, side = common.settings_of(options)["model"], str(options.resolution or common.NATIVE[options.size])
    with tempfile.TemporaryDirectory(prefix="load-") as place:
        parts = {"training": training, "generate": generating}
        rows = {name: work(Path(place), model, side, options) for name, work in parts.items() if options.only in (None, name)}
    common.show("Load", ["", "MiB", "least", "most", "last", "spread", "growth", "files", "looks", "min"], [
        [name, *(f"{told[key] / 2**20:.1f}" for key in ("warm", "least", "most", "last")), f"{told['spread']:.4f}", f"{told['growth']:.4f}",
         f"{told['files_least']}-{told['files_most']}", str(told["looks"]), f"{told['seconds'] / 60:.1f}"] for name, told in rows.items()])
    common.write({"bound": options.bound, **rows}, options.json)
    trouble = [f"{name}: {reason}" for name, told in rows.items() for reason in told["trouble"]]
    if trouble:
        raise SystemExit("; ".join(trouble))


@dataclass
class Look:
    """One look at a process: seconds since its work began, resident bytes, open files."""

    seconds: float
    resident: int
    files: int


def watch(words: list[str], log: Path, begun: Path) -> tuple[list[Look], float]:
    """Run finetune and look at it until it ends; (looks since its work has begun, seconds of work).

    Args:
        begun: a file or folder whose presence says that what comes now is the work, not the loading.

    Raises:
        SystemExit: it failed.
    """
    looks: list[Look] = []
    with log.open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "finetune", *words], stdout=said, stderr=subprocess.STDOUT, cwd=common.ROOT)
        started = None
        while process.poll() is None:
            time.sleep(GLANCE)
            if started is None and begun.exists():
                started = time.monotonic()
            if started is not None and (look := look_at(process.pid, time.monotonic() - started)):
                looks.append(look)
    if process.returncode:
        raise SystemExit(f"finetune {words[0]} failed: {log.read_text(errors='replace')[-2000:]}")
    return looks, looks[-1].seconds if looks else 0.0


def look_at(process: int, seconds: float) -> Look | None:
    """What the kernel says of a process; None when it is no more."""
    try:
        resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
        return Look(seconds, resident, len(os.listdir(f"/proc/{process}/fd"))) if resident else None  # it has just ended
    except (OSError, IndexError, ValueError):
        return None


def summary(looks: list[Look], seconds: float, bound: float) -> dict[str, Any]:
    """Figures after the warm-up, the last look left out: the process may be ending."""
    after = [look for look in looks[:-1] if look.seconds >= WARM * seconds] or looks
    resident, files = [look.resident for look in after], [look.files for look in after]
    tenth = max(1, len(after) // 10)
    first, last = mean(resident[:tenth]), mean(resident[-tenth:])
    found = {"warm": first, "least": min(resident), "most": max(resident), "last": last, "spread": max(resident) / min(resident), "growth": last / first,
             "files_least": min(files), "files_most": max(files), "files_first": mean(files[:tenth]), "files_last": mean(files[-tenth:]),
             "looks": len(after), "seconds": seconds, "trouble": []}
    if found["spread"] > 1 + bound:
        found["trouble"].append(f"memory went from {min(resident):,} to {max(resident):,} bytes")
    if found["files_last"] > found["files_first"] + 0.5:
        found["trouble"].append(f"open files grew from {found['files_first']:.1f} to {found['files_last']:.1f}")
    return found


def training(place: Path, model: str, side: str, options: Any) -> dict[str, Any]:
    """A run on many captioned pictures."""
    from finetune import runs

    run, saved = place / "run", max(1, options.steps // 10)
    words = [options.method, "--model", model, "--instance-dir", str(options.pictures or captioned(options.cache, options.count, int(side))),
             "--class-noun", "dog", "--resolution", side, "--steps", str(options.steps), "--batch-size", "1", "--log-every", str(options.log_every),
             "--checkpoint-every", str(saved), "--validate-every", str(options.steps // 2), "--preview-every", "0", "--output", str(run)]
    looks, seconds = watch(words, place / "training.log", run / "metrics.jsonl")
    found = summary(looks, seconds, options.bound)
    lines = [line for line in runs.read_metrics(run) if "loss" in line]
    manifest = runs.read_json(run / "manifest.json")
    found |= {"steps": options.steps, "pictures": len(manifest["pictures"]), "metric_lines": len(lines)}
    if [line["step"] for line in lines] != list(range(options.log_every, options.steps + 1, options.log_every)):
        found["trouble"].append(f"metrics.jsonl has {len(lines)} lines of losses")
    if manifest["status"] != "finished" or (options.pictures is None and found["pictures"] != options.count):
        found["trouble"].append(f"the manifest says {manifest['status']} and {found['pictures']} pictures")
    return found


def generating(place: Path, model: str, side: str, options: Any) -> dict[str, Any]:
    """Many pictures of one prompt, in one process."""
    drawn = place / "drawn"
    words = ["generate", "--model", model, "--prompt", "a photo of a dog", "--count", str(options.draw), "--steps", "4", "--size", side, "--output", str(drawn)]
    looks, seconds = watch(words, place / "generate.log", drawn)
    found = summary(looks, seconds, options.bound) | {"pictures": len(list(drawn.glob("*.png")))}
    if found["pictures"] != options.draw:
        found["trouble"].append(f"{found['pictures']} pictures instead of {options.draw}")
    return found


def captioned(cache: Path, count: int, side: int) -> Path:
    """Pictures that differ, with a caption beside each."""
    folder = cache / f"captioned-{count}-{side}"
    if not (folder / "complete").is_file():
        from PIL import Image, ImageDraw

        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = Image.new("RGB", (side + number % 7, side), (number % 256, number * 7 % 256, number * 31 % 256))
            left = number % (side // 2)
            ImageDraw.Draw(picture).ellipse((left, side // 4, left + side // 3, side * 3 // 4), fill=(255 - number % 256, 128, number * 3 % 256))
            picture.save(folder / f"{number:05d}.png")
            (folder / f"{number:05d}.txt").write_text(f"a photo of sks dog number {number}\n", encoding="utf-8")
        (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    main()
