"""Pictures from a base model: noise, classifier-free guidance, one scheduler step after another.

One loop for text to picture, picture to picture, masks and depth maps; for Stable Diffusion 1, 2 and XL. What differs is
where the latents begin and what is put back after a step (`finetune.model.canvas`). Diffusers' own pipelines, given the
same draws, come out the same; the tests hold that for every sampler.

B pictures, H and W latent height and width, T sampler steps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.model import schedulers, text
from finetune.model.base import Base
from finetune.model.canvas import Canvas, prepare, through
from finetune.model.conditioning import Cond


@dataclass(frozen=True)
class Walk:
    """How to get from noise to a picture; see `render` for what each says."""

    steps: int
    guidance: float
    sampler: str
    spacing: str | None = None
    karras: bool = False
    strength: float = 1.0


def scheduler(base: Base, sampler: str) -> Any:
    """A diffusers scheduler with the base's noise schedule and prediction type, for use outside of `render`."""
    return schedulers.make(base.scheduler_config, sampler)


@torch.no_grad()
def render(base: Base, prompts: list[str], seeds: list[int], *, steps: int = 25, guidance: float = 4.0, negative: str = "",
           size: int | tuple[int, int] | None = None, batch: int = 8, sampler: str = "dpm++", spacing: str | None = None, karras: bool = False,
           init: Any = None, strength: float = 1.0, mask: Any = None, depth: Any = None, clip_skip: int = 1, weighted: bool = False,
           output: str = "pil", progress: Callable[[int], None] | None = None) -> list[Any]:
    """One picture per (prompt, seed), honouring whatever is attached to the base.

    Every draw of a picture, its starting noise and that of stochastic samplers, comes from a CPU generator of its own
    seed, so a picture does not depend on its batch.

    Args:
        steps: sampler steps. guidance: classifier-free guidance scale (Ho & Salimans 2022); 1 is off.
        size: side or (height, width) in pixels; None takes the init picture's shape, or the base's own square.
        sampler, spacing, karras: see `finetune.model.schedulers`; spacing None takes the model's own.
        init: a PIL picture to begin from. strength: the share of the way that is noised and walked again (Meng et al. 2022,
            SDEdit); 1 begins from pure noise, exactly as without a picture; 0 gives the picture as the autoencoder sees it.
        mask: as large as `init`, white where to paint anew; the other pixels come out unchanged.
        depth: for models that read a depth map: near things bright.
        clip_skip: 1 takes the text encoder's last layer, 2 the one before it, ...
        weighted: read attention weights, `(word:1.2)`, and prompts of any length; else text is text, cut where the model ends.
        output: "pil" for pictures, "latent" for the latents before decoding, (4, H, W) each.
        progress: called with the number of pictures finished so far.

    Raises:
        Problem: arguments that cannot be combined.
    """
    schedulers.check(sampler, steps, spacing, karras, base.scheduler_config)
    walk = Walk(steps, guidance, sampler, spacing, karras, strength)
    pictures: list[Any] = [None] * len(prompts)
    with resting(base):
        canvas = prepare(base, size, init=init, mask=mask, depth=depth, strength=strength)
        told = {prompt: conditions(base, prompt, negative, clip_skip, weighted) for prompt in dict.fromkeys(prompts)}
        done = 0
        for places in batches([told[prompt][0].states.shape[1] for prompt in prompts], batch):
            wanted, unwanted = (Cond.cat([told[prompts[place]][side] for place in places]) for side in (0, 1))
            latents = sample(base, wanted, unwanted, [seeds[place] for place in places], canvas, walk)
            found = latents if output == "latent" else decode(base, latents, canvas)
            for place, picture in zip(places, found, strict=True):
                pictures[place] = picture
            done += len(places)
            if progress:
                progress(done)
    return pictures


def sample(base: Base, wanted: Cond, unwanted: Cond, seeds: list[int], canvas: Canvas, walk: Walk) -> Tensor:
    """The walk from noise to latents, (B, 4, H, W).

    Args:
        wanted, unwanted: B prompts each; the second is steered away from where guidance is above 1.
    """
    from diffusers.utils.torch_utils import randn_tensor

    solver = schedulers.make(base.scheduler_config, walk.sampler, spacing=walk.spacing, karras=walk.karras)
    timesteps = schedulers.set_timesteps(solver, walk.steps, base.device)
    begin = first_step(walk.steps, walk.strength)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = base.pixels_per_latent
    shape = (len(seeds), base.vae.config.latent_channels, canvas.size[0] // side, canvas.size[1] // side)
    noise = randn_tensor(shape, generator=generators, device=base.device, dtype=base.unet.dtype)
    start = canvas.start.expand(shape) if canvas.start is not None else None
    if begin == walk.steps:
        return start.clone()
    if hasattr(solver, "set_begin_index"):
        solver.set_begin_index(begin)
    draws = {"generator": generators} if "generator" in inspect.signature(solver.step).parameters else {}
    latents = noise * solver.init_noise_sigma if begin == 0 else solver.add_noise(start, noise, timesteps[begin : begin + 1])
    for place in range(begin, walk.steps):
        pred = guided(base, solver.scale_model_input(latents, timesteps[place]), timesteps[place], wanted, unwanted, canvas, walk.guidance)
        latents = solver.step(pred, timesteps[place], latents, **draws).prev_sample
        if canvas.paint is not None:  # outside the mask the original, noised as far as the walk has come (Lugmayr et al. 2022, eq. 8)
            after = timesteps[place + 1 : place + 2]
            known = solver.add_noise(start, noise, after) if len(after) else start
            latents = (1 - canvas.paint) * known + canvas.paint * latents
    return latents


def guided(base: Base, noisy: Tensor, timestep: Tensor, wanted: Cond, unwanted: Cond, canvas: Canvas, guidance: float) -> Tensor:
    """u + guidance (w - u), both asked in one batch (Ho & Salimans 2022, eq. 6); only w where guidance is 1 or less."""
    extra = canvas.extra.expand(len(noisy), -1, -1, -1) if canvas.extra is not None else None
    if guidance <= 1:
        return base.ask(noisy, timestep, wanted, size=canvas.size, extra=extra)
    both = base.ask(torch.cat([noisy, noisy]), timestep, Cond.cat([unwanted, wanted]), size=canvas.size,
                    extra=torch.cat([extra, extra]) if extra is not None else None)
    without, with_it = both.chunk(2)
    return without + guidance * (with_it - without)


def first_step(steps: int, strength: float) -> int:
    """The step to begin at: all of them at strength 1, none at 0, at least one between (counted as diffusers does)."""
    walked = min(int(steps * strength), steps)
    return steps - (max(1, walked) if strength > 0 else 0)


def conditions(base: Base, prompt: str, negative: str, clip_skip: int, weighted: bool) -> tuple[Cond, Cond]:
    """A prompt and what to steer away from, as the network reads them, of one length.

    SDXL was trained with zeros for the empty prompt, not with the encoder's word on it.
    """
    if weighted or clip_skip != 1:
        from finetune.model.prompts import encode_weighted

        wanted, unwanted = encode_weighted(base, [prompt], [negative], clip_skip=clip_skip)
    else:
        wanted, unwanted = text.encode(base, [prompt]), text.encode(base, [negative])
    if unwanted.pooled is not None and not negative:
        unwanted = Cond(torch.zeros_like(unwanted.states), torch.zeros_like(unwanted.pooled))
    return wanted, unwanted


def batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Places of prompts of one length, in order, at most `most` at a time: padding to the longest would change the others."""
    for length in dict.fromkeys(lengths):
        places = [place for place, found in enumerate(lengths) if found == length]
        yield from (places[start : start + most] for start in range(0, len(places), most))


def decode(base: Base, latents: Tensor, canvas: Canvas) -> list[Any]:
    """Latents (B, 4, H, W) to PIL pictures; outside a mask the original's own pixels."""
    from PIL import Image

    base.recall("vae")
    pixels = through(base.vae, lambda dtype: base.vae.decode((latents / base.vae.config.scaling_factor).to(dtype)).sample)
    values = ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype("uint8")
    pictures = [Image.fromarray(value) for value in values]
    if canvas.stencil is not None:
        pictures = [Image.composite(picture, canvas.original, canvas.stencil) for picture in pictures]
    return pictures


@contextlib.contextmanager
def resting(base: Base) -> Iterator[None]:
    """All networks in evaluation mode while the context lasts; then as they were."""
    modes = {name: part.training for name, part in base.modules().items()}
    try:
        for part in base.modules().values():
            part.eval()
        yield
    finally:
        for name, part in base.modules().items():
            part.train(modes[name])
