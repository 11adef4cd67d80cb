"""Numbers and text of docs/comparison.md from finished studies; see run.py. Nothing here trains.

results.json keeps what the text says, so that the page can be written again where the pictures are no longer there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from drawings import amounts, dots, sheets
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.evaluation import statistics, study
from finetune.report import words

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
# Rows of a study's own, whose plain title is METHOD (ROW).
TITLES = {"dreambooth-no-prior": "DreamBooth without prior", "lora-prior": "LoRA with prior", "cross": "LoRA on cross-attention", "all": "LoRA on all attention",
          **{f"rank-{rank}": f"LoRA of rank {rank}" for rank in (1, 4, 16, 64)},
          **{f"vectors-{count}": f"{count} vector{'s' * (count > 1)}" for count in (1, 2, 4, 8)},
          **{f"{short}-{scope}": f"{named} on {place}" for short, named in (("kv", "key and value"), ("kq", "key and query"), ("qkv", "all three"))
             for scope, place in (("cross", "cross-attention"), ("all", "all attention"))}}
COSTS = {"training_seconds": words.seconds, "training_cpu_seconds": words.seconds, "seconds_per_step": words.seconds, "peak_memory_bytes": words.size,
         "trainable_parameters": words.count, "artifact_bytes": words.size}


def summary(folder: Path) -> dict[str, Any] | None:
    """What the page needs of one study; None where it was not run."""
    if not any(folder.glob("cells/*/scores.json")):
        return None
    scores = study.aggregate(folder)  # of all cells that are scored, be it while others are still trained
    info = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    keep = ("row", "title", "scores", "costs", "cells", "flags")
    return {"columns": scores["columns"], "rows": [{key: row[key] for key in keep if key in row} for row in scores["rows"]],
            "pairs": scores["pairs"], "ranks": scores.get("ranks", {}), "wins": scores.get("wins", []),
            "cells": [{key: cell[key] for key in ("name", "subject", "seed")} for cell in info["cells"] if cell["name"] in {one["name"] for one in scores["cells"]}],
            "judge": scores["judge"], "model_hash": info["model_hash"], "workers": info.get("workers", 1)}


class Results:
    """The studies as the template asks for them."""

    def __init__(self, studies: dict[str, dict[str, Any]]):
        self.studies = studies
        for row in (row for told in studies.values() for row in told["rows"]):
            row["title"] = TITLES.get(row["row"], row["title"])

    def has(self, study: str) -> bool:
        """Whether a study was run."""
        return study in self.studies

    def row(self, study: str, name: str) -> dict[str, Any]:
        """A row of a study by its name."""
        return next(row for row in self.studies[study]["rows"] if row["row"] == name)

    def title(self, study: str, name: str) -> str:
        """A row's title."""
        return self.row(study, name)["title"]

    def mean(self, study: str, name: str, key: str) -> float:
        """A score or cost as a number."""
        row = self.row(study, name)
        found = row["scores"].get(key) or row.get("costs", {}).get(key)
        return found["mean"]

    def text(self, study: str, name: str, key: str, bounds: bool = True) -> str:
        """A score with its interval, or a cost in its unit."""
        row = self.row(study, name)
        if key in COSTS:
            found = row.get("costs", {}).get(key)
            return COSTS[key](found["mean"]) if found else words.NOTHING
        found = row["scores"].get(key)
        if not found:
            return words.NOTHING
        return f"{words.score(found['mean'])} {words.interval(found['low'], found['high']) if bounds else ''}".strip()

    def table(self, study: str, keys: list[str], rows: list[str] | None = None) -> str:
        """A Markdown table of rows by keys; keys nobody has are left out, and the intervals of two subjects."""
        bounds = self.subjects(study) > 2
        found = [row for row in self.studies[study]["rows"] if rows is None or row["row"] in rows]
        keys = [key for key in keys if any(key in row["scores"] or key in row.get("costs", {}) for row in found)]
        found = [row for row in found if any(key in row["scores"] or key in row.get("costs", {}) for key in keys)]
        lines = ["| | " + " | ".join(self.heading(study, key) for key in keys) + " |", "|---|" + "---:|" * len(keys)]
        lines += [f"| {row['title']} | " + " | ".join(self.text(study, row["row"], key, bounds) for key in keys) + " |" for row in found]
        return "\n".join(lines)

    def heading(self, study: str, key: str) -> str:
        """A column's title with its direction."""
        names = {"training_seconds": "training", "training_cpu_seconds": "training (CPU)", "seconds_per_step": "a step", "peak_memory_bytes": "peak memory",
                 "trainable_parameters": "trained numbers", "artifact_bytes": "artifact"}
        column = next((column for column in self.studies[study]["columns"] if column["key"] == key), None)
        if column is None:
            return names[key]
        return f"{column['title'].partition(' (')[0]} {'↑' if column['better'] == 'higher' else '↓'}"

    def pair(self, study: str, key: str, a: str, b: str) -> dict[str, Any]:
        """The paired difference a - b of two rows."""
        for one in self.studies[study]["pairs"]:
            if one["metric"] == key and {one["a"], one["b"]} == {a, b}:
                turn = 1 if one["a"] == a else -1
                low, high = (one["low"], one["high"]) if turn == 1 else (-one["high"], -one["low"])
                return {**one, "a": a, "b": b, "difference": turn * one["difference"], "low": low, "high": high}
        raise KeyError((study, key, a, b))

    def gap(self, study: str, key: str, a: str, b: str) -> str:
        """"+.08 [.03, .13], decided" or "... no measurable difference"."""
        one = self.pair(study, key, a, b)
        sign = "+" if one["difference"] > 0 else ""
        alone = one["low"] > 0 or one["high"] < 0  # of all pairs of the column together it may still be chance
        verdict = "decided" if one["decided"] else "undecided after correction" if alone else "no measurable difference"
        return f"{sign}{words.score(one['difference'])} {words.interval(one['low'], one['high'])}, {verdict}"

    def across(self, key: str, a: tuple[str, str], b: tuple[str, str]) -> str:
        """".65 against .56, +.09 [.02, .16]" of a row in one study and a row in another, paired over the cells both have; not corrected."""
        first, second = (self.row(*one)["cells"] for one in (a, b))
        cells = sorted(cell for cell in first if key in first[cell] and key in second.get(cell, {}))
        means = [np.array([cells_of[cell][key] for cell in cells]) for cells_of in (first, second)]
        one = statistics.paired_difference(*means)
        sign = "+" if one.difference > 0 else ""
        verdict = "" if one.p <= study.ALPHA else ", no measurable difference"
        return f"{words.score(means[0].mean())} against {words.score(means[1].mean())}, {sign}{words.score(one.difference)} {words.interval(one.low, one.high)}{verdict}"

    def decisions(self, study: str, keys: list[str]) -> str:
        """One line a score: which pairs of its rows are decided, the larger difference first; how many are not."""
        lines = []
        for key in keys:
            pairs = [one for one in self.studies[study]["pairs"] if one["metric"] == key and "base" not in (one["a"], one["b"])]
            told = sorted((one for one in pairs if one["decided"]), key=lambda one: -abs(one["difference"]))
            if not pairs:
                continue
            rest = len(pairs) - len(told)
            said = self.ahead(study, key, told)
            if rest and told:
                said.append(f"the other {words.number_word(rest)} pairs are undecided" if rest > 1 else "the other pair is undecided")
            elif rest:
                said.append("undecided" if rest == 1 else f"none of the {words.number_word(rest)} pairs is decided")
            lines.append(f"- {self.heading(study, key)}: {'; '.join(said)}")
        return "\n".join(lines)

    def ahead(self, study: str, key: str, pairs: list[dict[str, Any]]) -> list[str]:
        """"A ahead of B by .08 [.03, .13] and C by .05 [.01, .09]" of decided pairs, one for each that is ahead."""
        higher = next(column["better"] for column in self.studies[study]["columns"] if column["key"] == key) == "higher"
        behind: dict[str, list[str]] = {}
        for one in pairs:
            large, small = (one["a"], one["b"]) if one["difference"] > 0 else (one["b"], one["a"])
            found = self.pair(study, key, large, small)
            front, back = (large, small) if higher else (small, large)
            behind.setdefault(front, []).append(f"{self.title(study, back)} by {words.score(found['difference'])} {words.interval(found['low'], found['high'])}")
        return [f"{self.title(study, front)} ahead of {words.listing(backs)}" for front, backs in behind.items()]

    def best(self, study: str, key: str) -> list[str]:
        """Rows in order of a score, best first; the base and the references are left out."""
        better = next(column["better"] for column in self.studies[study]["columns"] if column["key"] == key)
        rows = [row for row in self.studies[study]["rows"] if row["row"] not in ("base", "real", "oracle") and key in row["scores"]]
        return [row["row"] for row in sorted(rows, key=lambda row: row["scores"][key]["mean"], reverse=better == "higher")]

    def measured(self, study: str, key: str, a: str, b: str) -> bool:
        """Whether two rows were compared on a score."""
        return any(one["metric"] == key and {one["a"], one["b"]} == {a, b} for one in self.studies[study]["pairs"])

    def subjects(self, study: str) -> int:
        """How many subjects a study has."""
        return len({cell["subject"] for cell in self.studies[study]["cells"]})

    def number(self, study: str) -> str:
        """The same as a word."""
        return words.number_word(self.subjects(study))

    def seeds(self, study: str) -> int:
        """How many training seeds each subject has at least."""
        cells = self.studies[study]["cells"]
        return min(sum(one["subject"] == cell["subject"] for one in cells) for cell in cells)

    def times(self, study: str, key: str, a: str, b: str) -> str:
        """How many times the cost of b that of a is."""
        return f"{self.mean(study, a, key) / self.mean(study, b, key):.2g}"

    def place(self, study: str, key: str, name: str) -> int:
        """A row's place by the mean of a score, 1 is best."""
        return self.best(study, key).index(name) + 1

    def best_cost(self, study: str, key: str) -> str:
        """The row of the smallest mean cost."""
        rows = [row for row in self.studies[study]["rows"] if key in row.get("costs", {})]
        return min(rows, key=lambda row: row["costs"][key]["mean"])["row"]

    def ranks(self, study: str, keys: list[str]) -> str:
        """Mean ranks with intervals as a Markdown table."""
        ranks = self.studies[study]["ranks"]
        keys = [key for key in keys if key in ranks]
        rows = [row for row in self.studies[study]["rows"] if any(row["row"] in ranks[key] for key in keys)]
        lines = ["| | " + " | ".join(self.heading(study, key).rpartition(" ")[0] for key in keys) + " |", "|---|" + "---:|" * len(keys)]
        for row in rows:
            found = [ranks[key].get(row["row"]) for key in keys]
            lines.append(f"| {row['title']} | " + " | ".join(
                f"{one['mean']:.1f} [{one['low']:.1f}, {one['high']:.1f}]" if one and one["low"] is not None else f"{one['mean']:.1f}" if one
                else words.NOTHING for one in found) + " |")
        return "\n".join(lines)

    def win(self, study: str, key: str, a: str, b: str) -> str:
        """In how many cells a is measurably better than b, b than a, and neither."""
        for one in self.studies[study]["wins"]:
            if one["metric"] == key and {one["a"], one["b"]} == {a, b}:
                won, lost = (one["wins"], one["losses"]) if one["a"] == a else (one["losses"], one["wins"])
                return (f"{self.title(study, a)} is measurably better in {won}, {self.title(study, b)} in {lost}, "
                        f"and {one['ties']} of {one['n']} cannot be told apart")
        return words.NOTHING


def write(work: Path, names: list[str]) -> None:
    """results.json, the plots, the sheet of pictures and docs/comparison.md."""
    kept = HERE / "results.json"
    studies = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in names:
        found = summary(work / name)
        if found:
            studies[name] = found
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(studies[name], sort_keys=True)}" for name in sorted(studies))  # one a study
    kept.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    results, images = Results(json.loads(kept.read_text(encoding="utf-8"))), DOCS / "images"  # as who has only the summary would write it
    if results.has("main"):
        dots(results, "main", ["oracle", "dino", "clip_t", "scene", "leak", "other_drift"], images / "comparison-main.png")
    amounts(results, images / "comparison-amounts.png")
    sheets(work, [name for name in studies if (work / name / "comparison.json").is_file()], images)
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("template.md").render(r=results, words=words)
    (DOCS / "comparison.md").write_text(page, encoding="utf-8")
