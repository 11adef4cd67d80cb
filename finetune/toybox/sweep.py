"""Where the embedded base's recipes come from: every method at several rates, measured against the true subject.

    python -m finetune.toybox.sweep --work sweep/ --steps 300 --strangers 3

The subjects are strangers: looks in any colours that are none of the twelve held-out subjects, so that the comparison
is not judged on what it was tuned on. For each run, over the eight scenes: oracle = mean cosine (judge's image encoder)
to the true subject drawn in that scene, on a scale where the untouched base is 0 and other pictures of the true subject
are 1; scene = share of pictures in which the ruler sees the scene asked for; drift = 1 - cosine to the base's own pictures
of other classes, same seeds. A rate is chosen by the geometric mean of oracle, scene and 1 - drift: likeness alone always
asks for a higher rate; of rates within .01 of the best the lowest is taken. Beside it: leak = cosine of bare class pictures to the references, over the base's. Finished runs
and their scores are kept; the table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune import draws, runs
from finetune.evaluation import open_judge
from finetune.methods import load_artifact
from finetune.model import load, render
from finetune.model.families import locate
from finetune.toybox.captions import SCENE_WORDS
from finetune.toybox.looks import random_look
from finetune.toybox.ruler import Ruler
from finetune.toybox.subjects import Subject, oracle, save_references
from finetune.toybox.world import SCENE_NAMES

GRID: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "textual-inversion": ("textual-inversion", {}, (1e-3, 2e-3, 5e-3, 1e-2)),
    "lora": ("lora", {}, (2e-4, 5e-4, 1e-3, 2e-3)),
    "hypernetwork-key-value": ("hypernetwork", {"transform": "key,value"}, (1e-4, 3e-4, 1e-3)),
    "hypernetwork-key-query": ("hypernetwork", {"transform": "key,query"}, (3e-4, 1e-3, 3e-3)),
    "dreambooth": ("dreambooth", {}, (1e-4, 2e-4, 4e-4, 8e-4)),
}
OTHERS = ("a photo of a red car in the city", "a photo of a blue duck on the beach", "a photo of a green bottle on a table",
          "a photo of a brown house in the snow", "a photo of a yellow ball in the desert", "a drawing of a purple teapot")
SAMPLER = {"steps": 20, "guidance": 4.0}


def stranger(number: int) -> Subject:
    """A subject to tune on: any look that is like none of the held-out subjects."""
    random = Random(f"stranger {number}")
    look = random_look(random, odds=(0.1, 0.3, 0.3, 0.3), known=0.0)
    return Subject(f"stranger-{number}-{look.noun}", look.noun, look, "")


def train_all(work: Path, subjects: list[Subject], methods: list[str], steps: int, jobs: int,
              model: str) -> list[tuple[str, float, Subject, Path]]:
    """Train every cell of the grid in processes of one thread each; returns (row, rate, subject, run folder)."""
    cells = []
    for subject in subjects:
        save_references(subject, work / "pictures" / subject.name)
        for row, (method, own, rates) in ((row, GRID[row]) for row in methods):
            for rate in rates:
                folder = work / f"{row}-{rate:g}-{steps}-{subject.name}"
                cells.append((row, rate, subject, folder, method, own))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: _train(work, cell, steps, model), cells))
    return [cell[:4] for cell in cells]


def _train(work: Path, cell: tuple[Any, ...], steps: int, model: str) -> None:
    row, rate, subject, folder, method, own = cell
    if (folder / "artifact").is_dir():
        return
    flags = {"model": model, "instance-dir": work / "pictures" / subject.name, "class-noun": subject.noun, "steps": steps,
             "learning-rate": rate, "output": folder, "recipe": f"{method}-toybox", **own}
    given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "finetune", method, *given, "--overwrite"], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


class Scorer:
    """Measures artifacts against the truth; base pictures are drawn once per class."""

    def __init__(self, model: str, judge: str | None):
        self.model, self.judge, self.ruler = model, open_judge("toybox", judge), Ruler.load(locate(model).path / "ruler.safetensors")
        self._base: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}

    def __call__(self, subject: Subject, artifact: Path | None) -> dict[str, float]:
        """Scores of one artifact, or of the untouched base."""
        base = load(self.model)
        phrase = subject.noun
        if artifact is not None:
            phrase = load_artifact(base, artifact).trigger or phrase
        asked = [(scene, turn) for scene in SCENE_NAMES for turn in range(2)]
        seeds = [draws.key(1, "sweep", scene, turn) % 2**32 for scene, turn in asked]
        drawn = render(base, [f"a photo of a {phrase} {SCENE_WORDS[scene][0]}" for scene, _ in asked], seeds, **SAMPLER)
        truth, again = ([oracle(subject, scene, "photo", turn + shift) for scene, turn in asked] for shift in (0, 50))
        bare = render(base, [f"a photo of a {subject.noun}"] * 8, list(range(8)), **SAMPLER)
        others = render(base, list(OTHERS), list(range(len(OTHERS))), **SAMPLER)
        bare_features, other_features = self.judge.encode(bare), self.judge.encode(others)
        references, true = self.judge.encode([oracle(subject, scene, "photo", 9) for scene in SCENE_NAMES]), self.judge.encode(truth)
        likeness = _cosine(self.judge.encode(drawn), true)
        if artifact is None:
            self._base[subject.name] = (bare_features, other_features, likeness)
        elif subject.name not in self._base:
            self(subject, None)
        base_bare, base_others, floor = self._base[subject.name]
        share = (likeness - floor) / (_cosine(self.judge.encode(again), true) - floor)
        wanted = torch.tensor([SCENE_NAMES.index(scene) for scene, _ in asked])
        scene = float(self.ruler.read(pixels(drawn))["scene"].eq(wanted).float().mean())
        drift = 1.0 - _cosine(other_features, base_others)
        return {"oracle": share, "scene": scene, "drift": drift, "mean": math.cbrt(max(share, 0.0) * scene * (1.0 - drift)),
                "leak": float((bare_features @ references.T).mean() - (base_bare @ references.T).mean())}


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine of paired unit rows."""
    return float((one * other).sum(1).mean())


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the subjects as Markdown."""
    lines = ["| method | rate | oracle | scene | drift | mean of the three | leak |", "|---|---|---|---|---|---|---|"]
    for row, rate in dict.fromkeys((one["row"], one["rate"]) for one in rows):
        same = [one for one in rows if (one["row"], one["rate"]) == (row, rate)]
        means = [f"{np.mean([one[key] for one in same]):.3f}" for key in ("oracle", "scene", "drift", "mean", "leak")]
        lines.append(f"| {row} | {rate:g} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--judge")
    parser.add_argument("--strangers", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=list(GRID))
    given = parser.parse_args()
    subjects = [stranger(number) for number in range(given.strangers)]
    cells = train_all(given.work.resolve(), subjects, given.methods, given.steps, given.jobs, given.model)
    scorer, rows = Scorer(given.model, given.judge), []
    for row, rate, subject, folder in cells:
        kept = folder / "score.json"
        if not kept.is_file():
            runs.write_json(kept, {"row": row, "rate": rate, "subject": subject.name, **scorer(subject, folder / "artifact")})
        rows.append(runs.read_json(kept))
        print(json.dumps(rows[-1]), flush=True)
    runs.write_json(given.work / "sweep.json", rows)
    runs.write_text(given.work / "sweep.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
