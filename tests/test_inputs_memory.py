"""Memory that runs out: a refusal with the three settings to change next, in order of effect, with what each saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cli import app, failures, short_of_memory
from finetune.errors import Problem, out_of_memory
from finetune.methods.lora import Settings
from finetune.plan import estimate
from finetune.plan.skeleton import skeleton


def hungry(*arguments: Any) -> Path:
    """What a run without enough memory meets, from torch itself."""
    torch.empty(2**50, dtype=torch.uint8)
    raise AssertionError("a petabyte was given")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_training_names_three_settings_with_the_plans_figures(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    import finetune.training

    plans: list[estimate.Prediction] = []
    predict = estimate.predict
    monkeypatch.setattr(estimate, "predict", lambda settings, base, **more: plans.append(predict(settings, base, **more)) or plans[-1])
    monkeypatch.setattr(finetune.training, "train", hungry)
    given = {"model": str(tiny_model), "resolution": 128, "batch_size": 4, "accumulate": 2, "memory": "fast"}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert app.run(["lora", "--class-noun", "backpack", "--instance-dir", str(pictures_dir), *words, "--output", str(tmp_path / "run")]) == 2
    text = said(capsys)
    assert text.startswith("Problem: Memory ran out: another 1125899.9 GB were asked for.") and "Traceback" not in text
    plan, less = plans
    found = [(name, float(number) * {"M": 1e6, "G": 1e9}[unit]) for name, number, unit in re.findall(r"(--[a-z-]+)[^;(]* \(saves about ([\d.]+) ([MG])B\)", text)]
    assert len(found) == 3 and [value for _, value in found] == sorted((value for _, value in found), reverse=True)
    saves = dict(found)
    assert (plan.batch_size, plan.resolution, plan.rung) == (4, 128, "fast")
    assert saves.get("--gradient-checkpointing", plan.activations - less.activations) == pytest.approx(plan.activations - less.activations, rel=0.02)
    assert saves["--batch-size"] == pytest.approx(plan.activations * 3 / 4, rel=0.02)
    assert saves["--resolution"] == pytest.approx(plan.activations * (1 - 0.5**2), rel=0.02)
    assert "--batch-size 1 --accumulate 8" in text and "--resolution 64" in text


def test_generate_names_what_saves(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.cli import generate

    monkeypatch.setattr(generate, "render_all", hungry)
    assert app.run(["generate", "--model", str(tiny_model), "--prompt", "x", "--batch", "8", "--size", "512", "--output", str(tmp_path)]) == 2
    text = said(capsys)
    numbers = sum(value.numel() for part in skeleton(str(tiny_model)).modules().values() for value in part.parameters())
    assert f"--precision bf16 (saves about {numbers * 2 / 1e6:.0f} MB)" in text and "--batch 1" in text and "--size 384" in text


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
                                   RuntimeError("CUDA out of memory. Tried to allocate 1.5 GiB")])
def test_every_kind_is_known(error: BaseException) -> None:
    assert out_of_memory(error) and not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    found = short_of_memory.problem(None, error)
    assert found.what.startswith("Memory ran out") and found.why and found.fix
    assert ("20.00 MiB" in found.what) == ("20.00" in str(error))
    assert failures.of_system(error).what == "Memory ran out."


def test_advice_that_fails_says_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_of_memory, "training", lambda settings: 1 / 0)
    assert short_of_memory.problem(Settings(class_noun="dog"), MemoryError()).what == "Memory ran out."


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.cli import recipes

    def refuse(settings: Any, console: Any) -> None:
        raise Problem("What.", "Why.", "Fix.")

    monkeypatch.setattr(recipes, "run", refuse)
    assert app.run(["recipes"]) == 2 and said(capsys) == "Problem: What. Why: Why. Fix: Fix."
    monkeypatch.setattr(recipes, "run", lambda settings, console: 1 / 0)
    assert app.run(["recipes"]) == 1
    assert app.run(["recipes", "--debug"]) == 1 and "Traceback" in capsys.readouterr().err
