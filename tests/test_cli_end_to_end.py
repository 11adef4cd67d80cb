"""The whole path on a tiny random base: compare, keep, fail, evaluate, report, generate, inspect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune import runs
from finetune.cli import app, jobs, processes

ROWS = ["dreambooth", "textual-inversion", "lora", "hypernetwork-key-value", "hypernetwork-key-query"]


@pytest.fixture(scope="module")
def words(tiny_model, tiny_judge, pictures_dir, tmp_path_factory) -> list[str]:
    """`finetune compare ...` for a comparison of seconds, without --output."""
    recipe = tmp_path_factory.mktemp("recipe") / "compare.toml"
    recipe.write_text("[rows.dreambooth]\nclass_images = 2\nclass_steps = 1\n[rows.broken]\nmethod = \"lora\"\ntargets = \"no_such_layer\"\n",
                      encoding="utf-8")
    return ["compare", "--model", str(tiny_model), "--instance-dir", str(pictures_dir), "--class-noun", "dog", "--steps", "2",
            "--batch-size", "2", "--resolution", "32", "--recipe", str(recipe), "--judge", str(tiny_judge), "--evaluation-seeds", "1",
            "--sampler-steps", "1", "--validate-every", "2"]


@pytest.fixture(scope="module")
def comparison(words, tmp_path_factory) -> Path:
    """A finished comparison of all rows, LoRA and the failing row of a test below in processes of their own. Do not write into it."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    real = processes.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "train", lambda *words: real(*words) if words[0] == "lora" else told_here(*words))
        assert app.run([*words, "--output", str(folder)]) == 0
    return folder


def told_here(*words):
    """Stands for `processes.train`: trains in this process."""
    code = app.run(list(words))
    return None if code == 0 else f"code {code}"


@pytest.fixture()
def copied(comparison, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(comparison, tmp_path / "out"))


def test_all_rows_had_the_same_pictures_steps_and_base(comparison):
    manifests = [runs.read_json(comparison / row / "manifest.json") for row in ROWS]
    for key, wanted in (("status", "finished"), ("steps", 2), ("batch_size", 2), ("pictures_seen", 4)):
        assert [manifest[key] for manifest in manifests] == [wanted] * 5
    for key in ("pictures", "model"):
        assert all(manifest[key] == manifests[0][key] for manifest in manifests)
    assert len(manifests[0]["pictures"]) == 4


def test_before_the_first_step_all_rows_have_the_same_validation_loss(comparison):
    first = {row: runs.read_metrics(comparison / row)[0] for row in ROWS}
    assert all(line["step"] == 0 for line in first.values())
    losses = [first[row]["validation_loss"] for row in ROWS if row != "textual-inversion"]  # its captions are other words
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)


def test_comparison_file_names_what_evaluation_needs(comparison, tiny_model, pictures_dir):
    told = runs.read_json(comparison / "comparison.json")
    assert [row["row"] for row in told["rows"]] == ROWS and told["failed"] == []
    assert told["instance_files"] == sorted(str(path) for path in pictures_dir.iterdir())
    assert told["sampler"] == {"steps": 1, "guidance": 7.5} and told["class_noun"] == "dog"
    assert told["model_hash"] == runs.read_json(comparison / "lora" / "manifest.json")["model"]["hash"]


def test_scores_and_report_cover_base_rows_and_real_pictures(comparison):
    scores = runs.read_json(comparison / "scores.json")
    assert [row["row"] for row in scores["rows"]] == ["base", *ROWS, "real"]
    page = (comparison / "report.html").read_text(encoding="utf-8")
    for title in ("Untouched base", "DreamBooth", "Textual Inversion", "LoRA", "Hypernetwork (key, query)"):
        assert title in page


def test_a_second_run_keeps_finished_rows_and_tells_a_failed_one(words, copied, capfd):
    before = {row: (copied / row / "manifest.json").stat().st_mtime_ns for row in ROWS}
    assert app.run([*words, "--output", str(copied), "--methods", "lora,broken,textual-inversion"]) == 1
    said = capfd.readouterr().out
    told = runs.read_json(copied / "comparison.json")
    assert [row["row"] for row in told["rows"]] == ["lora", "textual-inversion"]
    assert told["failed"][0]["title"] == "LoRA (broken)" and "no_such_layer" in told["failed"][0]["error"]
    assert said.count("Kept: ") == 2 and "Failed: broken: " in said
    assert {row: (copied / row / "manifest.json").stat().st_mtime_ns for row in ROWS} == before


def test_another_budget_trains_again(words, copied, capfd, monkeypatch):
    monkeypatch.setattr(processes, "train", told_here)
    assert app.run([*words, "--output", str(copied), "--methods", "textual-inversion", "--steps", "3"]) == 0
    assert runs.read_json(copied / "textual-inversion" / "manifest.json")["steps"] == 3
    assert "Kept: " not in capfd.readouterr().out


def test_evaluate_and_report_from_disk(copied, capfd):
    scores = runs.read_json(copied / "scores.json")
    (copied / "scores.json").unlink()
    assert app.run(["report", str(copied)]) == 2
    assert app.run(["evaluate", str(copied)]) == 0
    assert runs.read_json(copied / "scores.json")["rows"] == scores["rows"]
    (copied / "report.html").unlink()
    capfd.readouterr()
    assert app.run(["report", str(copied)]) == 0
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last == f"Report: {(copied / 'report.html').resolve()}" and Path(last.removeprefix("Report: ")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study(words, tmp_path_factory) -> Path:
    """A finished study of one subject and two training seeds; its rows and evaluations run in this process. Do not write into it."""
    folder = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "launch", in_this_process)
        assert app.run([*words, "--methods", "textual-inversion", "--seeds", "2", "--pictures", "3", "--output", str(folder)]) == 0
    return folder


def in_this_process(words, log, threads):
    """Stands for `jobs.launch`: what it runs has ended when it returns."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    code = app.run(list(map(str, words)))
    return SimpleNamespace(poll=lambda: code, send_signal=lambda number: None)


def test_a_study_trains_every_seed_and_asks_all_the_same(study):
    cells = [runs.read_json(study / "cells" / name / "comparison.json") for name in ("dog-s0", "dog-s1")]
    assert [(cell["seed"], cell["training_seed"]) for cell in cells] == [(0, 0), (0, 1)]
    shots = [runs.read_json(study / "cells" / name / "textual-inversion" / "images" / "images.json")["pictures"] for name in ("dog-s0", "dog-s1")]
    told = [{file: (shot["prompt"], shot["seed"]) for file, shot in one.items()} for one in shots]
    assert told[0] == told[1] and shots[0] != shots[1]  # same prompts and noise, other artifacts
    artifacts = [runs.read_json(study / "cells" / name / "textual-inversion" / "artifact" / "artifact.json")["files"] for name in ("dog-s0", "dog-s1")]
    assert artifacts[0][0]["sha256"] != artifacts[1][0]["sha256"]
    base = [study / "cells" / name / "base" / "images" / "subject-00-0.png" for name in ("dog-s0", "dog-s1")]
    assert base[0].samefile(base[1])  # drawn once


def test_a_study_s_scores_are_those_of_its_cells_put_together(study):
    scores = runs.read_json(study / "scores.json")
    cells = [runs.read_json(study / "cells" / name / "scores.json") for name in ("dog-s0", "dog-s1")]
    for place in (0, 1):
        for metric, told in scores["rows"][place]["scores"].items():
            assert told["mean"] == pytest.approx(sum(cell["rows"][place]["scores"][metric]["mean"] for cell in cells) / 2, abs=2e-6), metric
    assert scores["rows"][1]["costs"]["artifact_bytes"]["n"] == 2 and scores["pairs"] and scores["wins"]
    assert "Textual Inversion" in (study / "report.html").read_text(encoding="utf-8")


def test_evaluate_works_on_a_study(study, tmp_path):
    folder = Path(shutil.copytree(study, tmp_path / "out"))
    before = runs.read_json(folder / "scores.json")
    assert app.run(["evaluate", str(folder), "--sampler-steps", "2"]) == 0
    after = runs.read_json(folder / "scores.json")
    assert [row["row"] for row in after["rows"]] == [row["row"] for row in before["rows"]] and after["rows"] != before["rows"]
    assert runs.read_json(folder / "cells" / "dog-s1" / "comparison.json")["sampler"]["steps"] == 2


def test_generate_is_the_same_whatever_the_company(comparison, tiny_model, tmp_path, capfd):
    words = ["generate", "--model", str(tiny_model), "--artifact", str(comparison / "lora" / "artifact"), "--steps", "2"]
    assert app.run([*words, "--prompt", "a cat", "--prompt", "a photo of sks dog in the snow", "--seed", "1", "--count", "3", "--grid",
                    "--output", str(tmp_path / "many")]) == 0
    assert app.run([*words, "--prompt", "a photo of sks dog in the snow", "--seed", "2", "--output", str(tmp_path / "one")]) == 0
    printed = [Path(line).name for line in capfd.readouterr().out.split() if line.endswith(".png")]
    assert printed == ["01-1.png", "01-2.png", "01-3.png", "02-1.png", "02-2.png", "02-3.png", "grid.png", "01-2.png"]
    many, one = Image.open(tmp_path / "many" / "02-2.png"), Image.open(tmp_path / "one" / "01-2.png")
    assert max(abs(a - b) for a, b in zip(many.tobytes(), one.tobytes(), strict=True)) <= 1
    facts = json.loads(many.text["finetune.settings"])
    assert facts["prompt"] == "a photo of sks dog in the snow" and facts["seed"] == 2
    assert [one["strength"] for one in facts["artifacts"]] == [1.0] and facts["steps"] == 2 and facts["guidance"] == 7.5


def test_strength_zero_is_the_base(comparison, tiny_model, tmp_path):
    words = ["generate", "--model", str(tiny_model), "--prompt", "a photo of sks dog", "--steps", "2"]
    assert app.run([*words, "--output", str(tmp_path / "base")]) == 0
    assert app.run([*words, "--artifact", str(comparison / "hypernetwork-key-query" / "artifact"), "--strength", "0",
                    "--output", str(tmp_path / "zero")]) == 0
    assert Image.open(tmp_path / "base" / "01-0.png").tobytes() == Image.open(tmp_path / "zero" / "01-0.png").tobytes()


@pytest.mark.parametrize(("row", "named"), [("textual-inversion", "48 wide"), ("lora", "attn2.to_k"), ("hypernetwork-key-value", "[48]")])
def test_an_artifact_for_another_width_is_refused(comparison, make_model, tmp_path, row, named, capsys):
    other = make_model(width=40)
    assert app.run(["generate", "--model", str(other), "--artifact", str(comparison / row / "artifact"), "--prompt", "x",
                    "--output", str(tmp_path / "pics")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Problem: ") and named in said and not (tmp_path / "pics").exists()


def test_inspect_names_kind_trigger_and_rank(comparison, capfd):
    assert app.run(["inspect", str(comparison / "lora" / "artifact")]) == 0
    said = capfd.readouterr().out
    assert "LoRA, kohya layout" in said and "LoRA, PEFT layout" in said and "sks dog" in said and "rank 16, alpha 16" in said


COMMANDS = {
    "finetune dreambooth --instance-dir photos/ --class-noun dog": {"class_noun": "dog", "prior": "images"},
    "finetune lora --instance-dir photos/ --class-noun dog --rank 16": {"class_noun": "dog", "rank": 16},
    "finetune textual-inversion --instance-dir photos/ --placeholder <my-dog> --initializer dog": {
        "placeholder": "<my-dog>", "initializer": "dog"},
    "finetune hypernetwork --instance-dir photos/ --class-noun dog": {"class_noun": "dog", "transform": "key,value", "scope": "cross"},
}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_work_as_written(line, monkeypatch, tmp_path):
    seen = []

    def pretend(settings, console):
        seen.append(settings)
        runs.write_json(tmp_path / "manifest.json", {"status": "finished"})
        return tmp_path

    monkeypatch.setattr("finetune.training.train", pretend)
    assert app.run(line.split()[1:]) == 0
    assert seen[0].instance_dir == Path("photos/") and seen[0].model == "toybox"
    assert {key: getattr(seen[0], key) for key in COMMANDS[line]} == COMMANDS[line]
