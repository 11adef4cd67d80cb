"""The networks of a base model from a diffusers folder or a single LDM file, whole or one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import Problem, out_of_memory
from finetune.formats import stream
from finetune.model.completeness import check_files, check_schedule
from finetune.model.families import Location, read_config

# What libraries raise on files that are damaged or of another kind.
BROKEN = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, OverflowError)


def load_parts(location: Location, dtype: torch.dtype, unet_dtype: torch.dtype | None, base_hash: str, unet_later: bool = False) -> dict[str, Any]:
    """The networks, tokenizers and scheduler configuration by the names of Base's fields.

    Args:
        unet_dtype: of the UNet's linear and convolution weights; each is then read into memory of its own, so that it can be
            let go alone. None: `dtype`, and the file is mapped.
        base_hash: of the weights, which a delta must have been made on.
        unet_later: give the UNet without its weights (on the meta device) where they can be read alone, to be recalled.

    Raises:
        Problem: the files are damaged or do not fit their configuration.
    """
    return _from_folder(location, dtype, unet_dtype, base_hash, unet_later) if location.kind == "folder" else _from_file(location, dtype)


def load_part(location: Location, name: str, dtype: torch.dtype, unet_dtype: torch.dtype | None = None) -> nn.Module:
    """One network alone; a single file has to be read whole."""
    if location.kind == "single-file":
        return _from_file(location, dtype)[name]
    with _loading(location.path):
        return _unet(location.path, dtype, unet_dtype) if name == "unet" else _network(location.path, name, dtype)


def _network(path: Path, name: str, dtype: torch.dtype) -> Any:
    """One network of a diffusers folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if name in ("unet", "vae"):
        kind = UNet2DConditionModel if name == "unet" else AutoencoderKL
        return kind.from_pretrained(path / name, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    return kind.from_pretrained(path / name, dtype=dtype, local_files_only=True, use_safetensors=True)


def _from_folder(location: Location, dtype: torch.dtype, unet_dtype: torch.dtype | None, base_hash: str, unet_later: bool) -> dict[str, Any]:
    from transformers import CLIPTokenizer

    path, second = location.path, location.family == "sdxl"
    check_files(location)
    with _loading(path):
        parts: dict[str, Any] = {name: _network(path, name, dtype) for name in ("vae", "text_encoder", *(["text_encoder_2"] if second else []))}
        parts["unet"] = _empty_unet(path) if unet_later and not location.delta else _unet(path, dtype, None if location.delta else unet_dtype)
        for number in ("", "_2") if second else ("",):
            parts[f"tokenizer{number}"] = CLIPTokenizer.from_pretrained(path / f"tokenizer{number}", local_files_only=True)
        told = read_config(path / "scheduler" / "scheduler_config.json")
        check_schedule(told, str(path))
        parts["scheduler_config"] = _scheduler_config(told)
    if location.delta:
        from finetune.model import delta

        delta.apply(parts["unet"], location.delta, base_hash)
    return parts


def _empty_unet(path: Path) -> Any:
    """The UNet of a folder without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path / "unet"))


def _unet(path: Path, dtype: torch.dtype, layers_dtype: torch.dtype | None) -> Any:
    """The UNet of a folder; with `layers_dtype` its linear and convolution weights are read straight into that, the rest into `dtype`.

    from_pretrained maps the whole file and casts beside it: 3.4 GB of SD 1.5 would be in memory together with the 1.7 GB asked for.
    """
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    if layers_dtype is None or not file.is_file():
        return _network(path, "unet", dtype)
    unet = _empty_unet(path)
    modules, missing = dict(unet.named_modules()), {name for name, _ in unet.named_parameters()}
    for name, value in stream.each(file):
        place, _, leaf = name.rpartition(".")
        module = modules[place]
        if module._parameters[leaf].shape != value.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, the configuration says {tuple(module._parameters[leaf].shape)}")
        small = leaf == "weight" and type(module) in (nn.Linear, nn.Conv2d) and place != "conv_in"  # whose format latents are given in
        module._parameters[leaf] = nn.Parameter(value.to(layers_dtype if small else dtype), requires_grad=False)
        missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} tensors are not in the file, such as {min(missing)}")
    return unet.eval()


def _scheduler_config(told: dict[str, Any]) -> dict[str, Any]:
    """A folder's noise schedule in DDIM's terms. What other schedulers' files leave out is false for latents: they are not cut to [-1, 1]."""
    from diffusers import DDIMScheduler

    return dict(DDIMScheduler.from_config({"clip_sample": False, "set_alpha_to_one": False} | told).config)


def _from_file(location: Location, dtype: torch.dtype) -> dict[str, Any]:
    """The same of a single LDM file, offline, with our own configuration folder: without one diffusers asks the network even in offline mode."""
    import diffusers

    from finetune.model.configs import config_folder

    xl = location.family == "sdxl"
    more = {"add_watermarker": False} if xl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _loading(location.path), config_folder(location.path, location.family, location.variant) as folder:
        pipe = (diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline).from_single_file(
            str(location.path), config=str(folder), torch_dtype=dtype, local_files_only=True, **more)
    names = ["unet", "vae", "text_encoder", "tokenizer", *(["text_encoder_2", "tokenizer_2"] if xl else [])]
    return {name: getattr(pipe, name) for name in names} | {"scheduler_config": dict(pipe.scheduler.config)}


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Library errors about files become one sentence that names the model."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    try:
        yield
    except (SingleFileComponentError, SafetensorError, *BROKEN) as error:
        if out_of_memory(error):
            raise
        first = (str(error).splitlines() or ["no details"])[0].rstrip(".")
        raise Problem(f"The model {path} cannot be loaded.", f"{type(error).__name__}: {first}.",
                      "Check that the download is complete; `finetune inspect` reads its headers.") from error
