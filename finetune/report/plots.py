"""The plots of the page as inline SVG with real text: loss curves, and fidelity against what it costs.

Drawn with matplotlib's object interface, so that no window system and no global state is touched.
"""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: E402

from finetune.report import words  # noqa: E402
from finetune.report.palette import BASE, REAL, Look, looks  # noqa: E402
from finetune.report.read import Column, Comparison, Row, Score  # noqa: E402

_TICKS = {"artifact_bytes": [10**power for power in range(13)],
          "training_seconds": [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 72000, 144000]}
INK, MUTED, RULE = "#2b2a28", "#6f6a62", "#dedad2"
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["Arial", "Liberation Sans", "DejaVu Sans"],
          "font.size": 10.5, "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
          "text.color": INK, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
          "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "xtick.major.size": 0, "ytick.major.size": 0,
          "xtick.minor.size": 0, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}


def loss_curves(comparison: Comparison) -> str:
    """Validation loss on the fixed pictures, noises and timesteps, against steps and against training time.

    Returns:
        An `<svg>`, or an empty string when no run recorded a validation loss.
    """
    curves = {row.row: [(line["step"], line["validation_loss"]) for line in row.metrics if "validation_loss" in line]
              for row in comparison.runs}
    shown = [row for row in comparison.runs if curves[row.row]]
    if not shown:
        return ""
    style = looks(comparison)
    timed = [row for row in shown if row.cost("seconds_per_step")]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "loss"}):
        figure = Figure(figsize=(11.0, 3.6) if timed else (6.6, 3.6), layout="constrained")
        axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        for row in shown:
            _curve(axes[0], style[row.row], [step for step, _ in curves[row.row]], [loss for _, loss in curves[row.row]])
        for row in timed:
            pace = row.cost("seconds_per_step")
            _curve(axes[1], style[row.row], [step * pace for step, _ in curves[row.row]], [loss for _, loss in curves[row.row]])
        axes[0].set(xlabel="step", ylabel="loss, fixed noises and timesteps")
        axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if timed:
            _time_axis(axes[1])
        ends = words.listing(f"{row.title} ends at {curves[row.row][-1][1]:.4f}" for row in shown)
        return _svg(figure, "loss", "Loss on the fixed evaluation set", ends)


def _curve(axes: Axes, look: Look, x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=1.7, marker=look.marker, markersize=4.5,
              markevery=[len(x) - 1], solid_capstyle="round")


def _time_axis(axes: Axes) -> None:
    """Seconds, or minutes and hours where the numbers get long."""
    top = axes.get_xlim()[1]
    unit, name = next(((size, name) for size, name in ((3600, "hours"), (60, "minutes")) if top > 5 * size), (1, "seconds"))
    axes.set(xlabel=f"training time, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))


def tradeoffs(comparison: Comparison) -> str:
    """Subject fidelity against artifact size, training time, prompt fidelity and drift: small multiples with intervals.

    Returns:
        An `<svg>`, or an empty string when no method has both numbers of any panel.
    """
    fidelity = comparison.column(comparison.fidelity or "")
    if fidelity is None:
        return ""
    panels = [column for key in ("artifact_bytes", "training_seconds", "clip_t", "drift")
              if (column := comparison.column(key)) and any(_point(row, column, fidelity) for row in comparison.methods)]
    if not panels:
        return ""
    lines = -(-len(panels) // 2)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "tradeoffs"}):
        figure = Figure(figsize=(11.0, 3.5 * lines + 0.4), layout="constrained")
        grid = figure.subplots(lines, 2, sharey=True, squeeze=False)
        flat = list(grid.flat)
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
        for axes, column in zip(flat, panels, strict=False):
            _panel(axes, comparison, column, fidelity)
        for axes in flat[len(panels):]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{fidelity.short}, higher is closer")
        text = words.listing(f"{row.title} {words.score(row.scores[fidelity.key].mean, fidelity.decimals)}"
                             for row in comparison.methods if fidelity.key in row.scores)
        return _svg(figure, "tradeoffs", f"{fidelity.short} against size, time, prompt fidelity and drift", text)


def _point(row: Row, column: Column, fidelity: Column) -> tuple[float, float] | None:
    x, y = row.value(column), row.value(fidelity)
    return None if x is None or y is None or (column.kind == "cost" and x <= 0) else (x, y)


def _panel(axes: Axes, comparison: Comparison, column: Column, fidelity: Column) -> None:
    """One scatter of a column against fidelity; base and real pictures are levels where they have no place on the x axis."""
    style = looks(comparison)
    for row in comparison.methods:
        place = _point(row, column, fidelity)
        if place:
            _mark(axes, style[row.row], place, row.scores[fidelity.key], row.scores.get(column.key))
    for row, look, note in ((comparison.row("base"), BASE, "untouched base"), (comparison.row("real"), REAL, "real pictures")):
        if row is None or fidelity.key not in row.scores:
            continue
        place = _point(row, column, fidelity) if column.kind == "score" else None
        level = row.scores[fidelity.key].mean
        axes.axhline(level, color=look.colour, linestyle=look.dash, linewidth=1.1, zorder=1)
        axes.annotate(note, (0, level), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9, color=MUTED)
        if place:
            axes.plot(*place, marker=look.marker, color=look.colour, markersize=8, linestyle="none", zorder=3)
    axes.margins(x=0.12, y=0.1)
    names = {"artifact_bytes": "artifact size", "training_seconds": "training time"}
    hint = "higher follows better" if column.better == "higher" else "lower leaves the base alone"
    if column.kind == "cost":
        _log_axis(axes, column.key)
        axes.set_xlabel(f"{names[column.key]}, logarithmic; smaller is left")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.score(value, column.decimals)))
        axes.set_xlabel(f"{column.short}, {hint}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.score(value, 1 if fidelity.decimals == 2 else 2)))


def _mark(axes: Axes, look: Look, place: tuple[float, float], vertical: Score, horizontal: Score | None) -> None:
    """A method's mark with its interval in each direction that has one."""
    def reach(score: Score | None) -> list[list[float]] | None:
        if score is None or score.low is None or score.high is None:
            return None
        return [[max(0.0, score.mean - score.low)], [max(0.0, score.high - score.mean)]]

    axes.errorbar(*place, yerr=reach(vertical), xerr=reach(horizontal), color=look.colour, elinewidth=1.1, capsize=0, zorder=2)
    axes.plot(*place, marker=look.marker, color=look.colour, markersize=8, markeredgecolor="white", markeredgewidth=0.9,
              linestyle="none", zorder=4)


def _log_axis(axes: Axes, key: str) -> None:
    """Logarithmic, with ticks at round numbers of bytes or at the times a clock has names for."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 10:  # nothing looks far apart that is not
        middle = (low * high) ** 0.5
        low, high = min(low, middle / 3.2), max(high, middle * 3.2)
        axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS[key] if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, -(-len(ticks) // 7))]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.size(value) if key == "artifact_bytes" else words.seconds(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an inline `<svg>`: no prologue, no metadata with addresses, no clashing ids, title and description for readers."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in referred else "", text)
    head = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
    opening, rest = text.split(">", 1)
    width, height = re.search(r'width="([\d.]+)pt"', opening), re.search(r'height="([\d.]+)pt"', opening)
    for found in (width, height):
        opening = opening.replace(found.group(0), "") if found else opening
    return f'{opening} class="plot" role="img" aria-labelledby="{name}-title {name}-text">{head}{rest}'
