"""The safetensors header: predicted sizes against real files, and lies called by name."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import Problem
from finetune.formats import header, tensors

MIXED = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(1.5, dtype=torch.float16),
    "ä": torch.zeros(3, dtype=torch.bfloat16),
    "ids": torch.arange(4),
    "mask": torch.tensor([True, False]),
    "byte": torch.tensor([7], dtype=torch.uint8),
}
KINDS = {"b": "F32", "a": "F16", "ä": "BF16", "ids": "I64", "mask": "BOOL", "byte": "U8"}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"trigger": 'a "toy"\n', "Ü": "\u2028é\x01"}])
def test_predicted_size_is_the_librarys_size(tmp_path, metadata):
    save_file(MIXED, tmp_path / "mixed.safetensors", metadata)
    shapes = {name: tuple(tensor.shape) for name, tensor in MIXED.items()}
    assert header.expected_safetensors_bytes(shapes, KINDS, metadata) == (tmp_path / "mixed.safetensors").stat().st_size


def test_saved_files_load_bit_equal_with_hash_and_sorted_metadata(tmp_path):
    path = tmp_path / "mixed.safetensors"
    tensors.save_tensors(path, MIXED, {"z": "1", "a": "2"}, {"hash": "0x"})
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in MIXED.items())
    read = header.read_header(path)
    assert list(read.metadata) == ["a", "hash", "z"] and read.metadata["hash"] == "0x" + header.data_sha256(path, read)
    assert header.parameter_count(read) == 6 + 1 + 3 + 4 + 2 + 1
    assert header.tensor_bytes(read) == 24 + 2 + 6 + 32 + 2 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32])
def test_scalars_are_read_without_torch(tmp_path, dtype):
    save_file({"x": torch.ones(3), "alpha": torch.tensor(12, dtype=dtype)}, tmp_path / "x.safetensors")
    assert header.read_scalar(tmp_path / "x.safetensors", header.read_header(tmp_path / "x.safetensors"), "alpha") == 12.0


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write(path, entries, data=b"\0" * 16, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    "entries, lie",
    [
        ({"a": entry(0, 8), "b": entry(8, 24, (4,))}, "'b' ends at byte 24 of a data area of 16"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' starts at byte 4 and overlaps"),
        ({"a": entry(0, 4, (1,)), "b": entry(8, 16)}, "'b' starts at byte 8 and leaves a hole"),
        ({"a": entry(0, 8)}, "its tensors end at byte 8 of a data area of 16"),
        ({"a": entry(0, 16)}, r"shape \[2\] needs 8 bytes but spans 16"),
        ({"a": entry(0, 16, (4,), "F33")}, "unknown dtype 'F33'"),
        ({"a": entry(0, -8, (-2,))}, "not a whole number"),
        ({"a": entry(0, 16, (4,)), "__metadata__": {"x": 1}}, "not a map from text to text"),
        ({"a": {"shape": [4]}}, "lacks dtype"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b"[]", "not a JSON object"),
        (b"{nonsense", "not valid JSON"),
    ],
)
def test_lies_are_named(tmp_path, entries, lie):
    write(tmp_path / "x.safetensors", entries)
    with pytest.raises(Problem, match=lie):
        header.read_header(tmp_path / "x.safetensors")


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    write(tmp_path / "x.safetensors", {}, length=2**62)
    with pytest.raises(Problem, match="claims a header of 4,611,686,018,427,387,904 bytes, but only 18"):
        header.read_header(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"abc")
    with pytest.raises(Problem, match="3 bytes, fewer than the 8"):
        header.read_header(tmp_path / "y.safetensors")
    with pytest.raises(Problem, match="no file"):
        header.read_header(tmp_path / "z.safetensors")


def test_nothing_is_left_behind_when_values_are_not_finite(tmp_path):
    with pytest.raises(Problem, match="'bad' holds values that are not finite"):
        tensors.save_tensors(tmp_path / "x.safetensors", {"bad": torch.tensor([1.0, float("nan")])}, None)
    assert list(tmp_path.iterdir()) == []
