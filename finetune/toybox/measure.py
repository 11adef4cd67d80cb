"""How well a base draws what it is told: the ruler's verdict on samples for prompts no picture was trained with.

Beside every accuracy stands the ruler's own ceiling: what it reads from the true pictures of the same prompts.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune.toybox.autoencoder import reconstruct
from finetune.toybox.captions import KINDS, full_caption
from finetune.toybox.datasets import describe, pixels
from finetune.toybox.ruler import Ruler, accuracies, labels
from finetune.toybox.world import Picture, held_out

STEPS, GUIDANCE = 25, 4.0


def unseen_prompts(count: int = 240, seed: int = 77) -> list[Picture]:
    """Descriptions nothing was trained on, a quarter of them with held-out (class, colour, pattern) triples."""
    ordinary = describe(count - count // 4, seed, held=False)
    return ordinary + describe(count // 4, seed, held=True)


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    batch: int = 24,
) -> np.ndarray:
    """Draw one picture per prompt as uint8 pixels (B, 3, 64, 64); the noise depends on seed and place in the list."""
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    drawn = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + place) for place in range(len(part))]
        output = pipeline(
            part,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        drawn.append((output * 255 + 0.5).astype(np.uint8).transpose(0, 3, 1, 2))
    return np.concatenate(drawn)


def measure_base(
    pipeline: StableDiffusionPipeline,
    ruler: Ruler,
    prompts: list[Picture] | None = None,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy per attribute of a base's samples.

    Args:
        pipeline: the base, with whatever sampler it carries.
        ruler: the independent classifier.
        prompts: descriptions to draw, or None for `unseen_prompts()`.
        steps, guidance, seed: of sampling.
        say: told the result in a line.

    Returns:
        Per row, accuracies by attribute: `samples`, `held-out triples` and `seen triples` (parts of the samples),
        `ceiling` (true pictures of the same prompts) and `ceiling through the autoencoder`.
    """
    prompts = prompts or unseen_prompts()
    drawn = sample(pipeline, [full_caption(picture) for picture in prompts], steps=steps, guidance=guidance, seed=seed)
    found = ruler.read(torch.from_numpy(drawn).float() / 255)
    truth = labels(prompts)
    hits = {kind: found[kind].eq(truth[kind]).float() for kind in KINDS}
    held = torch.tensor([held_out(picture.noun, picture.colour, picture.pattern) for picture in prompts])
    rows = {"samples": {kind: float(hit.mean()) for kind, hit in hits.items()}}
    for name, chosen in (("held-out triples", held), ("seen triples", ~held)):
        if chosen.any():
            rows[name] = {kind: float(hit[chosen].mean()) for kind, hit in hits.items()}
    truths = pixels(prompts)
    rows["ceiling"] = accuracies(ruler, truths, prompts)
    rows["ceiling through the autoencoder"] = accuracies(ruler, reconstruct(pipeline.vae, truths), prompts)
    if say:
        for name, row in rows.items():
            say(f"{name}: " + "  ".join(f"{kind} {value:.3f}" for kind, value in row.items()))
    return rows


def sheet(drawn: np.ndarray, columns: int = 12, enlarge: int = 2) -> Image.Image:
    """Pictures (B, 3, 64, 64) side by side, for eyes."""
    rows = -(-len(drawn) // columns)
    canvas = Image.new("RGB", (columns * 66, rows * 66), "white")
    for place, picture in enumerate(drawn):
        canvas.paste(
            Image.fromarray(picture.transpose(1, 2, 0)), (place % columns * 66 + 1, place // columns * 66 + 1)
        )
    return canvas.resize((canvas.width * enlarge, canvas.height * enlarge), Image.Resampling.NEAREST)
