"""The embedded base as an inpainting or a depth model: a wider first convolution and a LoRA, trained on the rendered world.

The network is given what StableDiffusionInpaintPipeline or StableDiffusionDepth2ImgPipeline gives it (`masks`): the world
knows the true mask and depth of every picture. The new input channels start at zero and so does the LoRA (Hu et al. 2021,
2106.09685): step zero is the base. Only these train, so that the result is a small file beside the base (`model.delta`).

Pictures are drawn as they are needed and none comes twice, so there is nothing to prepare, and going on after an
interruption needs no more than the step. Drawing and encoding take a quarter of a step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finetune import draws, runs
from finetune.data.source import MicroBatch
from finetune.diffusion import snr
from finetune.errors import Problem
from finetune.methods.base import Group, Loaded, Method
from finetune.model import delta
from finetune.model.base import Base, load
from finetune.model.conditioning import Cond
from finetune.model.text import encode
from finetune.settings import TrainSettings, setting
from finetune.toybox.captions import caption, full_caption
from finetune.toybox.datasets import describe
from finetune.toybox.evaluation import toybox_folder
from finetune.toybox.masks import depth_channels, draw_mask, inpainting_channels
from finetune.toybox.variant import free, same_training, write_folder
from finetune.toybox.world import Shot, render_shot
from finetune.training import checkpoint
from finetune.training.loop import fit, prepare, timesteps_of, validation_loss
from finetune.training.meter import Meter

VALIDATION = 64  # pictures of the fixed set, the first of those described
FILE = "delta.safetensors"
# The new channels begin at zero and have far to go; the LoRA at that rate would unsettle the network before they say anything.
CONV_RATE = 4.0


class Settings(TrainSettings):
    """Of both variants."""

    METHOD: ClassVar[str] = "variant"

    batch_size: int = setting(8, "pictures per step", unit="pictures", ge=1)
    caption_dropout: float = setting(0.1, "share of rows with an empty prompt, for classifier-free guidance", unit="share", group="prompts", ge=0, le=1)
    beta2: float = setting(0.99, "AdamW: memory of the gradient square", ge=0, lt=1)
    snr_gamma: float = setting(5.0, "min-SNR weighting of rows; 5 is usual, 0 is off", ge=0)
    rank: int = setting(16, "rank of the LoRA", group="method", ge=1)


class LowRank(nn.Module):
    """W + up @ down in place of a weight W, of a linear layer or a convolution (flattened); up starts at zero."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


class Widened(Method):
    """Trains the first convolution's new channels and a LoRA; the loop asks it like any method."""

    name = "variant"
    title = "Variant"
    paper = "Rombach et al. 2022, arXiv 2112.10752"
    Settings = Settings

    def __init__(self, settings: TrainSettings, variant: str, start: Path | None = None):
        super().__init__(settings)
        self.variant, self.start = variant, start
        self.channels: Tensor | None = None  # of the rows at hand, (B, C, h, w); the source sets it with each micro-batch

    def attach(self, base: Base) -> list[Group]:
        delta.widen(base.unet, delta.CHANNELS[self.variant])
        modules = {name: module for name, module in base.unet.named_modules() if adapted(name, module)}
        self.pairs = {name: LowRank(module.weight, self.settings.rank) for name, module in modules.items()}
        for name, module in modules.items():
            parametrize.register_parametrization(module, "weight", self.pairs[name])
        first, pairs = base.unet.conv_in, self.pairs.items()
        if self.start is not None:
            self._take_up(first, load_file(self.start))
        self.old = first.weight[:, :4].detach().clone()
        return [Group({"conv_in.weight": first.weight}, rate=CONV_RATE),
                Group({f"{name}.{part}": getattr(pair, part) for name, pair in pairs for part in ("down", "up")})]

    @torch.no_grad()
    def _take_up(self, first: nn.Conv2d, tensors: dict[str, Tensor]) -> None:
        """Begin with what an earlier training left."""
        first.weight.copy_(tensors["conv_in.weight"])
        for name, pair in self.pairs.items():
            pair.down.copy_(tensors[f"{name}.down"])
            pair.up.copy_(tensors[f"{name}.up"])

    @torch.no_grad()
    def after_step(self, base: Base) -> None:
        """The latents' own channels stay as they were: moving them only unsettles what the base can do."""
        base.unet.conv_in.weight[:, :4] = self.old

    @torch.no_grad()
    def condition(self, base: Base, captions: list[str]) -> Cond:
        """Encoded anew: captions of ever new pictures are seldom the same, and encoding eight takes a hundredth of a step."""
        return encode(base, captions)

    def denoise(self, base: Base, noisy: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        return base.ask(noisy, timesteps, cond, extra=self.channels)

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """FOLDER/delta.safetensors."""
        pairs = {name: (pair.down, pair.up) for name, pair in self.pairs.items()}
        delta.write(folder / FILE, base.unet.conv_in, pairs, variant=self.variant, base=base.hash, facts=metadata)

    def expected_bytes(self, base: Base) -> int:
        return 2 * sum(value.numel() for pair in self.pairs.values() for value in pair.parameters())

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """A variant is a model, not an artifact."""
        return None

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        raise Problem(f"{path} is a model, not an artifact.", "A variant replaces the base.", "Name it with --model.")


def adapted(name: str, module: nn.Module) -> bool:
    """Whether a module of the UNet gets a LoRA: the layers of the attention blocks, and the convolutions between them.

    Where something is in the picture travels through the convolutions; with the attention blocks alone it is learned slowly.
    """
    return name not in ("conv_in", "conv_out") and (isinstance(module, nn.Conv2d) or ".attentions." in name and isinstance(module, nn.Linear))


class ShotSource:
    """Rows of the rendered world, drawn when they are asked for; row n is a function of the seed and n alone."""

    def __init__(self, base: Base, method: Widened, settings: Settings):
        self.base, self.method, self.settings = base, method, settings
        self.pictures = describe(VALIDATION + settings.steps * settings.batch_size, settings.seed + 7_000_000)
        self._fixed: list[tuple[MicroBatch, Tensor]] = []

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> MicroBatch:
        """One micro-batch; its channels go to the method."""
        first = VALIDATION + step * self.settings.batch_size
        rows, self.method.channels = self._rows("instance", range(first, first + self.settings.batch_size))
        return rows

    def validation(self) -> Iterator[MicroBatch]:
        """The fixed set, always with the same captions, masks and noises."""
        if not self._fixed:
            self._fixed = [self._rows("validation", range(start, start + 16)) for start in range(0, VALIDATION, 16)]
        for rows, channels in self._fixed:
            self.method.channels = channels
            yield rows

    @torch.no_grad()
    def _rows(self, kind: str, numbers: range) -> tuple[MicroBatch, Tensor]:
        """Pictures in the posterior's draws, captions, and the channels beside the latents."""
        seed, captions, shots, masks = self.settings.seed, [], [], []
        for number in numbers:
            random = Random(draws.key(seed, "variant row", kind, number))
            shot = render_shot(self.pictures[number])
            shots.append(shot.mirrored() if random.random() < 0.5 else shot)
            masks.append(draw_mask(shots[-1].mask, random))
            # half of the rows name everything, as in the base's own training
            words = full_caption(self.pictures[number]) if random.random() < 0.5 else caption(self.pictures[number], random).text
            captions.append("" if kind == "instance" and random.random() < self.settings.caption_dropout else words)
        pixels = pictures_of(shots)
        posterior = self.base.vae.encode(pixels).latent_dist
        noise = [torch.stack([draws.normal(tuple(posterior.mean.shape[1:]), seed, stream, kind, number) for number in numbers])
                 for stream in ("vae", "vae of the masked")]
        latents = (posterior.mean + posterior.std * noise[0]) * self.base.vae.config.scaling_factor
        if self.method.variant == "depth":
            channels = depth_channels(torch.from_numpy(np.stack([np.array(shot.depth) for shot in shots]))[:, None], tuple(latents.shape[-2:]))
        else:
            channels = inpainting_channels(self.base.vae, pixels, torch.from_numpy(np.stack(masks))[:, None].float(), noise[1])
        keys = [(kind, number) for number in numbers]
        rows = MicroBatch(latents, captions, torch.ones(len(keys)), len(keys), [f"picture {number}" for number in numbers], keys)
        timesteps = timesteps_of(rows, seed, len(self.base.schedule))
        # Where there is much noise an error in the noise is a small part of the error in the picture, and there the
        # channels matter most: those rows count as an error of v would, up to eight times.
        return replace(rows, weights=(1 + 1 / snr(timesteps, self.base.schedule)).clamp(max=8)), channels


def pictures_of(shots: list[Shot]) -> Tensor:
    """The pictures as the autoencoder takes them, (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.array(shot.picture) for shot in shots])).permute(0, 3, 1, 2).float() / 127.5 - 1


def widened(model: str, variant: str, output: Path, *, steps: int = 500, rate: float = 7e-4, rank: int = 16, seed: int = 0,
            start: Path | None = None, console: Console | None = None) -> Path:
    """Write `output`: a whole diffusers folder of the variant, and in it delta.safetensors, which is all that differs.

    Args:
        model: a base of the toybox family that predicts the noise.
        variant: "inpainting" or "depth".
        output: folder to make; beside it OUTPUT.work holds checkpoints until it is done, and a training that was
            interrupted goes on from there.
        steps: of 8 pictures.
        rate, rank: of the LoRA; the peak of a rate that rises for 25 steps and falls to zero. The convolution's is
            CONV_RATE times as large.
        seed: of pictures, masks, noises and timesteps.
        start: a delta to go on from, of the same variant, base and rank; give another seed, or its pictures come again.

    Raises:
        Problem: another family, a base that predicts v, a start that does not fit, or `output` is in use.
    """
    console, output, source = console or Console(), Path(output), toybox_folder(model)
    free(output)
    base = load(model)
    if base.prediction != "epsilon" or base.unet.config.in_channels != 4:
        raise Problem(f"The model {model!r} is a variant already.", "The delta is trained on a plain base that predicts the noise.", "Leave --model out.")
    work, started = output.with_name(output.name + ".work"), time.perf_counter()
    before = begun(start, variant, base.hash, rank)
    same_training(work, {"variant": variant, "base": base.hash, "steps": steps, "rate": rate, "rank": rank, "seed": seed,
                         "start": None if start is None else runs.sha256(start)}, console)
    settings = Settings(model=model, steps=steps, learning_rate=rate, warmup=min(25, steps), rank=rank, seed=seed, resolution=64)
    method = Widened(settings, variant, start)
    measured = train(base, method, settings, work, console)
    command = f"finetune toybox variant {variant} --steps {steps} --learning-rate {rate:g} --rank {rank} --seed {seed}"
    if before:
        command = f"{before['command']}, then {command} --start delta.safetensors"
    finish(base, method, work, {"steps": str(steps + int(before.get("steps", 0))), "rank": str(rank), "command": command})
    write_folder(work, output, command, {"base": base.hash, "seed": seed}, measured, time.perf_counter() - started, source, variant)
    console.print(f"{steps} steps; loss on fixed pictures {measured['validation loss before']:.4f} -> {measured['validation loss']:.4f}", soft_wrap=True)
    return output


def begun(start: Path | None, variant: str, base_hash: str, rank: int) -> dict[str, str]:
    """What the delta to go on from says of itself; nothing where there is none.

    Raises:
        Problem: it is of another variant, base or rank.
    """
    if start is None:
        return {}
    found = delta.facts(start)
    if (found["variant"], found["base"], found.get("rank")) != (variant, base_hash, str(rank)):
        raise Problem(f"The training cannot go on from {start}.", f"That is a {found['variant']} delta of rank {found.get('rank')} on the weights {found['base']}, "
                      f"and asked for is {variant} of rank {rank} on {base_hash}.", "Give the same variant, --model and --rank.")
    return found


def train(base: Base, method: Widened, settings: Settings, work: Path, console: Console, log_every: int = 50, save_every: int = 100) -> dict[str, float]:
    """Train by the project's loop; restartable. Returns the loss on the fixed pictures before and after."""
    accelerator = Accelerator(cpu=base.device.type == "cpu")
    state = prepare(base, method, settings, accelerator)
    base.unet.to(memory_format=torch.channels_last)
    source, values = ShotSource(base, method, settings), settings.model_dump(mode="json")
    if checkpoint.complete(work):
        checkpoint.check(work, values)
        checkpoint.restore(work, state)
    else:
        runs.append_metrics(work, step=0, validation_loss=validation_loss(base, method, source, settings))
    losses: list[float] = []
    with Meter(console, method.variant, settings.steps, state.step) as meter:
        for progress in fit(base, method, source, settings, accelerator, state):
            losses.append(float(progress.loss))
            if state.step % log_every == 0:
                mean = sum(losses) / len(losses)
                meter.to(state.step, mean)
                runs.append_metrics(work, step=state.step, loss=mean, seconds=round(progress.seconds, 2))
                if not console.is_terminal:
                    console.print(f"step {state.step} of {settings.steps}: loss {mean:.4f}, {progress.seconds:.2f} s a step", soft_wrap=True)
                losses.clear()
            if state.step % save_every == 0 or state.step == settings.steps:
                checkpoint.save(work, state, values, keep=1)
                runs.append_metrics(work, step=state.step, validation_loss=validation_loss(base, method, source, settings))
    found = [line["validation_loss"] for line in runs.read_metrics(work) if "validation_loss" in line]
    return {"validation loss before": found[0], "validation loss": found[-1], "steps": float(settings.steps)}


def finish(base: Base, method: Widened, work: Path, metadata: dict[str, str]) -> None:
    """WORK/delta.safetensors, and WORK/base with the delta folded in as every reader of the file would."""
    from finetune.toybox.base import save_text_encoder
    from finetune.toybox.tokenizer import save as save_tokenizer

    method.export(base, work, metadata)
    shutil.rmtree(work / "base", ignore_errors=True)
    fresh = load(base.name)
    delta.apply(fresh.unet, work / FILE, fresh.hash)
    fresh.unet.save_pretrained(work / "base" / "unet")
    fresh.vae.save_pretrained(work / "base" / "vae")
    save_text_encoder(fresh.text_encoder, work / "base" / "text_encoder")
    save_tokenizer(fresh.tokenizer, work / "base" / "tokenizer")
    from diffusers import DDIMScheduler
    DDIMScheduler.from_config(fresh.scheduler_config).save_pretrained(work / "base" / "scheduler")
