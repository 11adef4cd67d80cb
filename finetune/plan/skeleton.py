"""A base model without its weights: configurations become networks on the meta device, which have shapes and no memory."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from finetune import diffusion
from finetune.errors import Problem
from finetune.model import configs
from finetune.model.base import Base, weights_hash
from finetune.model.families import TOYBOXES, Location, locate

PUBLISHED = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}  # word on the command line -> family
KNOWN_AS = {"sd15": "stable-diffusion-v1-5", "sd21": "stable-diffusion-2-1-base", "sdxl": "stable-diffusion-xl-base-1.0"}
NO_HASH = "0" * 16  # as long as every other


def family_of(name: str) -> str:
    """Family of a base by name, sd15, sd21 and sdxl included; without torch's help."""
    return PUBLISHED.get(name) or ("toybox" if name in TOYBOXES else locate(name).family)


def skeleton(name: str) -> Base:
    """A base on the meta device. No weights are read, none need be there.

    Args:
        name: sd15, sd21, sdxl (their published configurations), toybox, a diffusers folder (its weights may be missing), a hub
            id or a single checkpoint, of which the header is read.

    Raises:
        Problem: nothing of that name, or a model that cannot be trained.
    """
    if name in PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            _published(Path(folder), PUBLISHED[name])
            return _from_folder(KNOWN_AS[name], Location("folder", Path(KNOWN_AS[name]), PUBLISHED[name]), Path(folder), NO_HASH)
    location = locate(name)
    if location.kind == "single-file":
        with configs.config_folder(location.path, location.family, location.variant) as folder:
            return _from_folder(name, location, folder, weights_hash(location))
    return _from_folder(name, location, location.path, weights_hash(location))


def _published(folder: Path, family: str) -> None:
    """The configurations of a published model and CLIP's tokenizer."""
    configs.write_folder(folder, configs.parts_of(family), configs.PADS[family])


def _from_folder(name: str, location: Location, folder: Path, digest: str) -> Base:
    """The networks of a folder's configurations, with its tokenizers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    told = {part: _read(folder / part / "config.json") for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if location.family == "sdxl" else ()))}
    parts: dict[str, Any] = {}
    with torch.device("meta"):
        parts["unet"] = UNet2DConditionModel.from_config(told["unet"])
        parts["vae"] = AutoencoderKL.from_config(told["vae"])
        for number, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            if f"text_encoder{number}" in told:
                given = {key: value for key, value in told[f"text_encoder{number}"].items() if key not in ("architectures", "model_type")}
                parts[f"text_encoder{number}"] = kind(CLIPTextConfig(**given))
    for number in ("", "_2"):
        if f"text_encoder{number}" in parts:
            parts[f"tokenizer{number}"] = _tokenizer(folder / f"tokenizer{number}", CLIPTokenizer)
    config = _read(folder / "scheduler" / "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Problem(f"The model {name!r} predicts {prediction!r}.", "Only epsilon and v_prediction are known.")
    share = diffusion.alphas_cumprod(config.get("num_train_timesteps", 1000), config["beta_start"], config["beta_end"], config["beta_schedule"])
    base = Base(name=name, location=location, **parts, scheduler_config=config, schedule=share, prediction=prediction, hash=digest,
                device=torch.device("meta"), resolution=0)
    base.resolution = base.unet.config.sample_size * base.pixels_per_latent
    if base.text_encoder_2 is not None:
        base.text_encoder_2.text_model.eos_token_id = base.tokenizer_2.eos_token_id
    base.freeze()
    return base


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Problem(f"There is no {path.name} in {path.parent}.", "A base's shapes are read from its configurations.",
                      "Download the folder's .json files, or plan for sd15, sd21 or sdxl.")
    return json.loads(path.read_text(encoding="utf-8"))


def _tokenizer(folder: Path, kind: Any) -> Any:
    """The folder's own tokenizer, or CLIP's where it has none: prompts are as long either way."""
    if any((folder / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        return kind.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as place:
        configs.write_tokenizer(Path(place) / "tokenizer")
        return kind.from_pretrained(Path(place) / "tokenizer", local_files_only=True)


def copy_of(base: Base) -> Base:
    """A base of its own for one method to attach to: networks on the meta device copy in a moment."""
    parts = {name: copy.deepcopy(part) for name, part in base.modules().items()}
    tokenizers = {"tokenizer": copy.deepcopy(base.tokenizer)} | ({"tokenizer_2": copy.deepcopy(base.tokenizer_2)} if base.tokenizer_2 is not None else {})
    fresh = copy.copy(base)
    for name, value in (parts | tokenizers).items():
        setattr(fresh, name, value)
    fresh.states, fresh.placeholders = {}, dict(base.placeholders)
    return fresh
