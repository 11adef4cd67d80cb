"""What `inspect` says about each kind of file, its speed, and that it never runs what a file contains."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import Problem
from finetune.formats import embedding, hypernetwork, lora
from finetune.formats.hypernetwork_layers import expected_shapes
from finetune.formats.inspect import facts, inspect
from finetune.formats.lora import LoraModule
from finetune.formats.readers import PROGRAMS
from finetune.formats.tensors import load_tensors, save_tensors

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2."
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
TOLD = {"finetune.method": "lora", "finetune.steps": "300", "finetune.trigger": "sks dog", "finetune.base": "sd15"}


def modules(width=768):
    torch.manual_seed(0)
    return {
        ATTENTION + "to_k": LoraModule(torch.randn(4, width), torch.randn(320, 4), 2.0),
        ATTENTION + "to_q": LoraModule(torch.randn(4, 320), torch.randn(320, 4), 2.0),
        TEXT: LoraModule(torch.randn(4, width), torch.randn(width, 4), 2.0),
    }


def hyper(roles=("key", "value"), width=768, name="hyp"):
    torch.manual_seed(0)
    shapes = expected_shapes(width, [1, 2, 1], "relu", False, True)
    networks = {(width, role): {key: torch.randn(shape) for key, shape in shapes.items()} for role in roles}
    return hypernetwork.HypernetworkFile(networks, activation="relu", name=name, step=5)


def test_a_kohya_lora(tmp_path):
    lora.write_kohya(tmp_path / "dog.safetensors", modules(), TOLD)
    report = inspect(tmp_path / "dog.safetensors")
    assert (report.kind, report.layout, report.family.key) == ("lora", "kohya layout", "sd1")
    assert (report.ranks, report.alphas, report.modules) == ([4], [2.0], {"unet": 2, "text_encoder": 1})
    assert report.parameters == 4 * (768 + 320) + 4 * (320 + 320) + 4 * (768 + 768) + 3
    assert report.dtypes == {"F16": 9} and report.trigger == "sks dog" and report.warnings == []
    assert report.trained_on == {"method": "lora", "base": "sd15", "steps": "300"}
    assert {reader.program: reader.verdict for reader in report.readers} == dict.fromkeys(PROGRAMS, "yes")
    assert "<lora:dog:1>" in report.reader("AUTOMATIC1111").text and report.remedies == []
    assert report.bytes == (tmp_path / "dog.safetensors").stat().st_size
    assert report.part_bytes == {"unet": 2 * (4 * (768 + 320) + 4 * (320 + 320) + 2), "text_encoder": 2 * (4 * (768 + 768) + 1)}
    told = dict(facts(report))
    assert (told["rank"], told["unet"], told["base model"]) == ("4; alpha 2", f"2 modules, {report.part_bytes['unet']:,} bytes", "Stable Diffusion 1.x")
    assert (told["trained on"], told["training"]) == ("sd15", "lora, 300 steps")


def test_a_peft_lora_and_who_cannot_read_it(tmp_path):
    lora.write_peft(tmp_path / "dog.safetensors", modules(1024), TOLD)
    report = inspect(tmp_path / "dog.safetensors")
    assert (report.layout, report.family.key, report.ranks, report.alphas) == ("PEFT layout", "sd2", [4], [])
    assert [reader.program for reader in report.readers if reader.verdict == "no"] == ["AUTOMATIC1111", "Forge", "ComfyUI", "kohya"]
    assert "loses every attention module" in report.reader("ComfyUI").text and report.warnings == []
    assert report.remedies[0][1].endswith("dog.safetensors --to kohya --output dog-kohya.safetensors")


def test_quirks_of_other_programs_loras_become_warnings(tmp_path):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    tensors = {}
    for leaf, rank, alpha in (("k", 4, 4.0), ("v", 8, 1.0)):
        tensors |= {f"{key}{leaf}.lora_down.weight": torch.ones(rank, 768), f"{key}{leaf}.lora_up.weight": torch.ones(320, rank),
                    f"{key}{leaf}.alpha": torch.tensor(alpha)}
    tensors |= {"lora_te1_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 768),
                "lora_te1_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3072, 4), "bundle_emb.toy.clip_l": torch.ones(1, 768)}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_dim": "4"})
    report = inspect(tmp_path / "x.safetensors")
    text = " ".join(report.warnings)
    assert (report.ranks, report.alphas) == ([4, 8], [1.0, 4.0])
    for word in ("It has the ranks [4, 8]", "Alpha is there for 2 of 3 modules", "It has the alphas [1.0, 4.0]", "lacks text_model_", "ss_network_dim says 4",
                 "bundled in", "lora_te1_ is SDXL's prefix"):
        assert word in text, word
    assert {reader.program: reader.verdict for reader in report.readers} == {
        "finetune": "yes", "diffusers": "no", "AUTOMATIC1111": "with care", "Forge": "with care", "ComfyUI": "with care", "kohya": "with care"}
    assert report.reader("ComfyUI").text == "applies only the UNet part" and "--to kohya" in report.remedies[0][1]


def test_metadata_that_disagrees_with_tensors_is_named(tmp_path):
    lora.write_kohya(tmp_path / "dog.safetensors", modules(), {})
    tensors, told = load_tensors(tmp_path / "dog.safetensors")
    save_tensors(tmp_path / "dog.safetensors", tensors, {**told, "ss_network_dim": "8"})
    assert inspect(tmp_path / "dog.safetensors").warnings == ["ss_network_dim says 8, the tensors have rank 4."]


def test_embeddings_in_three_layouts(tmp_path):
    vectors = torch.randn(2, 1024)
    embedding.write_safetensors(tmp_path / "toy.safetensors", vectors, TOLD)
    embedding.write_webui(tmp_path / "toy.pt", vectors, "toy", 300, "sd21")
    embedding.write_diffusers(tmp_path / "learned_embeds.safetensors", vectors, "<toy>", {})
    for name in ("toy.safetensors", "toy.pt", "learned_embeds.safetensors"):
        report = inspect(tmp_path / name)
        assert (report.kind, report.vectors, report.width, report.family.key, report.parameters) == ("embedding", 2, 1024, "sd2", 2048)
    assert 'token="toy")' in inspect(tmp_path / "toy.safetensors").reader("diffusers").text
    assert inspect(tmp_path / "toy.pt").trained_on == {"base": "sd21", "steps": "300"}
    assert inspect(tmp_path / "learned_embeds.safetensors").trigger == "<toy>"
    renamed = inspect(tmp_path / "learned_embeds.safetensors")
    assert "go by the file name" in renamed.warnings[0] and renamed.reader("kohya").verdict == "with care" and renamed.reader("diffusers").verdict == "yes"


def test_trap_2_a_default_torch_file_is_refused_by_the_web_ui(tmp_path):
    torch.save({"string_to_param": {"*": torch.randn(1, 768)}, "name": "toy"}, tmp_path / "toy.pt")
    report = inspect(tmp_path / "toy.pt")
    assert (report.reader("AUTOMATIC1111").verdict, report.reader("Forge").verdict, report.reader("ComfyUI").verdict) == ("no", "yes", "yes")
    assert "current torch.save" in report.warnings[0] and "--to webui" in report.remedies[0][1]


def test_hypernetworks_in_both_forms(tmp_path):
    hypernetwork.write_webui(tmp_path / "hyp.pt", hyper())
    hypernetwork.write_safetensors(tmp_path / "hyp.safetensors", hyper(("key", "query")), TOLD)
    webui, ours = inspect(tmp_path / "hyp.pt"), inspect(tmp_path / "hyp.safetensors")
    assert webui.kind == ours.kind == "hypernetwork" and webui.parameters == ours.parameters == 4_723_200
    assert (webui.settings["widths"], webui.settings["activation"], webui.family.key) == ("768", "relu, on the output too", "sd1")
    assert ours.layout == "finetune safetensors, version 2" and ours.settings["transforms"] == "query, key"
    assert (webui.reader("Forge").verdict, webui.reader("Forge").text) == ("no", "loads it and applies nothing")
    assert webui.reader("AUTOMATIC1111").verdict == webui.reader("ComfyUI").verdict == "yes" and webui.warnings == webui.remedies == []
    assert (ours.reader("ComfyUI").verdict, "silently does nothing" in ours.reader("ComfyUI").text) == ("no", True)
    assert "transforms queries" in ours.warnings[0] and ours.remedies == []
    hypernetwork.write_safetensors(tmp_path / "kv.safetensors", hyper(), TOLD)
    assert inspect(tmp_path / "kv.safetensors").remedies[0][1].endswith("--to webui --output kv.pt")
    damaged = {"hypernet.768.k.linear.0.weight": torch.zeros(3), "strange": torch.zeros(1)}
    save_file(damaged, tmp_path / "x.safetensors", {"finetune.format": "hypernetwork"})
    text = inspect(tmp_path / "x.safetensors").warnings
    assert text == ["The tensors hypernet.768.k.* do not fit the file's own settings.", "The tensors strange* do not fit the file's own settings."]


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_named_and_not_run(tmp_path):
    torch.save({"x": Attack(tmp_path / "attacked")}, tmp_path / "evil.ckpt")
    report = inspect(tmp_path / "evil.ckpt")
    assert report.kind == "unknown" and "mkdir" in report.warnings[0] and not (tmp_path / "attacked").exists()


def checkpoint(path, text_key, text_shape, context, drop=()):
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3, dtype=torch.half),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, context, dtype=torch.half),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(128, 3, 3, 3, dtype=torch.half),
        text_key: torch.zeros(text_shape, dtype=torch.half),
    }
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(drop) or "-")}, path)


@pytest.mark.parametrize(
    "key, shape, context, family",
    [
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (10, 768), 768, "sd1"),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", (3072, 1024), 1024, "sd2"),
        ("conditioner.embedders.1.model.ln_final.weight", (1280,), 2048, "sdxl"),
    ],
)
def test_single_file_checkpoints(tmp_path, key, shape, context, family):
    checkpoint(tmp_path / "x.safetensors", key, shape, context)
    report = inspect(tmp_path / "x.safetensors")
    assert (report.kind, report.family.key) == ("single-file-checkpoint", family)
    assert report.modules == {"UNet": 320 * 36 + 320 * context, "VAE": 3456, "text encoder": torch.Size(shape).numel()}
    checkpoint(tmp_path / "y.safetensors", key, shape, context, drop=["first_stage"])
    assert "It has no VAE" in inspect(tmp_path / "y.safetensors").warnings[0]


def test_our_own_folders_explain_each_file(tmp_path):
    artifact = tmp_path / "run/artifact"
    lora.write_kohya(artifact / "dog.safetensors", modules(), TOLD)
    lora.write_peft(artifact / "pytorch_lora_weights.safetensors", modules(), TOLD)
    digest = hashlib.sha256((artifact / "dog.safetensors").read_bytes()).hexdigest()
    files = [{"file": "dog.safetensors", "sha256": digest}, {"file": "pytorch_lora_weights.safetensors", "sha256": "0"}, {"file": "gone.pt", "sha256": "0"}]
    (artifact / "artifact.json").write_text(json.dumps({"method": "lora", "trigger": "sks dog", "metadata": TOLD, "files": files}))
    (tmp_path / "run/manifest.json").write_text(json.dumps({"status": "finished"}))
    (tmp_path / "run/settings.json").write_text(json.dumps({"method": "lora", "seed": 0}))
    report = inspect(tmp_path / "run")
    assert report.kind == "finetune-run" and report.settings["status"] == "finished" and report.trained_on["seed"] == "0"
    (inside,) = report.children
    assert [child.trained_on for child in inside.children] == [{}, {}]  # the folder has said it
    assert inside.kind == "finetune-artifact" and inside.trigger == "sks dog"
    assert [child.layout for child in inside.children] == ["kohya layout", "PEFT layout"]
    assert [child.remedies for child in inside.children] == [[], []]  # what the second would be converted to lies beside it
    assert inside.trained_on == {"base": "sd15", "steps": "300"}  # the run has said the method
    assert inspect(artifact).trained_on == {"method": "lora", "base": "sd15", "steps": "300"}
    assert inside.warnings == ["pytorch_lora_weights.safetensors was changed after finetune wrote it.", "artifact.json names gone.pt, which is not there."]


def test_pefts_own_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 4, "use_dora": True}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 3)}, tmp_path / "unet/adapter_model.safetensors", TOLD)
    (report,) = inspect(tmp_path).children
    assert (report.kind, report.layout, report.ranks, report.alphas) == ("lora", "PEFT adapter folder: LORA with DoRA", [8], [4])
    assert (report.parameters, report.trigger) == (24, "sks dog")


def test_a_pipeline_folder_with_the_new_names_is_warned_about(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"], "vae": ["diffusers", "Y"]}))
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / part).mkdir()
    (tmp_path / "finetune.json").write_text(json.dumps(TOLD))
    (tmp_path / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 1024}))
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    save_file({"encoder.x": torch.zeros(3)}, tmp_path / "text_encoder/model.safetensors")
    report = inspect(tmp_path)
    assert (report.kind, report.family.key, report.settings["predicts"], report.modules) == ("diffusers-folder", "sd2-v", "v_prediction", {"text_encoder": 3})
    assert report.trigger == "sks dog" and report.trained_on["steps"] == "300"
    text = " ".join(report.warnings)
    for word in ("load random weights", "no vocab.json", "does not say that prompts have 77 tokens", "names vae"):
        assert word in text
    assert (report.reader("diffusers").verdict, report.reader("kohya").verdict, report.reader("Forge").verdict) == ("no", "no", "no")
    (tmp_path / "vae").mkdir()
    whole = inspect(tmp_path)
    assert (whole.reader("diffusers").verdict, whole.reader("kohya").verdict, whole.reader("finetune").verdict) == ("with care", "no", "yes")
    assert [command.split(" --to ")[1].split()[0] for _, command in whole.remedies] == ["diffusers", "single-file"]


def test_a_width_of_no_published_model_is_said(tmp_path):
    lora.write_kohya(tmp_path / "dog.safetensors", modules(64), {})
    assert "text width 64" in inspect(tmp_path / "dog.safetensors").warnings[-1]
    (tmp_path / "folder/unet").mkdir(parents=True)
    (tmp_path / "folder/model_index.json").write_text("{}")
    (tmp_path / "folder/unet/config.json").write_text(json.dumps({"cross_attention_dim": 64}))
    assert "text width 64" in inspect(tmp_path / "folder").warnings[-1]


def test_nothing_there_and_other_files(tmp_path):
    with pytest.raises(Problem, match="nothing at"):
        inspect(tmp_path / "none.safetensors")
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    assert "cannot be read as a picture" in inspect(tmp_path / "x.png").warnings[0]
    (tmp_path / "x.txt").write_text("text")
    assert inspect(tmp_path / "x.txt").kind == "unknown"


def test_safetensors_are_explained_without_importing_torch(tmp_path):
    lora.write_kohya(tmp_path / "dog.safetensors", modules(), TOLD)
    program = """
        import sys
        from finetune.formats.inspect import inspect
        assert inspect(sys.argv[1]).kind == "lora"
        heavy = {"torch", "numpy", "diffusers", "transformers"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "dog.safetensors")], check=True, timeout=60)
