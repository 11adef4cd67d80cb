"""Bytes on disk: the artifact by writing it hollow, checkpoints by their layout, and what a run leaves altogether."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from finetune import methods
from finetune.formats import stream
from finetune.formats.header import expected_safetensors_bytes
from finetune.model.base import Base
from finetune.model.text import token_ids
from finetune.plan.rehearsal import Rehearsal, Shapes
from finetune.plan.skeleton import copy_of
from finetune.settings import TrainSettings

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8"}
LARGEST_WRITTEN = 2 * 10**9  # bytes of trainables up to which an artifact is written to be weighed


def artifact_bytes(settings: TrainSettings, skeleton: Base, metadata: dict[str, str]) -> int:
    """Exact bytes of what training will export, artifact.json not counted (as a run's manifest counts).

    The method's own export runs in a temporary folder. Adapters are written with zeros in them. Of whole networks only the
    small files are written, and their weights' files are computed.

    Args:
        metadata: what every file of the artifact carries; its length counts.
    """
    base, method = copy_of(skeleton), methods.get(settings.METHOD)(settings.model_copy(update={"export": [], "ema_decay": 0.0} if _whole(settings) else {}))
    weighed: list[int] = []
    if method.replaces:
        method.save_weights = lambda path, entries, metadata: weighed.append(stream.expected_bytes(entries, metadata))
    else:
        hollow(base)
    base.recall = lambda *names: []
    base.freeze()
    groups = method.attach(base)
    if not method.replaces and 4 * sum(value.numel() for group in groups for value in group.parameters.values()) > LARGEST_WRITTEN:
        return method.expected_bytes(base)
    for _, _, tokenizer in base.encoders():
        token_ids(base, [""], tokenizer)  # one that has been used says how in its file
    with tempfile.TemporaryDirectory() as folder:
        method.export(base, Path(folder), metadata)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    method.settings = settings
    return written + sum(weighed) + sum(method.added_files(base, metadata).values() if method.replaces else ())


def _whole(settings: TrainSettings) -> bool:
    return methods.get(settings.METHOD).replaces


def hollow(base: Base) -> None:
    """Give a base of its own (see `copy_of`) real tensors on the CPU that hold one number each: 1, as often as the shape asks."""
    base.device = torch.device("cpu")
    for part in base.modules().values():
        for module in part.modules():
            for names in (module._parameters, module._buffers):
                for leaf, value in names.items():
                    if value is not None:
                        one = torch.ones((), dtype=value.dtype).expand(value.shape)
                        names[leaf] = nn.Parameter(one, requires_grad=False) if isinstance(value, nn.Parameter) else one


def file_bytes(shapes: Shapes, metadata: dict[str, str] | None) -> int:
    """Exact size of a safetensors file."""
    return expected_safetensors_bytes({name: shape for name, (shape, _) in shapes.items()},
                                      {name: NAMES[dtype] for name, (_, dtype) in shapes.items()}, metadata)


def checkpoint_bytes(found: Rehearsal) -> int:
    """A checkpoint's two safetensors files, exactly (`finetune.training.checkpoint`); its manifest adds some thousand bytes."""
    trained = {f"parameter/{name}": entry for name, entry in found.trained.items()} | {f"extra/{name}": entry for name, entry in found.extra.items()}
    return file_bytes(trained, None) + file_bytes(found.state_shapes, None)


def disk_bytes(settings: TrainSettings, artifact: int, checkpoint: int) -> dict[str, int]:
    """What a run leaves on disk at most, by kind; a checkpoint or artifact is complete before the one it replaces goes."""
    found = {"artifact": artifact}
    made = settings.steps // settings.checkpoint_every if settings.checkpoint_every else 0
    found["checkpoints"] = checkpoint * min(made, settings.keep_checkpoints + 1)
    found["artifacts along the way"] = artifact * math.ceil(settings.steps / settings.export_every) if settings.export_every else 0
    if settings.prior == "images" and not settings.class_dir:
        found["class pictures"] = settings.class_images * picture_bytes(settings.resolution)
    return {name: size for name, size in found.items() if size}


def picture_bytes(side: int) -> int:
    """About what a photograph of this side takes as PNG: two bytes a pixel."""
    return 2 * side * side
