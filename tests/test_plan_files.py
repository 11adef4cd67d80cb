"""Bytes on disk, foretold: artifacts and checkpoints as files that training really wrote, for all methods and families."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune import methods, runs
from finetune.plan import files
from finetune.plan.rehearsal import rehearse
from finetune.plan.skeleton import skeleton
from finetune.training import train
from finetune.training.artifacts import describe

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora-text": ("lora", {"text_encoder_rank": 2, "rank": 4}),
    "dora": ("lora", {"variant": "dora", "rank": 2}),
    "oft": ("lora", {"variant": "oft", "rank": 4}),
    "textual-inversion": ("textual-inversion", {"vectors": 2}),
    "hypernetwork": ("hypernetwork", {}),
    "dreambooth": ("dreambooth", {"prior": "none"}),
    "dreambooth-single-file": ("dreambooth", {"prior": "none", "ema_decay": 0.9, "train_text_encoder": True, "export_dtype": "fp32", "export": ["single-file"]}),
}


FAST = [("sd1", "lora"), ("sd1", "hypernetwork"), ("sdxl", "textual-inversion"), ("sdxl", "dreambooth")]
SLOW = [*(("sd1", case) for case in CASES if ("sd1", case) not in FAST), *(("sd2", case) for case in CASES),
        *(("sdxl", case) for case in CASES if ("sdxl", case) not in FAST)]


@pytest.mark.parametrize(("shape", "case"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_bytes_of_artifact_and_checkpoint_are_exact(shape: str, case: str, request: pytest.FixtureRequest, pictures_dir: Path, tmp_path: Path) -> None:
    model = request.getfixturevalue({"sd1": "tiny_model", "sd2": "tiny_v_model", "sdxl": "tiny_xl_model"}[shape])
    name, own = CASES[case]
    settings = methods.get(name).Settings(model=str(model), class_noun="box", instance_dir=pictures_dir, resolution=32, steps=1, validate_every=0,
                                          checkpoint_every=1, output=tmp_path / "run", **own)
    base = skeleton(str(model))
    metadata = describe(settings, methods.get(name)(settings), base, 4, settings.steps)
    planned, checkpoint = files.artifact_bytes(settings, base, metadata), files.checkpoint_bytes(rehearse(settings, base))
    train(settings, Console(file=io.StringIO()))
    assert planned == runs.read_json(tmp_path / "run" / "manifest.json")["artifact"]["bytes"]
    assert checkpoint == sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))


def test_disk_counts_every_checkpoint_that_is_there_at_once() -> None:
    settings = methods.get("dreambooth").Settings(class_noun="box", steps=1000, checkpoint_every=300, keep_checkpoints=2, export_every=400, class_images=10, resolution=64)
    assert files.disk_bytes(settings, 7, 1000) == {"artifact": 7, "checkpoints": 3000, "artifacts along the way": 21, "class pictures": 10 * 2 * 64 * 64}
    settings = settings.model_copy(update={"checkpoint_every": 0, "export_every": 0, "prior": "none"})
    assert files.disk_bytes(settings, 7, 1000) == {"artifact": 7}
