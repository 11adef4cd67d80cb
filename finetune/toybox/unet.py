"""The toybox's UNet, trained from nothing by the project's own loop on cached latents of the rendered world."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from rich.console import Console
from safetensors import safe_open

from finetune import draws, methods, runs
from finetune.data.source import MicroBatch
from finetune.methods.base import Method
from finetune.model.base import Base, load
from finetune.settings import TrainSettings
from finetune.training import checkpoint
from finetune.training.loop import fit, prepare, validation_loss
from finetune.training.meter import Meter

RESERVED = 256  # pictures kept out of training, for the validation loss
CHANNELS = (64, 128, 192)


def make_unet(context_width: int) -> UNet2DConditionModel:
    """Stable Diffusion 1's classes at a hundredth of its size; no width equals the text's (docs/formats.md, "Hypernetwork .pt")."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context_width, attention_head_dim=4, norm_num_groups=16)


class LatentSource:
    """Rows of cached latents and captions, every choice drawn by (seed, stream, row number).

    Args:
        work: folder with latents.safetensors and captions.jsonl.
        scale: the autoencoder's scaling factor.
    """

    def __init__(self, work: Path, scale: float, settings: TrainSettings):
        self.settings, self.scale = settings, scale
        with safe_open(work / "latents.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.captions = [json.loads(line)["captions"] for line in (work / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        self.count = len(self.captions) - RESERVED

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> MicroBatch:
        """One micro-batch; see `finetune.data.source.Source.batch`."""
        size = self.settings.batch_size
        first = ((step * self.settings.accumulate + micro) * world + rank) * size
        return self._rows([("instance", first + place) for place in range(size)])

    def validation(self) -> list[MicroBatch]:
        """The reserved pictures, always with the same captions and noises."""
        return [self._rows([("validation", start + place) for place in range(32)]) for start in range(0, 128, 32)]

    def _rows(self, keys: list[tuple[str, int]]) -> MicroBatch:
        latents, captions = [], []
        for kind, number in keys:
            flip, pick, drop = draws.uniform(3, self.settings.seed, "row", kind, number)
            if kind == "validation":
                picture, suffix, drop = self.count + number, "", 1.0
            else:
                epoch, place = divmod(number, self.count)
                picture, suffix = self._order(epoch)[place], "_flipped" if flip < 0.5 else ""
            mean, std = self.tensors[f"mean{suffix}"][picture].float(), self.tensors[f"std{suffix}"][picture].float()
            latents.append((mean + std * draws.normal(tuple(mean.shape), self.settings.seed, "vae", kind, number)) * self.scale)
            choices = self.captions[picture]
            # half of the rows name everything, so that every word is seen bound to its look
            words = choices[0] if pick < 0.5 else choices[int((pick - 0.5) * 2 * len(choices))]
            captions.append("" if drop < self.settings.caption_dropout else words)
        return MicroBatch(torch.stack(latents), captions, torch.ones(len(keys)), len(keys), [f"picture {number}" for _, number in keys], keys)

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, draws.order(self.count, self.settings.seed, "order", epoch)
        return self._permutation


def train_unet(work: Path, steps: int = 5200, seed: int = 0, console: Console | None = None, log_every: int = 50, save_every: int = 400,
               rate: float | None = None, warmup: int = 200) -> dict[str, float]:
    """Train WORK/base/unet with the fifth strategy; restartable: goes on from its newest checkpoint in WORK/unet.

    A UNet that lies in WORK/base/unet already is where training starts (with `rate` as its peak learning rate, reached after `warmup` steps).

    The averaged weights so far lie in WORK/base/unet-trained after every save; at the end they become WORK/base/unet.
    Returns the last validation loss, as the stages' other trainings return what they measured.
    """
    console = console or Console()
    folder, base = work / "unet", fresh_base(work, seed)
    folder.mkdir(exist_ok=True)
    given = {} if rate is None else {"learning_rate": rate}
    settings = methods.get("pretrain").Settings(model=str(work / "base"), steps=steps, seed=seed, warmup=warmup, resolution=64, **given)
    method = methods.get("pretrain")(settings)
    source = LatentSource(work, base.vae.config.scaling_factor, settings)
    accelerator = Accelerator(cpu=base.device.type == "cpu")
    state = prepare(base, method, settings, accelerator)
    base.unet.to(memory_format=torch.channels_last)
    values = settings.model_dump(mode="json")
    if checkpoint.complete(folder):
        checkpoint.check(folder, values)
        checkpoint.restore(folder, state)
    losses: list[float] = []
    started = time.perf_counter()
    with Meter(console, "unet", steps, state.step) as meter:
        for progress in fit(base, method, source, settings, accelerator, state):
            losses.append(float(progress.loss))
            if state.step % log_every == 0:
                meter.to(state.step, sum(losses) / len(losses))
                runs.append_metrics(folder, step=state.step, loss=sum(losses) / len(losses), seconds=round(time.perf_counter() - started, 1))
                losses.clear()
            if state.step % save_every == 0 or state.step == steps:
                checkpoint.save(folder, state, values, keep=1)
                with method.exported():
                    runs.append_metrics(folder, step=state.step, validation_loss=validation_loss(base, method, source, settings))
                write_unet(base, method, work)
    shutil.rmtree(work / "base" / "unet")
    shutil.copytree(work / "base" / "unet-trained", work / "base" / "unet")
    return {"validation loss": runs.read_metrics(folder)[-1]["validation_loss"], "steps": float(steps)}


def fresh_base(work: Path, seed: int) -> Base:
    """WORK/base with a UNet of random weights drawn from the seed."""
    target = work / "base" / "unet"
    if not target.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws.key(seed, "unet"))
            make_unet(json.loads((work / "base" / "text_encoder" / "config.json").read_text())["hidden_size"]).save_pretrained(target)
    return load(str(work / "base"))


def write_unet(base: Base, method: Method, work: Path) -> None:
    """Put the averaged weights in place as WORK/base/unet-trained (float32), whole or not at all."""
    fresh, target = work / "unet-part", work / "base" / "unet-trained"
    shutil.rmtree(fresh, ignore_errors=True)
    method.export(base, fresh, {})
    shutil.rmtree(target, ignore_errors=True)
    (fresh / "unet").rename(target)
    shutil.rmtree(fresh, ignore_errors=True)
