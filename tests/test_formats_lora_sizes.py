"""Bytes of LoRA files of Stable Diffusion 1.5, 2.1 and XL, from the real configurations, against figures measured on other programs' files."""

import functools
import json

import pytest
import torch

from finetune.formats import lora, lora_names
from finetune.formats.header import expected_safetensors_bytes, header_text, read_header
from finetune.formats.lora import LoraModule
from finetune.model.configs import parts_of

CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
ATTENTION = (*CROSS, *(name.replace("2", "1") for name in CROSS))
KOHYA = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")  # what kohya trains by default
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@functools.cache
def layers(family):
    """Canonical name -> weight shape of every linear and convolution layer, networks made on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts, found = parts_of(family, "plain"), {}
    with torch.device("meta"):
        networks = {"unet": UNet2DConditionModel.from_config(parts["unet"]), "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"]))}
        if family == "sdxl":
            networks["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_encoder_2"]))
    for part, network in networks.items():
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                found[lora_names.canonical(f"{part}.{name}")] = tuple(layer.weight.shape)
    return found


def chosen(family, leaves):
    return {name: shape for name, shape in layers(family).items() if name.endswith(leaves) and ("attentions" in name or ".layers." in name)}


def shapes(modules, rank, names, *, kohya):
    """Tensor name -> shape of a file, written out here on its own."""
    found = {}
    for name, (out, inputs, *kernel) in modules.items():
        down, up = ((".lora_down", ".lora_up") if kohya else (".lora_A", ".lora_B"))
        found |= {f"{names[name]}{down}.weight": (rank, inputs, *kernel), f"{names[name]}{up}.weight": (out, rank, *[1] * len(kernel))}
        if kohya:
            found[f"{names[name]}.alpha"] = ()
    return found


def weight_bytes(found):
    return sum(2 * functools.reduce(int.__mul__, shape, 1) for name, shape in found.items() if not name.endswith(".alpha"))


@pytest.mark.parametrize("family, leaves, count, per_rank, bytes_of", [
    ("sd1", CROSS, 64, 99_456, {4: 795_648, 8: 1_591_296, 16: 3_182_592, 32: 6_365_184, 64: 12_730_368, 128: 25_460_736}),
    ("sd1", ATTENTION, 128, 199_296, {4: 1_594_368, 8: 3_188_736, 16: 6_377_472, 32: 12_754_944, 64: 25_509_888, 128: 51_019_776}),
    ("sd2", CROSS, 64, 107_648, {4: 861_184, 8: 1_722_368, 16: 3_444_736, 32: 6_889_472, 64: 13_778_944, 128: 27_557_888}),
    ("sd2", ATTENTION, 128, 207_488, {4: 1_659_904, 8: 3_319_808, 16: 6_639_616, 32: 13_279_232, 64: 26_558_464, 128: 53_116_928}),
    ("sdxl", CROSS, 280, 785_920, {4: 6_287_360, 8: 12_574_720, 16: 25_149_440, 32: 50_298_880, 64: 100_597_760, 128: 201_195_520}),
    ("sdxl", ATTENTION, 560, 1_451_520, {4: 11_612_160, 8: 23_224_320, 16: 46_448_640, 32: 92_897_280, 64: 185_794_560, 128: 371_589_120}),
    ("sd1", KOHYA, 192, 423_936, {}), ("sd2", KOHYA, 192, 432_128, {}), ("sdxl", KOHYA, 722, 2_659_840, {}),
])
def test_modules_and_weight_bytes_of_the_unet(family, leaves, count, per_rank, bytes_of):
    modules = {name: shape for name, shape in chosen(family, leaves).items() if name.startswith("unet.")}
    names = {name: lora_names.to_kohya(name) for name in modules}
    assert len(modules) == count and weight_bytes(shapes(modules, 1, names, kohya=True)) == 2 * per_rank
    for rank, size in bytes_of.items():
        assert weight_bytes(shapes(modules, rank, names, kohya=True)) == size


def test_parameters_of_the_text_encoders():
    def per_rank(family, part, leaves=TEXT):
        modules = {name: shape for name, shape in chosen(family, leaves).items() if name.startswith(f"{part}.")}
        return len(modules), sum(sum(shape) for shape in modules.values())

    assert per_rank("sd1", "text_encoder") == (72, 165_888) and per_rank("sd2", "text_encoder") == (138, 423_936)
    assert [per_rank(*which, TEXT[:4])[1] for which in (("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))] == [73_728, 188_416, 327_680]


@pytest.mark.parametrize("family, leaves, sizes", [
    ("sd1", ATTENTION, [1_650_488, 3_245_064, 6_434_160, 12_811_976, 25_567_176, 51_077_456]),
    ("sd1", KOHYA + TEXT, [4_829_008, 9_547_800, 18_986_312, 37_861_176, 75_610_144, 151_108_832]),
    ("sd2", KOHYA + TEXT, [6_984_796, 13_834_084, 27_532_564, 54_926_948, 109_715_540, 219_293_364]),
])
def test_complete_kohya_files_to_the_byte(family, leaves, sizes):
    modules = chosen(family, leaves)
    names = {name: lora_names.to_kohya(name) for name in modules}
    for rank, size in zip((4, 8, 16, 32, 64, 128), sizes, strict=True):
        assert expected_safetensors_bytes(shapes(modules, rank, names, kohya=True), "F16") == size


def test_peft_files_of_sd1_cross_attention_to_the_byte():
    modules = {name: shape for name, shape in chosen("sd1", CROSS).items() if name.startswith("unet.")}
    names = {name: ".".join(lora_names.foreign_path(name)) for name in modules}
    for rank, size in zip((4, 8, 16, 32, 64, 128), (813_896, 1_609_680, 3_201_176, 6_383_800, 12_749_096, 25_479_688), strict=True):
        assert expected_safetensors_bytes(shapes(modules, rank, names, kohya=False), "F16") == size


@pytest.mark.parametrize("family, leaves, write, size", [
    ("sd1", KOHYA + TEXT, lora.write_kohya, 4_829_008), ("sd2", KOHYA + TEXT, lora.write_kohya, 6_984_796), ("sd1", CROSS, lora.write_peft, 813_896)])
def test_files_really_written_are_that_large_without_their_metadata(tmp_path, family, leaves, write, size):
    modules = {name: LoraModule(torch.zeros(4, *shape[1:]), torch.zeros(shape[0], 4, *[1] * (len(shape) - 2)), 4.0)
               for name, shape in chosen(family, leaves).items() if write is lora.write_kohya or name.startswith("unet.")}
    write(tmp_path / "toy.safetensors", modules, {})
    header = read_header(tmp_path / "toy.safetensors")
    entries = {name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]} for name, info in header.tensors.items()}
    assert len(header_text(entries, None)) + (tmp_path / "toy.safetensors").stat().st_size - header.data_start == size


@pytest.mark.parametrize("family, prefixes, version, spec", [
    ("sd1", {"lora_unet", "lora_te"}, "sd_v1", "stable-diffusion-v1/lora"),
    ("sd2", {"lora_unet", "lora_te"}, "sd_v2", "stable-diffusion-v2-512/lora"),
    ("sdxl", {"lora_unet", "lora_te1", "lora_te2"}, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")])
def test_names_and_metadata_of_each_family(tmp_path, family, prefixes, version, spec):
    modules = {name: LoraModule(torch.ones(1, *shape[1:]), torch.ones(shape[0], 1, *[1] * (len(shape) - 2)), 1.0)
               for name, shape in chosen(family, (*CROSS, "q_proj", "fc2")).items()}
    lora.write_kohya(tmp_path / "toy.safetensors", modules, {"finetune.steps": "7", "finetune.resolution": "512"})
    header = read_header(tmp_path / "toy.safetensors")
    keys = {name.split(".")[0] for name in header.tensors}
    assert {key.split("_text_model_")[0] if "_te" in key else key[:9] for key in keys} == prefixes
    assert all("_text_model_encoder_layers_" in key for key in keys if key.startswith("lora_te"))
    told = header.metadata
    assert (told["ss_base_model_version"], told["modelspec.architecture"], told["ss_steps"]) == (version, spec, "7")
    assert told["modelspec.hash_sha256"] == "0x" + told["sshs_model_hash"] and json.loads(told["ss_network_args"]) == {}
    names = {lora_names.canonical(name) for name in modules}
    assert set(lora.read(tmp_path / "toy.safetensors")[0]) == names
    lora.write_kohya(tmp_path / "te.safetensors", {name: module for name, module in modules.items() if name.startswith("text_encoder.")},
                     {"ss_base_model_version": version})
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    assert all(key.startswith(first) for key in read_header(tmp_path / "te.safetensors").tensors)
