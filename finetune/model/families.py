"""Where a base model lies and what family it belongs to, from small files only (no torch, no weights)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.errors import Problem
from finetune.formats import header

TOYBOX = Path(__file__).resolve().parent.parent / "toybox" / "weights"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
TOYBOXES = ("toybox", "toybox-inpainting", "toybox-depth")
TOYBOX_SHAPE = (160, [64, 128, 192])  # text width and UNet widths, see finetune.toybox.unet
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")
CHANNELS: dict[Literal["plain", "inpainting", "depth"], int] = {"plain": 4, "inpainting": 9, "depth": 5}  # the UNet's input channels
WIDTH_KEY = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
CHANNELS_KEY = "model.diffusion_model.input_blocks.0.0.weight"
XL_KEY = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Location:
    """A base model on disk: a diffusers folder or a single LDM checkpoint.

    Attributes:
        family: "toybox", "sd1", "sd2", "sdxl" (two text encoders) or "other" for a width of no published model.
        variant: "plain"; "inpainting" (mask and masked picture beside the latents) and "depth" (a depth map) can draw only.
        delta: a small file of changes to a folder's UNet that makes the variant (`finetune.model.delta`).
    """

    kind: Literal["folder", "single-file"]
    path: Path
    family: str
    variant: Literal["plain", "inpainting", "depth"] = "plain"
    delta: Path | None = None


def locate(name: str) -> Location:
    """Find a base model by name: toybox (-inpainting, -depth), folder, `.safetensors` file or hub id.

    Raises:
        Problem: nothing of that name, an incomplete folder, or a model of an unknown kind.
    """
    if not isinstance(name, str):  # of a recipe: its family is looked up before its types are
        raise Problem(f"--model does not accept {name!r}.", "It should be text.", 'Write model = "..." in the recipe.')
    if name in TOYBOXES:
        return _toybox(name)
    path = Path(name).expanduser()
    kind = _kind(path)
    if kind == "folder":
        return _folder(path, name)
    if kind == "file":
        return _single_file(path)
    if path.suffix in (".safetensors", ".ckpt", ".pt") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise Problem(f"There is no base model at {name!r}.", "It is neither a folder, a file, nor a hub id of the form owner/name.",
                      "Give --model toybox, a diffusers folder, a .safetensors checkpoint or a hub id.")
    return _folder(_hub_folder(name), name)


def _kind(path: Path) -> str:
    """"folder", "file" or "" for nothing; a name too long or with a NUL sign is the name of nothing."""
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError):
        return ""


def family_of(name: str) -> str:
    """toybox, sd1, sd2, sdxl, or other for a width of no published model."""
    return "toybox" if name in TOYBOXES else locate(name).family


def _toybox(name: str) -> Location:
    """The embedded base, or a variant of it by the delta the package carries."""
    plain = _folder(TOYBOX, "toybox")
    if name == "toybox":
        return plain
    variant: Any = name.removeprefix("toybox-")
    delta = TOYBOX / "variants" / f"{variant}.safetensors"
    if not delta.is_file():
        raise Problem(f"The base {name!r} is not in this installation.", f"Its file {delta.name} is missing beside the toybox's weights.",
                      f"Install the package whole, or make it: finetune toybox variant {variant}.")
    return replace(plain, variant=variant, delta=delta)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file.

    Raises:
        Problem: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Problem(f"The configuration {path} cannot be read.", f"{reason or type(error).__name__}.", "Download the model again, or repair the file.") from error
    if not isinstance(found, dict):
        raise Problem(f"The configuration {path} is no JSON object.", f"It holds a {type(found).__name__}.", "Download the model again, or repair the file.")
    return found


def _folder(path: Path, name: str) -> Location:
    unet = path / "unet" / "config.json"
    config = read_config(unet) if unet.is_file() else {}
    two = (path / "text_encoder_2").is_dir() or config.get("addition_embed_type") == "text_time"
    wanted = (*COMPONENTS, *(SECOND if two else ()))
    missing = [part for part in wanted if not (path / part).is_dir()]
    if two and "text_encoder" in missing and config.get("cross_attention_dim") == 1280:
        raise _refiner(name)
    if missing:
        raise Problem(f"The model folder {name!r} lacks {', '.join(missing)}.", "A diffusers folder has " + ", ".join(wanted) + ".",
                      "Name the folder that holds model_index.json, or a single .safetensors checkpoint.")
    variant = _variant(config.get("in_channels", 4), name)
    toybox = (config.get("cross_attention_dim"), config.get("block_out_channels")) == TOYBOX_SHAPE  # it, or a DreamBooth of it
    return Location("folder", path, "sdxl" if two else "toybox" if toybox else _family(config.get("cross_attention_dim")), variant)


def _single_file(path: Path) -> Location:
    if path.suffix != ".safetensors":
        raise Problem(f"The checkpoint {path} is not a .safetensors file.", "Pickled checkpoints can run code when opened.",
                      f"Convert it to .safetensors first: finetune convert {path} --to single-file --output {path.with_suffix('.safetensors')}")
    tensors = header.read_header(path).tensors
    width = next((tensors[key].shape[-1] for key in map(WIDTH_KEY.format, (1, 2, 4)) if key in tensors), None)
    if width is None:
        raise Problem(f"{path} is not a Stable Diffusion checkpoint.", "It has no model.diffusion_model.* cross-attention weights.",
                      "`finetune inspect` says what the file is.")
    two = any(key.startswith(XL_KEY) for key in tensors)
    if not two and any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        raise _refiner(str(path))
    if width == 2048 and not two:
        raise Problem(f"The checkpoint {path} is an SDXL network without its text encoders.", f"It has no {XL_KEY}* weights.",
                      "Use the whole checkpoint or the diffusers folder.")
    channels = tensors[CHANNELS_KEY].shape[1] if CHANNELS_KEY in tensors else 4
    first = tensors[CHANNELS_KEY].shape[0] if CHANNELS_KEY in tensors else None
    toybox = (width, first) == (TOYBOX_SHAPE[0], TOYBOX_SHAPE[1][0])
    return Location("single-file", path, "sdxl" if two else "toybox" if toybox else _family(width), _variant(channels, str(path)))


def _variant(channels: int, name: str) -> Literal["plain", "inpainting", "depth"]:
    """What the UNet reads beside the four channels of the latents."""
    found = {count: variant for variant, count in CHANNELS.items()}.get(channels) if isinstance(channels, int) else None
    if found is None:
        raise Problem(f"The model {name!r} takes {channels} latent channels.",
                      "Known are 4 (text to image), 9 (inpainting) and 5 (depth).", "Use the plain text-to-image base it comes from.")
    return found


def _family(width: int | list[int] | None) -> str:
    return {768: "sd1", 1024: "sd2"}.get(width, "other") if isinstance(width, int) else "other"


def _refiner(name: str) -> Problem:
    return Problem(f"The model {name!r} is the SDXL refiner.", "It only finishes another model's pictures and has one text encoder.",
                   "Use the SDXL base.")


def _hub_folder(name: str) -> Path:
    """Local snapshot of a hub id; asks the network only when the cache does not have it and offline mode is off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["model_index.json", "*/*.json", "*/*.txt", *(f"{part}/{name}.safetensors" for part, name in WEIGHTS.items())]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        if not offline:
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise Problem(f"The hub model {name!r} cannot be had.", f"It is not in the local cache and the hub said: {str(error).splitlines()[0]}",
                      "Check the name and the network, or give a local folder or file.") from None
    raise Problem(f"The hub model {name!r} is not in the local cache.", "HF_HUB_OFFLINE forbids the network.", "Unset it or give a local folder.")
