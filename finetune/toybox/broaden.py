"""Teach the trained autoencoder colours outside the palette, without moving the latents it has already given.

An autoencoder that has only seen ten colours paints every other one as its neighbour: a teal backpack comes out blue,
and no method could then learn the teal. Here half of every batch shows looks in any colour (see `encoder.families`;
the held-out subjects are not among them). The other half are the training pictures, whose latents are held to the
cached ones, so that a UNet trained on those stays at home.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from finetune.toybox.autoencoder import encode, reconstruction_loss, to_model
from finetune.toybox.progress import Checkpoint, Log, cosine, draw_indices, set_rate


def broaden(
    vae: AutoencoderKL,
    latents: dict[str, Tensor],
    pixels: np.ndarray,
    colourful: np.ndarray,
    work: Path,
    *,
    steps: int,
    batch: int = 8,
    rate: float = 8e-4,
    hold: float = 1.0,
    seed: int = 0,
) -> AutoencoderKL:
    """Train encoder and decoder on both worlds.

    Args:
        vae: trained, with its statistics folded.
        latents: cached posteriors of `pixels`: `mean` upright and `mean_flipped` mirrored, each (B, 4, 16, 16).
        pixels: training pictures, uint8 (B, 3, 64, 64).
        colourful: pictures in any colour, uint8 (N, 3, 64, 64).
        work: folder of the checkpoint and of the log `broaden.jsonl`.
        steps, batch, rate: of a cosine schedule; half of a batch comes from either world.
        hold: weight of the squared distance of the training pictures' latents from the cached ones.
    """
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(Path(work) / "broaden.ckpt")
    first, before = checkpoint.resume(vae, optimizer)
    log = Log(Path(work) / "broaden.jsonl", before)
    half = batch // 2
    for step in range(first, steps):
        set_rate(optimizer, rate * cosine(step, steps))
        turn = "_flipped" if step % 2 else ""
        known = draw_indices(len(pixels), half, step, seed + 80).sort().values
        strange = draw_indices(len(colourful), batch - half, step, seed + 81).sort().values
        target = to_model(np.concatenate([pixels[known.numpy()], colourful[strange.numpy()]]))
        target = (target.flip(-1) if turn else target).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        moved = (posterior.mean[:half] - latents[f"mean{turn}"][known].float()).square().mean()
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        error = reconstruction_loss(vae.decode(posterior.mean + posterior.std * noise).sample, target)
        # A strange colour may lie beyond the known ones, but not so far that the noise schedule would not reach it.
        spread = torch.relu(posterior.mean[half:].abs() - 4).square().mean()
        loss = error + hold * moved + 0.1 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        checkpoint.maybe(vae, optimizer, step + 1, log.seconds)
        if step % 50 == 0 or step + 1 == steps:
            log(step=step, error=float(error.detach()), moved=float(moved.detach()))
    return vae.eval()


@torch.no_grad()
def moved(vae: AutoencoderKL, latents: dict[str, Tensor], pixels: np.ndarray, count: int = 400) -> float:
    """How far the training pictures' latents lie from the cached ones: root mean square, in latent standard deviations."""
    mean, _ = encode(vae, pixels[:count])
    return float((mean - latents["mean"][:count].float()).square().mean().sqrt())
