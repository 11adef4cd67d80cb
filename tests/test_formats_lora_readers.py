"""The weight each program would use from our files equals the live one, for every kind of adapter, by their own arithmetic."""

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from reference import lora_readers as readers
from safetensors.torch import load_file, save_file

from finetune.errors import Problem
from finetune.formats import lora, lora_names, lora_peft
from finetune.formats.lora_kinds import DoraModule, LoraModule, OftModule

BLOCK = "down_blocks.0.attentions.0"
NAMES = {"linear": f"{BLOCK}.transformer_blocks.0.attn2.to_k", "square": f"{BLOCK}.transformer_blocks.0.attn2.to_out.0", "point": f"{BLOCK}.proj_in"}


class Block(torch.nn.Module):
    """Layers of the kinds a UNet has, under a UNet's names."""

    def __init__(self):
        super().__init__()
        layers = {"linear": torch.nn.Linear(12, 8, bias=False), "square": torch.nn.Linear(8, 8), "point": torch.nn.Conv2d(8, 8, 1)}
        for kind, layer in layers.items():
            *path, leaf = NAMES[kind].split(".")
            parent = self
            for word in path:
                if not hasattr(parent, word):
                    parent.add_module(word, torch.nn.Module())
                parent = getattr(parent, word)
            parent.add_module(leaf, layer)


TARGETS = ["to_k", "to_out.0", "proj_in"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=TARGETS),
    "lokr in pairs": lambda: peft.LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_both=True, decompose_factor=4),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "oft, exact and shared": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS, use_cayley_neumann=False, block_share=True),
}


@pytest.fixture(params=CONFIGS)
def trained(request):
    """A block with random adapters of one variant: (variant, block, base weights, live weights)."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    base = {name: block.get_submodule(name).weight.detach().clone() for name in NAMES.values()}
    peft.inject_adapter_in_model(CONFIGS[request.param](), block, adapter_name="default")
    for name, value in block.named_parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.rand(value.shape) if "magnitude" in name else 0.2 * torch.randn(value.shape)
    adapters = {name: module for name, _, module in lora_peft.live(block)}
    for layer in block.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return request.param, adapters, base, {name: block.get_submodule(name).get_base_layer().weight.detach().clone() for name in NAMES.values()}


def written(tmp_path, adapters, base, dtype=torch.float32):
    modules = {f"unet.{name}": lora.for_readers(module, base[name]) for name, module in adapters.items()}
    lora.write_kohya(tmp_path / "toy.safetensors", modules, {}, dtype)
    return tmp_path / "toy.safetensors"


def test_the_adapter_in_memory_is_the_live_one(trained):
    variant, adapters, base, live = trained
    for name, weight in base.items():
        assert (live[name] - weight).abs().max() > 0.01
        assert torch.allclose(weight + adapters[name].change(weight), live[name], atol=2e-6), (variant, name)


def test_comfyui_and_a1111_use_the_live_weight(trained, tmp_path):
    variant, adapters, base, live = trained
    file = load_file(written(tmp_path, adapters, base))
    for name, weight in base.items():
        key = lora_names.to_kohya(f"unet.{name}")
        wanted, half = live[name].double(), (live[name].double() + weight.double()) / 2
        assert torch.allclose(readers.comfyui(file, key, weight), wanted, atol=3e-6), (variant, name)
        assert torch.allclose(readers.comfyui(file, key, weight, 0.5), half, atol=3e-6)
        if variant != "dora":
            assert torch.allclose(readers.a1111(file, key, weight), wanted, atol=3e-6), (variant, name)
            assert torch.allclose(readers.a1111(file, key, weight, 0.5), half, atol=3e-6)
        else:
            assert not torch.allclose(readers.a1111(file, key, weight), wanted, atol=1e-2)  # as inspect says
        if variant in ("lora", "rslora"):
            assert torch.allclose(readers.kohya(file, key, weight, 0.5), half, atol=3e-6)


def test_our_loader_reads_the_same_and_halves_it_at_strength_one_half(trained, tmp_path):
    variant, adapters, base, live = trained
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 2e-3)):
        found = lora.read_adapters(written(tmp_path, adapters, base, dtype))
        for name, weight in base.items():
            assert torch.allclose(weight + found.modules[f"unet.{name}"].change(weight), live[name], atol=tolerance), (variant, name, dtype)


def test_whole_differences_are_exact_everywhere(trained, tmp_path):
    variant, adapters, base, live = trained
    modules = lora.full({f"unet.{name}": module for name, module in adapters.items()}, {f"unet.{name}": weight for name, weight in base.items()})
    lora.write_kohya(tmp_path / "full.safetensors", modules, {}, torch.float32)
    file = load_file(tmp_path / "full.safetensors")
    for name, weight in base.items():
        for reader in (readers.comfyui, readers.a1111):
            assert torch.allclose(reader(file, lora_names.to_kohya(f"unet.{name}"), weight), live[name].double(), atol=3e-6), variant


def test_pefts_layout_says_the_same_of_plain_pairs(trained, tmp_path):
    variant, adapters, base, live = trained
    modules = {f"unet.{name}": module for name, module in adapters.items()}
    if variant not in ("lora", "rslora"):
        with pytest.raises(Problem, match="plain low-rank pairs"):
            lora.write_peft(tmp_path / "toy.safetensors", modules, {})
        return
    lora.write_peft(tmp_path / "toy.safetensors", modules, {}, torch.float32)
    file = load_file(tmp_path / "toy.safetensors")
    for name, weight in base.items():
        assert torch.allclose(readers.peft(file, f"unet.{name}", weight), live[name].double(), atol=3e-6)


def test_pefts_oft_is_refused_as_blocks_with_a_way_out(tmp_path):
    block = Block()
    peft.inject_adapter_in_model(CONFIGS["oft"](), block, adapter_name="default")
    modules = {f"unet.{name}": module for name, _, module in lora_peft.live(block)}
    with pytest.raises(Problem, match="rotates a layer's inputs.*whole difference.*--variant lora, dora, loha or lokr"):
        lora.write_kohya(tmp_path / "toy.safetensors", modules, {})
    assert list(tmp_path.iterdir()) == []


def test_pefts_folders_are_read_without_peft(trained, tmp_path):
    variant, adapters, base, live = trained
    block = Block()
    config = CONFIGS[variant]()
    peft.inject_adapter_in_model(config, block, adapter_name="default")
    state = peft.get_peft_model_state_dict(block, adapter_name="default")
    torch.manual_seed(5)
    state = {key: value + 0.2 * torch.rand(value.shape) for key, value in state.items()}
    peft.set_peft_model_state_dict(block, state, adapter_name="default")
    config.save_pretrained(tmp_path / "unet")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "unet" / "adapter_model.safetensors")
    found, live = lora.read_adapters(tmp_path).modules, {name: module for name, _, module in lora_peft.live(block)}
    for name, weight in base.items():
        assert torch.allclose(found[f"unet.{name}"].change(weight), live[name].change(weight), atol=1e-6), (variant, name)


def test_doras_lengths_are_lycoris_when_they_are_of_the_merged_rows(tmp_path):
    torch.manual_seed(1)
    weight = torch.randn(8, 12)
    module = DoraModule(LoraModule(torch.randn(2, 12), 0.1 * torch.randn(8, 2), 2.0), 1 + torch.rand(8, 1))
    name = f"unet.{NAMES['linear']}"
    key = lora_names.to_kohya(name)
    lora.write_kohya(tmp_path / "merged.safetensors", {name: module}, {}, torch.float32)
    wanted = weight.double() + module.change(weight).double()
    assert torch.allclose(readers.lycoris(load_file(tmp_path / "merged.safetensors"), key, weight), wanted, atol=1e-5)
    assert torch.allclose(module.with_norm("base", weight).with_norm("merged", weight).magnitude, module.magnitude, atol=1e-5)
    lora.write_kohya(tmp_path / "base.safetensors", {name: module.with_norm("base", weight)}, {}, torch.float16)
    file = load_file(tmp_path / "base.safetensors")
    assert file[f"{key}.dora_scale"].shape == (8, 1) and file[f"{key}.dora_scale"].dtype == torch.float32
    again = lora.read_adapters(tmp_path / "base.safetensors")
    assert again.metadata["finetune.dora_norm"] == "base" and again.modules[name].norm == "base"
    mixed = {name: module, name.replace("to_k", "to_v"): module.with_norm("base", weight)}
    with pytest.raises(Problem, match="two conventions"):
        lora.write_kohya(tmp_path / "mixed.safetensors", mixed, {})


@pytest.mark.parametrize("bound", [None, 0.5])
def test_rotations_of_outputs_are_read_alike_whatever_bounds_them(tmp_path, bound):
    torch.manual_seed(2)
    weight, module = torch.randn(8, 12), OftModule(0.3 * torch.randn(2, 4, 4), bound)
    name = f"unet.{NAMES['linear']}"
    lora.write_kohya(tmp_path / "toy.safetensors", {name: module}, {}, torch.float32)
    file, key = load_file(tmp_path / "toy.safetensors"), lora_names.to_kohya(name)
    wanted = weight.double() + module.change(weight).double()
    for reader in (readers.comfyui, readers.a1111):
        assert torch.allclose(reader(file, key, weight), wanted, atol=1e-5)
    assert torch.allclose(wanted.norm(), weight.double().norm())  # a rotation
    again = lora.read_adapters(tmp_path / "toy.safetensors").modules[name]
    assert torch.allclose(again.change(weight), module.change(weight), atol=1e-5)


def test_pefts_series_by_hand():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    peft.inject_adapter_in_model(peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"]), layer, adapter_name="default")
    layer[0].oft_R["default"].weight.data = torch.tensor([[0.1, -0.2, 0.3, 0.05, -0.1, 0.2]])
    (_, base, module), = lora_peft.live(layer)
    turn = readers.cayley([0.1, -0.2, 0.3, 0.05, -0.1, 0.2])
    wanted = base.weight.detach().double() @ turn.T - base.weight.detach().double()
    assert torch.allclose(module.change(base.weight.detach()).double(), wanted, atol=1e-6)
