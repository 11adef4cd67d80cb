"""From the scored cells of a study to its OUT/scores.json: every score over subjects and prompts. Torch-free.

A cell is one comparison: one subject, one training seed. The study pairs rows on the same subjects, seeds and prompts.
Subjects weigh the same, whatever number of seeds and prompts they have; training seeds are averaged within their subject.

    scores  mean and interval over subjects and prompts, both resampled (see `crossed`)
    pairs   the same of the difference of two rows; `decided` after Holm's correction over all pairs of a metric
    ranks   mean place of a method among the methods, 1 is best, equal means share a place; interval over subjects
    wins    cells in which one row beats another by the cell's own paired interval; a tie where that holds zero
    costs   mean over the cells, interval over subjects
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import runs
from finetune.errors import Problem
from finetune.evaluation import crossed, statistics
from finetune.evaluation.columns import BOUNDS

ALPHA = 0.05
NO_BOUNDS = (-math.inf, math.inf)
COSTS = {"training_seconds": "seconds.training", "training_cpu_seconds": "seconds.training_cpu", "seconds_per_step": "seconds.per_step",
         "peak_memory_bytes": "peak_memory_bytes", "trainable_parameters": "trainable_parameters", "artifact_bytes": "artifact.bytes"}
# What two cells must share to be one study: name, where it is told, and how it is taken from there.
ALIKE: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("base (model_hash)", lambda cell: cell.info.get("model_hash")),
    ("judge", lambda cell: {key: cell.scores["judge"].get(key) for key in ("clip", "encoder")}),
    ("suite", lambda cell: {key: cell.scores["suite"].get(key) for key in ("name", "seeds_per_prompt")}),
    ("sampler", lambda cell: cell.info.get("sampler")),
)


@dataclass(frozen=True)
class Cell:
    """One scored comparison: what comparison.json and scores.json say, and what its runs cost, by row and cost."""

    name: str
    subject: str
    seed: int
    info: dict[str, Any]
    scores: dict[str, Any]
    costs: dict[str, dict[str, float]]

    def row(self, name: str) -> dict[str, Any] | None:
        """A row of scores.json."""
        return next((row for row in self.scores["rows"] if row["row"] == name), None)

    @property
    def methods(self) -> set[str]:
        """The rows that were trained; the others are the base, the true subject where it is known, and the real pictures."""
        return {row["row"] for row in self.info["rows"]}

    def mean(self, row: str, metric: str) -> float | None:
        """A row's score in this cell."""
        found = ((self.row(row) or {}).get("scores") or {}).get(metric)
        return None if found is None else found["mean"]

    def clusters(self, row: str, metric: str) -> dict[str, float]:
        """A row's means by prompt (or seed of one prompt); empty where there are none."""
        found = ((self.row(row) or {}).get("values") or {}).get(metric)
        return dict(zip(found["clusters"], found["means"], strict=True)) if found else {}


def aggregate(folder: Path) -> dict[str, Any]:
    """Put the scored cells of a study together and write OUT/scores.json.

    Raises:
        Problem: no study, no scored cell, or cells that were not measured alike.
    """
    folder = Path(folder)
    info = runs.read_json(folder / "comparison.json")
    cells = [read_cell(folder, entry) for entry in info.get("cells", []) if (place(folder, entry) / "scores.json").is_file()]
    if not cells:
        raise Problem(f"No cell of {folder} is scored.", "A study is made of the scores of its cells.", f"Run `finetune evaluate {folder}`.")
    refuse_unlike(cells)
    result = combine(cells, info.get("seed", 0))
    runs.write_json(folder / "scores.json", result)
    return result


def place(folder: Path, entry: dict[str, Any]) -> Path:
    """Where a cell of comparison.json lies."""
    return Path(os.path.normpath(Path(folder) / entry.get("folder", f"cells/{entry['name']}")))


def read_cell(folder: Path, entry: dict[str, Any]) -> Cell:
    """A cell by its entry in the study's comparison.json."""
    where = place(folder, entry)
    info, scores = runs.read_json(where / "comparison.json"), runs.read_json(where / "scores.json")
    if not all("values" in row for row in scores["rows"] if row["row"] != "real"):
        raise Problem(f"The scores of {where} have no means by prompt.", "They were written by an older version.",
                      f"Run `finetune evaluate {where}`.")
    costs = {row["row"]: _costs(where / row.get("run", row["row"]) / "manifest.json") for row in info["rows"]}
    return Cell(entry["name"], entry["subject"], int(entry.get("seed", 0)), info, scores, costs)


def refuse_unlike(cells: Sequence[Cell]) -> None:
    """Refuse cells whose numbers cannot be averaged, naming what differs.

    Raises:
        Problem: base, judge, suite or sampler are not the same in all.
    """
    first = cells[0]
    for name, taken in ALIKE:
        for cell in cells[1:]:
            if taken(cell) != taken(first):
                raise Problem(f"The cells {first.name} and {cell.name} differ in their {name}: {taken(first)} and {taken(cell)}.",
                              "Scores of one study must be measured alike.", "Evaluate both the same way, or report them apart.")


def combine(cells: Sequence[Cell], seed: int = 0) -> dict[str, Any]:
    """The study's scores.json from its cells: see the module's first lines."""
    columns = _columns(cells)
    rows = _rows(cells)
    better = {column["key"]: column.get("better", "higher") for column in columns}
    suites = [cell.scores["suite"] for cell in cells]
    suite = {**suites[0], **{kind: list(dict.fromkeys(prompt for one in suites for prompt in one.get(kind, [])))
                             for kind in ("subject", "class", "other")}}
    return {
        "judge": cells[0].scores["judge"], "suite": suite, "truth": cells[0].scores.get("truth"), "columns": columns,
        "hidden": _once(one for cell in cells for one in cell.scores.get("hidden", []) if one.get("key") not in better),
        "cells": [{"name": cell.name, "subject": cell.subject, "seed": cell.seed} for cell in cells],
        "rows": [_row(cells, name, title, list(better), seed) for name, title in rows.items()],
        "pairs": pairs(cells, list(better), seed),
        "ranks": {metric: found for metric in better if (found := ranks(cells, metric, better[metric], list(rows), seed))},
        "wins": [one for metric in better for one in wins(cells, metric, better[metric])],
    }


def table(cells: Sequence[Cell], taken: Callable[[Cell], dict[str, float]]) -> np.ndarray:
    """(S, P): subjects by whatever `taken` names in a cell, training seeds averaged; nan where there is none.

    With a single subject the rows are its training seeds. Seeds of a kind's only prompt are averaged in every subject: the
    noise of "a photo of a cat" has nothing in common with that of "a photo of a mug", whatever its number.
    """
    found = [taken(cell) for cell in cells]
    labels = list(dict.fromkeys(label for one in found for label in one))
    if not labels:
        return np.empty((0, 0))
    lines = np.array([[one.get(label, math.nan) for label in labels] for one in found], dtype=np.float64)
    subjects = list(dict.fromkeys(cell.subject for cell in cells))
    if len(subjects) == 1:
        return lines
    by_subject = np.stack([_mean(lines[[place for place, cell in enumerate(cells) if cell.subject == subject]]) for subject in subjects])
    return _mean(by_subject.T)[:, None] if all(label.startswith(statistics.SEED) for label in labels) else by_subject


def pairs(cells: Sequence[Cell], metrics: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Paired differences a - b over the study of every pair that any cell compares, Holm's correction within a metric."""
    found: list[dict[str, Any]] = []
    names = list(_rows(cells))
    for metric in metrics:
        asked = {tuple(sorted((pair["a"], pair["b"]), key=names.index)) for cell in cells for pair in cell.scores["pairs"]
                 if pair["metric"] == metric}
        tests = []
        for a, b in sorted(asked, key=lambda pair: [names.index(name) for name in pair]):
            values = table(cells, lambda cell, metric=metric, a=a, b=b: _gaps(cell, metric, a, b))
            if values.size:
                tests.append((a, b, crossed.estimate(values, seed)))
        adjusted = statistics.holm([test.p for _, _, test in tests])
        found += [{"metric": metric, "a": a, "b": b, "difference": _round(test.mean), "low": _round(test.low), "high": _round(test.high),
                   "p": _round(p), "n": test.n, "subjects": test.rows, "prompts": test.columns, "decided": p <= ALPHA}
                  for (a, b, test), p in zip(tests, adjusted, strict=True)]
    return found


def ranks(cells: Sequence[Cell], metric: str, better: str, rows: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Mean place of each method over the cells in which all of them have the metric; equal means share a place."""
    trained = set().union(*(cell.methods for cell in cells))
    methods = [row for row in rows if row in trained and any(cell.mean(row, metric) is not None for cell in cells)]
    complete = [cell for cell in cells if all(cell.mean(row, metric) is not None for row in methods)]
    if len(methods) < 2 or not complete:
        return {}
    places = {cell.name: shared_places([cell.mean(row, metric) for row in methods], better) for cell in complete}
    found = {}
    for number, row in enumerate(methods):
        one = crossed.estimate(table(complete, lambda cell, number=number: {"place": places[cell.name][number]}), seed)
        low, high = (None if bound is None else min(max(bound, 1.0), float(len(methods))) for bound in (one.low, one.high))
        found[row] = {"mean": _round(one.mean), "low": _round(low), "high": _round(high), "n": len(complete)}
    return found


def shared_places(values: Sequence[float], better: str) -> list[float]:
    """Places from 1 (best); equal values share the mean of their places: 1, 2.5, 2.5, 4."""
    ahead = (lambda one, other: one > other) if better == "higher" else (lambda one, other: one < other)
    return [1 + sum(ahead(other, one) for other in values) + (sum(other == one for other in values) - 1) / 2 for one in values]


def wins(cells: Sequence[Cell], metric: str, better: str) -> list[dict[str, Any]]:
    """For every pair of rows in how many cells a is better, worse, or not to be told apart by the cell's own interval."""
    counted: dict[tuple[str, str], list[int]] = {}
    names = list(_rows(cells))
    for cell in cells:
        for pair in (one for one in cell.scores["pairs"] if one["metric"] == metric):
            a, b = sorted((pair["a"], pair["b"]), key=names.index)
            low, high = (pair["low"], pair["high"]) if a == pair["a"] else (_minus(pair["high"]), _minus(pair["low"]))
            tally = counted.setdefault((a, b), [0, 0, 0])
            if low is None or high is None or low <= 0 <= high:
                tally[2] += 1
            else:
                tally[0 if (low > 0) == (better == "higher") else 1] += 1
    return [{"metric": metric, "a": a, "b": b, "wins": won, "losses": lost, "ties": tied, "n": won + lost + tied}
            for (a, b), (won, lost, tied) in counted.items()]


def _row(cells: Sequence[Cell], name: str, title: str, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """One row of the study's scores.json."""
    scores, costs = {}, {}
    for metric in metrics:
        values = table(cells, lambda cell, metric=metric: cell.clusters(name, metric) or _only(cell.mean(name, metric)))
        if len(cells) == 1 and cells[0].mean(name, metric) is not None:
            scores[metric] = cells[0].row(name)["scores"][metric]  # type: ignore[index]
        elif values.size:
            scores[metric] = _told(crossed.estimate(values, seed), BOUNDS.get(metric, NO_BOUNDS))
    for cost in COSTS:
        values = table(cells, lambda cell, cost=cost: _only(cell.costs.get(name, {}).get(cost)))
        if values.size:
            costs[cost] = _told(crossed.estimate(values, seed), (0.0, math.inf)) | {"n": sum(cost in cell.costs.get(name, {}) for cell in cells)}
    means = {cell.name: {metric: mean for metric in metrics if (mean := cell.mean(name, metric)) is not None} for cell in cells}
    flagged = _flagged(cells, name)
    share = table(cells, lambda cell: (cell.row(name) or {}).get("normalised") or {})
    labels = list(dict.fromkeys(label for cell in cells for label in (cell.row(name) or {}).get("normalised") or {}))
    normalised = {"normalised": {label: _round(mean) for label, mean in zip(labels, _mean(share), strict=True)}} if labels else {}
    return {**normalised, "row": name, "title": title, "scores": scores, "cells": {cell: value for cell, value in means.items() if value},
            "flags": [flag for flag, where in flagged.items() if 2 * len(where) > len(cells)], "flagged": flagged,
            "costs": costs, "images": []}


def _flagged(cells: Sequence[Cell], name: str) -> dict[str, list[str]]:
    """The cells in which a row was flagged, by flag."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for flag in (cell.row(name) or {}).get("flags") or []:
            found.setdefault(flag, []).append(cell.name)
    return found


def _rows(cells: Sequence[Cell]) -> dict[str, str]:
    """Name and title of every row of any cell: base, methods in the order of their first cell, the true subject, real pictures."""
    titles = {row["row"]: row["title"] for cell in reversed(cells) for row in cell.scores["rows"]}
    seen = dict.fromkeys(row["row"] for cell in cells for row in cell.scores["rows"])
    trained = set().union(*(cell.methods for cell in cells))
    order = {"base": 0, "real": 3}
    return {name: titles[name] for name in sorted(seen, key=lambda name: order.get(name, 1 if name in trained else 2))}


def _columns(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every column of any cell, as its first cell tells it."""
    return _once(column for cell in cells for column in cell.scores["columns"])


def _once(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first entry of each key."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        found.setdefault(str(entry.get("key")), entry)
    return list(found.values())


def _gaps(cell: Cell, metric: str, a: str, b: str) -> dict[str, float]:
    """a - b for every prompt that both have in this cell."""
    one, other = cell.clusters(a, metric), cell.clusters(b, metric)
    return {label: one[label] - other[label] for label in one if label in other}


def _mean(lines: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there, nan where nothing is."""
    there = ~np.isnan(lines)
    return np.where(there.any(axis=0), np.nansum(lines, axis=0) / np.maximum(there.sum(axis=0), 1), math.nan)


def _costs(manifest: Path) -> dict[str, float]:
    """What a run cost, by the keys of COSTS."""
    told = runs.read_json(manifest) if manifest.is_file() else {}
    found: dict[str, float] = {}
    for key, path in COSTS.items():
        value: Any = told
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found[key] = float(value)
    return found


def _only(value: float | None) -> dict[str, float]:
    return {} if value is None else {"": value}


def _told(one: crossed.Estimate, bounds: tuple[float, float]) -> dict[str, Any]:
    """A score or cost. Its interval ends where the score does: no mean lies beyond, so it covers as often as before."""
    low, high = (None if end is None else min(max(end, bounds[0]), bounds[1]) for end in (one.low, one.high))
    return {"mean": _round(one.mean), "low": _round(low), "high": _round(high), "n": one.n, "subjects": one.rows, "prompts": one.columns}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
