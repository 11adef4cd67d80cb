"""Each point of the acceptance list finds what it is there to find; files that meet it are in the tests of their writers."""

from __future__ import annotations

import json
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import Problem
from finetune.formats import embedding, ldm, lora
from finetune.formats.acceptance import check
from finetune.formats.folder import finish_diffusers_folder
from finetune.model.families import TOYBOX

K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
V = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
Q = "text_encoder.encoder.layers.0.self_attn.q_proj"


def found(path: Path) -> set[int]:
    return {finding.point for finding in check(path)}


def told(path: Path) -> str:
    return " ".join(finding.text for finding in check(path))


@pytest.fixture()
def modules() -> dict[str, Any]:
    return {name: lora.LoraModule(torch.randn(2, 16), torch.randn(16, 2), 1.0) for name in (K, V, Q)}


def test_point_1_headers_and_numbers(tmp_path):
    save_file({"emb_params": torch.tensor([[1.0, float("nan")]])}, tmp_path / "nan.safetensors")
    assert 1 in found(tmp_path / "nan.safetensors")
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}).encode()
    (tmp_path / "hole.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(20))
    assert found(tmp_path / "hole.safetensors") == {1}
    with pytest.raises(Problem, match="says nothing of"):
        check(tmp_path / "notes.txt")


def test_point_2_kohya(tmp_path, modules):
    lora.write_kohya(tmp_path / "good.safetensors", modules, {})
    assert check(tmp_path / "good.safetensors") == []
    tensors = load_file(tmp_path / "good.safetensors")
    metadata = {"ss_network_dim": "2", "ss_network_alpha": "1"}
    breaks: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        ({key.replace("text_model_", ""): value for key, value in tensors.items()}, metadata, "lacks text_model_"),
        ({key: value for key, value in tensors.items() if not (key.endswith("alpha") and "to_k" in key)}, metadata, "2 of 3 modules"),
        ({key: value * 2 if key.endswith("alpha") and "to_k" in key else value for key, value in tensors.items()}, metadata, "alphas [1.0, 2.0]"),
        (tensors, {**metadata, "ss_network_dim": "8"}, "ss_network_dim says 8"),
        (tensors, {**metadata, "lora_adapter_metadata": "{}"}, "makes diffusers refuse"),
        ({key: value for key, value in tensors.items() if "to_k.lora_up" not in key}, metadata, "lacks a half"),
        ({**tensors, "lora_unet_sparkles.alpha": torch.tensor(1.0)}, metadata, "lora_unet_sparkles"),
        ({key: torch.cat([value] * 2) if key.endswith("to_k.lora_down.weight") else value for key, value in tensors.items()}, metadata, "ranks [2, 4]")]
    for number, (content, header, said) in enumerate(breaks):
        save_file(content, tmp_path / f"{number}.safetensors", header)
        assert said in told(tmp_path / f"{number}.safetensors") and found(tmp_path / f"{number}.safetensors") == {2}


def test_point_3_peft(tmp_path, modules):
    lora.write_peft(tmp_path / "good.safetensors", modules, {})
    assert check(tmp_path / "good.safetensors") == []
    tensors = load_file(tmp_path / "good.safetensors")
    save_file({key.replace("text_model.", ""): value for key, value in tensors.items()}, tmp_path / "flat.safetensors")
    save_file(tensors, tmp_path / "told.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})})
    assert found(tmp_path / "flat.safetensors") == found(tmp_path / "told.safetensors") == {3}
    five = {f"unet.{name}": {} for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")}
    save_file(tensors, tmp_path / "five.safetensors", {"lora_adapter_metadata": json.dumps(five)})
    assert check(tmp_path / "five.safetensors") == []


GOOD: dict[Any, Any] = {"step": 1, "name": "h", "layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": False, "activate_output": False,
                        "use_dropout": False, "dropout_structure": [0, 0, 0]}


def pair(names: tuple[str, str] = ("linear.0", "linear.2")) -> tuple[OrderedDict, OrderedDict]:
    def one() -> OrderedDict:
        return OrderedDict([(f"{names[0]}.weight", torch.ones(16, 8)), (f"{names[0]}.bias", torch.ones(16)),
                            (f"{names[1]}.weight", torch.ones(8, 16)), (f"{names[1]}.bias", torch.ones(8))])

    return one(), one()


@pytest.mark.parametrize(("change", "said"), [
    ({}, ""), ({"activation_func": None}, "activation_func is None"), ({"activate_output": None}, "activate_output is not said"),
    ({"use_dropout": True}, "has dropout"), ({"name": "other"}, "looks it up by both"), ({8: pair(("linear.0", "linear.1"))}, "keys, shapes or order of width 8"),
    ({8: list(pair())}, "no pair"), ({8: tuple(OrderedDict(reversed(state.items())) for state in pair())}, "order of width 8")])
def test_point_4_hypernetworks(tmp_path, change, said):
    torch.save({8: pair(), **GOOD, **change}, tmp_path / "h.pt", _use_new_zipfile_serialization=False)
    assert said in told(tmp_path / "h.pt") and found(tmp_path / "h.pt") == ({4} if said else set())


def test_points_4_and_5_containers(tmp_path):
    torch.save({8: pair(), **GOOD}, tmp_path / "h.pt")
    assert found(tmp_path / "h.pt") == {4} and "web UI refuses" in told(tmp_path / "h.pt")
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 8))}), "name": "e"}, tmp_path / "e.pt")
    assert found(tmp_path / "e.pt") == {5} and "ParameterDict" in told(tmp_path / "e.pt")


def test_point_5_embeddings(tmp_path):
    embedding.write_webui(tmp_path / "toy.pt", torch.randn(2, 8), "toy")
    shutil.copy(tmp_path / "toy.pt", tmp_path / "renamed.pt")
    assert check(tmp_path / "toy.pt") == [] and found(tmp_path / "renamed.pt") == {5}
    for name, content, said in (("my toy", {"emb_params": torch.ones(2, 8)}, "cannot be typed"), ("half", {"emb_params": torch.ones(2, 8).half()}, "not float32"),
                                ("flat", {"emb_params": torch.ones(8)}, "not (vectors, width)"), ("two", {"a": torch.ones(1, 8), "b": torch.zeros(1, 8)}, "holds 2"),
                                ("odd", {"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 8)}, "equal length")):
        save_file(content, tmp_path / f"{name}.safetensors")
        assert said in told(tmp_path / f"{name}.safetensors") and found(tmp_path / f"{name}.safetensors") == {5}


def test_point_6_checkpoints(tmp_path):
    ldm.write(tmp_path / "good.safetensors", ldm.of_folder(TOYBOX), {})
    assert check(tmp_path / "good.safetensors") == []
    whole = load_file(tmp_path / "good.safetensors")
    one = "model.diffusion_model.input_blocks.1.0.out_layers.0.bias"
    for name, content, said in (("less", {key: value for key, value in whole.items() if key != one}, "down_blocks.0.resnets.0.norm2.bias has shape none"),
                                ("more", {**whole, "model.diffusion_model.sparkle.weight": torch.ones(2)}, "sparkle"),
                                ("shape", {**whole, one: torch.ones(7).half()}, "has shape (7,)"),
                                ("ema", {**whole, "model_ema.x": torch.ones(2)}, "read by nobody"),
                                ("headless", {key: value for key, value in whole.items() if not key.startswith("first_stage")}, "lacks vae"),
                                ("prefix", {key.replace("text_model.", "text_model.model."): value for key, value in whole.items()}, "no whole checkpoint")):
        save_file(content, tmp_path / f"{name}.safetensors", {"format": "pt"})
        assert said in told(tmp_path / f"{name}.safetensors") and found(tmp_path / f"{name}.safetensors") == {6}, name


def test_point_7_folders(tmp_path):
    good = tmp_path / "good"
    shutil.copytree(TOYBOX, good, ignore=shutil.ignore_patterns("judge", "variants"))
    finish_diffusers_folder(good)
    assert check(good) == []
    weights = good / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file({key.removeprefix("text_model."): value for key, value in state.items()}, weights, {"format": "pt"})
    assert "text_model. level" in told(good)
    save_file(state, weights, None)
    assert "format=pt" in told(good)
    save_file(state, weights, {"format": "pt"})
    (good / "tokenizer" / "merges.txt").unlink()
    assert found(good) == {7} and "merges.txt" in told(good)
    shutil.rmtree(good / "scheduler")
    assert "names scheduler" in told(good)
