"""What a fresh process imports and says: help is instant, third parties are quiet, failures have their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib", "numpy")
PROBE = """
import atexit, json, sys
atexit.register(lambda: print("MODULES", json.dumps([name for name in {heavy!r} if name in sys.modules])))
sys.argv = ["finetune", *{words!r}]
from finetune.cli import main
main()
"""


def start(*words: str, cwd: Path | None = None, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    return subprocess.run([sys.executable, "-m", "finetune", *words], capture_output=True, text=True, env=environment, cwd=cwd or ROOT)


def heavy_modules(*words: str) -> list[str]:
    code = PROBE.format(heavy=HEAVY, words=list(words))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("MODULES ")[2])


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("recipes",), ("generate", "--help"), ("inspect", "--help"),
                                   ("report", "--help"), ("compare", "--help"), ("evaluate", "--help")])
def test_help_imports_nothing_heavy(words):
    assert heavy_modules(*words) == []


def test_inspect_of_weights_imports_nothing_heavy(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "sks.safetensors"
    save_file({"emb_params": torch.zeros(1, 768)}, path, metadata={"finetune.trigger": "<sks>"})
    assert heavy_modules("inspect", str(path)) == []


def test_help_fits_the_terminal_and_names_every_verb():
    done = start("--help")
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for verb in ("dreambooth", "textual-inversion", "lora", "hypernetwork", "compare", "evaluate", "report", "generate", "inspect",
                 "recipes", "pretrain"):
        assert f"│ {verb} " in done.stdout


def test_refusal_is_one_block_on_stderr(tmp_path):
    done = start("lora", "--instance-dir", "no-such-folder", "--class-noun", "dog", "--output", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Problem: ") and "no-such-folder" in done.stderr and "Traceback" not in done.stderr
    assert all(len(line) <= 80 for line in done.stderr.splitlines())


def test_debug_shows_the_traceback():
    done = start("report", "no-such-folder", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "Problem: no-such-folder is not a comparison." in done.stderr
