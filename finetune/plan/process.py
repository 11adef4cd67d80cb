"""Memory of this process and of this machine, in bytes, as the system tells it."""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import subprocess
import sys
from pathlib import Path

from finetune.errors import Problem

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str, flag: str = "--memory-limit") -> int:
    """8GB, 8 GiB, 500M, 7.5g -> bytes; the i of GiB makes the steps 1024.

    Raises:
        Problem: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise Problem(f"{flag} {text!r} is no amount of memory.", "", f"Write a number and its unit: {flag} 8GB.")
    power = "kmgt".find(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024**power if found[3] else UNITS[found[2].lower()]))


def resident() -> int:
    """Memory this process has now."""
    with contextlib.suppress(OSError):
        return _status("/proc/self/status", "VmRSS")
    return peak()


def peak() -> int:
    """The most this process ever had."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def free() -> int:
    """Memory that new programs can have without driving others out; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        whole = _status("/proc/meminfo", "MemAvailable")
        with contextlib.suppress(OSError, ValueError):  # a container may have less than the machine
            most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
            whole = min(whole, most - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8")))
        return max(0, whole)
    return 0


def _status(file: str, key: str) -> int:
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {key}")


@functools.cache
def own() -> int:
    """What a training process takes before any weights: this one, with everything imported that training imports, and used once."""
    import accelerate
    import peft

    import finetune.data
    import finetune.model.text  # noqa: F401

    del accelerate, peft
    _use()
    return resident()


def _use() -> None:
    """A step of the smallest networks of the right kinds: libraries load their parts when they are first asked."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        vae = AutoencoderKL(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                            bos_token_id=0, eos_token_id=1, pad_token_id=2))
        pictures = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.detach()
        states = text(torch.ones(1, 77, dtype=torch.long))[0]
        unet(pictures, torch.zeros(1, dtype=torch.long), states).sample.pow(2).mean().backward()
        values = [value for value in unet.parameters() if value.grad is not None]
        torch.nn.utils.clip_grad_norm_(values, 1.0, foreach=True)
        torch.optim.AdamW(values, fused=True).step()


@functools.cache
def fresh() -> int:
    """`own` of a new process: for callers, such as a test, whose own memory is full of other things."""
    code = "from finetune.plan import process; print(process.own())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
