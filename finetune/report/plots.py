"""What the plots of the page share, and the scatters of fidelity against its price: inline SVG with real text.

Drawn with matplotlib's object interface, so that no window system and no global state is touched. Colours become CSS
variables afterwards, so that a plot follows the page into the dark; what belongs to a method says so in `data-row`, so that
the page's filter finds it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import matplotlib

matplotlib.use("Agg")

from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: E402

from finetune.report import words  # noqa: E402
from finetune.report.palette import LOOKS, Look, looks  # noqa: E402
from finetune.report.read import Column, Comparison, Row, Score  # noqa: E402
from finetune.report.tables import cost_text  # noqa: E402

_TICKS = {"training_seconds": [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 72000, 144000]}
_BYTES = sorted(step * 10**power for power in range(13) for step in (1, 2, 5))
INK, MUTED, RULE, PAPER = "#2b2a28", "#6f6a62", "#dedad2", "#fdfcfa"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--line", PAPER: "--paper", **{look.colour.lower(): f"--{look.name}" for look in LOOKS}}
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["Arial", "Liberation Sans", "DejaVu Sans"],
         "font.size": 11.5, "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
         "text.color": INK, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "xtick.major.size": 0, "ytick.major.size": 0,
         "xtick.minor.size": 0, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
_PRICES = {"training_seconds": ("Time", "training time"), "artifact_bytes": ("Size", "artifact size"), "peak_memory_bytes": ("Memory", "peak memory")}


@dataclass(frozen=True)
class Plot:
    """One plot of the page: `key` names it, `button` switches to it, `caption` says what it shows."""

    key: str
    button: str
    caption: str
    svg: str
    readings: tuple[tuple[Row, str, str], ...] = ()


def prices(comparison: Comparison) -> list[Plot]:
    """Subject fidelity against training time, artifact size and peak memory: the main plot, one for each cost that is known."""
    return [found for key in _PRICES if (found := _scatter(comparison, comparison.column(key)))]


def tradeoffs(comparison: Comparison) -> list[Plot]:
    """Subject fidelity against prompt fidelity and against drift."""
    return [found for key in ("clip_t", "drift") if (found := _scatter(comparison, comparison.column(key)))]


def _scatter(comparison: Comparison, column: Column | None) -> Plot | None:
    """One scatter of a column against fidelity, or None when no method has both numbers."""
    fidelity = comparison.column(comparison.fidelity or "")
    if column is None or fidelity is None:
        return None
    shown = [row for row in comparison.ranked(column) if point(row, column, fidelity)]
    if not shown:
        return None
    button, name = _PRICES.get(column.key, (column.short, column.short))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": column.key}):
        axes = canvas(4.0)
        for row in shown:
            mark(axes, row.row, looks(comparison)[row.row], point(row, column, fidelity), row.scores[fidelity.key], row.interval(column))
        _levels(axes, comparison, column, fidelity)
        axes.margins(x=0.12, y=0.1)
        if column.kind == "cost":
            log_axis(axes, column.key)
            axes.set_xlabel(f"{name}, logarithmic; smaller is left")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.score(value, column.decimals)))
            axes.set_xlabel(f"{column.short}, " + ("higher follows better" if column.better == "higher" else "lower leaves the base alone"))
        axes.set_ylabel(f"{fidelity.short}, higher is closer")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.score(value, 1 if fidelity.decimals == 2 else 2)))
        readings = tuple((row, score_text(row, fidelity), cost_text(column.key, row.cost(column.key)) if column.kind == "cost"
                          else score_text(row, column)) for row in shown)
        text = words.listing(f"{row.title} {high} at {low}" for row, high, low in readings)
        title = f"{fidelity.short} against {name}"
        return Plot(column.key, button, title, svg(axes, column.key, title, text), readings)


def score_text(row: Row, column: Column) -> str:
    """`.71 [.66, .75]`."""
    score = row.scores[column.key]
    return f"{words.score(score.mean, column.decimals)} {words.interval(score.low, score.high, column.decimals)}".rstrip()


def point(row: Row, column: Column, fidelity: Column) -> tuple[float, float] | None:
    """Where a row stands in a scatter; None where it has no place, as with a cost of nothing on a logarithmic axis."""
    x, y = row.value(column), row.value(fidelity)
    return None if x is None or y is None or (column.kind == "cost" and x <= 0) else (x, y)


def _levels(axes: Axes, comparison: Comparison, column: Column, fidelity: Column) -> None:
    """What no method is: levels, and marks where they have a place on the x axis."""
    notes = {"base": "untouched base", "truth": "true subject", "real": "real pictures"}
    for place, row in enumerate(row for row in comparison.rows if row.kind in notes and fidelity.key in row.scores):
        look, note = looks(comparison)[row.row], notes[row.kind]
        level = row.scores[fidelity.key].mean
        name = axes.annotate(note, (0.34 * (place % 3), level), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10,
                             color=MUTED)
        belongs(row.row, [axes.axhline(level, color=look.colour, linestyle=look.dash, linewidth=1.1, zorder=1), name])
        spot = point(row, column, fidelity) if column.kind == "score" else None
        if spot:
            belongs(row.row, axes.plot(*spot, marker=look.marker, color=look.colour, markersize=8, linestyle="none", zorder=3))


def belongs(row: str, artists: Iterable[Artist]) -> None:
    """Say in the SVG which row these lines and marks are of."""
    for artist in artists:
        artist.set_gid(f"row:{row}")


def mark(axes: Axes, row: str, look: Look, place: tuple[float, float], vertical: Score | None, horizontal: Score | None) -> None:
    """A method's mark with its interval in each direction that has one."""
    def reach(score: Score | None) -> list[list[float]] | None:
        if score is None or score.low is None or score.high is None:
            return None
        return [[max(0.0, score.mean - score.low)], [max(0.0, score.high - score.mean)]]

    bars = axes.errorbar(*place, yerr=reach(vertical), xerr=reach(horizontal), color=look.colour, elinewidth=1.3, capsize=0, zorder=2)
    belongs(row, bars.get_children())
    belongs(row, axes.plot(*place, marker=look.marker, color=look.colour, markersize=10, markeredgecolor=PAPER, markeredgewidth=1.0,
                           linestyle="none", zorder=4))


def log_axis(axes: Axes, key: str) -> None:
    """Logarithmic, with ticks at round numbers of bytes or at the times a clock has names for."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 10:  # nothing looks far apart that is not
        middle = (low * high) ** 0.5
        low, high = min(low, middle / 3.2), max(high, middle * 3.2)
        axes.set_xlim(low, high)
    known = _TICKS.get(key, _BYTES)
    ticks = [tick for tick in known if low <= tick <= high]
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if key in _TICKS or str(tick)[0] == "1"]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, -(-len(ticks) // 6))]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost_text(key, value)))
    axes.xaxis.set_minor_locator(NullLocator())


def canvas(height: float, left: float = 0.11) -> Axes:
    """Axes on a figure six inches wide, with room at the left for labels (a share) and at the bottom for two lines of text.

    Fixed margins: matplotlib's own layout costs more than the whole drawing.
    """
    figure = Figure(figsize=(6.0, height))
    return figure.add_axes((left, 0.56 / height, 0.985 - left, 1 - 0.66 / height))


def svg(axes: Axes, name: str, title: str, description: str) -> str:
    """The axes' figure as an inline `<svg>`.

    No prologue, no metadata with addresses, no clashing ids; title and description for readers; colours as CSS variables.
    """
    out = io.StringIO()
    axes.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # its one rule is in report.css
    text = re.sub(r' id="row:([^"]+)"', r' data-row="\1"', text)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in referred else "", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: f"var({_VARIABLES[match[0]]})" if match[0] in _VARIABLES else match[0], text)
    head = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
    opening, rest = text.split(">", 1)
    width, height = re.search(r'width="([\d.]+)pt"', opening), re.search(r'height="([\d.]+)pt"', opening)
    for found in (width, height):
        opening = opening.replace(found.group(0), "") if found else opening
    return f'{opening} class="plot" role="img" aria-labelledby="{name}-title {name}-text">{head}{rest}'
