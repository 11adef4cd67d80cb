"""Switches of the engine in whole runs: what must be the same is the same to the bit, what rounds learns the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune import methods, runs
from finetune.data import latents
from finetune.engine import frozen
from finetune.errors import Problem
from finetune.model import load
from finetune.training.run import train

COMMON: dict[str, Any] = {"class_noun": "backpack", "resolution": 32, "batch_size": 2, "steps": 4, "seed": 3, "log_every": 1, "validate_every": 2,
                          "class_images": 2, "class_steps": 2, "checkpoint_every": 0}
OF_METHOD: dict[str, dict[str, Any]] = {
    "dreambooth": {"learning_rate": 1e-3, "prior": "none"}, "textual-inversion": {"placeholder": "<my-box>", "learning_rate": 1e-2, "initializer": "backpack"},
    "lora": {"learning_rate": 1e-2, "rank": 4, "targets": "attention"}, "hypernetwork": {"learning_rate": 1e-3}}


def run(folder: Path, method: str, model: Path, pictures: Path, **more: Any) -> tuple[list[dict[str, Any]], str]:
    """Train; the metrics without times, and a hash over the artifact's weights."""
    settings = methods.get(method).Settings(**{**COMMON, **OF_METHOD[method], "model": str(model), "instance_dir": pictures, "output": folder, **more})
    train(settings, Console(quiet=True))
    metrics = [{key: value for key, value in line.items() if "seconds" not in key} for line in runs.read_metrics(folder)]
    digest = hashlib.sha256()
    for file in sorted((folder / "artifact").rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return metrics, digest.hexdigest()


SAME = [("lora", {"lean": False}), ("lora", {"free_encoders": False}), ("lora", {"freed_memory": "return"}), ("lora", {"gradient_checkpointing": True}),
        ("lora", {"preview_every": 2}), ("dreambooth", {"free_encoders": False}), ("dreambooth", {"preview_every": 2}),
        ("textual-inversion", {"free_encoders": False}), ("hypernetwork", {"lean": False}), ("dreambooth", {"attention": "sdpa", "lean": False})]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each method as it runs by default."""
    return {name: run(tmp_path_factory.mktemp("plain") / "run", name, tiny_model, pictures_dir) for name in OF_METHOD}


@pytest.mark.parametrize(("method", "switch"), SAME, ids=str)
def test_the_same_to_the_bit(method: str, switch: dict[str, Any], plain: dict[str, Any], tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", method, tiny_model, pictures_dir, **switch) == plain[method]


def test_stepping_in_the_backward_pass(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """The same weights; only the gradient's norm cannot be told."""
    after = run(tmp_path / "after", "dreambooth", tiny_model, pictures_dir, clip_norm=0)
    inside = run(tmp_path / "inside", "dreambooth", tiny_model, pictures_dir, clip_norm=0, step_in_backward=True)
    assert inside[1] == after[1]
    assert [line.get("loss") for line in inside[0]] == [line.get("loss") for line in after[0]]
    assert all(line.get("grad_norm") is None for line in inside[0])


@pytest.mark.parametrize("method", ["lora", "hypernetwork", "textual-inversion"])
def test_frozen_bf16_is_the_rounded_base(method: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """Training over weights kept in bf16 is training over a base that was rounded beforehand, to the bit."""
    base = load(str(tiny_model))
    for module in base.unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module is not base.unet.conv_in:
            module.weight.data = module.weight.data.bfloat16().float()
    rounded = tmp_path / "rounded"
    base.pipeline().save_pretrained(rounded)
    kept, wide = run(tmp_path / "kept", method, tiny_model, pictures_dir, frozen="bf16")[0], run(tmp_path / "wide", method, rounded, pictures_dir)[0]
    if method != "lora":
        assert kept == wide
    else:  # PEFT rounds new adapters to their layer's format before they are trained in fp32
        losses = [[line["loss"] for line in found if "loss" in line] for found in (kept, wide)]
        assert losses[0][0] == losses[1][0] and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("switch", [{"frozen": "8bit"}, {"frozen": "4bit"}, {"precision": "bf16"}, {"precision": "bf16", "attention": "chunked"},
                                    {"memory": "lowest"}], ids=str)
def test_what_rounds_begins_near(switch: dict[str, Any], plain: dict[str, Any], tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "computes_bf16", lambda device: True)
    metrics, _ = run(tmp_path / "run", "lora", tiny_model, pictures_dir, **switch, preview_every=2)
    first = [next(line["loss"] for line in found if "loss" in line) for found in (metrics, plain["lora"][0])]
    assert first[0] == pytest.approx(first[1], rel=0.05) and first[0] != first[1]


def test_eight_bit_optimizer_learns_and_resumes(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "dreambooth", tiny_model, pictures_dir, optimizer="adamw8bit")
    assert whole[1] != run(tmp_path / "wide", "dreambooth", tiny_model, pictures_dir)[1]
    cut = tmp_path / "cut"
    run(cut, "dreambooth", tiny_model, pictures_dir, optimizer="adamw8bit", steps=2, schedule="constant", checkpoint_every=2)
    resumed = run(cut, "dreambooth", tiny_model, pictures_dir, optimizer="adamw8bit", schedule="constant", checkpoint_every=2, resume=True)
    straight = run(tmp_path / "straight", "dreambooth", tiny_model, pictures_dir, optimizer="adamw8bit", schedule="constant")
    assert resumed[1] == straight[1]


def test_encoded_pictures_are_kept_on_disk(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           plain: dict[str, Any]) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path / "first", "lora", tiny_model, pictures_dir, latent_cache="disk") == plain["lora"]
    files = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    assert len(files) == 4
    files[0].write_bytes(b"damaged")
    encoded: list[Any] = []
    encode = latents.Latents._encode
    monkeypatch.setattr(latents.Latents, "_encode", lambda self, row: encoded.append(row) or encode(self, row))
    assert run(tmp_path / "second", "lora", tiny_model, pictures_dir, latent_cache="disk") == plain["lora"]
    assert len(encoded) == 1  # the damaged one


def test_encoders_leave_memory_and_come_back(tiny_model: Path) -> None:
    base = load(str(tiny_model))
    before = {name: value.clone() for name, value in base.vae.state_dict().items()}
    base.free("vae", "text_encoder")
    assert base.freed() == ["text_encoder", "vae"]
    with base.recalled("vae"):
        assert base.freed() == ["text_encoder"]
        assert all(torch.equal(value, before[name]) for name, value in base.vae.state_dict().items())
    assert base.freed() == ["text_encoder", "vae"] and base.recall("unet") == []


def test_a_resumed_run_stands_on_the_rung_it_stood_on(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.plan import estimate

    monkeypatch.setattr(estimate, "choose", lambda settings: "low")
    whole = run(tmp_path / "whole", "lora", tiny_model, pictures_dir, schedule="constant")
    run(tmp_path / "cut", "lora", tiny_model, pictures_dir, schedule="constant", steps=2, checkpoint_every=2)
    told = json.loads((tmp_path / "cut" / "settings.json").read_text())
    assert (told["memory"], told["frozen"], told["rung"]) == ("auto", "auto", "low")
    monkeypatch.setattr(estimate, "choose", lambda settings: "fast")  # now there is room
    assert run(tmp_path / "cut", "lora", tiny_model, pictures_dir, schedule="constant", resume=True)[1] == whole[1]


def test_bf16_without_instructions_is_kept_in_bf16_and_computed_in_fp32(tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "computes_bf16", lambda device: False)
    assert run(tmp_path / "asked", "hypernetwork", tiny_model, pictures_dir, precision="bf16") == run(
        tmp_path / "kept", "hypernetwork", tiny_model, pictures_dir, frozen="bf16")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_broken_numbers_stop_before_the_optimizer(waits: bool, inside: bool, tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU at once; on a GPU at the next look, with the weights of the last good step."""
    from finetune.training import loop

    class Guard(loop.Guard):
        """Looks as on a device of that kind."""

        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self._waits = now

    monkeypatch.setattr(loop, "Guard", Guard)
    now, seen = waits, {}
    loss_of = loop.loss_of

    def broken(base: Any, method: Any, batch: Any, settings: Any) -> torch.Tensor:
        loss = loss_of(base, method, batch, settings)
        step = batch.keys[0][1] // settings.batch_size
        weight = base.unet.conv_in.weight
        seen[step] = weight.detach().clone()
        return loss * float("nan") if step == 2 else loss

    monkeypatch.setattr(loop, "loss_of", broken)
    with pytest.raises(Problem, match="The loss at step 3 is not a finite number") as caught:
        run(tmp_path / "run", "dreambooth", tiny_model, pictures_dir, steps=6, log_every=100, validate_every=0, clip_norm=0, step_in_backward=inside)
    assert "picture-" in caught.value.why
    assert sorted(seen) == (list(range(6)) if waits else [0, 1, 2])
    assert not torch.equal(seen[1], seen[2])
    if waits:
        assert torch.equal(seen[3], seen[2])  # the broken step was left out


@pytest.mark.parametrize("switch", [{"frozen": "bf16"}, {"frozen": "4bit"}, {"precision": "bf16"}, {"prior": "distill", "frozen": "bf16"}], ids=str)
def test_prior_preservation_over_a_base_in_fewer_bytes(switch: dict[str, Any], tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Class pictures are drawn by the base as it is kept, under a name of their own; asking for them brings no encoder back."""
    monkeypatch.setattr(frozen, "computes_bf16", lambda device: True)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    run(tmp_path / "wide", "lora", tiny_model, pictures_dir, prior="images", steps=1)
    metrics, _ = run(tmp_path / "run", "lora", tiny_model, pictures_dir, **({"prior": "images"} | switch), steps=1)
    assert all(line["loss"] > 0 for line in metrics if "loss" in line)
    assert len(list((tmp_path / "cache" / "class-images").iterdir())) == (1 if switch.get("prior") else 2)
