"""What `inspect` says of other programs' files, written here by hand, and of what would go wrong with each of them."""

import json
from collections import OrderedDict

import pytest
import torch
from ldm_by_hand import unet_name
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from finetune.formats import hypernetwork, lora
from finetune.formats.inspect import inspect
from finetune.formats.inspection import as_json
from finetune.formats.lora_kinds import LoraModule
from finetune.model import delta

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
UNET, CLIP, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."


def verdicts(report):
    return {reader.program: reader.verdict for reader in report.readers}


def words(report):
    return " ".join(report.warnings)


@pytest.mark.parametrize("kind, tensors, expected", [
    ("LoHa", {"hada_w1_a": (8, 2), "hada_w1_b": (2, 768), "hada_w2_a": (8, 2), "hada_w2_b": (2, 768), "alpha": ()},
     {"diffusers": "no", "AUTOMATIC1111": "yes", "Forge": "yes", "ComfyUI": "yes", "kohya": "with care"}),
    ("LoKr", {"lokr_w1": (2, 2), "lokr_w2": (4, 384), "alpha": ()}, {"diffusers": "no", "AUTOMATIC1111": "yes", "Forge": "yes", "ComfyUI": "yes"}),
    ("DoRA", {"lora_down.weight": (2, 768), "lora_up.weight": (8, 2), "alpha": (), "dora_scale": (8, 1)},
     {"diffusers": "with care", "AUTOMATIC1111": "no", "Forge": "with care", "ComfyUI": "yes"}),
    ("DoRA", {"lora_down.weight": (2, 768), "lora_up.weight": (8, 2), "alpha": (), "dora_scale": (1, 768)}, {"AUTOMATIC1111": "yes", "Forge": "yes"}),
    ("OFT", {"oft_blocks": (2, 4, 4), "alpha": ()}, {"diffusers": "no", "ComfyUI": "with care", "AUTOMATIC1111": "yes"}),
    ("full difference", {"diff": (8, 768)}, {"diffusers": "no", "kohya": "no", "ComfyUI": "yes"}),
])
def test_lycoris_kinds(tmp_path, kind, tensors, expected):
    save_file({f"{KEY}.{part}": torch.ones(shape) for part, shape in tensors.items()}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report.kind == "lora" and report.layout.endswith(f": {kind}") and verdicts(report)["finetune"] == "yes"
    assert expected.items() <= verdicts(report).items()
    assert report.remedies[0][1].startswith("finetune merge ") and "has the alphas" not in words(report)
    if kind in ("LoHa", "full difference"):
        assert report.family.key == "sd1"
    assert ("DoRA with a length for each output" in words(report)) == (tensors.get("dora_scale") == (8, 1))


def test_a_lora_without_its_second_half(tmp_path):
    save_file({f"{KEY}.lora_down.weight": torch.ones(2, 768)}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert verdicts(report)["finetune"] == "no" and "1 modules lack a part" in words(report)


def test_mixed_alphas_and_an_alpha_of_zero(tmp_path):
    def module(name, alpha):
        return {f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.alpha": torch.tensor(alpha)}

    save_file(module(KEY, 2.0) | module(KEY.replace("to_k", "to_v"), 1.0), tmp_path / "mixed.safetensors")
    mixed = inspect(tmp_path / "mixed.safetensors")
    assert "wrong strengths" in mixed.reader("diffusers").text and mixed.remedies and verdicts(mixed)["ComfyUI"] == "yes"
    save_file(module(KEY, 0.0), tmp_path / "zero.safetensors")
    zero = inspect(tmp_path / "zero.safetensors")
    assert verdicts(zero)["finetune"] == "no" and zero.remedies == [] and "alphas [0.0]" in words(zero)


def test_forge_drops_a_file_with_many_names_it_does_not_know(tmp_path):
    tensors = {}
    for layer in range(7):
        name = f"lora_te_encoder_layers_{layer}_mlp_fc1"
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(3072, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert verdicts(report)["Forge"] == "no" and verdicts(report)["ComfyUI"] == verdicts(report)["kohya"] == "with care"
    (warning,) = [text for text in report.warnings if "text_model_" in text]  # seven of a kind, one sentence
    assert warning.endswith("(6 others like it.)")


def test_peft_keys_without_the_text_level_and_without_alpha(tmp_path):
    save_file({"text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 768), "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(3072, 2)},
              tmp_path / "pytorch_lora_weights.safetensors")
    report = inspect(tmp_path / "pytorch_lora_weights.safetensors")
    assert verdicts(report)["diffusers"] == "with care" and "lacks text_model." in words(report) and "No alpha is stored" in words(report)
    assert report.remedies[0][1].endswith("--to kohya --output lora.safetensors")


def test_cloneofsimos_files(tmp_path):
    save_file({"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 8), "<krk>": torch.ones(768)}, tmp_path / "x.safetensors",
              {"unet": json.dumps(["CrossAttention"]), "unet:0:rank": "2", "<krk>": "<embed>"})
    report = inspect(tmp_path / "x.safetensors")
    assert report.layout == "cloneofsimo's layout" and verdicts(report)["finetune"] == "with care" and "--base MODEL --to kohya" in report.remedies[0][1]
    torch.save([torch.ones(8, 2), torch.ones(2, 8)], tmp_path / "x.pt")
    listed = inspect(tmp_path / "x.pt")
    assert listed.kind == "lora" and "bare list" in listed.layout and set(verdicts(listed).values()) == {"no"}


def test_embeddings_of_sdxl_of_onetrainer_and_of_old_trainers(tmp_path):
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "pair.safetensors")
    pair = inspect(tmp_path / "pair.safetensors")
    assert (pair.layout, pair.family.key, pair.vectors, verdicts(pair)["diffusers"]) == ("SDXL pair", "sdxl", 2, "no")
    assert pair.warnings == [] and verdicts(pair)["ComfyUI"] == "yes"
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(3, 1280)}, tmp_path / "uneven.safetensors")
    assert "two tables of equal length" in words(inspect(tmp_path / "uneven.safetensors"))
    save_file({"emp_params": torch.ones(2, 768), "emp_params_out": torch.ones(2, 768)}, tmp_path / "one.safetensors")
    one = inspect(tmp_path / "one.safetensors")
    assert verdicts(one) == {"finetune": "yes", "diffusers": "no", "AUTOMATIC1111": "no", "Forge": "no", "ComfyUI": "yes", "kohya": "yes"}
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.ones(1, 768)}), "name": "old"}, tmp_path / "old.pt")
    old = inspect(tmp_path / "old.pt")
    assert (verdicts(old)["ComfyUI"], verdicts(old)["AUTOMATIC1111"], verdicts(old)["Forge"]) == ("with care", "no", "yes") and "ParameterDict" in words(old)


def webui_hypernetwork(path, last=1, **settings):
    state = OrderedDict({"linear.0.weight": torch.ones(1536, 768), "linear.0.bias": torch.ones(1536), f"linear.{last}.weight": torch.ones(768, 1536),
                         f"linear.{last}.bias": torch.ones(768)})
    content = {768: (state, state), "step": 5, "name": path.stem, "layer_structure": [1, 2, 1], "activation_func": "linear", "is_layer_norm": False,
               "activate_output": False, "use_dropout": False, **settings}
    torch.save({key: value for key, value in content.items() if value != "absent"}, path, _use_new_zipfile_serialization=False)
    return inspect(path)


def test_hypernetworks_that_a1111_and_comfyui_read_differently(tmp_path):
    good = webui_hypernetwork(tmp_path / "good.pt")
    assert (verdicts(good)["AUTOMATIC1111"], verdicts(good)["ComfyUI"], good.family.key, good.warnings) == ("yes", "yes", "sd1", [])
    none = webui_hypernetwork(tmp_path / "none.pt", activation_func=None)
    assert none.reader("ComfyUI").verdict == "no" and "activation_func is None" in words(none) and "--to webui" in none.remedies[0][1]
    silent = webui_hypernetwork(tmp_path / "silent.pt", activate_output="absent")
    assert "activate_output" in silent.reader("ComfyUI").text and "different defaults" in words(silent)
    dropout = webui_hypernetwork(tmp_path / "dropout.pt", last=2, use_dropout=True, dropout_structure=[0, 0.3, 0])
    assert "dropout stays active" in dropout.reader("ComfyUI").text and "It has dropout" in words(dropout)
    content = torch.load(tmp_path / "dropout.pt", weights_only=True)
    torch.save(content, tmp_path / "dropout.pt")  # and in a current container as well: one command mends both
    assert [command.partition(" --to ")[2] for _, command in inspect(tmp_path / "dropout.pt").remedies] == ["webui --output dropout-webui/"]
    named = webui_hypernetwork(tmp_path / "file.pt", name="inner")
    assert named.reader("AUTOMATIC1111").verdict == "with care" and "'inner'" in words(named)


def single(path, text_key, text_shape, context, channels=4, metadata=None, **more):
    tensors = {UNET + unet_name("conv_in.weight", ()): torch.zeros(320, channels, 3, 3, dtype=torch.half), VAE + "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3),
               UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, context, dtype=torch.half),
               text_key: torch.zeros(text_shape), **more}
    save_file(tensors, path, metadata)
    return inspect(path)


SD1 = (CLIP + "embeddings.token_embedding.weight", (10, 768), 768)
SD2 = ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", (3072, 1024), 1024)


def test_whole_models_by_their_input_channels(tmp_path):
    plain = single(tmp_path / "plain.safetensors", *SD1)
    assert set(verdicts(plain).values()) == {"yes"} and plain.warnings == [] and plain.part_bytes["UNet"] == 2 * (320 * 36 + 320 * 768)
    inpainting = single(tmp_path / "inpainting.safetensors", *SD1, channels=9)
    assert "inpainting model" in inpainting.layout and "--mask" in inpainting.reader("finetune").text and "cannot be trained on" in inpainting.reader("finetune").text
    depth = single(tmp_path / "depth.safetensors", *SD2, channels=5)
    assert "depth model" in depth.layout and "--depth" in depth.reader("finetune").text and verdicts(depth)["ComfyUI"] == "with care"
    strange = single(tmp_path / "pix2pix.safetensors", *SD1, channels=8)
    assert verdicts(strange)["finetune"] == "no" and "no ordinary model" in words(strange)


def test_what_sd2_files_do_not_say(tmp_path):
    silent = single(tmp_path / "x.safetensors", *SD2)
    assert silent.family.key == "sd2" and "Nothing in an SD 2 file says epsilon or v" in words(silent) and "not there" in words(silent)
    (tmp_path / "x.yaml").write_text("model:")
    assert "which is there" in words(inspect(tmp_path / "x.safetensors"))
    ours = single(tmp_path / "v.safetensors", *SD2, metadata={"finetune.prediction_type": "v_prediction"})
    assert ours.family.key == "sd2-v" and "no v.yaml lies beside it" in words(ours)


def test_an_ema_copy_and_a_text_encoder_without_its_level(tmp_path):
    extra = {"model_ema.x": torch.zeros(3), "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias": torch.zeros(3)}
    report = single(tmp_path / "x.safetensors", *SD1, **extra)
    assert "EMA copy" in words(report) and verdicts(report)["diffusers"] == "no" and "lacks the `text_model.` level" in words(report)
    assert all(command.startswith("finetune convert ") and "--to single-file" in command for _, command in report.remedies)


def test_checkpoints_as_pickles(tmp_path):
    state = {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768), VAE + "x": torch.zeros(3),
             CLIP + "embeddings.token_embedding.weight": torch.zeros(10, 768)}
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "model.ckpt")
    report = inspect(tmp_path / "model.ckpt")
    assert (report.kind, report.family.key, report.modules["UNet"]) == ("single-file-checkpoint", "sd1", 320 * 768)
    assert (verdicts(report)["finetune"], verdicts(report)["AUTOMATIC1111"], verdicts(report)["Forge"]) == ("with care", "no", "yes")
    assert "--to single-file" in report.remedies[0][1]


def test_pictures(tmp_path):
    def png(name, **texts):
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key.replace("__", "."), text)
        Image.new("RGB", (8, 6)).save(tmp_path / name, pnginfo=info)
        return inspect(tmp_path / name)

    drawn = png("drawn.png", parameters='a <lora:toy:0.8> dog\nNegative prompt: blurry\nSteps: 5, Sampler: DDIM, Seed: 7, Lora hashes: "toy: 12ab"')
    assert drawn.kind == "picture" and drawn.settings["pixels"] == "8 x 6"
    assert (drawn.settings["prompt"], drawn.settings["negative"], drawn.settings["Seed"], drawn.settings["Lora hashes"]) == ("a <lora:toy:0.8> dog", "blurry", "7", "toy: 12ab")
    assert "--like" in drawn.remedies[0][1] and verdicts(drawn)["AUTOMATIC1111"] == "yes"
    assert png("sheet.png", parameters="x", finetune__settings='{"sheet": true}').remedies == []
    assert "without a word" in png("bare.png").layout and "embedding inside" in png("ti.png", **{"sd-ti-embedding": "abc"}).layout


def test_a_variant_of_the_embedded_base(tmp_path):
    told = {"format": "pt", "finetune": delta.FORMAT, "variant": "inpainting", "base": "ab12", "steps": "300"}
    save_file({"conv_in.weight": torch.zeros(8, 9, 3, 3), "conv_in.bias": torch.zeros(8), "mid_block.x.down": torch.zeros(2, 8)}, tmp_path / "x.safetensors", told)
    report = inspect(tmp_path / "x.safetensors")
    assert (report.kind, report.layout, report.settings["changes"]) == ("variant-delta", "inpainting variant of toybox", "2 modules")
    assert "toybox-inpainting" in report.reader("finetune").text and verdicts(report)["ComfyUI"] == "no"


def test_json_holds_what_the_page_says(tmp_path):
    lora.write_kohya(tmp_path / "dog.safetensors", {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": LoraModule(torch.ones(2, 768), torch.ones(8, 2), 1.0)}, {})
    told = json.loads(json.dumps(as_json(inspect(tmp_path / "dog.safetensors"))))
    assert (told["kind"], told["family"]["key"], told["ranks"], told["alphas"]) == ("lora", "sd1", [2], [1.0])
    assert told["readers"][0] == {"program": "finetune", "verdict": "yes", "text": "--artifact dog.safetensors"} and "warnings" not in told


def test_our_hypernetwork_of_queries_names_no_other_reader(tmp_path):
    state = {"linear.0.weight": torch.ones(1536, 768), "linear.0.bias": torch.ones(1536), "linear.1.weight": torch.ones(768, 1536), "linear.1.bias": torch.ones(768)}
    file = hypernetwork.HypernetworkFile({(768, "key"): state}, activation="linear", name="x", step=1)
    hypernetwork.write_safetensors(tmp_path / "x.safetensors", file, {})
    assert [program for program, verdict in verdicts(inspect(tmp_path / "x.safetensors")).items() if verdict != "no"] == ["finetune"]
