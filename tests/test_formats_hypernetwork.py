"""Hypernetwork files: module numbering, parameter counts, both forms, and what the web UI cannot express."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.errors import Problem
from finetune.formats import hypernetwork, pickles
from finetune.formats.header import expected_safetensors_bytes, read_header
from finetune.formats.hypernetwork import HypernetworkFile
from finetune.formats.hypernetwork_layers import ACTIVATIONS, expected_shapes, weight_indices

ACTIVATION_CLASSES = dict(zip(ACTIVATIONS, (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Mish), strict=True))


def reference(width, structure, activation, layer_norm, activate_output, dropout=None):
    """The web UI's rule written as modules: the independent source of key names."""
    layers = []
    for place in range(len(structure) - 1):
        layers.append(nn.Linear(int(width * structure[place]), int(width * structure[place + 1])))
        if activation != "linear" and (activate_output or place < len(structure) - 2):
            layers.append(ACTIVATION_CLASSES[activation]())
        if layer_norm:
            layers.append(nn.LayerNorm(int(width * structure[place + 1])))
        if dropout and dropout[place + 1] > 0:
            layers.append(nn.Dropout(dropout[place + 1]))
    network = nn.Module()
    network.linear = nn.Sequential(*layers)
    return network


def make(widths=(12, 8), roles=("key", "value"), structure=(1, 2, 1), activation="relu", layer_norm=False, activate_output=True, dropout=None, **rest):
    torch.manual_seed(0)
    settings = (list(structure), activation, layer_norm, activate_output, dropout)
    networks = {(width, role): reference(width, *settings).state_dict() for width in widths for role in roles}
    return HypernetworkFile(networks, *settings, name="hyp", step=7, base_name="sd15", base_hash="cc6cb27103", **rest)


@pytest.mark.parametrize(
    "settings, indices",
    [
        (([1, 2, 1], "linear", False, False), [0, 1]),
        (([1, 2, 1], None, False, True), [0, 1]),
        (([1, 2, 1], "relu", False, False), [0, 2]),
        (([1, 2, 1], "relu", False, True), [0, 2]),
        (([1, 2, 1], "linear", True, False), [0, 1, 2, 3]),
        (([1, 2, 1], "relu", True, False), [0, 2, 3, 4]),
        (([1, 2, 2, 1], "relu", False, False), [0, 2, 4]),
        (([1, 2, 2, 1], "relu", False, False, [0, 0.3, 0, 0]), [0, 3, 5]),
    ],
)
def test_weight_indices_of_known_files(settings, indices):
    assert [index for index, _ in weight_indices(*settings)] == indices


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activate_output", [False, True])
@pytest.mark.parametrize("dropout", [None, [0, 0.3, 0.3, 0]])
def test_keys_and_shapes_are_those_of_the_modules(activation, layer_norm, activate_output, dropout):
    settings = ([1, 1.5, 2, 1], activation, layer_norm, activate_output, dropout)
    state = reference(6, *settings).state_dict()
    assert expected_shapes(6, *settings) == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    "widths, structure, parameters",
    [
        ((768, 320, 640, 1280), [1, 2, 1], 21_939_840),
        ((1024, 320, 640, 1280), [1, 2, 1], 25_611_392),
        ((2048, 640, 1280), [1, 2, 1], 49_962_240),
        ((768,), [1, 2, 1], 4_723_200),
        ((768, 320, 640, 1280), [1, 1.5, 1], 16_456_384),
        ((768, 320, 640, 1280), [1, 2, 2, 1], 43_873_664),
        ((768, 320, 640, 1280), [1, 2, 4, 2, 1], 109_663_104),
    ],
)
def test_parameter_counts_of_published_widths(widths, structure, parameters):
    shapes = [shape for width in widths for shape in expected_shapes(width, structure, "relu", False, True).values()]
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes) == parameters


def test_predicted_file_size_is_the_written_one(tmp_path):
    hypernetwork.write_safetensors(tmp_path / "hyp.safetensors", make(), {})
    shapes = {
        f"hypernet.{width}.{letter}.{key}": shape
        for width in (12, 8) for letter in "kv" for key, shape in expected_shapes(width, [1, 2, 1], "relu", False, True).items()
    }
    metadata = read_header(tmp_path / "hyp.safetensors").metadata
    assert expected_safetensors_bytes(shapes, "F32", metadata) == (tmp_path / "hyp.safetensors").stat().st_size


def same(found, wanted):
    assert list(found.networks) == list(wanted.networks)
    for place, state in wanted.networks.items():
        assert list(found.networks[place]) == list(state)
        for key, tensor in state.items():
            assert torch.equal(found.networks[place][key], tensor) and found.networks[place][key].dtype == tensor.dtype
    fields = ("layer_structure", "activation", "layer_norm", "activate_output", "scope", "name", "step", "weight_init", "base_name", "base_hash", "note")
    assert {field: getattr(found, field) for field in fields} == {field: getattr(wanted, field) for field in fields}


@pytest.mark.parametrize("structure", [(1, 2, 1), (1.0, 1.5, 2, 1.0), (1, 2, 2, 2, 2, 2, 2, 1)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_both_forms_round_trip_bit_equal(tmp_path, structure, layer_norm):
    file = make(structure=structure, layer_norm=layer_norm, scope="cross", note="a note", metadata={"finetune.trigger": "toy"})
    hypernetwork.write_safetensors(tmp_path / "hyp.safetensors", file, {"finetune.trigger": "toy"})
    hypernetwork.write_webui(tmp_path / "hyp.pt", file)
    stored = hypernetwork.read(tmp_path / "hyp.safetensors")
    same(stored, file)
    same(hypernetwork.read(tmp_path / "hyp.pt"), file)
    hypernetwork.write_webui(tmp_path / "again/hyp.pt", stored)
    same(hypernetwork.read(tmp_path / "again/hyp.pt"), file)
    assert stored.metadata["finetune.trigger"] == "toy"
    assert hypernetwork.read(tmp_path / "hyp.pt").metadata == {"finetune.trigger": "toy"}


def test_the_webui_file_is_what_its_readers_look_for(tmp_path):
    hypernetwork.write_webui(tmp_path / "hyp.pt", make(structure=(1, 2, 2, 2, 2, 2, 2, 1)))
    content = torch.load(tmp_path / "hyp.pt", weights_only=True)
    assert [key for key in content if type(key) is int] == [12, 8] and type(content[12]) is tuple
    indices = [int(key.split(".")[1]) for key in content[8][1] if key.endswith("weight")]
    assert indices == [0, 2, 4, 6, 8, 10, 12]  # numeric, not alphabetical: ComfyUI chains them in this order
    assert (content["activation_func"], content["activate_output"], content["is_layer_norm"]) == ("relu", True, False)
    assert (content["use_dropout"], content["dropout_structure"], content["last_layer_dropout"]) == (False, [0.0] * 8, False)
    assert (content["name"], content["step"], content["sd_checkpoint"], content["sd_checkpoint_name"]) == ("hyp", 7, "cc6cb27103", "sd15")
    assert content["weight_initialization"] == "Normal" and content["layer_structure"] == [1, 2, 2, 2, 2, 2, 2, 1]
    assert pickles.globals_in(tmp_path / "hyp.pt") == ["collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]


def test_the_networks_compute_the_same_after_the_webui_file(tmp_path):
    file = make(structure=(1, 2, 2, 1), dropout=[0, 0.3, 0.3, 0], activate_output=False)
    hypernetwork.write_webui(tmp_path / "hyp.pt", file)
    trained = reference(12, [1, 2, 2, 1], "relu", False, False, [0, 0.3, 0.3, 0])
    trained.load_state_dict(file.networks[12, "key"])
    exported = reference(12, [1, 2, 2, 1], "relu", False, False)
    exported.load_state_dict(torch.load(tmp_path / "hyp.pt", weights_only=True)[12][0])  # strict: every key fits
    states = torch.randn(5, 12)
    assert torch.equal(trained.eval().linear(states), exported.linear(states))


def test_query_networks_have_their_own_widths_and_refuse_readers_of_version_1(tmp_path):
    keys, queries = make(widths=(12,), roles=("key",)), make(widths=(4, 8), roles=("query",))
    file = replace(keys, networks={**keys.networks, **queries.networks}, scope="cross")
    hypernetwork.write_safetensors(tmp_path / "hyp.safetensors", file, {})
    same(hypernetwork.read(tmp_path / "hyp.safetensors"), file)
    metadata = read_header(tmp_path / "hyp.safetensors").metadata
    config = json.loads(metadata["hypernetwork_config"])
    assert metadata["finetune.format_version"] == "2"
    assert (config["transform"], config["scope"], config["sizes"]) == (["query", "key"], "cross", [12, 4, 8])
    assert "hypernet.4.q.linear.0.weight" in load_file(tmp_path / "hyp.safetensors")
    with pytest.raises(Problem, match="query and key cannot be written as hyp.pt.*Train with transform key and value"):
        hypernetwork.write_webui(tmp_path / "hyp.pt", file)


def test_what_the_web_uis_would_compute_differently_is_refused(tmp_path):
    with pytest.raises(Problem, match="Layer norm with activation 'relu' and activate_output off.*ComfyUI counts LayerNorms"):
        hypernetwork.write_webui(tmp_path / "hyp.pt", make(layer_norm=True, activate_output=False))
    with pytest.raises(Problem, match="'gelu'.*nine common"):
        hypernetwork.write_webui(tmp_path / "hyp.pt", replace(make(), activation="gelu"))
    with pytest.raises(Problem, match="named 'hyp' but its file 'toy.pt'"):
        hypernetwork.write_webui(tmp_path / "toy.pt", make())
    with pytest.raises(Problem, match="key cannot be written"):
        hypernetwork.write_webui(tmp_path / "hyp.pt", make(roles=("key",)))
    hypernetwork.write_webui(tmp_path / "hyp.pt", make(layer_norm=True, activation="linear", activate_output=False))
    assert [path.name for path in tmp_path.iterdir()] == ["hyp.pt"]


def test_settings_that_contradict_the_weights_are_refused():
    file = make()
    with pytest.raises(Problem, match=r"key network for width 12 has linear.1.weight of shape none, but its settings ask for \(12, 24\)"):
        hypernetwork.check(replace(file, activation="linear"))
    with pytest.raises(Problem, match=r"linear.0.weight of shape \(24, 12\), but its settings ask for \(36, 12\)"):
        hypernetwork.check(replace(file, layer_structure=[1, 3, 1]))
    with pytest.raises(Problem, match="does not begin and end with 1"):
        hypernetwork.check(replace(file, layer_structure=[1, 2]))


def test_the_first_files_read_with_the_defaults_of_their_time(tmp_path):
    state = make(activation="linear").networks[12, "key"]
    old = {key.replace("linear.0", "linear1").replace("linear.1", "linear2"): tensor for key, tensor in state.items()}
    torch.save({12: [old, old], "step": 100}, tmp_path / "ancient.pt")
    found = hypernetwork.read(tmp_path / "ancient.pt")
    assert (found.layer_structure, found.activation, found.activate_output, found.name) == ([1, 2, 1], "linear", True, "ancient")
    assert torch.equal(found.networks[12, "value"]["linear.1.weight"], state["linear.1.weight"])


@pytest.mark.parametrize("last, dropout", [(True, [0, 0.3, 0.3, 0]), (False, [0, 0.3, 0, 0])])
def test_dropout_of_files_without_a_dropout_structure(tmp_path, last, dropout):
    file = make(widths=(12,), structure=(1, 2, 2, 1), dropout=dropout)
    pair = tuple(file.networks[12, role] for role in ("key", "value"))
    told = {"layer_structure": [1, 2, 2, 1], "activation_func": "relu", "use_dropout": True, "last_layer_dropout": last, "activate_output": True}
    torch.save({12: pair, **told}, tmp_path / "old.pt")
    found = hypernetwork.read(tmp_path / "old.pt")
    assert list(found.networks[12, "key"]) == [f"linear.{n}.{part}" for n in (0, 2, 4) for part in ("weight", "bias")]
    assert torch.equal(found.networks[12, "key"]["linear.4.weight"], list(file.networks[12, "key"].values())[4])


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(Problem, match="not a hypernetwork of finetune"):
        hypernetwork.read(tmp_path / "x.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", {"finetune.format": "hypernetwork", "finetune.format_version": "3"})
    with pytest.raises(Problem, match="version '3'; this finetune reads up to 2"):
        hypernetwork.read(tmp_path / "x.safetensors")
    file = make(widths=(12,))
    for damage, message in [({"sizes": [8]}, r"lists the sizes \[8\]"), ({"layer_structure": [1, 3, 1]}, "settings ask for")]:
        hypernetwork.write_safetensors(tmp_path / "hyp.safetensors", file, {})
        header = read_header(tmp_path / "hyp.safetensors")
        config = json.loads(header.metadata["hypernetwork_config"]) | damage
        save_file(load_file(tmp_path / "hyp.safetensors"), tmp_path / "x.safetensors", header.metadata | {"hypernetwork_config": json.dumps(config)})
        with pytest.raises(Problem, match=message):
            hypernetwork.read(tmp_path / "x.safetensors")
    for content in ({12: 3}, {12: ({}, {}, {})}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(Problem, match="no pair of networks for width 12"):
            hypernetwork.read(tmp_path / "x.pt")
    torch.save({12: ({"linear.0.gain": torch.ones(1)}, {})}, tmp_path / "x.pt")
    with pytest.raises(Problem, match="entry 'linear.0.gain'"):
        hypernetwork.read(tmp_path / "x.pt")
    torch.save({"768": ({}, {})}, tmp_path / "x.pt")
    with pytest.raises(Problem, match="whole numbers as keys"):
        hypernetwork.read(tmp_path / "x.pt")
