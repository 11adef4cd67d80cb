"""Files of other programs, made by hand as those programs make them; and round trips through every pair of layouts."""

import itertools
import json

import pytest
import torch
from reference import lora_readers as readers
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.errors import Problem
from finetune.formats import lora, lora_positions
from finetune.formats.inspect import inspect
from finetune.formats.lora_kinds import LoraModule

TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "unet.down_blocks.0.resnets.0.conv1"
CONV_KEY = "lora_unet_down_blocks_0_resnets_0_conv1"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(tmp_path, tensors, metadata=None, **options):
    save_file(tensors, tmp_path / "foreign.safetensors", metadata)
    return lora.read_adapters(tmp_path / "foreign.safetensors", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kohyas_convolutions_of_three_by_three(tmp_path, dtype):
    file = {f"{CONV_KEY}.lora_down.weight": numbers(2, 6, 3, 3).to(dtype), f"{CONV_KEY}.lora_up.weight": numbers(8, 2, 1, 1).to(dtype),
            f"{CONV_KEY}.alpha": torch.tensor([1.0], dtype=dtype)}  # alpha of shape [1], as some writers leave it
    found, weight = read(tmp_path, file), numbers(8, 6, 3, 3, seed=1)
    assert found.modules[CONV].alpha == 1.0 and found.kinds == ["LoRA"]
    assert torch.allclose(weight + found.modules[CONV].change(weight), readers.kohya(file, CONV_KEY, weight).float(), atol=1e-5)


def test_locons_middle_weight_becomes_a_plain_pair(tmp_path):
    file = {f"{CONV_KEY}.lora_down.weight": numbers(2, 6, 1, 1), f"{CONV_KEY}.lora_mid.weight": numbers(2, 2, 3, 3),
            f"{CONV_KEY}.lora_up.weight": numbers(8, 2, 1, 1), f"{CONV_KEY}.alpha": torch.tensor(1.0)}
    found, weight = read(tmp_path, file).modules[CONV], numbers(8, 6, 3, 3, seed=1)
    assert isinstance(found, LoraModule)
    assert torch.allclose(weight + found.change(weight), readers.comfyui(file, CONV_KEY, weight).float(), atol=1e-5)


KINDS = {
    "LoHa": (TO_K, KEY, (8, 6), {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}),
    "LoHa with cores": (CONV, CONV_KEY, (8, 6, 3, 3), {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (2, 6),
                                                      "hada_t2": (2, 2, 3, 3), "hada_w2_a": (2, 8), "hada_w2_b": (2, 6)}),
    "LoKr of two whole factors": (TO_K, KEY, (8, 6), {"lokr_w1": (2, 3), "lokr_w2": (4, 2)}),
    "LoKr with a pair": (TO_K, KEY, (8, 6), {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 2)}),
    "LoKr of two pairs": (TO_K, KEY, (8, 6), {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2)}),
    "LoKr convolution": (CONV, CONV_KEY, (8, 6, 3, 3), {"lokr_w1": (2, 3), "lokr_w2": (4, 2, 3, 3)}),
    "LoKr with a core": (CONV, CONV_KEY, (8, 6, 3, 3), {"lokr_w1": (2, 3), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 2)}),
    "OFT": (TO_K, KEY, (8, 6), {"oft_blocks": (2, 4, 4)}),
    "OFT of a convolution": (CONV, CONV_KEY, (8, 6, 3, 3), {"oft_blocks": (4, 2, 2)}),
    "DoRA over inputs": (CONV, CONV_KEY, (8, 6, 3, 3), {"lora_down.weight": (2, 6, 3, 3), "lora_up.weight": (8, 2, 1, 1), "dora_scale": (1, 6, 1, 1)}),
    "full difference": (TO_K, KEY, (8, 6), {"diff": (8, 6)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_lycoris_kinds_as_a1111_and_comfyui_compute_them(tmp_path, kind, alpha):
    name, key, shape, parts = KINDS[kind]
    file = {f"{key}.{part}": 0.3 * numbers(*size, seed=place).abs() for place, (part, size) in enumerate(parts.items())}
    if alpha is None and "DoRA" in kind:
        alpha = 2.0  # the rank: without an alpha readers differ
    if alpha is not None:
        file[f"{key}.alpha"] = torch.tensor(alpha)
    weight = numbers(*shape, seed=9)
    found = read(tmp_path, file)
    wanted = readers.a1111(file, key, weight)
    if not (kind.startswith("OFT") and alpha):  # ComfyUI bounds the rotation by alpha alone, kohya and A1111 by alpha times the outputs
        assert torch.allclose(readers.comfyui(file, key, weight), wanted, atol=1e-6)
    assert torch.allclose(weight + found.modules[name].change(weight), wanted.float(), atol=1e-5)
    lora.write_kohya(tmp_path / "again.safetensors", found.modules, found.metadata, torch.float32)
    again = load_file(tmp_path / "again.safetensors")
    for reader in (readers.a1111, readers.comfyui):
        assert torch.allclose(reader(again, key, weight), wanted, atol=1e-5)
    assert kind.split()[0] in inspect(tmp_path / "again.safetensors").layout


def test_a_norm_and_a_bias_of_lycoris(tmp_path):
    key = "lora_unet_down_blocks_1_attentions_0_norm"
    found = read(tmp_path, {f"{key}.w_norm": torch.ones(4), f"{key}.b_norm": torch.full((4,), 2.0)},
                 module_names=["unet.down_blocks.1.attentions.0.norm"]).modules["unet.down_blocks.1.attentions.0.norm"]
    assert found.change(torch.zeros(4)).tolist() == [1.0] * 4 and found.bias.tolist() == [2.0] * 4


# -- cloneofsimo ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width, bias=False), nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)


def block(width, context, order):
    """A transformer block whose parts were made in the given order."""
    made = {"attn1": lambda: Attention(width, width), "attn2": lambda: Attention(width, context), "ff": lambda: nn.ModuleDict({"net": nn.ModuleList([GEGLU(width)])})}
    return nn.ModuleDict({name: made[name]() for name in order})


def unet(order):
    return nn.ModuleDict({"down_blocks": nn.ModuleList([nn.ModuleDict({"transformer_blocks": nn.ModuleList([block(8, 6, order)])}),
                                                        nn.ModuleDict({"transformer_blocks": nn.ModuleList([block(12, 6, order)])})])})


def clone_file(order):
    """unet:N:up and unet:N:down, counted over a network made in this order as the project counts; {name: (up, down)}."""
    named = {}
    for ancestor, module in unet(order).named_modules():
        if type(module).__name__ in ("Attention", "GEGLU"):
            for name, layer in module.named_modules():
                if type(layer).__name__ == "Linear":
                    place = len(named)
                    named[f"unet.{ancestor}.{name}"] = (numbers(layer.out_features, 2, seed=place), numbers(2, layer.in_features, seed=place + 50))
    tensors = {f"unet:{place}:{half}": value for place, halves in enumerate(named.values()) for half, value in zip(("up", "down"), halves, strict=True)}
    told = {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])} | {f"unet:{place}:rank": "2" for place in range(len(named))}
    return tensors, told, named


@pytest.mark.parametrize("order", [("attn1", "attn2", "ff"), ("attn1", "ff", "attn2")])  # today's diffusers, and that of 2022
def test_cloneofsimos_numbers_are_places_in_the_model(tmp_path, order):
    tensors, told, named = clone_file(order)
    places = {"unet": lora_positions.places_of(unet(("attn1", "attn2", "ff")))}
    found = read(tmp_path, {**tensors, "<krk>": numbers(6)}, {**told, "<krk>": "<embed>"}, places=places)
    assert set(found.modules) == set(named) and len(named) == 18
    for name, (up, down) in named.items():
        assert torch.equal(found.modules[name].up, up) and torch.equal(found.modules[name].down, down) and found.modules[name].scale == 1.0
    assert list(found.words) == ["<krk>"] and found.words["<krk>"].shape == (1, 6)
    assert found.metadata["finetune.ignored"] == "<krk>"
    assert "cloneofsimo" in inspect(tmp_path / "foreign.safetensors").layout


def test_cloneofsimos_text_encoder_is_found_in_the_real_one(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    network = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    tensors = {f"text_encoder:{place}:{half}": numbers(8, 8, seed=place)[: 8 if half == "up" else 1, : 1 if half == "up" else 8].contiguous()
               for place in range(8) for half in ("up", "down")}
    found = read(tmp_path, tensors, {"text_encoder": '["CLIPAttention"]'}, places={"text_encoder": lora_positions.places_of(network)})
    leaves = ["k_proj", "v_proj", "q_proj", "out_proj"]
    assert list(found.modules) == [f"text_encoder.encoder.layers.{layer}.self_attn.{leaf}" for layer in range(2) for leaf in leaves]


def test_numbers_without_their_base_or_for_another_are_refused(tmp_path):
    tensors, told, _ = clone_file(("attn1", "attn2", "ff"))
    with pytest.raises(Problem, match="Name the base"):
        read(tmp_path, tensors, told)
    with pytest.raises(Problem, match="do not fit this base"):
        read(tmp_path, tensors, told, places={"unet": lora_positions.places_of(block(8, 6, ("attn1",)))})
    del tensors["unet:3:up"], tensors["unet:3:down"]
    with pytest.raises(Problem, match="do not fit this base"):
        read(tmp_path, tensors, told, places={"unet": lora_positions.places_of(unet(("attn1", "attn2", "ff")))})


# -- SDXL's two spellings, bundled words, round trips ---------------------------------------------------------------------


def test_both_spellings_of_sdxl_are_one_module(tmp_path):
    pair = {"lora_down.weight": numbers(2, 2048), "lora_up.weight": numbers(640, 2), "alpha": torch.tensor(2.0)}
    for original in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", KEY):
        found = read(tmp_path, {f"{original}.{part}": value for part, value in pair.items()})
        assert list(found.modules) == [TO_K]
        lora.write_kohya(tmp_path / "again.safetensors", found.modules, found.metadata)
        assert load_file(tmp_path / "again.safetensors").keys() == {f"{KEY}.{part}" for part in pair}
    twice = {f"{key}.{part}": value.clone() for key in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", KEY) for part, value in pair.items()}
    with pytest.raises(Problem, match="under two spellings"):
        read(tmp_path, twice)


def test_words_bundled_in_a_file_are_reported(tmp_path):
    file = {f"{KEY}.lora_down.weight": numbers(2, 6), f"{KEY}.lora_up.weight": numbers(8, 2), "bundle_emb.my-dog.string_to_param.*": numbers(3, 6)}
    found = read(tmp_path, file)
    assert list(found.words) == ["my-dog"] and torch.equal(found.words["my-dog"], file["bundle_emb.my-dog.string_to_param.*"])
    assert [len(rows) for rows in found.rows().values()] == [1]


def test_sdxls_bundled_word_has_rows_in_the_order_of_the_encoders(tmp_path):
    second, first = numbers(2, 9), numbers(2, 6)
    file = {f"{KEY}.lora_down.weight": numbers(2, 6), f"{KEY}.lora_up.weight": numbers(8, 2), "bundle_emb.my-dog.clip_g": second, "bundle_emb.my-dog.clip_l": first}
    rows = read(tmp_path, file).rows()
    assert list(rows) == ["my-dog"] and torch.equal(rows["my-dog"][0], first) and torch.equal(rows["my-dog"][1], second)


def diffusers_old(path, modules):
    """`.lora.down|up` for the UNet and `.lora_linear_layer.` for text, the scale in `up`, as old training scripts wrote."""
    tensors = {}
    for name, module in modules.items():
        word = "lora_linear_layer" if name.startswith("text") else "lora"
        tensors |= {f"{name}.{word}.down.weight": module.down.half(), f"{name}.{word}.up.weight": (module.up.float() * module.scale).half()}
    save_file(tensors, path)


LAYOUTS = {"kohya": lambda path, modules: lora.write_kohya(path, modules, {}), "peft": lambda path, modules: lora.write_peft(path, modules, {}), "old diffusers": diffusers_old}


@pytest.mark.parametrize("first, second", list(itertools.product(LAYOUTS, repeat=2)))
def test_a_round_trip_is_the_identity_within_one_rounding(tmp_path, first, second):
    modules = {TO_K: LoraModule(numbers(4, 6), numbers(8, 4), 3.0), TO_K.replace("to_k", "to_out.0"): LoraModule(numbers(4, 8), numbers(8, 4), 3.0),
               CONV: LoraModule(numbers(4, 6, 3, 3), numbers(8, 4, 1, 1), 3.0),
               "text_encoder.encoder.layers.0.mlp.fc1": LoraModule(numbers(4, 6), numbers(12, 4), 3.0)}
    LAYOUTS[first](tmp_path / "a.safetensors", modules)
    once = lora.read(tmp_path / "a.safetensors")[0]
    LAYOUTS[second](tmp_path / "b.safetensors", once)
    twice = lora.read(tmp_path / "b.safetensors")[0]
    LAYOUTS[first](tmp_path / "c.safetensors", twice)
    thrice = lora.read(tmp_path / "c.safetensors")[0]
    assert once.keys() == thrice.keys() == modules.keys()
    for name, module in once.items():
        assert torch.equal(module.down, twice[name].down) and torch.equal(module.down, thrice[name].down)
        scaled = module.up.float() * module.scale
        for other in (twice[name], thrice[name]):
            assert torch.allclose(other.up.float() * other.scale, scaled, rtol=2**-10, atol=1e-7)
