"""Numbers, plots, pictures and text of docs/comparison.md from finished studies; see run.py. Nothing here trains.

results.json keeps what the text says, so that the page can be written again where the pictures are no longer there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: E402
from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from finetune.evaluation import study  # noqa: E402
from finetune.report import words  # noqa: E402

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
SIDE, LEFT, TOP = 96, 128, 36
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
        """In how many cells a beat b: "29 of 36"."""
        for one in self.studies[study]["wins"]:
            if one["metric"] == key and {one["a"], one["b"]} == {a, b}:
                return f"{one['wins'] if one['a'] == a else one['losses']} of {one['n']}"
        return words.NOTHING


def dots(results: Results, study: str, keys: list[str], target: Path) -> None:
    """One panel a score: each row's mean and interval, and a faint point for each cell."""
    rows = [row for row in results.studies[study]["rows"] if row["row"] not in ("real", "oracle")]
    keys = [key for key in keys if any(key in row["scores"] for row in rows)]
    figure = Figure(figsize=(2.7 * len(keys) + 1.8, 0.42 * len(rows) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for place, row in enumerate(rows):
            found = row["scores"].get(key)
            if not found:
                continue
            points = [cell[key] for cell in row.get("cells", {}).values() if cell.get(key) is not None]
            panel.plot(points, [place] * len(points), "o", color="#0072B2", alpha=0.18, markersize=3.5, markeredgewidth=0)
            if found["low"] is not None:
                panel.plot([found["low"], found["high"]], [place, place], color="#2b2a28", linewidth=1.6)
            panel.plot(found["mean"], place, "D", color="#2b2a28", markersize=5)
        panel.set_title(results.heading(study, key), fontsize=10)
        panel.grid(axis="x", color="#dedad2", linewidth=0.6)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(target, dpi=110)


def sheet(folder: Path, target: Path, rows: list[str], place: int = 0) -> None:
    """One line a subject: a training picture, then each row's picture of the same prompt and seed."""
    info = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    first = {cell["subject"]: cell for cell in reversed(info["cells"])}
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)
    titles = {row["row"]: row["title"] for row in info["rows"]} | {"base": "Untouched base"}
    canvas = Image.new("RGB", (LEFT + (len(rows) + 1) * (SIDE + 4), TOP + len(first) * (SIDE + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for across, title in enumerate(["a training picture", *(titles[row] for row in rows)]):
        pen.multiline_text((LEFT + across * (SIDE + 4) + 2, 4), title.replace(" (", "\n(").replace("Textual ", "Textual\n"), fill="black", font=font)
    for down, (subject, cell) in enumerate(sorted(first.items())):
        home = Path(cell["folder"]) if Path(cell["folder"]).is_absolute() else folder / cell["folder"]
        own = json.loads((home / "comparison.json").read_text(encoding="utf-8"))
        pen.text((6, TOP + down * (SIDE + 4) + SIDE // 2 - 6), subject.replace("-", " "), fill="black", font=font)
        files = [Path(own["instance_files"][0]), *(home / row / "images" / f"subject-{place:02d}-0.png" for row in rows)]
        for across, file in enumerate(files):
            picture = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            canvas.paste(picture, (LEFT + across * (SIDE + 4), TOP + down * (SIDE + 4)))
    canvas.save(target, optimize=True)


def write(work: Path, names: list[str]) -> None:
    """results.json, the plots, the sheet of pictures and docs/comparison.md."""
    kept = HERE / "results.json"
    studies = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in names:
        found = summary(work / name)
        if found:
            studies[name] = found
    kept.write_text(json.dumps(studies, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    results, images = Results(studies), DOCS / "images"
    if results.has("main"):
        dots(results, "main", ["oracle", "dino", "clip_t", "scene", "leak", "other_drift"], images / "comparison-main.png")
        if (work / "main" / "comparison.json").is_file():
            rows = ["base", *(row["row"] for row in studies["main"]["rows"] if row["row"] not in ("base", "real", "oracle"))]
            sheet(work / "main", images / "comparison-subjects.png", rows, place=1)
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("template.md").render(r=results, words=words)
    (DOCS / "comparison.md").write_text(page, encoding="utf-8")
