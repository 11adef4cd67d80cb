"""Loss sequences of whole runs, pinned: a change that should not alter results shows the same five numbers.

The numbers were made by `python tests/test_golden_losses.py` on the tiny base. All cases begin with the same loss where
they see the same prompt, because all draws are common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from finetune import data, methods
from finetune.model import load
from finetune.training import fit
from finetune.training.loop import prepare

GOLDEN = Path(__file__).with_name("golden_losses.json")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth": ("dreambooth", {"prior": "none", "learning_rate": 1e-3}),
    "dreambooth-prior": ("dreambooth", {"prior": "images", "prior_weight": 0.5, "learning_rate": 1e-3}),
    "dreambooth-distill": ("dreambooth", {"prior": "distill", "learning_rate": 1e-3}),
    "textual-inversion": ("textual-inversion", {"placeholder": "<my-box>", "templates": "prompt", "learning_rate": 1e-2}),
    "lora": ("lora", {"rank": 4, "learning_rate": 1e-3, "snr_gamma": 5.0}),
    "hypernetwork": ("hypernetwork", {"learning_rate": 1e-3}),
    "hypernetwork-key-query": ("hypernetwork", {"transform": "key,query", "learning_rate": 1e-3, "accumulate": 2}),
}


def losses(case: str, model: Path, pictures: Path) -> list[float]:
    """Five steps of a case on the tiny base."""
    name, own = CASES[case]
    settings = methods.get(name).Settings(model=str(model), instance_dir=pictures, class_noun="backpack", resolution=32, batch_size=2,
                                          steps=5, warmup=1, seed=11, **own)
    method = methods.get(name)(settings)
    base = load(str(model))
    found = data.intake(settings)
    captions = data.caption_candidates(found.pictures, method.templates(), method.subject)
    classes = found.pictures[:3] if settings.prior == "images" else []
    source = data.source(settings, found, classes, base.vae, captions, "a photo of a backpack")
    accelerator = Accelerator(cpu=True)
    state = prepare(base, method, settings, accelerator)
    return [float(step.loss) for step in fit(base, method, source, settings, accelerator, state)]


@pytest.mark.parametrize("case", CASES)
def test_five_steps(case: str, tiny_model: Path, pictures_dir: Path) -> None:
    assert losses(case, tiny_model, pictures_dir) == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=2e-4)


def test_common_random_numbers() -> None:
    """Methods that start as the base and see the same prompt start with the same loss."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["dreambooth"][0] == pytest.approx(golden["hypernetwork"][0], rel=1e-6)
    assert golden["dreambooth"][1] != pytest.approx(golden["hypernetwork"][1], rel=1e-6)
    assert golden["dreambooth-distill"][0] == pytest.approx(golden["dreambooth"][0], rel=1e-6)  # the base agrees with itself


if __name__ == "__main__":
    import tempfile

    import conftest

    root = Path(tempfile.mkdtemp())
    conftest.write_tiny_model(root / "tiny", "epsilon", 0, 48)
    (root / "pictures").mkdir()
    conftest.draw_pictures(root / "pictures")
    GOLDEN.write_text(json.dumps({case: losses(case, root / "tiny", root / "pictures") for case in CASES}, indent=2) + "\n")
