"""Exit codes and wording of refusals, usage errors, interruptions and surprises."""

from __future__ import annotations

import pytest

from finetune.cli import app, failures
from finetune.errors import Problem


def test_problem_is_wrapped_and_aligned(capsys):
    long = "The value 7 is out of reach because " + "of this and that " * 8 + "in the end."
    assert failures.tell(Problem("Rank 7 is wrong.", long, "Use 8."), debug=False) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Problem: Rank 7 is wrong."
    assert lines[1].startswith("    Why: The value 7") and lines[-1] == "    Fix: Use 8."
    assert all(line.startswith(" " * 9) for line in lines[2:-1]) and max(map(len, lines)) <= 80


def test_empty_parts_are_left_out(capsys):
    failures.tell(Problem("What.", "", "Fix."), debug=False)
    assert capsys.readouterr().err == "Problem: What.\n    Fix: Fix.\n"


def test_surprise_names_type_message_and_debug(capsys):
    assert failures.tell(ZeroDivisionError("division by zero"), debug=False) == 1
    assert capsys.readouterr().err == ("Error: ZeroDivisionError: division by zero\n"
                                       "  Fix: Run the same command again with --debug to see where it happened.\n")


def test_interruption_is_one_line(capsys):
    assert failures.tell(KeyboardInterrupt(), debug=False) == 130
    assert capsys.readouterr().err == "Stopped: interrupted.\n"


def test_interruption_inside_a_verb(capsys, monkeypatch):
    from finetune.cli import recipes

    def interrupted(settings, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "run", interrupted)
    assert app.run(["recipes"]) == 130
    assert capsys.readouterr().err == "Stopped: interrupted.\n"


@pytest.mark.parametrize(("words", "what", "why"), [
    (["comprae"], "There is no command 'comprae'.", "Did you mean 'compare'?"),
    (["generate", "--stregth", "1"], "finetune generate has no option --stregth.", "Did you mean '--strength'?"),
    (["generate", "--sampler", "ddom", "--prompt", "x"], "--sampler: 'ddom' is not one of", ""),
    (["generate", "--count", "many"], "--count: Input should be a valid integer", ""),
    (["generate", "--prompt", "x", "--count", "0"], "--count does not accept 0.", "greater than or equal to 1"),
    (["generate", "--prompt"], "requires an argument", ""),
    (["recipes", "shwo"], "ACTION: 'shwo' is not one of 'list', 'show', 'copy'.", ""),
    (["recipes", "show", "no-such"], "There is no packaged recipe 'no-such'.", ""),
    (["report"], "Missing argument 'FOLDER'.", ""),
    (["inspect", "nowhere.safetensors"], "There is no file or folder nowhere.safetensors.", ""),
    (["generate"], "No prompt was given.", "nothing to render"),
    (["generate", "--prompt", "x", "--strength", "1"], "1 strengths were given for 0 artifacts.", ""),
    (["compare"], "No class noun was given.", ""),
    (["compare", "--class-noun", "dog", "--methods", "lroa"], "There is no method 'lroa' for --methods.", "Did you mean 'lora'?"),
    (["compare", "--class-noun", "dog", "--methods", "lora,lora"], "--methods names 'lora' twice.", ""),
    (["compare", "--class-noun", "dog", "--methods", "lora:key"], "'lora:key': lora has no wiring.", ""),
    (["compare", "--class-noun", "dog", "--methods", ","], "--methods ',' names no method.", ""),
])
def test_refusals_name_the_value_and_the_remedy(words, what, why, capsys):
    assert app.run(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert what in said and why in said and ("Fix: " in said or "Why: " in said)
