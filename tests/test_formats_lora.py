"""LoRA files: names, scales and layouts against models, against diffusers, and against facts of other readers."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import Problem
from finetune.formats import lora, lora_names
from finetune.formats.header import expected_safetensors_bytes, read_header
from finetune.formats.lora import LoraModule

TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA_TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def diffusers():
    import diffusers

    return diffusers


def tiny_unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def adapted(unet):
    """Every Linear and Conv2d below the attention blocks and resnets."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: module for name, module in unet.named_modules() if isinstance(module, kinds) and "block" in name}


def random_modules(unet, ranks=(4,), alphas=(4.0,)):
    """A pair for each module, ranks and alphas in turn; ups of about 0.1."""
    torch.manual_seed(1)
    modules = {}
    for place, (name, module) in enumerate(adapted(unet).items()):
        rank = ranks[place % len(ranks)]
        down = torch.randn(rank, *module.weight.shape[1:])
        up = 0.1 * torch.randn(module.weight.shape[0], rank, *[1] * (module.weight.ndim - 2))
        modules[f"unet.{name}"] = LoraModule(down, up, alphas[place % len(alphas)])
    return modules


def applied_directly(unet, modules):
    """W' = W + alpha / rank * up @ down, written out here on its own."""
    with torch.no_grad():
        for name, pair in modules.items():
            weight = unet.get_submodule(name.removeprefix("unet.")).weight
            change = torch.einsum("or,ri->oi", pair.up.flatten(1).float(), pair.down.flatten(1).float())
            weight += (pair.alpha / pair.down.shape[0]) * change.reshape(weight.shape)
    return unet


def answer(unet):
    torch.manual_seed(2)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 32)).sample


def through_diffusers(diffusers, path):
    """The UNet's answer after diffusers' own loader took the file."""
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(str(path), return_lora_metadata=True, local_files_only=True)
    unet = tiny_unet(diffusers)
    mixin.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return answer(unet)


@pytest.mark.parametrize("ranks, alphas", [((4,), (2.0,)), ((4, 2, 3), (4.0, 1.0))])
def test_diffusers_computes_the_same_from_a_kohya_file(tmp_path, diffusers, ranks, alphas):
    modules = random_modules(tiny_unet(diffusers), ranks, alphas)
    lora.write_kohya(tmp_path / "toy.safetensors", modules, {}, torch.float32)
    wanted = answer(applied_directly(tiny_unet(diffusers), modules))
    base = answer(tiny_unet(diffusers))
    assert (wanted - base).abs().max() > 0.05
    assert torch.allclose(through_diffusers(diffusers, tmp_path / "toy.safetensors"), wanted, atol=2e-4)


def test_trap_4_peft_layout_has_its_scale_baked_in(tmp_path, diffusers):
    modules = random_modules(tiny_unet(diffusers), ranks=(4,), alphas=(2.0,))
    lora.write_peft(tmp_path / "toy.safetensors", modules, {}, torch.float32)
    wanted = answer(applied_directly(tiny_unet(diffusers), modules))
    assert torch.allclose(through_diffusers(diffusers, tmp_path / "toy.safetensors"), wanted, atol=2e-4)
    assert "lora_adapter_metadata" not in read_header(tmp_path / "toy.safetensors").metadata


def test_every_name_of_sd1_survives_underscores_without_a_model(diffusers):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)  # the defaults are Stable Diffusion 1's
    names = [f"unet.{name}" for name in adapted(unet)]
    text = [f"text_encoder.encoder.layers.{n}.self_attn.{p}_proj" for n in (0, 11) for p in ("q", "k", "v", "out")]
    text += ["text_encoder.encoder.layers.10.mlp.fc1", "text_encoder.encoder.layers.10.mlp.fc2"]
    assert len(names) == 192 + 22 * 3 + 14 + 6  # attention; three layers in each resnet, shortcuts, samplers
    for name in names + text:
        assert lora_names.from_kohya(lora_names.to_kohya(name)) == name
    index = lora_names.index_names(names)
    assert [lora_names.from_kohya(lora_names.to_kohya(name), index) for name in names] == names


@pytest.mark.parametrize("rank, size", [(4, 823_496), (8, 1_619_352), (16, 3_210_888), (32, 6_393_528), (64, 12_758_872), (128, 25_489_512)])
def test_sizes_of_sd1_cross_attention_files(rank, size):
    """Sizes measured on files of other programs (fp16, no metadata)."""
    shapes = {}
    for place, width in [("down_blocks_0", 320), ("down_blocks_1", 640), ("down_blocks_2", 1280), ("mid_block", 1280),
                         ("up_blocks_1", 1280), ("up_blocks_2", 640), ("up_blocks_3", 320)]:
        for layer in range({"d": 2, "m": 1, "u": 3}[place[0]]):
            for leaf in ("to_q", "to_k", "to_v", "to_out_0"):
                key = f"lora_unet_{place}_attentions_{layer}_transformer_blocks_0_attn2_{leaf}"
                shapes[f"{key}.lora_down.weight"] = (rank, 768 if leaf in ("to_k", "to_v") else width)
                shapes[f"{key}.lora_up.weight"] = (width, rank)
                shapes[f"{key}.alpha"] = ()
    assert expected_safetensors_bytes(shapes, "F16") == size


def pair(rank=4, alpha=4.0, width=768, out=320, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return LoraModule(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), alpha)


def test_trap_1_text_encoder_names_carry_the_text_model_level(tmp_path):
    modules = {"text_encoder.encoder.layers.3.self_attn.q_proj": pair(),
               "text_encoder.text_model.encoder.layers.4.mlp.fc1": pair()}
    lora.write_kohya(tmp_path / "k.safetensors", modules, {})
    lora.write_peft(tmp_path / "p.safetensors", modules, {})
    kohya = {key.split(".")[0] for key in load_file(tmp_path / "k.safetensors")}
    assert kohya == {"lora_te_text_model_encoder_layers_3_self_attn_q_proj", "lora_te_text_model_encoder_layers_4_mlp_fc1"}
    assert "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight" in load_file(tmp_path / "p.safetensors")
    for name in "kp":
        got, _ = lora.read(tmp_path / f"{name}.safetensors")
        assert sorted(got) == ["text_encoder.encoder.layers.3.self_attn.q_proj", "text_encoder.encoder.layers.4.mlp.fc1"]


def test_trap_3_the_distribution_layout_is_kohyas(tmp_path):
    lora.write_kohya(tmp_path / "toy.safetensors", {TO_K: pair()}, {})
    tensors = load_file(tmp_path / "toy.safetensors")
    assert sorted(tensors) == [f"{KOHYA_TO_K}.alpha", f"{KOHYA_TO_K}.lora_down.weight", f"{KOHYA_TO_K}.lora_up.weight"]
    assert tensors[f"{KOHYA_TO_K}.alpha"].shape == () and tensors[f"{KOHYA_TO_K}.alpha"].item() == 4.0


def test_trap_5_one_rank_and_one_alpha_with_the_same_effect(tmp_path):
    out = TO_K.replace("to_k", "to_out.0")
    value = TO_K.replace("to_k", "to_v")
    modules = {TO_K: pair(4, 2.0), value: pair(2, 1.0, seed=4), out: pair(3, 3.0, seed=5)}
    lora.write_kohya(tmp_path / "toy.safetensors", modules, {}, torch.float32)
    tensors = load_file(tmp_path / "toy.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_down" in key} == {4}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith("alpha")} == {2.0}  # scale 0.5 is commonest
    got, metadata = lora.read(tmp_path / "toy.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert torch.equal(got[TO_K].up, modules[TO_K].up) and torch.equal(got[value].up[:, :2], modules[value].up)
    assert not got[value].up[:, 2:].any() and not got[value].down[2:].any()
    for name, module in modules.items():
        wanted = (module.alpha / module.rank) * module.up.double() @ module.down.double()
        assert torch.allclose(got[name].delta().double(), wanted, rtol=1e-5, atol=1e-6)


def test_alpha_that_float16_cannot_hold_keeps_its_effect(tmp_path):
    module = pair(4, 0.3)
    lora.write_kohya(tmp_path / "toy.safetensors", {TO_K: module}, {})
    got, _ = lora.read(tmp_path / "toy.safetensors")
    wanted = 0.075 * module.up.double() @ module.down.double()
    assert got[TO_K].alpha != 0.3
    assert (got[TO_K].delta().double() - wanted).norm() / wanted.norm() < 4e-4


@pytest.mark.parametrize("write", [lora.write_kohya, lora.write_peft])
def test_round_trip_is_bit_equal_and_deterministic(tmp_path, write):
    modules = {TO_K: pair(), "unet.up_blocks.1.resnets.0.conv_shortcut": LoraModule(torch.randn(4, 32, 1, 1), torch.randn(16, 4, 1, 1), 4.0)}
    modules = {name: LoraModule(m.down.half(), m.up.half(), m.alpha) for name, m in modules.items()}
    meta = {f"finetune.{n}": "x" for n in ("method", "base", "seed", "steps", "licence")}
    for name in "ab":
        write(tmp_path / name / "toy.safetensors", modules, meta)
    assert (tmp_path / "a/toy.safetensors").read_bytes() == (tmp_path / "b/toy.safetensors").read_bytes()
    got, metadata = lora.read(tmp_path / "a/toy.safetensors")
    assert meta.items() <= metadata.items()
    for name, module in modules.items():
        assert torch.equal(got[name].down, module.down) and torch.equal(got[name].up, module.up)
        assert got[name].scale == 1.0


def test_kohya_metadata_states_family_and_hash(tmp_path):
    for width, version, spec in [(768, "sd_v1", "stable-diffusion-v1/lora"), (1024, "sd_v2", "stable-diffusion-v2-512/lora"), (32, "None", "latent-diffusion-32/lora")]:
        lora.write_kohya(tmp_path / "mydog.safetensors", {TO_K: pair(width=width)}, {"finetune.trigger": "sks dog"})
        header = read_header(tmp_path / "mydog.safetensors")
        told = header.metadata
        assert (told["ss_base_model_version"], told["modelspec.architecture"]) == (version, spec)
        assert (told["ss_output_name"], told["modelspec.trigger_phrase"]) == ("mydog", "sks dog")
        digest = hashlib.sha256((tmp_path / "mydog.safetensors").read_bytes()[header.data_start :]).hexdigest()
        assert told["sshs_model_hash"] == digest and told["modelspec.hash_sha256"] == "0x" + digest
    lora.write_kohya(tmp_path / "v.safetensors", {TO_K: pair(width=1024)}, {"finetune.prediction_type": "v_prediction"})
    assert read_header(tmp_path / "v.safetensors").metadata["ss_base_model_version"] == "sd_v2_v"


def foreign(tmp_path, tensors, metadata=None, **options):
    save_file(tensors, tmp_path / "foreign.safetensors", metadata)
    return lora.read(tmp_path / "foreign.safetensors", **options)


DOWN, UP = torch.randn(4, 8), torch.randn(16, 4)


@pytest.mark.parametrize(
    "tensors, name, alpha",
    [
        ({f"{KOHYA_TO_K}.lora_down.weight": DOWN, f"{KOHYA_TO_K}.lora_up.weight": UP}, TO_K, 4.0),
        ({f"{KOHYA_TO_K}.lora_down.weight": DOWN, f"{KOHYA_TO_K}.lora_up.weight": UP, f"{KOHYA_TO_K}.alpha": torch.tensor([1.0])}, TO_K, 1.0),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": UP},
         "text_encoder.encoder.layers.0.mlp.fc1", 4.0),
        ({"lora_te1_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN, "lora_te1_encoder_layers_0_mlp_fc1.lora_up.weight": UP},
         "text_encoder.encoder.layers.0.mlp.fc1", 4.0),
        ({f"{TO_K}.lora_A.weight": DOWN, f"{TO_K}.lora_B.weight": UP}, TO_K, 4.0),
        ({f"{TO_K}.lora.down.weight": DOWN, f"{TO_K}.lora.up.weight": UP}, TO_K, 4.0),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": DOWN,
          "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight": UP},
         "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 4.0),
        ({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": DOWN,
          "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": UP},
         "text_encoder.encoder.layers.0.self_attn.q_proj", 4.0),
    ],
)
def test_reads_other_spellings(tmp_path, tensors, name, alpha):
    modules, _ = foreign(tmp_path, tensors)
    assert list(modules) == [name] and modules[name].alpha == alpha
    assert torch.equal(modules[name].down, DOWN) and torch.equal(modules[name].up, UP)


def test_reads_peft_metadata_with_patterns_and_bfloat16(tmp_path):
    value = TO_K.replace("to_k", "to_v")
    tensors = {f"{name}.lora_{part}.weight": tensor.bfloat16().clone() for name in (TO_K, value) for part, tensor in (("A", DOWN), ("B", UP))}
    told = {"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {}, "unet.alpha_pattern": {"attn2.to_v": 8}, "unet.target_modules": ["to_k"]}
    modules, _ = foreign(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(told)})
    assert (modules[TO_K].alpha, modules[value].alpha, modules[TO_K].down.dtype) == (2.0, 8.0, torch.bfloat16)


@pytest.mark.parametrize(
    "original, dotted",
    [
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_7_0_in_layers_2", "down_blocks.2.resnets.0.conv1"),
        ("middle_block_1_transformer_blocks_9_ff_net_0_proj", "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
    ],
)
def test_reads_sdxl_original_names(original, dotted):
    assert lora_names.from_kohya(f"lora_unet_{original}") == f"unet.{dotted}"


@pytest.mark.parametrize(
    "tensors, word",
    [
        ({"unet:0:up": UP, "unet:0:down": DOWN}, "Name the base"),
        ({f"{KOHYA_TO_K}.lokr_w1": DOWN}, "no lokr_w2 weight"),
        ({f"{KOHYA_TO_K}.lokr_w1": DOWN, f"{KOHYA_TO_K}.lokr_w2": DOWN.clone()}, "not plain LoRA pairs"),
        ({f"{KOHYA_TO_K}.oft_diag": DOWN}, "old OFT"),
        ({f"{KOHYA_TO_K}.lora_down.weight": DOWN}, "no up weight"),
        ({"lora_unet_strange_thing.lora_down.weight": DOWN, "lora_unet_strange_thing.lora_up.weight": UP}, "stuck at 'strange_thing'"),
        ({f"{KOHYA_TO_K}.lora_down.weight": DOWN, f"{KOHYA_TO_K}.lora_up.weight": torch.randn(16, 5)}, "do not fit together"),
        ({"diffusion_model.x.lora_A.weight": DOWN, "diffusion_model.x.lora_B.weight": UP}, "no known component"),
    ],
)
def test_refuses_what_it_cannot_read(tmp_path, tensors, word):
    with pytest.raises(Problem, match=word):
        foreign(tmp_path, tensors)


def test_a_module_the_model_lacks_is_refused(tmp_path):
    lora.write_kohya(tmp_path / "toy.safetensors", {TO_K: pair()}, {})
    with pytest.raises(Problem, match="does not have"):
        lora.read(tmp_path / "toy.safetensors", ["unet.mid_block.attentions.0.proj_in"])
    assert list(lora.read(tmp_path / "toy.safetensors", [TO_K])[0]) == [TO_K]


def test_overflow_and_alpha_zero_are_refused_before_writing(tmp_path):
    with pytest.raises(Problem, match="not finite"):
        lora.write_kohya(tmp_path / "toy.safetensors", {TO_K: LoraModule(DOWN * 1e5, UP, 4.0)}, {})
    with pytest.raises(Problem, match="alpha 0"):
        lora.write_kohya(tmp_path / "toy.safetensors", {TO_K: LoraModule(DOWN, UP, 0.0)}, {})
    assert list(tmp_path.iterdir()) == []
