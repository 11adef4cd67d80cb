"""Old `.pt` files: written so that every program reads them, read without ever executing what they contain.

The web UI checks the member names of a torch zip before loading and refuses the records that current torch adds, so
files are written in the legacy container, which has no members (torch's `_use_new_zipfile_serialization=False`). torch
itself names storages by memory address there; here they are numbered, so that equal content gives equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

from finetune.errors import Problem
from finetune.runs import atomic_path, read_back

# torch's own list for weights_only=True is wider than this; these are the globals that honest adapter files need.
ALLOWED_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.modules.container.ParameterDict",
    "__builtin__.set",  # inside a ParameterDict
    "builtins.set",
    *(f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")),
}
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, storage keys; raw storages follow
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's constants, unchanged since torch 0.1
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
_KINDS = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float64: "Double",
          torch.int64: "Long", torch.int32: "Int", torch.bool: "Bool", torch.uint8: "Byte"}
LARGEST_PICKLE = 64 * 2**20
# What zipfile, pickletools and torch raise on damaged files; a number read from one may ask for any amount of memory.
BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError, OverflowError, MemoryError,
          struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError, AssertionError, RecursionError)


def save_legacy(obj: Any, path: Path | str) -> None:
    """Save plain containers and CPU tensors in torch's legacy container, atomically, and read it back.

    Raises:
        Problem: when something in `obj` would need a pickle global beyond those every reader allows.
    """
    plain = _plain(obj, "the file")
    frame, digest = io.BytesIO(), hashlib.sha256()
    storages = _write_frame(plain, frame)
    with atomic_path(Path(path)) as temporary:
        with open(temporary, "wb") as file:
            for part in (frame.getvalue(), *(_numbers(storage) for storage in storages)):
                digest.update(part)
                file.write(part)
        read_back(temporary, digest.hexdigest())


def _numbers(storage: Any) -> bytes:
    """A storage as torch's legacy container has it: how many numbers, and the numbers."""
    data = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
    return struct.pack("<q", data.numel()) + data.view(torch.uint8).numpy().tobytes()


def expected_bytes(obj: Any) -> int:
    """Exact size of the file `save_legacy` writes; tensors may be on the meta device, for only their sizes count.

    Their places are taken by memory that is reserved and never touched, so a plan of 400 MB costs nothing.
    """
    frame = io.BytesIO()
    storages = _write_frame(_plain(obj, "the file"), frame)
    return frame.tell() + sum(8 + storage._untyped_storage.nbytes() for storage in storages)


def _write_frame(plain: Any, file: IO[bytes]) -> list[Any]:
    """Everything before the raw numbers; returns the storages in the order in which they follow."""
    for header in (MAGIC, PROTOCOL, SYSTEM):
        pickle.dump(header, file, protocol=2)
    pickler = _Numbering(file)
    pickler.dump(plain)
    pickle.dump([str(number) for number in range(len(pickler.storages))], file, protocol=2)
    return pickler.storages


class _Numbering(pickle.Pickler):
    """Pickles tensors as torch does, with the storages left out and numbered in order of appearance."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=2)
        self.storages: list[Any] = []

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """torch's legacy reference: ("storage", kind, key, location, elements, view)."""
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        self.storages.append(value)  # `_plain` gave every tensor a storage of its own or shares none in part
        kind = getattr(torch, f"{_KINDS[value.dtype]}Storage")
        return ("storage", kind, str(len(self.storages) - 1), "cpu", value._untyped_storage.nbytes() // value.dtype.itemsize, None)


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` from plain types only; tensors detached and without the rest of a larger storage."""
    if isinstance(value, torch.Tensor):
        own = torch.empty(value.shape, dtype=value.dtype) if value.is_meta else value.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or type(own) is not torch.Tensor:
            own = torch.empty_like(own, device="cpu").copy_(own).as_subclass(torch.Tensor)
        return own
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((_plain(key, where), _plain(item, f"{where}[{key!r}]")) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise Problem(
        f"{where} is a {type(value).__module__}.{type(value).__name__}, which cannot go into a .pt file.",
        "Programs that read .pt files allow only plain values and tensors.",
        "Convert it to text or a number.",
    )


def load_restricted(path: Path | str, mmap: bool = False) -> Any:
    """Load a `.pt`, `.bin` or `.ckpt` with weights_only=True and the allow list above; nothing is executed.

    Args:
        mmap: leave the tensors of a zip container on disk until they are used (whole checkpoints).

    Raises:
        Problem: when the file needs anything else, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem(f"There is no file {path}.", fix="Check the path.")
    foreign = sorted(set(globals_in(path)) - ALLOWED_GLOBALS)
    if foreign:
        raise Problem(
            f"{path} was not opened: its pickle asks for {', '.join(foreign[:4])}.",
            "A pickle can run any program while it loads, and this one needs more than tensors and plain values.",
            "Get the same artifact as .safetensors, or re-save it with the program that made it.",
        )
    allowed = [OrderedDict, torch.nn.ParameterDict]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old protocols are read as well as new ones
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except BROKEN as error:
        told = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error).strip() or type(error).__name__
        raise Problem(
            f"{path} could not be read without running code from it: {told.strip().splitlines()[0].rstrip('.')}.",
            "It is damaged, or an old file that stores classes beside its tensors.",
            "Get it again as .safetensors, or re-save it with the program that made it.",
        ) from error


def globals_in(path: Path | str) -> list[str]:
    """Names of the globals a torch file's pickles would import, sorted, read opcode by opcode without executing them.

    Understands the zip container and the legacy one. A global whose name is computed is listed as "?".
    """
    path = Path(path)
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            found = _globals_of_zip(path)
        else:
            with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:  # a map gives no more than there is
                for _ in range(LEGACY_PICKLES):
                    found |= _globals_of(content)
    except BROKEN as error:
        raise Problem(
            f"{path} is not a torch file: {str(error) or type(error).__name__}.",
            "It is neither a torch zip nor a legacy torch pickle.",
            "Check that it is the file you meant.",
        ) from error
    return sorted(found)


def _globals_of_zip(path: Path) -> set[str]:
    """Globals of the pickles in a zip container.

    Raises:
        Problem: it would unpack to far more than it is. torch stores tensors as they are, uncompressed.
    """
    found: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > 2 * path.stat().st_size + LARGEST_PICKLE:
            raise Problem(f"{path} would unpack to {unpacked:,} bytes.", f"It has {path.stat().st_size:,}; torch's files are not compressed.",
                          "Get the same artifact as .safetensors.")
        for member in archive.infolist():
            if member.filename.endswith(".pkl"):
                if member.file_size > LARGEST_PICKLE:
                    raise Problem(f"{path} holds a pickle of {member.file_size:,} bytes.", "No adapter needs that much beside its tensors.",
                                  "Get the same artifact as .safetensors.")
                with archive.open(member) as handle:
                    found |= _globals_of(handle.read())
    return found


def _globals_of(source: Any) -> set[str]:
    """Globals of one pickle; a file is left standing after its STOP."""
    found: set[str] = set()
    strings: list[str | None] = []  # what the last opcodes pushed: text, or None for anything else
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(source):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            found.add(".".join(argument.split(" ")))
            strings.append(None)
        elif name == "STACK_GLOBAL":
            pair = strings[-2:]
            found.add(".".join(pair) if len(pair) == 2 and None not in pair else "?")
            strings.append(None)
        elif "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            strings.append(argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else None
        elif "PUT" in name:
            memo[argument] = strings[-1] if strings else None
        elif "GET" in name:
            strings.append(memo.get(argument))
        elif name not in ("PROTO", "FRAME"):
            strings.append(None)
    return found
