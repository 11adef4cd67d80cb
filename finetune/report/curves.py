"""What happened while training: loss on the fixed set, and quality of the intermediate checkpoints."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune.report import words
from finetune.report.palette import Look, looks
from finetune.report.plots import PAPER, STYLE, Plot, belongs, canvas, log_axis, svg
from finetune.report.read import Column, Comparison, Row


def losses(comparison: Comparison) -> list[Plot]:
    """Validation loss on the fixed pictures, noises and timesteps, against steps and against training time."""
    curves = {row.row: [(line["step"], line["validation_loss"]) for line in row.metrics if "validation_loss" in line]
              for row in comparison.runs}
    shown = [row for row in comparison.runs if curves[row.row]]
    if not shown:
        return []
    ends = words.listing(f"{row.title} ends at {curves[row.row][-1][1]:.4f}" for row in shown)
    lines = [(row, [step for step, _ in curves[row.row]], [loss for _, loss in curves[row.row]], []) for row in shown]
    label = "loss, fixed noises and timesteps"
    found = [_plot(comparison, "loss-steps", "Loss against steps", label, lines, "steps", ends, None)]
    paces = {row.row: row.cost("seconds_per_step") for row in shown}
    timed = [(row, [step * paces[row.row] for step in steps], values, kept) for row, steps, values, kept in lines if paces[row.row]]
    if timed:
        found.append(_plot(comparison, "loss-seconds", "Loss against training time", label, timed, "seconds", ends, None))
    return found


def quality(comparison: Comparison) -> list[Plot]:
    """Scores of intermediate checkpoints (RUN/curve.json) against steps, seconds and bytes; prompt fidelity against steps."""
    fidelity, prompt = comparison.column(comparison.likeness or ""), comparison.column("clip_t")
    asked = [(fidelity, "step", "steps"), (fidelity, "seconds", "seconds"), (fidelity, "bytes", "bytes"), (prompt, "step", "steps")]
    found = []
    for column, axis, name in asked:
        lines = [line for row in comparison.runs if column and (line := _points(row, column, axis))]
        if lines:
            text = words.listing(f"{row.title} goes from {words.score(y[0], column.decimals)} to {words.score(y[-1], column.decimals)}"
                                 for row, _, y, _ in lines)
            caption = f"{column.short} against " + {"steps": "steps", "seconds": "training time", "bytes": "artifact size"}[name]
            found.append(_plot(comparison, f"curve-{column.key}-{name}", caption, f"{column.short}, higher is better", lines, name, text, column))
    return found


def _points(row: Row, column: Column, axis: str) -> tuple[Row, list[float], list[float], list[int]] | None:
    """(row, x, y, places of the checkpoint that was kept); None when fewer than two checkpoints have both numbers."""
    points = [one for one in row.curve.get("points") or [] if isinstance(one.get(axis), int | float) and column.key in (one.get("scores") or {})]
    if len(points) < 2:
        return None
    values = [one["scores"][column.key] for one in points]
    values = [value["mean"] if isinstance(value, dict) else value for value in values]
    kept = [place for place, one in enumerate(points) if one.get("step") == row.curve.get("kept")]
    return row, [one[axis] for one in points], values, kept


def _plot(comparison: Comparison, key: str, caption: str, label: str, lines: list[tuple[Row, list[float], list[float], list[int]]], axis: str,
          text: str, column: Column | None) -> Plot:
    """Lines of some methods over one axis: "steps", "seconds" or "bytes"."""
    style = looks(comparison)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        axes = canvas(3.7, 0.135)
        for row, x, y, kept in lines:
            _line(axes, row.row, style[row.row], x, y, kept)
        if axis == "bytes":
            axes.margins(x=0.12)
            log_axis(axes, "artifact_bytes")
            axes.set_xlabel("artifact size, logarithmic; smaller is left")
        elif axis == "seconds":
            _time_axis(axes)
        else:
            axes.set_xlabel("steps")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_ylabel(label)
        if column:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.score(value, column.decimals)))
        return Plot(key, "", caption, svg(axes, key, caption, text))


def _line(axes: Axes, row: str, look: Look, x: list[float], y: list[float], kept: list[int]) -> None:
    """A line with its mark at the end, or at the checkpoint that was kept."""
    marked = kept or [len(x) - 1]
    belongs(row, axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=1.7, marker=look.marker, markersize=8, markeredgecolor=PAPER,
                           markevery=marked, solid_capstyle="round"))


def _time_axis(axes: Axes) -> None:
    """Seconds, or minutes and hours where the numbers get long."""
    top = axes.get_xlim()[1]
    unit, name = next(((size, name) for size, name in ((3600, "hours"), (60, "minutes")) if top > 5 * size), (1, "seconds"))
    axes.set(xlabel=f"training time, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
