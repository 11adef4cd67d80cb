"""Strengths and orders of artifacts, against the web UI's and ComfyUI's arithmetic written again in tests/reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import webui
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import methods
from finetune.errors import Problem
from finetune.methods.base import Strength
from finetune.model import prompts, tags
from finetune.model.base import Base, load

UNET = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v": "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"}
TEXT = {"lora_te_text_model_encoder_layers_1_self_attn_q_proj": "encoder.layers.1.self_attn.q_proj"}
WIDTH = 48  # of the tiny base's text states


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lora_file(path: Path, base: Base, seed: int, rank: int = 4, alpha: float = 3.0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A kohya file by the document; returns (up, down) by path of the layer."""
    tensors, pairs = {}, {}
    for network, names in ((base.unet, UNET), (base.text_encoder, TEXT)):
        for key, name in names.items():
            out, inner = network.get_submodule(name).weight.shape
            up, down = torch.randn(out, rank, generator=draws(seed)), torch.randn(rank, inner, generator=draws(seed + 1))
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}
            pairs[name] = (up, down)
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)})
    return pairs


def hypernetwork_file(path: Path, seed: int, activation: str = "relu", activate_output: bool = False, widths: tuple[int, ...] = (WIDTH,)) -> dict[Any, Any]:
    """An A1111 file by the document, legacy container; returns its content."""
    content: dict[Any, Any] = {"step": 3, "name": path.stem, "layer_structure": [1, 2, 1], "activation_func": activation, "is_layer_norm": False,
                               "weight_initialization": "Normal", "sd_checkpoint": None, "sd_checkpoint_name": None,
                               "activate_output": activate_output, "use_dropout": False}
    second = 1 if activation == "linear" else 2
    for width in widths:
        pair = []
        for half in range(2):
            source = draws(100 * seed + width + half)
            shapes = {"linear.0.weight": (2 * width, width), "linear.0.bias": (2 * width,), f"linear.{second}.weight": (width, 2 * width),
                      f"linear.{second}.bias": (width,)}
            pair.append({key: 0.3 * torch.randn(shape, generator=source) for key, shape in shapes.items()})
        content[width] = tuple(pair)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return content


def weights(base: Base) -> dict[str, torch.Tensor]:
    """Every weight under its plain name, as bits."""
    return {f"{part}.{name.replace('token_embedding.table.', 'token_embedding.')}": value.detach().clone().view(torch.int32)
            for part, module in base.modules().items() for name, value in module.named_parameters()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def word(base: Base, text: str) -> torch.Tensor:
    """The UNet's answer to one fixed question with a prompt."""
    cond, _ = prompts.encode_weighted(base, [text], [""])
    noisy = torch.randn(1, 4, 16, 16, generator=draws(9))
    return base.ask(noisy, torch.tensor([500]), cond)


@torch.no_grad()
def contexts(base: Base, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What enters an attention layer, and what then reaches its to_k and to_v."""
    attention, seen = base.unet.get_submodule(name), {}
    handles = [attention.register_forward_pre_hook(lambda _, args, named: seen.update(c=named.get("encoder_hidden_states"), x=args[0]), with_kwargs=True)]
    for leaf in ("to_k", "to_v"):
        handles.append(getattr(attention, leaf).register_forward_hook(lambda _, args, out, leaf=leaf: seen.update({leaf: args[0]})))
    word(base, "a photo of a cat")
    for handle in handles:
        handle.remove()
    return tuple(value.numpy() for value in (seen["x"] if seen["c"] is None else seen["c"], seen["to_k"], seen["to_v"]))


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Base:
    """Read once; do not change it."""
    return load(str(tiny_model))


@pytest.fixture
def again(opened: Base) -> Callable[[], Base]:
    """Fresh copies of the tiny base."""
    return lambda: copy.deepcopy(opened)


@pytest.fixture
def base(again: Callable[[], Base]) -> Base:
    return again()


@pytest.fixture(scope="module")
def trained(make_model: Any) -> Path:
    """A whole network that differs from the base in every weight."""
    return make_model(seed=5)


# -- strength 0 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["lora", "hypernetwork", "textual-inversion", "dreambooth"])
def test_strength_zero_is_the_base_to_the_bit(base: Base, again: Callable[[], Base], trained: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.safetensors"
    match kind:
        case "lora":
            lora_file(path, base, 0)
        case "hypernetwork":
            path = tmp_path / "some.pt"
            hypernetwork_file(path, 0)
        case "textual-inversion":
            save_file({"<new>": torch.randn(2, WIDTH, generator=draws(0))}, path)
        case "dreambooth":
            path = trained
    plain = again()
    for fresh in (base, plain):  # a -0 that adding zero would turn into 0
        fresh.unet.get_submodule(next(iter(UNET.values()))).weight.data[0, :5] = -0.0
        fresh.text_encoder.get_submodule(next(iter(TEXT.values()))).weight.data[0, :5] = -0.0
    before = weights(plain)
    full = again()
    methods.load_artifact(full, path, 1.0)
    loaded = methods.load_artifact(base, path, 0.0)
    assert loaded.method == kind and same_bits(weights(base), before)
    for text in ("a photo of a cat", "a photo of <new>"):
        assert torch.equal(word(base, text), word(plain, text))
    assert not torch.equal(word(full, "a photo of <new>"), word(plain, "a photo of <new>")), "it does nothing at 1, so the test proves nothing"


# -- LoRA --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tag", "unet", "text", "dyn"), [
    ("<lora:x>", 1, 1, None), ("<lora:x:0.5>", 0.5, 0.5, None), ("<lora:x:0.5:0.8>", 0.8, 0.5, None), ("<lora:x:0:0.8>", 0.8, 0, None),
    ("<lora:x:0.7:0>", 0, 0.7, None), ("<lora:x:-1:1.5:2>", 1.5, -1, 2), ("<lora:x:1:1:9>", 1, 1, 9)])
def test_lora_of_a_tag(base: Base, again: Callable[[], Base], tmp_path: Path, tag: str, unet: float, text: float, dyn: int | None) -> None:
    pairs = lora_file(tmp_path / "x.safetensors", base, 0)
    use = tags.uses(tags.find(tag)[1])[0][0]
    methods.load_artifacts(base, [(tmp_path / "x.safetensors", Strength(use.unet, use.text, use.rank))])
    plain = again()
    for part, names, share in (("unet", UNET, unet), ("text_encoder", TEXT, text)):
        for name in names.values():
            up, down = (value.numpy() for value in pairs[name])
            old, new = (fresh.modules()[part].get_submodule(name).weight.detach() for fresh in (plain, base))
            np.testing.assert_allclose(new.numpy(), webui.lora(old.numpy(), [(up, down, 3.0, share, dyn)]), atol=2e-6)
            assert torch.equal(old, new) == (share == 0)
    touched = [f"{part}.{name}.weight" for part, names in (("unet", UNET), ("text_encoder", TEXT)) for name in names.values()]
    rest = [{name: value for name, value in weights(fresh).items() if name not in touched} for fresh in (plain, base)]
    assert same_bits(*rest)


def test_several_loras_add_up_in_any_order(base: Base, again: Callable[[], Base], tmp_path: Path) -> None:
    one, two = lora_file(tmp_path / "a.safetensors", base, 0), lora_file(tmp_path / "b.safetensors", base, 50, rank=2, alpha=1.0)
    files = [(tmp_path / "a.safetensors", 0.6), (tmp_path / "b.safetensors", -0.4)]
    other, plain = again(), again()
    methods.load_artifacts(base, files)
    methods.load_artifacts(other, files[::-1])
    for name in UNET.values():
        old, new, turned = (fresh.unet.get_submodule(name).weight.detach().numpy() for fresh in (plain, base, other))
        pieces = [(one[name][0].numpy(), one[name][1].numpy(), 3.0, 0.6, None), (two[name][0].numpy(), two[name][1].numpy(), 1.0, -0.4, None)]
        np.testing.assert_allclose(new, webui.lora(old, pieces), atol=2e-6)
        np.testing.assert_allclose(new, turned, atol=2e-6)


@pytest.mark.parametrize("strength", [0, 0.5])
def test_a_word_bundled_in_a_lora_is_learned_with_it(base: Base, tmp_path: Path, strength: float) -> None:
    lora_file(tmp_path / "x.safetensors", base, 0)
    rows = torch.randn(2, base.context_width, generator=torch.Generator().manual_seed(5))
    save_file({**load_file(tmp_path / "x.safetensors"), "bundle_emb.my-dog.string_to_param.*": rows}, tmp_path / "x.safetensors")
    methods.load_artifacts(base, [(tmp_path / "x.safetensors", strength)])
    assert ("my-dog" in base.placeholders) == (strength != 0)
    if strength:
        table, ids = base.text_encoder.get_input_embeddings(), base.tokenizer.convert_tokens_to_ids(["my-dog", "my-dog_1"])
        assert torch.equal(table(torch.tensor(ids)), rows)


def test_a_bundled_word_of_another_width_is_refused(base: Base, tmp_path: Path) -> None:
    lora_file(tmp_path / "x.safetensors", base, 0)
    save_file({**load_file(tmp_path / "x.safetensors"), "bundle_emb.my-dog.clip_l": torch.ones(1, 8), "bundle_emb.my-dog.clip_g": torch.ones(1, 9)},
              tmp_path / "x.safetensors")
    with pytest.raises(Problem, match="holds the word 'my-dog' for another model"):
        methods.load_artifacts(base, [(tmp_path / "x.safetensors", 1.0)])


# -- hypernetworks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("activation", "activate_output"), [("linear", False), ("relu", False), ("tanh", True), ("swish", False)])
def test_one_hypernetwork_between_its_strengths(base: Base, tmp_path: Path, activation: str, activate_output: bool) -> None:
    path = tmp_path / "h.pt"
    content = hypernetwork_file(path, 1, activation, activate_output)
    methods.load_artifact(base, path, 0.3)
    context, key, value = contexts(base, "down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    for found, wanted in zip((key, value), webui.chained(context, [(content, 0.3)]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_several_hypernetworks_chain_in_the_order_of_the_prompt(base: Base, again: Callable[[], Base], tmp_path: Path) -> None:
    contents = {name: hypernetwork_file(tmp_path / f"{name}.pt", seed) for seed, name in enumerate("abc")}
    attention = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    found = {}
    for order, fresh in (("abc", base), ("cab", again())):
        _, written = tags.find("a <hypernet:{}:0.5> photo <hypernet:{}:-0.7> of <hypernet:{}>".format(*order))
        used = tags.uses(written)[0]
        methods.load_artifacts(fresh, [(tmp_path / f"{use.name}.pt", use.unet) for use in used])
        context, *reached = contexts(fresh, attention)
        files = [(contents[use.name], use.unet) for use in used]
        for wanted in (webui.chained(context, files), webui.patched(context.astype(np.float64), context.astype(np.float64), files)):
            for one, other in zip(reached, wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
        found[order] = reached
    assert np.abs(found["abc"][0] - found["cab"][0]).max() > 0.1  # the order shows, so it was tested
    turned = webui.chained(context, [(contents[name], 1.0) for name in "abc"])
    assert np.abs(turned[0] - webui.chained(context, [(contents[name], 1.0) for name in "cba"])[0]).max() > 0.1


def test_other_widths_pass_and_self_attention_has_networks_of_its_own(base: Base, tmp_path: Path) -> None:
    content = hypernetwork_file(tmp_path / "h.pt", 2, widths=(WIDTH, 32, 777))
    methods.load_artifact(base, tmp_path / "h.pt", 0.4)
    for name, width in (("attn1", 32), ("attn2", WIDTH)):
        context, *reached = contexts(base, f"down_blocks.0.attentions.0.transformer_blocks.0.{name}")
        assert context.shape[-1] == width
        for one, other in zip(reached, webui.chained(context, [(content, 0.4)]), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_lora_and_hypernetwork_do_not_depend_on_their_order(base: Base, again: Callable[[], Base], tmp_path: Path) -> None:
    lora_file(tmp_path / "l.safetensors", base, 0)
    hypernetwork_file(tmp_path / "h.pt", 1)
    files, other = [(tmp_path / "l.safetensors", 0.5), (tmp_path / "h.pt", 0.5)], again()
    methods.load_artifacts(base, files)
    methods.load_artifacts(other, files[::-1])
    assert torch.equal(word(base, "a cat"), word(other, "a cat"))


# -- embeddings --------------------------------------------------------------------------------------------------------

def test_an_embedding_between_its_strengths_and_several_at_once(base: Base, tmp_path: Path) -> None:
    first, second = torch.randn(2, WIDTH, generator=draws(1)), torch.randn(1, WIDTH, generator=draws(2))
    save_file({"<one>": first}, tmp_path / "a.safetensors")
    save_file({"emb_params": second}, tmp_path / "zwei.safetensors")
    table = base.text_encoder.get_input_embeddings().weight.double()
    loaded = methods.load_artifacts(base, [(tmp_path / "a.safetensors", 0.25), (tmp_path / "zwei.safetensors", 1.0)])
    assert [one.trigger for one in loaded] == ["<one>", "zwei"]
    ids = base.tokenizer.convert_tokens_to_ids(["<one>", "<one>_1", "zwei", "cat</w>"])
    rows = base.text_encoder.get_input_embeddings()(torch.tensor([ids]))[0].detach()
    middle = table.mean(0)
    torch.testing.assert_close(rows[:2].double(), middle + 0.25 * (first.double() - middle), atol=1e-6, rtol=0)
    assert torch.equal(rows[2:3], second)
    assert torch.equal(rows[3].double(), table[ids[3]])


def test_the_word_of_a_web_uis_file_is_its_stem(base: Base, tmp_path: Path) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, WIDTH)}, "name": "before", "step": 1,
               "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save(content, tmp_path / "renamed.pt", _use_new_zipfile_serialization=False)
    assert methods.load_artifact(base, tmp_path / "renamed.pt").trigger == "renamed"


# -- DreamBooth --------------------------------------------------------------------------------------------------------

def test_dreambooth_is_a_line_between_two_models(base: Base, again: Callable[[], Base], trained: Path, tmp_path: Path) -> None:
    path = trained
    plain, other = again(), load(str(path))
    methods.load_artifacts(base, [(path, Strength(0.25, text=-0.5))])
    for part, share in (("unet", 0.25), ("text_encoder", -0.5)):
        for (name, new), old, end in zip(base.modules()[part].named_parameters(), plain.modules()[part].parameters(),
                                         other.modules()[part].parameters(), strict=True):
            wanted = old.double() + share * (end.double() - old.double())
            assert torch.allclose(new.double(), wanted, atol=1e-6), name
    full = again()
    methods.load_artifacts(full, [(path, 1.0)])
    one, two = weights(full), weights(other)
    assert all(torch.equal(one[name], two[name]) for name in one if not name.startswith("vae."))


def test_a_whole_network_comes_first_wherever_it_is_named(base: Base, again: Callable[[], Base], trained: Path, tmp_path: Path) -> None:
    path = trained
    lora_file(tmp_path / "l.safetensors", base, 0)
    hypernetwork_file(tmp_path / "h.pt", 1)
    files, other = [(path, 0.5), (tmp_path / "h.pt", 0.5), (tmp_path / "l.safetensors", 0.5)], again()
    methods.load_artifacts(base, files)
    loaded = methods.load_artifacts(other, [files[1], files[2], files[0]])
    assert [one.method for one in loaded] == ["hypernetwork", "lora", "dreambooth"]
    assert torch.equal(word(base, "a cat"), word(other, "a cat"))
    with pytest.raises(Problem, match="both whole networks"):
        methods.load_artifacts(again(), [(path, 0.5), (path, 0.5)])


def test_a_strength_is_a_number_with_parts() -> None:
    assert Strength(0.5) == 0.5 and Strength(0.5).text == 0.5 and Strength(0.5, 0.2).on("text_encoder_2") == 0.2
    assert Strength.of(2).on("unet") == 2 and Strength.of(Strength(1, 0)).text == 0


def test_no_layer_outside_attention_is_hooked(base: Base, tmp_path: Path) -> None:
    hypernetwork_file(tmp_path / "h.pt", 1)
    methods.load_artifact(base, tmp_path / "h.pt")
    hooked = {name.rpartition(".")[2] for name, module in base.unet.named_modules() if isinstance(module, nn.Linear) and module._forward_pre_hooks}
    assert hooked == {"to_k", "to_v"}
