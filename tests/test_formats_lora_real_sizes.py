"""The UNet of Stable Diffusion 1.5 with random weights: what kohya's file does to it is what the pairs say, merged or one by one."""

import pytest
import torch
from reference import lora_readers as readers
from safetensors.torch import load_file

from finetune.cli.lora_merge import merged
from finetune.formats import lora, lora_names
from finetune.formats.lora import LoraModule
from finetune.model.configs import parts_of


@pytest.mark.slow
def test_kohya_file_merge_and_load_on_the_unet_of_sd15(tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(parts_of("sd1")["unet"]).eval()
    layers = {f"unet.{name}": layer for name, layer in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in"))}
    assert len(layers) == 128 + 16

    def random(rank):
        return {name: LoraModule(torch.randn(rank, *layer.weight.shape[1:]) / layer.weight.shape[1],
                                 torch.randn(layer.weight.shape[0], rank, *[1] * (layer.weight.ndim - 2)), rank / 2) for name, layer in layers.items()}

    first, second = random(8), random(4)
    lora.write_kohya(tmp_path / "a.safetensors", first, {})
    lora.write_kohya(tmp_path / "b.safetensors", second, {})
    both, rows = merged([({name: (module, None) for name, module in lora.read(tmp_path / f"{file}.safetensors")[0].items()}, strength)
                         for file, strength in (("a", 0.8), ("b", 0.5))], None)
    assert rows == []
    lora.write_kohya(tmp_path / "both.safetensors", both, {}, torch.float32)
    one, two, joined = (load_file(tmp_path / f"{file}.safetensors") for file in ("a", "b", "both"))
    found = lora.read(tmp_path / "both.safetensors")[0]
    asked = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 768)
    answers = []
    with torch.no_grad():
        base = unet(*asked).sample
        kept = {name: layer.weight.clone() for name, layer in layers.items()}
        for way in ("one by one", "merged"):
            for name, layer in layers.items():
                key, weight = lora_names.to_kohya(name), kept[name]
                if way == "merged":
                    layer.weight.copy_(weight + found[name].change(weight))
                    assert torch.allclose(layer.weight.double(), readers.comfyui(joined, key, weight), atol=1e-6)
                else:
                    layer.weight.copy_(readers.kohya(two, key, readers.kohya(one, key, weight, 0.8), 0.5))
            answers.append(unet(*asked).sample)
    assert (answers[0] - base).abs().max() > 1e-2
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
