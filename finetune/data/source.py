"""What the loop asks for pictures: one micro-batch at a time, and a fixed set for the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.intake import Intake
from finetune.data.latents import Latents
from finetune.data.picture import Picture
from finetune.data.rows import Row, Rows
from finetune.settings import TrainSettings

# Rows of the validation set: enough timesteps for a steady curve, little enough to cost about a tenth of training.
VALIDATION_ROWS = 16


@dataclass
class MicroBatch:
    """One forward pass.

    Args:
        latents: (B, C, h, w) scaled, float32, on the training device.
        captions: B prompts.
        weights: (B,) float32, factor of each row's loss.
        instances: number of instance rows, which come first.
        names: file of each row, for messages.
        keys: (kind, n) of each row; noise and timestep are drawn by them.
    """

    latents: Tensor
    captions: list[str]
    weights: Tensor
    instances: int
    names: list[str]
    keys: list[tuple[str, int]]


class Source:
    """Instance and class pictures as weighted rows of latents. Built by `source`."""

    def __init__(self, settings: TrainSettings, instance: Sequence[Picture], classes: Sequence[Picture],
                 vae: torch.nn.Module, captions: Sequence[Sequence[str]], class_prompt: str, device: str | torch.device,
                 cache: Path | None = None):
        self.settings, self.device = settings, torch.device(device)
        self.pictures = {"instance": instance, "class": classes}
        self.rows = Rows(instance, classes, settings, captions, class_prompt)
        self.latents = {kind: Latents(vae, pictures, settings, device, cache) for kind, pictures in self.pictures.items()}

    def captions(self) -> list[str]:
        """Every prompt that a row may have."""
        found = [caption for candidates in self.rows.captions for caption in candidates]
        found += [self.rows.class_prompt] if self.pictures["class"] else []
        return list(dict.fromkeys([*found, *([""] if self.settings.caption_dropout else [])]))

    def fill(self, steps: int, world: int = 1, progress: Callable[[int, int], None] | None = None) -> bool:
        """Encode every picture that rows of so many steps or the fixed set will ask for, so that the VAE is not needed any more.

        Returns False where it will be: random crops are encoded anew for every row.
        """
        if self.settings.crop == "random":
            return False
        count = steps * self.settings.accumulate * self.settings.batch_size * world
        wanted: dict[tuple[str, int, bool], Row] = {}
        for kind, pictures in self.pictures.items():
            most = len(wanted) + len(pictures) * (2 if self.settings.flip else 1)
            for n in range(count if pictures else 0):
                row = self.rows.row(kind, n)
                wanted.setdefault((kind, row.picture, row.flip), row)
                if len(wanted) == most:
                    break
        for picture in range(min(VALIDATION_ROWS, len(self.pictures["instance"]))):
            wanted.setdefault(("instance", picture, False), Row(picture, False, (0.5, 0.5), "", 1.0, "instance", 0))
        for done, row in enumerate(wanted.values(), 1):
            self.latents[row.kind].moments(row)
            if progress:
                progress(done, len(wanted))
        return True

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> MicroBatch:
        """The micro-batch of one process at one step; a pure function of its arguments and the settings."""
        rows = self.rows.rows(step, micro, rank, world)
        kinds = [[row for row in rows if row.kind == kind] for kind in ("instance", "class")]
        latents = torch.cat([self.latents[group[0].kind].sample(group, self.settings.seed) for group in kinds if group])
        return self._micro_batch(rows, latents, [(row.kind, row.index) for row in rows])

    def validation(self) -> list[MicroBatch]:
        """A fixed set of instance rows, the same at every call and for every method but for the captions.

        `VALIDATION_ROWS` rows in turns over the pictures (over the first so many of a larger set): posterior mean,
        no flip, centre crop, first candidate caption, weight 1; keys are ("validation", i).
        """
        first_captions = [candidates[0] for candidates in self.rows.captions]
        count = len(first_captions)
        rows = [Row(i % count, False, (0.5, 0.5), first_captions[i % count], 1.0, "instance", i) for i in range(VALIDATION_ROWS)]
        batch = self.settings.batch_size
        return [self._micro_batch(part, torch.stack([self.latents["instance"].fixed(row.picture) for row in part]),
                                  [("validation", row.index) for row in part])
                for part in (rows[start:start + batch] for start in range(0, len(rows), batch))]

    def _micro_batch(self, rows: list[Row], latents: Tensor, keys: list[tuple[str, int]]) -> MicroBatch:
        return MicroBatch(
            latents=latents, captions=[row.caption for row in rows],
            weights=torch.tensor([row.weight for row in rows], dtype=torch.float32).to(self.device, non_blocking=True),
            instances=sum(row.kind == "instance" for row in rows),
            names=[self.pictures[row.kind][row.picture].file for row in rows], keys=keys)


def source(settings: TrainSettings, intake: Intake, class_pictures: Sequence[Picture], vae: torch.nn.Module,
           captions: Sequence[Sequence[str]], class_prompt: str = "", device: str | torch.device = "cpu", cache: Path | None = None) -> Source:
    """Join what the intake found, the class pictures and the VAE into what the loop reads.

    Args:
        class_pictures: empty for training without class images.
        captions: candidates per picture of the intake, see `finetune.data.caption_candidates`.
        cache: folder for encoded pictures, see `finetune.data.latents.cache_folder`.
    """
    return Source(settings, intake.pictures, class_pictures, vae, captions, class_prompt, device, cache)
