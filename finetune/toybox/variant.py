"""The embedded base as a v-prediction model: the same UNet, fine-tuned on the rendered world to say v instead of the noise.

v = sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho, 2022, appendix D). A network that says e says nearly v where there is
little noise (a near 1), and nearly nothing of it where there is much: there v is -x_0, a picture to be painted from the
prompt. So the low noises come for free and the high ones are what these steps teach. Nothing but the UNet changes.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler
from rich.console import Console
from torch import Tensor

from finetune import runs
from finetune.errors import Problem
from finetune.model.base import Base, load
from finetune.toybox.base import save_text_encoder, write_captions, write_latents
from finetune.toybox.datasets import describe, pixels
from finetune.toybox.evaluation import toybox_folder
from finetune.toybox.package import halve, save_base
from finetune.toybox.tokenizer import save as save_tokenizer
from finetune.toybox.unet import train_unet

# What diffusers shall open the folder as. The depth pipeline may be without an estimator where depth maps are given.
PIPELINES = {"inpainting": {"_class_name": "StableDiffusionInpaintPipeline"},
             "depth": {"_class_name": "StableDiffusionDepth2ImgPipeline", "depth_estimator": [None, None], "feature_extractor": [None, None]}}

def v_prediction(model: str, output: Path, *, steps: int = 600, rate: float = 3e-4, pictures: int = 6000, seed: int = 0,
                 console: Console | None = None) -> Path:
    """Write `output`, a whole diffusers folder that predicts v. An interrupted training goes on where it stopped.

    Args:
        model: a base of the toybox family that predicts the noise.
        output: folder to make; beside it OUTPUT.work holds data and checkpoints until it is done.
        steps, rate: of the project's loop, 16 pictures a step; the rate rises for a tenth of the steps and falls to zero.
        pictures: of the rendered world to learn from, 256 of them kept back for the validation loss.
        seed: of pictures, noises and timesteps.

    Raises:
        Problem: another family, a base that predicts v already, or `output` is in use.
    """
    console, output, folder = console or Console(), Path(output), toybox_folder(model)
    free(output)
    base = load(model)
    if base.prediction == "v_prediction":
        raise Problem(f"The model {model!r} predicts v already.", "There is nothing to change.", "Name a base that predicts the noise with --model.")
    work = output.with_name(output.name + ".work")
    settings = {"base": base.hash, "steps": steps, "rate": rate, "pictures": pictures, "seed": seed}
    prepare(base, work, settings, console)
    started = time.perf_counter()
    measured = train_unet(work, steps, seed, console, save_every=100, rate=rate, warmup=max(1, steps // 10))
    command = f"finetune toybox variant v-prediction --steps {steps} --learning-rate {rate:g} --pictures {pictures} --seed {seed}"
    write_folder(work, output, command, settings, measured, time.perf_counter() - started, folder)
    console.print(f"{steps} steps; loss on fixed pictures {measured['validation loss']:.4f}", soft_wrap=True)
    return output


def prepare(base: Base, work: Path, settings: dict, console: Console) -> None:
    """WORK/base, the same model that claims to predict v, and latents and captions to train on; once."""
    if same_training(work, settings, console, done=work / "latents.safetensors"):
        return
    for name, part in (("unet", base.unet), ("vae", base.vae)):
        part.save_pretrained(work / "base" / name)
    save_text_encoder(base.text_encoder, work / "base" / "text_encoder")
    save_tokenizer(base.tokenizer, work / "base" / "tokenizer")
    DDIMScheduler.from_config(base.scheduler_config, prediction_type="v_prediction").save_pretrained(work / "base" / "scheduler")
    console.print(f"Drawing and encoding {settings['pictures']:,} pictures of the rendered world", soft_wrap=True)
    described = describe(settings["pictures"], settings["seed"])
    write_captions(described, work / "captions.jsonl", settings["seed"])
    write_latents(base.vae, pixels(described, processes=1), work / "latents.safetensors")


def free(output: Path) -> None:
    """Refuse a folder that would be replaced."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Problem(f"{output} is there already and not empty.", "It would be replaced.", "Name another --output, or remove it first.")


def same_training(work: Path, settings: dict, console: Console, done: Path | None = None) -> bool:
    """Make the work folder, or see that it is of the same training.

    Args:
        done: what must be there for the work to be gone on with; None takes the folder as it is.

    Returns:
        Whether there is something to go on from.

    Raises:
        Problem: it holds another training.
    """
    note = work / "variant.json"
    if note.is_file():
        if runs.read_json(note) != settings:
            raise Problem(f"{work} holds a training with other settings.", "It was interrupted, and steps of two trainings do not mix.",
                          "Give the same flags to go on, or remove the folder.")
        if done is None or done.exists():
            console.print(f"Going on from {work}", soft_wrap=True)
            return True
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    runs.write_json(note, settings)
    return False


def write_folder(work: Path, output: Path, command: str, settings: dict, measured: dict[str, float], seconds: float, source: Path,
                 variant: str = "v-prediction") -> None:
    """WORK/base in half precision under its name, with a card and, where there is one, the delta; then the work folder goes."""
    partial = output.with_name(f".{output.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    save_base(work / "base", partial)
    for path in sorted(partial.rglob("*.safetensors")):
        halve(path)
    if variant in PIPELINES:
        index = runs.read_json(partial / "model_index.json")
        runs.write_json(partial / "model_index.json", index | PIPELINES[variant])
    if (work / "delta.safetensors").is_file():
        shutil.copy(work / "delta.safetensors", partial)
    card = {"command": command, "seed": settings["seed"], "from": {"folder": source.name, "hash": settings["base"]},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
                         "transformers": transformers.__version__},
            "seconds": round(seconds, 1), "stages": {"unet": {"seconds": round(seconds, 1), "measured": measured}}}
    (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if output.is_dir():
        output.rmdir()
    partial.rename(output)
    shutil.rmtree(work)


def v_of_noise(noise: Tensor, noisy: Tensor, share: Tensor) -> Tensor:
    """The v that a prediction of the noise amounts to: (e - sqrt(1 - a) x_t) / sqrt(a).

    Args:
        noise, noisy: predicted e and x_t, (B, C, H, W).
        share: a, the signal share (alpha-bar) of each row, (B,).
    """
    signal, sigma = (value.sqrt().view(-1, 1, 1, 1) for value in (share, 1 - share))
    return (noise - sigma * noisy) / signal
