"""The silhouette reader: a small network that finds the thing in a picture of the world, to measure where a model drew it.

It is trained on rendered pictures and their true masks, a third of them through the autoencoder, and knows neither the
UNet nor its prompts. Ronneberger et al. 2015 (1505.04597) in small.

Shapes: B batch, pictures (B, 3, 64, 64) in [0, 1], masks (B, 64, 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.toybox import autoencoder
from finetune.toybox.datasets import describe
from finetune.toybox.progress import Log, cosine, set_rate
from finetune.toybox.world import render_shot

WIDTHS = (16, 32, 64)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Reader(nn.Module):
    """Down to 8 x 8 and up again, with a shortcut at each size."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True))
        self.down = nn.ModuleList([_block(first, second), _block(second, third)])
        self.bottom = _block(third, third)
        self.up = nn.ModuleList([_block(2 * third, second), _block(2 * second, first)])
        self.head = nn.Conv2d(2 * first, 4, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the thing's share of each pixel, (B, 64, 64)."""
        kept = [self.stem(pictures * 2 - 1)]  # 32 x 32
        for layer in self.down:
            kept.append(layer(F.max_pool2d(kept[-1], 2)))
        deep = self.bottom(F.max_pool2d(kept[-1], 2))
        for layer in self.up:
            deep = layer(torch.cat([F.interpolate(deep, scale_factor=2.0), kept.pop()], dim=1))
        deep = torch.cat([F.interpolate(deep, scale_factor=2.0), kept.pop()], dim=1)
        return F.pixel_shuffle(self.head(deep), 2)[:, 0]

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """Where the thing is, bool (B, 64, 64)."""
        self.eval()
        return torch.cat([self(part) for part in pictures.split(50)]) > 0

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write fp16 weights as safetensors."""
        state = {name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, path, metadata={"format": "pt", **metadata})
        Path(path).chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> Reader:
        """Read what `save` wrote, in evaluation mode."""
        reader = cls()
        reader.load_state_dict(load_file(path))
        return reader.float().eval()


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks, bool (B, H, W) each; (B,). Two empty masks agree."""
    both, either = (one & other).flatten(1).sum(1), (one | other).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones(len(one)))


def train(vae: Any, work: Path, steps: int = 400, batch: int = 24, rate: float = 4e-3, seed: int = 0) -> Reader:
    """Train on freshly drawn pictures, a third of them through the autoencoder; a few minutes of one core."""
    torch.manual_seed(seed)
    reader, log = Reader().train(), Log(Path(work) / "silhouette.jsonl")
    optimizer = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=1e-3)
    pictures = describe(steps * batch, seed + 8_000_000)
    for step in range(steps):
        shots = [render_shot(picture) for picture in pictures[step * batch:(step + 1) * batch]]
        pixels = np.stack([np.array(shot.picture).transpose(2, 0, 1) for shot in shots])
        pixels[:batch // 3] = autoencoder.reconstruct(vae, pixels[:batch // 3])
        masks = torch.from_numpy(np.stack([np.array(shot.mask) for shot in shots])).float() / 255
        seen = torch.from_numpy(pixels).float() / 255
        if step % 2:
            seen, masks = seen.flip(-1), masks.flip(-1)
        set_rate(optimizer, rate * cosine(step, steps, warmup=20))
        loss = F.binary_cross_entropy_with_logits(reader(seen), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            log(step=step, loss=float(loss.detach()))
    return reader.eval()


def main(target: Path, steps: int = 400, seed: int = 0) -> None:
    """Train the reader of the embedded base's world and write it."""
    import tempfile

    from finetune.model import load

    with tempfile.TemporaryDirectory() as work:
        reader = train(load("toybox").vae, Path(work), steps=steps, seed=seed)
    reader.save(target, {"command": f"python -m finetune.toybox.silhouette {target.name}", "steps": str(steps), "seed": str(seed)})


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
