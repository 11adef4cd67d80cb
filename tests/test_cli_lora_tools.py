"""`merge`, `extract` and `resize` as typed, on a tiny base: what they write computes what they say."""

import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from finetune.cli.app import run
from finetune.formats import lora, lora_names
from finetune.formats.lora import LoraModule
from finetune.formats.lora_kinds import LohaModule
from finetune.methods import load_artifacts
from finetune.model import load


@pytest.fixture(scope="module")
def base_weights(tiny_model):
    return weights(load(str(tiny_model)))


def weights(base):
    networks = {"unet": base.unet, "text_encoder": base.text_encoder}
    return {f"{part}.{name}": value.detach().clone() for part, network in networks.items() for name, value in network.named_parameters()}


def make(path, base_weights, rank, alpha, seed, leaves=("attn2.to_k", "attn2.to_out.0", "proj_in", "self_attn.q_proj"), dtype=torch.float32):
    """A LoRA on some layers of the tiny base."""
    torch.manual_seed(seed)
    modules = {}
    for name, value in base_weights.items():
        if name.removesuffix(".weight").endswith(leaves):
            down, up = torch.randn(rank, *value.shape[1:]), 0.05 * torch.randn(value.shape[0], rank, *[1] * (value.ndim - 2))
            modules[lora_names.canonical(name.removesuffix(".weight"))] = LoraModule(down, up, alpha)
    lora.write_kohya(path, modules, {"finetune.trigger": f"sks{seed} dog", "finetune.class_noun": "dog"}, dtype)
    return modules


def added(base_weights, loras):
    """The base's weights with (modules, strength) added, written out on its own in float64."""
    wanted = {name: value.double() for name, value in base_weights.items()}
    for modules, strength in loras:
        for name, module in modules.items():
            key = next(key for key in (f"{name}.weight", f"{name.replace('text_encoder.', 'text_encoder.text_model.')}.weight") if key in wanted)
            change = module.up.double().flatten(1) @ module.down.double().flatten(1) * (module.alpha / module.rank)
            wanted[key] = wanted[key] + strength * change.reshape(wanted[key].shape)
    return wanted


def loaded(model, artifacts):
    base = load(str(model))
    load_artifacts(base, artifacts)
    return weights(base)


def close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert (value.double() - wanted[name].double()).abs().max() <= tolerance, name


def output(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_merging_then_loading_is_loading_both(tmp_path, tiny_model, base_weights, capsys):
    first = make(tmp_path / "a.safetensors", base_weights, 4, 2.0, 1)
    second = make(tmp_path / "b.safetensors", base_weights, 3, 3.0, 2, ("attn2.to_k", "ff.net.2", "mlp.fc1"))
    assert run(["merge", f"{tmp_path}/a.safetensors:0.8", f"{tmp_path}/b.safetensors:-0.5", "--output", f"{tmp_path}/both.safetensors", "--dtype", "fp32"]) == 0
    assert "rank 7" in output(capsys)
    both = [(tmp_path / "a.safetensors", 0.8), (tmp_path / "b.safetensors", -0.5)]
    wanted = added(base_weights, [(first, 0.8), (second, -0.5)])
    close(loaded(tiny_model, both), wanted, 1e-5)
    close(loaded(tiny_model, [(tmp_path / "both.safetensors", 1.0)]), wanted, 1e-5)
    told = safe_open(tmp_path / "both.safetensors", "pt").metadata()
    assert told["finetune.merged"] == "a.safetensors:0.8, b.safetensors:-0.5" and told["ss_network_dim"] == told["ss_network_alpha"] == "7"
    assert told["finetune.trigger"] == "sks1 dog, sks2 dog" and told["ss_output_name"] == "both" and told["finetune.class_noun"] == "dog"


def test_folding_into_a_base_writes_a_folder_with_those_weights(tmp_path, tiny_model, base_weights, capsys):
    modules = make(tmp_path / "a.safetensors", base_weights, 4, 2.0, 1)
    words = ["merge", f"{tmp_path}/a.safetensors:0.5", "--into", str(tiny_model), "--output", f"{tmp_path}/folder"]
    assert run([*words, "--dtype", "fp32"]) == 0
    close(weights(load(f"{tmp_path}/folder")), added(base_weights, [(modules, 0.5)]), 1e-6)
    assert '"finetune.merged": "a.safetensors:0.5"' in (tmp_path / "folder" / "finetune.json").read_text()
    capsys.readouterr()
    assert run(words) == 2 and "exists" in output(capsys)


def test_a_rank_cuts_the_merged_lora_to_the_best_of_that_rank(tmp_path, base_weights, capsys):
    modules = make(tmp_path / "a.safetensors", base_weights, 4, 4.0, 1, ("attn2.to_k",))
    name, = [name for name in modules if name.startswith("unet.down")]
    assert run(["merge", f"{tmp_path}/a.safetensors", "--rank", "2", "--output", f"{tmp_path}/cut.safetensors", "--dtype", "fp32", "--verbose"]) == 0
    values = np.linalg.svd((modules[name].up.double() @ modules[name].down.double()).numpy(), compute_uv=False)
    kept = (values[:2] ** 2).sum() / (values**2).sum()
    assert f"{kept:.2%} rank 2 {name}" in output(capsys)
    error = (lora.read(tmp_path / "cut.safetensors")[0][name].delta() - modules[name].delta()).double().square().sum().item()
    assert error == pytest.approx((values[2:] ** 2).sum(), rel=1e-4)


def test_other_kinds_are_merged_as_their_whole_difference(tmp_path, tiny_model, base_weights, capsys):
    name, shape = next((name.removesuffix(".weight"), value.shape) for name, value in base_weights.items() if name.endswith("attn2.to_k.weight"))
    torch.manual_seed(0)
    module = LohaModule({"w1_a": torch.randn(shape[0], 2), "w1_b": torch.randn(2, shape[1]), "w2_a": torch.randn(shape[0], 2), "w2_b": torch.randn(2, shape[1])}, 1.0)
    lora.write_kohya(tmp_path / "loha.safetensors", {name: module}, {}, torch.float32)
    words = ["merge", f"{tmp_path}/loha.safetensors:0.5", "--output", f"{tmp_path}/plain.safetensors", "--dtype", "fp32"]
    assert run(words) == 2 and "holds LoHa" in output(capsys)
    assert run([*words, "--base", str(tiny_model)]) == 2 and "Add --rank" in output(capsys)
    assert run([*words, "--base", str(tiny_model), "--rank", "4"]) == 0  # a Hadamard product of ranks 2 and 2 has rank 4
    assert "keeps 100.00%" in output(capsys)
    found = lora.read(tmp_path / "plain.safetensors")[0][name].delta()
    assert torch.allclose(found, 0.5 * module.change(torch.empty(shape)), atol=1e-5)


def test_extract_finds_the_lora_that_made_the_model(tmp_path, tiny_model, base_weights, capsys):
    modules = make(tmp_path / "a.safetensors", base_weights, 4, 2.0, 1)
    assert run(["merge", f"{tmp_path}/a.safetensors", "--into", str(tiny_model), "--output", f"{tmp_path}/tuned", "--dtype", "fp32"]) == 0
    assert run(["extract", f"{tmp_path}/tuned", "--base", str(tiny_model), "--rank", "4", "--output", f"{tmp_path}/found.safetensors", "--dtype", "fp32"]) == 0
    said = output(capsys)
    assert "keeps 100.00%" in said and "100.00% is kept" in said
    close(loaded(tiny_model, [(tmp_path / "found.safetensors", 1.0)]), added(base_weights, [(modules, 1.0)]), 1e-5)
    assert set(lora.read(tmp_path / "found.safetensors")[0]) == set(modules)  # what did not change is not in the file


def test_the_error_of_extract_is_the_tail_of_numpys_singular_values(tmp_path, tiny_model, base_weights, capsys):
    base = load(str(tiny_model))
    torch.manual_seed(3)
    with torch.no_grad():
        for value in [*base.unet.parameters(), *base.text_encoder.parameters()]:
            value += 0.02 * torch.randn(value.shape)
    base.pipeline().save_pretrained(tmp_path / "tuned")
    tuned = weights(base)
    words = ["extract", f"{tmp_path}/tuned", "--base", str(tiny_model), "--rank", "3", "--output", f"{tmp_path}/found.safetensors", "--dtype", "fp32"]
    assert run(words) == 0
    energy = lost = 0.0
    for name, module in lora.read(tmp_path / "found.safetensors")[0].items():
        key = next(key for key in tuned if lora_names.canonical(key) == f"{name}.weight")
        difference = (tuned[key] - base_weights[key]).double().flatten(1).numpy()
        tail = (np.linalg.svd(difference, compute_uv=False)[3:] ** 2).sum()
        assert ((module.delta().double().flatten(1).numpy() - difference) ** 2).sum() == pytest.approx(tail, rel=1e-4)
        if name.startswith("unet."):
            energy, lost = energy + (difference**2).sum(), lost + tail
    said = output(capsys)
    assert re.search(rf"unet \d+ modules keeps {1 - lost / energy:.2%}", said) and "residual blocks" in said
    assert not any("resnets" in name for name in lora.read(tmp_path / "found.safetensors")[0])
    assert run([*words, "--conv-rank", "5", "--clamp", "0.99"]) == 0
    more = lora.read(tmp_path / "found.safetensors")[0]
    assert any("resnets.0.conv1" in name for name in more) and {module.rank for module in more.values()} == {5}


def test_rounding_of_a_half_precision_model_is_not_extracted(tmp_path, tiny_model, base_weights, capsys):
    make(tmp_path / "a.safetensors", base_weights, 2, 2.0, 1, ("attn2.to_k",))
    assert run(["merge", f"{tmp_path}/a.safetensors", "--into", str(tiny_model), "--output", f"{tmp_path}/half"]) == 0
    assert run(["extract", f"{tmp_path}/half", "--base", str(tiny_model), "--rank", "2", "--output", f"{tmp_path}/found.safetensors"]) == 0
    assert all("attn2.to_k" in name for name in lora.read(tmp_path / "found.safetensors")[0])
    assert run(["extract", str(tiny_model), "--base", str(tiny_model), "--output", f"{tmp_path}/none.safetensors"]) == 2
    assert "the same weights in every layer" in output(capsys)


def test_resize_by_rank_and_by_energy(tmp_path, base_weights, capsys):
    modules = make(tmp_path / "a.safetensors", base_weights, 6, 3.0, 1)
    assert run(["resize", f"{tmp_path}/a.safetensors", "--rank", "2", "--output", f"{tmp_path}/two.safetensors", "--dtype", "fp32"]) == 0
    said = output(capsys)
    shares = {}
    for name, module in modules.items():
        values = np.linalg.svd(module.delta().double().flatten(1).numpy(), compute_uv=False) ** 2
        shares[name] = values.cumsum() / values.sum()
        small = lora.read(tmp_path / "two.safetensors")[0][name]
        error = (small.delta() - module.delta()).double().square().sum().item()
        assert small.rank == 2 and error == pytest.approx(values[2:].sum(), rel=1e-4)
    worst = min(shares, key=lambda name: shares[name][1])
    assert "rank 6 to 2" in said and f"largest loss: {worst} keeps {shares[worst][1]:.2%}" in said
    assert run(["resize", f"{tmp_path}/a.safetensors", "--energy", "0.8", "--output", f"{tmp_path}/most.safetensors"]) == 0
    needed = max(int((share < 0.8).sum()) + 1 for share in shares.values())
    assert {module.rank for module in lora.read(tmp_path / "most.safetensors")[0].values()} == {needed}
    assert safe_open(tmp_path / "most.safetensors", "pt").metadata()["finetune.trigger"] == "sks1 dog"


@pytest.mark.parametrize("words, said", [
    (["merge", "nowhere.safetensors", "--output", "x.safetensors"], "There is no LoRA at nowhere.safetensors"),
    (["merge", "nowhere.safetensors"], "No --output"),
    (["resize", "nowhere.safetensors", "--output", "x.safetensors"], "either --rank or --energy"),
    (["resize", "nowhere.safetensors", "--rank", "2"], "No --output"),
    (["extract", "toybox"], "No --output"),
    (["extract", "toybox", "--base", "TINY", "--output", "x.safetensors"], "not of one architecture"),
    (["merge", "TINY", "--output", "x.safetensors"], "holds no LoRA")])
def test_refusals_are_one_sentence(words, said, tiny_model, capsys):
    assert run([word.replace("TINY", str(tiny_model)) for word in words]) == 2
    assert said in output(capsys)


def test_the_output_of_a_lora_is_named_as_one(tmp_path, base_weights, capsys):
    make(tmp_path / "a.safetensors", base_weights, 2, 2.0, 1, ("attn2.to_k",))
    assert run(["resize", f"{tmp_path}/a.safetensors", "--rank", "1", "--output", f"{tmp_path}/a.pt"]) == 2
    assert "does not end in .safetensors" in output(capsys)
