"""Means over subjects and prompts: against plain loops, closed forms, and by simulation."""

import math

import numpy as np
import pytest

from finetune.evaluation import crossed, statistics


def loops(values, drawn_rows, drawn_columns):
    """Mean and its variance of one resample, by writing the resampled table out and counting. Independent of `crossed`."""
    rows = [row for row, times in enumerate(drawn_rows) for _ in range(int(times))]
    columns = [column for column, times in enumerate(drawn_columns) for _ in range(int(times))]
    table = [[values[row][column] for column in columns] for row in rows]
    table = [line for line in table if not all(math.isnan(value) for value in line)]
    means, weights = [], []
    for line in table:
        known = [value for value in line if not math.isnan(value)]
        means.append(sum(known) / len(known))
        weights.append(1 / len(known) / len(table))
    mean = sum(means) / len(means)
    count_rows, count_columns = len(drawn_rows), len(drawn_columns)
    between_rows = sum((one - mean) ** 2 for one in means) / len(table) ** 2 * count_rows / (count_rows - 1)
    moved, effect = {}, {}
    for place, column in enumerate(columns):
        parts = [(weight, line[place] - one) for line, one, weight in zip(table, means, weights, strict=True) if not math.isnan(line[place])]
        moved[place] = sum(weight * gap for weight, gap in parts)
        # Copies of a column are the same column: their effect is one.
        effect[column] = sum(weight * gap for weight, gap in parts) / sum(weight for weight, _ in parts) if parts else 0.0
    between_columns = sum(move**2 for move in moved.values()) * count_columns / (count_columns - 1)
    both = sum((weight * (line[place] - one - effect[column])) ** 2 for line, one, weight in zip(table, means, weights, strict=True)
               for place, column in enumerate(columns) if not math.isnan(line[place]))
    both *= count_rows * count_columns / ((count_rows - 1) * (count_columns - 1))
    return mean, max(between_rows + between_columns - both, between_rows, between_columns)


def example(missing):
    random = np.random.default_rng(12)
    values = random.normal(size=(6, 1)) + random.normal(size=(1, 7)) + random.normal(size=(6, 7)) + 0.4
    if missing:
        values[random.random((6, 7)) < 0.25] = math.nan
    return values


@pytest.mark.parametrize("missing", [False, True])
def test_estimate_equals_plain_loops(missing):
    values, resamples = example(missing), 199
    found = crossed.estimate(values, seed=5, resamples=resamples)
    mean, variance = loops(values, [1] * 6, [1] * 7)
    drawn = statistics.counts(6, resamples, 5, "subjects"), statistics.counts(7, resamples, 5, "clusters")
    ratios = []
    for rows, columns in zip(*drawn, strict=True):
        one, spread = loops(values, rows, columns)
        ratios.append(abs(one - mean) / math.sqrt(spread))
    ratios.sort()
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(ratios[189] * math.sqrt(variance))  # 190 of 199 lie at or below
    assert found.p == pytest.approx((1 + sum(ratio >= abs(mean) / math.sqrt(variance) for ratio in ratios)) / 200)


def test_variance_of_a_full_table_is_that_of_the_analysis_of_variance():
    values = example(missing=False)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    rest = values - rows[:, None] - columns[None, :] + values.mean()
    wanted = rows.var(ddof=1) / 6 + columns.var(ddof=1) / 7 - (rest**2).sum() / (5 * 6) / 42
    parts = crossed._parts(values, np.ones((1, 6)), np.ones((1, 7)))[1][0]
    assert parts.sum() - 2 * parts[2] == pytest.approx(wanted)


def test_every_subject_weighs_the_same():
    values = np.array([[1.0, 1.0, 1.0], [4.0, math.nan, math.nan]])
    assert crossed.estimate(values).mean == pytest.approx(2.5)


def test_what_is_empty_does_not_count():
    values = example(missing=False)
    wider = np.full((8, 9), math.nan)
    wider[:6, :7] = values
    assert crossed.estimate(wider) == crossed.estimate(values)
    with pytest.raises(ValueError, match="no value"):
        crossed.estimate(np.full((2, 2), math.nan))


def test_one_subject_or_one_prompt_is_the_paired_difference_over_the_other():
    line = np.random.default_rng(3).normal(size=9)
    one = statistics.paired_difference(line, np.zeros(9))
    for values in (line[None, :], line[:, None]):
        found = crossed.estimate(values)
        assert (found.mean, found.low, found.high, found.p, found.n) == (one.difference, one.low, one.high, one.p, 9)
    alone = crossed.estimate(np.array([[0.3]]))
    assert (alone.mean, alone.low, alone.high, alone.p) == (0.3, None, None, 1.0)


def test_few_subjects_take_student_t():
    values = np.array([[0.1, 0.3, 0.2], [0.5, 0.6, 0.4], [0.9, 0.7, 0.8]])  # prompts hardly matter
    found = crossed.estimate(values)
    error = math.sqrt(np.var([0.2, 0.5, 0.8], ddof=1) / 3)
    assert found.high - found.mean == pytest.approx(statistics.t_quantile(0.975, 2) * error, rel=0.01)


def test_values_that_are_nearly_all_alike_take_student_t():
    """Two of 96 attributes were lost: most resamples hold none of them and have no spread, though their mean is another one."""
    values = np.ones((12, 8))
    values[3, 2] = values[7, 5] = 0.0
    found = crossed.estimate(values)
    assert found.mean == pytest.approx(1 - 2 / 96) and 0.9 < found.low < found.mean < found.high < 1.05


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.7, 0.9, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("rows", [3, 6])
def test_interval_excludes_zero_exactly_when_p_is_small(shift, rows):
    found = crossed.estimate(example(missing=True)[:rows] + shift)
    assert (found.low > 0 or found.high < 0) == (found.p <= 0.05)


def test_the_same_everywhere():
    assert crossed.estimate(np.zeros((6, 7))) == crossed.Estimate(0.0, 0.0, 0.0, 1.0, 6, 6, 7)
    found = crossed.estimate(np.full((6, 7), 0.25))
    assert (found.low, found.high) == (0.25, 0.25) and found.p < 0.001


@pytest.mark.parametrize("spreads", [(1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1)], ids=["both", "subjects", "prompts", "neither"])
def test_interval_covers_the_truth_about_as_often_as_it_says(spreads):
    """12 subjects x 10 prompts with effects of the given size, some not asked; 95 % are asked for."""
    random, hits, times = np.random.default_rng(7), 0, 250
    for _ in range(times):
        subject, prompt, rest = (spread * random.normal(size=shape) for spread, shape in zip(spreads, ((12, 1), (1, 10), (12, 10)), strict=True))
        values = subject + prompt + rest
        values[:3, :4] = math.nan
        found = crossed.estimate(values, resamples=300)
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / times <= 0.99
