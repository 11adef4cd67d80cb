"""A study from the command line: which cells, which seeds, what is kept, what fails, how it looks. Processes are pretended."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from study_runs import Pretend

from finetune import runs
from finetune.cli import app, jobs, processes, study
from finetune.cli.compare_settings import CompareSettings
from finetune.cli.subjects import bring, classes, subjects
from finetune.errors import Problem

WORDS = ["compare", "--subjects", "teal-backpack,coral-mug", "--seeds", "2", "--seed", "5", "--methods", "lora,textual-inversion", "--steps", "3"]


@pytest.fixture()
def pretend(monkeypatch):
    return Pretend(monkeypatch)


def run(folder, *more):
    return app.run([*WORDS, *map(str, more), "--output", str(folder)])


def test_a_study_is_a_cell_for_each_subject_and_seed(pretend, tmp_path, capfd):
    assert run(tmp_path) == 0
    told = runs.read_json(tmp_path / "comparison.json")
    assert [(cell["name"], cell["class_noun"], cell["seed"], cell["folder"]) for cell in told["cells"]] == [
        ("teal-backpack-s5", "backpack", 5, "cells/teal-backpack-s5"), ("teal-backpack-s6", "backpack", 6, "cells/teal-backpack-s6"),
        ("coral-mug-s5", "mug", 5, "cells/coral-mug-s5"), ("coral-mug-s6", "mug", 6, "cells/coral-mug-s6")]
    assert [row["row"] for row in told["rows"]] == ["lora", "textual-inversion"] and told["failed"] == []
    assert told["budget"] == {"kind": "steps", "pictures_per_step": 4, "steps": 3} and told["model_hash"] == "0123"
    cell = runs.read_json(tmp_path / "cells" / "coral-mug-s6" / "comparison.json")
    assert (cell["seed"], cell["training_seed"], cell["subject_name"], cell["class_noun"]) == (5, 6, "coral-mug", "mug")
    assert len(cell["instance_files"]) == 5 and all("pictures/coral-mug" in file for file in cell["instance_files"])
    settings = runs.read_json(tmp_path / "cells" / "coral-mug-s6" / "textual-inversion" / "settings.json")
    assert (settings["seed"], settings["placeholder"], settings["initializer"]) == (6, "<my-mug>", "mug")
    scores = runs.read_json(tmp_path / "scores.json")
    assert [row["row"] for row in scores["rows"]] == ["base", "lora", "textual-inversion", "real"] and len(scores["cells"]) == 4
    assert (tmp_path / "report.html").is_file()
    said = capfd.readouterr().out
    assert max(len(line) for line in said.splitlines() if not line.startswith("Report: ")) <= 80


def test_first_seeds_come_first_and_the_base_is_drawn_once_for_each_noun(pretend, tmp_path):
    assert run(tmp_path) == 0
    evaluated = [Path(words[1]).name for words in pretend.calls if words[0] == "evaluate"]
    assert evaluated == ["teal-backpack-s5", "coral-mug-s5", "teal-backpack-s6", "coral-mug-s6"]
    index = Path("base/images/images.json")
    assert runs.read_json(tmp_path / "cells" / "teal-backpack-s6" / index) == {"drawn for": "teal-backpack-s5"}
    assert runs.read_json(tmp_path / "cells" / "coral-mug-s6" / index) == {"drawn for": "coral-mug-s5"}


def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(pretend, tmp_path, capfd):
    pretend.stop_at = 5
    assert run(tmp_path) == 130
    done = len(pretend.calls)
    pretend.stop_at = None
    assert run(tmp_path) == 0
    assert len(pretend.calls) == 12 + 1  # 8 rows and 4 evaluations, one of them begun twice
    assert done == 5 and "Kept: 4 rows and evaluations" in capfd.readouterr().out
    assert run(tmp_path) == 0
    assert len(pretend.calls) == 13 and "Kept: 12 rows and evaluations" in capfd.readouterr().out


def test_another_row_or_a_changed_artifact_is_evaluated_again(pretend, tmp_path):
    assert run(tmp_path) == 0
    runs.write_json(tmp_path / "cells" / "coral-mug-s5" / "lora" / "artifact" / "artifact.json", {"files": ["another"]})
    before = len(pretend.calls)
    assert run(tmp_path) == 0
    assert [words[0] for words in pretend.calls[before:]] == ["evaluate"]
    assert run(tmp_path, "--methods", "lora") == 0
    assert [words[0] for words in pretend.calls[before + 1:]] == ["evaluate"] * 4


def test_a_row_that_fails_is_told_and_the_others_go_on(pretend, tmp_path, capfd):
    pretend.broken = {"lora"}
    assert run(tmp_path) == 1
    told = runs.read_json(tmp_path / "comparison.json")
    assert [row["row"] for row in told["rows"]] == ["textual-inversion"] and len(told["cells"]) == 4
    assert told["failed"] == [{"row": "lora", "title": "LoRA", "method": "lora", "error": "Problem: It broke."}]
    assert [one["cell"] for one in told["missing"]] == ["teal-backpack-s5", "teal-backpack-s6", "coral-mug-s5", "coral-mug-s6"]
    assert "Failed: teal-backpack-s5, lora: Problem: It broke." in capfd.readouterr().out


def test_nothing_trained_is_a_refusal(pretend, tmp_path, capfd):
    pretend.broken = {"lora", "textual-inversion"}
    assert run(tmp_path) == 2
    assert "No row was trained." in capfd.readouterr().err and not (tmp_path / "comparison.json").exists()


def test_pictures_takes_the_first_ones(pretend, tmp_path):
    assert run(tmp_path, "--pictures", 1) == 0
    one = runs.read_json(tmp_path / "cells" / "coral-mug-s5" / "comparison.json")["instance_files"]
    assert [Path(file).name for file in one] == ["1-beach.png"]
    assert run(tmp_path, "--pictures", 7) == 0
    seven = runs.read_json(tmp_path / "cells" / "coral-mug-s5" / "comparison.json")["instance_files"]
    assert len(seven) == 7 and runs.sha256(Path(seven[0])) == runs.sha256(Path(one[0]))


def test_one_subject_of_a_folder_with_several_seeds(pretend, tmp_path, pictures_dir):
    words = ["compare", "--instance-dir", str(pictures_dir), "--class-noun", "dog", "--seeds", "2", "--methods", "lora", "--steps", "2",
             "--pictures", "3", "--output", str(tmp_path)]
    assert app.run(words) == 0
    told = runs.read_json(tmp_path / "comparison.json")
    assert [cell["name"] for cell in told["cells"]] == ["dog-s0", "dog-s1"]
    cell = runs.read_json(tmp_path / "cells" / "dog-s1" / "comparison.json")
    assert len(cell["instance_files"]) == 3 and "subject_name" not in cell


def make_folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(root / name / "1.png")
    return CompareSettings(subjects=str(root))


def nouns(found):
    return {one.name: one.noun for one in found}


def test_nouns_come_from_folder_names_without_their_numbers(tmp_path):
    settings = make_folders(tmp_path, "dog6", "cat", "dog")
    assert nouns(subjects(settings, "sd1")) == {"cat": "cat", "dog": "dog", "dog6": "dog"}


def test_a_name_that_does_not_say_the_noun_is_refused_and_a_table_helps(tmp_path):
    settings = make_folders(tmp_path, "dog", "backpack_dog", "bear-plushie")
    with pytest.raises(Problem, match="backpack_dog, bear-plushie"):
        subjects(settings, "sd1")
    assert set(nouns(subjects(settings.model_copy(update={"class_noun": "toy"}), "sd1")).values()) == {"toy"}
    (tmp_path / "classes.csv").write_text("subject,class\nbackpack_dog,backpack\nbear-plushie, stuffed animal\n", encoding="utf-8")
    assert nouns(subjects(settings, "sd1")) == {"backpack_dog": "backpack", "bear-plushie": "stuffed animal", "dog": "dog"}


def test_dreambench_s_own_list_is_read_up_to_its_prompts(tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nberry_bowl,bowl\nrc_car,toy\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n'a {0} {1}'.format(a, b),\n]\n",
        encoding="utf-8")
    assert classes(tmp_path) == {"berry_bowl": "bowl", "rc_car": "toy"}


@pytest.mark.parametrize(("given", "family", "named"), [
    ({"subjects": "13"}, "toybox", "12 held-out subjects"), ({"subjects": "0"}, "toybox", "12 held-out"),
    ({"subjects": "coral-mag"}, "toybox", "Did you mean 'coral-mug'"), ({"subjects": "coral-mug,coral-mug"}, "toybox", "twice"),
    ({"subjects": "12"}, "sd1", "Name a folder"), ({"subjects": "2", "instance_dir": "x"}, "toybox", "Leave out --instance-dir")])
def test_impossible_subjects_are_refused(given, family, named):
    with pytest.raises(Problem) as caught:
        subjects(CompareSettings(**given), family)
    assert named in str(caught.value)


def test_a_folder_of_pictures_is_not_a_folder_of_subjects(pictures_dir):
    with pytest.raises(Problem, match="--instance-dir"):
        subjects(CompareSettings(subjects=str(pictures_dir)), "sd1")


def test_a_number_is_so_many_of_the_world_s_subjects():
    found = subjects(CompareSettings(subjects="12"), "toybox")
    assert len({one.name for one in found}) == len({one.noun for one in found}) == 12 and all(one.known for one in found)


def test_held_out_styles_are_subjects_too_with_class_pictures_of_their_own(tmp_path):
    settings = CompareSettings(subjects="riso,khaki-teapot", output=tmp_path)
    style, thing = subjects(settings, "toybox")
    assert (style.noun, thing.noun) == ("picture", "teapot") and style.known
    assert bring(style, tmp_path, 3) == tmp_path / "pictures" / "riso" and len(list((tmp_path / "pictures" / "riso").glob("*.txt"))) == 3
    assert study.own_settings(settings, style, tmp_path, 0).class_prompt == "a picture"
    assert study.own_settings(settings, thing, tmp_path, 0).class_prompt is None
    asked = study.own_settings(CompareSettings(subjects="riso", class_prompt="a print", output=tmp_path), style, tmp_path, 0)
    assert asked.class_prompt == "a print"


def test_a_job_is_this_interpreter_with_its_output_in_a_file(tmp_path):
    child = jobs.launch(["--version"], tmp_path / "logs" / "a.log", threads=1)
    assert child.wait() == 0 and (tmp_path / "logs" / "a.log").read_text(encoding="utf-8").startswith("finetune ")


def scripted(monkeypatch, script):
    """Jobs that run a Python script, with the job's title as its argument."""
    def launch(words, log, threads):
        with open(log, "w", encoding="utf-8") as handle:
            return subprocess.Popen([sys.executable, "-S", "-c", script, *words], stdout=handle, stderr=handle, start_new_session=True)

    monkeypatch.setattr(jobs, "launch", launch)


def job(title, tmp_path, done, after=()):
    return jobs.Job(title, title, "cell", lambda: [title], tmp_path / f"{title}.log", lambda trouble: done.append((title, trouble)), list(after))


def test_workers_run_at_once_and_wait_for_what_they_need(monkeypatch, tmp_path):
    scripted(monkeypatch, "import time; time.sleep(0.4)")
    done, seen, at_once = [], [], []
    a, b = job("a", tmp_path, done), job("b", tmp_path, done)
    c = job("c", tmp_path, done, after=[a, b])
    running = set()

    def began(one):
        running.add(one.title)
        at_once.append(set(running))

    def ended(one, trouble, seconds):
        running.discard(one.title)
        seen.append(one.title)

    jobs.run([a, b, c], 2, ended, began)
    assert at_once == [{"a"}, {"a", "b"}, {"c"}] and seen[2] == "c" and all(trouble is None for _, trouble in done)


def test_a_failed_job_says_its_last_words(monkeypatch, tmp_path):
    scripted(monkeypatch, "import sys; print('noise'); print('Problem: No pictures.'); sys.exit(2)")
    done = []
    jobs.run([job("a", tmp_path, done)], 1, lambda *given: None)
    assert done == [("a", "Problem: No pictures.")]


def test_an_interruption_reaches_the_children_and_nothing_new_begins(monkeypatch, tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    scripted(monkeypatch, "import signal, sys, time, pathlib\n"
             f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(130)))\n"
             f"pathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)")
    done = []
    before = signal.getsignal(signal.SIGTERM)

    def began(one):
        while not ready.exists():
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        jobs.run([job("a", tmp_path, done), job("b", tmp_path, done)], 1, lambda *given: None, began)
    assert saved.exists() and done == [] and signal.getsignal(signal.SIGTERM) is before


def test_a_folder_in_which_a_process_still_works_is_refused(tmp_path):
    with processes.locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(Problem, match="Another process works"), processes.locked(tmp_path):
        pass
    child.communicate()
    with processes.locked(tmp_path):
        assert child.returncode == 0
