"""Pipeline folders: the names and files transformers 4 needs, and the same model afterwards."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import Problem
from finetune.formats.folder import finish_diffusers_folder
from finetune.formats.header import read_header

VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5, "ab</w>": 6, "aab</w>": 7}
MERGES = [("a", "b</w>"), ("a", "ab</w>")]


@pytest.fixture
def folder(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(vocab=VOCABULARY, merges=MERGES)
    tokenizer.add_tokens("<toy>")
    config = CLIPTextConfig(vocab_size=9, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def prints(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def states(folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("ab aab <toy> b", return_tensors="pt").input_ids
    assert ids.tolist() == [[0, 6, 7, 8, 3, 1]]
    with torch.no_grad():
        return CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids).last_hidden_state


def test_trap_1_a_finished_folder_has_the_old_names_and_the_same_model(folder):
    before, weights = states(folder), load_file(folder / "text_encoder/model.safetensors")
    finish_diffusers_folder(folder)
    after = load_file(folder / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in after) and len(after) == 36
    for name, tensor in weights.items():
        assert torch.equal(after["text_model." + name.removeprefix("text_model.")], tensor)
    assert read_header(folder / "text_encoder/model.safetensors").metadata["format"] == "pt"
    assert torch.equal(states(folder), before)


def test_the_slow_tokenizers_files_state_vocabulary_merges_and_length(folder):
    finish_diffusers_folder(folder)
    tokenizer = folder / "tokenizer"
    assert json.loads((tokenizer / "vocab.json").read_text()) == VOCABULARY
    # transformers 4 skips the first line and the emptiness after the last line break
    assert (tokenizer / "merges.txt").read_text().strip().split("\n")[1:] == [" ".join(pair) for pair in MERGES]
    assert json.loads((tokenizer / "added_tokens.json").read_text()) == {"<toy>": 8}
    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["model_max_length"] == 20


def test_finishing_twice_changes_nothing(folder):
    finish_diffusers_folder(folder)
    once = prints(folder)
    finish_diffusers_folder(folder)
    assert prints(folder) == once and len(once) == 8


def test_other_folders_are_refused(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(Problem, match="no model_index.json"):
        finish_diffusers_folder(folder)
