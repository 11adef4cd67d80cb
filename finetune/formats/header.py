"""The safetensors header, read and predicted without torch.

Layout: 8 bytes little-endian header length, the header (JSON, padded with spaces to a multiple of 8), then the tensors
without holes. Reading only the header is what makes `finetune inspect` instant on a 4 GB checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem

# Bytes per element, in the order the serializer writes dtypes when they are mixed (last first).
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
WRITE_RANK = {name: rank for rank, name in enumerate(DTYPE_BYTES)}
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header: dtype as safetensors spells it, shape, and byte range within the data area."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header. `data_start` is the file position of the data area, in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file, touching nothing else.

    Raises:
        Problem: naming the lie when a length, offset, dtype or shape contradicts the file.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem(f"There is no file {path}.", fix="Check the path.")
    size = path.stat().st_size
    with open(path, "rb") as handle:
        first = handle.read(8)
        if len(first) < 8:
            raise _broken(path, f"the file has {size} bytes, fewer than the 8 of the length field")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise _broken(path, f"it claims a header of {length:,} bytes, but only {size - 8:,} bytes follow")
        if length > LONGEST_HEADER:
            raise _broken(path, f"it claims a header of {length:,} bytes; {LONGEST_HEADER:,} is the format's limit")
        raw = handle.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _broken(path, "its header is not a JSON object")
    if b"\\ud" in raw.lower() and not _encodable(entries):
        raise _broken(path, "a name or a text in its header is not Unicode")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata is not a map from text to text")
    tensors = {name: _entry(path, name, entry) for name, entry in entries.items()}
    _check_ranges(path, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length, size)


def _broken(path: Path, lie: str) -> Problem:
    return Problem(
        f"{path} is not a valid safetensors file: {lie}.",
        "The file is damaged, cut off, or something else under that name.",
        "Download or export it again.",
    )


def _encodable(entries: Any) -> bool:
    """Whether what was read can be written again: JSON can spell half a sign, which UTF-8 cannot."""
    try:
        json.dumps(entries, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twin!r} occurs twice")
    return dict(pairs)


def _entry(path: Path, name: str, entry: Any) -> TensorInfo:
    """One checked header entry."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"tensor {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise _broken(path, f"tensor {name!r} has a shape or offset that is not a whole number")
    info = TensorInfo(dtype, shape, start, end)
    if end - start != info.parameters * DTYPE_BYTES[dtype]:
        needed = info.parameters * DTYPE_BYTES[dtype]
        raise _broken(path, f"tensor {name!r} of shape {list(shape)} needs {needed:,} bytes but spans {end - start:,}")
    return info


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Tensors must tile the data area: no overlap, no hole, no end beyond the file."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > data_bytes:
            raise _broken(path, f"tensor {name!r} ends at byte {info.end:,} of a data area of {data_bytes:,}")
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise _broken(path, f"tensor {name!r} starts at byte {info.start:,} and {kind}")
        position = info.end
    if position != data_bytes:
        raise _broken(path, f"its tensors end at byte {position:,} of a data area of {data_bytes:,}")


def told_json(file: str, metadata: Mapping[str, str], key: str, kind: type = dict) -> Any:
    """A table (or list) that a file's metadata hold as JSON; an empty one where they have none.

    Args:
        file: its name, for the message.

    Raises:
        Problem: it is damaged, or something else.
    """
    try:
        found = json.loads(metadata.get(key, "null")) if metadata.get(key) else kind()
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise Problem(f"The metadata {key} of {file} are damaged.", f"They do not read as a JSON {'object' if kind is dict else 'list'}: {error}.",
                      "Get the file again, or export it again.") from error
    return found


def parameter_count(header: Header) -> int:
    """Elements of all tensors."""
    return sum(info.parameters for info in header.tensors.values())


def tensor_bytes(header: Header) -> int:
    """Bytes of all tensors, header excluded."""
    return sum(info.end - info.start for info in header.tensors.values())


def read_scalar(path: Path | str, header: Header, name: str) -> float:
    """The single number in a one-element tensor, such as a LoRA's alpha."""
    info = header.tensors[name]
    if info.parameters != 1:
        raise _broken(Path(path), f"tensor {name!r} should hold one number but has shape {list(info.shape)}")
    with open(path, "rb") as handle:
        handle.seek(header.data_start + info.start)
        raw = handle.read(info.end - info.start)
    if info.dtype == "BF16":  # the upper half of a float32
        return struct.unpack("<f", b"\0\0" + raw)[0]
    codes = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "U8": "B", "I8": "b"}
    if info.dtype not in codes:
        raise _broken(Path(path), f"tensor {name!r} holds a number of dtype {info.dtype}")
    return float(struct.unpack("<" + codes[info.dtype], raw)[0])


def data_sha256(path: Path | str, header: Header) -> str:
    """SHA-256 of the data area alone: kohya's `sshs_model_hash`, modelspec's `hash_sha256` without its `0x`."""
    with open(path, "rb") as handle:
        handle.seek(header.data_start)
        return hashlib.file_digest(handle, "sha256").hexdigest()


def header_text(entries: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    """Length field and header. Metadata is sorted: the library's order is random, and equal runs should give equal files.

    Args:
        entries: tensor name to {"dtype", "shape", "data_offsets"}, in file order.
        metadata: text to text, or None for no `__metadata__` at all.
    """
    whole: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps({**whole, **entries}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def expected_safetensors_bytes(
    shapes: Mapping[str, Iterable[int]], dtypes: str | Mapping[str, str], metadata: Mapping[str, str] | None = None
) -> int:
    """Exact size of the file that would hold these tensors, so that `finetune plan` can promise it.

    Args:
        shapes: tensor name to shape.
        dtypes: safetensors dtype ("F16", "F32", ...) of all tensors, or by name.
        metadata: as it will be written.
    """
    kinds = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in shapes}
    entries: dict[str, Any] = {}
    position = 0
    for name in sorted(shapes, key=lambda name: (-WRITE_RANK[kinds[name]], name)):
        shape = list(shapes[name])
        end = position + math.prod(shape) * DTYPE_BYTES[kinds[name]]
        entries[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [position, end]}
        position = end
    return len(header_text(entries, metadata)) + position
