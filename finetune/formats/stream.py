"""Tensors that are fetched one at a time, so that a 4 GB checkpoint is written without a second copy in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem
from finetune.formats.header import WRITE_RANK, DTYPE_BYTES, header_text, read_header
from finetune.runs import atomic_path, read_back

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
                "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {kind: name for name, kind in TORCH_DTYPES.items()}
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is known by dtype (as safetensors spells it) and shape, and fetched when it is written."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    def to(self, dtype: str) -> Lazy:
        """The same in another number format; whole numbers (`position_ids`) keep theirs, which readers insist on."""
        return self if self.dtype not in _FLOATS or self.dtype == dtype else replace(self, dtype=dtype)

    def map(self, shape: tuple[int, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Lazy:
        """The tensor changed by a function that gives `shape`."""
        return Lazy(self.dtype, shape, lambda: change(self.load()))


def of_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, Lazy]:
    """Live tensors (also on the meta device, whose sizes are all that is asked) by name."""
    return {name: Lazy(DTYPE_NAMES[value.dtype], tuple(value.shape), lambda value=value: value.detach()) for name, value in state.items()}


def of_file(path: Path | str) -> dict[str, Lazy]:
    """Tensors of a safetensors file, each read when it is asked for. Raises Problem for a file that lies."""
    from safetensors import safe_open

    header = read_header(path)
    handle = safe_open(str(path), "pt")
    return {name: Lazy(info.dtype, info.shape, lambda name=name: handle.get_tensor(name)) for name, info in header.tensors.items()}


def each(path: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors file in the order they lie, each read into memory of its own.

    The file is not mapped, so what was read counts for no longer than its tensor is held. Raises Problem for a file that lies.
    """
    header = read_header(path)
    with open(path, "rb") as handle:
        for name, info in sorted(header.tensors.items(), key=lambda entry: entry[1].start):
            content = bytearray(info.end - info.start)
            handle.seek(header.data_start + info.start)
            if handle.readinto(content) != len(content):
                raise Problem(f"{path} ends within the tensor {name}.", "It changed while it was read.", "Copy it again.")
            yield name, torch.frombuffer(content, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape) if content else torch.empty(info.shape)


def expected_bytes(entries: Mapping[str, Lazy], metadata: Mapping[str, str] | None) -> int:
    """Exact size of the file `save` writes (hash fields counted where `metadata` has them)."""
    return len(header_text(_layout(entries), metadata)) + sum(_bytes(entry) for entry in entries.values())


def save(path: Path | str, entries: Mapping[str, Lazy], metadata: Mapping[str, str] | None, hash_keys: Mapping[str, str] | None = None,
         finite: bool = True, check: bool = True) -> None:
    """Write a safetensors file tensor by tensor, in the order and with the bytes the safetensors library would use.

    Args:
        metadata: text to text, or None for none at all.
        finite: refuse values that are not; a checkpoint holds whatever the optimizer does.
        check: read the file back, and compare.
        hash_keys: metadata names that receive the SHA-256 of the data area, each with a prefix ("" or "0x"); it is known
            only at the end, so its place is kept and filled then.

    Raises:
        Problem: for values that are not finite in the chosen number format; the disk gives back other bytes.
    """
    path = Path(path)
    layout = _layout(entries)
    described = metadata if metadata is None and not hash_keys else {**(metadata or {}), **{name: prefix + "0" * 64 for name, prefix in (hash_keys or {}).items()}}
    digest = hashlib.sha256()
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as target:
            target.write(header_text(layout, described))
            for name in layout:
                data = raw(path, name, entries[name], finite)
                if check or hash_keys:
                    digest.update(data)
                target.write(data)
            if hash_keys:
                described = {**(described or {}), **{name: prefix + digest.hexdigest() for name, prefix in hash_keys.items()}}
                target.seek(0)
                target.write(header_text(layout, described))
        if check:
            check_back(temporary, header_text(layout, described), digest.hexdigest())


def check_back(path: Path, header: bytes, digest: str) -> None:
    """Raise a Problem unless the disk gives back this header, and after it data with this SHA-256."""
    read_back(path, digest, start=len(header))
    with open(path, "rb") as handle:
        if handle.read(len(header)) != header:
            raise Problem(f"The header of {path} did not come back from the disk as it was written.", "The disk or its cable loses bytes.",
                          "Write to another disk, and check this one.")


def raw(path: Path, name: str, entry: Lazy, finite: bool = True) -> bytes:
    """The bytes of one tensor in its number format."""
    value = entry.load().to("cpu", TORCH_DTYPES[entry.dtype]).contiguous()
    if tuple(value.shape) != entry.shape:
        raise Problem(f"{path.name} was not written: {name!r} has shape {list(value.shape)}, not {list(entry.shape)}.",
                      "Its source was changed while it was read.", "Export it again.")
    if finite and value.is_floating_point() and not torch.isfinite(value).all():
        raise Problem(f"{path.name} was not written: {name!r} holds values that are not finite as {value.dtype}.",
                      "Every program would produce black pictures from it.",
                      "Lower the learning rate, or write fp32 if the values only overflow in fp16.")
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def _bytes(entry: Lazy) -> int:
    return math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]


def _layout(entries: Mapping[str, Lazy]) -> dict[str, Any]:
    """Header entries in file order: wider numbers first, then by name, as the library has it."""
    found: dict[str, Any] = {}
    position = 0
    for name in sorted(entries, key=lambda name: (-WRITE_RANK[entries[name].dtype], name)):
        end = position + _bytes(entries[name])
        found[name] = {"dtype": entries[name].dtype, "shape": list(entries[name].shape), "data_offsets": [position, end]}
        position = end
    return found
