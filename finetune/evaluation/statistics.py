"""How sure a score is: bootstrap intervals over clusters, paired differences, Holm's correction. Pure functions.

Pictures of one prompt resemble one another, so a picture is not an observation: the prompt is. All functions here
take values that are already means per cluster (see `cluster_means`), and n always counts clusters: the prompts of a
score over many prompts, the pictures (seeds) of a score over one prompt, the photographs in the row of real pictures.

Shapes: C clusters, K reference pictures, B resamples. Arrays are float64.

Sources: Efron, "Better bootstrap confidence intervals", JASA 1987 (BCa); Hesterberg, "What teachers should know about
the bootstrap", The American Statistician 2015 (small samples); Owen, "The pigeonhole bootstrap", Annals of Applied
Statistics 2007 (two crossed factors); Hall, "On symmetric bootstrap confidence intervals", JRSS B 1988 (differences);
Holm, Scandinavian Journal of Statistics 1979 (many comparisons).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
SEED = "seed "  # label of a cluster that is a seed of the only prompt of its kind, before its number
ENOUGH = 5  # with fewer clusters too many resamples hold one of them alone: Student's t in place of the bootstrap-t
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; the bounds are None when one cluster cannot tell how much clusters differ."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over the same clusters, its interval, and the p-value of "there is no difference"."""

    difference: float
    low: float | None
    high: float | None
    p: float
    n: int


def cluster_means(values: Array, clusters: Sequence[Hashable]) -> Array:
    """Mean per cluster, clusters in order of first appearance: (N, ...) -> (C, ...)."""
    values = np.asarray(values, dtype=np.float64)
    places: dict[Hashable, list[int]] = {}
    for place, cluster in enumerate(clusters):
        places.setdefault(cluster, []).append(place)
    return np.stack([values[rows].mean(axis=0) for rows in places.values()])


def interval(values: Array, seed: int = 0, *, method: str = "bca", resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Interval of a mean over C clusters.

    Args:
        values: one mean per cluster, (C,).
        method: "bca", or "percentile" without the corrections for bias and skewness; both widened for small C.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    observed = float(values.mean())
    if n < 2:
        return Interval(observed, None, None, n)
    means = counts(n, resamples, seed, "clusters") @ values / n
    left_out = (values.sum() - values) / (n - 1)
    return Interval(observed, *_bounds(observed, means, [left_out], level, method), n)


def crossed_interval(values: Array, seed: int = 0, *, method: str = "bca", resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Interval of a mean over C clusters of pictures crossed with K reference pictures (pigeonhole bootstrap).

    Clusters and references are both resampled, because other prompts and other photographs of the same subject
    would have given another number. Slightly conservative by construction (Owen 2007). n counts the clusters.

    Args:
        values: (C, K), similarity of cluster c to reference k.
    """
    values = np.asarray(values, dtype=np.float64)
    clusters, references = values.shape
    if references < 2:
        return interval(values[:, 0], seed, method=method, resamples=resamples, level=level)
    observed = float(values.mean())
    if clusters < 2:
        return Interval(observed, None, None, clusters)
    rows = counts(clusters, resamples, seed, "clusters") / clusters
    columns = counts(references, resamples, seed, "references") / references
    means = np.einsum("bc,ck,bk->b", rows, values, columns)
    by_row, by_column = values.mean(axis=1), values.mean(axis=0)
    left_out = [(by_row.sum() - by_row) / (clusters - 1), (by_column.sum() - by_column) / (references - 1)]
    return Interval(observed, *_bounds(observed, means, left_out, level, method), clusters)


def pairs_interval(similarity: Array, seed: int = 0, *, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Interval of the mean over distinct pairs of K pictures; a picture is never paired with itself.

    Pictures are resampled; in a resample copies of one picture form no pair either. n counts the pictures. With
    fewer than four there are too few pairs to tell.

    Args:
        similarity: (K, K), symmetric; the diagonal is ignored.
    """
    matrix = np.array(similarity, dtype=np.float64)
    n = len(matrix)
    np.fill_diagonal(matrix, 0.0)
    others = 1.0 - np.eye(n)
    observed = float(matrix.sum() / others.sum())
    if n < 4:
        return Interval(observed, None, None, n)
    weights = counts(n, resamples, seed, "references")
    weights = weights[(weights > 0).sum(axis=1) > 1]
    means = np.einsum("bi,ij,bj->b", weights, matrix, weights) / np.einsum("bi,ij,bj->b", weights, others, weights)
    left_out = (matrix.sum() - 2 * matrix.sum(axis=1)) / ((n - 1) * (n - 2))
    return Interval(observed, *_bounds(observed, means, [left_out], level, "bca"), n)


def paired_difference(a: Array, b: Array, seed: int = 0, *, resamples: int = RESAMPLES, level: float = LEVEL) -> Difference:
    """Difference of two rows that answered the same prompts from the same seeds: symmetric smoothed bootstrap-t.

    Pairing removes what is hard or easy about a prompt for everyone. The reference pictures are the same for both
    rows and taken as given. The interval excludes zero exactly when p is at most 1 - level. Fewer than five
    clusters take Student's t.

    Smoothed: every drawn gap gets a little noise of its own, as wide as the standard error of the mean (Davison &
    Hinkley 1997, section 3.4). Without it a resample of equal gaps has no spread at all, its ratio is infinite, and
    -.35 at nine of ten prompts would be "undecided".

    Args:
        a, b: mean per cluster in the same order, (C,) each.
    """
    gaps = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(gaps)
    observed = float(gaps.mean())
    if n < 2:
        return Difference(observed, None, None, 1.0, n)
    spread = float(gaps.std(ddof=1)) / math.sqrt(n)
    if spread <= 1e-12 * max(abs(observed), 1e-300):  # the same gap everywhere, most often none at all
        return Difference(observed, observed, observed, 1.0 if observed == 0 else 1 / (resamples + 1), n)
    if n < ENOUGH:
        quantile, p = t_quantile(0.5 + level / 2, n - 1), t_p(abs(observed) / spread, n - 1)
        return Difference(observed, observed - quantile * spread, observed + quantile * spread, p, n)
    places, noise = _drawn(n, resamples, seed, "clusters"), _noise(n, resamples, seed)
    again = gaps[places] + spread * noise
    ratios = np.sort(np.abs(again.mean(axis=1) - observed) / (again.std(axis=1, ddof=1) / math.sqrt(n)))
    rank = min(math.ceil(level * (resamples + 1)), resamples)
    reach = float(ratios[rank - 1]) * spread
    p = (1 + int((ratios >= abs(observed) / spread).sum())) / (resamples + 1)
    return Difference(observed, observed - reach, observed + reach, min(p, 1.0), n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: all comparisons at or below alpha hold together with error at most alpha."""
    adjusted = [0.0] * len(p)
    running = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        running = max(running, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = running
    return adjusted


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4, bisected)."""
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < probability and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_p(t: float, freedom: int) -> float:
    """P(|T| >= t) of Student's t, for t >= 0."""
    return 2 * (1 - _t_share(t, freedom))


def _t_share(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 1.0
    for step in range(2 if freedom % 2 == 0 else 3, freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    if freedom % 2 == 0:
        inside = sine * total
    else:
        inside = 2 / math.pi * (angle + (sine * cosine * total if freedom > 1 else 0.0))
    return 0.5 + inside / 2


@functools.lru_cache(maxsize=16)
def counts(n: int, resamples: int, seed: int, stream: str) -> Array:
    """How often each of n clusters is drawn in each resample, (B, n). The same for every row: common random numbers."""
    found = np.zeros((resamples, n))
    np.add.at(found, (np.arange(resamples)[:, None], _drawn(n, resamples, seed, stream)), 1.0)
    found.setflags(write=False)  # shared by every caller
    return found


def _drawn(n: int, resamples: int, seed: int, stream: str) -> NDArray[np.int64]:
    """Which of n clusters each resample holds, (B, n)."""
    return (_words(n, resamples, seed, stream) % np.uint64(n)).astype(np.int64)


def _noise(n: int, resamples: int, seed: int) -> Array:
    """Even noise of mean 0 and variance 1, (B, n)."""
    return (_words(n, resamples, seed, "noise") / 2.0**64 - 0.5) * math.sqrt(12)


def _words(n: int, resamples: int, seed: int, stream: str) -> NDArray[np.uint64]:
    """Raw words of the generator, which are the same in every numpy, (B, n)."""
    key = hashlib.blake2b("\x1f".join([str(seed), "bootstrap", stream, str(n)]).encode(), digest_size=8).digest()
    return np.random.PCG64(int.from_bytes(key, "big")).random_raw(resamples * n).reshape(resamples, n)


def _bounds(observed: float, means: Array, left_out: list[Array], level: float, method: str) -> tuple[float, float]:
    """Quantiles of the resampled means at BCa's levels, with tails widened for few clusters (`_reach`)."""
    if float(means.max() - means.min()) <= 1e-12 * max(abs(observed), 1e-300):
        return observed, observed
    reach = _reach(left_out, level)
    bias, acceleration = 0.0, 0.0
    if method == "bca":
        tied = np.abs(means - observed) <= 1e-9 * (means.max() - means.min())
        below = (float(((means < observed) & ~tied).sum()) + 0.5 * float(tied.sum())) / len(means)
        bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
        acceleration = _acceleration(left_out)
    elif method != "percentile":
        raise ValueError(f"method {method!r} is neither 'bca' nor 'percentile'")
    shares = []
    for z in (-reach, reach):
        bent = 1 - acceleration * (bias + z)
        shares.append(_NORMAL.cdf(bias + (bias + z) / bent) if bent > 0 else float(z > 0))
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def _reach(left_out: list[Array], level: float) -> float:
    """Hesterberg's expansion: Student's t, times sqrt(n / (n - 1)), in place of the normal quantile.

    A plain bootstrap of ten clusters is as much too narrow as dividing by n instead of n - 1 and ignoring that the
    spread is estimated. With two crossed factors both corrections are weighed by the jackknife variance of each
    (degrees of freedom after Satterthwaite 1946, rounded down), so that five photographs count as five.
    """
    sizes = [len(means) for means in left_out]
    variances = [(n - 1) / n * float(((means - means.mean()) ** 2).sum()) for n, means in zip(sizes, left_out, strict=True)]
    total = sum(variances)
    if total == 0:
        return _NORMAL.inv_cdf(0.5 + level / 2)
    freedom = total**2 / sum(v**2 / (n - 1) for n, v in zip(sizes, variances, strict=True))
    drawn = sum(v * (n - 1) / n for n, v in zip(sizes, variances, strict=True))
    return math.sqrt(total / drawn) * t_quantile(0.5 + level / 2, math.floor(freedom + 1e-9))


def _acceleration(left_out: list[Array]) -> float:
    """BCa's skewness term from the jackknife, summed over independently sampled factors (Davison & Hinkley 1997, ch. 5)."""
    cubes, squares = 0.0, 0.0
    for means in left_out:
        n = len(means)
        influence = (n - 1) * (means.mean() - means)
        cubes += float((influence**3).sum()) / n**3
        squares += float((influence**2).sum()) / n**2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0
