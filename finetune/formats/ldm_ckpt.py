"""Old whole checkpoints (`.ckpt`) opened without running them, and what of a single file is worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from finetune.errors import Problem
from finetune.formats import stream
from finetune.formats.pickles import load_restricted
from finetune.formats.stream import Lazy

KEPT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "depth_model.")
MARKS = ("v_pred", "ztsnr")
TRAINING = ("first_stage_model.loss.", "first_stage_model.model_ema.")


def read(path: Path | str) -> dict[str, Lazy]:
    """Every tensor of a `.ckpt` by its key: the `state_dict` inside where there is one. Zip containers stay on disk until used.

    Raises:
        Problem: the pickle asks for more than tensors and plain values, with the way to a .safetensors; or it is no checkpoint.
    """
    path = Path(path)
    try:
        content = load_restricted(path, mmap=True)
    except Problem as problem:
        raise Problem(problem.what, problem.why,
                      "Open it once in the program it came from and save it as .safetensors there (A1111: Checkpoint Merger with one model "
                      "and no interpolation; ComfyUI: Save Checkpoint node), then convert that file.") from problem
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, Mapping) else {}
    if not any(key.startswith(KEPT[0]) for key in tensors):
        raise Problem(f"{path} is not a Stable Diffusion checkpoint.", "It holds no model.diffusion_model.* weights.", "`finetune inspect` says what it is.")
    return stream.of_tensors(tensors)


def kept(found: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, int]]:
    """What a reader uses: the networks' weights.

    Left out are the EMA copy, whose place the plain weights take in every reader, the noise schedule and the losses.
    `position_ids` stay, as whole numbers.

    Returns: the tensors kept, and how many were left out by the first part of their name.
    """
    stays: dict[str, Lazy] = {}
    dropped: dict[str, int] = {}
    for key, entry in found.items():
        if key in MARKS or key.startswith(KEPT) and not key.startswith(TRAINING):
            stays[key] = entry if not key.endswith("position_ids") else replace(entry, dtype="I64")
        else:
            kind = key.partition(".")[0] if key.startswith("model_ema.") else "noise schedule and training"
            dropped[kind] = dropped.get(kind, 0) + 1
    return stays, dropped
