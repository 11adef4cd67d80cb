"""Tokens and passwords stay out of what is kept and shown: manifests, settings, metadata, reasons, cards, reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from report_fixture import edit, write_comparison
from rich.console import Console

from finetune import methods, report, runs
from finetune.cli import failures, hub, processes
from finetune.errors import Problem
from finetune.training import train
from finetune.training.records import finish_on_failure

TOKEN, PASSWORD, KEY = "hf_" + "abcDEF123456" * 2, "pa55w0rd-of-mine", "0123456789abcdef0123"


@pytest.mark.parametrize(("text", "left"), [
    (f"--token {TOKEN}", "--token (hidden)"), (f"401 for {TOKEN}: no", "401 for (hidden): no"),
    (f"https://me:{PASSWORD}@example.com/x", "https://(hidden)@example.com/x"), (f"git+ssh://{PASSWORD}@host/x", "git+ssh://(hidden)@host/x"),
    (f"https://example.com/m?token={KEY}&n=1", "https://example.com/m?token=(hidden)&n=1"),
    (f"https://s3.example.com/m?X-Amz-Signature={KEY}", "https://s3.example.com/m?X-Amz-Signature=(hidden)"),
    (f"Authorization: Bearer {KEY}", "Authorization: Bearer (hidden)"), (f"HF_TOKEN={KEY} finetune", "HF_TOKEN=(hidden) finetune"),
    (f"{{'api_key': '{KEY}'}}", "{'api_key': '(hidden)'}"), (f"password: {PASSWORD}", "password: (hidden)"),
    (f"ghp_{KEY}{KEY}", "(hidden)"), (f"github_pat_{KEY}", "(hidden)"), (f"AKIA{'ABCD' * 4}", "(hidden)"),
])
def test_hidden(text: str, left: str):
    assert runs.hide(text) == left


@pytest.mark.parametrize("text", [
    "a photo of a sks dog in the snow", "the tokenizer has 49,408 words", "the prompt is longer than 77 tokens", "https://example.com/a@b",
    "sks-backpack.safetensors", "/home/me/pictures", "hf_hub", "stable-diffusion-v1-5/stable-diffusion-v1-5", "learning_rate = 0.1", "<my-token>"])
def test_left_alone(text: str):
    assert runs.hide(text) == text and runs.hide(text, assigned=False) == text


def test_prompts_may_say_secret():
    prompt = {"prompt": ["a sign that reads password: 1234", "token=ring"], "model": f"https://me:{PASSWORD}@host/x", "rank": 4}
    assert runs.hide_in(prompt) == {**prompt, "model": "https://(hidden)@host/x"}


def test_a_command_line():
    words = ["finetune", "lora", "--hf-token", KEY, "--steps", "4", f"--api-key={KEY}", "--token", "--resume", f"--model=https://u:{PASSWORD}@h/m"]
    assert runs.hide_in_command(words) == ("finetune lora --hf-token (hidden) --steps 4 --api-key=(hidden) --token --resume --model=https://(hidden)@h/m")


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_SERVICE_SECRET", "words that nobody marks")
    monkeypatch.setenv("HARMLESS", "snow on a mountain")
    assert runs.hide("it said: words that nobody marks, snow on a mountain") == "it said: (hidden), snow on a mountain"


def test_a_whole_run_keeps_none(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Command line, environment, model name, settings, card: none of the files of the run, and nothing of its output, has them."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["finetune", "lora", "--token", KEY, f"--dataset=https://me:{PASSWORD}@example.com/d"])
    model = tmp_path / f"{TOKEN}-base"
    model.symlink_to(tiny_model, target_is_directory=True)
    with (tmp_path / "said").open("w") as said:
        settings = methods.get("lora").Settings(model=str(model), instance_dir=pictures_dir, class_noun="backpack", resolution=32, steps=1, rank=2,
                                                output=tmp_path / "run", validate_every=0, log_every=1, checkpoint_every=1, dataset_split=TOKEN)
        folder = train(settings, Console(file=said, width=80))
    hub.write_card(folder, tmp_path / "card" / "README.md")
    found = [str(path) for path in [*folder.rglob("*"), *(tmp_path / "card").rglob("*")] if path.is_file()
             and any(secret.encode() in path.read_bytes() for secret in (TOKEN, PASSWORD, KEY))]
    assert found == []
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["command"] == "finetune lora --token (hidden) --dataset=https://(hidden)@example.com/d"
    assert runs.read_json(folder / "settings.json")["dataset_split"] == "(hidden)"


def test_reasons_of_failures(tmp_path: Path):
    with pytest.raises(Problem), finish_on_failure(tmp_path, {}, writes=True):
        raise Problem(f"https://me:{PASSWORD}@example.com refused {TOKEN}.", "No.", "Log in.")
    assert runs.read_json(tmp_path / "manifest.json") == {"status": "failed", "reason": "https://(hidden)@example.com refused (hidden). No. Log in."}
    assert processes.last_words(["Problem: no", f"  token {TOKEN}"], 2) == "Problem: no token (hidden)"
    assert processes.last_words([f"Bearer {KEY}"], 1) == "Bearer (hidden) (exit code 1)"


def test_reports_of_older_runs(tmp_path: Path):
    folder = write_comparison(tmp_path / "out", rows=["lora"], prompts={"subject": ["a {}"], "class": [], "other": []})
    edit(folder / "lora" / "manifest.json", lambda told: told.update(command=f"finetune compare --token {TOKEN} --model https://me:{PASSWORD}@example.com/x"))
    edit(folder / "lora" / "settings.json", lambda told: told.update(dataset=f"https://me:{PASSWORD}@example.com/d", note=TOKEN))
    report.write(folder)
    for name in ("report.html", "report.json", "table.md", "table.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        assert TOKEN not in text and PASSWORD not in text, name


@pytest.mark.parametrize("debug", [False, True])
def test_what_is_said_when_something_fails(capfd: pytest.CaptureFixture[str], debug: bool):
    try:
        raise Problem(f"https://me:{PASSWORD}@example.com answered 401 to {TOKEN}.", f"Authorization: Bearer {KEY} is no longer good.", "Log in.")
    except Problem as error:
        assert failures.tell(error, debug) == failures.REFUSED
    said = capfd.readouterr().err
    assert "Log in." in said and "(hidden)" in said and not [secret for secret in (PASSWORD, TOKEN, KEY) if secret in said]
    assert ("Traceback" in said) == debug
