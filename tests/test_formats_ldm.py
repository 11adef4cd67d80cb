"""Single files by our own tables: the names of the original layout, the published sizes to the byte, and diffusers as the reader.

Names are compared with tests/ldm_by_hand.py, which shares nothing with the package, and with keys written down below.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import ldm_by_hand
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.errors import Problem
from finetune.formats import ldm, ldm_ckpt, ldm_folder, ldm_shapes, ldm_yaml, stream
from finetune.formats.header import read_header
from finetune.model import configs
from finetune.model.families import TOYBOX

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [16] * 4, "norm_num_groups": 8, "attention_head_dim": 2, "sample_size": 8, "cross_attention_dim": 16},
    "vae": {"block_out_channels": [8] * 4, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}}
SMALL_XL: dict[str, dict[str, Any]] = {
    "unet": SMALL["unet"] | {"block_out_channels": [16] * 3, "cross_attention_dim": 40, "transformer_layers_per_block": [1, 2, 3],
                             "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72},
    "vae": SMALL["vae"], "text_encoder": SMALL["text_encoder"] | {"num_hidden_layers": 2},
    "text_encoder_2": SMALL["text_encoder"] | {"hidden_size": 24, "num_hidden_layers": 3, "projection_dim": 24}}


def networks(family: str, variant: str = "plain", small: bool = True) -> dict[str, torch.nn.Module]:
    """Networks of a kind: random and small, or of full size without memory."""
    told = configs.parts_of(family, variant)
    if small:
        changes = SMALL_XL if family == "sdxl" else SMALL
        told = {part: config | changes.get(part, {}) for part, config in told.items()}
        told["text_encoder"] |= {} if family != "sd1" else {"num_hidden_layers": 2}
    torch.manual_seed(5)
    with torch.device("cpu" if small else "meta"):
        parts: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel.from_config(told["unet"]), "vae": AutoencoderKL.from_config(told["vae"])}
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if name in told:
                parts[name] = kind(CLIPTextConfig(**{key: value for key, value in told[name].items() if key not in ("architectures", "model_type")}))
    return parts


def checkpoint(family: str, variant: str = "plain", small: bool = True, prediction: str = "epsilon", **scheduler: Any) -> ldm.Checkpoint:
    return ldm.of_modules(networks(family, variant, small), {"prediction_type": prediction, **scheduler})


@cache
def published(family: str) -> ldm.Checkpoint:
    """A model of full size, without memory."""
    return checkpoint(family, small=False)


@pytest.mark.parametrize(("family", "half", "full"), [("sd1", 2_132_625_182, 4_265_096_284), ("sd2", 2_607_359_862, 5_214_555_116),
                                                      ("sdxl", 6_938_040_318, 13_875_717_780)])
def test_published_models_have_the_published_sizes(family, half, full):
    whole = published(family)
    assert stream.expected_bytes(ldm.entries(whole, "F16"), {"format": "pt"}) == half
    assert stream.expected_bytes(ldm.entries(whole, "F32"), {"format": "pt"}) == full
    if family == "sd2":  # as diffusers keeps it: 23 blocks and no projection
        kept = {key: entry for key, entry in ldm.entries(whole, "F16").items() if "resblocks.23." not in key and not key.endswith("text_projection")}
        assert stream.expected_bytes(kept, {"format": "pt"}) == 2_580_068_430
    shapes = {part: {name: entry.shape for name, entry in state.items()} for part, state in whole.parts.items()}
    assert ldm_shapes.shapes_of(whole.configs) == shapes  # our arithmetic against the classes themselves
    assert ldm_shapes.shapes_of(ldm_shapes.configs_of(shapes)) == shapes


@pytest.mark.parametrize(("family", "part", "half", "full"), [
    ("sd1", "unet", 1_719_125_304, 3_438_167_536), ("sd2", "unet", 1_731_904_736, 3_463_726_504), ("sdxl", "unet", 5_135_149_760, 10_270_077_736),
    ("sd1", "text_encoder", 246_144_152, 492_265_168), ("sd2", "text_encoder", 680_820_392, 1_361_596_304),
    ("sdxl", "text_encoder_2", 1_389_382_176, 2_778_702_264), ("sd1", "vae", 167_335_342, 334_643_268)])
def test_parts_of_folders_have_the_published_sizes(family, part, half, full):
    state = published(family).parts[part]
    level = "text_model." if part.startswith("text") else ""
    named = {name if name.startswith("text_projection") else level + name: entry for name, entry in state.items()}
    assert [stream.expected_bytes({name: entry.to(kind) for name, entry in named.items()}, {"format": "pt"}) for kind in ("F16", "F32")] == [half, full]


KNOWN = {  # the original models' module names with the published widths, written down one by one
    "sd1": {"model.diffusion_model.time_embed.0.weight": (1280, 320), "model.diffusion_model.input_blocks.3.0.op.bias": (320,),
            "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
            "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3), "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
            "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1), "first_stage_model.decoder.up.0.block.2.conv2.bias": (128,),
            "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
            "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
            "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)},
    "sd2": {"model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320), "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias": (4096,), "cond_stage_model.model.positional_embedding": (77, 1024),
            "cond_stage_model.model.text_projection": (1024, 1024), "cond_stage_model.model.ln_final.weight": (1024,)},
    "sdxl": {"model.diffusion_model.label_emb.0.0.weight": (1280, 2816), "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
             "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
             "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
             "conditioner.embedders.1.model.transformer.resblocks.31.ln_2.weight": (1280,), "conditioner.embedders.1.model.text_projection": (1280, 1280)}}


@pytest.mark.parametrize("family", KNOWN)
def test_keys_and_shapes_of_the_published_files(family):
    found = {key: entry.shape for key, entry in ldm.entries(published(family)).items()}
    assert {key: found.get(key) for key in KNOWN[family]} == KNOWN[family]
    assert {key.split(".")[0] for key in found} == {"model", "first_stage_model", "conditioner" if family == "sdxl" else "cond_stage_model"}


@pytest.mark.parametrize(("family", "variant"), [("sd1", "plain"), ("sd1", "inpainting"), ("sd2", "plain"), ("sd2", "depth"), ("sdxl", "plain"), ("sdxl", "inpainting")])
def test_files_equal_those_written_by_hand_and_come_back_whole(family, variant, tmp_path):
    parts = networks(family, variant)
    by_hand = ldm_by_hand.checkpoint(parts, family)
    whole = ldm.of_modules(parts, {})
    save_file(by_hand, tmp_path / "hand.safetensors", {"format": "pt"})
    original = ldm.original_text(tmp_path / "hand.safetensors") if family == "sd2" else None
    ldm.write(tmp_path / "ours.safetensors", whole, {}, "F32", original)
    ours = load_file(tmp_path / "ours.safetensors")
    by_hand.pop("conditioner.embedders.1.model.logit_scale", None)  # of CLIP's training; nothing of SDXL's reads it, and diffusers does not keep it
    assert ours.keys() == by_hand.keys()
    assert all(torch.equal(ours[key], value) for key, value in by_hand.items())
    back = ldm.read(tmp_path / "hand.safetensors")
    assert {part: set(state) for part, state in back.parts.items()} == {part: set(state) for part, state in whole.parts.items()}
    assert all(torch.equal(entry.load(), whole.parts[part][name].load()) for part, state in back.parts.items() for name, entry in state.items())


def test_the_24th_block_is_the_originals_where_there_is_one_else_a_copy():
    whole = checkpoint("sd2")
    alone = ldm.entries(whole, "F32")
    last, before = (alone[f"cond_stage_model.model.transformer.resblocks.{number}.mlp.c_fc.weight"].load() for number in (23, 22))
    assert torch.equal(last, before) and bool((alone["cond_stage_model.model.text_projection"].load() == 1).all())
    assert not any(key.endswith("logit_scale") for key in alone)
    original = {key.removeprefix("cond_stage_model.model."): entry for key, entry in alone.items() if key.startswith("cond_stage_model.")}
    block = "transformer.resblocks.23.mlp.c_fc.weight"
    original[block] = original[block].map(original[block].shape, torch.zeros_like)
    original["logit_scale"] = stream.Lazy("F32", (), lambda: torch.tensor(4.6))
    given = ldm.entries(whole, "F32", original)
    assert not given[f"cond_stage_model.model.{block}"].load().any() and given["cond_stage_model.model.logit_scale"].load().item() == pytest.approx(4.6)


def test_bytes_are_those_of_the_safetensors_library_and_foretold(tmp_path):
    whole = checkpoint("sd1")
    told = {"finetune.base": "tiny"}
    ldm.write(tmp_path / "a.safetensors", whole, told)
    header = read_header(tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", header.metadata)
    assert (tmp_path / "a.safetensors").stat().st_size == (tmp_path / "b.safetensors").stat().st_size == ldm.expected_bytes(whole, "F16", "a", told)
    entries = read_header(tmp_path / "b.safetensors").tensors
    assert entries == header.tensors
    data = (tmp_path / "a.safetensors").read_bytes()[header.data_start :]
    assert data == (tmp_path / "b.safetensors").read_bytes()[-len(data) :]
    assert header.metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert header.metadata["format"] == "pt" and header.metadata["modelspec.prediction_type"] == "epsilon"


def test_plain_diffusers_reads_toybox_as_a_single_file_and_draws_the_same(tmp_path):
    ldm.write(tmp_path / "toybox.safetensors", ldm.of_folder(TOYBOX), {}, None)
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "local_files_only": True}
    single = StableDiffusionPipeline.from_single_file(str(tmp_path / "toybox.safetensors"), config=str(TOYBOX), **more)
    folder = StableDiffusionPipeline.from_pretrained(TOYBOX, **more)
    latents = []
    for pipe in (single, folder):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(folder.scheduler.config)
        latents.append(pipe("a red backpack on the beach", num_inference_steps=5, generator=torch.Generator().manual_seed(1), output_type="latent").images)
    for name in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(single, name).state_dict(), getattr(folder, name).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert latents[0].std() > 0.1 and float((latents[0] - latents[1]).abs().max()) < 1e-4


def test_a_folder_and_a_single_file_are_each_others_way_back(tmp_path):
    folder = ldm.of_folder(TOYBOX)
    ldm.write(tmp_path / "t.safetensors", folder, {}, "F16")
    ldm_folder.write(tmp_path / "again", ldm.read(tmp_path / "t.safetensors"), TOYBOX, None, {})
    again = ldm.of_folder(tmp_path / "again")
    assert all(torch.equal(entry.load(), folder.parts[part][name].load().half()) for part, state in again.parts.items() for name, entry in state.items())
    with pytest.raises(Problem, match="does not describe this checkpoint: unet has"):
        ldm_folder.write(tmp_path / "other", ldm.Checkpoint({**again.parts, "unet": checkpoint("sd1").parts["unet"]}), TOYBOX, None, {})
    assert not (tmp_path / "other").exists()


def test_v_prediction_is_said_where_each_family_says_it(tmp_path):
    assert ldm.write(tmp_path / "e.safetensors", checkpoint("sd2"), {}) == [tmp_path / "e.safetensors"]
    files = ldm.write(tmp_path / "v.safetensors", checkpoint("sd2", prediction="v_prediction"), {})
    assert files == [tmp_path / "v.safetensors", tmp_path / "v.yaml"] and configs.predicts_v(tmp_path / "v.safetensors")
    words = (tmp_path / "v.yaml").read_text()
    assert "\n    parameterization: v\n" in words and "FrozenOpenCLIPEmbedder" in words and "context_dim: 16" in words
    assert read_header(tmp_path / "v.safetensors").metadata["modelspec.prediction_type"] == "v"
    xl = checkpoint("sdxl", prediction="v_prediction", rescale_betas_zero_snr=True)
    assert ldm.write(tmp_path / "xl.safetensors", xl, {}) == [tmp_path / "xl.safetensors"]
    tensors = read_header(tmp_path / "xl.safetensors").tensors
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)
    assert not {"v_pred", "ztsnr"} & ldm.entries(checkpoint("sdxl")).keys()


def test_the_yaml_takes_numbers_from_a_configuration_and_nothing_else():
    with pytest.raises(Problem, match="where whole numbers belong"):
        ldm_yaml.text({"sample_size": "64\n  target: os.system", "in_channels": 4}, {"hidden_size": 1024}, "sd2")
    targets = {line.split()[1] for line in ldm_yaml.text({"sample_size": 96}, {"hidden_size": 1024}, "sd2").splitlines() if "target:" in line}
    assert targets == {"ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                       "ldm.models.autoencoder.AutoencoderKL", "torch.nn.Identity", "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}


def test_old_folders_name_the_autoencoders_attention_otherwise():
    whole = checkpoint("sd1")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, entry in whole.parts["vae"].items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = entry
    aged = ldm.Checkpoint({**whole.parts, "vae": old}, whole.configs)
    assert ldm.entries(aged).keys() == ldm.entries(whole).keys() and set(old) != set(whole.parts["vae"])


def test_a_tensor_without_a_name_is_refused_not_dropped():
    whole = checkpoint("sd1")
    odd = {**whole.parts["unet"], "down_blocks.0.motion_modules.0.weight": whole.parts["unet"]["conv_in.weight"]}
    with pytest.raises(Problem, match="motion_modules"):
        ldm.entries(ldm.Checkpoint({**whole.parts, "unet": odd}, whole.configs))


def test_overflow_is_refused_before_a_file_is_there(tmp_path):
    parts = networks("sd1")
    parts["unet"].conv_in.bias.data[0] = 1e6
    with pytest.raises(Problem, match="not finite as torch.float16"):
        ldm.write(tmp_path / "x.safetensors", ldm.of_modules(parts, {}), {})
    assert list(tmp_path.iterdir()) == []


def test_an_old_checkpoint_is_read_without_its_copies(tmp_path: Path):
    state = ldm_by_hand.checkpoint(networks("sd1"), "sd1")
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    more = {position: torch.arange(77)[None], "model_ema.diffusion_modelout2weight": torch.ones(2), "betas": torch.ones(1000)}
    torch.save({"state_dict": {**state, **more}, "global_step": 840_000}, tmp_path / "m.ckpt")
    kept, dropped = ldm_ckpt.kept(ldm_ckpt.read(tmp_path / "m.ckpt"))
    assert kept.keys() == state.keys() | {position} and dropped == {"model_ema": 1, "noise schedule and training": 1}
    assert kept[position].to("F16").dtype == "I64" and torch.equal(kept[position].load(), torch.arange(77)[None])


class Payload:
    """What a malicious file pickles."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": ldm_by_hand.checkpoint(networks("sd1"), "sd1"), "callbacks": Payload()}, "bad.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Problem, match="asks for.*pathlib.*save it as .safetensors there"):
        ldm_ckpt.read("bad.ckpt")
    assert not Path("pwned").exists()
