"""A study's numbers from its cells: against plain loops over hand-made scores."""

import statistics as plain
import subprocess
import sys

import numpy as np
import pytest
from study_fixture import PROMPTS, ROWS, cell_scores, write_cell, write_study

from finetune import runs
from finetune.errors import Problem
from finetune.evaluation import crossed, study

SUBJECTS = ("red-mug", "blue-mug", "tall-mug", "old-mug", "new-mug", "odd-mug")


def cells_of(subjects=SUBJECTS, seeds=(0, 1), costs=None, **made):
    rows = [{"row": row} for row in made.get("rows", ROWS) if row != "base"]
    return [study.Cell(f"{subject}-s{seed}", subject, seed, {"model_hash": "0123", "sampler": {}, "rows": rows},
                       cell_scores(subject, seed, **made), costs or {"lora": {"training_seconds": 10.0 + seed}})
            for subject in subjects for seed in seeds]


@pytest.fixture(scope="module")
def combined():
    return study.combine(cells_of())


def by_hand(row, metric="dino", subjects=SUBJECTS, seeds=(0, 1)):
    """Mean over subjects of the mean over seeds of the mean over prompts."""
    found = []
    for subject in subjects:
        per_seed = []
        for seed in seeds:
            scores = next(one for one in cell_scores(subject, seed)["rows"] if one["row"] == row)
            per_seed.append(plain.fmean(scores["values"][metric]["means"]))
        found.append(plain.fmean(per_seed))
    return plain.fmean(found)


@pytest.mark.parametrize("row", ROWS)
def test_scores_are_means_over_subjects_seeds_and_prompts(combined, row):
    found = next(one for one in combined["rows"] if one["row"] == row)["scores"]["dino"]
    assert found["mean"] == pytest.approx(by_hand(row), abs=1e-6)
    assert found["low"] < found["mean"] < found["high"]
    assert (found["n"], found["subjects"], found["prompts"]) == (6, 6, 6)


def test_rows_come_base_first_and_real_last_with_their_cells(combined):
    assert [row["row"] for row in combined["rows"]] == ["base", "lora", "dreambooth", "real"]
    lora = combined["rows"][1]
    assert list(lora["cells"]) == [f"{subject}-s{seed}" for subject in SUBJECTS for seed in (0, 1)]
    assert lora["cells"]["red-mug-s1"]["dino"] == pytest.approx(cell_scores("red-mug", 1)["rows"][1]["scores"]["dino"]["mean"], abs=1e-6)
    assert combined["rows"][3]["scores"]["dino"]["n"] == 6 and lora["images"] == []


def test_differences_are_paired_so_that_subjects_and_prompts_cancel(combined):
    pair = next(one for one in combined["pairs"] if (one["metric"], one["a"], one["b"]) == ("dino", "lora", "dreambooth"))
    assert pair["difference"] == pytest.approx(by_hand("lora") - by_hand("dreambooth"), abs=1e-6)
    assert pair["decided"] and pair["high"] < 0
    scores = {row["row"]: row["scores"]["dino"] for row in combined["rows"]}
    assert pair["high"] - pair["low"] < 0.5 * (scores["lora"]["high"] - scores["lora"]["low"])


def test_a_difference_is_the_estimate_over_the_table_of_gaps(combined):
    table = np.array([[plain.fmean(cell_scores(subject, seed)["rows"][1]["values"]["dino"]["means"][place]
                                   - cell_scores(subject, seed)["rows"][2]["values"]["dino"]["means"][place] for seed in (0, 1))
                       for place in range(len(PROMPTS))] for subject in SUBJECTS])
    one = crossed.estimate(table)
    pair = next(one for one in combined["pairs"] if (one["metric"], one["a"], one["b"]) == ("dino", "lora", "dreambooth"))
    assert (pair["difference"], pair["low"], pair["high"]) == pytest.approx((one.mean, one.low, one.high), abs=2e-6)


def test_pairs_of_a_metric_are_corrected_together_and_only_those_the_cells_compare(combined):
    dino = [one for one in combined["pairs"] if one["metric"] == "dino"]
    assert len(dino) == 3 and [one for one in combined["pairs"] if one["metric"] == "drift"][0]["a"] == "lora"
    assert min(one["p"] for one in dino) >= 3 / 2001 - 1e-6  # the smallest of three p-values counts three times
    assert not any("base" in (one["a"], one["b"]) for one in combined["pairs"] if one["metric"] == "drift")


def test_equal_methods_are_not_told_apart():
    found = study.combine(cells_of(rows={"base": 0.1, "lora": 0.5, "dreambooth": 0.5}))
    pair = next(one for one in found["pairs"] if (one["metric"], one["a"], one["b"]) == ("dino", "lora", "dreambooth"))
    assert not pair["decided"] and pair["low"] <= 0 <= pair["high"]


def test_ranks_are_mean_places_among_the_methods(combined):
    assert combined["ranks"]["dino"] == {"lora": {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 12},
                                         "dreambooth": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 12}}
    drift = combined["ranks"]["drift"]  # lower is better there
    assert drift["lora"]["mean"] < drift["dreambooth"]["mean"] and drift["lora"]["mean"] + drift["dreambooth"]["mean"] == pytest.approx(3)


@pytest.mark.parametrize(("values", "better", "wanted"), [
    ([0.3, 0.9, 0.5], "higher", [3, 1, 2]), ([0.3, 0.9, 0.5], "lower", [1, 3, 2]),
    ([0.5, 0.9, 0.5, 0.1], "higher", [2.5, 1, 2.5, 4]), ([1, 1, 1], "lower", [2, 2, 2])])
def test_equal_values_share_a_place(values, better, wanted):
    assert study.shared_places(values, better) == wanted


def test_wins_count_cells_by_their_own_interval():
    cells = cells_of(subjects=("a-mug", "b-mug", "c-mug"), seeds=(0,))
    for cell, bounds in zip(cells, ((0.1, 0.3), (-0.2, 0.1), (-0.4, -0.2)), strict=True):
        cell.scores["pairs"] = [{"metric": "dino", "a": "lora", "b": "dreambooth", "difference": sum(bounds) / 2, "low": bounds[0], "high": bounds[1]}]
    wanted = {"metric": "dino", "a": "lora", "b": "dreambooth", "n": 3}
    assert study.wins(cells, "dino", "higher") == [{**wanted, "wins": 1, "losses": 1, "ties": 1}]
    cells[1].scores["pairs"] = [{"metric": "dino", "a": "dreambooth", "b": "lora", "difference": 0.4, "low": 0.3, "high": 0.5}]
    assert study.wins(cells, "dino", "higher") == [{**wanted, "wins": 1, "losses": 2, "ties": 0}]
    assert study.wins(cells, "dino", "lower") == [{**wanted, "wins": 2, "losses": 1, "ties": 0}]
    cells[1].scores["pairs"] = [{"metric": "dino", "a": "lora", "b": "dreambooth", "difference": 0.4, "low": None, "high": None}]
    assert study.wins(cells, "dino", "higher")[0]["ties"] == 1


def test_costs_are_means_over_the_cells(combined):
    lora = combined["rows"][1]["costs"]["training_seconds"]
    assert (lora["mean"], lora["low"], lora["high"], lora["n"]) == (10.5, 10.5, 10.5, 12)  # every subject's two seeds: 10 and 11 seconds
    assert combined["rows"][0]["costs"] == {}


def test_the_interval_of_a_share_ends_at_one():
    cells = cells_of(SUBJECTS[:3], seeds=(0,))
    for cell, shares in zip(cells, ([0.4, 1.0], [1.0, 1.0], [1.0, 1.0]), strict=True):
        cell.scores["columns"].append({"key": "kept", "title": "Attributes kept", "better": "higher"})
        for row in cell.scores["rows"]:
            row["scores"]["kept"] = {"mean": plain.fmean(shares)}
            row["values"] = {**(row.get("values") or {}), "kept": {"clusters": ["a car", "a ball"], "means": shares}}
    found = study.combine(cells)["rows"][1]["scores"]["kept"]
    alone = crossed.estimate(np.array([[0.4, 1.0], [1.0, 1.0], [1.0, 1.0]]))
    assert alone.high > 1 and found["high"] == 1.0
    assert (found["mean"], found["low"]) == (pytest.approx(alone.mean, abs=1e-6), pytest.approx(max(alone.low, 0.0), abs=1e-6))


def test_prompts_that_some_subjects_lack():
    cells = cells_of(SUBJECTS[:3]) + cells_of(SUBJECTS[3:], prompts=PROMPTS[:2])
    found = study.combine(cells)
    row = next(one for one in found["rows"] if one["row"] == "lora")["scores"]["dino"]
    means = [plain.fmean(cell.clusters("lora", "dino").values()) for cell in cells]
    assert row["mean"] == pytest.approx(plain.fmean(means), abs=1e-6) and row["prompts"] == 6
    assert found["suite"]["subject"] == list(PROMPTS)


def test_seeds_of_the_only_prompt_are_no_prompts_that_subjects_share():
    """Each subject has a noise of its own under "seed 0": the two seeds are averaged, and only subjects are sampled."""
    cells = cells_of(prompts=("seed 0", "seed 1"))
    found = next(one for one in study.combine(cells)["rows"] if one["row"] == "lora")["scores"]["dino"]
    means = [plain.fmean([plain.fmean(cell.clusters("lora", "dino").values()) for cell in cells if cell.subject == subject]) for subject in SUBJECTS]
    alone = crossed.estimate(np.array(means)[:, None], 0)
    assert (found["subjects"], found["prompts"]) == (6, 1)
    assert (found["low"], found["high"]) == pytest.approx((alone.low, alone.high), abs=1e-6)


def test_one_subject_samples_its_seeds_and_one_cell_keeps_its_own_numbers():
    seeds = study.combine(cells_of(("red-mug",), (0, 1, 2)))["rows"][1]["scores"]["dino"]
    assert (seeds["subjects"], seeds["n"]) == (3, 3) and seeds["low"] < seeds["mean"] < seeds["high"]
    cells = cells_of(("red-mug",), (0,))
    alone = study.combine(cells)
    assert alone["rows"][1]["scores"] == cells[0].scores["rows"][1]["scores"]
    assert alone["ranks"]["dino"]["lora"] == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_a_row_that_failed_in_some_cells_counts_where_it_is():
    cells = cells_of(SUBJECTS[:3]) + cells_of(SUBJECTS[3:], rows={"base": 0.1, "dreambooth": 0.8})
    found = study.combine(cells)
    pair = next(one for one in found["pairs"] if (one["metric"], one["a"], one["b"]) == ("dino", "lora", "dreambooth"))
    assert pair["subjects"] == 3 and found["ranks"]["dino"]["lora"]["n"] == 6
    assert next(one for one in found["wins"] if (one["metric"], one["a"], one["b"]) == ("dino", "lora", "dreambooth"))["n"] == 6


def test_the_true_subject_is_a_row_but_no_method_and_shares_of_the_way_are_averaged():
    cells = cells_of(("a-mug", "b-mug"), (0,))
    for cell, share in zip(cells, (0.2, 0.6), strict=True):
        cell.scores["rows"].insert(3, {**cell.scores["rows"][2], "row": "oracle", "title": "The true subject, drawn"})
        cell.scores["rows"][1]["normalised"] = {"dino": share}
        cell.scores["hidden"] = [{"key": "kernel", "reason": "blind"}]
    found = study.combine(cells)
    assert [row["row"] for row in found["rows"]] == ["base", "lora", "dreambooth", "oracle", "real"]
    assert set(found["ranks"]["dino"]) == {"lora", "dreambooth"} and found["rows"][1]["normalised"] == {"dino": pytest.approx(0.4)}
    assert found["hidden"] == [{"key": "kernel", "reason": "blind"}] and "normalised" not in found["rows"][0]


def test_flags_of_more_than_half_of_the_cells_are_the_rows():
    cells = cells_of(("a-mug", "b-mug", "c-mug"), (0,))
    for cell, flags in zip(cells, (["copying", "drifted"], ["copying"], []), strict=True):
        cell.scores["rows"][1]["flags"] = flags
    row = study.combine(cells)["rows"][1]
    assert row["flags"] == ["copying"] and row["flagged"] == {"copying": ["a-mug-s0", "b-mug-s0"], "drifted": ["a-mug-s0"]}


def test_aggregate_reads_and_writes_a_folder(tmp_path):
    write_study(tmp_path)
    found = study.aggregate(tmp_path)
    assert runs.read_json(tmp_path / "scores.json") == found
    assert found["rows"][1]["costs"]["artifact_bytes"] == {"mean": 5000.0, "low": 5000.0, "high": 5000.0, "n": 6, "subjects": 3, "prompts": 1}
    (tmp_path / "cells" / "red-mug-s0" / "scores.json").unlink()
    assert len(study.aggregate(tmp_path)["cells"]) == 5


@pytest.mark.parametrize(("file", "key", "value", "named"), [
    ("comparison.json", "model_hash", "4567", "base"), ("comparison.json", "sampler", {"steps": 9}, "sampler"),
    ("scores.json", "judge", {"clip": "other/clip", "encoder": "test/encoder"}, "judge"),
    ("scores.json", "suite", {"name": "small", "subject": []}, "suite")])
def test_cells_that_were_not_measured_alike_are_refused_by_name(tmp_path, file, key, value, named):
    write_study(tmp_path)
    path = tmp_path / "cells" / "blue-mug-s1" / file
    runs.write_json(path, {**runs.read_json(path), key: value})
    with pytest.raises(Problem) as caught:
        study.aggregate(tmp_path)
    assert f"red-mug-s0 and blue-mug-s1 differ in their {named}" in caught.value.what


def test_scores_without_means_by_prompt_are_refused(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "cells" / "blue-mug-s1" / "scores.json"
    old = runs.read_json(path)
    for row in old["rows"]:
        row.pop("values", None)
    runs.write_json(path, old)
    with pytest.raises(Problem, match="blue-mug-s1"):
        study.aggregate(tmp_path)


def test_nothing_scored_is_refused(tmp_path):
    write_cell(tmp_path / "cells" / "a", "red-mug", 0)
    (tmp_path / "cells" / "a" / "scores.json").unlink()
    runs.write_json(tmp_path / "comparison.json", {"cells": [{"name": "a", "subject": "red-mug", "seed": 0}]})
    with pytest.raises(Problem, match="No cell"):
        study.aggregate(tmp_path)


def test_importing_it_needs_no_torch():
    code = "import sys; from finetune.evaluation import study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
