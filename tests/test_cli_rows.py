"""Rows of a comparison: what `--methods` means, what each row's recipe holds, when a finished row may stay."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from finetune.cli.compare_settings import CompareSettings
from finetune.cli.processes import last_words
from finetune.cli.rows import plan, recipe_text, same, specs, toml, unfair
from finetune.errors import Problem


def other(model: str) -> str:
    return "no-such-family"


def rows_of(tmp_path: Path, **values):
    settings = CompareSettings(**{"class_noun": "dog", "instance_dir": tmp_path, "output": tmp_path / "out", "steps": 7, **values})
    return {row.name: row for row in plan(settings, other)}


@pytest.mark.parametrize(("methods", "wanted"), [
    ("lora", ["lora"]),
    ("dreambooth, lora", ["dreambooth", "lora"]),
    ("hypernetwork", ["hypernetwork:key,value", "hypernetwork:key,query"]),
    ("hypernetwork:key,query,value,lora", ["hypernetwork:key,query,value", "lora"]),
    ("lora,hypernetwork:value", ["lora", "hypernetwork:value"]),
])
def test_specs(methods, wanted):
    assert specs(methods) == wanted


def test_default_is_all_four_with_both_wirings(tmp_path):
    rows = rows_of(tmp_path)
    assert list(rows) == ["dreambooth", "textual-inversion", "lora", "hypernetwork-key-value", "hypernetwork-key-query"]
    assert [row.title for row in rows.values()] == ["DreamBooth", "Textual Inversion", "LoRA", "Hypernetwork (key, value)",
                                                    "Hypernetwork (key, query)"]
    assert [row.subject for row in rows.values()] == ["sks dog", "<my-dog>", "sks dog", "sks dog", "sks dog"]
    assert rows["hypernetwork-key-query"].settings.transform == "key,query"
    assert unfair(list(rows.values())) == []


def test_all_rows_share_budget_seed_and_pictures(tmp_path):
    rows = rows_of(tmp_path, seed=5, batch_size=3, resolution=64, flip=True)
    for row in rows.values():
        shown = row.settings
        assert (shown.steps, shown.batch_size, shown.seed, shown.resolution, shown.flip, shown.instance_dir) == (7, 3, 5, 64, True, tmp_path)
        assert shown.output == (tmp_path / "out" / row.name).resolve()


def test_own_tables_and_own_rows(tmp_path):
    rows = rows_of(tmp_path, methods="lora,small,hypernetwork", rows={
        "lora": {"rank": 8}, "small": {"method": "lora", "rank": 2}, "hypernetwork": {"dropout": 0.1},
        "hypernetwork-key-query": {"learning_rate": 1e-3}})
    assert (rows["lora"].settings.rank, rows["small"].settings.rank) == (8, 2)
    assert (rows["small"].method, rows["small"].title) == ("lora", "LoRA (small)")
    assert rows["hypernetwork-key-value"].settings.dropout == rows["hypernetwork-key-query"].settings.dropout == 0.1
    assert rows["hypernetwork-key-query"].settings.learning_rate == 1e-3 != rows["hypernetwork-key-value"].settings.learning_rate


def test_a_row_with_another_budget_is_said_aloud(tmp_path):
    rows = rows_of(tmp_path, methods="lora,textual-inversion", rows={"lora": {"steps": 9}})
    assert unfair(list(rows.values())) == ["Rows differ in steps: lora 9, textual-inversion 7."]


def test_unknown_key_in_a_row_names_the_nearest(tmp_path):
    with pytest.raises(Problem) as caught:
        rows_of(tmp_path, methods="lora", rows={"lora": {"rnak": 4}})
    assert "'rnak'" in caught.value.what and "'rank'" in caught.value.why


def test_subject_phrase_does_not_replace_the_new_word(tmp_path):
    rows = rows_of(tmp_path, methods="lora,textual-inversion", subject="zwx hound", placeholder="<rex>")
    assert (rows["lora"].subject, rows["textual-inversion"].subject) == ("zwx hound", "<rex>")
    assert rows["textual-inversion"].settings.initializer == "dog"


def test_recipe_of_a_row_reads_back(tmp_path):
    for row in rows_of(tmp_path, instance_prompt='a "quoted" {} \\ on ümläut', flip=True).values():
        read = tomllib.loads(recipe_text(row))
        assert read.pop("method") == row.method
        assert read == {key: str(value) if isinstance(value, Path) else value for key, value in row.values.items()}


@pytest.mark.parametrize("value", [True, 3, 1e-5, 2.0, "a\nb\t\"c\" \\ é \x7f", [1, 2], ["a", "b"], {"a": 1, "b c": ["x"]}, []])
def test_toml_reads_back(value):
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}


def test_same_settings_on_disk(tmp_path):
    row = rows_of(tmp_path, methods="lora")["lora"]
    written = row.settings.model_dump(mode="json") | {"method": "lora"}
    assert same(row, written)
    assert same(row, {**written, "output": "elsewhere", "resume": True, "overwrite": True})
    assert not same(row, {**written, "rank": 4})
    assert not same(row, {key: value for key, value in written.items() if key != "steps"})


@pytest.mark.parametrize(("said", "code", "wanted"), [
    ([], 1, "no message (exit code 1)"),
    (["", "Killed"], -9, "Killed (killed by signal 9)"),
    (["noise", "Problem: No pictures.", "    Why: The folder is", "         empty.", ""], 2, "Problem: No pictures. Why: The folder is empty."),
])
def test_last_words(said, code, wanted):
    assert last_words(said, code) == wanted
