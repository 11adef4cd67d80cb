"""AdamW in three forms: torch's fused one, bitsandbytes' with 8-bit state, and one that steps inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.engine import quantizer
from finetune.errors import Problem
from finetune.settings import TrainSettings


def make_optimizer(groups: Iterable[Any], settings: TrainSettings) -> Any:
    """The optimizer of a run: AdamW (Loshchilov & Hutter 2019) over the method's groups, with `peak` beside each group's rate.

    Raises:
        Problem: 8-bit state was asked for and bitsandbytes is not installed.
    """
    listed = [{"params": list(group.parameters.values()), "lr": settings.learning_rate * group.rate, "peak": settings.learning_rate * group.rate,
               "weight_decay": settings.weight_decay if group.weight_decay is None else group.weight_decay} for group in groups]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw8bit":
        make = _eight_bit()
        return InBackward(listed, make, betas=betas) if settings.step_in_backward else make(listed, betas=betas)
    if settings.step_in_backward:
        return InBackward(listed, torch.optim.AdamW, betas=betas, fused=True)
    return torch.optim.AdamW(listed, betas=betas, fused=True)


def _eight_bit() -> Any:
    """bitsandbytes' AdamW with block-wise 8-bit state (Dettmers et al. 2022)."""
    try:
        return quantizer.load("optim").AdamW8bit
    except ImportError:
        raise Problem("--optimizer adamw8bit needs the package bitsandbytes.", "It is not installed.", "pip install 'finetune[memory]'") from None


class InBackward:
    """Each tensor is stepped as soon as its gradient is there, and the gradient is freed: never more than one is held.

    The same steps as afterwards, to the bit; only a norm over all gradients cannot be had any more (Lv et al. 2023,
    2306.09782, train this way with SGD). One small optimizer for each tensor writes into one common state, so that state_dict
    and load_state_dict are those of the plain optimizer and a checkpoint of either continues as the other. The states are made
    all at once when the first gradient comes: made one by one they would settle where activations were, and those of the next
    step would need new room (1.0 GB more for 8-bit states of Stable Diffusion 1.5's UNet).

    Args:
        groups: as any torch optimizer takes them. make: class of the optimizer. more: its other arguments.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Any, **more: Any):
        self._whole = make(groups, **more)
        self._own: dict[Tensor, Any] = {}
        self._good: Tensor | None = None
        self._unreached: set[Tensor] = set()
        self._step_supports_amp_scaling = bool(getattr(self._whole, "_step_supports_amp_scaling", False))  # whether a look can wait
        for place, group in enumerate(self._whole.param_groups):
            rest = {key: value for key, value in group.items() if key != "params"}
            for value in group["params"]:
                self._own[value] = make([{**rest, "params": [value]}], **more)
                value.register_post_accumulate_grad_hook(self._hook(place))
        self._share()

    def _share(self) -> None:
        for own in self._own.values():
            own.state = self._whole.state

    def _hook(self, place: int) -> Any:
        def hook(value: Tensor) -> None:
            if not self._whole.state:
                self._make_states()
            self._unreached.discard(value)
            good, own = torch.isfinite(value.grad).all(), self._own[value]
            own.param_groups[0]["lr"] = self._whole.param_groups[place]["lr"]
            if getattr(own, "_step_supports_amp_scaling", False):  # torch's own: left out on the device, without waiting for it
                own.found_inf, own.grad_scale = (~good).float(), None
                own.step()
            elif good:
                own.step()
            self._good = good if self._good is None else self._good & good
            value.grad = None

        return hook

    def _make_states(self) -> None:
        """As the optimizers make them at their first step."""
        for value, own in self._own.items():
            if isinstance(own, torch.optim.AdamW):
                step = torch.zeros((), dtype=torch.float32, device=value.device)
                own.state[value] = {"step": step, "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            elif hasattr(own, "init_state"):  # bitsandbytes
                own.init_state(own.param_groups[0], value, 0, 0)
        self._unreached = set(self._whole.state)

    def trouble(self) -> Tensor:
        """0 when every gradient since the last call was finite, else nan. Tensors whose gradient was not are as they were."""
        good, self._good = self._good, None
        return torch.zeros(()) if good is None else torch.where(good, 0.0, float("nan"))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the whole; a rate set here counts for the next backward pass."""
        return self._whole.param_groups

    @property
    def state(self) -> Any:
        return self._whole.state

    def step(self) -> None:
        """Nothing is left to do after the backward pass, but for tensors that no gradient came to: they have no state."""
        for value in self._unreached:
            del self._whole.state[value]
        self._unreached = set()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Every gradient is gone already."""

    def state_dict(self) -> dict[str, Any]:
        """As of the plain optimizer."""
        return self._whole.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of the plain optimizer."""
        self._whole.load_state_dict(state)
        self._share()
