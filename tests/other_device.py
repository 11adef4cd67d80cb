"""A second device that is not there: tensors that say they lie on a GPU, whose numbers lie in memory.

Any operation on tensors of both devices is refused in the words of CUDA, as is drawing there with a generator of here. So a run
that gets through has put every tensor where it belongs, which no run on a CPU can show. The device calls itself `lazy`, the
one name besides the CPU's for which torch's backward pass needs no driver.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # whose business it is to cross over
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}  # take indices of here


class There(torch.Tensor):
    """A tensor on the other device; `here` holds its numbers."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=DEVICE)
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.here = value.here

    def __getitem__(self, where: Any) -> torch.Tensor:
        return super().__getitem__(torch.tensor(where) if isinstance(where, list) else where)

    def new_tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.here.new_tensor(*args, **kwargs).to(DEVICE)

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(function, args, kwargs or {})


def is_other(device: Any) -> bool:
    """Whether a device is the other one."""
    return device is not None and torch.device(device).type == DEVICE.type


def call(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the numbers, and put its results where a GPU would have them."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    device = kwargs.get("device")
    away = is_other(device) if device is not None else bool(there)
    if function in INDEXED:
        away = isinstance(args[0], There)
    elif function not in COPIES and there:
        strangers = [value for value in tensors if not isinstance(value, There) and value.dim()]
        if strangers:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({function})")
    if away and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a {DEVICE} generator, but found a cpu one ({function})")
    if function is aten.copy_.default:
        away = isinstance(args[0], There)
    own = {**kwargs, "device": torch.device("cpu")} if is_other(device) else kwargs
    found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, own))
    known = {id(value.here): value for value in there}
    return tree_map(lambda value: wrapped(value, known) if away and isinstance(value, torch.Tensor) else value, found)


def unwrapped(value: Any) -> Any:
    """The numbers of a tensor of the other device; anything else as it is."""
    return value.here if isinstance(value, There) else value


def wrapped(value: torch.Tensor, known: dict[int, There]) -> There:
    """A result on the other device; what an operation wrote into is returned as the tensor it was given as."""
    same = known.get(id(value))
    return same if same is not None and same.shape == value.shape else There(value)


class OtherDevice(TorchDispatchMode):
    """While it is entered, the device is there.

    `waits` counts by operation what stops a program until a GPU has done all it was told: numbers that are asked for, and copies
    in either direction that are not marked `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if stops(function, args, kwargs or {}):
            self.waits[str(function)] += 1
        return call(function, args, kwargs or {})


def stops(function: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a program would wait for the device in this operation."""
    if function is aten._to_copy.default:
        target = kwargs.get("device")
        return target is not None and isinstance(args[0], There) != is_other(target) and not (is_other(target) and kwargs.get("non_blocking"))
    if function is aten.copy_.default:
        target, source = args[:2]
        return isinstance(source, There) != isinstance(target, There) and not (isinstance(target, There) and (args[2:] or (kwargs.get("non_blocking"),))[0])
    return function in (aten._local_scalar_dense.default, aten.nonzero.default) and isinstance(args[0], There)


@contextlib.contextmanager
def other_device(monkeypatch: Any) -> Iterator[OtherDevice]:
    """The device, and a program that takes it where it would take CUDA's."""
    from accelerate.state import AcceleratorState

    from finetune import engine
    from finetune.model import base

    monkeypatch.setattr(base, "pick_device", lambda name: DEVICE if name == "cuda" else torch.device("cpu"))
    monkeypatch.setattr("finetune.training.run.pick_device", base.pick_device)
    monkeypatch.setattr(torch, DEVICE.type, SimpleNamespace(), raising=False)  # where torch.cuda would be
    plain = engine.autocast
    monkeypatch.setattr(engine, "autocast", lambda settings, device: plain(settings, torch.device("cpu")))
    for kind in ("foreach", "fused"):
        asked = f"_get_{kind}_kernels_supported_devices"
        found = [*getattr(_foreach_utils, asked)(), DEVICE.type]
        for module in (_foreach_utils, optimizer):
            monkeypatch.setattr(module, asked, lambda found=found: found, raising=False)
    try:
        with Filled(), OtherDevice() as mode:
            yield mode
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate remembers the device of a process


class Filled(TorchFunctionMode):
    """torch.tensor and torch.as_tensor fill the memory of their device themselves: here, and then it is sent over."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and is_other(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)
