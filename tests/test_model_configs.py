"""CLIP's tokenizer from its merges, and telling v-prediction checkpoints apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from finetune.errors import Problem
from finetune.model import configs, locate


def test_clip_tokenizer_gives_published_ids(tmp_path: Path) -> None:
    configs.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # as in CLIP's own README
    assert tokenizer("sks dog").input_ids == [49406, 48136, 1929, 49407]
    assert tokenizer.model_max_length == 77


def test_v_prediction_by_yaml_then_by_statistic(tmp_path: Path) -> None:
    wide, narrow = torch.linspace(-0.3, 0.3, 320), torch.linspace(-0.05, 0.05, 320)
    for name, values, expected in (("v.safetensors", wide, True), ("e.safetensors", narrow, False)):
        save_file({configs.V_KEY: values}, tmp_path / name)
        assert configs.predicts_v(tmp_path / name) is expected
    (tmp_path / "e.yaml").write_text('model:\n  params:\n    parameterization: "v"  # velocity\n')
    assert configs.predicts_v(tmp_path / "e.safetensors")
    (tmp_path / "v.yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert not configs.predicts_v(tmp_path / "v.safetensors")


def test_single_files_are_told_by_their_width(tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    for width, family in ((768, "sd1"), (1024, "sd2")):
        save_file({key: torch.zeros(2, width)}, tmp_path / f"{width}.safetensors")
        assert locate(str(tmp_path / f"{width}.safetensors")).family == family
    save_file({"something": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(Problem, match="no model.diffusion_model"):
        locate(str(tmp_path / "lora.safetensors"))
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(Problem, match=r"Convert it to \.safetensors"):
        locate(str(tmp_path / "old.ckpt"))
    with pytest.raises(Problem, match="neither a folder, a file, nor a hub id"):
        locate("./nowhere")
