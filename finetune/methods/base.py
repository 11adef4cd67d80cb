"""The questions a method answers. The loop asks them; most have a default answer.

B rows, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import encode_cached
from finetune.settings import TrainSettings


@dataclass
class Group:
    """Trainable tensors with one learning rate and decay; names are unique and stable (checkpoints use them)."""

    parameters: dict[str, nn.Parameter]
    rate: float = 1.0
    weight_decay: float | None = None


class Strength(float):
    """How much of an artifact is applied. As a number it is the UNet's share, which is all most methods have.

    Args:
        unet: share on the UNet; 0 is the base to the bit, 1 the artifact.
        text: share on the text encoders, of LoRA and DreamBooth; None takes the UNet's.
        rank: of a LoRA, keep only the first `rank` inner dimensions and leave its scale alpha / rank as it was; None keeps all.
    """

    text: float
    rank: int | None

    def __new__(cls, unet: float = 1.0, text: float | None = None, rank: int | None = None) -> Strength:
        found = super().__new__(cls, unet)
        found.text, found.rank = float(unet if text is None else text), rank
        return found

    @classmethod
    def of(cls, value: float) -> Strength:
        """A plain number as a share of everything."""
        return value if isinstance(value, cls) else cls(value)

    def on(self, part: str) -> float:
        """The share on a network, named as in `Base.modules`."""
        return float(self) if part == "unet" else self.text


@dataclass(frozen=True)
class Loaded:
    """What `load_artifact` put onto a base."""

    method: str
    trigger: str | None
    path: Path
    metadata: dict[str, str] = field(default_factory=dict)


class Method(ABC):
    """One way to teach a model. Subclasses live one to a file and know neither the loop nor one another."""

    replaces: ClassVar[bool] = False  # whether an artifact is a whole network and must be loaded before those that add to one

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[TrainSettings]]

    def __init__(self, settings: TrainSettings):
        self.settings: Any = settings

    # -- declared data -------------------------------------------------------------------------------------------------

    @property
    def noun(self) -> str:
        """The plain word for the subject.

        Raises:
            Problem: no --class-noun where one is needed.
        """
        if not self.settings.class_noun:
            raise Problem("No class noun was given.", f"{self.title} needs the plain word for what the pictures show.",
                          "Add --class-noun dog (or backpack, watercolor, ...).")
        return self.settings.class_noun

    @property
    def subject(self) -> str:
        """The phrase that names the subject in prompts: a rare token and the noun (Ruiz et al. 2023, sec. 3.2)."""
        return self.settings.subject or f"sks {self.noun}"

    @property
    def trigger(self) -> str:
        """What a prompt must contain for the artifact to act."""
        return self.subject

    def templates(self) -> list[str]:
        """Prompts to draw from for a picture without a caption; {} stands for the subject phrase."""
        return [self.settings.instance_prompt or "a photo of a {}"]

    def check(self) -> None:
        """Look at the settings alone, before anything is read, rendered or written.

        Raises:
            Problem: they cannot work.
        """
        _ = self.subject  # refuses a missing class noun

    def facts(self) -> list[tuple[str, str]]:
        """Label and text of what is worth saying of this method's settings before the first step."""
        return []

    # -- training ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, base: Base) -> list[Group]:
        """Change the model, once, and return what to train. Must leave the model's output as it was."""

    def condition(self, base: Base, captions: list[str]) -> Cond:
        """Captions to text states."""
        return encode_cached(base, captions)

    def denoise(self, base: Base, noisy: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        """The network's word on noisy latents (B, C, H, W); timesteps (B,) lie on the CPU, where they were drawn."""
        return base.ask(noisy, timesteps, cond)

    @contextlib.contextmanager
    def detached(self, base: Base) -> Iterator[Any]:
        """The frozen base, without the method, as a callable like `denoise`, while the context lasts."""
        raise Problem(f"--prior distill is not available for {self.title}.", "It has no way to ask the untouched base.", "Use --prior images.")
        yield

    def regularizer(self, base: Base, noisy: Tensor, timesteps: Tensor, instances: int) -> Tensor | None:
        """An extra scalar loss. Default: with --prior distill, stay near the base's own word on class prompts.

        The noisy latents of the instance rows are asked about with the class prompt; the frozen base's answer is the
        target (knowledge distillation as in Learning without Forgetting, Li & Hoiem 2016). No class pictures needed.
        """
        if self.settings.prior != "distill":
            return None
        captions = [self.class_prompt] * instances
        with torch.no_grad(), self.detached(base) as teacher:
            wanted = teacher(base, noisy[:instances], timesteps[:instances], self.condition(base, captions))
        pred = self.denoise(base, noisy[:instances], timesteps[:instances], self.condition(base, captions))
        return self.settings.prior_weight * (pred.float() - wanted.float()).pow(2).mean()

    @property
    def class_prompt(self) -> str:
        """The prompt of class pictures."""
        return self.settings.class_prompt or f"a photo of a {self.noun}"

    def after_step(self, base: Base) -> None:
        """Touch-ups after the optimizer's step."""

    def training_modules(self, base: Base) -> list[nn.Module]:
        """Modules to put into training mode (their dropout is then active)."""
        return [base.unet]

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """Inside the context the model is what `export` writes (an average of the weights, say)."""
        return contextlib.nullcontext()

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beyond the trainables that a checkpoint must hold (an EMA, say), live."""
        return {}

    # -- artifacts -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """Write the community's files into `folder`."""

    @abstractmethod
    def expected_bytes(self, base: Base) -> int:
        """Bytes `export` will write, to be printed before the first step (weights; headers are not counted)."""

    def targets(self) -> tuple[str, ...]:
        """What --export may name for this method as it is set: targets whose files `export` writes anyway, or adds when asked."""
        return ()

    def added_files(self, base: Base, metadata: dict[str, str]) -> dict[str, int]:
        """File name -> exact bytes of what --export adds to the usual files."""
        return {}

    @classmethod
    @abstractmethod
    def find(cls, path: Path) -> Path | None:
        """The file or folder at or in `path` that `load` reads, or None when this is not the method's artifact."""

    @classmethod
    @abstractmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Put an artifact onto a fresh base; `strength` may be a `Strength` that tells the networks apart."""

    @property
    def stem(self) -> str:
        """File stem of the artifact: letters, digits, dot, dash and underscore only."""
        plain = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in self.subject)
        return plain.strip("-.") or self.name


def files_of(path: Path) -> list[Path]:
    """`path` itself if it is a file, else the files directly in it, sorted."""
    return [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))


def bytes_per_number(settings: TrainSettings) -> int:
    """Of an exported weight."""
    return 2 if settings.export_dtype == "fp16" else 4


def export_dtype(settings: TrainSettings) -> torch.dtype:
    """torch's name for the export format."""
    return torch.float16 if settings.export_dtype == "fp16" else torch.float32
