"""Means over two crossed samples at once, subjects and prompts: interval, standard error and p-value. Torch-free.

A study asks P prompts of S subjects. Other subjects would have given another number, and so would other prompts, so both
are resampled, apart from one another (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 2007). Its resampled
means alone spread too far, because in them the part that is neither the subject's nor the prompt's is counted three
times. So each resampled mean is divided by its own standard error (bootstrap-t; Hall, JRSS B 1988), which is counted
three times too, and the quantile of that ratio stretches the standard error of the data. That one has three parts, as in
Cameron, Gelbach & Miller, Journal of Business & Economic Statistics 2011: between subjects, plus between prompts, less
what both contain.

Training seeds are nested in subjects and averaged there before: the spread between subjects contains theirs
(Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). With one subject, its training seeds
take the place of subjects, and the interval then speaks of other seeds only.

Shapes: S rows (subjects), P columns (prompts), B resamples. Values are float64; nan where a subject was not asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from finetune.evaluation import statistics
from finetune.evaluation.statistics import ENOUGH, LEVEL, RESAMPLES, Array

CHUNK = 20_000_000  # numbers held at once


@dataclass(frozen=True)
class Estimate:
    """A mean over subjects and prompts.

    Attributes:
        low, high: the interval; None when neither subjects nor prompts vary.
        p: of "the mean is zero".
        n: what was sampled: subjects where there are several, else prompts. `rows`, `columns`: both counts.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    n: int
    rows: int
    columns: int


def estimate(values: Array, seed: int = 0, *, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """Mean of S rows x P columns with its interval over both. Every row weighs the same, however many columns it has.

    Args:
        values: (S, P), nan where there is none. Rows and columns without any value are left out.

    Raises:
        ValueError: there is no value at all.
    """
    values = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(values)
    values = values[there.any(axis=1)][:, there.any(axis=0)]
    if not values.size:
        raise ValueError("there is no value")
    rows, columns = values.shape
    mean = float(np.nanmean(values, axis=1).mean())
    if min(rows, columns) == 1:
        line = np.nanmean(values, axis=1) if columns == 1 else values[0]
        one = statistics.paired_difference(line, np.zeros(len(line)), seed, resamples=resamples, level=level)
        return Estimate(mean, one.low, one.high, one.p, one.n, rows, columns)
    ones = np.ones((1, rows)), np.ones((1, columns))
    parts = _parts(values, *ones)[1][0]
    error = math.sqrt(_variance(parts))
    if error <= 1e-12 * max(abs(mean), 1e-300):
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 1 / (resamples + 1), rows, rows, columns)
    ratios = _ratios(values, mean, seed, resamples) if min(rows, columns) >= ENOUGH else np.array([math.inf])
    quantile = float(ratios[min(math.ceil(level * (len(ratios) + 1)), len(ratios)) - 1])
    if math.isfinite(quantile):
        p = (1 + int((ratios >= abs(mean) / error).sum())) / (len(ratios) + 1)
    else:  # too few subjects, or nearly all values alike: resamples without any spread say nothing of how far means stray
        freedom = max(1, round(_freedom(parts, rows, columns)))
        quantile, p = statistics.t_quantile(0.5 + level / 2, freedom), statistics.t_p(abs(mean) / error, freedom)
    return Estimate(mean, mean - quantile * error, mean + quantile * error, min(p, 1.0), rows, rows, columns)


def _ratios(values: Array, mean: float, seed: int, resamples: int) -> Array:
    """|resampled mean - mean| over the resample's own standard error, sorted, (B,). Subjects and prompts drawn apart."""
    rows, columns = values.shape
    drawn = statistics.counts(rows, resamples, seed, "subjects"), statistics.counts(columns, resamples, seed, "clusters")
    step = max(1, CHUNK // values.size)
    means, parts = [], []
    for start in range(0, resamples, step):
        found = _parts(values, drawn[0][start : start + step], drawn[1][start : start + step])
        means.append(found[0])
        parts.append(found[1])
    away, errors = np.abs(np.concatenate(means) - mean), np.sqrt(_variance(np.concatenate(parts)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(away <= 1e-12 * np.abs(values[~np.isnan(values)]).max(), 0.0, away / errors)
    return np.sort(ratios[~np.isnan(ratios)])  # a resample may hold subjects and prompts that never met: no mean


def _parts(values: Array, drawn_rows: Array, drawn_columns: Array) -> tuple[Array, Array]:
    """Mean of each resample, (B,), and the three parts of its variance, (B, 3): rows, columns, what is in both.

    Args:
        drawn_rows, drawn_columns: how often each row (B, S) and column (B, P) was drawn. A copy counts as another one.
    """
    rows, columns = values.shape
    there = (~np.isnan(values)).astype(np.float64)
    filled = np.nan_to_num(values)
    asked = drawn_columns @ there.T  # (B, S): columns a row has in the resample
    used = drawn_rows * (asked > 0)
    total = used.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_row = np.where(asked > 0, drawn_columns @ filled.T / asked, 0.0)  # (B, S)
        mean = (used * by_row).sum(axis=1, keepdims=True) / total
        weight = np.where(used > 0, 1.0 / (total * asked), 0.0)  # (B, S): of one value of a row
        gaps = (filled - by_row[:, :, None]) * there  # (B, S, P)
        shared = np.einsum("bs,bsp->bp", used * weight, gaps)  # (B, P): what a column moves the mean by
        usage = np.einsum("bs,sp->bp", used * weight, there)
        rest = (gaps - np.where(usage > 0, shared / usage, 0.0)[:, None, :]) * there
    between_rows = (used * (by_row - mean) ** 2).sum(axis=1) / total[:, 0] ** 2 * rows / (rows - 1)
    between_columns = (drawn_columns * shared**2).sum(axis=1) * columns / (columns - 1)
    both = np.einsum("bs,bp,bsp->b", used * weight**2, drawn_columns, rest**2) * rows * columns / ((rows - 1) * (columns - 1))
    return mean[:, 0], np.stack([between_rows, between_columns, both], axis=1)


def _variance(parts: Array) -> Array:
    """Rows plus columns less both; never below the larger of the first two, as a difference of estimates might be."""
    rows, columns, both = np.moveaxis(parts, -1, 0)
    return np.maximum(rows + columns - both, np.maximum(rows, columns))


def _freedom(parts: Array, rows: int, columns: int) -> float:
    """Degrees of freedom of the variance (Satterthwaite, Biometrics Bulletin 1946); rounded where used, as tables have whole ones."""
    return float(_variance(parts) ** 2 / (parts[0] ** 2 / (rows - 1) + parts[1] ** 2 / (columns - 1)))
