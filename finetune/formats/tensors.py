"""Whole safetensors files in and out: checked, atomic, and equal bytes for equal content."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from finetune.errors import Problem
from finetune.formats.header import header_text, read_header
from finetune.formats.stream import check_back
from finetune.runs import atomic_path


def save_tensors(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None,
    hash_keys: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file and read it back.

    Args:
        metadata: text to text, or None for none at all.
        hash_keys: metadata names that receive the SHA-256 of the data area, each with a prefix ("" or "0x").

    Raises:
        Problem: for values that are not finite or metadata that is not text; the disk gives back other bytes.
    """
    path = Path(path)
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise Problem(
                f"{path.name} was not written: {name!r} holds values that are not finite as {value.dtype}.",
                "Every program would produce black pictures from it.",
                "Lower the learning rate, or write float32 if the values only overflow in float16.",
            )
    for name, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise Problem(f"Metadata {name!r} is {type(text).__name__}, not text.", fix="Convert it with str().")
    body = memoryview(safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}))
    (length,) = struct.unpack("<Q", body[:8])
    entries = json.loads(bytes(body[8 : 8 + length]))
    data = body[8 + length :]
    digest = hashlib.sha256(data).hexdigest()
    if hash_keys:
        metadata = {**(metadata or {}), **{name: prefix + digest for name, prefix in hash_keys.items()}}
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as handle:
            handle.write(header_text(entries, metadata))
            handle.write(data)
        check_back(temporary, header_text(entries, metadata), digest)


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: tensors as stored, and metadata. Raises Problem for a file that lies."""
    header = read_header(path)
    try:
        return safetensors.torch.load_file(path, device="cpu"), header.metadata
    except safetensors.SafetensorError as error:
        raise Problem(f"{path} is not a valid safetensors file: {error}.", "The file is damaged, cut off, or something else under that name.",
                      "Download or export it again.") from error
