"""The samplers by name, and how their timesteps lie. Importing this module imports neither torch nor diffusers.

A sampler walks from noise to a picture in fewer steps than training had (Nichol & Dhariwal 2021, sec. 4: respacing). Which
timesteps it visits is the spacing (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2):

    leading    0, s, 2s, ... from below; the first step is not quite noise
    trailing   T, T - s, ... from above; the first step is pure noise
    linspace   both ends
    Karras     sigmas dense where there is little noise (Karras et al. 2022, eq. 5, rho 7)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from finetune.errors import Problem, nearest

Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        title: what the web UI calls it.
        kind: diffusers' class. options: what its configuration gets besides the model's own.
        karras: whether it can place its sigmas as Karras et al. do.
        spacings: those it steps through correctly.
    """

    title: str
    kind: str
    karras: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    spacings: tuple[str, ...] = SPACINGS


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler("DDPM", "DDPMScheduler"),  # Ho et al. 2020
    # Song et al. 2021. diffusers' class steps by T // steps whatever the spacing, which does not lead from one linspace timestep to the next.
    "ddim": Sampler("DDIM", "DDIMScheduler", spacings=("trailing", "leading")),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", karras=True),  # Karras et al. 2022, algorithm 1
    "euler-a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpm++": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", karras=True),  # Lu et al. 2022, algorithm 2
    "dpm++-sde": Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", karras=True, options={"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler", karras=True),  # Zhao et al. 2023
}


def check(sampler: str, steps: int = 1, spacing: str | None = None, karras: bool = False, config: Mapping[str, Any] | None = None) -> None:
    """Refuse what cannot be combined.

    Args:
        config: the model's scheduler configuration; without it only what no model allows is refused.

    Raises:
        Problem: naming the two that do not go together.
    """
    if sampler not in SAMPLERS:
        raise Problem(f"There is no sampler {sampler!r}.", nearest(sampler, SAMPLERS), f"Known are {', '.join(SAMPLERS)}.")
    found = SAMPLERS[sampler]
    if spacing is not None and spacing not in SPACINGS:
        raise Problem(f"There is no spacing {spacing!r}.", nearest(spacing, SPACINGS), f"Known are {', '.join(SPACINGS)}.")
    if karras and spacing:
        raise Problem(f"--karras and --spacing {spacing} cannot be combined.", "Each of them says where the timesteps lie.", "Give one of them.")
    if karras and not found.karras:
        raise Problem(f"--karras cannot be combined with --sampler {sampler}.", "It visits whole timesteps of the training schedule.",
                      f"Use one of {', '.join(name for name, one in SAMPLERS.items() if one.karras)}.")
    if spacing and spacing not in found.spacings:
        raise Problem(f"--spacing {spacing} cannot be combined with --sampler {sampler}.", "Its stride does not lead from one such timestep to the next.",
                      f"Use {' or '.join(found.spacings)}, or another sampler.")
    if config is None:
        return
    if steps > (most := config.get("num_train_timesteps", 1000)):
        raise Problem(f"--steps {steps} is more than the {most} timesteps the model was trained with.", "Samplers visit a timestep once.",
                      f"Use {most} or less; 20 to 50 are usual.")
    leading = not karras and (spacing or config.get("timestep_spacing", "leading")) == "leading"
    if leading and most // 2 < steps < most:
        raise Problem(f"--steps {steps} cannot be combined with leading timesteps.", f"Their stride is a whole number, so they would begin at {steps} of {most}.",
                      f"Use --spacing trailing, or --steps {most // 2} or less.")
    if config.get("rescale_betas_zero_snr"):
        _check_zero_snr(spacing, karras, config)


def _check_zero_snr(spacing: str | None, karras: bool, config: Mapping[str, Any]) -> None:
    """What a schedule that ends in pure noise (Lin et al. 2024, sec. 3.1) does not allow."""
    if karras:
        raise Problem("--karras cannot be combined with this model.", "Its schedule ends in pure noise, where sigma has no largest value.",
                      "Use --spacing trailing.")
    if spacing == "leading":
        raise Problem("--spacing leading cannot be combined with this model.",
                      "Its schedule ends in pure noise, and leading timesteps never begin there.", "Use --spacing trailing.")
    if config.get("prediction_type", "epsilon") == "epsilon":
        raise Problem("The model's schedule ends in pure noise, but it predicts the noise.",
                      "Of pure noise that prediction says nothing about the picture.", "Its scheduler_config.json should say v_prediction.")


def make(config: Mapping[str, Any], sampler: str = "dpm++", *, spacing: str | None = None, karras: bool = False) -> Any:
    """A diffusers scheduler with the model's noise schedule and prediction type.

    Args:
        config: the model's scheduler configuration (betas, prediction type, zero terminal SNR, spacing).
        spacing: None takes the model's own.

    Raises:
        Problem: as `check`.
    """
    import diffusers

    check(sampler, 1, spacing, karras, config)
    found = SAMPLERS[sampler]
    told = {key: value for key, value in config.items() if not key.startswith("_")} | dict(found.options)
    if spacing:
        told["timestep_spacing"] = spacing
    if karras:
        told["use_karras_sigmas"] = True
    return getattr(diffusers, found.kind).from_config(told)


def set_timesteps(scheduler: Any, steps: int, device: Any) -> Any:
    """Prepare a scheduler for `steps` steps and return its timesteps, from noise to picture, exactly that many.

    diffusers counts trailing timesteps down in floating point; for some numbers (61, 103, 121, ...) one too many comes
    out, with the index -1, at which the schedule wraps round to pure noise. It is taken off again.
    """
    import torch

    scheduler.set_timesteps(steps, device=device)
    if len(scheduler.timesteps) > steps and scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:steps]
        scheduler.num_inference_steps = steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
    return scheduler.timesteps
