"""Masks to repaint, and what an inpainting or a depth network is given beside the noisy latents.

The masks are those of LAION-style inpainting training (Rombach et al. 2022, section 4.5; the published SD inpainting models
mask everything in a quarter of the rows), and those that only a rendered world has: the thing's own.
The tensors are those of diffusers' StableDiffusionInpaintPipeline and StableDiffusionDepth2ImgPipeline.

Shapes: B pictures, H x W pixels, h x w latents.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from finetune.toybox.scenes import SIDE

KINDS = {"everything": 0.25, "own": 0.12, "dilated": 0.18, "box": 0.15, "part": 0.15, "strokes": 0.15}


def draw_mask(own: Image.Image, random: Random, kind: str | None = None) -> np.ndarray:
    """A mask to repaint, bool (64, 64), True where the picture shall be made anew.

    Args:
        own: the thing's mask as `Shot` has it.
        random: source of every choice.
        kind: of KINDS; drawn by their odds if None. "box" is round the thing, "part" anywhere.
    """
    kind = kind or random.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "everything":
        return np.ones((SIDE, SIDE), bool)
    if kind == "own":
        return np.asarray(own) > 127
    if kind == "dilated":
        return np.asarray(dilated(own, random.randint(1, 6)))
    if kind == "box":
        return box_mask(own, random.randint(1, 8))
    if kind == "part":
        width, height = random.randint(16, SIDE), random.randint(16, SIDE)
        left, top = random.randint(0, SIDE - width), random.randint(0, SIDE - height)
        found = np.zeros((SIDE, SIDE), bool)
        found[top:top + height, left:left + width] = True
        return found
    return strokes(random)


def dilated(own: Image.Image, pixels: int) -> np.ndarray:
    """The thing's mask grown by so many pixels on every side, bool (64, 64)."""
    return np.asarray(own.point(lambda value: 255 if value > 127 else 0).filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 127


def box_mask(own: Image.Image, margin: int) -> np.ndarray:
    """The box round the thing, so many pixels wider on every side, bool (64, 64)."""
    left, top, right, bottom = own.point(lambda value: 255 if value > 127 else 0).getbbox() or (0, 0, SIDE, SIDE)
    found = np.zeros((SIDE, SIDE), bool)
    found[max(0, top - margin):bottom + margin, max(0, left - margin):right + margin] = True
    return found


def strokes(random: Random) -> np.ndarray:
    """One to three strokes of a broad brush, bool (64, 64)."""
    picture = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(picture)
    for _ in range(random.randint(1, 3)):
        width = random.randint(6, 20)
        points = [(random.uniform(0, SIDE), random.uniform(0, SIDE)) for _ in range(random.randint(2, 4))]
        pen.line(points, fill=255, width=width, joint="curve")
        for x, y in points:
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    return np.asarray(picture) > 127


@torch.no_grad()
def inpainting_channels(vae: Any, pictures: Tensor, masks: Tensor, noise: Tensor | None = None) -> Tensor:
    """Mask at latent size, then the latents of the picture whose masked part is grey: (B, 5, h, w).

    Args:
        pictures: (B, 3, H, W) in [-1, 1].
        masks: (B, 1, H, W), 1 = repaint; taken as 1 from 0.5 on.
        noise: for a draw from the posterior, (B, 4, h, w); None takes its mean.
    """
    masks = (masks >= 0.5).to(pictures)
    posterior = vae.encode(pictures * (masks < 0.5)).latent_dist
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    return torch.cat([F.interpolate(masks, size=latents.shape[-2:]), latents * vae.config.scaling_factor], dim=1)


def depth_channels(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth at latent size, stretched to [-1, 1] in each picture: (B, 1, h, w).

    Args:
        depth: (B, 1, H, W) on any scale, near is large (disparity).
        size: (h, w).
    """
    small = F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False)
    low, high = small.amin(dim=(1, 2, 3), keepdim=True), small.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (small - low) / (high - low).clamp(min=1e-6) - 1
