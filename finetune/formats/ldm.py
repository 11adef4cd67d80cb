"""Single-file checkpoints in the original ("LDM") layout, written and read by the project's own tables.

A checkpoint is held as diffusers names its parts (`unet`, `vae`, `text_encoder`, `text_encoder_2`), tensors fetched when they
are needed. Layouts: "sd1" (transformers' text names; also small bases such as toybox), "sd2" (OpenCLIP's text names), "sdxl"
(both encoders). Inpainting (9 input channels) and depth models (5) have the same names. docs/formats.md, "Single checkpoint".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem
from finetune.formats import ldm_names as names
from finetune.formats import ldm_text as text
from finetune.formats import ldm_yaml, stream
from finetune.formats.families import family_of_width, modelspec_checkpoint
from finetune.formats.header import read_header
from finetune.formats.stream import Lazy
from finetune.runs import read_json, write_text

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
HASHES = {"modelspec.hash_sha256": "0x"}
Part = Mapping[str, Lazy]


@dataclass(frozen=True)
class Checkpoint:
    """A whole model as diffusers names it.

    Attributes:
        parts: component to {tensor name to tensor}; text names without the `text_model.` level.
        configs: component to diffusers' configuration, "scheduler" among them; empty for what a single file does not say.
        extra: a single file's keys that belong to no part (SD 2's last text block, in OpenCLIP's names).
    """

    parts: dict[str, dict[str, Lazy]]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Lazy] = field(default_factory=dict)

    @property
    def prediction(self) -> str:
        """"epsilon" or "v_prediction"."""
        return self.configs.get("scheduler", {}).get("prediction_type", "epsilon")

    @property
    def context_width(self) -> int:
        """Width of the text states the UNet attends to."""
        return context_width(self.parts["unet"])


def context_width(unet: Part) -> int:
    """Width of the text states, from any cross-attention key."""
    return next((entry.shape[1] for name, entry in unet.items() if name.endswith("attn2.to_k.weight")), 0)


def of_modules(modules: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Checkpoint:
    """A live model's networks by component name, not copied (meta modules too, for sizes)."""
    parts, configs = {}, {"scheduler": dict(scheduler)}
    for name, module in modules.items():
        state = stream.of_tensors(module.state_dict())
        parts[name] = text.plain(state) if name.startswith("text_encoder") else state
        configs[name] = dict(module.config) if isinstance(module.config, dict) else module.config.to_dict()
    return Checkpoint(parts, configs)


def of_folder(folder: Path | str) -> Checkpoint:
    """A diffusers folder; only headers are read now. Weights may be sharded or of the fp16 variant.

    Raises:
        Problem: a part is missing, or its weights are not .safetensors.
    """
    folder = Path(folder)
    parts, configs = {}, {}
    for name in PARTS:
        place = folder / name
        if name == "text_encoder_2" and not place.is_dir():
            continue
        state: dict[str, Lazy] = {}
        for file in _weights(place, "model" if name.startswith("text") else "diffusion_pytorch_model"):
            state |= stream.of_file(file)
        parts[name] = text.plain(state) if name.startswith("text_encoder") else state
        configs[name] = read_json(place / "config.json")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = read_json(scheduler) if scheduler.is_file() else {}
    return Checkpoint(parts, configs)


def _weights(place: Path, stem: str) -> list[Path]:
    for middle in ("", ".fp16"):
        index = place / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            return shards(index)
        if (file := place / f"{stem}{middle}.safetensors").is_file():
            return [file]
    raise Problem(f"{place} holds no {stem}.safetensors.", "The weights of this part are missing or are pickles.",
                  "Save the folder again with safe_serialization=True.")


def shards(index: Path) -> list[Path]:
    """The files a sharded network's index names, all beside it.

    Raises:
        Problem: it is damaged, or names a file elsewhere.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or "\\" in name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"The index {index} is damaged.", f"It names no files ({type(error).__name__}).", "Download the model again.") from error
    if outside:
        raise Problem(f"The index {index} names {outside[0]!r}, which leads out of its folder.", "A model is read from its own folder alone.",
                      "Download the model again, from whom you trust.")
    return [index.parent / name for name in names]


def layout_of(checkpoint: Checkpoint) -> str:
    """ "sdxl" with two encoders; "sd2" where the encoder is OpenCLIP's; "sd1" else."""
    if "text_encoder_2" in checkpoint.parts:
        return "sdxl"
    config = checkpoint.configs["text_encoder"]
    width = config["hidden_size"]
    return "sd2" if width == 1024 or width != 768 and config.get("hidden_act") == "gelu" else "sd1"


def entries(checkpoint: Checkpoint, dtype: str | None = "F16", original: Part | None = None) -> dict[str, Lazy]:
    """Every tensor of the single file under its key.

    Args:
        dtype: "F16", "F32", "BF16", or None for what each tensor has; whole numbers keep theirs.
        original: SD 2's encoder of the base checkpoint (see `original_text`), for the block diffusers does not keep.

    Raises:
        Problem: for a tensor the layout has no place for, naming it.
    """
    layout, strange = layout_of(checkpoint), []
    form = names.structure(checkpoint.configs["unet"], checkpoint.configs["vae"])
    found: dict[str, Lazy] = {}
    for name, entry in checkpoint.parts["unet"].items():
        _place(found, names.UNET, names.unet_name(name, form), name, entry, strange)
    for name, entry in checkpoint.parts["vae"].items():
        key = names.vae_name(name, form)
        if key is not None and re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", key):
            entry = entry.map((entry.shape[0], entry.shape[1], 1, 1), lambda value: value.reshape(value.shape[0], value.shape[1], 1, 1))
        _place(found, names.VAE, key, name, entry, strange)
    first = checkpoint.parts["text_encoder"]
    if layout == "sd2":
        state = text.to_open_clip({name: entry for name, entry in first.items() if name != "text_projection.weight"}, strange)
        extra = checkpoint.extra if original is None else original
        state |= text.last_block(state, extra or None)
        found |= {names.OPEN_CLIP + key: entry for key, entry in state.items()}
    else:
        prefix = names.CLIP_XL if layout == "sdxl" else names.CLIP
        found |= {prefix + name: entry for name, entry in first.items()}
    if layout == "sdxl":
        second = text.to_open_clip(checkpoint.parts["text_encoder_2"], strange)
        found |= {names.OPEN_CLIP_XL + key: entry for key, entry in second.items()}
        found |= {key: Lazy(dtype or "F16", (0,), lambda: torch.empty(0)) for key in _marks(checkpoint)}
    if strange:
        raise Problem(f"{len(strange)} tensors have no name in the single-file layout, such as {strange[0]!r}.",
                      "The layout is that of Stable Diffusion 1, 2 and XL.", "Keep this model as a diffusers folder.")
    return {key: entry.to(dtype or entry.dtype) for key, entry in found.items()}


def _place(found: dict[str, Lazy], prefix: str, key: str | None, name: str, entry: Lazy, strange: list[str]) -> None:
    if key is None:
        strange.append(name)
    else:
        found[prefix + key] = entry


def _marks(checkpoint: Checkpoint) -> list[str]:
    """Empty tensors by which ComfyUI knows SDXL's v-prediction and a schedule with zero signal at its end."""
    marks = ["v_pred"] if checkpoint.prediction == "v_prediction" else []
    return marks + (["ztsnr"] if checkpoint.configs.get("scheduler", {}).get("rescale_betas_zero_snr") else [])


def original_text(path: Path | str) -> dict[str, Lazy] | None:
    """SD 2's encoder in OpenCLIP's names from a base checkpoint, or None where the file is no SD 2 checkpoint."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    found = {key.removeprefix(names.OPEN_CLIP): entry for key, entry in stream.of_file(path).items() if key.startswith(names.OPEN_CLIP)}
    return found or None


def described(checkpoint: Checkpoint, stem: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a single file: `format`, modelspec, and what the caller knows."""
    metadata = {"finetune.prediction_type": checkpoint.prediction, **metadata}
    width = checkpoint.context_width
    channels = checkpoint.parts["unet"]["conv_in.weight"].shape[1]
    return {"format": "pt", **modelspec_checkpoint(family_of_width(width, metadata), channels, stem, metadata), **metadata}


def expected_bytes(checkpoint: Checkpoint, dtype: str | None, stem: str, metadata: Mapping[str, str], original: Part | None = None) -> int:
    """Exact size of the file `write` leaves (without the .yaml)."""
    told = described(checkpoint, stem, metadata) | {name: prefix + "0" * 64 for name, prefix in HASHES.items()}
    return stream.expected_bytes(entries(checkpoint, dtype, original), told)


def write(path: Path | str, checkpoint: Checkpoint, metadata: Mapping[str, str], dtype: str | None = "F16",
          original: Part | None = None) -> list[Path]:
    """Write one `.safetensors` with the whole model and, for v-prediction of SD 1 and 2, the `.yaml` the web UI needs beside it.

    Args:
        metadata: the common `finetune.*` fields.
        dtype, original: see `entries`.

    Returns: the files written.
    """
    path = Path(path)
    stream.save(path, entries(checkpoint, dtype, original), described(checkpoint, path.stem, metadata), HASHES)
    if checkpoint.prediction != "v_prediction" or layout_of(checkpoint) == "sdxl":
        return [path]
    beside = path.with_suffix(".yaml")
    write_text(beside, ldm_yaml.text(checkpoint.configs["unet"], checkpoint.configs["text_encoder"], layout_of(checkpoint)))
    return [path, beside]


def read(path: Path | str) -> Checkpoint:
    """A single `.safetensors` checkpoint in diffusers' names. Configurations are not in the file: they stay empty.

    Raises:
        Problem: not a Stable Diffusion checkpoint, or with tensors no part has.
    """
    path = Path(path)
    read_header(path)
    return of_single(stream.of_file(path), str(path))


def of_single(found: Mapping[str, Lazy], path: str) -> Checkpoint:
    """The same for tensors already at hand (a `.ckpt`'s).

    Keys of training (schedule, loss, EMA copy) are passed over; the plain weights are the ones every reader uses.
    """
    form, strange = names.structure_of(found), []
    parts: dict[str, dict[str, Lazy]] = {"unet": {}, "vae": {}}
    for key, entry in found.items():
        if key.startswith(names.UNET):
            _back(parts["unet"], names.unet_name_back(key.removeprefix(names.UNET), form), key, entry, strange)
        elif key.startswith(names.VAE) and not key.startswith((names.VAE + "loss.", names.VAE + "model_ema.")):
            name = names.vae_name_back(key.removeprefix(names.VAE), form)
            if name is not None and ".attentions." in name and len(entry.shape) == 4:
                entry = entry.map(entry.shape[:2], lambda value: value[:, :, 0, 0])
            _back(parts["vae"], name, key, entry, strange)
    extra: dict[str, Lazy] = {}
    if _with(found, names.OPEN_CLIP_XL):
        parts["text_encoder"] = _clip(_with(found, names.CLIP_XL))
        parts["text_encoder_2"] = text.from_open_clip(_with(found, names.OPEN_CLIP_XL), strange)
    elif open_clip := _with(found, names.OPEN_CLIP):
        last = text.blocks(open_clip) - 1
        parts["text_encoder"] = text.from_open_clip(
            {key: entry for key, entry in open_clip.items() if f"resblocks.{last}." not in key and key not in ("text_projection", "logit_scale")},
            strange)
        extra = open_clip
    else:
        flat = _with(found, names.CLIP) or _with(found, names.CLIP.removesuffix(text.TEXT_LEVEL))
        parts["text_encoder"] = _clip(flat)
    missing = [part for part, state in parts.items() if not state]
    if missing or strange:
        told = f"it lacks {', '.join(missing)}" if missing else f"its tensor {strange[0]!r} belongs to no part"
        raise Problem(f"{path} is not a whole Stable Diffusion checkpoint: {told}.", "UNet, autoencoder and text encoder are expected.",
                      "`finetune inspect` says what the file is.")
    return Checkpoint(parts, {}, extra)


def _with(found: Mapping[str, Lazy], prefix: str) -> dict[str, Lazy]:
    return {key.removeprefix(prefix): entry for key, entry in found.items() if key.startswith(prefix)}


def _clip(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    return text.plain(state)


def _back(part: dict[str, Lazy], name: str | None, key: str, entry: Lazy, strange: list[str]) -> None:
    if name is None:
        strange.append(key)
    else:
        part[name] = entry
