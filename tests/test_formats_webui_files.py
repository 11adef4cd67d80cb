"""Embeddings and hypernetworks as AUTOMATIC1111 and ComfyUI read them, and the published sizes to the byte.

The readers are those of tests/reference/webui_files.py; files of other programs are made here by hand.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import webui_files as peers
from safetensors.torch import load_file, save_file

from finetune.errors import Problem
from finetune.formats import embedding, hypernetwork, pickles
from finetune.formats.acceptance import check
from finetune.formats.header import expected_safetensors_bytes
from finetune.formats.hypernetwork_layers import expected_shapes
from finetune.methods.hypernetwork import Mlp

TABLE = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
SECOND = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


def test_both_web_uis_use_the_table_that_was_written(tmp_path):
    embedding.write_safetensors(tmp_path / "toy.safetensors", TABLE, {"finetune.trigger": "<toy>"})
    embedding.write_webui(tmp_path / "toy.pt", TABLE, "toy", 500, "sd15", "cc6cb27103")
    for name in ("toy.safetensors", "toy.pt"):
        trigger, tables = peers.a1111_embedding(tmp_path / name)
        assert trigger == "toy" and torch.equal(tables["clip_l"], TABLE)
        assert torch.equal(peers.comfy_embedding(tmp_path / name, "clip_l"), TABLE)
        assert check(tmp_path / name) == []


def test_sdxl_pairs_reach_both_encoders(tmp_path):
    embedding.write_safetensors(tmp_path / "toy.safetensors", TABLE, {}, SECOND)
    _, tables = peers.a1111_embedding(tmp_path / "toy.safetensors")
    assert torch.equal(tables["clip_l"], TABLE) and torch.equal(tables["clip_g"], SECOND)
    assert torch.equal(peers.comfy_embedding(tmp_path / "toy.safetensors", "clip_g"), SECOND)
    back = embedding.read(tmp_path / "toy.safetensors")
    assert torch.equal(back.vectors, TABLE) and torch.equal(back.second, SECOND) and check(tmp_path / "toy.safetensors") == []
    assert back.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    with pytest.raises(Problem, match="3 and 2 vectors"):
        embedding.write_safetensors(tmp_path / "odd.safetensors", TABLE, {}, SECOND[:2])


@pytest.mark.parametrize(("vectors", "size"), [(1, 8_336), (4, 32_920), (8, 65_688)])
def test_sizes_of_sdxl_pairs(vectors, size):
    assert expected_safetensors_bytes({"clip_l": (vectors, 768), "clip_g": (vectors, 1280)}, "F32") == size


@pytest.mark.parametrize(("width", "vectors", "size"), [(768, 1, 3_572), (768, 4, 12_788), (768, 8, 25_076), (1024, 1, 4_596), (1024, 4, 16_884), (1024, 8, 33_268)])
def test_sizes_of_legacy_embeddings(width, vectors, size):
    """torch names the one storage by its address (15 decimal digits here), twice; ours is called "0"."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.empty(vectors, width, device="meta")}, "name": "mystyle", "step": 500,
               "sd_checkpoint": None, "sd_checkpoint_name": None}
    ours = pickles.expected_bytes(content)
    theirs = ours + 2 * (_digits() - 1)
    assert ours < size and abs(theirs - size) <= 4


def _digits() -> int:
    """Decimal digits of the address by which torch names a storage."""
    return len(str(torch.empty(1).untyped_storage()._cdata))


def content_of(sizes: list[int], structure: list[float], dtype: torch.dtype, device: str = "meta") -> dict[Any, Any]:
    """A web UI's hypernetwork with linear activation, as it would write one: every network has names of its own, which pickle does not share."""
    content: dict[Any, Any] = {width: tuple(
        OrderedDict((key, torch.empty(shape, dtype=dtype, device=device)) for key, shape in expected_shapes(width, structure, "linear", False, True).items())
        for _ in "kv") for width in sizes}
    return content | {"step": 1000, "name": "mystyle", "layer_structure": structure, "activation_func": "linear", "is_layer_norm": False,
                      "weight_initialization": "Normal", "sd_checkpoint": None, "sd_checkpoint_name": None, "activate_output": True, "use_dropout": False,
                      "dropout_structure": None, "last_layer_dropout": False, "optional_info": None}


@pytest.mark.parametrize(("sizes", "structure", "dtype", "raw", "legacy"), [
    ([768, 320, 640, 1280], [1, 2, 1], torch.float32, 87_759_360, 87_763_952), ([768, 320, 640, 1280], [1, 2, 1], torch.float16, 43_879_680, 43_884_271),
    ([1024, 320, 640, 1280], [1, 2, 1], torch.float32, 102_445_568, 102_450_160), ([2048, 640, 1280], [1, 2, 1], torch.float16, 99_924_480, None),
    ([768, 320, 640, 1280], [1, 1.5, 1], torch.float16, 32_912_768, None), ([768, 320, 640, 1280], [1, 2, 2, 1], torch.float32, 175_494_656, 175_501_540),
    ([768, 320, 640, 1280], [1, 2, 4, 2, 1], torch.float32, 438_652_416, None)])
def test_sizes_of_hypernetworks(sizes, structure, dtype, raw, legacy):
    content = content_of(sizes, structure, dtype)
    tensors = [value for width in sizes for state in content[width] for value in state.values()]
    assert sum(value.numel() * value.element_size() for value in tensors) == raw
    ours, count = pickles.expected_bytes(content), len(tensors)
    if legacy:  # torch names each storage by its address, of 14 digits when the document's file was written, twice; ours count from 0
        theirs = ours + 2 * sum(14 - len(str(number)) for number in range(count))
        assert abs(theirs - legacy) <= 12  # that file's checkpoint fields are not known


def test_foretold_sizes_are_those_on_disk_and_torchs_own(tmp_path):
    content = content_of([16, 24], [1, 2, 1], torch.float16, "cpu")
    for width in (16, 24):
        for state in content[width]:
            for value in state.values():
                value.normal_()
    pickles.save_legacy(content, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size == pickles.expected_bytes(content_of([16, 24], [1, 2, 1], torch.float16))
    whole = io.BytesIO()
    torch.save(torch.load(tmp_path / "a.pt", weights_only=True), whole, _use_new_zipfile_serialization=False)
    saved = 2 * sum(_digits() - len(str(number)) for number in range(16))
    assert abs(len(whole.getvalue()) - saved - (tmp_path / "a.pt").stat().st_size) <= 32  # addresses vary by a digit


def made(activation: str, norm: bool, activate: bool, structure: list[float], widths: tuple[int, ...] = (16, 24)) -> hypernetwork.HypernetworkFile:
    """Random networks of those settings."""
    torch.manual_seed(7)
    networks = {}
    for width in widths:
        for role in ("key", "value"):
            network = Mlp(width, structure, activation, norm, activate)
            for value in network.parameters():
                torch.nn.init.normal_(value, 0.2, 0.3)
            networks[width, role] = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return hypernetwork.HypernetworkFile(networks, structure, activation, norm, activate, name="toy", step=12)


@pytest.mark.parametrize("structure", [[1, 2, 1], [1, 2, 2, 1], [1, 1.5, 2, 2, 2, 2, 1]])
@pytest.mark.parametrize(("activation", "norm", "activate"), [("linear", False, False), ("relu", False, False), ("swish", False, True), ("mish", True, True),
                                                              ("linear", True, False), ("tanh", False, True), ("softsign", False, False)])
def test_a1111_and_comfy_compute_what_was_trained(tmp_path, structure, activation, norm, activate):
    file = made(activation, norm, activate, structure)
    hypernetwork.write_webui(tmp_path / "toy.pt", file)
    webui, comfy = peers.a1111_hypernetwork(tmp_path / "toy.pt"), peers.comfy_hypernetwork(tmp_path / "toy.pt")
    assert list(webui) == list(comfy) == [16, 24] and check(tmp_path / "toy.pt") == []
    for width in (16, 24):
        x = torch.randn(2, 5, width)
        for place, role in enumerate(("key", "value")):
            live = Mlp(width, structure, activation, norm, activate)
            live.load_state_dict(dict(file.networks[width, role]))
            for strength in (0.0, 0.6, 1.0):
                wanted = x + strength * live(x)
                assert torch.equal(x + strength * webui[width][place](x), wanted) and torch.equal(x + strength * comfy[width][place](x), wanted)


def test_dropout_is_left_out_and_layers_are_renumbered(tmp_path):
    """A file of the web UI with dropout between the layers, written by hand: weights at 0, 3, 5."""
    torch.manual_seed(2)
    shapes = {"linear.0.weight": (32, 16), "linear.0.bias": (32,), "linear.3.weight": (32, 32), "linear.3.bias": (32,), "linear.5.weight": (16, 32), "linear.5.bias": (16,)}
    pair = tuple(OrderedDict((key, torch.randn(shape)) for key, shape in shapes.items()) for _ in "kv")
    torch.save({16: pair, "step": 9, "name": "old", "layer_structure": [1, 2, 2, 1], "activation_func": "relu", "is_layer_norm": False, "activate_output": False,
                "use_dropout": True, "dropout_structure": [0, 0.3, 0, 0]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    before = peers.a1111_hypernetwork(tmp_path / "old.pt")
    (tmp_path / "new").mkdir()
    hypernetwork.write_webui(tmp_path / "new" / "old.pt", hypernetwork.read(tmp_path / "old.pt"))
    after, comfy = peers.a1111_hypernetwork(tmp_path / "new" / "old.pt"), peers.comfy_hypernetwork(tmp_path / "new" / "old.pt")
    x = torch.randn(4, 16)
    for place in (0, 1):
        assert torch.equal(before[16][place](x), after[16][place](x)) and torch.equal(after[16][place](x), comfy[16][place](x))
    content = torch.load(tmp_path / "new" / "old.pt", weights_only=True)
    assert list(content[16][0]) == ["linear.0.weight", "linear.0.bias", "linear.2.weight", "linear.2.bias", "linear.4.weight", "linear.4.bias"]
    assert content["use_dropout"] is False and content["dropout_structure"] == [0.0] * 4
    assert any("dropout" in finding.text for finding in check(tmp_path / "old.pt")) and check(tmp_path / "new" / "old.pt") == []


def test_settings_the_two_read_differently_are_refused(tmp_path):
    with pytest.raises(Problem, match="counts LayerNorms as layers"):
        hypernetwork.write_webui(tmp_path / "toy.pt", made("relu", True, False, [1, 2, 1]))
    alone = made("relu", False, False, [1, 2, 1])
    half = replace(alone, networks={place: state for place, state in alone.networks.items() if place[1] == "key"})
    with pytest.raises(Problem, match="for key cannot be written"):
        hypernetwork.write_webui(tmp_path / "toy.pt", half)
    with pytest.raises(Problem, match="nine common ones"):
        hypernetwork.write_webui(tmp_path / "toy.pt", replace(made("relu", False, False, [1, 2, 1]), activation="gelu"))
    assert list(tmp_path.iterdir()) == []


def test_novelai_lists_and_first_names_become_ours_and_come_back(tmp_path: Path):
    torch.manual_seed(4)
    states = [{"linear1.weight": torch.randn(32, 16), "linear1.bias": torch.randn(32), "linear2.weight": torch.randn(16, 32), "linear2.bias": torch.randn(16)}
              for _ in "kv"]
    torch.save({16: states}, tmp_path / "nai.pt")
    found = hypernetwork.read(tmp_path / "nai.pt")
    hypernetwork.write_safetensors(tmp_path / "nai.safetensors", found, {})
    again = hypernetwork.read(tmp_path / "nai.safetensors")
    (tmp_path / "back").mkdir()
    hypernetwork.write_webui(tmp_path / "back" / "nai.pt", again)
    network = peers.a1111_hypernetwork(tmp_path / "back" / "nai.pt")[16][1]
    x = torch.randn(3, 16)
    wanted = (x @ states[1]["linear1.weight"].T + states[1]["linear1.bias"]) @ states[1]["linear2.weight"].T + states[1]["linear2.bias"]
    assert torch.allclose(network(x), wanted, atol=1e-5)
    assert not any(key.isdigit() for key in load_file(tmp_path / "nai.safetensors"))  # or ComfyUI would take it for networks


def test_the_web_uis_check_is_one_that_can_fail(tmp_path):
    torch.save({"string_to_param": {"*": TABLE}}, tmp_path / "zip.pt")
    with pytest.raises(AssertionError, match="bad file inside"):
        peers.a1111_embedding(tmp_path / "zip.pt")
    torch.save({"when": io.BytesIO}, tmp_path / "code.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(AssertionError, match="forbidden"):
        peers.a1111_check(tmp_path / "code.pt")
    save_file({"a": TABLE, "b": TABLE + 1}, tmp_path / "two.safetensors")
    with pytest.raises(AssertionError, match="couldn't identify"):
        peers.a1111_embedding(tmp_path / "two.safetensors")
