"""Fixtures all tests may use: a tiny random base of the real Stable Diffusion classes, and a few pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import quiet

quiet.hush()
quiet.hide()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ.setdefault("COLUMNS", "80")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Class pictures and other caches of the tests stay with the tests."""
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds tiny bases: `make_model(prediction="v_prediction", seed=1)` -> diffusers folder, the same for the same seed."""

    def build(prediction: str = "epsilon", seed: int = 0, width: int = 48) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp("base") / f"tiny-{prediction}", prediction, seed, width)

    return build


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """A tiny base that predicts the noise: 32 x 32 pictures, 16 x 16 latents, text width 48. Do not write into it."""
    return make_model()


@pytest.fixture(scope="session")
def tiny_v_model(make_model: Callable[..., Path]) -> Path:
    """The same with v-prediction. Do not write into it."""
    return make_model("v_prediction")


@pytest.fixture(scope="session")
def tiny_xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of SDXL's shape: two text encoders (widths 24 and 56), pooled states, time ids. Do not write into it."""
    return write_tiny_xl_model(tmp_path_factory.mktemp("base") / "tiny-xl")


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge folder (clip/ and encoder/) with tiny random networks of the toybox judge's kind."""
    return write_tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four PNGs of one drawn subject (a teal box with an orange dot) on four backgrounds. Do not write into it."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder)
    return folder


def draw_pictures(folder: Path) -> None:
    """The four pictures of `pictures_dir`."""
    from PIL import Image, ImageDraw

    for number, colour in enumerate(("white", "khaki", "slategray", "lightblue")):
        picture = Image.new("RGB", (48 + 8 * number, 48), colour)
        pen = ImageDraw.Draw(picture)
        left = 8 + 3 * number
        pen.rectangle((left, 10, left + 24, 40), fill="teal")
        pen.ellipse((left + 8, 20, left + 16, 28), fill="orange")
        picture.save(folder / f"picture-{number}.png")


def write_tiny_model(folder: Path, prediction: str, seed: int, width: int) -> Path:
    """Write a diffusers folder with seeded random weights, in under a second once the libraries are imported."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from finetune.toybox import tokenizer as toybox_tokenizer

    tokenizer = toybox_tokenizer.build()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
            cross_attention_dim=width, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        vae = AutoencoderKL(
            sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.9)
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder), ("scheduler", scheduler)):
        part.save_pretrained(folder / name)
    toybox_tokenizer.save(tokenizer, folder / "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
             "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def write_tiny_xl_model(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """The tiny model with SDXL's parts: a second text encoder with a projection, and a UNet that is told size and pooled state."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    write_tiny_model(folder, prediction, seed, 24)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config | {"hidden_size": 56, "projection_dim": 16, "hidden_act": "gelu"}))
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4), cross_attention_dim=80,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16)
    second.save_pretrained(folder / "text_encoder_2")
    unet.save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None], "force_zeros_for_empty_prompt": True}
    for name in ("safety_checker", "requires_safety_checker"):
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def write_tiny_judge(folder: Path) -> Path:
    """Write seeded random networks where `open_judge` looks for them."""
    import torch
    from transformers import CLIPTextConfig, ResNetConfig, ResNetModel

    from finetune.model.dual_encoder import DualEncoder
    from finetune.toybox import tokenizer as toybox_tokenizer

    tokenizer = toybox_tokenizer.build()
    look = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    read = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        DualEncoder(look, read, 10, image_size=32).save_folder(folder / "clip")
        ResNetModel(look).save_pretrained(folder / "encoder")
    toybox_tokenizer.save(tokenizer, folder / "clip")
    plain = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder
