"""Pictures from a base model, by diffusers' own pipeline and sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from finetune.errors import Problem
from finetune.model.base import Base

SAMPLERS = ("dpm++", "ddim", "ddpm", "euler", "unipc")


def scheduler(base: Base, sampler: str) -> Any:
    """A diffusers scheduler with the base's noise schedule and prediction type."""
    import diffusers

    kinds = {"dpm++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler",
             "euler": "EulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}
    if sampler not in kinds:
        raise Problem(f"There is no sampler {sampler!r}.", f"Known are {', '.join(kinds)}.")
    config = {key: value for key, value in base.scheduler_config.items() if not key.startswith("_")}
    return getattr(diffusers, kinds[sampler]).from_config(config)


@torch.no_grad()
def render(base: Base, prompts: list[str], seeds: list[int], *, steps: int = 25, guidance: float = 4.0, negative: str = "",
           size: int | None = None, batch: int = 8, sampler: str = "dpm++", output: str = "pil",
           progress: Callable[[int], None] | None = None) -> list[Any]:
    """One picture per (prompt, seed), honouring whatever is attached to the base.

    Each picture's starting noise comes from a CPU generator of its own seed, so it does not depend on its batch.

    Args:
        steps: sampler steps. guidance: classifier-free guidance scale (Ho & Salimans 2022); 1 is off.
        size: side in pixels; None takes the base's own.
        output: "pil" for pictures, "latent" for the latents before decoding, (4, H, W) each.
        progress: called with the number of pictures finished so far.
    """
    pipe = base.pipeline()
    pipe.scheduler = scheduler(base, sampler)
    pipe.set_progress_bar_config(disable=True)
    training = [part.training for part in base.modules().values()]
    for part in base.modules().values():
        part.eval()
    pictures: list[Any] = []
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        texts = prompts[chunk]  # the pipeline itself turns a learned word into all its tokens
        result = pipe(prompt=texts, negative_prompt=[negative] * len(texts), num_inference_steps=steps,
                      guidance_scale=guidance, height=size or base.resolution, width=size or base.resolution,
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]], output_type=output)
        pictures.extend(result.images)
        if progress:
            progress(len(pictures))
    for part, mode in zip(base.modules().values(), training, strict=True):
        part.train(mode)
    return pictures
