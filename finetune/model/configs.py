"""Small configuration folders for single checkpoints, so that opening one never asks the network.

A single LDM file holds weights only. diffusers takes the rest from a folder of JSON files and a tokenizer; the figures
here are those of the published Stable Diffusion 1.5, 2.1-base and 2.1 configurations.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import Problem

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
SD2 = {"unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
       "text_encoder": {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                        "num_hidden_layers": 23, "projection_dim": 512}}


@contextlib.contextmanager
def config_folder(checkpoint: Path, family: str) -> Iterator[Path]:
    """A temporary diffusers folder without weights that describes a single checkpoint.

    Raises:
        Problem: the checkpoint is of no family whose configuration is known.
    """
    if family not in ("sd1", "sd2"):
        raise Problem(f"The checkpoint {checkpoint} is of no known family.", "A single file says nothing of its architecture; known are SD 1.x and 2.x.",
                      "Use a diffusers folder instead.")
    parts = {"unet": dict(UNET), "vae": dict(VAE), "text_encoder": dict(TEXT), "scheduler": dict(SCHEDULER)}
    if family == "sd2":
        for part, changes in SD2.items():
            parts[part].update(changes)
        if predicts_v(checkpoint):
            parts["scheduler"]["prediction_type"] = "v_prediction"
            parts["unet"]["sample_size"] = 96
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), parts)
        yield Path(name)


def predicts_v(checkpoint: Path) -> bool:
    """Whether an SD 2.x checkpoint predicts v: by the .yaml beside it, else by ComfyUI's statistic (docs/formats.md, "Single checkpoint")."""
    beside = checkpoint.with_suffix(".yaml")
    if beside.is_file():
        return any(line.split("#")[0].replace('"', "").replace("'", "").split() == ["parameterization:", "v"]
                   for line in beside.read_text(encoding="utf-8", errors="replace").splitlines())
    from safetensors import safe_open

    with safe_open(checkpoint, "pt") as file:
        return V_KEY in file.keys() and float(file.get_tensor(V_KEY).float().std(correction=0)) > 0.09


def write_folder(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """model_index.json, the four configurations and CLIP's tokenizer."""
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for part, config in parts.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder / "tokenizer")


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer files, the vocabulary derived from the merges (Sennrich et al. 2016; OpenAI CLIP's order)."""
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    signs = list(_byte_signs().values())
    words = [*signs, *(f"{sign}</w>" for sign in signs), *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def _byte_signs() -> dict[int, str]:
    """GPT-2's printable sign for each byte: itself where it is printable, else a letter from U+0100 on, printable ones first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}
