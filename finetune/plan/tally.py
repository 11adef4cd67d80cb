"""Counts the bytes that a computation on tensors without memory would hold, operator by operator.

The computation runs for real, autograd included, on torch's fake tensors: they have shape, strides, number format and a
storage of a known size, and no bytes. So what the count sees is what the same lines would allocate.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Convolutions of oneDNN work in layouts of their own: picture, weights and result are copied into them for the moment.
REORDERED = {aten.convolution.default, aten.convolution_backward.default}


class Tally(TorchDispatchMode):
    """Bytes alive now, and the most that were alive at once since `restart`.

    A storage is counted once, however many views look at it, from the operator that makes it until the last of them goes.

    Attributes:
        live: bytes of all storages seen so far that are still there.
        peak: largest `live` plus what the operator at hand needs for itself.
        seen: storage -> its bytes, of those that are there.
        work: (operator, arguments' shapes and formats) -> how often, when `record` is on: what a calibration repeats.
    """

    def __init__(self, record: bool = False):
        super().__init__()
        self.live = self.peak = 0
        self.record, self.work = record, Counter()
        self.seen: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are there already; returns the bytes they added."""
        before = self.live
        for tensor in tensors:
            self._note(tensor)
        return self.live - before

    def restart(self) -> None:
        """The peak is looked for anew from here on."""
        self.peak = self.live

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen or tensor.device.type == "meta":  # what was let go keeps its shape alone
            return
        size = storage.nbytes()
        self.seen[key] = size
        self.live += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if operator is aten._local_scalar_dense.default:  # somebody looks at a number: there is none, and 1 is finite, true and positive
            return {True: 1.0, False: 1}[arguments[0].is_floating_point()]
        if operator is aten.allclose.default:
            return True
        if self.record:
            self.work[_signature(operator, arguments, named)] += 1
        made = operator(*arguments, **named)
        results = [value for value in _flat(made) if isinstance(value, Tensor)]
        for value in results:
            self._note(value)
        own = 0
        if operator in REORDERED:
            own = sum(value.numel() * value.element_size() for value in (*(value for value in _flat(arguments) if isinstance(value, Tensor)), *results))
        self.peak = max(self.peak, self.live + own)
        return made


def _flat(values: Any) -> Iterator[Any]:
    """Everything in nested lists and tuples."""
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _signature(operator: Any, arguments: Any, named: Any) -> tuple[Any, ...]:
    """An operator's call as something that can be counted, and be done again with tensors of the same kind."""
    return operator, _described(arguments), tuple(sorted((key, _described(value)) for key, value in named.items()))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return ("list", *(_described(part) for part in value))
    return value
