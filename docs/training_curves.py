"""Train what docs/training.md shows on the embedded base, and print its two tables, and how sure the choice is:

    python docs/training_curves.py WORK

Finished runs in WORK are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune import runs
from finetune.evaluation import curves, open_judge
from finetune.training import stopping

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "finetune" / "toybox" / "pictures" / "cat"
METHODS = {"lora": "LoRA", "hypernetwork": "hypernetwork, key+value", "textual-inversion": "Textual Inversion"}
STEPS, EVERY, WINDOW, THRESHOLD = 400, 20, 6, 0.15
KEYS = ("dino", "clip_t", "leak", "drift", "selection")


def train(folder: Path, method: str, *more: object) -> Path:
    """A run of the command line, unless it is there."""
    if not (folder / "manifest.json").is_file() or runs.read_json(folder / "manifest.json")["status"] != "finished":
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
        cells = [str(point["step"]), *(short(point["scores"][key]) for key in KEYS)]
        if point["step"] == kept:
            cells[0], cells[-1] = f"**{cells[0]}**", f"**{cells[-1]}**"
        lines.append(f"| {' | '.join(cells)} |")
    base = {**told["base"], "wrong": told["scale"]["clip_t_other"], "real": told["scale"]["dino_real"]}
    return "\n".join(lines) + "\n\nthe base: " + ", ".join(f"{key} {short(base[key])}" for key in ("dino", "clip_t", "wrong", "real"))


def apart(work: Path, draws: int = 10000) -> str:
    """The kept step's selection minus each other's, with a 95 % interval: bootstrap over the eight prompts, paired."""
    folder = work / "curve"
    told = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    suite, judge, scale = curves.selection_suite("toybox", "cat"), open_judge("toybox"), curves.Scale(**told["scale"])
    shots = suite.shots("sks cat", 0)
    subject = [place for place, shot in enumerate(shots) if shot.kind == "subject"]
    texts = judge.clip_texts([shots[place].plain for place in subject])
    real = judge.encode([Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*.png"))])
    each: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for point in told["points"]:
        clip, encoder = curves.look(judge, folder / "steps" / f"{point['step']:07d}", shots)
        each[point["step"]] = (encoder[subject] @ real.T).mean(1), (clip[subject] * texts).sum(1)
        assert abs(each[point["step"]][0].mean() - point["scores"]["dino"]) < 1e-4  # the very numbers of the curve
        assert abs(each[point["step"]][1].mean() - point["scores"]["clip_t"]) < 1e-4
    generator, lines = np.random.default_rng(0), []
    drawn = generator.integers(0, len(subject), (draws, len(subject)))
    for step in each:
        own, other = ([curves.selection(dino[rows].mean(), text[rows].mean(), scale) for rows in drawn] for dino, text in (each[told["kept"]], each[step]))
        low, high = np.quantile(np.subtract(own, other), (0.025, 0.975))
        lines.append(f"{told['kept']} against {step}: {low:+.3f} to {high:+.3f}")
    return "\n".join(lines)


def main(work: Path) -> None:
    """Both tables, and the intervals between steps."""
    print(settling(work))
    print(curve(work))
    print(apart(work))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
