"""Artifacts by name: what is found, what is refused, and that no name leads out of the folder."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.cli import named
from finetune.errors import Problem


def lora(path: Path, seed: int = 0, **metadata: str) -> Path:
    """A kohya file of one module, written from the document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.full((2, 8), float(seed)), f"{name}.lora_up.weight": torch.ones(4, 2), f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, path, {"ss_network_module": "networks.lora", **metadata})
    return path


def hypernetwork(path: Path) -> Path:
    """An A1111 file of one width, in torch's legacy container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {"linear.0.weight": torch.zeros(16, 8), "linear.0.bias": torch.zeros(16), "linear.1.weight": torch.zeros(8, 16), "linear.1.bias": torch.zeros(8)}
    content = {8: (half, dict(half)), "step": 1, "name": path.stem, "layer_structure": [1, 2, 1], "activation_func": "linear", "is_layer_norm": False,
               "weight_initialization": "Normal", "activate_output": False, "use_dropout": False, "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def embedding(path: Path, key: str = "emb_params", **metadata: str) -> Path:
    """One tensor of two vectors, under a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(2, 8)}, path, metadata or None)
    return path


def refusal(kind: str, name: str, folder: Path) -> str:
    with pytest.raises(Problem) as caught:
        named.resolve(kind, name, folder)
    return str(caught.value)


def test_found_by_path_stem_output_name_and_run(tmp_path: Path) -> None:
    plain = lora(tmp_path / "toy.safetensors")
    deep = lora(tmp_path / "people" / "anna v2.safetensors", ss_output_name="anna")
    run = lora(tmp_path / "lora-1" / "artifact" / "sks-dog.safetensors")
    lora(tmp_path / "lora-1" / "artifact" / "pytorch_lora_weights.safetensors")
    lora(tmp_path / "lora-1" / "steps" / "0100" / "sks-dog.safetensors")
    hyper = hypernetwork(tmp_path / "style.pt")
    word = embedding(tmp_path / "my-dog.safetensors")
    for kind, name, path in (("lora", "toy", plain), ("lora", "toy.safetensors", plain), ("lora", "anna v2", deep), ("lora", "people/anna v2", deep),
                             ("lora", "anna", deep), ("lora", "sks-dog", run), ("lora", "lora-1/artifact/sks-dog", run),
                             ("hypernet", "style", hyper), ("embedding", "my-dog", word)):
        assert named.resolve(kind, name, tmp_path) == path, name
    assert named.resolve("lora", "lora-1", tmp_path).parent == run.parent


def test_a_stem_comes_before_an_output_name(tmp_path: Path) -> None:
    lora(tmp_path / "a" / "renamed.safetensors", ss_output_name="toy")
    assert named.resolve("lora", "toy", tmp_path).stem == "renamed"
    stem = lora(tmp_path / "b" / "toy.safetensors")
    assert named.resolve("lora", "toy", tmp_path) == stem


def test_the_same_name_twice_is_refused_with_a_name_that_works(tmp_path: Path) -> None:
    first, second = (lora(tmp_path / run / "artifact" / "sks-dog.safetensors") for run in ("lora-1", "lora-2"))
    said = refusal("lora", "sks-dog", tmp_path)
    assert "2 artifacts answer to 'sks-dog'" in said and "<lora:lora-1/artifact/sks-dog>" in said
    assert named.resolve("lora", "lora-1/artifact/sks-dog", tmp_path) == first
    assert named.resolve("lora", "lora-2", tmp_path) == second


def test_one_stem_for_two_kinds(tmp_path: Path) -> None:
    low, hyper = lora(tmp_path / "x" / "style.safetensors"), hypernetwork(tmp_path / "y" / "style.pt")
    assert named.resolve("lora", "style", tmp_path) == low
    assert named.resolve("hypernet", "style", tmp_path) == hyper


def test_what_is_refused_names_what_there_is(tmp_path: Path) -> None:
    lora(tmp_path / "blue-toy.safetensors")
    lora(tmp_path / "lora-dog" / "artifact" / "sks.safetensors")
    hypernetwork(tmp_path / "style.pt")
    assert "Did you mean 'blue-toy'?" in refusal("lora", "blu-toy", tmp_path)
    assert "Did you mean 'lora-dog'?" in refusal("lora", "lora-dgo", tmp_path)
    assert "It holds blue-toy, lora-dog, sks." in refusal("lora", "zzz", tmp_path)
    assert "written <hypernet:style>" in refusal("lora", "style", tmp_path)
    assert "holds no embedding at all" in refusal("embedding", "blue-toy2", tmp_path)
    assert "no folder" in refusal("lora", "toy", tmp_path / "absent")
    assert "kind" in refusal("checkpoint", "toy", tmp_path)


@pytest.mark.parametrize("name", [
    "../secret", "..", ".", "a/../../secret", "./secret", "/etc/passwd", "~/secret", "~", "C:secret", "C:/secret", "C:\\secret", "\\\\host\\share\\x",
    "..\\secret", "a\\b", "a//b", "secret\0", "\0", "", " ", "a\n", ".. /secret", "people/../../secret", "//host/share"])
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    lora(tmp_path / "secret.safetensors")
    inside = tmp_path / "inside"
    lora(inside / "people" / "toy.safetensors")
    assert "is no name of an artifact" in refusal("lora", name, inside)


def test_no_link_leads_out(tmp_path: Path) -> None:
    secret = lora(tmp_path / "outside" / "secret.safetensors")
    inside = tmp_path / "inside"
    real = lora(inside / "real.safetensors")
    (inside / "file.safetensors").symlink_to(secret)
    (inside / "folder").symlink_to(secret.parent, target_is_directory=True)
    (inside / "loop.safetensors").symlink_to(inside / "loop.safetensors")
    (inside / "good.safetensors").symlink_to(real)
    for name in ("file", "file.safetensors", "folder", "folder/secret"):
        assert "leads out of the folder" in refusal("lora", name, inside), name
    assert "no LoRA" in refusal("lora", "secret", inside)  # links to folders are not followed
    assert "'loop'" in refusal("lora", "loop", inside)
    assert named.resolve("lora", "good", inside).resolve() == real
    embedding(tmp_path / "outside" / "my-dog.safetensors")
    (inside / "my-dog.safetensors").symlink_to(tmp_path / "outside" / "my-dog.safetensors")
    assert named.words(["my-dog"], inside) == []


def test_a_linked_folder_of_artifacts_is_the_folder(tmp_path: Path) -> None:
    path = lora(tmp_path / "real" / "toy.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert named.resolve("lora", "toy", tmp_path / "link") == path


def test_names_too_long_and_damaged_files_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "broken.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "no LoRA" in refusal("lora", "x" * 5000, tmp_path)
    for kind in named.METHOD:
        assert "is not a" in refusal(kind, "broken", tmp_path)


def test_words_that_stand_in_the_prompt(tmp_path: Path) -> None:
    own = embedding(tmp_path / "run" / "artifact" / "my-dog.safetensors", **{"finetune.trigger": "<my-dog>"})
    embedding(tmp_path / "run" / "artifact" / "learned_embeds.safetensors", key="<my-dog>")
    embedding(tmp_path / "run" / "steps" / "0100" / "learned_embeds.safetensors", key="<my-dog>")
    cat = embedding(tmp_path / "cat.safetensors")
    lora(tmp_path / "photo.safetensors")
    assert named.words(["a photo of <my-dog>", "with a cat, red"], tmp_path) == [("<my-dog>", own.parent / "learned_embeds.safetensors"), ("cat", cat)]
    assert named.words(["a cathedral of <my-dogs>, my-dog"], tmp_path) == []
    assert named.words(["a cat"], tmp_path / "absent") == []
    embedding(tmp_path / "two" / "cat.safetensors")
    with pytest.raises(Problem, match="2 artifacts answer to 'cat'"):
        named.words(["a cat"], tmp_path)


def test_hashes_as_web_uis_show_them(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"x": "1"}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\x80?")
    whole, tensors = hashlib.sha256(file.read_bytes()).hexdigest(), hashlib.sha256(b"\0\0\x80?").hexdigest()
    assert named.hashes(file) == whole[:10]
    assert named.hashes(file, "lora") == tensors[:12]
    assert named.hashes(file, "embedding") == whole[:12]
    before = named.hashes(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"more")
    assert len(before) == 10 and named.hashes(tmp_path) != before
