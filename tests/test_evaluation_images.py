"""Rendering rows: what is asked of the model, and what is rendered again."""

import io
import os
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

import finetune.methods
import finetune.model
from evaluation_fixture import SAMPLER, paint, shots_of, stub_render, write_comparison
from finetune import runs
from finetune.errors import Problem
from finetune.evaluation import render_comparison, render_row, suite

FEW = {"subject": 1, "class": 3}
COUNT = 10 + 3 + 12


@pytest.fixture
def calls(monkeypatch):
    """Calls of the stubbed renderer; loading an artifact marks the fresh base with its bytes."""
    found = []
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a slow disk is not under test
    monkeypatch.setattr(finetune.model, "render", stub_render(found), raising=False)
    monkeypatch.setattr(finetune.model, "load", lambda name, device, dtype: SimpleNamespace(hash="0123", artifact=""), raising=False)

    def load_artifact(base, path):
        assert base.artifact == "", "the base must be fresh"
        base.artifact = (path / "weights.safetensors").read_text()

    monkeypatch.setattr(finetune.methods, "load_artifact", load_artifact)
    return found


def rendered(calls):
    return sum(len(call[2]) for call in calls)


def quietly():
    return Console(file=io.StringIO(), width=100)


def test_a_comparison_renders_base_and_rows_with_their_artifacts(tmp_path, calls):
    comparison = write_comparison(tmp_path, seeds=FEW)
    render_comparison(tmp_path, quietly())
    assert rendered(calls) == 3 * COUNT
    assert [call[1] for call in calls[::4]] == ["", "copier", "still"]
    assert {call[3] for call in calls} == {tuple(sorted(SAMPLER.items()))}
    for row, subject, artifact in (("base", "mug", ""), ("copier", "sks mug", "copier")):
        for shot in shots_of(comparison, subject):
            with Image.open(tmp_path / row / "images" / shot.file) as picture:
                assert picture.tobytes() == paint("0123", artifact, shot.prompt, shot.seed).tobytes()
    assert not list(tmp_path.rglob("*.part*"))


def test_only_what_is_missing_or_changed_is_rendered_again(tmp_path, calls):
    write_comparison(tmp_path, seeds=FEW)
    render_comparison(tmp_path, quietly())
    calls.clear()
    render_comparison(tmp_path, quietly())
    assert calls == []
    (tmp_path / "still" / "images" / "class-00-2.png").unlink()
    render_comparison(tmp_path, quietly())
    assert [(call[1], call[2]) for call in calls] == [("still", ("a photo of a mug",))]
    calls.clear()
    (tmp_path / "copier" / "artifact" / "weights.safetensors").write_bytes(b"newer")
    render_comparison(tmp_path, quietly())
    assert {call[1] for call in calls} == {"newer"} and rendered(calls) == COUNT


def test_another_sampler_renders_everything_again_and_more_seeds_only_the_new_ones(tmp_path, calls):
    comparison = write_comparison(tmp_path, rows=(), seeds=FEW)
    render_comparison(tmp_path, quietly())
    calls.clear()
    comparison["suite"] = {"name": None, "seeds": {"subject": 2, "class": 3}}
    runs.write_json(tmp_path / "comparison.json", comparison)
    render_comparison(tmp_path, quietly())
    assert rendered(calls) == 10
    calls.clear()
    comparison["sampler"] = {**SAMPLER, "guidance": 5.0}
    runs.write_json(tmp_path / "comparison.json", comparison)
    render_comparison(tmp_path, quietly())
    assert rendered(calls) == 20 + 3 + 12


def test_a_crash_between_pictures_keeps_what_was_done(tmp_path, monkeypatch):
    calls = []
    whole = stub_render(calls)

    def breaks(base, prompts, seeds, **sampler):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(base, prompts, seeds, **sampler)

    base = SimpleNamespace(hash="0123", artifact="")
    asked = suite("toybox", "mug", seeds={"subject": 1})
    monkeypatch.setattr(finetune.model, "render", breaks, raising=False)
    with pytest.raises(KeyboardInterrupt):
        render_row(base, asked, "mug", tmp_path, SAMPLER)
    monkeypatch.setattr(finetune.model, "render", whole, raising=False)
    told = []
    assert render_row(base, asked, "mug", tmp_path, SAMPLER, told.append) == 30 - 16
    assert told == [8, 14]


def test_a_row_without_an_artifact_is_passed_over_and_said_so(tmp_path, calls):
    write_comparison(tmp_path, seeds=FEW)
    (tmp_path / "still" / "artifact" / "weights.safetensors").unlink()
    (tmp_path / "still" / "artifact").rmdir()
    console = quietly()
    render_comparison(tmp_path, console)
    assert not (tmp_path / "still" / "images").exists()
    assert "Still: no artifact" in console.file.getvalue()
    assert f"Copier: {COUNT} of {COUNT} pictures rendered." in console.file.getvalue()


def test_a_base_that_changed_is_refused(tmp_path, calls):
    comparison = write_comparison(tmp_path, seeds=FEW)
    runs.write_json(tmp_path / "comparison.json", {**comparison, "model_hash": "4567"})
    with pytest.raises(Problem, match="not the one the rows were trained on.*0123.*4567"):
        render_comparison(tmp_path, quietly())


def test_no_comparison_is_refused(tmp_path):
    with pytest.raises(Problem, match="no comparison"):
        render_comparison(tmp_path, quietly())


def test_the_real_renderer_on_a_tiny_base(tmp_path, tiny_model):
    """No stubs: the same shot alone and in the row is the same picture."""
    import numpy as np

    base = finetune.model.load(str(tiny_model))
    asked = suite("other", "mug", seeds={"subject": 1, "class": 1})
    assert render_row(base, asked, "mug", tmp_path, {"steps": 2, "guidance": 3.0}) == 10 + 1 + 12
    shot = asked.shots("mug", 0)[5]
    alone = finetune.model.render(base, [shot.prompt], [shot.seed], steps=2, guidance=3.0)[0]
    with Image.open(tmp_path / "images" / shot.file) as picture:
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
