"""What a run will take, before it: memory by what fills it, and the largest moment."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune import engine, methods
from finetune.engine.pages import LARGEST_PIECE, PIECE
from finetune.formats.header import Header, read_header
from finetune.model.base import Base
from finetune.model.families import Location
from finetune.plan import process as processes
from finetune.plan.rehearsal import Rehearsal, rehearse
from finetune.settings import TrainSettings

HEADROOM = 1.15  # predictions were low by up to 13 %, see docs/plan.md
REUSED = 0.5  # share of freed memory that what comes later finds a place in; measured, see docs/plan.md


@dataclass
class Prediction:
    """What a run will take, in bytes.

    Attributes:
        trainable: numbers that train. weights: of frozen networks while training; trained: of what trains.
        gradients, optimizer, copies (a teacher, averages), activations: besides. process: the program itself.
        moments: what happens -> memory of the process in it. peak_host: the most of them.
        peak_device: on a GPU, the most tensors at once; 0 on a CPU, where they are in `peak_host`.
        class_images: pictures to render first.
    """

    method: str
    model: str
    family: str
    device: str
    resolution: int
    batch_size: int
    accumulate: int
    steps: int
    rung: str
    trainable: int
    weights: int
    trained: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    process: int
    moments: dict[str, int]
    peak_host: int
    peak_device: int
    class_images: int
    rehearsal: Rehearsal = field(repr=False, compare=False)

    @property
    def peak(self) -> int:
        """What --memory-limit is about: the GPU's memory on a GPU, else the machine's."""
        return self.peak_device or self.peak_host

    @property
    def moment(self) -> str:
        """When the most is needed."""
        return max(self.moments, key=lambda name: self.moments[name])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "rehearsal"} | {"peak": self.peak, "moment": self.moment}


def predict(settings: TrainSettings, base: Base, *, device: str = "cpu", process: int | None = None, record: bool = False) -> Prediction:
    """Memory of a run from settings and a skeleton (`finetune.plan.skeleton`), which stays as it is.

    Args:
        settings: as training would have them; a rung other than "auto" is applied here.
        device: "cpu" or "cuda".
        process: bytes of the program itself; None measures this one.
        record: note operators for a calibration (`finetune.plan.pace`).

    Raises:
        Problem: settings that cannot work with this base.
    """
    own = processes.own() if process is None else process
    whole = methods.get(settings.METHOD).replaces
    settings, _ = engine.possible(settings, torch.device(device))
    rung = "fast" if settings.memory == "auto" else settings.memory
    settings = engine.apply(settings, rung, whole=whole)
    found = rehearse(settings, base, record)
    moments = _host(found, settings, own, base, whole, device == "cpu")
    on_device = 0 if device == "cpu" else max(found.moments.values())
    return Prediction(
        method=settings.METHOD, model=base.name, family=base.family, device=device, resolution=settings.resolution, batch_size=settings.batch_size,
        accumulate=settings.accumulate, steps=settings.steps, rung=rung, trainable=sum(math.prod(shape) for shape, _ in found.trained.values()),
        weights=found.frozen, trained=found.trainable, gradients=found.gradients, optimizer=found.state, copies=found.copies,
        activations=found.activations, process=own, moments=moments, peak_host=max(moments.values()), peak_device=on_device,
        class_images=settings.class_images if settings.prior == "images" and not settings.class_dir else 0, rehearsal=found)


def _loading(found: Rehearsal, location: Location, whole: bool) -> dict[str, _Part]:
    """How each network comes into memory.

    In the file's own number format it is the file, mapped. Otherwise it is made beside its file: a frozen UNet a tensor at a time,
    the rest while the whole file is mapped.
    """
    parts = {}
    for name, size in found.parts.items():
        header = _header(location, name)
        if name == "unet" and not whole:
            beside = max((info.end - info.start for info in header.tensors.values()), default=0) if header else 0
            parts[name] = _Part(size, beside, False)
        elif header is None or {info.dtype for info in header.tensors.values()} <= {"F32", "I64"}:
            parts[name] = _Part(size, 0, True)
        else:
            parts[name] = _Part(size, header.file_bytes, False)
    return parts


@dataclass(frozen=True)
class _Part:
    """A network in memory: its bytes, what is there beside it while it is read, whether it is the mapped file."""

    size: int
    beside: int
    mapped: bool


def _header(location: Location, part: str) -> Header | None:
    """Of a network's file; None where there is none (published ones are in float32)."""
    if location.kind == "single-file":
        return read_header(location.path)
    files = sorted((Path(location.path) / part).glob("*.safetensors"))
    return read_header(files[0]) if len(files) == 1 else None


def _host(found: Rehearsal, settings: TrainSettings, own: int, base: Base, whole: bool, on_cpu: bool) -> dict[str, int]:
    """Memory of the process in each moment, in the order of a run.

    Encoders come first, the UNet when they are done (`free_encoders`). The C library keeps what was freed in pieces and finds
    a place for some of it later.
    """
    parts = _loading(found, base.location, whole)
    later = settings.free_encoders and base.location.kind == "folder"
    now, most = own, own
    for name, part in parts.items():
        if name != "unet":
            now, most = now + part.size, max(most, now + part.size + part.beside)
    moments = {"loading": most}
    unet = parts["unet"]
    if not later or "class pictures" in found.moments:
        moments["loading"] = max(most, now + unet.size + unet.beside)
    if not on_cpu:
        return {"loading": max(moments["loading"], now + unet.size + unet.beside)}
    if "class pictures" in found.moments:
        moments["class pictures"] = own + found.moments["class pictures"]
    missing = unet.size if later and "class pictures" not in found.moments else 0
    moments["encoding"] = own + found.moments["encoding"] - missing
    gone = parts["vae"].size if "vae" in found.freed else 0
    moments["reading the UNet"] = now - gone + unet.size + unet.beside
    pieces = found.moments["encoding"] - sum(found.parts.values())
    piece = PIECE if engine.freed_memory(settings, whole) == "return" else LARGEST_PIECE
    pieces += sum(_in_pieces(base.modules()[name], piece) for name in found.freed if name != "vae" and not parts[name].mapped)
    resident = own + pieces + found.moments["step"]
    moments["training"] = resident
    alive = own + found.held + found.state

    def beside(extra: int) -> int:
        """Memory when `extra` comes beside what is alive, some of it where freed things were."""
        return resident + max(0, extra - int(REUSED * (resident - alive)))

    if settings.checkpoint_every and settings.steps >= settings.checkpoint_every:
        moments["checkpoint"] = beside(found.state)
    if whole:  # a network at a time is read again, and each tensor is twice there in the artifact's format
        half = 2 if settings.export_dtype == "fp16" else 4
        back = max((parts[name].size for name in found.freed), default=0)
        largest = max(value.numel() for part in base.modules().values() for value in part.parameters())
        moments["export"] = beside(back + 2 * half * largest + (found.trainable if found.extra else 0))
    return moments


def _in_pieces(part: Any, largest: int) -> int:
    """Bytes of a network's tensors that the C library takes from its heap; larger ones go back to the system when they are freed."""
    sizes = [value.numel() * value.element_size() for value in part.parameters()]
    return sum(size for size in sizes if size <= largest)


def choose(settings: TrainSettings) -> str:
    """The fastest rung whose predicted peak fits in --memory-limit, or in nine tenths of what is free; "fast" where that cannot be told.

    Where it is plain that everything fits, nothing is rehearsed.
    """
    try:
        return _choose(settings)
    except Exception:  # noqa: BLE001 - a guess about memory must never keep a run from starting; the run says what is wrong itself
        return "fast"


def _choose(settings: TrainSettings) -> str:
    from finetune.model.base import pick_device
    from finetune.model.families import locate

    limit = processes.parse_bytes(settings.memory_limit) if settings.memory_limit else 0
    device = pick_device(settings.device)
    if not limit:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine share its memory
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else processes.free() / beside + processes.resident()
        limit = int(0.9 * free)
    location = locate(settings.model)
    if _plenty(settings, location) <= limit:
        return "fast"
    from finetune.plan.skeleton import skeleton

    base = skeleton(settings.model)
    for rung in engine.RUNGS[:-1]:
        if HEADROOM * predict(settings.model_copy(update={"memory": rung}), base, device=device.type).peak <= limit:
            return rung
    return engine.RUNGS[-1]


def _plenty(settings: TrainSettings, location: Location) -> int:
    """Bytes in which a run fits on the fast rung whatever it is, from the sizes of files alone: what need not be rehearsed.

    Weights count as float32. A whole UNet is held five times (weights, gradients, two moments, an average) and a half for export, a
    frozen one at most 2.2 times (with packed convolutions). Activations go with the pictures' area and the UNet's size.
    """
    place = location.path
    files = [place] if place.is_file() else [*place.glob("unet/*.safetensors")]
    unet = sum(entry.parameters for file in files for entry in read_header(file).tensors.values()) * 4
    area = settings.batch_size * (2 if settings.prior == "images" else 1) * (settings.resolution / 512) ** 2
    copies = 5.5 if methods.get(settings.METHOD).replaces else 2.2
    return int(copies * unet + 1.5 * area * unet * (0.2 if settings.gradient_checkpointing else 1.0) + 2 * 10**9)
