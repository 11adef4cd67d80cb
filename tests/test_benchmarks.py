"""The benchmark scripts run: each on a tiny random base for a step or two, its table and its JSON as promised."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, pictures_dir: Path) -> Run:
    """`script("loop", "--rounds", "2")` runs benchmarks/loop.py on the tiny base in this process; returns its JSON."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *flags: str, trains: bool = True) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        base = ["--model", str(tiny_model), "--pictures", str(pictures_dir), "--resolution", "32"] if trains else []
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--json", str(out), "--cache", str(tmp_path / "cache"), *base, *flags])
        importlib.import_module(name).main()
        return json.loads(out.read_text())

    return run


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of finetune for a benchmark without a child process, whose imports would take seconds each."""
    steps = importlib.import_module("steps")
    monkeypatch.setattr(steps, "of_child", lambda method, values, warm=1, env=None: steps.run_steps(method, values, warm))


def test_pair_takes_seconds_per_step_from_the_difference(script: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def busy(share: float) -> str:
        return f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.05 + {share} * {{steps}}: pass'"

    found = script("pair", "--a", busy(0.05), "--b", busy(0.15), "--short", "1", "--long", "3", trains=False)
    assert found["a"]["per_step"] == pytest.approx([0.05, 0.05], abs=0.03) and found["b"]["per_step"] == pytest.approx([0.15, 0.15], abs=0.03)
    assert 1.5 < found["ratio"]["median"] < 7
    assert found["a"]["peak_bytes"] > 1e6 and found["machine"]["cores"] >= 1
    assert "s/step" in capsys.readouterr().out


def test_pair_in_turns_finds_the_same(script: Run) -> None:
    command = f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.05 + 0.1 * {{steps}}: pass'"
    found = script("pair", "--a", command, "--b", command, "--short", "1", "--long", "2", "--slice", "0.03", trains=False)
    assert 0.5 < found["ratio"]["median"] < 2


def test_a_command_that_fails_ends_the_pair_with_its_words(script: Run) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        script("pair", "--a", f"{sys.executable} -S -c 'raise SystemExit(\"no such thing {{steps}}\")'", "--b", "sleep 60", "--slice", "0.2",
               "--short", "1", "--long", "2", trains=False)


def test_floor_of_every_method(script: Run, tmp_path: Path, tiny_model: Path) -> None:
    found = script("floor", "--steps", "1", "--warm", "0", "--profile")["methods"]
    assert set(found) == {"lora", "textual-inversion", "hypernetwork", "full"}
    assert all(one["median"] > 0 and len(one["operators"]) == 8 for one in found.values())


def test_loop_over_its_floor(script: Run) -> None:
    found = script("loop", "--methods", "lora,textual-inversion", "--rounds", "2", "--block", "1")["methods"]
    assert all(len(one["loop"]["all"]) == 2 and one["ratio"]["median"] > 0 for one in found.values())


def test_switches_by_themselves(script: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    in_this_process(monkeypatch)
    found = script("switches", "--only", "checkpointing,frozen_bf16", "--steps", "2", "--rounds", "1")["switches"]
    assert found["checkpointing"]["loss_difference"] == 0 and found["frozen_bf16"]["loss_difference"] > 0
    assert all(one["gain"]["median"] > 0 for one in found.values())


def test_memory_of_the_rungs(script: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    in_this_process(monkeypatch)
    found = script("memory", "--methods", "lora", "--rungs", "fast,low", "--steps", "2")["runs"]
    assert found.keys() == {"lora fast", "lora low"} and all(one["peak_bytes"] > 1e8 and one["per_step"] > 0 for one in found.values())


def test_startup_of_a_peer_ends_at_its_sign(script: Run) -> None:
    peer = f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.1: pass\nprint(\"Steps: 0\", flush=True)\ntime.sleep(9)'"
    found = script("startup", "--only", "python", "--rounds", "1", "--peer", f"python of another={peer}", trains=False)["results"]
    assert found.keys() == {"imports: python", "python of another"}
    assert found["imports: python"]["median"] < found["python of another"]["median"] < 1


def test_a_run_is_ended_from_inside_without_an_artifact(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, pictures_dir: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.import_module("steps").run_steps("hypernetwork", {"model": str(tiny_model), "instance_dir": str(pictures_dir), "class_noun": "box",
                                                                        "resolution": 32, "steps": 2}, 1)
    assert len(found["steps"]) == 1 and len(found["losses"]) == 2 and found["steps"][0]["cpu"] > 0


def test_random_bases_have_the_stated_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    from finetune.model.base import load

    base = load(str(common.model_folder("tiny", tmp_path)))
    assert sum(value.numel() for value in base.unet.parameters()) == 792_964 and base.resolution == common.NATIVE["tiny"]
    assert common.ratio([2.0, 4.0], [1.0, 1.0]) == {"median": 3.0, "least": 2.0, "most": 4.0}


def test_plan_against_a_run(script: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    in_this_process(monkeypatch)
    found = script("plan", "--methods", "lora", "--rungs", "fast")["runs"]
    assert all(one["ratio"] == one["planned_bytes"] / one["measured_bytes"] > 0.1 for one in found.values()) and len(found) == 1


def test_rates_of_kernels(script: Run) -> None:
    found = script("kernels", "--few", "--repeats", "1", trains=False)["gigaflops"]
    assert len(found) == 3 and all(rate > 0 for one in found.values() for rate in one.values())
