"""Wrong numbers stop, or are left out on request; a loss that runs away is told; an fp16 autoencoder that overflows is not believed."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from finetune import methods, runs
from finetune.errors import Problem
from finetune.model import load, render
from finetune.model.canvas import encode_picture
from finetune.training import divergence, finite, loop, train
from finetune.training.loop import timesteps_of


def run(tiny: Path, pictures: Path, output: Path, name: str = "textual-inversion", **more: Any) -> str:
    """Train and return what was printed."""
    given = {"model": str(tiny), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 1, "steps": 6, "output": output,
             "validate_every": 0, "log_every": 1, "schedule": "constant", "export_dtype": "fp32"}
    told = io.StringIO()
    train(methods.get(name).Settings(**(given | more)), Console(file=told, width=200))
    return told.getvalue()


class Broken:
    """Breaks the loss, or only its gradient, of some steps; keeps what came through the loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str, steps: tuple[int, ...]):
        self.rows: dict[int, list[tuple[str, int]]] = {}
        self.weights: dict[int, torch.Tensor] = {}
        real = loop.loss_of

        def loss_of(base: Any, method: Any, batch: Any, settings: Any) -> torch.Tensor:
            step = batch.keys[0][1] // (settings.batch_size * settings.accumulate)
            timesteps = timesteps_of(batch, settings.seed, len(base.schedule)).tolist()
            self.rows.setdefault(step, []).extend(zip(batch.names, timesteps, strict=True))
            self.weights[step] = base.unet.conv_in.weight.detach().clone()
            loss = real(base, method, batch, settings)
            if step not in steps:
                return loss
            if what == "loss":
                return loss * float("inf")
            loss.register_hook(lambda gradient: gradient * float("nan"))  # the loss itself is a number
            return loss

        monkeypatch.setattr(loop, "loss_of", loss_of)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_stops_before_the_optimizer_and_names_all_it_came_from(what: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, what, (2,))
    with pytest.raises(Problem, match=f"The {what} at step 3 is not a finite number") as caught:
        run(tiny_model, pictures_dir, tmp_path / "run", accumulate=2, batch_size=2, checkpoint_every=1)
    rows = broken.rows[2] if what == "gradient" else broken.rows[2][:2]  # a broken loss is seen in its own micro-batch
    assert caught.value.why == "The pictures were " + ", ".join(f"{name} at timestep {timestep}" for name, timestep in rows) + "."
    assert "--on-nonfinite skip" in caught.value.fix
    monkeypatch.undo()
    run(tiny_model, pictures_dir, tmp_path / "run", accumulate=2, batch_size=2, checkpoint_every=1, resume=True)  # state stayed good
    run(tiny_model, pictures_dir, tmp_path / "whole", accumulate=2, batch_size=2, checkpoint_every=1)
    one, other = (runs.read_json(tmp_path / name / "artifact" / "artifact.json")["files"] for name in ("run", "whole"))
    assert one == other


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_is_left_out_on_request(what: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, what, (1, 3))
    told = run(tiny_model, pictures_dir, tmp_path / "run", "dreambooth", on_nonfinite="skip", skip_at_most=1, ema_decay=0.5, prior="none")
    assert f"Step 2 is left out: the {what} at step 2 is not a finite number. The pictures were {broken.rows[1][0][0]}" in told
    assert torch.equal(broken.weights[1], broken.weights[2]) and torch.equal(broken.weights[3], broken.weights[4])
    assert not torch.equal(broken.weights[2], broken.weights[3])
    lines = runs.read_metrics(tmp_path / "run")
    assert [line.get("left_out", 0) for line in lines] == [0, 1, 1, 2, 2, 2]
    assert (lines[1]["loss"] is None) == (what == "loss")
    manifest = runs.read_json(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "finished" and manifest["steps_left_out"] == 2
    assert all(torch.isfinite(value).all() for value in load(str(tmp_path / "run" / "artifact")).unet.parameters())


def test_too_many_in_a_row_stop(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, "loss", (1, 2, 3))
    with pytest.raises(Problem, match=r"step 4 is not a finite number, nor was it at the 2 steps before.*--skip-at-most 2 is the limit"):
        run(tiny_model, pictures_dir, tmp_path / "run", on_nonfinite="skip", skip_at_most=2)
    monkeypatch.undo()
    Broken(monkeypatch, "loss", (1, 2, 4, 5))
    run(tiny_model, pictures_dir, tmp_path / "other", on_nonfinite="skip", skip_at_most=2)
    assert runs.read_json(tmp_path / "other" / "manifest.json")["steps_left_out"] == 4


def test_fp16_that_only_overflows_is_no_training() -> None:
    """torch's scaler leaves such steps out by itself, for ever."""
    scale = [1.0]
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]), device=torch.device("cpu"), num_processes=1)
    guard = finite.Guard(SimpleNamespace(), SimpleNamespace(), accelerator, lambda batch: torch.zeros(1))
    assert guard.look() == []
    scale[0] = 2.0**-9
    with pytest.raises(Problem, match=r"however small fp16's loss was scaled.*0\.002.*bf16 or fp32"):
        guard.look()


def test_a_loss_that_runs_away_is_told_once() -> None:
    watch = divergence.Watch()
    assert watch.add([1.0, 3.0] * 10) is None  # the first ones, mean 2
    assert watch.add([7.9] * 49) is None  # not 50 yet
    assert watch.add([7.9]) is None  # 7.9 is not four times as much
    assert watch.add([float("nan"), *[9.7] * 25]) == "The mean loss of the last 50 steps is 4.4 times that of the first 20: training runs away."
    assert watch.add([90.0] * 80) is None and watch.look(90.0) is None  # said already
    assert divergence.advice(1e-2) == "The likely cause is the learning rate (0.01); a third of it is worth trying."


def test_the_fixed_set_is_looked_at_too() -> None:
    watch = divergence.Watch()
    assert watch.look(0.2) is None and watch.look(0.29) is None
    assert watch.look(0.4) == "The loss on the fixed set is 2.0 times that of the first look: training runs away."
    assert divergence.Watch(0.2).look(0.31) and divergence.Watch(0.2).look(0.29) is None  # a resumed run knows its first look


def test_a_run_that_runs_away_says_so_and_a_usual_one_does_not(tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base predicts nothing, so no rate makes it much worse: the losses are made to grow. docs/reliability.md has real rates."""
    usual = run(tiny_model, pictures_dir, tmp_path / "usual", steps=100, log_every=50)
    assert "runs away" not in usual
    real = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", lambda base, method, batch, settings: real(base, method, batch, settings) * (1 + 0.2 * batch.keys[0][1]))
    high = run(tiny_model, pictures_dir, tmp_path / "high", steps=100, log_every=50, learning_rate=0.1)
    assert "training runs away. The likely cause is the learning rate (0.1)" in high


@pytest.mark.parametrize("says_so", [True, False])
def test_an_fp16_autoencoder_that_overflows_works_in_float32(says_so: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that drive activations past 65,504: in fp16 the result is not finite, whether the configuration knows it or not."""
    whole = load(str(tiny_model))
    with torch.no_grad():
        for part in (whole.vae.decoder, whole.vae.encoder):
            part.conv_in.weight.mul_(3e4)  # a group norm behind it makes the numbers small again
    expected = render(whole, ["a box"], [1], steps=1, output="pil")[0]
    picture = expected.resize((32, 32))
    latents = encode_picture(whole, picture)
    half = load(str(tiny_model))
    half.vae.load_state_dict(whole.vae.state_dict())
    half.vae.to(torch.float16)
    pixels = torch.zeros(1, 4, 16, 16, dtype=torch.float16) + 20
    assert not torch.isfinite(half.vae.decode(pixels).sample).all()  # it does overflow
    half.vae.register_to_config(force_upcast=says_so)
    found = encode_picture(half, picture)
    assert torch.isfinite(found).all() and (found - latents).abs().max() < 0.02 * latents.abs().max()
    drawn = render(half, ["a box"], [1], steps=1, output="pil")[0]
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2
    assert half.vae.dtype == torch.float16 and half.vae.config.force_upcast
