"""The table of the report in four shapes: cells for the page, CSV, Markdown and the terminal; and report.json."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from finetune import runs
from finetune.report import words
from finetune.report.headline import headline
from finetune.report.ranking import EXACT, SAME_COST, standing
from finetune.report.read import Column, Comparison, Row, dig, read
from finetune.report.verdict import verdict


@dataclass(frozen=True)
class Cell:
    """One number of the table as text. `value` is the full number, `bounds` its interval in words, `best` whether it is bold."""

    key: str
    text: str
    bounds: str = ""
    value: float | None = None
    best: bool = False


def cells(comparison: Comparison, row: Row) -> list[Cell]:
    """The cells of one row, in the order of the columns."""
    return [_cell(row, column, row.row == best(comparison, column)) for column in comparison.columns]


def best(comparison: Comparison, column: Column) -> str | None:
    """The row that deserves bold under a column, if any does.

    A score deserves it when the paired comparison against the next method is decided; a cost when it is more than a
    tenth (times, memory) or at all (sizes, counts) below the next. One method alone deserves nothing, and neither does
    one that copies its training pictures.
    """
    ranked = [row for row in comparison.ranked(column) if row in comparison.contenders]
    if len(ranked) < 2:
        return None
    first, second = ranked[0], ranked[1]
    if column.kind == "cost":
        margin = 1.0 if column.key in EXACT else SAME_COST
        return first.row if second.value(column) > first.value(column) * margin else None
    pair = comparison.pair(column.key, first.row, second.row)
    ahead = pair is not None and pair.decided and (pair.difference > 0) == (column.better == "higher")
    return first.row if ahead else None


def cost_text(key: str, value: float | None) -> str:
    """A cost in its unit."""
    if key in ("training_seconds", "seconds_per_step"):
        return words.seconds(value)
    return words.count(value) if key == "trainable_parameters" else words.size(value)


def _cell(row: Row, column: Column, bold: bool) -> Cell:
    value = row.value(column)
    found = row.interval(column)
    if column.kind == "cost":
        low, high = (found.low, found.high) if found else (None, None)
        bounds = "" if low is None or high is None or low == high else f"[{cost_text(column.key, low)}, {cost_text(column.key, high)}]"
        return Cell(column.key, cost_text(column.key, value), bounds, value, bold)
    if found is None:
        return Cell(column.key, words.NOTHING)
    return Cell(column.key, words.score(value, column.decimals), words.interval(found.low, found.high, column.decimals), value, bold)


def csv_text(comparison: Comparison) -> str:
    """One line per row, full precision: every score with _low, _high and _n, then the costs, then what failed."""
    header = ["row", "title", "method"]
    for column in comparison.columns:
        header += [column.key] if column.kind == "cost" else [column.key, f"{column.key}_low", f"{column.key}_high", f"{column.key}_n"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, "failed"])
    for row in comparison.rows:
        line: list[Any] = [row.row, row.title, row.method if row.kind == "method" else ""]
        for column in comparison.columns:
            if column.kind == "cost":
                line.append(row.cost(column.key))
            else:
                found = row.scores.get(column.key)
                line += [found.mean, found.low, found.high, found.n] if found else [None] * 4
        writer.writerow([*("" if value is None else _inert(value) for value in line), _inert(row.failed)])
    return out.getvalue()


def markdown_text(comparison: Comparison) -> str:
    """A Markdown table with intervals, best values in bold by the same rule as the page, and the verdict below it."""
    lines = ["| | " + " | ".join(f"{_plain(column.title)} {_arrow(column)}" for column in comparison.columns) + " |",
             "|---|" + "---:|" * len(comparison.columns)]
    for row in comparison.rows:
        if row.failed:
            lines.append(f"| {_plain(row.title)} | failed: {_plain(row.failed)} |" + " |" * (len(comparison.columns) - 1))
            continue
        shown = []
        for cell in cells(comparison, row):
            text = f"**{cell.text}**" if cell.best else cell.text
            shown.append(f"{text} {cell.bounds}".rstrip())
        lines.append(f"| {_plain(row.title)} | " + " | ".join(shown) + " |")
    judge = judge_name(comparison)
    lines += ["", f"Judge: {_plain(judge)}. In brackets: 95 % interval. Bold: decided against the next best method.", ""]
    lines += [f"- **{_plain(one.title)}:** {_plain(one.text)}" for one in verdict(comparison)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text as it stands: in Markdown these begin HTML, links, code and columns."""
    return re.sub(r"[<|`\\]|!?\[(?=[^\]]*\]\()", lambda sign: f"&#{ord(sign[0][-1])};", " ".join(str(text).split()))


def _inert(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _arrow(column: Column) -> str:
    return "\N{UPWARDS ARROW}" if column.better == "higher" else "\N{DOWNWARDS ARROW}"


def judge_name(comparison: Comparison) -> str:
    """The two networks that judged, in one phrase."""
    parts = [comparison.judge.get(key) for key in ("clip", "encoder")]
    return words.listing(dict.fromkeys(str(part) for part in parts if part)) or "not named"


def report_data(comparison: Comparison) -> dict[str, Any]:
    """Everything the page shows as numbers and sentences, for programs: the content of report.json."""
    rows = []
    for row in comparison.rows:
        costs = {column.key: row.cost(column.key) for column in comparison.columns if column.kind == "cost"}
        rows.append({"row": row.row, "title": row.title, "kind": row.kind, "method": row.method if row.kind == "method" else "",
                     "failed": row.failed, "flags": row.flags or [], "scores": {key: asdict(score) for key, score in row.scores.items()},
                     "costs": costs if row.kind == "method" else {},
                     "best": [column.key for column in comparison.columns if best(comparison, column) == row.row],
                     "settings": runs.hide_in(row.settings), "versions": row.manifest.get("versions", {}),
                     "artifact": dig(row.manifest, "artifact.files") or [],
                     "validation_loss": [[line["step"], line["validation_loss"]] for line in row.metrics if "validation_loss" in line]})
    return {"model": comparison.info.get("model"), "model_hash": comparison.info.get("model_hash"),
            "class_noun": comparison.info.get("class_noun"), "seed": comparison.info.get("seed"),
            "judge": comparison.judge, "suite": comparison.suite, "sampler": comparison.info.get("sampler", {}),
            "columns": [asdict(column) for column in comparison.columns], "rows": rows,
            "pairs": [asdict(pair) for pair in comparison.pairs], "headline": asdict(headline(comparison)), "hidden": comparison.hidden,
            "cells": [{"name": cell.name, "subject": cell.subject, "seed": cell.seed, "report": cell.link} for cell in comparison.cells],
            "ranks": {key: {row: asdict(score) for row, score in by_row.items()} for key, by_row in comparison.ranks.items()},
            "wins": comparison.wins, "verdict": [asdict(one) for one in verdict(comparison)]}


def terminal_table(folder: Path | str) -> Table:
    """The few columns that fit 80 characters, for the end of `finetune compare`."""
    comparison = read(folder)
    shown = [column for key in dict.fromkeys((comparison.likeness, "oracle", "clip_t", "drift")) if (column := comparison.column(key or ""))]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left", caption_style="dim",
                  caption="± half of the 95 % interval; bold: decided against the next best")
    longest = max(len(word) for row in comparison.rows for word in row.title.split())  # broken only where a word leaves the numbers no room
    table.add_column("", min_width=min(longest, 12), max_width=27 if len(shown) < 4 else 17, overflow="fold")
    for column in shown:
        table.add_column("Truth" if column.key == "oracle" else column.short, justify="right", no_wrap=True)
    for title in ("Train", "Size"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in comparison.rows:
        if row.failed:
            table.add_row(row.title, *["failed"] + [words.NOTHING] * (len(shown) + 1))
            continue
        line = []
        for column in shown:
            cell, found = _cell(row, column, best(comparison, column) == row.row), row.scores.get(column.key)
            half = f" ±{words.score((found.high - found.low) / 2, column.decimals)}" if found and cell.bounds else ""
            line.append(f"[bold]{cell.text}[/bold]{half}" if cell.best else cell.text + half)
        for key in ("training_seconds", "artifact_bytes"):
            line.append(cost_text(key, row.cost(key)) if row.kind == "method" else "")
        flagged = row.kind == "method" and comparison.copying(row) == "warning"
        table.add_row(f"{row.title} (copies)" if flagged else row.title, *line)
    return table


def tie_note(comparison: Comparison, column: Column) -> str:
    """What hovering over a column header adds: who cannot be told apart there."""
    place = standing(comparison, column) if column.kind == "score" else None
    if place is None or not place.ties:
        return ""
    return f" No measurable difference between {words.listing(row.title for row in place.group)}."
