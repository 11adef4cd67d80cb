"""The mathematics of diffusion training: schedules, noising, targets, weights.

Shapes: B batch, C channels, H and W latent height and width, T training timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alphas_cumprod(steps: int, beta_start: float, beta_end: float, kind: str = "scaled_linear") -> Tensor:
    """Signal share per timestep, alpha-bar (Ho et al. 2020, eq. 4), float32 of shape (T,).

    `scaled_linear` is Stable Diffusion's: linear in the square root of beta.
    """
    if kind == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    else:
        raise ValueError(f"unknown beta schedule {kind!r}; known: scaled_linear, linear")
    return torch.cumprod(1.0 - betas, 0).float()


def zero_terminal_snr(share: Tensor) -> Tensor:
    """A schedule shifted and stretched so that nothing of the signal is left at its end (Lin et al. 2023, algorithm 1).

    Args:
        share: alpha-bar, (T,). Its first value stays as it is.
    """
    root = share.double().sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square().float()


def _columns(schedule: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) at `timesteps`, shaped (B, 1, 1, 1). Read where the schedule lies: a GPU is not waited for."""
    share = schedule[timesteps.to(schedule.device)].to(like.device, torch.float32, non_blocking=True).view(-1, *([1] * (like.ndim - 1)))
    return share.sqrt().to(like.dtype), (1.0 - share).sqrt().to(like.dtype)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) e (Ho et al. 2020, eq. 4). latents, noise (B, C, H, W); timesteps (B,)."""
    signal, sigma = _columns(schedule, timesteps, latents)
    return signal * latents + sigma * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Tensor, prediction: str) -> Tensor:
    """What the network should say: the noise, or v = sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho 2022, app. D)."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        signal, sigma = _columns(schedule, timesteps, latents)
        return signal * noise - sigma * latents
    raise ValueError(f"unknown prediction type {prediction!r}; known: epsilon, v_prediction")


def snr(timesteps: Tensor, schedule: Tensor) -> Tensor:
    """Signal-to-noise ratio a / (1 - a) per row, shape (B,)."""
    share = schedule[timesteps.to(schedule.device)].double()
    return (share / (1.0 - share)).float()


def min_snr_weights(timesteps: Tensor, schedule: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR weights per row (Hang et al. 2023, sec. 3.4): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    gamma 0 switches the weighting off (ones). Weights belong to rows: class rows get their own timestep's weight.
    """
    ratio = snr(timesteps, schedule)
    if gamma <= 0:
        return torch.ones_like(ratio)
    return ratio.clamp(max=gamma) / (ratio + 1.0 if prediction == "v_prediction" else ratio)


def weighted_loss(pred: Tensor, wanted: Tensor, weights: Tensor, normalizer: float) -> Tensor:
    """Squared error per row, then weights, then the sum over rows divided by `normalizer`.

    Args:
        pred, wanted: (B, C, H, W), compared in float32 or, where they come in it, float64.
        weights: (B,) factor per row (prior weight x SNR weight x mask share).
        normalizer: the number of *instance* rows, so that adding class rows of weight 1 adds their mean loss
            (the L = L_instance + lambda L_class of Ruiz et al. 2023, eq. 2) instead of diluting the instance term.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    per_row = (pred.to(dtype) - wanted.to(dtype)).pow(2).flatten(1).mean(1)
    return (per_row * weights.to(per_row)).sum() / normalizer
