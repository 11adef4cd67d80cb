"""The loss on the fixed set, ending when it has settled, and artifacts along the way: for every method."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from finetune import methods, runs
from finetune.errors import Problem
from finetune.methods.base import Method
from finetune.training import run as run_room
from finetune.training import stopping, train

OWN: dict[str, dict[str, Any]] = {
    "dreambooth": {"prior": "none", "learning_rate": 1e-3, "ema_decay": 0.9},
    "textual-inversion": {"placeholder": "<my-box>", "learning_rate": 1e-2},
    "lora": {"rank": 2, "learning_rate": 1e-2, "dropout": 0.2},
    "hypernetwork": {"learning_rate": 1e-2, "dropout": 0.3},
}


def settings(name: str, model: Path, pictures: Path, output: Path, **more: Any) -> Any:
    given = {"model": str(model), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 2, "steps": 4,
             "output": output, "export_dtype": "fp32", "validate_every": 2, "log_every": 4, "checkpoint_every": 0}
    return methods.get(name).Settings(**(given | OWN[name] | more))


def silent() -> Console:
    return Console(file=open(os.devnull, "w"), width=80)  # noqa: SIM115 - lives as long as the console


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in runs.read_metrics(folder) if "validation_loss" in line]


def hashes(artifact: Path) -> dict[str, str]:
    return {entry["file"]: entry["sha256"] for entry in runs.read_json(artifact / "artifact.json")["files"]}


def crash_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the next run die right after a step; returns the real loop."""
    real = run_room.fit

    def dies(*arguments: Any) -> Any:
        for progress in real(*arguments):
            yield progress
            if progress.step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr(run_room, "fit", dies)
    return real


@pytest.fixture(scope="module")
def runs_of(tiny_model: Path, pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method with checkpoints and artifacts at every second step, and what the fixed set showed it (`SEEN`)."""
    root = tmp_path_factory.mktemp("selection")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in OWN:
            SEEN[name] = []
            patch.setattr(run_room, "validation_loss", watching(SEEN[name]))
            found[name] = train(settings(name, tiny_model, pictures_dir, root / name, checkpoint_every=2, export_every=2), silent())
    return found


SEEN: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
REAL = run_room.validation_loss


def watching(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`validation_loss`, noting the noisy latents and timesteps that the method is asked about."""
    def watched(base: Any, method: Method, source: Any, settings: Any) -> float:
        with pytest.MonkeyPatch.context() as patch:
            asked = method.denoise
            patch.setattr(method, "denoise", lambda base, noisy, timesteps, cond: (
                seen.append((noisy.clone(), timesteps.clone())), asked(base, noisy, timesteps, cond))[1])
            return REAL(base, method, source, settings)

    return watched


# -- the loss on the fixed set -------------------------------------------------------------------------------------------


def test_all_methods_are_asked_about_the_same_pictures_noises_and_timesteps(runs_of: dict[str, Path]) -> None:
    looks, batches = 3, 8  # steps 0, 2, 4; sixteen rows in pairs
    first = SEEN["dreambooth"]
    assert len(first) == looks * batches and len({int(step) for _, steps in first for step in steps}) == 16
    for name, seen in SEEN.items():
        assert len(seen) == looks * batches, name
        for place, (noisy, timesteps) in enumerate(seen):
            assert torch.equal(noisy, first[place % batches][0]) and torch.equal(timesteps, first[place % batches][1]), (name, place)


def test_the_first_loss_is_the_base_s_own_and_then_methods_differ(runs_of: dict[str, Path]) -> None:
    curves = {name: curve(folder) for name, folder in runs_of.items()}
    assert all([step for step, _ in points] == [0, 2, 4] for points in curves.values())
    plain = [curves[name][0][1] for name in OWN if name != "textual-inversion"]  # its captions are other words
    assert plain == pytest.approx([plain[0]] * 3, abs=1e-6)
    assert len({points[-1][1] for points in curves.values()}) == 4


@pytest.mark.parametrize("name", OWN)
def test_one_seed_one_curve_also_when_resumed(name: str, runs_of: dict[str, Path], tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Without artifacts along the way, with previews, and killed half-way: the very same losses and bytes."""
    real = crash_after(3, monkeypatch)
    more = {"checkpoint_every": 2, "preview_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(settings(name, tiny_model, pictures_dir, tmp_path / "run", **more), silent())
    monkeypatch.setattr(run_room, "fit", real)
    folder = train(settings(name, tiny_model, pictures_dir, tmp_path / "run", resume=True, **more), silent())
    assert curve(folder) == curve(runs_of[name])
    assert hashes(folder / "artifact") == hashes(runs_of[name] / "artifact")


def test_another_seed_looks_elsewhere(runs_of: dict[str, Path], tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    other = train(settings("lora", tiny_model, pictures_dir, tmp_path / "run", steps=1, seed=1), silent())
    assert curve(other)[0][1] != curve(runs_of["lora"])[0][1]


# -- artifacts along the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_the_last_artifact_along_the_way_is_the_artifact(name: str, runs_of: dict[str, Path]) -> None:
    """Averages and dropout included: what lies under steps/ is what the end of such a run exports."""
    folder = runs_of[name]
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["0000002", "0000004"]
    early, late = (folder / "steps" / step / "artifact" for step in ("0000002", "0000004"))
    assert hashes(late) == hashes(folder / "artifact") != hashes(early)
    assert [runs.read_json(place / "artifact.json")["step"] for place in (early, late)] == [2, 4]
    assert runs.read_json(early / "artifact.json")["metadata"]["finetune.steps"] == "2"
    assert any("seconds" in line and line["step"] == 2 for line in runs.read_metrics(folder))
    assert not list(folder.rglob("*.part*")) and not list(folder.rglob(".artifact*"))


@pytest.mark.parametrize("name", ["dreambooth", "hypernetwork"])
def test_an_artifact_along_the_way_is_what_a_shorter_run_makes(name: str, runs_of: dict[str, Path], tiny_model: Path, pictures_dir: Path,
                                                               tmp_path: Path) -> None:
    """With a constant rate a run of two steps is the first half of one of four: same weights, same number of steps in the files."""
    long = train(settings(name, tiny_model, pictures_dir, tmp_path / "long", schedule="constant", export_every=3), silent())
    short = train(settings(name, tiny_model, pictures_dir, tmp_path / "short", schedule="constant", steps=3), silent())
    assert sorted(path.name for path in (long / "steps").iterdir()) == ["0000003", "0000004"]
    assert hashes(long / "steps" / "0000003" / "artifact") == hashes(short / "artifact")


def test_resuming_and_overwriting_leave_no_strange_artifacts(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = crash_after(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(settings("textual-inversion", tiny_model, pictures_dir, tmp_path / "run", steps=5, checkpoint_every=2, export_every=1), silent())
    monkeypatch.setattr(run_room, "fit", real)
    (tmp_path / "run" / "steps" / "0000009" / "artifact").mkdir(parents=True)  # of a longer run that was cut back
    folder = train(settings("textual-inversion", tiny_model, pictures_dir, tmp_path / "run", steps=5, checkpoint_every=2, export_every=1,
                            resume=True), silent())
    assert sorted(path.name for path in (folder / "steps").iterdir()) == [f"{step:07d}" for step in (1, 2, 3, 4, 5)]
    (folder / "curve.json").write_text("{}", encoding="utf-8")
    train(settings("textual-inversion", tiny_model, pictures_dir, tmp_path / "run", steps=1, overwrite=True), silent())
    assert not (folder / "steps").exists() and not (folder / "curve.json").exists()


def test_the_disk_they_need_is_announced(tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(settings("textual-inversion", tiny_model, pictures_dir, tmp_path / "run", steps=3, export_every=2), Console(width=200))
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 artifacts, one every 2 steps: {2 * 48 * 4 * 3:,} bytes to {folder}/steps" in said  # one row of 48 numbers in three files


# -- ending when it has settled ------------------------------------------------------------------------------------------


def by_hand(losses: list[float], window: int, threshold: float) -> int | None:
    """First number of losses at which the paper's ratio is under the threshold, from sums of squares."""
    for count in range(window + 1, len(losses) + 1):
        newest, whole = losses[count - window:count], losses[:count]
        spread = [sum(x * x for x in part) / len(part) - (sum(part) / len(part)) ** 2 for part in (newest, whole)]
        if spread[0] < threshold * spread[1]:
            return count
    return None


def first_settled(losses: list[float], window: int, threshold: float) -> int | None:
    return next((count for count in range(1, len(losses) + 1) if stopping.settled(losses[:count], window, threshold)), None)


FALLS = [0.1 + 0.2 * 0.8**n for n in range(60)]
SWINGS = [0.2 + 0.1 * (-1) ** n for n in range(60)]
SPEEDS_UP = [1.0 - 0.0001 * n**3 for n in range(20)]


@pytest.mark.parametrize(("losses", "window", "threshold", "expected"), [
    (FALLS, 6, 0.15, 10), (FALLS, 6, 0.01, 16), (FALLS, 12, 0.15, 17), (SWINGS, 6, 0.15, None), (SPEEDS_UP, 6, 0.15, None),
    ([0.2] * 60, 6, 0.15, None),
])
def test_settling_by_the_paper_s_ratio(losses: list[float], window: int, threshold: float, expected: int | None) -> None:
    assert first_settled(losses, window, threshold) == expected
    if len(set(losses)) > 1:
        assert by_hand(losses, window, threshold) == expected


def test_a_straight_fall_is_called_settled_when_it_is_long() -> None:
    """Known of the rule and said in docs/training.md: variances of straight lines are as the squares of their lengths."""
    line = [1.0 - 0.01 * n for n in range(60)]
    assert stopping.dvar(line[:20], 6) == pytest.approx((6**2 - 1) / (20**2 - 1))
    assert first_settled(line, 6, 0.15) == 16  # 35 / (n n - 1) < .15


def test_ratio_is_numpy_s_and_needs_more_than_a_window() -> None:
    losses = [0.5, 0.25, 0.2, 0.4, 0.1]
    assert stopping.dvar(losses, 2) == pytest.approx(np.var([0.4, 0.1]) / np.var(losses))
    assert stopping.dvar(losses, 5) is None and stopping.dvar([0.3] * 9, 2) is None


def made_up(losses: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fixed set say these losses, by step."""
    states: list[Any] = []
    real = run_room.prepare
    monkeypatch.setattr(run_room, "prepare", lambda *arguments: (states.append(real(*arguments)), states[-1])[1])
    monkeypatch.setattr(run_room, "validation_loss", lambda *arguments: losses[states[-1].step])


SETTLES = {0: 1.0, 2: 0.5, 4: 0.3, 6: 0.29, 8: 0.29, 10: 0.29, 12: 0.29}
WATCH = {"stop": "dvar", "stop_window": 2, "stop_threshold": 0.05, "steps": 12}


def test_a_settled_run_ends_whole_and_says_what_it_really_took(tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(SETTLES, monkeypatch)
    folder = train(settings("lora", tiny_model, pictures_dir, tmp_path / "run", export_every=4, **WATCH), silent())
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["status"] == "finished" and manifest["stopped"] == {"reason": "dvar", "step": 6, "planned": 12}
    assert (manifest["steps"], manifest["pictures_seen"]) == (6, 12)
    spent = [line["seconds"] for line in runs.read_metrics(folder) if "seconds" in line][-1]
    assert manifest["seconds"]["training"] == pytest.approx(spent, abs=1e-3)
    assert manifest["seconds"]["per_step"] == pytest.approx(spent / 6, abs=1e-3)
    assert runs.read_json(folder / "artifact" / "artifact.json")["metadata"]["finetune.steps"] == "6"
    assert [path.parent.name for path in (folder / "checkpoints").glob("*/manifest.json")] == ["0000006"]
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["0000004", "0000006"]
    assert "stopped" not in runs.read_json(train(settings("lora", tiny_model, pictures_dir, tmp_path / "whole", steps=2), silent()) / "manifest.json")


def test_resumed_it_ends_at_the_same_step_with_the_same_bytes(tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(SETTLES, monkeypatch)
    whole = train(settings("lora", tiny_model, pictures_dir, tmp_path / "whole", **WATCH), silent())
    real = crash_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(settings("lora", tiny_model, pictures_dir, tmp_path / "cut", checkpoint_every=3, **WATCH), silent())
    monkeypatch.setattr(run_room, "fit", real)
    for _ in range(2):  # the second time the checkpoint is that of the settled step, and no further step is taken
        cut = train(settings("lora", tiny_model, pictures_dir, tmp_path / "cut", checkpoint_every=3, resume=True, **WATCH), silent())
        assert runs.read_json(cut / "manifest.json")["stopped"]["step"] == 6
        assert hashes(cut / "artifact") == hashes(whole / "artifact") and curve(cut) == curve(whole)


def test_a_real_run_ends_where_its_own_curve_says(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """On the tiny base the first steps win most; the recorded losses, put to the rule by hand, name the step."""
    more = {"steps": 40, "validate_every": 1, "schedule": "constant", "stop": "dvar", "stop_window": 4, "stop_threshold": 0.3}
    folder = train(settings("dreambooth", tiny_model, pictures_dir, tmp_path / "run", **more), silent())
    losses = [loss for _, loss in curve(folder)]
    ended = runs.read_json(folder / "manifest.json")["stopped"]["step"]
    assert by_hand(losses, 4, 0.3) == len(losses) == ended + 1 < 40
    assert losses[-1] < losses[0]


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "words"), [
    ({"keep": "best"}, r"--keep best needs --export-every\. Without artifacts from along the way.*--export-every 50"),
    ({"stop": "dvar", "validate_every": 0}, r"--stop dvar needs --validate-every\. .*switches that off"),
])
def test_refusals(more: dict[str, Any], words: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=words):
        settings("lora", tiny_model, pictures_dir, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
