"""Small configuration folders for single checkpoints, so that opening one never asks the network.

A single LDM file holds weights only. diffusers takes the rest from a folder of JSON files and a tokenizer; the figures
here are those of the published Stable Diffusion 1.5, 2.1-base, 2.1 and XL-base-1.0 configurations, and of the inpainting
and depth models made from them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import Problem
from finetune.formats import header
from finetune.model.families import CHANNELS, COMPONENTS, TOYBOX

MERGES = Path(__file__).resolve().parent / "vocabulary" / "clip-merges.txt.gz"
V_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

UNET: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
                        "down_block_types": DOWN, "up_block_types": UP, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
                        "norm_num_groups": 32, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
VAE: dict[str, Any] = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
                       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
                       "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512, "scaling_factor": 0.18215}
TEXT: dict[str, Any] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
                        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                        "num_hidden_layers": 12, "max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 768}
SCHEDULER: dict[str, Any] = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                             "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
                             "prediction_type": "epsilon"}
SD2: dict[str, dict[str, Any]] = {
    "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "text_encoder": {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                     "num_hidden_layers": 23, "projection_dim": 512}}
SDXL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [320, 640, 1280], "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
             "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
             "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 128},
    "vae": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "scheduler": {"timestep_spacing": "leading"}}
TEXT_2: dict[str, Any] = TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120,
                                 "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280}
PADS = {"sd1": {"tokenizer": "<|endoftext|>"}, "sd2": {"tokenizer": "!"},  # OpenCLIP fills up with id 0, which is "!"
        "sdxl": {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}}


@contextlib.contextmanager
def config_folder(checkpoint: Path, family: str, variant: str = "plain") -> Iterator[Path]:
    """A temporary diffusers folder without weights that describes a single checkpoint.

    Raises:
        Problem: the checkpoint is of no family whose configuration is known.
    """
    if family not in (*PADS, "toybox"):
        raise Problem(f"The checkpoint {checkpoint} is of no known family.",
                      "A single file says nothing of its architecture; known are Stable Diffusion 1.x, 2.x and XL.", "Use a diffusers folder instead.")
    spoken = _spoken(checkpoint, family)
    with tempfile.TemporaryDirectory() as name:
        if family == "toybox":
            _copy_toybox(Path(name), {"unet": {"in_channels": CHANNELS[variant]}, "scheduler": spoken})
        else:
            parts = parts_of(family, variant)
            parts["scheduler"] |= spoken
            if family == "sd2" and "prediction_type" in spoken:
                parts["unet"]["sample_size"] = 96
            write_folder(Path(name), parts, PADS[family])
        yield Path(name)


def _copy_toybox(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """The embedded base's folder without its weights, with some settings changed."""
    shutil.copyfile(TOYBOX / "model_index.json", folder / "model_index.json")
    for part in COMPONENTS:
        shutil.copytree(TOYBOX / part, folder / part, ignore=shutil.ignore_patterns("*.safetensors"))
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if part in changes:
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes[part]), encoding="utf-8")


def parts_of(family: str, variant: str = "plain") -> dict[str, dict[str, Any]]:
    """Component -> configuration of a published model.

    Args:
        family: "sd1", "sd2" or "sdxl". variant: of `families.CHANNELS`.
    """
    parts = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": SCHEDULER} | ({"text_encoder_2": TEXT_2} if family == "sdxl" else {})
    changes = {"sd2": SD2, "sdxl": SDXL}.get(family, {})
    return {part: config | changes.get(part, {}) | ({"in_channels": CHANNELS[variant]} if part == "unet" else {}) for part, config in parts.items()}


def _spoken(checkpoint: Path, family: str) -> dict[str, Any]:
    """What a checkpoint predicts, and whether its schedule ends without signal, as the scheduler's configuration says it.

    SD 2.x tells by the .yaml beside it or a statistic; SDXL by empty tensors named `v_pred` and `ztsnr` (docs/formats.md).
    A toybox of ours has the .yaml too.
    """
    if family in ("sd2", "toybox") and predicts_v(checkpoint):
        return {"prediction_type": "v_prediction"}
    if family == "sdxl":
        marks = header.read_header(checkpoint).tensors.keys() & {"v_pred", "ztsnr"}
        return ({"prediction_type": "v_prediction"} if "v_pred" in marks else {}) | ({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})
    return {}


def predicts_v(checkpoint: Path) -> bool:
    """Whether a checkpoint with one text encoder predicts v: by the .yaml beside it, else by ComfyUI's statistic (docs/formats.md, "Single checkpoint")."""
    beside = checkpoint.with_suffix(".yaml")
    if beside.is_file():
        return any(line.split("#")[0].replace('"', "").replace("'", "").split() == ["parameterization:", "v"]
                   for line in beside.read_text(encoding="utf-8", errors="replace").splitlines())
    from safetensors import safe_open

    with safe_open(checkpoint, "pt") as file:
        return V_KEY in file.keys() and float(file.get_tensor(V_KEY).float().std(correction=0)) > 0.09


def write_folder(folder: Path, parts: dict[str, dict[str, Any]], pads: dict[str, str] | None = None) -> None:
    """model_index.json, the configurations, and CLIP's tokenizer once for each text encoder with the sign it fills prompts up with."""
    index = {"_class_name": "StableDiffusionXLPipeline" if "text_encoder_2" in parts else "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None]}
    if "text_encoder_2" in parts:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
                  "image_encoder": [None, None], "force_zeros_for_empty_prompt": True}
        del index["safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for part, config in parts.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config), encoding="utf-8")
    for name, pad in (pads or PADS["sd1"]).items():
        write_tokenizer(folder / name, pad)


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """CLIP's tokenizer files, the vocabulary derived from the merges (Sennrich et al. 2016; OpenAI CLIP's order)."""
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    signs = list(_byte_signs().values())
    words = [*signs, *(f"{sign}</w>" for sign in signs), *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": pad, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def _byte_signs() -> dict[int, str]:
    """GPT-2's printable sign for each byte: itself where it is printable, else a letter from U+0100 on, printable ones first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}
