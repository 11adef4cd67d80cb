"""The worked example of docs/adding-a-method.md: the page shows the file, and the file trains, exports and loads."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from finetune import data, methods, runs
from finetune.cli.verbs import find
from finetune.errors import Problem
from finetune.formats import header
from finetune.formats.tensors import load_tensors, save_tensors
from finetune.model import load
from finetune.training import fit, train
from finetune.training.loop import prepare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in the table."""
    monkeypatch.setitem(methods.TABLE, "norms", ("fifth_method:Norms", "train the scale and shift of the normalization layers"))


def settings_of(model: Path, pictures: Path, output: Path, **more: Any) -> Any:
    given = {"model": str(model), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 2, "steps": 2,
             "output": output, "export_dtype": "fp32", "validate_every": 0, "log_every": 1, "learning_rate": 1e-2}
    return methods.get("norms").Settings(**(given | more))


def tensors_of(base: Any) -> dict[str, Tensor]:
    """A copy of every tensor of every network."""
    return {f"{part}.{name}": value.detach().clone() for part, module in base.modules().items() for name, value in module.state_dict().items()}


def norm_names(base: Any) -> set[str]:
    return {f"unet.{name}.{part}" for name, layer in base.unet.named_modules() if isinstance(layer, nn.GroupNorm | nn.LayerNorm)
            for part in ("weight", "bias")}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


def trained(settings: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """Method and base after all steps, and the base's tensors from before; attaching itself must change none of them."""
    method, base = methods.get("norms")(settings), load(settings.model)
    before = tensors_of(base)
    found = data.intake(settings)
    captions = data.caption_candidates(found.pictures, method.templates(), method.subject)
    source = data.source(settings, found, [], base.vae, captions)
    accelerator = Accelerator(cpu=True)
    state = prepare(base, method, settings, accelerator)
    assert differing(before, tensors_of(base)) == set()
    assert state.parameters.keys() <= norm_names(base)
    for _ in fit(base, method, source, settings, accelerator, state):
        pass
    return method, base, before


def test_the_page_shows_the_file_that_is_tested() -> None:
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    shown = max(re.findall(r"```python\n(.*?)```", page, re.DOTALL), key=len)
    assert shown == (ROOT / "tests" / "fifth_method.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("prior", ["none", "distill"])
def test_only_norms_move_and_the_file_brings_them_back(prior: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    method, base, before = trained(settings_of(tiny_model, pictures_dir, tmp_path, prior=prior))
    after = tensors_of(base)
    moved, norms = differing(before, after), norm_names(base)
    assert moved <= norms
    assert len(moved) >= 0.9 * len(norms)  # a norm the loss hardly reaches may stand still for two steps

    method.export(base, tmp_path / "artifact", {"finetune.trigger": method.subject})
    (file,) = (tmp_path / "artifact").iterdir()
    assert file.name == "sks-backpack.safetensors"
    held = header.read_header(file).tensors
    assert held.keys() == norms
    assert sum(info.end - info.start for info in held.values()) == method.expected_bytes(base) == 4 * sum(after[name].numel() for name in norms)

    fresh = load(str(tiny_model))
    loaded = methods.load_artifact(fresh, tmp_path / "artifact")
    assert (loaded.method, loaded.trigger) == ("norms", "sks backpack")
    assert differing(tensors_of(fresh), after) == set()


def test_scales_alone(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    _, base, before = trained(settings_of(tiny_model, pictures_dir, tmp_path, shift=False))
    assert {name.rpartition(".")[2] for name in differing(before, tensors_of(base))} == {"weight"}


def test_strength_and_a_file_that_does_not_fit(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    method, base, before = trained(settings_of(tiny_model, pictures_dir, tmp_path))
    after = tensors_of(base)
    method.export(base, tmp_path / "artifact", {})
    for strength in (0.0, 0.5):
        fresh = load(str(tiny_model))
        methods.load_artifact(fresh, tmp_path / "artifact", strength)
        found = tensors_of(fresh)
        assert differing(found, before) <= (norm_names(base) if strength else set())
        for name in norm_names(base):
            torch.testing.assert_close(found[name], before[name] + strength * (after[name] - before[name]), rtol=0, atol=1e-6)
    save_tensors(tmp_path / "other.safetensors", {"unet.nowhere.weight": torch.ones(3)}, {"finetune.format": "norms"})
    with pytest.raises(Problem, match=r"unet\.nowhere\.weight"):
        methods.load_artifact(load(str(tiny_model)), tmp_path / "other.safetensors")


def test_the_command_and_the_whole_run_come_with_the_line(tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    tree, run = find("norms").load()
    assert (tree.METHOD, callable(run)) == ("norms", True)
    settings = settings_of(tiny_model, pictures_dir, tmp_path / "run")
    folder = train(settings, Console(file=io.StringIO(), width=80))
    manifest = runs.read_json(folder / "manifest.json")
    _, base, _ = trained(settings_of(tiny_model, pictures_dir, tmp_path / "again"))
    after = tensors_of(base)
    assert (manifest["status"], manifest["method"]) == ("finished", "norms")
    assert manifest["trainable_parameters"] == sum(after[name].numel() for name in norm_names(base))
    written, metadata = load_tensors(folder / "artifact" / "sks-backpack.safetensors")
    assert metadata["finetune.method"] == "norms"
    assert all(torch.equal(value, after[name]) for name, value in written.items())  # the same draws, so the same bits
