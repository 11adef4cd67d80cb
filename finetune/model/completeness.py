"""Whether the files of a diffusers folder are all there, and whether its parts belong together: said before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import Problem
from finetune.formats import ldm
from finetune.model.families import WEIGHTS, Location, read_config

TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.json",))  # either of these sets of files is a tokenizer
SCHEDULE = ("beta_start", "beta_end", "beta_schedule")


def check_files(location: Location) -> None:
    """Every component has its configuration, its weights as safetensors, its words.

    Raises:
        Problem: naming the files that are missing, or weights that are pickles.
    """
    if location.kind != "folder":
        return
    place, second = location.path, location.family == "sdxl"
    networks = [part for part in WEIGHTS if second or part != "text_encoder_2"]
    missing = [f"{part}/config.json" for part in networks if not (place / part / "config.json").is_file()]
    for part in networks:
        file = f"{part}/{WEIGHTS[part]}.safetensors"
        index = place / f"{file}.index.json"
        if index.is_file():
            missing += [f"{part}/{shard.name}" for shard in ldm.shards(index) if not shard.is_file()]
        elif not (place / file).is_file():
            missing.append(file)
    for part in ("tokenizer", *(("tokenizer_2",) if second else ())):
        if not any(all((place / part / file).is_file() for file in files) for files in TOKENIZERS):
            missing.append(f"{part}/vocab.json")
    if not (place / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise Problem(f"The model folder {place} lacks {', '.join(missing)}.", _instead(place, missing), _fix(place, missing))
    for part in networks:
        read_config(place / part / "config.json")


def _pickled(place: Path, missing: list[str]) -> list[str]:
    """Weights that lie there as pickles where safetensors are missing."""
    folders = [place / file.partition("/")[0] for file in missing if file.endswith(".safetensors")]
    return [f"{folder.name}/{path.name}" for folder in folders for path in sorted(folder.glob("*.bin"))]


def _instead(place: Path, missing: list[str]) -> str:
    pickles = _pickled(place, missing)
    return f"{', '.join(pickles)} can run code when opened, so it is not read." if pickles else "No part can be left out."


def _fix(place: Path, missing: list[str]) -> str:
    if _pickled(place, missing):
        return "Download the folder's .safetensors files instead."
    return "Download it again, whole, or name another folder with --model."


def check_schedule(config: dict[str, Any], name: str) -> None:
    """The scheduler's file says what noise is added.

    Raises:
        Problem: it does not. diffusers would take a schedule that no Stable Diffusion was trained with.
    """
    lacking = [key for key in SCHEDULE if config.get(key) is None]
    if lacking:
        raise Problem(f"The scheduler of the model {name!r} does not say {', '.join(lacking)}.",
                      "Without its own noise schedule a model is trained and sampled wrongly.",
                      "Download scheduler/scheduler_config.json of the model again.")


def check_fit(base: Any) -> None:
    """Latents and picture size are known and agree; and prompts are as long as the encoder reads.

    Args:
        base: a `finetune.model.Base`, with or without weights.

    Raises:
        Problem: naming the two that do not fit.
    """
    latents = base.vae.config.latent_channels
    if latents != base.unet.config.out_channels:
        raise Problem(f"The VAE of the model {base.name!r} has {latents} latent channels, its UNet {base.unet.config.out_channels}.",
                      "They come from different models.", "Download the folder again, whole.")
    if not isinstance(base.unet.config.sample_size, int):
        raise Problem(f"The UNet of the model {base.name!r} does not say its picture size.", f"Its sample_size is {base.unet.config.sample_size!r}.",
                      "Write the side of its latents into unet/config.json: 64 for 512 pixels.")
    for _, encoder, tokenizer in base.encoders():
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)  # where its file is silent: 10**30


def check_width(base: Any, width: int) -> None:
    """Text states are as wide as what the UNet attends to.

    Raises:
        Problem: they are not.
    """
    if isinstance(base.context_width, int) and width != base.context_width:
        raise Problem(f"The text encoder of the model {base.name!r} gives states {width} wide, its UNet takes {base.context_width}.",
                      "They come from different models.", "Download the folder again, whole.")
