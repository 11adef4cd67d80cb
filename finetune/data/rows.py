"""Which picture, caption, flip and crop each row of each micro-batch gets: pure functions of the seed and the place.

Rows are counted once for the whole run: row n = ((step * accumulate + micro) * world + rank) * batch + i. Everything
about a row follows from (seed, stream, kind, n), so one process with batch 4 and two with batch 2 train on the same
rows, a resumed run needs no state, and instance rows do not change when class rows join them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune import draws
from finetune.data.picture import Picture
from finetune.settings import TrainSettings

Kind = Literal["instance", "class"]


@dataclass(frozen=True)
class Row:
    """One training example before it becomes tensors.

    Args:
        picture: index into the pictures of its kind.
        flip: mirrored left to right.
        place: (u, v) of the random crop, see `finetune.data.fit`.
        caption: the prompt, "" when dropped.
        weight: factor of the row's loss: 1, or the prior weight lambda for class rows.
        kind: "instance" or "class".
        index: n, the row's number in the whole run; with `kind` it keys every further draw.
    """

    picture: int
    flip: bool
    place: tuple[float, float]
    caption: str
    weight: float
    kind: Kind
    index: int


class Rows:
    """The endless list of rows of a run.

    Args:
        instance: the subject's pictures, at least one.
        classes: class pictures for prior preservation (Ruiz et al. 2023, sec. 3.2), or none.
        settings: reads seed, batch_size, accumulate, flip, caption_dropout and prior_weight.
        captions: candidates per instance picture, at least one each.
        class_prompt: caption of every class row.
    """

    def __init__(self, instance: Sequence[Picture], classes: Sequence[Picture], settings: TrainSettings,
                 captions: Sequence[Sequence[str]], class_prompt: str = ""):
        if len(captions) != len(instance) or not all(captions):
            raise ValueError(f"{len(instance)} instance pictures need as many non-empty lists of captions, not {len(captions)}")
        self.counts: dict[Kind, int] = {"instance": len(instance), "class": len(classes)}
        self.settings, self.captions, self.class_prompt = settings, captions, class_prompt

    def rows(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> list[Row]:
        """Rows of one micro-batch of one process: `batch_size` instance rows, then as many class rows if there are any.

        Args:
            step: optimizer step from 0.
            micro: micro-batch within the step, 0 .. accumulate - 1.
            rank, world: this process and the number of processes.
        """
        batch = self.settings.batch_size
        first = ((step * self.settings.accumulate + micro) * world + rank) * batch
        kinds: list[Kind] = ["instance", "class"] if self.counts["class"] else ["instance"]
        return [self.row(kind, first + i) for kind in kinds for i in range(batch)]

    def row(self, kind: Kind, n: int) -> Row:
        """Row n of a kind."""
        seed, settings, count = self.settings.seed, self.settings, self.counts[kind]
        picture = _epoch_order(count, seed, "order" if kind == "instance" else "class-order", n // count)[n % count]
        flip = settings.flip and draws.uniform(1, seed, "flip", kind, n)[0] < 0.5
        u, v = draws.uniform(2, seed, "crop", kind, n) if settings.crop == "random" else (0.5, 0.5)
        dropped = settings.caption_dropout > 0 and draws.uniform(1, seed, "caption-dropout", kind, n)[0] < settings.caption_dropout
        caption = "" if dropped else self._caption(kind, picture, n)
        return Row(picture, flip, (u, v), caption, 1.0 if kind == "instance" else settings.prior_weight, kind, n)

    def _caption(self, kind: Kind, picture: int, n: int) -> str:
        if kind == "class":
            return self.class_prompt
        candidates = self.captions[picture]
        return candidates[int(draws.integers(0, len(candidates), 1, self.settings.seed, "caption", kind, n))]


@functools.lru_cache(maxsize=8)
def _epoch_order(count: int, seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    return tuple(draws.order(count, seed, stream, epoch))
