"""The mathematics against independent references: diffusers' schedulers and formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from finetune import diffusion, draws

SD = dict(beta_start=0.00085, beta_end=0.012)


@pytest.fixture(scope="module")
def schedule() -> torch.Tensor:
    return diffusion.alphas_cumprod(1000, SD["beta_start"], SD["beta_end"])


def test_schedule_is_stable_diffusions(schedule: torch.Tensor) -> None:
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", **SD)
    torch.testing.assert_close(schedule, theirs.alphas_cumprod, rtol=2e-5, atol=1e-8)
    assert schedule[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert schedule[999].item() == pytest.approx(0.0046602, rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_agree_with_diffusers(schedule: torch.Tensor, prediction: str) -> None:
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", prediction_type=prediction, **SD)
    latents, noise = draws.normal((4, 4, 5, 5), 1, "latents"), draws.normal((4, 4, 5, 5), 1, "noise")
    timesteps = torch.tensor([0, 17, 500, 999])
    torch.testing.assert_close(diffusion.add_noise(latents, noise, timesteps, schedule), theirs.add_noise(latents, noise, timesteps), rtol=1e-5, atol=1e-5)
    wanted = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(diffusion.target(latents, noise, timesteps, schedule, prediction), wanted, rtol=1e-5, atol=1e-5)


def test_min_snr_weights_by_hand(schedule: torch.Tensor) -> None:
    timesteps = torch.tensor([3, 300, 900])
    for prediction, shift in (("epsilon", 0.0), ("v_prediction", 1.0)):
        expected = []
        for step in timesteps.tolist():
            share = float(schedule[step].double())
            ratio = share / (1 - share)
            expected.append(min(ratio, 5.0) / (ratio + shift))
        found = diffusion.min_snr_weights(timesteps, schedule, 5.0, prediction)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    assert diffusion.min_snr_weights(timesteps, schedule, 0.0, "epsilon").tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("instances", [1, 2, 3])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_loss_weights_against_plain_loops(schedule: torch.Tensor, instances: int, classes: bool, gamma: float) -> None:
    """L = mean over instance rows + lambda * mean over class rows, each row by its own timestep's weight, in pure Python."""
    prior = 0.7
    rows = instances * (2 if classes else 1)
    pred, wanted = draws.normal((rows, 2, 3, 3), 5, "pred").double(), draws.normal((rows, 2, 3, 3), 5, "wanted").double()
    timesteps = draws.integers(0, 1000, rows, 5, "timesteps")
    weights = torch.tensor([1.0] * instances + [prior] * (rows - instances), dtype=torch.float64)
    weights = weights * diffusion.min_snr_weights(timesteps, schedule, gamma, "epsilon").double()
    found = diffusion.weighted_loss(pred, wanted, weights, instances)

    def row_loss(row: int) -> float:
        errors = [(a - b) ** 2 for a, b in zip(pred[row].flatten().tolist(), wanted[row].flatten().tolist(), strict=True)]
        share = float(schedule[int(timesteps[row])].double())
        ratio = share / (1 - share)
        return math.fsum(errors) / len(errors) * (min(ratio, gamma) / ratio if gamma else 1.0)

    expected = math.fsum(row_loss(row) for row in range(instances)) / instances
    if classes:
        expected += prior * math.fsum(row_loss(row) for row in range(instances, rows)) / instances
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_draws_are_functions_of_their_place() -> None:
    assert torch.equal(draws.normal((3,), 1, "noise", 7), draws.normal((3,), 1, "noise", 7))
    places = [(1, "noise", 7), (2, "noise", 7), (1, "vae", 7), (1, "noise", 8), (1, "noise", 7, 0)]
    assert len({draws.key(*place) for place in places}) == len(places)
    assert draws.key(1, "noise", 12) != draws.key(1, "noise", 1, 2)
    assert draws.key(0, "noise", "instance", 3) == 1611148623679786317
    assert sorted(draws.order(9, 3, "order", 0)) == list(range(9))
