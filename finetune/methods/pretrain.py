"""Pretraining: everything in the UNet trains from nothing. The fifth strategy, by which the embedded base is made.

Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, NeurIPS 2020 (2006.11239), in the latent space of Rombach et
al. 2022 (2112.10752), with an exponential moving average of the weights.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.errors import Problem
from finetune.methods.base import Group, Loaded, Method
from finetune.methods.ema import Ema
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import encode
from finetune.settings import TrainSettings, setting


class Settings(TrainSettings):
    """Pretraining's own settings and defaults."""

    METHOD: ClassVar[str] = "pretrain"

    learning_rate: float = setting(6e-4, "peak learning rate", gt=0)
    batch_size: int = setting(16, "pictures per step", unit="pictures", ge=1)
    caption_dropout: float = setting(0.1, "share of rows with an empty prompt, for classifier-free guidance", unit="share", group="prompts", ge=0, le=1)
    beta2: float = setting(0.99, "AdamW: memory of the gradient square", ge=0, lt=1)
    snr_gamma: float = setting(5.0, "min-SNR weighting of rows; 5 is usual, 0 is off", ge=0)
    ema_decay: float = setting(0.999, "decay of the exported moving average", group="method", ge=0, lt=1)


class Pretrain(Method):
    """The whole UNet from random weights; text encoder and autoencoder are frozen."""

    name = "pretrain"
    title = "Pretraining"
    paper = "Ho et al. 2020, arXiv 2006.11239"
    Settings = Settings

    @property
    def subject(self) -> str:
        """Pretraining teaches no subject."""
        return ""

    def attach(self, base: Base) -> list[Group]:
        parameters = dict(base.unet.named_parameters())
        self._ema = Ema(parameters, self.settings.ema_decay)
        return [Group(parameters)]

    @torch.no_grad()
    def condition(self, base: Base, captions: list[str]) -> Cond:
        """Encoded anew each time: a cache of hundreds of thousands of captions would not fit."""
        return encode(base, captions)

    def after_step(self, base: Base) -> None:
        self._ema.update()

    def exported(self) -> contextlib.AbstractContextManager[None]:
        return self._ema.applied()

    def extra_state(self) -> dict[str, Tensor]:
        return self._ema.state()

    def expected_bytes(self, base: Base) -> int:
        return sum(value.numel() for value in base.unet.parameters()) * 2

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """The UNet as a diffusers component folder, averaged weights, float32."""
        with self.exported():
            base.unet.save_pretrained(folder / "unet", safe_serialization=True)

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Pretraining leaves a base, not an artifact."""
        return None

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        raise Problem(f"{path} is a base model, not an artifact.", "Pretraining leaves a whole model.", "Name its folder with --model.")
