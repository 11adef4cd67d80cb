"""Whole runs on a device that is not the CPU (see other_device.py): every tensor is where it belongs, and the losses are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_device import DEVICE, There, other_device
from PIL import Image
from rich.console import Console

from finetune import methods, runs, toybox
from finetune.cli import app
from finetune.evaluation import judge as judging
from finetune.evaluation import open_judge
from finetune.model.schedulers import SAMPLERS
from finetune.training import processes
from finetune.training.run import train

COMMON: dict[str, Any] = {"class_noun": "backpack", "resolution": 32, "batch_size": 2, "steps": 2, "seed": 3, "log_every": 1, "validate_every": 0,
                          "class_images": 2, "class_steps": 2, "checkpoint_every": 0}
TEXT = {"placeholder": "<my-box>", "learning_rate": 1e-2, "initializer": "backpack"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dreambooth", {"prior": "none", "preview_every": 2, "validate_every": 2, "checkpoint_every": 1, "learning_rate": 1e-3}),
    ("dreambooth", {"prior": "images", "train_text_encoder": True, "ema_decay": 0.9}),
    ("dreambooth", {"prior": "none", "step_in_backward": True, "clip_norm": 0.0, "memory": "low"}),
    ("textual-inversion", {**TEXT, "vectors": 3, "norm_limit": 1.0, "preview_every": 2, "validate_every": 2}),
    ("lora", {"preview_every": 2, "rank": 4, "text_encoder_rank": 2, "export_every": 1}),
    ("lora", {"prior": "distill", "accumulate": 2, "snr_gamma": 5.0, "crop": "random", "flip": True, "caption_dropout": 0.3}),
    ("lora", {"prior": "images", "memory": "lowest", "frozen": "bf16", "latent_cache": "disk", "targets": "transformer"}),
    ("lora", {"frozen": "bf16", "free_encoders": False, "lean": False, "channels_last": True}),
    *(("lora", {"variant": variant, "rank": 4}) for variant in ("dora", "loha", "lokr", "oft")),
    ("hypernetwork", {"transform": "query,key,value", "scope": "all", "preview_every": 2, "layer_norm": True}),
    ("hypernetwork", {"prior": "images", "activation": "mish", "layer_structure": "1,2,2,1"})]


def losses(folder: Path, method: str, model: Path, pictures: Path, device: str, **more: Any) -> list[float]:
    """Train; every loss of the run."""
    settings = {**COMMON, "model": str(model), "instance_dir": pictures, "output": folder, "device": device, **more}
    train(methods.get(method).Settings(**settings), Console(quiet=True))
    return [line[key] for line in runs.read_metrics(folder) for key in ("loss", "validation_loss") if line.get(key) is not None]


@pytest.mark.parametrize(("method", "more"), CASES, ids=str)
def test_every_tensor_is_on_the_device(method: str, more: dict[str, Any], tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(tmp_path / "cpu", method, tiny_model, pictures_dir, "cpu", **more)
    with other_device(monkeypatch):
        found = losses(tmp_path / "there", method, tiny_model, pictures_dir, "cuda", **more)
    assert runs.read_json(tmp_path / "there" / "manifest.json")["device"] == str(DEVICE)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("method", "more"), [("dreambooth", {"prior": "none"}), ("textual-inversion", TEXT), ("lora", {"rank": 4})], ids=str)
def test_both_text_encoders_too(method: str, more: dict[str, Any], tiny_xl_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(tmp_path / "cpu", method, tiny_xl_model, pictures_dir, "cpu", **more)
    with other_device(monkeypatch):
        assert losses(tmp_path / "there", method, tiny_xl_model, pictures_dir, "cuda", **more) == pytest.approx(expected, rel=1e-4)


def test_the_device_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise these tests could not fail."""
    with other_device(monkeypatch):
        there, here = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
        assert isinstance(there, There) and there.device == DEVICE
        for wrong in (lambda: there + here, lambda: there @ here, lambda: torch.cat([there, here]), lambda: there.add_(here),
                      lambda: torch.randn(2, device=DEVICE, generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="device|generator"):
                wrong()
        assert (there + torch.tensor(1.0)).tolist() == [[2, 2], [2, 2]]


def drawn(folder: Path, device: str, words: list[Any]) -> list[np.ndarray]:
    """Pictures of `finetune generate`."""
    assert app.run(["generate", "--debug", "--steps", "2", "--seed", "1", "--output", str(folder), "--device", device, *map(str, words)]) == 0
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


PICTURE, MASK = Path(toybox.__file__).parent / "pictures" / "cat" / "1-beach.png", "MASK"
DRAWN: dict[str, list[Any]] = {
    **{sampler: ["--prompt", "a (red:1.3) cat", "--sampler", sampler] for sampler in SAMPLERS},
    "init-image": ["--prompt", "a dog", "--init-image", PICTURE, "--denoising-strength", 0.7],
    "mask": ["--prompt", "a dog", "--init-image", PICTURE, "--mask", MASK],
    "inpainting": ["--model", "toybox-inpainting", "--prompt", "a dog", "--init-image", PICTURE, "--mask", MASK],
    "depth": ["--model", "toybox-depth", "--prompt", "a dog", "--depth", MASK]}


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_is_on_the_device(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 40, 64))
    half.save(tmp_path / "mask.png")
    words = [tmp_path / "mask.png" if word == MASK else word for word in DRAWN[name]]
    words = words if "--model" in words else ["--model", tiny_model, *words]
    expected = drawn(tmp_path / "cpu", "cpu", words)
    with other_device(monkeypatch):
        found = drawn(tmp_path / "there", "cuda", words)
    assert len(found) == len(expected) > 0 and all(np.abs(one - two).max() <= 1 for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["dreambooth", "textual-inversion", "lora", "hypernetwork"])
def test_artifacts_go_onto_the_device(method: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = TEXT if method == "textual-inversion" else {"prior": "none", "learning_rate": 1e-3}
    losses(tmp_path / "run", method, tiny_model, pictures_dir, "cpu", **more)
    words = ["--model", tiny_model, "--artifact", f"{tmp_path / 'run' / 'artifact'}:0.6", "--prompt", "a <my-box> backpack"]
    expected = drawn(tmp_path / "cpu", "cpu", words)
    with other_device(monkeypatch):
        found = drawn(tmp_path / "there", "cuda", words)
    assert np.abs(found[0] - expected[0]).max() <= 1


def test_the_judge_looks_on_the_device(pictures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.open(path).convert("RGB") for path in sorted(pictures_dir.glob("*.png"))]

    def seen(device: Any) -> list[np.ndarray]:
        judge = open_judge("toybox", device=device)
        return [judge.clip_images(pictures), judge.clip_texts(["a cat", "a photo of a mug"]), judge.encode(pictures)]

    expected = seen("cpu")
    # what inference mode makes cannot be wrapped
    monkeypatch.setattr(judging, "_batched", torch.no_grad()(judging._batched.__wrapped__))
    with other_device(monkeypatch):
        for one, two in zip(seen(DEVICE), expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("method", "more"), [("dreambooth", {"prior": "none"}), ("textual-inversion", TEXT), ("lora", {}), ("hypernetwork", {})],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_a_step_does_not_wait_for_the_device(method: str, more: dict[str, Any], tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that asks for a number stops the GPU's queue; only lines of the log may."""
    quiet = {"validate_every": 0, "log_every": 100, "checkpoint_every": 0, **more}
    waits = []
    with other_device(monkeypatch) as device:
        for steps in (2, 8):
            device.waits.clear()
            losses(tmp_path / f"{steps}", method, tiny_model, pictures_dir, "cuda", steps=steps, **quiet)
            waits.append(sum(device.waits.values()))
    assert waits[0] == waits[1]


def test_one_process_takes_the_device_it_was_given(tmp_path: Path) -> None:
    settings = methods.get("lora").Settings(output=tmp_path)
    for name in ("cpu", "lazy:1", "lazy:0", "cpu"):
        assert processes.start(settings, torch.device(name)).device == torch.device(name)
