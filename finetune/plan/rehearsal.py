"""A run gone through without memory: pictures encoded, class pictures rendered, steps taken, all on fake tensors.

The method attaches to the base as in training, the same modules run forward, autograd runs backward, the optimizer makes its
state; a `Tally` counts. B rows, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune import data, engine, methods
from finetune.data.class_images import PORTION
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.model.text import encode
from finetune.plan import stand_ins
from finetune.plan.skeleton import copy_of
from finetune.plan.tally import Tally
from finetune.settings import TrainSettings

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Rehearsal:
    """What a run would hold, in bytes, and what it would do.

    Attributes:
        trained, extra, state_shapes: name -> shape and format of the trainables, of what else a checkpoint holds, of the
            optimizer's state ("NAME/KEY").
        parts: network -> bytes as it is loaded; unet as it is loaded is in its frozen format already.
        frozen: bytes of the networks' own tensors that do not train, without what is let go before the first step.
        freed: networks that are let go.
        copies: a teacher and averages: what attaching adds beyond the trainables.
        gradients, state: bytes of the gradients held at once, and of the optimizer's state.
        activations: bytes that the forward pass leaves for the backward pass.
        held: bytes alive when training is about to begin, without optimizer state.
        moments: what happens -> most bytes that are alive at once in it, networks and all.
        work: operators of one micro-batch, forward and backward; `forward` those of its forward pass alone.
    """

    trained: Shapes = field(default_factory=dict)
    extra: Shapes = field(default_factory=dict)
    state_shapes: Shapes = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    freed: list[str] = field(default_factory=list)
    trainable: int = 0
    copies: int = 0
    gradients: int = 0
    state: int = 0
    activations: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    held: int = 0
    work: Counter[Any] = field(default_factory=Counter)
    forward: Counter[Any] = field(default_factory=Counter)


def rehearse(settings: TrainSettings, skeleton: Base, record: bool = False) -> Rehearsal:
    """Go through one run of a method on a skeleton, which stays as it is.

    Args:
        record: note the operators of a step as well.

    Raises:
        Problem: as attaching does, for settings that cannot work.
    """
    found, tally = Rehearsal(), Tally()
    base, method = copy_of(skeleton), methods.get(settings.METHOD)(settings)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]), stand_ins.on_paper():
        base.device, base.recall = torch.device("cpu"), lambda *names: []  # nothing is read again: nothing was
        for part in base.modules().values():
            part.to_empty(device="cpu")
        if not method.replaces:
            stand_ins.store(base.unet, settings)
        for name, part in base.modules().items():
            found.parts[name] = tally.hold(_tensors(part))
        with tally:
            _pictures(found, tally, method, base, settings)
            optimizer = _attach(found, tally, method, base, settings)
            _train(found, tally, method, base, settings, optimizer, record)
    return found


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in tensors}.values())


@contextlib.contextmanager
def _moment(found: Rehearsal, tally: Tally, name: str) -> Iterator[None]:
    """Note the most bytes alive at once in the context."""
    tally.restart()
    yield
    found.moments[name] = max(found.moments.get(name, 0), tally.peak)


@torch.no_grad()
def _pictures(found: Rehearsal, tally: Tally, method: Method, base: Base, settings: TrainSettings) -> None:
    """Class pictures in portions: prompts, one guided step of the sampler, decoding. Then pictures to latents, one at a time."""
    side, small = settings.resolution, settings.resolution // base.pixels_per_latent
    if settings.prior == "images" and not settings.class_dir:
        with _moment(found, tally, "class pictures"):
            rows = min(PORTION, settings.class_images)
            both = 2 * rows if settings.class_guidance > 1 else rows
            latents = torch.empty(both, base.vae.config.latent_channels, small, small)
            base.ask(latents, torch.zeros((), dtype=torch.long), encode(base, [method.class_prompt]).expand(both))
            base.vae.decode(latents[:rows])
            del latents
    with _moment(found, tally, "encoding"):
        base.vae.encode(torch.empty(1, 3, side, side))


def _attach(found: Rehearsal, tally: Tally, method: Method, base: Base, settings: TrainSettings) -> Any:
    """As the loop prepares a run: attach, freeze, thaw, speed up, make the optimizer; then let go of what is not needed."""
    base.freeze()
    known = set(tally.seen)
    with _moment(found, tally, "attaching"):
        groups = method.attach(base)
    base.freeze()
    trained = {name: value for group in groups for name, value in group.parameters.items()}
    for value in trained.values():
        value.requires_grad_(True)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    engine.speed_up(base.unet, settings)
    found.trained, found.extra = _shapes(trained), _shapes(method.extra_state())
    found.trainable = _bytes(trained.values())
    own = {value.untyped_storage()._cdata for value in trained.values()}
    found.copies = sum(size for key, size in tally.seen.items() if key not in known | own)
    reading = [name for name, encoder, _ in base.encoders() if any(value.requires_grad for value in encoder.parameters())]
    if settings.free_encoders:
        found.freed = [*(["vae"] if settings.crop != "random" else []), *([] if reading else [name for name, _, _ in base.encoders()])]
    if not reading:
        method.condition(base, [_prompt(method)])
    base.free(*found.freed)
    found.frozen = _bytes(value for name, part in base.modules().items() if name not in found.freed for value in _tensors(part)
                          if value.untyped_storage()._cdata not in own)
    found.held = tally.live
    return stand_ins.make_optimizer(groups, settings)


def _shapes(tensors: Any) -> Shapes:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


def _prompt(method: Method) -> str:
    return data.fill(method.templates()[0], method.subject)


def _train(found: Rehearsal, tally: Tally, method: Method, base: Base, settings: TrainSettings, optimizer: Any, record: bool) -> None:
    """A step as all but the first are, with the optimizer's state there. Looking at the validation set takes less: nothing is kept."""
    values = [value for group in optimizer.param_groups for value in group["params"]]
    if not settings.step_in_backward:  # where each tensor steps by itself, the first step is the way to its state
        for value in values:
            value.grad = torch.empty_like(value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for part in method.training_modules(base):
        part.train()
    with _moment(found, tally, "step"):
        for last in (False, True) if settings.step_in_backward else (True,):
            for micro in range(min(settings.accumulate, 2)):
                _micro_batch(found, tally, method, base, settings, record and last and micro == 0)
            reached = {value for value in values if value.grad is not None or settings.step_in_backward}
            held = sum(value.grad.numel() * value.grad.element_size() for value in values if value.grad is not None)
            found.gradients = held or max(value.numel() * value.element_size() for value in values)  # stepped in the backward pass: one at a time
            if settings.clip_norm and held:
                torch.nn.utils.clip_grad_norm_([value for value in values if value.grad is not None], settings.clip_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(base)
    found.state_shapes = {f"{name}/{key}": (tuple(kept.shape), kept.dtype) for name, value in zip(found.trained, values, strict=True)
                          if value in reached for key, kept in optimizer.state.get(value, {}).items() if isinstance(kept, Tensor)}
    found.state = sum(size_of(*entry) for entry in found.state_shapes.values())


def _micro_batch(found: Rehearsal, tally: Tally, method: Method, base: Base, settings: TrainSettings, record: bool) -> None:
    """One forward and one backward pass, as the loop has them."""
    rows = settings.batch_size * (2 if settings.prior == "images" else 1)
    before, tally.record = tally.live, record
    half = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}.get(settings.precision)  # fp16 is as wide; CPUs, on which this runs, know bf16
    with torch.autocast("cpu", half) if half else contextlib.nullcontext():
        pred, noisy, timesteps = forward(method, base, settings, rows)
        loss = (pred.float() - torch.empty(pred.shape)).pow(2).mean()
        extra = method.regularizer(base, noisy, timesteps, settings.batch_size)
        loss = loss if extra is None else loss + extra
    del pred, noisy, timesteps, extra
    found.activations = max(found.activations, tally.live - before)
    if record:
        found.forward = tally.work.copy()
    loss.backward()
    if record:
        found.work = tally.work.copy()
    tally.record = False


def forward(method: Method, base: Base, settings: TrainSettings, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The network's word on a batch, with the batch."""
    small = settings.resolution // base.pixels_per_latent
    noisy, timesteps = torch.empty(rows, base.vae.config.latent_channels, small, small), torch.zeros(rows, dtype=torch.long)
    return method.denoise(base, noisy, timesteps, method.condition(base, [_prompt(method)] * rows)), noisy, timesteps


def size_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
