"""Where the embedded base's recipes come from: every method at several rates, measured against the true subject.

    python -m finetune.toybox.sweep --work sweep/ --steps 400 --subjects lilac-cat

For each run: oracle = mean cosine (judge's image encoder) between pictures of the eight scenes and the true subject drawn in
that scene; text = CLIP-T of the same; leak = cosine of bare class pictures to the references, over the base's; drift =
1 - cosine to the base's own pictures of other classes, same seeds. Finished runs are kept; the table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from finetune import draws, runs
from finetune.evaluation import open_judge
from finetune.methods import load_artifact
from finetune.model import load, render
from finetune.toybox.captions import SCENE_WORDS
from finetune.toybox.subjects import SUBJECTS, Subject, oracle, save_references
from finetune.toybox.world import SCENE_NAMES

GRID: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "textual-inversion": ("textual-inversion", {}, (5e-3, 1e-2)),
    "lora": ("lora", {}, (5e-4, 1e-3, 2e-3)),
    "hypernetwork-key-value": ("hypernetwork", {"transform": "key,value"}, (1e-4, 3e-4, 1e-3)),
    "hypernetwork-key-query": ("hypernetwork", {"transform": "key,query"}, (3e-4, 1e-3)),
    "dreambooth": ("dreambooth", {}, (1e-4, 2e-4)),
}
OTHERS = ("a photo of a red car in the city", "a photo of a blue duck on the beach", "a photo of a green bottle on a table",
          "a photo of a brown house in the snow", "a photo of a yellow ball in the desert", "a drawing of a purple teapot")
SAMPLER = {"steps": 20, "guidance": 4.0}


def train_all(work: Path, names: list[str], steps: int, jobs: int, model: str) -> list[tuple[str, float, Subject, Path]]:
    """Train every cell of the grid in processes of one thread each; returns (row, rate, subject, run folder)."""
    cells = []
    for subject in (SUBJECTS[name] for name in names):
        save_references(subject, work / "pictures" / subject.name)
        for row, (method, own, rates) in GRID.items():
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
        self.model, self.judge = model, open_judge("toybox", judge)
        self._base: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, subject: Subject, artifact: Path | None) -> dict[str, float]:
        """Scores of one artifact, or of the untouched base."""
        base = load(self.model)
        phrase = subject.noun
        if artifact is not None:
            phrase = load_artifact(base, artifact).trigger or phrase
        asked = [(scene, turn) for scene in SCENE_NAMES for turn in range(2)]
        seeds = [draws.key(1, "sweep", scene, turn) % 2**32 for scene, turn in asked]
        drawn = render(base, [f"a photo of a {phrase} {SCENE_WORDS[scene][0]}" for scene, _ in asked], seeds, **SAMPLER)
        truth = [oracle(subject, scene, "photo", turn) for scene, turn in asked]
        plain = [f"a photo of a {subject.noun} {SCENE_WORDS[scene][0]}" for scene, _ in asked]
        bare = render(base, [f"a photo of a {subject.noun}"] * 8, list(range(8)), **SAMPLER)
        others = render(base, list(OTHERS), list(range(len(OTHERS))), **SAMPLER)
        bare_features, other_features = self.judge.encode(bare), self.judge.encode(others)
        if artifact is None:
            self._base[subject.name] = (bare_features, other_features)
        base_bare, base_others = self._base[subject.name]
        references = self.judge.encode([oracle(subject, scene, "photo", 9) for scene in SCENE_NAMES])
        return {"oracle": _cosine(self.judge.encode(drawn), self.judge.encode(truth)),
                "text": _cosine(self.judge.clip_images(drawn), self.judge.clip_texts(plain)),
                "leak": float((bare_features @ references.T).mean() - (base_bare @ references.T).mean()),
                "drift": 1.0 - _cosine(other_features, base_others)}


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine of paired unit rows."""
    return float((one * other).sum(1).mean())


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the subjects as Markdown."""
    lines = ["| method | rate | oracle | text | leak | drift | s per step |", "|---|---|---|---|---|---|---|"]
    for row, rate in dict.fromkeys((one["row"], one["rate"]) for one in rows):
        same = [one for one in rows if (one["row"], one["rate"]) == (row, rate)]
        means = [f"{np.mean([one[key] for one in same]):.3f}" for key in ("oracle", "text", "leak", "drift", "per_step")]
        lines.append(f"| {row} | {rate:g} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--judge")
    parser.add_argument("--subjects", nargs="+", default=["lilac-cat"], choices=list(SUBJECTS))
    given = parser.parse_args()
    cells = train_all(given.work.resolve(), given.subjects, given.steps, given.jobs, given.model)
    scorer, rows = Scorer(given.model, given.judge), []
    for name in given.subjects:
        rows.append({"row": "base", "rate": 0.0, "subject": name, "per_step": 0.0, **scorer(SUBJECTS[name], None)})
    for row, rate, subject, folder in cells:
        seconds = runs.read_json(folder / "manifest.json")["seconds"]["per_step"]
        rows.append({"row": row, "rate": rate, "subject": subject.name, "per_step": seconds, **scorer(subject, folder / "artifact")})
        print(json.dumps(rows[-1]), flush=True)
    runs.write_json(given.work / "sweep.json", rows)
    runs.write_text(given.work / "sweep.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
