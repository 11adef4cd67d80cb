"""A diffusers pipeline written as a folder, network by network and tensor by tensor: nothing is in memory twice."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from finetune.formats import stream
from finetune.formats.folder import CLIP_PARTS, TEXT_LEVEL, finish_diffusers_folder

save_weights = partial(stream.save, check=False)  # whoever exports reads all files back


def write(pipe: Any, parts: Mapping[str, nn.Module], folder: Path, dtype: str, awake: Callable[[str], contextlib.AbstractContextManager[None]],
          save: Callable[..., None] = save_weights) -> None:
    """What `pipe.save_pretrained` writes, with numbers in another format, and readable for older transformers as well.

    Args:
        pipe: a diffusers pipeline. parts: its networks by name.
        dtype: number format of the weights, as safetensors spells it.
        awake: has a network's weights in memory while its context lasts; they may be elsewhere before and after.
        save: writes a file of weights (path, entries, metadata).
    """
    try:
        for name, part in parts.items():
            part.save_pretrained = partial(_part, name, part, dtype, awake, save)
        pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        for part in parts.values():
            part.__dict__.pop("save_pretrained", None)
    finish_diffusers_folder(folder)


def _part(name: str, part: Any, dtype: str, awake: Callable[[str], contextlib.AbstractContextManager[None]], save: Callable[..., None],
          folder: str | Path, **ignored: Any) -> None:
    """Configuration and weights of one network, in place of its own `save_pretrained`."""
    folder = Path(folder)
    with awake(name):
        entries = {key: entry.to(dtype) for key, entry in stream.of_tensors(part.state_dict()).items()}
        if hasattr(part, "save_config"):  # diffusers' networks
            part.save_config(folder)
            save(folder / "diffusion_pytorch_model.safetensors", entries, {"format": "pt"})
            return
        config = copy.deepcopy(part.config)
        config.architectures, config.dtype = [type(part).__name__], str(stream.TORCH_DTYPES[dtype]).removeprefix("torch.")
        config.save_pretrained(folder)
        named = {TEXT_LEVEL + key if key.startswith(CLIP_PARTS) else key: entry for key, entry in entries.items()}
        save(folder / "model.safetensors", named, {"format": "pt"})
