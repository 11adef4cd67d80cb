"""What the benchmarks share: random bases of Stable Diffusion's shapes, clocks, interleaving, a small table and JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from a checkout
    sys.path.insert(0, str(ROOT))

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
CACHE = Path(os.environ.get("FINETUNE_CACHE", "~/.cache/finetune")).expanduser() / "benchmarks"

# What differs from Stable Diffusion 1.5's published configurations (finetune.model.configs), which size sd15 is.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"unet": {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "sample_size": 16,
                      "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "norm_num_groups": 8,
                      "attention_head_dim": 4, "cross_attention_dim": 32},
             "vae": {"block_out_channels": [16, 32, 32, 64], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128},
             "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "projection_dim": 32}},
    "small": {"unet": {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 256, "sample_size": 32, "layers_per_block": 2},
              "vae": {"block_out_channels": [32, 64, 128, 128], "sample_size": 256},
              "text_encoder": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4, "projection_dim": 256}},
    "sd15": {"unet": {}, "vae": {}, "text_encoder": {}},
}
NATIVE = {"tiny": 128, "small": 256, "sd15": 256}  # side in pixels the benchmarks use when none is given


@dataclass(frozen=True)
class Usage:
    """What a piece of work took: seconds by the clock, CPU seconds (user, system), page faults, largest memory of the process in bytes."""

    wall: float
    user: float
    system: float
    minor_faults: int
    peak_bytes: int

    @property
    def cpu(self) -> float:
        return self.user + self.system


def model_folder(size: str, cache: Path) -> Path:
    """A diffusers folder of the size with seeded random weights, made once.

    Random weights give real speed and memory and say nothing about quality.

    Args:
        size: of SIZES. cache: folder that keeps it.
    """
    folder = cache / f"model-{size}"
    if (folder / "complete").is_file():
        return folder
    import shutil

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from finetune.model.configs import parts_of, write_folder

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = {name: {**config, **SIZES[size].get(name, {})} for name, config in parts_of("sd1").items()}
    write_folder(folder, parts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            kind.from_config(parts[name]).save_pretrained(folder / name)
        CLIPTextModel(CLIPTextConfig(**{key: value for key, value in parts["text_encoder"].items() if key != "architectures"})).save_pretrained(
            folder / "text_encoder")
    (folder / "complete").touch()
    return folder


def pictures_folder(cache: Path, count: int = 5, side: int = 512) -> Path:
    """Drawn photos to train on where none are given: their content does not change what a step costs."""
    folder = cache / f"pictures-{count}-{side}"
    if not folder.is_dir():
        from PIL import Image, ImageDraw

        folder.mkdir(parents=True)
        for number in range(count):
            picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
            left = side // 8 * (number % 4)
            ImageDraw.Draw(picture).ellipse((left, left, left + side // 2, left + side // 3), fill=(200, 40 * number % 255, 60))
            picture.save(folder / f"{number}.jpg")
    return folder


def child(command: str | Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None, log: Path | None = None) -> Usage:
    """Run a command and report what the kernel says of it and of all its children that ended (wait4).

    Raises:
        SystemExit: it failed; with the end of its output.
    """
    words = shlex.split(command) if isinstance(command, str) else list(command)
    log = log or Path(os.devnull)
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=cwd, env={**os.environ, **(env or {})}, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        end = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
        raise SystemExit(f"exit code {process.returncode}: {' '.join(words)}\n{end}")
    return usage_of(usage, wall)


def usage_of(usage: resource.struct_rusage, wall: float) -> Usage:
    """The kernel's account of an ended process in our units."""
    return Usage(wall, usage.ru_utime, usage.ru_stime, usage.ru_minflt, usage.ru_maxrss * 1024)


def measure(work: Callable[[], Any]) -> Usage:
    """Run work in this process. `peak_bytes` is the largest the process has ever been, not this work's share."""
    synchronize()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    synchronize()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(time.perf_counter() - started, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime,
                 after.ru_minflt - before.ru_minflt, after.ru_maxrss * 1024)


def synchronize() -> None:
    """Wait for a GPU, if torch is loaded and has one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> str:
    """The figure to compare: CPU seconds on a processor, where other work may share the machine; seconds by the clock on a GPU."""
    torch = sys.modules.get("torch")
    return "wall" if torch is not None and torch.cuda.is_available() else "cpu"


def interleave(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Usage]]:
    """Run the variants in turn, forwards in even rounds and backwards in odd ones (A B B A), so that drift hits all alike."""
    found: dict[str, list[Usage]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(list(variants)):
            found[name].append(measure(variants[name]))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the two ends."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median of `over` / median of `under`, and the ratio's ends by pairing each run with the one beside it."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(over) / statistics.median(under), "least": min(pairs), "most": max(pairs)}


def trim() -> None:
    """Give freed memory back, so that the next peak is its own (glibc)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    name = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in _lines("/proc/cpuinfo") if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    found: dict[str, Any] = {"processor": name, "instructions": known, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"),
                             "memory_bytes": memory, "system": platform.system(), "python": platform.python_version(),
                             "versions": {name: _version(name) for name in LIBRARIES}}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parser(purpose: str) -> argparse.ArgumentParser:
    """The flags all scripts have."""
    found = argparse.ArgumentParser(description=purpose, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--json", type=Path, help="write the figures here too")
    found.add_argument("--cache", type=Path, default=CACHE, help="folder for the random bases and drawn pictures")
    return found


def add_model(found: argparse.ArgumentParser, size: str = "small") -> None:
    """The flags of scripts that train."""
    found.add_argument("--size", choices=list(SIZES), default=size, help="widths of the random base")
    found.add_argument("--model", help="a base instead of a random one: anything --model of finetune takes")
    found.add_argument("--pictures", type=Path, help="folder with pictures instead of drawn ones")
    found.add_argument("--resolution", type=int, help="side of the training picture in pixels [default: the size's]")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """model, pictures and resolution as finetune's settings."""
    model = options.model or str(model_folder(options.size, options.cache))
    return {"model": model, "instance_dir": options.pictures or pictures_folder(options.cache), "class_noun": "dog",
            "resolution": options.resolution or NATIVE[options.size]}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table, first column left, the others right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=80, highlight=False).print(table)


def write(result: dict[str, Any], path: Path | None) -> None:
    """The figures with the machine and the command beside them."""
    if path is None:
        return
    whole = {"benchmark": Path(sys.argv[0]).stem, "command": " ".join(["python", *sys.argv]), "machine": machine(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return {**asdict(value), "cpu": value.cpu} if isinstance(value, Usage) else str(value)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"
