"""The training loop: noise, denoise, weighted squared error. Every method goes through it, none overrides it.

B rows of a micro-batch, C latent channels, H and W latent height and width, T training timesteps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune import diffusion, draws, engine
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.training.finite import Guard


class Source(Protocol):
    """Where micro-batches come from (see `finetune.data.source`)."""

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Any: ...

    def validation(self) -> list[Any]: ...


@dataclass
class State:
    """What a run is made of between two steps; a checkpoint holds exactly this."""

    step: int
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    extra: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)  # what was switched on to run faster; not part of a checkpoint


@dataclass(frozen=True)
class Progress:
    """One finished step, for whoever watches. `loss` and `grad_norm` are tensors, so that looking costs, not running.

    `told` says which steps were left out since the last time, `skipped` how many have been.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor | None
    learning_rate: float
    seconds: float
    cpu_seconds: float
    told: list[str] = field(default_factory=list)
    skipped: int = 0


def prepare(base: Base, method: Method, settings: Any, accelerator: Accelerator) -> State:
    """Attach, freeze everything, thaw what the method named, build the optimizer."""
    base.freeze()
    if not method.replaces:
        engine.store(base.unet, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.key(settings.seed, "init"))
        groups = method.attach(base)
    base.freeze()
    parameters = {name: value for group in groups for name, value in group.parameters.items()}
    for value in parameters.values():
        value.requires_grad_(True)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    notes = engine.speed_up(base.unet, settings)
    optimizer = engine.make_optimizer(groups, settings)
    if accelerator.scaler is not None:  # fp16: accelerate's wrapper unscales and skips overflowing steps
        optimizer = accelerator.prepare_optimizer(optimizer)
    return State(0, parameters, optimizer, method.extra_state(), notes)


def learning_rate_share(step: int, settings: Any) -> float:
    """Share of the peak rate at a step: linear warm-up, then linear or cosine decay to zero, or constant."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    left = max(0.0, (settings.steps - step) / max(1, settings.steps - settings.warmup))
    if settings.schedule == "linear":
        return left
    if settings.schedule == "cosine":
        return 0.5 * (1.0 - torch.cos(torch.tensor(left * torch.pi, dtype=torch.float64)).item())
    return 1.0


def fit(base: Base, method: Method, source: Source, settings: Any, accelerator: Accelerator, state: State) -> Iterator[Progress]:
    """Train from `state.step` to `settings.steps`, yielding after every optimizer step.

    Between two yields nothing is drawn from shared generators, so what the caller does there cannot change the run.

    Raises:
        Problem: a loss or gradient that is not finite, before the optimizer has seen it.
    """
    guard = Guard(settings, state.optimizer, accelerator, lambda batch: timesteps_of(batch, settings.seed, len(base.schedule)))
    while state.step < settings.steps:
        started, busy = time.perf_counter(), time.process_time()
        _training_mode(base, method)
        rate = _set_learning_rate(state, settings)
        loss, batches = _backward(base, method, source, settings, accelerator, state.step, guard)
        norm = _reduce_and_clip(state, settings, accelerator) if batches else None
        checked = norm is not None and accelerator.scaler is None  # with a scaler, fp16's overflows are its own business
        if batches and (not checked or guard.passes("gradient", state.step, norm, batches)):
            guard.arm()
            state.optimizer.step()
            method.after_step(base)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        told = guard.look() if _looks(state.step, settings) else []
        yield Progress(state.step, loss, norm, rate, time.perf_counter() - started, time.process_time() - busy, told, guard.skipped)


def _backward(base: Base, method: Method, source: Source, settings: Any, accelerator: Accelerator, step: int, guard: Guard) -> tuple[Tensor, list[Any]]:
    """Gradients of all micro-batches of a step; their mean loss, and the micro-batches, or none where a loss was broken."""
    total, batches = torch.zeros((), device=base.device), []
    rank, world = accelerator.process_index, accelerator.num_processes
    for micro in range(settings.accumulate):
        batches.append(source.batch(step, micro, rank, world))
        torch.manual_seed(draws.key(settings.seed, "dropout", step, micro, rank))
        with accelerator.autocast():
            loss = loss_of(base, method, batches[-1], settings)
        total += loss.detach() / settings.accumulate
        if not guard.passes("loss", step, loss.detach(), batches[-1:]):
            return total, []
        accelerator.backward(loss / settings.accumulate)
    return total, batches


def _looks(step: int, settings: Any) -> bool:
    """Whether somebody reads or keeps numbers after this step."""
    moments = (settings.log_every, settings.validate_every, settings.checkpoint_every, settings.export_every, settings.preview_every)
    return step == settings.steps or any(every and step % every == 0 for every in moments)


def loss_of(base: Base, method: Method, batch: Any, settings: Any) -> Tensor:
    """The loss of one micro-batch, in the order of the paper (Ho et al. 2020, algorithm 1), as a scalar.

    What was drawn on the CPU is sent without waiting for the device, which may be steps behind.
    """
    latents = batch.latents  # (B, C, H, W)
    noise = noise_of(batch, settings.seed).to(latents, non_blocking=True)
    timesteps = timesteps_of(batch, settings.seed, len(base.schedule))  # (B,), on the CPU
    noisy = diffusion.add_noise(latents, noise, timesteps, base.schedule)
    cond = method.condition(base, batch.captions)
    pred = method.denoise(base, noisy, timesteps, cond)
    wanted = diffusion.target(latents, noise, timesteps, base.schedule, base.prediction)
    weights = batch.weights * diffusion.min_snr_weights(timesteps, base.schedule, settings.snr_gamma, base.prediction).to(batch.weights, non_blocking=True)
    loss = diffusion.weighted_loss(pred, wanted, weights, batch.instances)
    extra = method.regularizer(base, noisy, timesteps, batch.instances)
    return loss if extra is None else loss + extra


def noise_of(batch: Any, seed: int) -> Tensor:
    """Standard normal noise per row, drawn by the row's key and nothing else; (B, C, H, W)."""
    return torch.stack([draws.normal(tuple(batch.latents.shape[1:]), seed, "noise", *key) for key in batch.keys])


def timesteps_of(batch: Any, seed: int, count: int) -> Tensor:
    """Uniform timesteps per row by the row's key; rows of the validation set are spread evenly instead; (B,)."""
    drawn = [int((key[1] * 0.618034 % 1.0) * count) if key[0] == "validation" else int(draws.integers(0, count, 1, seed, "timestep", *key))
             for key in batch.keys]
    return torch.tensor(drawn)


@torch.no_grad()
def validation_loss(base: Base, method: Method, source: Source, settings: Any) -> float:
    """Mean loss on the fixed set of pictures, noises and timesteps, without weights; the same set for every method."""
    total, rows = 0.0, 0
    with at_rest(base, method), engine.autocast(settings, base.device):
        for batch in source.validation():
            noise = noise_of(batch, settings.seed).to(batch.latents, non_blocking=True)
            timesteps = timesteps_of(batch, settings.seed, len(base.schedule))
            noisy = diffusion.add_noise(batch.latents, noise, timesteps, base.schedule)
            pred = method.denoise(base, noisy, timesteps, method.condition(base, batch.captions))
            wanted = diffusion.target(batch.latents, noise, timesteps, base.schedule, base.prediction)
            total += (pred.float() - wanted.float()).pow(2).flatten(1).mean(1).sum().item()
            rows += len(batch.keys)
    return total / rows


@contextlib.contextmanager
def at_rest(base: Base, method: Method) -> Iterator[None]:
    """Inside the context everything is in evaluation mode (no dropout anywhere); the modes come back after it."""
    modes = [(part, part.training) for part in (*base.modules().values(), *method.training_modules(base))]
    try:
        for part, _ in modes:
            part.eval()
        yield
    finally:
        for part, mode in modes:
            part.train(mode)


def _set_learning_rate(state: State, settings: Any) -> float:
    """Rate of this step into every group, from the step alone, so that nothing of it needs to be resumed."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate_share(state.step, settings)
    return state.optimizer.param_groups[0]["lr"]


def _training_mode(base: Base, method: Method) -> None:
    """Dropout on where the method trains; walking all modules costs, so only when something switched it off."""
    for part in method.training_modules(base):
        if not part.training:
            part.train()


def _reduce_and_clip(state: State, settings: Any, accelerator: Accelerator) -> Tensor | None:
    """Mean gradient over the processes, unscaled, then clipped to the global norm; returns the norm before clipping."""
    if isinstance(state.optimizer, engine.InBackward):
        return state.optimizer.trouble()  # of gradients that are gone, all that is known
    values = [value for value in state.parameters.values() if value.grad is not None]
    if accelerator.num_processes > 1:
        for value in values:
            value.grad = accelerator.reduce(value.grad, "mean")
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(state.optimizer)
    limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
    return torch.nn.utils.clip_grad_norm_(values, limit, foreach=True) if values else None
