"""Memory that ran out, told as what to change next: three settings in order of effect, with what each saves.

The savings of a training run come from its plan (`finetune.plan`): its settings rehearsed without memory, as they are and with
gradient checkpointing. What the rest saves follows from the plan's parts: activations go with the rows and the area of the pictures.
"""

from __future__ import annotations

import contextlib
import gc
import re
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from finetune.cli.verbs import Verb
from finetune.errors import Problem, out_of_memory

WORTH = 0.01  # of the whole: what saves less is not named
MOST = 3


@dataclass(frozen=True)
class Saving:
    """A setting to change.

    Args:
        flags: as typed.
        saves: bytes.
    """

    flags: str
    saves: float


@dataclass(frozen=True)
class Guarded(Verb):
    """A verb whose memory errors become a refusal."""

    def load(self) -> tuple[type, Callable[..., Any]]:
        tree, body = super().load()

        def run(settings: Any, console: Any) -> Any:
            try:
                return body(settings, console)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled memory
                raise problem(settings, error) from error

        return tree, run


def guarded(verb: Verb) -> Verb:
    """The same verb, its memory errors told as refusals."""
    return Guarded(*astuple(verb))


def problem(settings: Any, error: BaseException) -> Problem:
    """What to say of a memory error under these settings."""
    gc.collect()
    what = f"Memory ran out{_asked(error)}."
    with contextlib.suppress(Exception):  # advice may fail; that memory ran out must be said
        if getattr(settings, "METHOD", ""):
            why, found = training(settings)
            return Problem(what, why, told(found))
        if hasattr(settings, "guidance") and hasattr(settings, "batch"):
            why, found = rendering(settings)
            return Problem(what, why, told(found))
    return Problem(what, "Other programs may hold most of it.", "Close some, or run it on a machine with more; `finetune plan` says what a run takes.")


def told(found: list[Saving]) -> str:
    """The three that save most, in order."""
    best = sorted(found, key=lambda saving: -saving.saves)[:MOST]
    return ("Change next, in order of effect: " + "; ".join(f"{saving.flags} (saves about {_size(saving.saves)})" for saving in best) + "."
            if best else "Nothing is left to save here: use a smaller base, or a machine with more memory.")


def training(settings: Any) -> tuple[str, list[Saving]]:
    """Why, and what each setting saves, of a training run."""
    from finetune.model.base import pick_device
    from finetune.plan import process
    from finetune.plan.estimate import predict
    from finetune.plan.skeleton import skeleton

    settings = settings.model_copy(update={"memory": _rung(settings)})
    base, device = skeleton(settings.model), pick_device(settings.device).type
    now = predict(settings, base, device=device)
    why = f"Planned were about {_size(now.peak)}, most of them in this moment: {now.moment}. {_size(process.free())} of the machine's memory are free now."
    found = _of_parts(settings, now)
    if not settings.gradient_checkpointing:
        less = predict(settings.model_copy(update={"gradient_checkpointing": True}), base, device=device)
        found.append(Saving("--gradient-checkpointing", now.activations - less.activations))
    return why, [saving for saving in found if saving.saves > WORTH * now.peak]


def _of_parts(settings: Any, now: Any) -> list[Saving]:
    """What follows from the parts of a plan."""
    from finetune import engine, methods
    from finetune.engine import quantizer

    whole, found = methods.get(settings.METHOD).replaces, []
    if (rows := settings.batch_size) > 1:
        found.append(Saving(f"--batch-size 1 --accumulate {settings.accumulate * rows}", now.activations * (1 - 1 / rows)))
    if (smaller := int(settings.resolution * 0.75) // 64 * 64) >= 64:
        found.append(Saving(f"--resolution {smaller}", now.activations * (1 - (smaller / settings.resolution) ** 2)))
    if not whole and engine.format_of(settings) == "fp32":
        found.append(Saving("--frozen bf16", now.weights / 2))
    if settings.optimizer == "adamw" and quantizer.available():
        found.append(Saving("--optimizer adamw8bit", now.optimizer * 0.75))
    if getattr(settings, "ema_decay", 0):
        found.append(Saving("--ema-decay 0", now.trained))
    return found


def _rung(settings: Any) -> str:
    """Where on the memory ladder the run stood."""
    from finetune import runs

    if settings.memory != "auto":
        return settings.memory
    with contextlib.suppress(Exception):
        return runs.read_json(settings.output / "settings.json").get("rung", "fast")
    return "fast"


def rendering(settings: Any) -> tuple[str, list[Saving]]:
    """Why, and what each setting saves, of `finetune generate`: weights by their headers; a picture's share by its area.

    Of the pictures only latents, text states and the decoder's widest layer are counted, which is less than they take.
    """
    from finetune.plan.skeleton import skeleton

    base = skeleton(settings.model)
    numbers = sum(value.numel() for part in base.modules().values() for value in part.parameters())
    side = base.resolution if settings.size is None else max(int(number) for number in re.findall(r"\d+", settings.size))
    one = side * side * base.vae.config.block_out_channels[0] * 3 * (4 if settings.precision == "fp32" else 2)  # a layer's input, output and sum
    found = [Saving("--precision bf16", numbers * 2)] if settings.precision == "fp32" else []
    found += [Saving("--batch 1", one * (settings.batch - 1))] if settings.batch > 1 else []
    if (smaller := int(side * 0.75) // 64 * 64) >= 64:
        found.append(Saving(f"--size {smaller}", one * settings.batch * (1 - (smaller / side) ** 2)))
    return f"The weights take {_size(numbers * (4 if settings.precision == 'fp32' else 2))}, {settings.batch} picture(s) of {side} pixels the rest.", found


def _asked(error: BaseException) -> str:
    """What the allocator said was asked for, in our words."""
    of_cpu = re.search(r"tried to allocate (\d+) bytes", str(error))
    of_gpu = re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB)", str(error))
    return f": another {_size(int(of_cpu[1]))} were asked for" if of_cpu else f" on the GPU: another {of_gpu[1]} were asked for" if of_gpu else ""


def _size(count: float) -> str:
    """Bytes in the unit people think in."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
