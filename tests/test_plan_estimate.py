"""Memory, foretold: parts against sums of shapes, the whole against a real process, and the choice of a rung."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import methods
from finetune.errors import Problem
from finetune.model.families import locate
from finetune.plan import estimate, process
from finetune.plan.estimate import choose, predict
from finetune.plan.reality import compare, measure
from finetune.plan.skeleton import skeleton

OWN = 450 * 2**20  # stands for the program where only differences are asked


def settings_of(method: str, model: Path, **more: Any) -> Any:
    return methods.get(method).Settings(**{"model": str(model), "class_noun": "box", "resolution": 32, "prior": "none", **more})


def test_parts_are_sums_of_shapes(tiny_model: Path) -> None:
    base = skeleton(str(tiny_model))
    unet = 4 * sum(value.numel() for value in base.unet.parameters())
    whole = predict(settings_of("dreambooth", tiny_model), base, process=OWN)
    assert (whole.trained, whole.gradients, whole.trainable) == (unet, unet, unet // 4)
    tensors = sum(1 for _ in base.unet.parameters())
    assert whole.optimizer == 2 * unet + 4 * tensors  # two moments, and a step count for each tensor
    assert whole.weights == 0  # text encoder and VAE are let go
    eight = predict(settings_of("dreambooth", tiny_model, optimizer="adamw8bit"), base, process=OWN)
    expected = sum(2 * 4 * n if n < 4096 else 2 * n + 2 * 4 * 256 + 2 * 4 * math.ceil(n / 256) for n in (value.numel() for value in base.unet.parameters()))
    assert eight.optimizer == expected
    one = predict(settings_of("dreambooth", tiny_model, step_in_backward=True, clip_norm=0.0), base, process=OWN)
    assert one.gradients == 4 * max(value.numel() for value in base.unet.parameters())
    assert one.peak_host < whole.peak_host


def test_attention_and_activations_grow_as_they_must(tiny_model: Path) -> None:
    """Twice the batch keeps twice as much; recomputation keeps less; bf16 halves linear and convolution weights."""
    base = skeleton(str(tiny_model))
    plain = predict(settings_of("lora", tiny_model), base, process=OWN)
    double = predict(settings_of("lora", tiny_model, batch_size=2), base, process=OWN)
    assert double.activations == pytest.approx(2 * plain.activations, rel=0.1)
    again = predict(settings_of("lora", tiny_model, gradient_checkpointing=True), base, process=OWN)
    assert again.activations < 0.6 * plain.activations
    half = predict(settings_of("lora", tiny_model, frozen="bf16"), base, process=OWN)
    assert 0.5 * plain.weights < half.weights < 0.55 * plain.weights
    assert plain.trainable == half.trainable == sum(value.numel() for value in _lora_of(tiny_model).values())


def _lora_of(model: Path) -> dict[str, Any]:
    """Down and up of rank 16 on the cross-attention of a base that was really loaded."""
    from finetune.model import load

    base = load(str(model))
    return {name: value for group in methods.get("lora")(settings_of("lora", model)).attach(base) for name, value in group.parameters.items()}


def test_a_skeleton_is_not_changed(tiny_model: Path) -> None:
    base = skeleton(str(tiny_model))
    first = predict(settings_of("textual-inversion", tiny_model), base, process=OWN)
    assert predict(settings_of("textual-inversion", tiny_model), base, process=OWN).as_dict() == first.as_dict()
    assert all(value.is_meta for part in base.modules().values() for value in part.parameters())


def test_choose_takes_the_fastest_that_fits(tiny_model: Path) -> None:
    assert choose(settings_of("lora", tiny_model)) == "fast"  # three megabytes
    assert choose(settings_of("lora", tiny_model, memory_limit="3GB")) == "fast"
    assert choose(settings_of("lora", tiny_model, memory_limit="100MB")) == "lowest"  # the program alone takes more
    assert choose(settings_of("lora", tiny_model, memory_limit="much")) == "fast"  # the run itself says what is wrong


@pytest.mark.parametrize(("text", "expected"), [("8GB", 8_000_000_000), ("8 GiB", 8 * 2**30), ("500M", 500_000_000), ("1.5g", 1_500_000_000), ("64", 64)])
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert process.parse_bytes(text) == expected


def test_what_is_no_amount_is_refused() -> None:
    with pytest.raises(Problem, match=r"--memory-limit '8 apples' is no amount of memory"):
        process.parse_bytes("8 apples")


@pytest.mark.slow
def test_the_plan_of_a_real_run(tiny_model: Path, pictures_dir: Path) -> None:
    """A process that trains takes what was foretold; training's last lines say so."""
    manifest = measure("lora", str(tiny_model), pictures_dir, resolution=32)
    planned = manifest["planned"]
    assert planned["peak"] == pytest.approx(manifest["peak_memory_bytes"], rel=0.15)
    said = compare(planned | {"artifact": manifest["artifact"]["bytes"]}, manifest)
    assert said[0].startswith("memory: ") and said[1].endswith("as planned")
    assert compare(planned | {"peak": 2 * manifest["peak_memory_bytes"]}, manifest)[0].count("+100%") == 1


def test_measured_runs_were_within_15_percent() -> None:
    """The table of docs/plan.md: four methods, three sizes, several resolutions and rungs; `python docs/plan_table.py --run ...` measures anew."""
    rows = json.loads((Path(__file__).parent.parent / "docs" / "plan.json").read_text(encoding="utf-8"))
    assert len(rows) >= 12 and {row["base"] for row in rows} == {"tiny", "small", "sd15"} and len({row["method"] for row in rows}) == 4
    assert [row for row in rows if abs(row["planned"] / row["measured"] - 1) > 0.15] == []


def test_processes_that_share_a_machine_share_its_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for one is not enough for two: torchrun says how many there are here."""
    settings = settings_of("lora", tiny_model, device="cpu")
    plenty = estimate._plenty(settings, locate(settings.model))
    monkeypatch.setattr(process, "free", lambda: int(1.2 * plenty))
    monkeypatch.setattr(process, "resident", lambda: 0)
    monkeypatch.setattr(estimate, "predict", lambda *given, **more: SimpleNamespace(peak=10**15))
    assert choose(settings) == "fast"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose(settings) == "lowest"
