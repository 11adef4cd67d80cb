"""What a run refuses, in one sentence with the value and the remedy, and what it leaves unharmed when it does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune import methods, runs
from finetune.errors import Problem
from finetune.model import load
from finetune.model.text import add_tokens
from finetune.training import run as run_room
from finetune.training import train


def settings(tiny: Path, pictures: Path, output: Path, name: str = "textual-inversion", **more: Any) -> Any:
    given = {"model": str(tiny), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 1, "steps": 2,
             "output": output, "validate_every": 0, "log_every": 1}
    return methods.get(name).Settings(**(given | more))


def silent() -> Console:
    return Console(file=open(os.devnull, "w"), width=80)  # noqa: SIM115 - lives as long as the console


def test_a_finished_run_is_not_written_over(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    before = runs.sha256(folder / "manifest.json")
    with pytest.raises(Problem, match=r"There is a run in .*run already.*--resume, or clear it with --overwrite"):
        train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    assert runs.sha256(folder / "manifest.json") == before
    train(settings(tiny_model, pictures_dir, tmp_path / "run", overwrite=True, seed=3), silent())
    assert runs.read_json(folder / "settings.json")["seed"] == 3
    assert [line["step"] for line in runs.read_metrics(folder)] == [1, 2]


def test_resume_needs_a_run_a_checkpoint_and_the_same_settings(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"There is no run in .* to resume"):
        train(settings(tiny_model, pictures_dir, tmp_path / "none", resume=True), silent())
    train(settings(tiny_model, pictures_dir, tmp_path / "plain"), silent())
    with pytest.raises(Problem, match=r"no complete checkpoint in .*plain"):
        train(settings(tiny_model, pictures_dir, tmp_path / "plain", resume=True), silent())
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "kept", checkpoint_every=1), silent())
    with pytest.raises(Problem, match=r"other settings.*learning_rate \(was 0.005, is 0.5\)"):
        train(settings(tiny_model, pictures_dir, tmp_path / "kept", checkpoint_every=1, resume=True, learning_rate=0.5), silent())
    damaged = next((folder / "checkpoints").glob("*/trained.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(Problem, match=r"trained.safetensors is damaged.*SHA-256"):
        train(settings(tiny_model, pictures_dir, tmp_path / "kept", checkpoint_every=1, resume=True), silent())


def test_more_steps_continue_the_same_run(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """With a constant rate, 2 steps and then 2 more are the 4 steps of one run, to the byte."""
    more = {"checkpoint_every": 1, "schedule": "constant"}
    train(settings(tiny_model, pictures_dir, tmp_path / "a", **more), silent())
    train(settings(tiny_model, pictures_dir, tmp_path / "a", steps=4, resume=True, **more), silent())
    train(settings(tiny_model, pictures_dir, tmp_path / "b", steps=4, **more), silent())
    name = "learned_embeds.safetensors"
    assert torch.equal(*(torch_rows(tmp_path / run / "artifact" / name) for run in "ab"))


def torch_rows(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return next(iter(load_file(path).values()))


def test_a_signal_ends_after_the_step_with_a_checkpoint(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_room.fit

    def interrupted(*arguments: Any) -> Any:
        for progress in real(*arguments):
            if progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield progress

    whole = train(settings(tiny_model, pictures_dir, tmp_path / "whole", steps=4), silent())
    monkeypatch.setattr(run_room, "fit", interrupted)
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "cut", steps=4), silent())
    assert runs.read_json(folder / "manifest.json")["status"] == "interrupted"
    assert runs.read_json(folder / "manifest.json")["step"] == 2
    monkeypatch.setattr(run_room, "fit", real)
    train(settings(tiny_model, pictures_dir, tmp_path / "cut", steps=4, resume=True), silent())
    assert torch.equal(torch_rows(folder / "artifact" / "learned_embeds.safetensors"), torch_rows(whole / "artifact" / "learned_embeds.safetensors"))


def test_a_loss_that_is_no_number_stops_before_the_optimizer(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training import loop

    real, calls = loop.loss_of, []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(loop, "loss_of", broken)
    with pytest.raises(Problem, match=r"The loss at step 2 is not a finite number\. The pictures were picture-\d\.png"):
        train(settings(tiny_model, pictures_dir, tmp_path / "run", steps=4), silent())
    manifest = runs.read_json(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "failed" and "step 2" in manifest["reason"]


@pytest.mark.parametrize(("more", "words"), [
    ({"precision": "fp16"}, r"--precision fp16 needs a GPU.*--precision fp32 or bf16"),
    ({"device": "cuda"}, r"The device 'cuda' is not on this machine.*--device cpu"),
    ({"device": "tpu9"}, r"There is no device 'tpu9'"),
    ({"placeholder": "backpack"}, r"The placeholder 'backpack' is already a word.*Choose another"),
    ({"placeholder": "<my dog>"}, r"contains a space.*Use a dash"),
    ({"subject": "a thing"}, r"'a thing' does not contain the placeholder '<my-backpack>'"),
    ({"prior": "images"}, r"--prior images is of no use to Textual Inversion"),
    ({"class_noun": None}, r"Neither --initializer nor --class-noun"),
    ({"model": "nowhere/at/all"}, r"There is no base model at 'nowhere/at/all'"),
    ({"model": "owner/nothing-here"}, r"The hub model 'owner/nothing-here' is not in the local cache.*HF_HUB_OFFLINE"),
    ({"optimizer": "adamw8bit"}, r"needs the package bitsandbytes.*pip install"),
])
def test_refusals(more: dict[str, Any], words: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    if more.get("device") == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Problem, match=words):
        train(settings(tiny_model, pictures_dir, tmp_path / "run", **more), silent())


def test_incomplete_and_foreign_models_are_named(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "vae")
    with pytest.raises(Problem, match=r"lacks vae"):
        load(str(tmp_path / "half"))
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Problem, match=r"The model .*cut cannot be loaded"):
        load(str(tmp_path / "cut"))


def test_a_learned_word_is_not_overwritten(tiny_model: Path) -> None:
    base = load(str(tiny_model))
    add_tokens(base, "<one>", torch.zeros(2, 48))
    for taken in ("<one>", "<one>_1", "backpack"):
        with pytest.raises(Problem, match=rf"'{taken}' is already a word of this model.*Choose another"):
            add_tokens(base, taken, torch.zeros(1, 48))
