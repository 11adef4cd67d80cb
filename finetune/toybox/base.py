"""Assemble the toybox's base folder and the material its UNet is trained on.

After this stage `WORK/base` is a diffusers folder that lacks only its UNet, and `WORK` holds, for every training
picture, the autoencoder's posterior (upright and mirrored) and several captions. The UNet itself is trained by the
project's own loop; the caller passes that function in (see `pretrain`).
"""

import json
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetune.toybox import autoencoder
from finetune.toybox.captions import caption, full_caption
from finetune.toybox.world import Picture

CAPTIONS_PER_PICTURE = 8
READY = "READY"


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule, with the settings its samplers expect."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """Save with the names every version of transformers reads: `text_model.` in front, which version 5 leaves out."""
    folder = Path(folder)
    text_encoder.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def write_latents(vae: AutoencoderKL, pixels: np.ndarray, path: Path) -> None:
    """Posterior `mean` and `std` of every picture and of its mirror image, as fp16 (B, 4, 16, 16), before scaling."""
    tensors = {}
    for suffix, flipped in (("", False), ("_flipped", True)):
        mean, std = autoencoder.encode(vae, pixels, flipped=flipped)
        tensors[f"mean{suffix}"], tensors[f"std{suffix}"] = mean.half(), std.half()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def write_captions(pictures: list[Picture], path: Path, seed: int = 0) -> None:
    """One JSON line per picture: what is drawn, and captions of which the first names everything."""
    random = Random(f"captions of toybox {seed}")
    with path.open("w", encoding="utf-8") as file:
        for picture in pictures:
            captions = [full_caption(picture)]
            captions += [caption(picture, random).text for _ in range(CAPTIONS_PER_PICTURE - 1)]
            line = {
                "captions": captions,
                "class": picture.noun,
                "colour": picture.colour,
                "second": picture.second,
                "pattern": picture.pattern,
                "scene": picture.scene,
                "style": picture.style,
            }
            file.write(json.dumps(line) + "\n")


@torch.no_grad()
def latent_statistics(path: Path, count: int = 4000) -> dict[str, float]:
    """Mean, spread per channel and posterior width of cached latents: what the noise schedule will meet."""
    latents = load_file(path)
    mean, std = latents["mean"][:count].float(), latents["std"][:count].float()
    spread = mean.std(dim=(0, 2, 3))
    return {
        "mean": float(mean.mean()),
        "std": float(mean.std()),
        "least channel std": float(spread.min()),
        "greatest channel std": float(spread.max()),
        "posterior std": float(std.mean()),
    }


def posterior_means(path: Path, count: int) -> torch.Tensor:
    """The first cached posterior means, float32 (count, 4, 16, 16)."""
    return load_file(path)["mean"][:count].float()
