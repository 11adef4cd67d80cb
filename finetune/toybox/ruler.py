"""The ruler: a small classifier of rendered pictures that measures a base model's samples.

It is independent of the judge: another network, trained on labels instead of captions, on the rendered world alone and
never on a subject. It also sees pictures that went through the autoencoder, so that it does not punish the softness
every sample has.

Shapes: B batch, pictures (B, 3, 64, 64) in [0, 1].
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.toybox.captions import KINDS, attributes
from finetune.toybox.progress import Checkpoint, Log, cosine, draw_indices, set_rate
from finetune.toybox.world import Picture


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Ruler(nn.Module):
    """Convolutions down to 4 x 4, then one linear head per attribute on mean and maximum (0.4 M parameters)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _layer(width, width),
            _layer(width, 2 * width, 2),
            _layer(2 * width, 2 * width),
            _layer(2 * width, 4 * width, 2),
            _layer(4 * width, 4 * width, 2),
        )
        self.heads = nn.ModuleDict({kind: nn.Linear(8 * width, len(values)) for kind, values in KINDS.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """What the heads read, (B, 8 * width)."""
        grid = self.trunk(pictures * 4 - 2)
        return torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits per attribute; positions are those of `captions.KINDS`."""
        features = self.features(pictures)
        return {kind: head(features) for kind, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: Tensor, batch: int = 100) -> dict[str, Tensor]:
        """The most likely position per attribute of pictures (B, 3, 64, 64) in [0, 1]."""
        self.eval()
        found = [self(pictures[start : start + batch]) for start in range(0, len(pictures), batch)]
        return {kind: torch.cat([logits[kind].argmax(dim=1) for logits in found]) for kind in KINDS}

    def save(self, path: Path) -> None:
        """Write fp16 weights as safetensors."""
        tensors = {
            name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path) -> "Ruler":
        """Read what `save` wrote, as float32 in evaluation mode."""
        weights = load_file(path)
        ruler = cls(width=weights["trunk.0.weight"].shape[0])
        ruler.load_state_dict(weights)
        return ruler.eval()


def labels(pictures: list[Picture]) -> dict[str, Tensor]:
    """Positions of the true attributes, one (B,) tensor per kind."""
    found = [attributes(picture) for picture in pictures]
    return {kind: torch.tensor([one[kind] for one in found]) for kind in KINDS}


def augment(pictures: Tensor, seed: int) -> Tensor:
    """Mirror, move by up to 4 pixels, brighten, soften a little and add faint noise; none of it changes a label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if draw(0, 1) < 0.5:
        pictures = pictures.flip(-1)
    down, right = round(draw(-4, 4)), round(draw(-4, 4))
    pictures = F.pad(pictures, (4, 4, 4, 4), mode="replicate")[:, :, 4 + down : 68 + down, 4 + right : 68 + right]
    if draw(0, 1) < 0.3:
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = torch.lerp(pictures, soft, draw(0.2, 0.9))
    gains = 1 + 0.12 * (torch.rand(len(pictures), 1, 1, 1, generator=generator) * 2 - 1)
    noise = torch.randn(pictures.shape, generator=generator) * draw(0, 0.03)
    return (pictures * gains + noise).clamp(0, 1)


def train(
    pixels: np.ndarray,
    pictures: list[Picture],
    soft_pixels: np.ndarray,
    work: Path,
    *,
    steps: int = 1200,
    batch: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
) -> Ruler:
    """Train on labels.

    Args:
        pixels, pictures: uint8 pictures and their descriptions.
        soft_pixels: the first of these pictures through the autoencoder, uint8; a third of every batch.
        work: folder of checkpoint and log.
    """
    torch.manual_seed(seed)
    ruler = Ruler().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(ruler.parameters(), lr=rate, weight_decay=1e-3)
    checkpoint = Checkpoint(Path(work) / "ruler.ckpt")
    first, before = checkpoint.resume(ruler, optimizer)
    log = Log(Path(work) / "ruler.jsonl", before)
    truth = labels(pictures)
    ruler.train()
    for step in range(first, steps):
        set_rate(optimizer, rate * cosine(step, steps))
        chosen = draw_indices(len(pixels), batch - batch // 3, step, seed + 50).sort().values
        softened = draw_indices(len(soft_pixels), batch // 3, step, seed + 51)
        both = np.concatenate([pixels[chosen.numpy()], soft_pixels[softened.numpy()]])
        seen = augment(torch.from_numpy(both).float() / 255, seed=seed * 1_000_003 + step)
        logits = ruler(seen.contiguous(memory_format=torch.channels_last))
        rows = torch.cat([chosen, softened])
        loss = sum(F.cross_entropy(logits[kind], truth[kind][rows], label_smoothing=0.02) for kind in KINDS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        checkpoint.maybe(ruler, optimizer, step + 1, log.seconds)
        if step % 100 == 0 or step + 1 == steps:
            log(step=step, loss=float(loss.detach()))
    return ruler.eval()


def accuracies(ruler: Ruler, pixels: np.ndarray, pictures: list[Picture]) -> dict[str, float]:
    """Share of pictures whose attribute is read correctly, per attribute."""
    found = ruler.read(torch.from_numpy(np.array(pixels)).float() / 255)
    truth = labels(pictures)
    return {kind: float(found[kind].eq(truth[kind]).float().mean()) for kind in KINDS}
