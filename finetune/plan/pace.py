"""Seconds per step on this machine: operators of a rehearsed step are done again, each kind once, for a few seconds.

A step of Stable Diffusion is ten thousand operators of a few hundred kinds (operator, shapes, formats). Doing each kind once
gives the step's time without its weights; what the seconds do not suffice for is taken at the rate of what was measured.
Small networks simply take steps with random weights.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from finetune import engine, methods
from finetune.model.base import Base
from finetune.plan.rehearsal import Rehearsal, forward
from finetune.plan.skeleton import copy_of
from finetune.settings import TrainSettings

SMALL = 60_000_000  # numbers in all networks together up to which steps are simply taken
SAMPLE = 4_000_000  # numbers that an optimizer's step is timed on


@dataclass
class Pace:
    """Times of kinds of operators on this machine, measured when they are asked for while the budget lasts.

    Attributes:
        budget: seconds for all measurements together.
        known: kind -> seconds. rates: operator -> (work, seconds) of what was measured of it.
    """

    budget: float = 10.0
    spent: float = 0.0
    known: dict[Any, float] = field(default_factory=dict)
    rates: dict[Any, list[float]] = field(default_factory=dict)
    call: float = 0.0

    def seconds(self, work: Counter[Any]) -> tuple[float, float]:
        """Of all operators of a step, and the share of it that was measured."""
        self.call = self.call or _call_seconds()
        for kind in sorted((kind for kind in work if kind not in self.known and not kind[0].is_view), key=lambda kind: -amount(kind) * work[kind]):
            if self.spent >= self.budget:
                break
            self._measure(kind)
        measured, guessed = 0.0, 0.0
        for kind, count in work.items():
            if kind in self.known:
                measured += count * self.known[kind]
            elif not kind[0].is_view:
                guessed += count * self._guess(kind)
        calls = self.call * work.total()
        return measured + guessed + calls, (measured + calls) / max(measured + guessed + calls, 1e-9)

    def _measure(self, kind: Any) -> None:
        started = time.perf_counter()
        try:
            self.known[kind] = _again(kind)
        except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):  # not to be had alone: its rate is guessed
            return
        finally:
            self.spent += time.perf_counter() - started
        rate = self.rates.setdefault(kind[0], [0.0, 0.0])
        rate[0] += amount(kind)
        rate[1] += self.known[kind]

    def _guess(self, kind: Any) -> float:
        work, seconds = self.rates.get(kind[0]) or [sum(one[place] for one in self.rates.values()) for place in (0, 1)]
        return amount(kind) * seconds / work if work else 0.0


def amount(kind: Any) -> float:
    """Work in an operator: floating-point operations where they are counted, else numbers touched."""
    operator, arguments, named = kind
    shapes = [value[1] for value in _walk(arguments) if value[0] == "tensor"]
    touched = float(sum(torch.Size(shape).numel() for shape in shapes))
    counted = flop_registry.get(operator.overloadpacket)
    if counted is None:
        return touched
    try:
        meta = [_meta(value) for value in arguments[1:]]
        with torch.device("meta"):
            out = operator(*meta, **{key: _meta(value) for key, value in named})
        return float(counted(*meta, **{key: _meta(value) for key, value in named}, out_val=out))
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        return touched


def _walk(described: Any) -> Any:
    """The tensors in a described argument."""
    if isinstance(described, tuple) and described and described[0] == "tensor":
        yield described
    elif isinstance(described, tuple):
        for part in described[1:]:
            yield from _walk(part)


def _made(described: Any, make: Callable[[Any], Tensor]) -> Any:
    if isinstance(described, tuple) and described and described[0] == "tensor":
        return make(described)
    if isinstance(described, tuple) and described and described[0] == "list":
        return [_made(part, make) for part in described[1:]]
    return described


def _meta(described: Any) -> Any:
    return _made(described, lambda told: torch.empty_strided(told[1], told[2], dtype=told[3], device="meta"))


def _real(described: Any) -> Any:
    """A tensor of the kind with small random numbers."""
    def make(told: Any) -> Tensor:
        _, shape, stride, dtype = told
        size = 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        flat = torch.rand(size).to(dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
        return flat.as_strided(shape, stride)

    return _made(described, make)


@torch.no_grad()
def _again(kind: Any) -> float:
    """Least seconds of an operator done twice, or up to five times where it is short."""
    operator, arguments, named = kind
    real, options = [_real(part) for part in arguments[1:]], {key: _real(value) for key, value in named}
    best, spent = float("inf"), 0.0
    for turn in range(5):
        started = time.perf_counter()
        operator(*real, **options)
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
        if turn >= 1 and spent > 0.05 or spent > 1.0:
            break
    return best


def _call_seconds() -> float:
    """What a call costs besides its arithmetic: Python, autograd and dispatch, from a chain of calls on nearly nothing."""
    x = torch.ones(8, requires_grad=True)
    best = float("inf")
    for _ in range(3):
        started, y = time.perf_counter(), x
        for _ in range(200):
            y = torch.nn.functional.silu(y)
        y.sum().backward()
        best = min(best, (time.perf_counter() - started) / 400)
    return best


def step_seconds(pace: Pace, found: Rehearsal, settings: TrainSettings, skeleton: Base) -> tuple[float, float]:
    """Seconds of an optimizer step, and the share of it that was measured."""
    if sum(value.numel() for part in skeleton.modules().values() for value in part.parameters()) <= SMALL:
        return taken(settings, skeleton, max(0.5, pace.budget / 5)), 1.0
    micro, share = pace.seconds(found.work)
    numbers = sum(torch.Size(shape).numel() for shape, _ in found.trained.values())
    return settings.accumulate * micro + numbers * _optimizer_seconds(pace, settings), share


def _optimizer_seconds(pace: Pace, settings: TrainSettings) -> float:
    """Of a number that trains, in the optimizer's step and the clipping before it."""
    kind = ("optimizer", settings.optimizer, settings.clip_norm > 0)
    if kind not in pace.known:
        value = torch.nn.Parameter(torch.zeros(1000, SAMPLE // 1000))
        group = type("Group", (), {"parameters": {"value": value}, "rate": 1.0, "weight_decay": None})
        optimizer = engine.make_optimizer([group], settings.model_copy(update={"step_in_backward": False}))
        best = float("inf")
        for _ in range(3):  # the first makes the state
            value.grad = torch.ones_like(value)
            started = time.perf_counter()
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_([value], settings.clip_norm, foreach=True)
            optimizer.step()
            best = min(best, time.perf_counter() - started)
        pace.known[kind] = best / SAMPLE
    return pace.known[kind]


def taken(settings: TrainSettings, skeleton: Base, budget: float) -> float:
    """Seconds per step of real steps with random weights, for so many seconds."""
    base, method = copy_of(skeleton), methods.get(settings.METHOD)(settings)
    base.device, base.recall = torch.device("cpu"), lambda *names: []
    with torch.random.fork_rng(devices=[]):
        for part in base.modules().values():
            part.to_empty(device="cpu")
            for value in [*part.parameters(), *part.buffers()]:
                if value.is_floating_point():
                    torch.nn.init.normal_(value, 0.0, 0.02)
                else:
                    value.zero_()
        base.freeze()
        groups = method.attach(base)
        base.freeze()
        values = [value.requires_grad_(True) for group in groups for value in group.parameters.values()]
        engine.speed_up(base.unet, settings)
        optimizer = engine.make_optimizer(groups, settings)
        return _steps(settings, base, method, values, optimizer, budget)


def _steps(settings: TrainSettings, base: Base, method: Any, values: list[Tensor], optimizer: Any, budget: float) -> float:
    """Least seconds of a step after the first."""
    rows, best, begun, turn = settings.batch_size * (2 if settings.prior == "images" else 1), float("inf"), time.perf_counter(), 0
    for part in method.training_modules(base):
        part.train()
    while turn < 3 or time.perf_counter() - begun < budget:
        started = time.perf_counter()
        for _ in range(settings.accumulate):
            pred, noisy, timesteps = forward(method, base, settings, rows)
            extra = method.regularizer(base, torch.nan_to_num(noisy), timesteps, settings.batch_size)
            (pred.pow(2).mean() + (0.0 if extra is None else extra)).backward()
        if settings.clip_norm and not settings.step_in_backward:
            torch.nn.utils.clip_grad_norm_(values, settings.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(base)
        turn, best = turn + 1, min(best, time.perf_counter() - started) if turn else best
        if turn >= 3 and time.perf_counter() - begun > 3 * budget:
            break
    return best


def class_seconds(pace: Pace, found: Rehearsal, settings: TrainSettings) -> float:
    """Of rendering the class pictures: every sampler step asks the network twice for a picture. Decoding is not counted."""
    forward_seconds, _ = pace.seconds(found.forward)
    rows = settings.batch_size * (2 if settings.prior == "images" else 1)
    asked = 2 if settings.class_guidance > 1 else 1
    return forward_seconds / rows * asked * settings.class_steps * settings.class_images
