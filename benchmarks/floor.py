"""The floor: what a step costs in plain PyTorch over diffusers' UNet, with nothing of finetune in it.

Cached latents (mean and deviation, sampled anew each step), a cached text state (Textual Inversion: the text encoder each
step), SDPA, no clipping, no reading of the loss, fused AdamW. The adapters are the shortest that do the same:
LoRA of rank 4 on q, k, v, out of all attention; one row over the token table; key and value networks 1-2-1 before every
cross-attention, each evaluated in every layer. With --profile the operators that take the time.

    python benchmarks/floor.py --size small --methods lora,full
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


class LoraLinear(nn.Module):
    """y = W x + B A x."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Before(nn.Module):
    """A projection of x + f(x)."""

    def __init__(self, base: nn.Linear, network: nn.Module):
        super().__init__()
        self.base, self.network = base, network

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.network(x))


class Row(nn.Module):
    """One trainable row over a frozen token table."""

    def __init__(self, table: nn.Embedding, word: int):
        super().__init__()
        self.table, self.word, self.row = table, word, nn.Parameter(table.weight[word].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where((ids == self.word).unsqueeze(-1), self.row, self.table(ids))


def prepare(method: str, folder: Path, resolution: int, device: str) -> Callable[[], None]:
    """Load, attach, thaw; returns the step."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(device).requires_grad_(False).train()
    found = {"lora": _lora, "full": _full, "textual-inversion": _word, "hypernetwork": _networks}[method](unet, folder, device)
    trained, cond = found
    for value in trained:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    side = resolution // 8
    mean, std = torch.randn(1, 4, side, side, device=device), torch.rand(1, 4, side, side, device=device)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = torch.cumprod(1 - betas, 0).float().to(device)

    def step() -> None:
        latents = mean + std * torch.randn_like(mean)
        noise, timestep = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=device)
        noisy = share[timestep].sqrt() * latents + (1 - share[timestep]).sqrt() * noise
        F.mse_loss(unet(noisy, timestep, cond()).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _states(folder: Path, device: str) -> Callable[[], Tensor]:
    import json

    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    states = torch.randn(1, 77, width, device=device)
    return lambda: states


def _lora(unet: nn.Module, folder: Path, device: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    trained: list[nn.Parameter] = []
    for name, layer in list(unet.named_modules()):
        if name.endswith(ATTENTION):
            wrapped = LoraLinear(layer, 4).to(device)
            _replace(unet, name, wrapped)
            trained += [wrapped.down, wrapped.up]
    return trained, _states(folder, device)


def _full(unet: nn.Module, folder: Path, device: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    return list(unet.parameters()), _states(folder, device)


def _word(unet: nn.Module, folder: Path, device: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").to(device).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    row = Row(encoder.get_input_embeddings(), tokenizer("dog", add_special_tokens=False).input_ids[0])
    embeddings = encoder.text_model.embeddings if hasattr(encoder, "text_model") else encoder.embeddings
    embeddings.token_embedding = row
    ids = tokenizer("a photo of a dog", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids.to(device)
    return [row.row], lambda: encoder(ids)[0]


def _networks(unet: nn.Module, folder: Path, device: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    states = _states(folder, device)
    width, trained = states().shape[-1], []
    for leaf in (".to_k", ".to_v"):
        network = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)).to(device)
        trained += list(network.parameters())
        for name, layer in list(unet.named_modules()):
            if name.endswith(f"attn2{leaf}"):
                _replace(unet, name, Before(layer, network))
    return trained, states


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, leaf = name.rsplit(".", 1)
    network.get_submodule(parent).register_module(leaf, new)


def profile(step: Callable[[], None], count: int = 8) -> list[dict[str, Any]]:
    """The operators with the most time of their own in one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]) as seen:
        step()
        common.synchronize()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in events)
    return [{"operator": event.key, "seconds": getattr(event, key) / 1e6, "share": getattr(event, key) / whole, "calls": event.count}
            for event in events[:count]]


def main() -> None:
    found = common.parser("Plain forward, backward and fused AdamW.")
    common.add_model(found)
    found.add_argument("--methods", default="lora,textual-inversion,hypernetwork,full", help="split by commas")
    found.add_argument("--steps", type=int, default=10, help="steps measured")
    found.add_argument("--warm", type=int, default=2, help="steps before that")
    found.add_argument("--profile", action="store_true", help="also the operators of one step")
    options = found.parse_args()
    folder = Path(options.model) if options.model else common.model_folder(options.size, options.cache)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, results = common.clock(), {}
    for method in options.methods.split(","):
        step = prepare(method, folder, options.resolution or common.NATIVE[options.size], device)
        for _ in range(options.warm):
            step()
        taken = [common.measure(step) for _ in range(options.steps)]
        results[method] = {**common.spread([getattr(usage, kind) for usage in taken]), "faults": taken[-1].minor_faults, "peak_bytes": taken[-1].peak_bytes}
        if options.profile:
            results[method]["operators"] = profile(step)
        del step
        common.trim()
    rows = [(name, f"{one['median']:.4f}", f"{one['least']:.4f}-{one['most']:.4f}", f"{one['faults']:,}") for name, one in results.items()]
    common.show(f"{kind} seconds per step of the plain floor, {options.size}", ("method", "median", "least-most", "page faults"), rows)
    for name, one in results.items() if options.profile else ():
        common.show(f"{name}: operators of one step", ("operator", "s", "share", "calls"),
                    [(event["operator"], f"{event['seconds']:.3f}", f"{event['share']:.0%}", str(event["calls"])) for event in one["operators"]])
    common.write({"size": options.size, "methods": results}, options.json)


if __name__ == "__main__":
    main()
