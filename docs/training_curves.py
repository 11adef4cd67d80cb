"""Train what docs/training.md shows on the embedded base, and write its two tables:

    python docs/training_curves.py WORK

Finished runs in WORK are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.training import stopping

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "finetune" / "toybox" / "pictures" / "cat"
METHODS = {"lora": "LoRA", "hypernetwork": "hypernetwork, key+value", "textual-inversion": "Textual Inversion"}
STEPS, EVERY, WINDOW, THRESHOLD = 400, 20, 6, 0.15
KEYS = ("dino", "clip_t", "leak", "drift", "selection")


def train(folder: Path, method: str, *more: object) -> Path:
    """A run of the command line, unless it is there."""
    if not (folder / "manifest.json").is_file() or runs.read_json(folder / "manifest.json")["status"] != "complete":
        words = [method, "--instance-dir", PICTURES, "--class-noun", "cat", "--preview-every", 0, "--output", folder, "--overwrite", *more]
        subprocess.run([sys.executable, "-m", "finetune", *map(str, words)], check=True)
    return folder


def short(value: float, digits: int = 3) -> str:
    """A number below one without its zero."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def settling(work: Path) -> str:
    """Where DVAR ends, and what the loss would still have done."""
    lines = ["| | loss at the start | DVAR ends at | loss there | after 400 |", "|---|---|---|---|---|"]
    for method, title in METHODS.items():
        folder = train(work / method, method, "--steps", STEPS, "--validate-every", EVERY)
        losses = stopping.looked_at(runs.read_metrics(folder), EVERY)
        ends = next((place for place in range(len(losses)) if stopping.settled(losses[: place + 1], WINDOW, THRESHOLD)), len(losses) - 1)
        lines.append(f"| {title} | {short(losses[0], 4)} | {ends * EVERY} | {short(losses[ends], 4)} | {short(losses[-1], 4)} |")
    return "\n".join(lines)


def curve(work: Path) -> str:
    """The scores of artifacts along the way; the kept one in bold."""
    folder = train(work / "curve", "lora", "--steps", 200, "--export-every", 40, "--keep", "best")
    told: dict[str, Any] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    kept = runs.read_json(folder / "manifest.json")["kept"]["step"]
    lines = ["| step | DINO | CLIP-T | leak | drift | selection |", "|---|---|---|---|---|---|"]
    for point in told["points"]:
        own, mark = point["step"] == kept, "**"
        lines.append(f"| {mark * own}{point['step']}{mark * own} | " + " | ".join(
            f"{mark * (own and key == 'selection')}{short(point['scores'][key]) if key in point['scores'] else short(point[key])}{mark * (own and key == 'selection')}"
            for key in KEYS) + " |")
    return "\n".join(lines) + f"\n\n{json.dumps({key: value for key, value in told.items() if key != 'points'}, indent=1)}"


def main(work: Path) -> None:
    """Both tables."""
    print(settling(work))
    print(curve(work))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
