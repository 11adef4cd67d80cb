"""`finetune convert`: every file of one layout in the others, and back within one rounding; what cannot be carried is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ldm_by_hand
import pytest
import torch
from reference import webui_files as peers
from safetensors.torch import load_file, save_file

from finetune.cli import app
from finetune.formats import embedding, ldm, lora
from finetune.formats.acceptance import check
from finetune.formats.header import read_header
from finetune.model import load
from finetune.model.families import TOYBOX

TABLE = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def convert(path: Path, to: str, output: Path, *more: str) -> int:
    return app.run(["convert", str(path), "--to", to, "--output", str(output), *more])


@pytest.fixture()
def kohya_file(tmp_path) -> Path:
    """A kohya LoRA as another program writes it: alpha half the rank, fp32."""
    torch.manual_seed(1)
    tensors = {}
    for module, (inner, outer) in {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (48, 32),
                                   "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (48, 48)}.items():
        tensors |= {f"{module}.lora_down.weight": torch.randn(4, inner), f"{module}.lora_up.weight": torch.randn(outer, 4), f"{module}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "2"})
    return tmp_path / "theirs.safetensors"


def test_lora_to_peft_and_back_is_the_same_change(kohya_file, tmp_path):
    assert convert(kohya_file, "peft", tmp_path / "p") == 0
    assert convert(tmp_path / "p" / "pytorch_lora_weights.safetensors", "kohya", tmp_path / "again.safetensors") == 0
    before, after = lora.read(kohya_file)[0], lora.read(tmp_path / "again.safetensors")[0]
    assert before.keys() == after.keys()
    for name, module in before.items():
        wanted = 0.5 * module.up @ module.down  # alpha / rank, computed here
        assert torch.allclose(module.delta(), wanted, atol=1e-6) and torch.allclose(after[name].delta(), wanted, rtol=1e-6, atol=1e-5)
    assert check(tmp_path / "again.safetensors") == [] and check(tmp_path / "p" / "pytorch_lora_weights.safetensors") == []
    assert {info.dtype for info in read_header(tmp_path / "again.safetensors").tensors.values()} == {"F32"}  # as in the file
    assert convert(kohya_file, "kohya", tmp_path / "half.safetensors", "--dtype", "fp16") == 0
    assert (tmp_path / "half.safetensors").stat().st_size < kohya_file.stat().st_size


def spelled(kind: str, path: Path) -> Path:
    """An embedding in the spelling of another program, written by hand."""
    match kind:
        case "A1111, ParameterDict":
            table = torch.nn.ParameterDict({"*": torch.nn.Parameter(TABLE)})
            torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table, "name": "toy", "step": 700}, path / "toy.pt")
        case "diffusers .bin":
            torch.save({"<toy>": TABLE}, path / "toy.bin")
        case "OneTrainer":
            save_file({"emp_params": TABLE, "emp_params_out": TABLE + 1}, path / "toy.safetensors")
        case "kohya":
            save_file({"emb_params": TABLE.half()}, path / "toy.safetensors")
    return next(path.glob("toy.*"))


@pytest.mark.parametrize("kind", ["A1111, ParameterDict", "diffusers .bin", "OneTrainer", "kohya"])
@pytest.mark.parametrize("to", ["webui", "safetensors", "diffusers"])
def test_embeddings_of_any_spelling_become_each_layout(tmp_path, kind, to):
    theirs = spelled(kind, tmp_path)
    assert convert(theirs, to, tmp_path / "out") == 0
    (file,) = (tmp_path / "out").iterdir()
    assert check(file) == []
    wanted = TABLE.half().float() if kind == "kohya" else TABLE
    if to == "diffusers":
        assert list(load_file(file)) == ["<toy>" if kind == "diffusers .bin" else "toy"]
    else:
        assert peers.a1111_embedding(file)[0] == "toy"
    assert torch.equal(peers.comfy_embedding(file, "clip_l"), wanted) and torch.equal(embedding.read(file).vectors, wanted)


def test_sdxl_pairs_go_to_each_program_in_its_way(tmp_path, capfd):
    second = torch.randn(3, 24)
    save_file({"clip_l": TABLE, "clip_g": second}, tmp_path / "toy.safetensors")
    assert convert(tmp_path / "toy.safetensors", "webui", tmp_path / "w") == 0 and convert(tmp_path / "toy.safetensors", "diffusers", tmp_path / "d") == 0
    assert torch.equal(peers.comfy_embedding(tmp_path / "w" / "toy.safetensors", "clip_g"), second)
    assert torch.equal(load_file(tmp_path / "d" / "learned_embeds_2.safetensors")["toy"], second)
    said = " ".join(capfd.readouterr().out.split())
    assert "no place for SDXL's second table" in said and "text_encoder_2" in said


def test_hypernetworks_both_ways_and_what_is_lost_is_said(tmp_path, capfd):
    torch.manual_seed(3)
    shapes = {"linear.0.weight": (32, 16), "linear.0.bias": (32,), "linear.3.weight": (16, 32), "linear.3.bias": (16,)}
    pair = tuple({key: torch.randn(shape) for key, shape in shapes.items()} for _ in "kv")
    torch.save({16: pair, "name": "old", "step": 5, "layer_structure": [1, 2, 1], "activation_func": "relu", "activate_output": False, "use_dropout": True,
                "dropout_structure": [0, 0.3, 0]}, tmp_path / "old.pt")
    assert convert(tmp_path / "old.pt", "safetensors", tmp_path / "a") == 0
    assert "Dropout [0, 0.3, 0] is not carried" in " ".join(capfd.readouterr().out.split())
    assert convert(tmp_path / "a" / "old.safetensors", "webui", tmp_path / "b") == 0
    network, x = peers.comfy_hypernetwork(tmp_path / "b" / "old.pt")[16][0], torch.randn(2, 16)
    wanted = torch.relu(x @ pair[0]["linear.0.weight"].T + pair[0]["linear.0.bias"]) @ pair[0]["linear.3.weight"].T + pair[0]["linear.3.bias"]
    assert torch.allclose(network(x), wanted, atol=1e-5) and check(tmp_path / "b" / "old.pt") == []


def old_checkpoint(path: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The toybox as a pickled checkpoint in the original layout, by hand, with an EMA copy and a schedule."""
    base = load("toybox")
    state = ldm_by_hand.checkpoint(base.modules(), "sd1")
    extra = {"model_ema.diffusion_modeltime_embed0weight": torch.ones(3), "betas": torch.ones(1000),
             "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None]}
    torch.save({"state_dict": state | extra, "global_step": 1, **more}, path)
    return state


def test_a_ckpt_becomes_a_safe_file_and_a_folder(tmp_path, capfd):
    state = old_checkpoint(tmp_path / "toy.ckpt")
    assert convert(tmp_path / "toy.ckpt", "single-file", tmp_path / "toy.safetensors") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "1 tensors of model_ema" in said and "noise schedule" in said
    found = load_file(tmp_path / "toy.safetensors")
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert found.pop(position).dtype == torch.int64 and found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items()) and check(tmp_path / "toy.safetensors") == []
    assert convert(tmp_path / "toy.ckpt", "diffusers", tmp_path / "folder", "--dtype", "fp16") == 0
    assert check(tmp_path / "folder") == [] and not list(tmp_path.glob(".convert-*"))
    ours, theirs = ldm.of_folder(tmp_path / "folder").parts["unet"], ldm.of_folder(TOYBOX).parts["unet"]
    assert all(torch.equal(entry.load(), theirs[name].load().half()) for name, entry in ours.items())
    assert convert(tmp_path / "folder", "single-file", tmp_path / "again.safetensors") == 0
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == found.keys() and all(torch.equal(again[key], found[key].half()) for key in found)


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize(("name", "content"), [("bad.ckpt", {"state_dict": {}, "callbacks": Payload()}), ("bad.pt", {"string_to_param": {"*": TABLE}, "x": Payload()}),
                                               ("bad.bin", Payload())])
def test_malicious_pickles_are_refused_and_do_not_run(tmp_path, monkeypatch, capsys, name, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, name)
    assert convert(Path(name), "safetensors", tmp_path / "out") == 2
    assert "asks for" in capsys.readouterr().err and not Path("pwned").exists() and not (tmp_path / "out").exists()


def test_a_single_file_of_unknown_width_asks_for_a_folder_like_it(tmp_path, tiny_model, capsys):
    ldm.write(tmp_path / "tiny.safetensors", ldm.of_folder(tiny_model), {"finetune.prediction_type": "v_prediction"}, None)
    assert convert(tmp_path / "tiny.safetensors", "diffusers", tmp_path / "out") == 2
    assert "--like FOLDER" in capsys.readouterr().err
    assert convert(tmp_path / "tiny.safetensors", "diffusers", tmp_path / "out", "--like", str(tiny_model)) == 0
    assert load(str(tmp_path / "out")).prediction == "v_prediction"  # the file's own word wins over the folder's


@pytest.mark.parametrize(("to", "said"), [("single-file", "A LoRA cannot be written as single-file"), (None, "is a LoRA")])
def test_layouts_a_file_does_not_have_are_refused(kohya_file, tmp_path, capsys, to, said):
    words = ["convert", str(kohya_file), "--output", str(tmp_path / "out"), *(["--to", to] if to else [])]
    assert app.run(words) == 2 and said in " ".join(capsys.readouterr().err.split())
