"""Resume is exact: a run that was stopped by a signal and went on leaves the same bytes as one that was not.

The whole matrix (methods, optimizers, prior, EMA, accumulation, one and two processes) is `pytest -m slow` of this file;
by default a few cells of it run in which every value occurs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from finetune import methods, runs
from finetune.errors import Problem
from finetune.training import run, train

STEPS = 5
OWN: dict[str, dict[str, Any]] = {
    "dreambooth": {"learning_rate": 1e-3, "train_text_encoder": True},
    "textual-inversion": {"placeholder": "<my-box>", "vectors": 2, "learning_rate": 1e-2},
    "lora": {"rank": 4, "text_encoder_rank": 2, "learning_rate": 1e-2},
    "hypernetwork": {"learning_rate": 1e-3, "dropout": 0.2},
}
PRIORS = {"dreambooth": ("images", "distill", "none"), "textual-inversion": ("none",), "lora": ("images", "none"), "hypernetwork": ("images", "none")}
EVERY = [(name, optimizer, prior, ema, accumulate) for name in OWN for optimizer, prior, accumulate in product(("adamw", "adamw8bit"), PRIORS[name], (1, 4))
         for ema in ((0.0, 0.9) if name == "dreambooth" else (0.0,))]
FEW = [("dreambooth", "adamw8bit", "images", 0.9, 4), ("textual-inversion", "adamw8bit", "none", 0.0, 4), ("lora", "adamw8bit", "images", 0.0, 1),
       ("hypernetwork", "adamw", "none", 0.0, 4)]


def silent() -> Console:
    return Console(file=open(os.devnull, "w"), width=80)  # noqa: SIM115 - lives as long as the console


def given(case: tuple[str, str, str, float, int], model: Path, pictures: Path, **more: Any) -> dict[str, Any]:
    """Settings of a cell of the matrix, method included."""
    name, optimizer, prior, ema, accumulate = case
    found = {"method": name, "model": str(model), "instance_dir": str(pictures), "class_noun": "backpack", "resolution": 32, "batch_size": 1, "steps": STEPS,
             "export_dtype": "fp32", "validate_every": 0, "log_every": 1, "optimizer": optimizer, "prior": prior, "accumulate": accumulate, "class_images": 2,
             "class_steps": 1, "flip": True, "caption_dropout": 0.2, **OWN[name], **({"ema_decay": ema} if ema else {})}
    return found | more


def trained(settings: dict[str, Any], output: Path, **more: Any) -> Path:
    method = methods.get(settings["method"])
    return train(method.Settings(**{key: value for key, value in settings.items() if key != "method"}, output=output, **more), silent())


def left(folder: Path) -> dict[str, Any]:
    """All that a run says and holds, but for times: hashes of its artifact and previews, every number of its metrics."""
    files = {str(path.relative_to(folder)): runs.sha256(path) for part in ("artifact", "previews") for path in sorted((folder / part).rglob("*")) if path.is_file()}
    lines = [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in runs.read_metrics(folder)]
    return {"files": files, "metrics": lines}


def stopped_and_resumed(settings: dict[str, Any], folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.fit

    def stops(*arguments: Any) -> Any:
        for progress in real(*arguments):
            yield progress
            if progress.step == after:
                os.kill(os.getpid(), signal.SIGINT if after % 2 else signal.SIGTERM)

    monkeypatch.setattr(run, "fit", stops)
    trained(settings, folder)
    assert runs.read_json(folder / "manifest.json")["status"] == "interrupted"
    monkeypatch.setattr(run, "fit", real)
    trained(settings, folder, resume=True)


def same_bytes(case: tuple[str, str, str, float, int], model: Path, pictures: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    settings = given(case, model, pictures, **more)
    whole = left(trained(settings, folder / "whole"))
    stopped_and_resumed(settings, folder / "stopped", 1 + EVERY.index(case) % (STEPS - 2), monkeypatch)
    assert left(folder / "stopped") == whole


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_resumed_is_uninterrupted(case: Any, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_bytes(case, tiny_model, pictures_dir, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(map(str, case)))
def test_resumed_is_uninterrupted_everywhere(case: Any, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_bytes(case, tiny_model, pictures_dir, tmp_path, monkeypatch, validate_every=2, preview_every=3)


def two_processes(cases: list[Any], model: Path, pictures: Path, folder: Path, **more: Any) -> None:
    """Run tests/two_processes.py under torchrun on the cases, each in FOLDER/its-name."""
    told = {"folder": str(folder), "stop": 2, "cases": {"-".join(map(str, case)): given(case, model, pictures, **more) for case in cases}}
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    script = Path(__file__).with_name("two_processes.py")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder / "told.json"],
                   check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_resume_and_learn_what_one_learns(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """A signal to one of two stops both, what goes on gives the same bytes, and two with batch 1 learn what one learns with batch 2."""
    case = ("lora", "adamw", "images", 0.0, 1)
    two_processes([case], tiny_model, pictures_dir, tmp_path)
    folder = tmp_path / "-".join(map(str, case))
    assert (folder / "status").read_text() == "interrupted"
    assert left(folder / "stopped") == left(folder / "whole")
    assert runs.read_json(folder / "whole" / "manifest.json")["processes"] == 2
    one = trained(given(case, tiny_model, pictures_dir, batch_size=2), tmp_path / "one")
    mine, theirs = (load_file(path / "artifact" / "pytorch_lora_weights.safetensors") for path in (one, folder / "whole"))
    start = trained(given(case, tiny_model, pictures_dir, batch_size=2, learning_rate=1e-12), tmp_path / "start")
    first = load_file(start / "artifact" / "pytorch_lora_weights.safetensors")
    moved = max((mine[name] - first[name]).abs().max() for name in mine)
    apart = max((mine[name] - theirs[name]).abs().max() for name in mine)
    assert apart < 0.02 * moved, (apart, moved)
    with pytest.raises(Problem, match=r"processes \(was 2, is 1\)"):
        trained(given(case, tiny_model, pictures_dir), folder / "stopped", resume=True)


@pytest.mark.slow
def test_two_processes_everywhere(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    two_processes(EVERY, tiny_model, pictures_dir, tmp_path)
    for case in EVERY:
        folder = tmp_path / "-".join(map(str, case))
        assert left(folder / "stopped") == left(folder / "whole"), case


def test_other_settings_are_refused_listed_and_let_pass_on_request(tiny_model: Path, make_model: Any, pictures_dir: Path, tmp_path: Path) -> None:
    settings = given(("lora", "adamw", "none", 0.0, 1), tiny_model, pictures_dir, checkpoint_every=2)
    folder = trained(settings, tmp_path / "run")
    before = {name: runs.sha256(folder / name) for name in ("settings.json", "manifest.json", "metrics.jsonl")}

    def again(**more: Any) -> Path:
        return trained(settings | {"steps": STEPS + 1} | more, folder, resume=True)

    with pytest.raises(Problem, match=r"learning_rate \(was 0.01, is 0.02\); flip \(was True, is False\)|flip .*learning_rate .*--resume-anyway"):
        again(learning_rate=0.02, flip=False)
    with pytest.raises(Problem, match=r"model_hash \(was .*start a new run") as caught:
        again(model=str(make_model(seed=5)))
    assert "--resume-anyway" not in caught.value.fix
    with pytest.raises(Problem, match=r"model_hash .*not even|not even.*model_hash"):
        again(model=str(make_model(seed=5)), resume_anyway=True)
    with pytest.raises(Problem, match=r"does not fit this run.*tensors are missing or of another shape"):
        again(rank=8, resume_anyway=True)
    assert {name: runs.sha256(folder / name) for name in ("metrics.jsonl",)} == {"metrics.jsonl": before["metrics.jsonl"]}
    again(learning_rate=0.02, flip=False, resume_anyway=True)
    told = runs.read_json(folder / "manifest.json")
    assert told["steps"] == STEPS + 1 and len(told["resumed_under_other_settings"]) == 2
    assert [line["step"] for line in runs.read_metrics(folder) if "loss" in line] == list(range(1, STEPS + 2))


def test_other_pictures_are_other_settings(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pictures_dir, tmp_path / "pictures")
    settings = given(("textual-inversion", "adamw", "none", 0.0, 1), tiny_model, tmp_path / "pictures", checkpoint_every=2)
    trained(settings, tmp_path / "run")
    next((tmp_path / "pictures").glob("*.png")).unlink()
    with pytest.raises(Problem, match=r"pictures \(was '4 of SHA-256 \w+', is '3 of"):
        trained(settings, tmp_path / "run", resume=True)


def test_a_run_that_kept_checkpoints_keeps_its_last_and_can_keep_none(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    settings = given(("textual-inversion", "adamw", "none", 0.0, 1), tiny_model, pictures_dir)
    kept = trained(settings, tmp_path / "kept", checkpoint_every=2)
    assert [path.name for path in (kept / "checkpoints").iterdir()] == [f"{STEPS:07d}"]
    assert not (trained(settings, tmp_path / "none", checkpoint_every=2, keep_checkpoints=0) / "checkpoints").exists()
    short = trained(settings, tmp_path / "short")
    with pytest.raises(Problem, match=r"no complete checkpoint.*--checkpoint-every.*--overwrite"):
        trained(settings, short, resume=True)


def test_a_signal_after_the_last_step_changes_nothing(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(("textual-inversion", "adamw", "none", 0.0, 1), tiny_model, pictures_dir)
    real = run.fit

    def stops(*arguments: Any) -> Any:
        for progress in real(*arguments):
            yield progress if progress.step < STEPS else (os.kill(os.getpid(), signal.SIGTERM), progress)[1]

    whole = left(trained(settings, tmp_path / "whole"))
    monkeypatch.setattr(run, "fit", stops)
    assert left(trained(settings, tmp_path / "signalled")) == whole
    assert runs.read_json(tmp_path / "signalled" / "manifest.json")["status"] == "finished"


def test_a_manifest_that_lists_no_hashes_is_not_believed(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    settings = given(("textual-inversion", "adamw", "none", 0.0, 1), tiny_model, pictures_dir, checkpoint_every=2)
    folder = trained(settings, tmp_path / "run")
    told = next((folder / "checkpoints").glob("*/manifest.json"))
    runs.write_json(told, runs.read_json(told) | {"files": {}})
    with pytest.raises(Problem, match=r"trained\.safetensors is damaged"):
        trained(settings | {"steps": STEPS + 1}, folder, resume=True)
