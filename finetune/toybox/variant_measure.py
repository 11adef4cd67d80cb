"""What the inpainting and depth variants can do, measured against the plain base that is asked the same.

Every picture asked about is one of the world with known mask and depth, of seeds that nothing was trained with. The ruler
reads what was drawn, the silhouette reader where. The plain base repaints by diffusers' rule for ordinary models: after
each step everything outside the mask is put back, as noisy as the step asks.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune import runs
from finetune.evaluation import statistics
from finetune.model import delta, load, render
from finetune.model.base import Base
from finetune.model.families import TOYBOX
from finetune.model.text import encode
from finetune.toybox import autoencoder
from finetune.toybox.bars import wilson
from finetune.toybox.captions import full_caption
from finetune.toybox.datasets import describe
from finetune.toybox.masks import box_mask, depth_channels
from finetune.toybox.ruler import Ruler, labels
from finetune.toybox.silhouette import Reader, overlap
from finetune.toybox.world import COLOUR_NAMES, STYLES, Picture, Shot, render_shot, seconds_for

VARIANTS = TOYBOX / "variants"
STEPS, GUIDANCE, SAMPLER, BATCH = 15, 4.0, "dpm++", 20
SEEDS = {"asked": 601, "other": 602, "noise": 603}
Say = Callable[[str], None]
Rows = dict[str, dict[str, dict[str, Any]]]  # measure -> who -> mean, low, high, n


def measure(variant: str, count: int = 200, say: Say = print) -> dict[str, Any]:
    """Measure one shipped variant.

    Args:
        variant: "inpainting" or "depth".
        count: pictures of each task. say: told in a sentence what happens.

    Returns:
        What VARIANT.json holds: measured rows, protocol, facts of the delta, versions, seconds.
    """
    started = time.perf_counter()
    path = VARIANTS / f"{variant}.safetensors"
    plain, wide = load("toybox"), load("toybox")
    delta.apply(wide.unet, path, wide.hash)
    ruler = Ruler.load(TOYBOX / "ruler.safetensors")
    task = {"inpainting": inpainting, "depth": depth}[variant]
    rows = task(plain, wide, ruler, count, say)
    return {"variant": variant, "count": count, "measured": rows, "delta": delta.facts(path), "bytes": path.stat().st_size,
            "sampler": {"name": SAMPLER, "steps": STEPS, "guidance": GUIDANCE}, "seeds": SEEDS, "model_hash": plain.hash,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__},
            "seconds": round(time.perf_counter() - started, 1)}


# ---- inpainting -----------------------------------------------------------------------------------------------------


def inpainting(plain: Base, wide: Base, ruler: Ruler, count: int, say: Say) -> Rows:
    """Another thing in the box round the one that is there; and half of a picture completed."""
    asked = describe(count, SEEDS["asked"])
    shots = [render_shot(picture) for picture in asked]
    true = np.stack([np.array(shot.picture).transpose(2, 0, 1) for shot in shots])
    rows: Rows = {}

    wanted = [replace(other, scene=picture.scene, style=picture.style)
              for picture, other in zip(asked, describe(count, SEEDS["other"]), strict=True)]
    boxes = np.stack([box_mask(shot.mask, 3) for shot in shots])
    through = autoencoder.reconstruct(plain.vae, true)
    for who, base in (("variant", wide), ("plain base", plain)):
        drawn = repainted(base, wanted, shots, boxes, _told(say, f"another thing, {who}", count))
        found, truth = ruler.read(torch.from_numpy(drawn).float() / 255), labels(wanted)
        for kind in ("class", "colour", "pattern"):
            rows.setdefault(f"another thing in the box: {kind} as prompted", {})[who] = _share(found[kind].eq(truth[kind]))
        rows.setdefault("outside the box: PSNR to the picture, dB", {})[who] = _mean(psnr(drawn, true, ~boxes))
    rows["outside the box: PSNR to the picture, dB"]["picture through the autoencoder"] = _mean(psnr(through, true, ~boxes))

    halves = np.zeros_like(boxes)
    halves[0::2, :, :32] = True
    halves[1::2, :, 32:] = True
    for who, base in (("variant", wide), ("plain base", plain)):
        drawn = repainted(base, asked, shots, halves, _told(say, f"half a picture, {who}", count))
        rows.setdefault("half a picture completed: PSNR of that half, dB", {})[who] = _mean(psnr(drawn, true, halves))
    rows["half a picture completed: PSNR of that half, dB"]["picture through the autoencoder"] = _mean(psnr(through, true, halves))
    return rows


def repainted(base: Base, wanted: list[Picture], shots: list[Shot], masks: np.ndarray, told: Callable[[int], None]) -> np.ndarray:
    """Pictures repainted inside masks by diffusers' own pipeline, uint8 (N, 3, 64, 64); picture k starts from noise of seed + k.

    Args:
        masks: bool (N, 64, 64), True = repaint.
    """
    pipe = diffusers.StableDiffusionInpaintPipeline(vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
                                                    scheduler=sampler(base), safety_checker=None, feature_extractor=None,
                                                    requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    drawn: list[Image.Image] = []
    for start in range(0, len(wanted), BATCH):
        chunk = slice(start, start + BATCH)
        prompts = [full_caption(picture) for picture in wanted[chunk]]
        drawn += pipe(prompt=prompts, image=[shot.picture for shot in shots[chunk]],
                      mask_image=[Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks[chunk]], height=64, width=64, strength=1.0,
                      num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                      generator=[torch.Generator().manual_seed(SEEDS["noise"] + start + place) for place in range(len(prompts))]).images
        told(len(drawn))
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in drawn])


def sampler(base: Base) -> Any:
    """DPM-Solver++ (Lu et al. 2022) with the base's noise schedule."""
    config = {key: value for key, value in base.scheduler_config.items() if not key.startswith("_")}
    return diffusers.DPMSolverMultistepScheduler.from_config(config)


def psnr(drawn: np.ndarray, true: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture over the pixels of its mask, (N,).

    Args:
        drawn, true: uint8 (N, 3, H, W). where: bool (N, H, W). Pictures without a pixel to compare are left out.
    """
    error = np.square(drawn.astype(np.float64) - true).mean(axis=1)
    return np.array([10 * np.log10(255**2 / max(error[row][where[row]].mean(), 1e-3)) for row in range(len(drawn)) if where[row].any()])


# ---- depth ----------------------------------------------------------------------------------------------------------


def depth(plain: Base, wide: Base, ruler: Ruler, count: int, say: Say) -> Rows:
    """The depth of a picture, and a prompt for the same thing in the same place with another look and style."""
    asked = describe(count, SEEDS["asked"])
    shots = [render_shot(picture) for picture in asked]
    wanted = [relooked(picture, place) for place, picture in enumerate(asked)]
    masks = torch.from_numpy(np.stack([np.array(shot.mask) > 127 for shot in shots]))
    reader, rows = Reader.load(VARIANTS / "silhouette.safetensors"), Rows()
    channels = depth_channels(torch.from_numpy(np.stack([np.array(shot.depth) for shot in shots]))[:, None], (16, 16))
    for who, base, extra in (("variant", wide, channels), ("plain base", plain, None)):
        drawn = given_depth(base, wanted, extra, _told(say, f"depth, {who}", count))
        seen = torch.from_numpy(drawn).float() / 255
        found, truth = ruler.read(seen), labels(wanted)
        rows.setdefault("silhouette: IoU with the given thing's", {})[who] = _mean(overlap(reader.read(seen), masks).numpy())
        for kind in ("class", "colour", "pattern", "scene", "style"):
            rows.setdefault(f"{kind} as prompted", {})[who] = _share(found[kind].eq(truth[kind]))
    true = np.stack([np.array(shot.picture).transpose(2, 0, 1) for shot in shots])
    through = torch.from_numpy(autoencoder.reconstruct(plain.vae, true)).float() / 255
    rows["silhouette: IoU with the given thing's"]["picture through the autoencoder"] = _mean(overlap(reader.read(through), masks).numpy())
    return rows


def relooked(picture: Picture, place: int) -> Picture:
    """The same thing in the same place, in another colour and the next style."""
    colour = COLOUR_NAMES[(COLOUR_NAMES.index(picture.colour) + 3) % len(COLOUR_NAMES)]
    second = None if picture.pattern == "plain" else seconds_for(colour)[place % len(seconds_for(colour))]
    return replace(picture, colour=colour, second=second, style=STYLES[(STYLES.index(picture.style) + 1 + place % 3) % len(STYLES)])


@torch.no_grad()
def given_depth(base: Base, wanted: list[Picture], channels: Tensor | None, told: Callable[[int], None]) -> np.ndarray:
    """Pictures of the prompts, uint8 (N, 3, 64, 64), with the depth channels (N, 1, 16, 16) beside the latents where there are any."""
    prompts, drawn = [full_caption(picture) for picture in wanted], []
    for start in range(0, len(prompts), BATCH):
        texts = prompts[start:start + BATCH]
        seeds = [SEEDS["noise"] + start + place for place in range(len(texts))]
        if channels is None:
            pictures = render(base, texts, seeds, steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER, batch=BATCH)
            drawn.append(np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]))
        else:
            drawn.append(_sampled(base, texts, seeds, channels[start:start + len(texts)]))
        told(start + len(texts))
    return np.concatenate(drawn)


def _sampled(base: Base, texts: list[str], seeds: list[int], extra: Tensor) -> np.ndarray:
    """Classifier-free guidance with the same channels on both sides, as StableDiffusionDepth2ImgPipeline does it."""
    steps = sampler(base)
    steps.set_timesteps(STEPS)
    told, silent = encode(base, texts), encode(base, [""] * len(texts))
    latents = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]) * steps.init_noise_sigma
    for timestep in steps.timesteps:
        noisy = steps.scale_model_input(latents, timestep)
        without, with_text = (base.ask(noisy, timestep, cond, extra=extra) for cond in (silent, told))
        latents = steps.step(without + GUIDANCE * (with_text - without), timestep, latents).prev_sample
    return autoencoder.to_pixels(base.vae.decode(latents / base.vae.config.scaling_factor).sample)


# ---- numbers and the page -------------------------------------------------------------------------------------------


def _share(right: Tensor) -> dict[str, Any]:
    low, high = wilson(int(right.sum()), len(right))
    return {"mean": float(right.float().mean()), "low": low, "high": high, "n": len(right)}


def _mean(values: np.ndarray) -> dict[str, Any]:
    return asdict(statistics.interval(np.asarray(values, dtype=np.float64)))


def _told(say: Say, what: str, total: int) -> Callable[[int], None]:
    return lambda done: say(f"{what}: {done} of {total}") if done % 100 == 0 or done == total else None


PAGE = """\
# Variants of toybox

Small files that turn the embedded base into an inpainting model (9 input channels) and a depth model (5), for
`--model toybox-inpainting` and `--model toybox-depth`. Each holds the first convolution and a LoRA in fp16, and the hash of the
base it belongs to. This page and the JSON files beside it are written by `finetune toybox evaluate inpainting|depth --output FOLDER`.

Samples: {sampler}, {steps} steps, guidance {guidance:g}. Pictures, prompts and noises are of seeds that nothing was trained with.
In brackets: 95 % intervals (shares: Wilson; means: bootstrap over pictures).
"""
MEANING = {
    "inpainting": """\
- *another thing in the box*: the box round a picture's thing, three pixels wider, is repainted; the prompt names another thing, in the
  same place and style. The ruler, a classifier trained apart, reads what is there then.
- *outside the box*: what must stay. The network makes the whole picture anew; nothing of the original is pasted over it.
- *half a picture completed*: the left or right half is repainted, and the prompt says what the whole picture shows. How near
  the half comes to what was there: the other half of the thing tells its size and place.
- *plain base*: the same by diffusers' rule for ordinary models (after each step the rest is put back, noised).
""",
    "depth": """\
- *silhouette*: where the thing is drawn, against where the given depth has it: intersection over union of masks. A small
  network trained on true masks (`silhouette.safetensors`) reads them from the pictures; what it reads from the true pictures
  through the autoencoder is the most that can be expected.
- The prompt names the thing and the place of the given picture, with another colour and another style.
- *plain base*: the same prompts and seeds without the depth. It draws things in the middle too: its overlap is what chance gives.
""",
}


def write_page(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Write VARIANT.json, and README.md from all such files in the folder. Returns their paths."""
    numbers, page = folder / f"{found['variant']}.json", folder / "README.md"
    runs.write_json(numbers, found)
    known = [runs.read_json(path) for path in (folder / f"{variant}.json" for variant in delta.CHANNELS) if path.is_file()]
    protocol = found["sampler"]
    runs.write_text(page, "\n".join([PAGE.format(sampler=protocol["name"], steps=protocol["steps"], guidance=protocol["guidance"]),
                                     *(section(one) for one in known)]))
    return [numbers, page]


def section(found: dict[str, Any]) -> str:
    """One variant: table, what its rows mean, how it was made."""
    rows: Rows = found["measured"]
    made, who = found["delta"], ["variant", "plain base", "picture through the autoencoder"]
    lines = [f"## {found['variant'].capitalize()}\n", f"{found['count']} pictures of each kind, base {found['model_hash']}, {found['bytes'] / 1024:,.0f} KiB.\n",
             "| | variant | plain base | picture through the autoencoder |", "|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(shown(row.get(one)) for one in who) + " |" for name, row in rows.items()]
    return "\n".join([*lines, "", MEANING[found["variant"]], f"Made by `{made['command']}`.\n"])


def shown(value: dict[str, Any] | None) -> str:
    """`.985 (.97-.99)` for a share, `24.31 (23.9-24.7)` for decibels."""
    if value is None:
        return ""
    digits = 3 if value["mean"] <= 1 else 2
    return f"{value['mean']:.{digits}f} ({value['low']:.{digits - 1}f}-{value['high']:.{digits - 1}f})".replace("(0.", "(.").replace("-0.", "-.").removeprefix("0")
