"""The loop over its floor: finetune's own steps against forward, backward and optimizer on the same prepared network.

Both sides run in one process on the same modules, kernels and optimizer, so what differs is what the loop adds: drawing by
keys, captions, weights, the loss's terms, guards, clipping, clocks. The floor draws from torch's generator, asks the network and steps.

    python benchmarks/loop.py --method lora --size small
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import steps

RANKED = {"lora": {"rank": 4, "targets": "attention"}}


def main() -> None:
    found = common.parser("finetune's loop over bare forward, backward and optimizer.")
    common.add_model(found)
    found.add_argument("--methods", default="lora,textual-inversion,hypernetwork,dreambooth", help="split by commas")
    found.add_argument("--block", type=int, default=5, help="steps of one measurement")
    found.add_argument("--rounds", type=int, default=6, help="measurements of each side, A B B A")
    found.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a setting of finetune; may be repeated")
    options = found.parse_args()
    results = {method: measure(method, options) for method in options.methods.split(",")}
    rows = [(name, f"{one['loop']['median']:.4f}", f"{one['floor']['median']:.4f}", f"{one['ratio']['median']:.3f}",
             f"{one['ratio']['least']:.3f}-{one['ratio']['most']:.3f}") for name, one in results.items()]
    common.show(f"{common.clock()} seconds per step, {options.model or options.size}", ("method", "loop", "floor", "ratio", "least-most"), rows)
    common.write({"size": options.size, "settings": options.set, "methods": results}, options.json)


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Blocks of steps of the loop and of the floor in turn, on one prepared run."""
    count = 2 + options.rounds * options.block
    extra = {name: _value(text) for name, text in (word.split("=", 1) for word in options.set)}
    values = {**common.settings_of(options), **RANKED.get(method, {}), "steps": count, **extra}
    taken: dict[str, list[common.Usage]] = {}

    def around(fit: Any, *arguments: Any, **named: Any) -> Iterator[Any]:
        inner, bare = fit(*arguments, **named), floor(*arguments)
        for side in (inner, bare, inner, bare):  # pages touched, kernels chosen
            next(side)
        blocks = {"loop": lambda: [next(inner) for _ in range(options.block)], "floor": lambda: [next(bare) for _ in range(options.block)]}
        taken.update(common.interleave(blocks, options.rounds))
        raise steps.Enough
        yield

    steps.train(method, values, around)
    kind = common.clock()
    times = {side: [getattr(usage, kind) / options.block for usage in usages] for side, usages in taken.items()}
    return {**{side: {**common.spread(values), "all": values} for side, values in times.items()}, "ratio": common.ratio(times["loop"], times["floor"])}


def floor(base: Any, method: Any, source: Any, settings: Any, accelerator: Any, state: Any) -> Iterator[None]:
    """Sample latents, noise them, ask, squared error, backward, optimizer: nothing else; for batches of any one size."""
    import torch

    from finetune import diffusion

    batch = source.batch(0)
    latents, captions = batch.latents, batch.captions
    while True:
        with accelerator.autocast():
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, len(base.schedule), (len(latents),), device=latents.device)
            noisy = diffusion.add_noise(latents, noise, timesteps, base.schedule)
            pred = method.denoise(base, noisy, timesteps, method.condition(base, captions))
            loss = (pred.float() - noise).pow(2).mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        yield


def _value(text: str) -> Any:
    """JSON, or the word itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
