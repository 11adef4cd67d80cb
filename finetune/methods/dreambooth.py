"""DreamBooth: fine-tune the whole UNet, with prior preservation.

Ruiz, Li, Jampani, Pritch, Rubinstein, Aberman: DreamBooth: Fine Tuning Text-to-Image Diffusion Models for
Subject-Driven Generation, CVPR 2023 (2208.12242). A rare token and the class noun name the subject; pictures the
untouched model renders for the class noun are trained on beside it (eq. 2) so that the class does not become the subject.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.formats import ldm, pipeline
from finetune.formats.stream import DTYPE_NAMES
from finetune.methods.base import Group, Loaded, Method, Strength, bytes_per_number, export_dtype
from finetune.methods.ema import Ema
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import encode, encode_cached
from finetune.runs import read_json, write_json
from finetune.settings import TrainSettings, setting


class Settings(TrainSettings):
    """DreamBooth's own settings and defaults (diffusers' and kohya's practice for SD 1.5)."""

    METHOD: ClassVar[str] = "dreambooth"

    learning_rate: float = setting(2e-6, "peak learning rate", gt=0)
    weight_decay: float = setting(1e-2, "AdamW decay of the trained tensors", ge=0)
    prior: Literal["images", "distill", "none"] = setting(
        "images", "prior preservation: class pictures rendered by the base, its predictions on class prompts, or nothing", group="prior")
    train_text_encoder: bool = setting(False, "train the text encoder as well (both of SDXL): closer likeness, more memory", group="method")
    text_encoder_rate: float = setting(1.0, "learning rate of the text encoder as a multiple of the UNet's", group="method", gt=0)
    ema_decay: float = setting(0.0, "export an exponential moving average of the weights; .999 is usual, 0 is off", group="method", ge=0, lt=1)


class DreamBooth(Method):
    """The whole UNet trains; optionally the text encoder."""

    replaces = True
    save_weights = staticmethod(pipeline.save_weights)  # a plan weighs the files instead of writing them

    name = "dreambooth"
    title = "DreamBooth"
    paper = "Ruiz et al. 2023, arXiv 2208.12242"
    Settings = Settings

    def attach(self, base: Base) -> list[Group]:
        self._teacher = copy.deepcopy(base.unet).requires_grad_(False) if self.settings.prior == "distill" else None
        self._class_states: Cond | None = None
        if self.settings.prior == "distill":
            self._class_states = encode_cached(base, [self.class_prompt]).clone()
        groups = [Group({f"unet.{name}": value for name, value in base.unet.named_parameters()})]
        if self.settings.train_text_encoder:
            text = {f"{part}.{name}": value for part, encoder, _ in base.encoders() for name, value in encoder.named_parameters()}
            groups.append(Group(text, rate=self.settings.text_encoder_rate))
        every = {name: value for group in groups for name, value in group.parameters.items()}
        self._ema = Ema(every, self.settings.ema_decay) if self.settings.ema_decay else None
        return groups

    def condition(self, base: Base, captions: list[str]) -> Cond:
        return encode(base, captions) if self.settings.train_text_encoder else encode_cached(base, captions)

    def training_modules(self, base: Base) -> list[nn.Module]:
        return [base.unet, *(encoder for _, encoder, _ in base.encoders() if self.settings.train_text_encoder)]

    @contextlib.contextmanager
    def detached(self, base: Base) -> Iterator[Any]:
        def teacher(base: Base, noisy: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
            return self._teacher(**base.question(noisy, timesteps, self._class_states.expand(len(noisy)))).sample

        yield teacher

    def after_step(self, base: Base) -> None:
        if self._ema:
            self._ema.update()

    def exported(self) -> contextlib.AbstractContextManager[None]:
        return self._ema.applied() if self._ema else contextlib.nullcontext()

    def extra_state(self) -> dict[str, Tensor]:
        return self._ema.state() if self._ema else {}

    def expected_bytes(self, base: Base) -> int:
        count = sum(value.numel() for part in base.modules().values() for value in part.parameters())
        return count * bytes_per_number(self.settings) * (2 if self._single else 1)

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """A diffusers pipeline folder any tool of the field opens, plus finetune.json with the metadata."""
        with self.exported():
            pipeline.write(base.pipeline(), base.modules(), folder, DTYPE_NAMES[export_dtype(self.settings)], base.recalled, self.save_weights)
        write_json(folder / "finetune.json", metadata)
        if self._single:
            ldm.write(folder / f"{self.stem}.safetensors", ldm.of_folder(folder), metadata, None, ldm.original_text(base.location.path))

    @property
    def _single(self) -> bool:
        """Whether one file with the whole model was asked for; the web UIs and kohya's scripts read nothing else."""
        return bool({"single-file", "webui", "kohya"} & set(self.settings.export))

    def targets(self) -> tuple[str, ...]:
        return ("diffusers", "webui", "kohya", "single-file")

    def added_files(self, base: Base, metadata: dict[str, str]) -> dict[str, int]:
        if not self._single:
            return {}
        live, kind = ldm.of_modules(base.modules(), base.scheduler_config), "F16" if self.settings.export_dtype == "fp16" else "F32"
        return {f"{self.stem}.safetensors": ldm.expected_bytes(live, kind, self.stem, metadata, ldm.original_text(base.location.path))}

    @classmethod
    def find(cls, path: Path) -> Path | None:
        return path if path.is_dir() and (path / "unet" / "config.json").is_file() else None

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Replace UNet (and text encoders, where they differ) by the folder's, interpolated at `strength`."""
        strength = Strength.of(strength)
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(path / "unet", torch_dtype=torch.float32, local_files_only=True)
        _blend(base.unet, unet, strength.on("unet"), path)
        for part, encoder, _ in base.encoders():
            if (path / part / "config.json").is_file():
                text = type(encoder).from_pretrained(path / part, dtype=torch.float32, local_files_only=True)
                _blend(encoder, text, strength.on(part), path)
        base.states.clear()
        told = read_json(path / "finetune.json") if (path / "finetune.json").is_file() else {}
        return Loaded(cls.name, told.get("finetune.trigger"), path, told)


@torch.no_grad()
def _blend(module: nn.Module, other: nn.Module, strength: float, path: Path) -> None:
    """module = module + strength (other - module), tensor by tensor; at 0 nothing is touched, not even the sign of a zero.

    Raises:
        Problem: the two are not of one architecture.
    """
    mine, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    strange = [name for name in mine.keys() | theirs.keys()
               if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape]
    if strange:
        raise Problem(f"{path} does not fit this base model.", f"{len(strange)} tensors differ in name or shape, such as {min(strange)}.",
                      "Load it on a base of the family it was trained from.")
    for name, value in mine.items() if strength else ():
        new = theirs[name].to(value.device, value.dtype)
        value.copy_(new if strength == 1 else value + strength * (new - value))
