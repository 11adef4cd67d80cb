"""Pictures to latents: the VAE's posterior is computed once per picture and flip, and sampled anew for every row.

Shapes: B batch, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import draws, runs
from finetune.data.picture import Picture, cut, fit, shrink
from finetune.data.rows import Row
from finetune.settings import TrainSettings


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to float32 (3, H, W) in [-1, 1], the range of the Stable Diffusion VAE."""
    values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return (values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def cache_folder(root: Path, settings: TrainSettings, weights: str) -> Path | None:
    """Where posteriors of these weights at this resolution are kept with --latent-cache disk; None otherwise."""
    if settings.latent_cache != "disk" or settings.crop == "random":
        return None
    return Path(root) / hashlib.sha256(f"{weights} {settings.resolution} {settings.crop} profiles".encode()).hexdigest()[:16]


class Latents:
    """Latents of one kind of pictures (instance or class).

    With crop "center" or "none" a picture has one posterior per flip, so its mean and standard deviation are kept
    in float32 on the CPU and a row costs one draw: z = mean + std * normal (Kingma & Welling 2014, eq. 10), then
    (z - shift) * scale as the model's VAE configuration says (Rombach et al. 2022, app. G). With crop "random"
    every row is encoded. Pictures pass the VAE one at a time, so a row's latents do not depend on its batch.

    Args:
        vae: AutoencoderKL, frozen, already on `device`.
        pictures: what `Row.picture` counts.
        settings: reads resolution and crop.
        device: where the results go.
        cache: folder in which posteriors are kept for later runs, by the picture's content, or None for memory. Its name must
            stand for the VAE's weights (see `cache_folder`).
    """

    def __init__(self, vae: torch.nn.Module, pictures: Sequence[Picture], settings: TrainSettings,
                 device: str | torch.device = "cpu", cache: Path | None = None):
        self.vae, self.pictures, self.settings, self.device, self.cache = vae, pictures, settings, torch.device(device), cache
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self._moments: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._shrunk: dict[int, Image.Image] = {}

    def sample(self, rows: Sequence[Row], seed: int, stream: str = "vae") -> Tensor:
        """Scaled latents (B, C, h, w), float32, each drawn with its row's own key (seed, stream, kind, index)."""
        found = []
        for row in rows:
            mean, std = self.moments(row)
            noise = draws.normal(tuple(mean.shape), seed, stream, row.kind, row.index)
            found.append((mean + std * noise - self.shift) * self.scale)
        return torch.stack(found).to(self.device, non_blocking=True)

    def fixed(self, picture: int) -> Tensor:
        """Scaled posterior mean (C, h, w) of a picture, unflipped, centre crop unless the settings squeeze it: for validation."""
        row = Row(picture, False, (0.5, 0.5), "", 1.0, "instance", 0)
        mean, _ = self._encode(row) if self.settings.crop == "random" else self.moments(row)
        return ((mean - self.shift) * self.scale).to(self.device, non_blocking=True)

    def moments(self, row: Row) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (C, h, w) of a row's picture, from the cache where there is one."""
        if self.settings.crop == "random":
            return self._encode(row)
        if self.cache:
            return self._from_disk(row)
        key = (row.picture, row.flip)
        if key not in self._moments:
            self._moments[key] = self._encode(row)
        return self._moments[key]

    def _from_disk(self, row: Row) -> tuple[Tensor, Tensor]:
        """The same from a file, which is written when it is not there or cannot be read."""
        file = self.cache / f"{self.pictures[row.picture].sha256}{'-flipped' * row.flip}.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            found = load_file(file)
            return found["mean"], found["std"]
        mean, std = self._encode(row)
        with runs.atomic_path(file) as temporary:
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, temporary)
        return mean, std

    @torch.no_grad()
    def _encode(self, row: Row) -> tuple[Tensor, Tensor]:
        pixels = to_tensor(self._square(row)).unsqueeze(0).to(self.device, self.vae.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()

    def _square(self, row: Row) -> Image.Image:
        """The row's training square. For random crops the resized picture is kept: decoding a photo costs far more than a cut."""
        if self.settings.crop == "random":
            if row.picture not in self._shrunk:
                self._shrunk[row.picture] = shrink(self.pictures[row.picture].load(), self.settings.resolution)
            image = cut(self._shrunk[row.picture], self.settings.resolution, row.place)
        else:
            image = fit(self.pictures[row.picture].load(), self.settings.resolution, self.settings.crop)
        return ImageOps.mirror(image) if row.flip else image
