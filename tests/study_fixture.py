"""Hand-made cells of a study: scores drawn from known effects of row, subject, seed and prompt."""

import numpy as np

from finetune import runs

PROMPTS = ("a {} on the beach", "a {} in the snow", "a {} at night", "a drawing of a {}", "a {} in the city", "a {} on a table")
ROWS = {"base": 0.1, "lora": 0.5, "dreambooth": 0.8}
JUDGE = {"clip": "test/clip", "encoder": "test/encoder", "note": "for tests"}


def columns():
    return [{"key": "dino", "title": "DINO", "better": "higher", "help": "", "group": "Subject"},
            {"key": "drift", "title": "Drift", "better": "lower", "help": "", "group": "Base kept"}]


def cell_scores(subject, seed, rows=None, prompts=PROMPTS, noise=0.05):
    """scores.json of one cell; `dino` is the row's worth plus effects, `drift` a tenth of the row's worth (none for the base)."""
    rows = ROWS if rows is None else rows
    random = np.random.default_rng([hash_of(subject), seed])
    of_subject = np.random.default_rng(hash_of(subject)).normal() * 0.2
    found, values = [], {}
    for name, worth in rows.items():
        dino = {prompt: worth + of_subject + 0.1 * prompts.index(prompt) + noise * random.normal() for prompt in prompts}
        drift = {f"seed {turn}": worth / 10 + noise / 10 * random.normal() for turn in range(4)} if name != "base" else {}
        values[name] = {"dino": dino, "drift": drift} if drift else {"dino": dino}
        found.append({"row": name, "title": name.title(), "images": [], "flags": [],
                      "values": {key: {"clusters": list(one), "means": list(one.values())} for key, one in values[name].items()},
                      "scores": {key: interval(list(one.values())) for key, one in values[name].items()}})
    found.append({"row": "real", "title": "The real pictures", "images": [], "scores": {"dino": interval([0.9 + of_subject])}})
    return {"judge": dict(JUDGE), "suite": {"name": "toybox", "subject": list(prompts), "class": [], "other": [], "seeds_per_prompt": {"subject": 2}},
            "columns": columns(), "rows": found, "pairs": cell_pairs(values)}


def cell_pairs(values):
    names, found = list(values), []
    for metric in ("dino", "drift"):
        having = [name for name in names if metric in values[name]]
        for place, a in enumerate(having):
            for b in having[place + 1:]:
                gap = np.array(list(values[a][metric].values())) - np.array(list(values[b][metric].values()))
                half = 2.6 * gap.std(ddof=1) / np.sqrt(len(gap))
                found.append({"metric": metric, "a": a, "b": b, "difference": gap.mean(), "low": gap.mean() - half, "high": gap.mean() + half,
                              "p": 0.01, "n": len(gap), "decided": bool(abs(gap.mean()) > half)})
    return found


def interval(values):
    return {"mean": float(np.mean(values)), "low": None, "high": None, "n": len(values)}


def hash_of(text):
    return int.from_bytes(text.encode(), "big") % 2**31


def write_cell(folder, subject, seed, noun="mug", cost=1.0, **made):
    """One cell on disk with manifests of its runs and one real picture's hash."""
    scores = cell_scores(subject, seed, **made)
    methods = [row["row"] for row in scores["rows"] if row["row"] not in ("base", "real")]
    info = {"model": "toybox", "family": "toybox", "model_hash": "0123", "class_noun": noun, "instance_files": [], "seed": 0,
            "training_seed": seed, "subject_name": subject, "suite": {"name": None}, "judge": {}, "sampler": {"steps": 3, "guidance": 2.0},
            "rows": [{"row": row, "title": row.title(), "method": row, "run": row, "subject": f"sks {noun}"} for row in methods], "failed": []}
    runs.write_json(folder / "comparison.json", info)
    runs.write_json(folder / "scores.json", scores)
    for row in methods:
        runs.write_json(folder / row / "manifest.json", {
            "status": "finished", "seconds": {"training": 10.0 * cost, "per_step": 0.1 * cost}, "peak_memory_bytes": 2**30, "trainable_parameters": 100,
            "artifact": {"bytes": 5000}, "pictures": [{"file": "1.png", "sha256": f"{subject}-1"}]})
        runs.write_json(folder / row / "settings.json", {"method": row, "steps": 7, "seed": seed, "output": str(folder / row), "class_noun": noun})
    return info


def write_study(folder, subjects=("red-mug", "blue-mug", "tall-mug"), seeds=(0, 1), **made):
    """A study with its cells under FOLDER/cells; not aggregated."""
    entries = []
    for subject in subjects:
        for seed in seeds:
            name = f"{subject}-s{seed}"
            info = write_cell(folder / "cells" / name, subject, seed, **made)
            entries.append({"name": name, "subject": subject, "class_noun": "mug", "seed": seed, "folder": f"cells/{name}"})
    shared = {key: info[key] for key in ("model", "family", "model_hash", "suite", "judge", "sampler", "seed", "rows", "failed")}
    runs.write_json(folder / "comparison.json", {**shared, "cells": entries})
    return entries
