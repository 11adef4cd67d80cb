"""What a comparison folder says, read from its files alone and forgiving about what is missing.

    OUT/comparison.json, OUT/scores.json        what was compared, and how it scored
    OUT/ROW/manifest.json, settings.json, metrics.jsonl, curve.json, artifact/    one run

A comparison of several subjects or training seeds (a study) names its cells, ordinary comparison folders: cells.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune import runs
from finetune.errors import Problem
from finetune.report.cells import StudyCell, study_cells


@dataclass(frozen=True)
class Score:
    """Mean with its 95 % interval; the bounds are None where no interval could be formed."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Column:
    """One column of the table.

    `better` is "higher" or "lower"; `kind` is "score" or "cost"; `group` is the heading above it. `error`: how often the
    metric told known pairs wrongly, as {"rate": share, "pairs": how many, "against": what from}.
    """

    key: str
    title: str
    better: str
    help: str
    kind: str = "score"
    decimals: int = 2
    group: str = ""
    error: dict[str, Any] | None = None

    @property
    def short(self) -> str:
        """The title without the encoder's name: "CLIP-I" of "CLIP-I (ViT-B/32)"."""
        return self.title.partition(" (")[0]

    @property
    def encoder(self) -> str:
        """The encoder's name in the title, where it has one."""
        return self.title.partition(" (")[2].removesuffix(")")


@dataclass(frozen=True)
class Pair:
    """A paired comparison on the same prompts and seeds: difference = mean(a) - mean(b)."""

    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    decided: bool

    def turned(self) -> Pair:
        """The same comparison read from b to a."""
        return Pair(self.metric, self.b, self.a, -self.difference, -self.high, -self.low, self.decided)

    def negated(self) -> Pair:
        """The gap in which positive means that a is better, where lower numbers are."""
        return Pair(self.metric, self.a, self.b, -self.difference, -self.high, -self.low, self.decided)


# Columns that come from the manifest: (key, title, path in the manifest, help). Smaller is better for all.
_COSTS = (
    ("training_seconds", "Training", "seconds.training", "Wall-clock seconds of the training loop, class pictures not included."),
    ("seconds_per_step", "Per step", "seconds.per_step", "Seconds per optimizer step."),
    ("peak_memory_bytes", "Peak memory", "peak_memory_bytes", "Largest memory in use while training."),
    ("trainable_parameters", "Trained", "trainable_parameters", "Numbers the optimizer may change."),
    ("artifact_bytes", "Artifact", "artifact.bytes", "Bytes of everything that was exported."),
)
COSTS = tuple(Column(key, title, "lower", help, "cost", group="Cost") for key, title, _, help in _COSTS)
_GROUPS = {"clip_i": "Subject", "dino": "Subject", "clip_t": "Prompt", "drift": "Base kept", "other_drift": "Base kept",
           "leak": "Base kept", "diversity": "Pictures", "copy": "Pictures"}  # of files written before columns had groups
_COST_PATHS = {key: path for key, _, path, _ in _COSTS}


@dataclass
class Row:
    """One row of the table. `kind`: "base" (untouched), "method" (a run), "truth" (the true subject, drawn), "real" (pictures).

    `flags`: what evaluation found ("copying"), None where it did not look. Of a study only: `costs` over the cells by cost
    column, `cells`, the mean of each metric in each cell, and `flagged`, the cells in which a flag was set.
    `way`: by metric the share of the way from the untouched base to the true subject. `curve`: scores of the checkpoints.
    """

    row: str
    title: str
    kind: str
    method: str = ""
    subject: str = ""
    folder: Path = Path()
    scores: dict[str, Score] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""
    flags: list[str] | None = None
    costs: dict[str, Score] = field(default_factory=dict)
    cells: dict[str, dict[str, float]] = field(default_factory=dict)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    way: dict[str, float] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)

    def cost(self, key: str) -> float | None:
        """A cost by its column key, over the cells or from the manifest; None where it was not measured."""
        return self.costs[key].mean if key in self.costs else _number(dig(self.manifest, _COST_PATHS[key]))

    def interval(self, column: Column) -> Score | None:
        """The mean under `column` with its interval, where it has one: a cost has one in a study only."""
        return (self.costs if column.kind == "cost" else self.scores).get(column.key)

    def value(self, column: Column) -> float | None:
        """What stands in the table under `column`."""
        if column.kind == "cost":
            return self.cost(column.key)
        found = self.scores.get(column.key)
        return found.mean if found else None


@dataclass
class Comparison:
    """Everything the tables, the plots, the verdict and the page are made of."""

    folder: Path
    info: dict[str, Any]
    judge: dict[str, Any]
    suite: dict[str, Any]
    columns: list[Column]
    rows: list[Row]
    pairs: list[Pair]
    hidden: list[dict[str, str]] = field(default_factory=list)
    cells: list[StudyCell] = field(default_factory=list)
    ranks: dict[str, dict[str, Score]] = field(default_factory=dict)
    wins: list[dict[str, Any]] = field(default_factory=list)

    def row(self, name: str) -> Row | None:
        """A row by its name."""
        return next((row for row in self.rows if row.row == name), None)

    def column(self, key: str) -> Column | None:
        """A column by its key."""
        return next((column for column in self.columns if column.key == key), None)

    @property
    def runs(self) -> list[Row]:
        """The methods' rows, failed ones included."""
        return [row for row in self.rows if row.kind == "method"]

    @property
    def methods(self) -> list[Row]:
        """The methods' rows that count: finished and not failed."""
        return [row for row in self.runs if not row.failed]

    @property
    def contenders(self) -> list[Row]:
        """The methods that may win: those that are not known to copy their training pictures."""
        return [row for row in self.methods if self.copying(row) != "warning"]

    def copying(self, row: Row) -> Literal["", "hint", "warning"]:
        """Rule 5 of verdict.py for one method: evaluation's word where it looked, else its pictures against the ceiling."""
        if row.flags is not None:
            return "warning" if "copying" in row.flags else ""
        ceiling, own = self.ceiling, row.scores.get("copy")
        if ceiling is None or own is None or own.mean <= ceiling:
            return ""
        return "warning" if own.low is not None and own.low > ceiling else "hint"

    @property
    def fidelity(self) -> str | None:
        """Key of the metric that stands for subject fidelity: likeness to the truth where the truth was known, else `likeness`."""
        truth = any(pair.metric == "oracle" for pair in self.pairs) and any("oracle" in row.scores for row in self.methods)
        return "oracle" if truth and self.column("oracle") else self.likeness

    @property
    def likeness(self) -> str | None:
        """Key of the metric that compares with the training pictures: the image encoder's, else CLIP's."""
        known = [key for key in ("dino", "clip_i") if any(key in row.scores for row in self.rows)]
        return next((key for key in known if self.column(key)), known[0] if known and not self.columns else None)

    @property
    def ceiling(self) -> float | None:
        """How close pictures that are no copies come to their nearest training picture: the true subject's, else the real ones."""
        honest = next((row for kind in ("truth", "real") for row in self.rows if row.kind == kind and "copy" in row.scores), None)
        return honest.scores["copy"].mean if honest else None

    @property
    def honest(self) -> str:
        """Whose pictures `ceiling` is of, in words."""
        drawn = any(row.kind == "truth" and "copy" in row.scores for row in self.rows)
        return "the true subject's own pictures have" if drawn else "the real pictures have among each other"

    def seeds_of(self, kind: str) -> int:
        """Pictures of each prompt of a kind."""
        counts = self.suite.get("seeds_per_prompt") or {}
        return counts.get(kind) or len(self.suite.get("seeds") or [])

    def pair(self, metric: str, a: str, b: str) -> Pair | None:
        """The paired comparison of rows a and b, read as a minus b."""
        for pair in self.pairs:
            if pair.metric == metric and {pair.a, pair.b} == {a, b}:
                return pair if pair.a == a else pair.turned()
        return None

    def ranked(self, column: Column) -> list[Row]:
        """The methods that have a value under `column`, best first."""
        found = [row for row in self.methods if row.value(column) is not None]
        return sorted(found, key=lambda row: row.value(column), reverse=column.better == "higher")


def read(folder: Path | str) -> Comparison:
    """Read a comparison folder.

    Raises:
        Problem: there is no comparison.json in it.
    """
    folder = Path(folder)
    if not (folder / "comparison.json").is_file():
        raise Problem(f"There is no comparison in {str(folder)!r}.", "It has no comparison.json.",
                      "Name the --output folder of a `finetune compare`.")
    info = runs.read_json(folder / "comparison.json")
    scores = _json(folder / "scores.json")
    rows = _rows(folder, info, scores)
    ranks = {metric: {row: found for row, entry in by_row.items() if (found := _score(entry))}
             for metric, by_row in (scores.get("ranks") or {}).items()}
    return Comparison(folder, info, {**info.get("judge", {}), **scores.get("judge", {})}, scores.get("suite") or {},
                      _columns(scores, rows), rows, _pairs(scores), _hidden(scores), study_cells(folder, info), ranks,
                      scores.get("wins") or [])


def inside(folder: Path, name: Any) -> Path:
    """What a file of the comparison calls by `name`, which must lie in its folder: somebody else may have written that file.

    Raises:
        Problem: the name leads out of it.
    """
    place = Path(os.path.normpath(folder / str(name)))
    if not place.is_relative_to(os.path.normpath(folder)):
        raise Problem(f"{str(folder)!r} names {str(name)!r}, which lies outside it.", "A report shows what is in its folder alone.",
                      "Do not trust this folder; or mend the name in its comparison.json.")
    return place


def dig(tree: Any, path: str) -> Any:
    """`dig({"a": {"b": 1}}, "a.b")` is 1; None where the path ends early."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _rows(folder: Path, info: dict, scores: dict) -> list[Row]:
    """Base first, then the methods in the order of the comparison, the true subject and the real pictures last."""
    scored = {entry["row"]: entry for entry in scores.get("rows", [])}
    planned = {entry["row"]: entry for entry in [*info.get("rows", []), *info.get("failed", [])]}
    names = [name for name in [*planned, *scored] if name not in ("base", "real") and (name != "oracle" or name in planned)]
    found = []
    for name in ["base", *dict.fromkeys(names), *(["oracle"] if "oracle" not in names else []), "real"]:
        plan, entry = planned.get(name, {}), scored.get(name, {})
        if not plan and not entry:
            continue
        kind = name if name in ("base", "real") else "truth" if name == "oracle" and not plan else "method"
        title = plan.get("title") or entry.get("title") or name
        row = Row(name, title, kind, plan.get("method", name), plan.get("subject", ""), inside(folder, plan.get("run", name)))
        row.scores, row.images = _scores(entry.get("scores")), entry.get("images") or []
        row.flags, row.costs, row.cells = entry.get("flags"), _scores(entry.get("costs")), entry.get("cells") or {}
        row.way = entry.get("normalised") or {}
        row.flagged = entry.get("flagged") or {}
        if kind == "method":
            _add_run(row, plan.get("error", ""))
        found.append(row)
    return found


def _add_run(row: Row, error: str) -> None:
    """Manifest, settings and metrics of a run; what went wrong, when something did. `error` is what the comparison noted."""
    row.manifest = _json(row.folder / "manifest.json")
    row.settings = _json(row.folder / "settings.json")
    row.metrics = runs.read_metrics(row.folder)
    row.curve = _json(row.folder / "curve.json")
    if row.title == row.row:
        row.title = row.manifest.get("title", row.row)
    status = str(row.manifest.get("status", ""))
    reason = next((str(row.manifest[key]) for key in ("reason", "error", "problem") if row.manifest.get(key)), "")
    if error:
        row.failed = error
    elif not row.manifest:
        row.failed = "" if row.scores else "not run: its folder has no manifest"
    elif status.startswith("failed"):
        row.failed = runs.hide(reason) or status.removeprefix("failed").lstrip(" :") or "failed without a reason"
    elif status not in ("finished", ""):
        row.failed = f"not finished: its manifest says {status!r}" + (f", {reason}" if reason else "")


def _scores(entries: dict | None) -> dict[str, Score]:
    return {key: found for key, entry in (entries or {}).items() if (found := _score(entry))}


def _score(entry: Any) -> Score | None:
    """A mean with bounds, or a bare number."""
    bounds = entry if isinstance(entry, dict) else {"mean": entry}
    mean = _number(bounds.get("mean"))
    return None if mean is None else Score(mean, _number(bounds.get("low")), _number(bounds.get("high")), bounds.get("n"))


def _columns(scores: dict, rows: list[Row]) -> list[Column]:
    """The score columns that any row has a number for, then the costs that any run has."""
    found = []
    for entry in scores.get("columns", []):
        present = [row.scores[entry["key"]] for row in rows if entry["key"] in row.scores]
        if present and not entry.get("hidden"):
            # Two digits hide what a narrow interval shows: three when half of them are narrower than .03.
            widths = sorted(one.high - one.low for one in present if one.low is not None and one.high is not None)
            decimals = 3 if widths and widths[len(widths) // 2] < 0.03 else 2
            found.append(Column(entry["key"], entry.get("title", entry["key"]), entry.get("better", "higher"),
                                entry.get("help", ""), "score", decimals, entry.get("group") or _GROUPS.get(entry["key"], ""), entry.get("error")))
    return found + [column for column in COSTS if any(row.cost(column.key) is not None for row in rows)]


def _hidden(scores: dict) -> list[dict[str, str]]:
    """Metrics that were measured and are not shown, each with the reason."""
    entries = [*scores.get("hidden", []), *(entry for entry in scores.get("columns", []) if entry.get("hidden"))]
    found = []
    for entry in entries:
        reason = entry.get("reason") or (entry.get("hidden") if isinstance(entry.get("hidden"), str) else "")
        error = entry.get("error") or {}
        if not reason and error.get("rate") is not None:
            reason = f"it told {100 * error['rate']:.1f} % of {error.get('pairs', 0):,} known pairs wrongly"
        found.append({"key": entry.get("key", ""), "title": entry.get("title") or entry.get("key", ""),
                      "reason": (reason or "it could not tell known pairs apart").rstrip(".")})
    return found


def _pairs(scores: dict) -> list[Pair]:
    keys = ("difference", "low", "high")
    return [Pair(entry["metric"], entry["a"], entry["b"], *(float(entry[key]) for key in keys), bool(entry.get("decided")))
            for entry in scores.get("pairs", []) if all(_number(entry.get(key)) is not None for key in keys)]


def _json(path: Path) -> dict[str, Any]:
    return runs.read_json(path) if path.is_file() else {}


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
