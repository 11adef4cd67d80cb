"""Child processes of a comparison: their errors are shown and kept, interruptions reach them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from finetune.cli import processes


@pytest.fixture()
def child(monkeypatch):
    """Makes `processes.train` run a Python script instead."""

    def use(script: str) -> None:
        monkeypatch.setattr(processes, "command", lambda *words: [sys.executable, "-c", script])

    return use


def test_command_is_this_interpreter():
    assert processes.command("lora", "--recipe", "a.toml", "--resume") == [sys.executable, "-m", "finetune", "lora", "--recipe", "a.toml", "--resume"]


def test_success_says_nothing_and_passes_output_through(child, capfd):
    child("import sys; print('step 1'); print('a warning', file=sys.stderr)")
    assert processes.train("lora", "--recipe", "a.toml") is None
    assert capfd.readouterr().out == "step 1\n"


def test_failure_is_one_line(child, capsys):
    child("import sys; print('noise\\nProblem: No pictures.\\n    Fix: Add some.', file=sys.stderr); sys.exit(2)")
    assert processes.train("lora", "--recipe", "a.toml") == "Problem: No pictures. Fix: Add some."
    assert "    Fix: Add some.\n" in capsys.readouterr().err


def test_a_killed_child_is_named_as_such(child):
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert processes.train("lora", "--recipe", "a.toml") == "no message (killed by signal 9)"


def test_interrupted_child_interrupts_us(child):
    child("raise SystemExit(130)")
    with pytest.raises(KeyboardInterrupt):
        processes.train("lora", "--recipe", "a.toml")


def test_sigterm_is_handed_on_and_waited_for(child, tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    child("import signal, sys, time, pathlib\n"
          f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(130)))\n"
          f"pathlib.Path({str(ready)!r}).touch()\n"
          "time.sleep(60)")

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        processes.train("lora", "--recipe", "a.toml")
    assert saved.exists() and signal.getsignal(signal.SIGTERM) is before
