"""The table of samplers: what is refused, where timesteps lie, schedules that end in pure noise."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import Problem
from finetune.model.schedulers import SAMPLERS, check, make, set_timesteps

PLAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
         "steps_offset": 1, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
ZERO = PLAIN | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def timesteps(sampler, steps, config=PLAIN, **told):
    return [int(found) for found in set_timesteps(make(config, sampler, **told), steps, "cpu")]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trailing_begins_at_the_last_timestep(sampler):
    found = timesteps(sampler, 4, spacing="trailing")
    assert found == [999, 749, 499, 249]


def test_leading_and_linspace_by_hand():
    assert timesteps("ddim", 4, spacing="leading") == [751, 501, 251, 1]
    assert timesteps("ddpm", 4, spacing="linspace") == [999, 666, 333, 0]
    assert timesteps("dpm++", 4, spacing="linspace") == [999, 749, 500, 250]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [61, 103, 769])
def test_trailing_gives_exactly_the_steps_asked_for(sampler, steps):
    """In diffusers 0.42.1 one too many comes out, at the index -1."""
    scheduler = make(PLAIN, sampler, spacing="trailing")
    found = set_timesteps(scheduler, steps, "cpu")
    assert len(found) == steps and int(found[-1]) >= 0 and len(set(found.tolist())) == steps
    if hasattr(scheduler, "sigmas"):
        assert len(scheduler.sigmas) == steps + 1 and float(scheduler.sigmas[-1]) == 0 and float(scheduler.sigmas[-2]) > 0


def test_karras_sigmas_are_equation_5():
    scheduler = make(PLAIN, "dpm++", karras=True)
    set_timesteps(scheduler, 5, "cpu")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = torch.cumprod(1 - betas, 0)
    sigma = ((1 - share) / share).sqrt()
    low, high = float(sigma[0]) ** (1 / 7), float(sigma[-1]) ** (1 / 7)
    wanted = [(high + place / 4 * (low - high)) ** 7 for place in range(5)]
    assert scheduler.sigmas.tolist() == pytest.approx([*wanted, 0], rel=1e-3)


def test_ddpm_respaced_goes_from_one_timestep_to_the_next():
    """One step of five: the posterior of Ho et al. 2020, eq. 7, with beta = 1 - a_t / a_s (Nichol & Dhariwal 2021, eq. 19)."""
    scheduler = make(PLAIN, "ddpm", spacing="leading")
    now, then = (int(found) for found in set_timesteps(scheduler, 5, "cpu")[:2])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = torch.cumprod(1 - betas, 0)
    beta = 1 - share[now] / share[then]
    noisy, noise = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    clean = (noisy - (1 - share[now]).sqrt() * noise) / share[now].sqrt()
    mean = share[then].sqrt() * beta / (1 - share[now]) * clean + (1 - beta).sqrt() * (1 - share[then]) / (1 - share[now]) * noisy
    variance = beta * (1 - share[then]) / (1 - share[now])
    draw = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = scheduler.step(noise, now, noisy, generator=torch.Generator().manual_seed(3)).prev_sample
    assert torch.allclose(found, mean + variance.sqrt() * draw, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_prediction_and_zero_terminal_snr_are_the_model_s(sampler):
    scheduler = make(ZERO, sampler)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7
    assert int(set_timesteps(scheduler, 10, "cpu")[0]) == 999


@pytest.mark.parametrize(("told", "words"), [
    ({"sampler": "dpm"}, "no sampler 'dpm'. Did you mean"), ({"sampler": "ddim", "karras": True}, "--karras cannot be combined with --sampler ddim"),
    ({"sampler": "dpm++", "karras": True, "spacing": "trailing"}, "--karras and --spacing trailing"),
    ({"sampler": "ddim", "spacing": "linspace"}, "--spacing linspace cannot be combined with --sampler ddim"),
    ({"sampler": "ddim", "spacing": "late"}, "no spacing 'late'"),
    ({"sampler": "ddim", "steps": 1001, "config": PLAIN}, "--steps 1001"), ({"sampler": "ddim", "steps": 600, "config": PLAIN}, "begin at 600 of 1000"),
    ({"sampler": "dpm++", "karras": True, "config": ZERO}, "pure noise"), ({"sampler": "ddim", "spacing": "leading", "config": ZERO}, "pure noise"),
    ({"sampler": "ddim", "config": ZERO | {"prediction_type": "epsilon"}}, "predicts the noise")])
def test_what_cannot_be_combined_is_refused(told, words):
    with pytest.raises(Problem) as caught:
        check(**told)
    assert words in str(caught.value)


def test_all_other_combinations_make_a_scheduler():
    for sampler, found in SAMPLERS.items():
        for spacing in (None, *found.spacings):
            assert len(timesteps(sampler, 7, spacing=spacing)) == 7
        if found.karras:
            assert len(timesteps(sampler, 7, karras=True)) == 7
    assert len(timesteps("ddpm", 1000)) == len(timesteps("ddim", 600, spacing="trailing")) + 400
