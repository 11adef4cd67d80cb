"""Norms: train only the scale and shift of the UNet's normalization layers.

Frankle, Schwab, Morcos: Training BatchNorm and Only BatchNorm, ICLR 2021 (2003.00152), show how far a frozen network gets
with these numbers alone. BitFit (Ben Zaken et al. 2022, 2106.10199) is the same thought for the biases of a transformer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.errors import Problem
from finetune.formats import header
from finetune.formats.tensors import load_tensors, save_tensors
from finetune.methods.base import Group, Loaded, Method, bytes_per_number, export_dtype, files_of
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.settings import TrainSettings, setting


class Settings(TrainSettings):
    """The method's own settings and defaults."""

    METHOD: ClassVar[str] = "norms"

    learning_rate: float = setting(1e-3, "peak learning rate", gt=0)
    shift: bool = setting(True, "train the shifts as well as the scales", group="method")


def norms_of(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Scale (weight) and shift (bias) of every group norm and layer norm, by their names in the UNet."""
    return {f"{name}.{part}": value for name, layer in unet.named_modules() if isinstance(layer, nn.GroupNorm | nn.LayerNorm)
            for part, value in layer.named_parameters(recurse=False)}


class Norms(Method):
    """The normalization layers train; every other tensor stays as it is."""

    name = "norms"
    title = "Norms"
    paper = "Frankle et al. 2021, arXiv 2003.00152"
    Settings = Settings

    def attach(self, base: Base) -> list[Group]:
        self._trained = {name: value for name, value in norms_of(base.unet).items() if self.settings.shift or name.endswith(".weight")}
        self._start = {name: value.detach().clone() for name, value in self._trained.items()}
        return [Group({f"unet.{name}": value for name, value in self._trained.items()})]

    @contextlib.contextmanager
    def detached(self, base: Base) -> Iterator[Any]:
        """The base with its own norms, for --prior distill; nothing is overwritten, for a graph may need the trained ones."""
        def teacher(base: Base, noisy: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
            return functional_call(base.unet, self._start, (), base.question(noisy, timesteps, cond)).sample

        yield teacher

    def expected_bytes(self, base: Base) -> int:
        return sum(value.numel() for value in self._trained.values()) * bytes_per_number(self.settings)

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """NAME.safetensors: the tensors under their names in the UNet. No other program reads it."""
        tensors = {f"unet.{name}": value.detach().to("cpu", export_dtype(self.settings)) for name, value in self._trained.items()}
        save_tensors(folder / f"{self.stem}.safetensors", tensors, {**metadata, "format": "pt", "finetune.format": "norms"})

    @classmethod
    def find(cls, path: Path) -> Path | None:
        return next((file for file in files_of(path) if file.suffix == ".safetensors"
                     and header.read_header(file).metadata.get("finetune.format") == "norms"), None)

    @classmethod
    @torch.no_grad()
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Put the norms in place: strength 0 is the base, 1 the trained ones, between them a straight line."""
        tensors, metadata = load_tensors(path)
        places = {f"unet.{name}": value for name, value in norms_of(base.unet).items()}
        strange = [name for name, value in tensors.items() if name not in places or places[name].shape != value.shape]
        if strange:
            raise Problem(f"{path} does not fit the model {base.name!r}.", f"Its tensor {strange[0]} is not there or has another width.",
                          "Load it on a base of the family it was trained from.")
        for name, value in tensors.items():
            here, new = places[name], value.to(places[name])
            here.copy_(new if strength == 1 else here + strength * (new - here))
        return Loaded(cls.name, metadata.get("finetune.trigger"), path, metadata)
