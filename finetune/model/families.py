"""Where a base model lies and what family it belongs to, from small files only (no torch, no weights)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import Problem
from finetune.formats import header

TOYBOX = Path(__file__).resolve().parent.parent / "toybox" / "weights"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
TOYBOX_SHAPE = (160, [64, 128, 192])  # text width and UNet widths, see finetune.toybox.unet
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WIDTH_KEY = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class Location:
    """A base model on disk: a diffusers folder or a single LDM checkpoint."""

    kind: Literal["folder", "single-file"]
    path: Path
    family: str


def locate(name: str) -> Location:
    """Find a base model by name: toybox, folder, `.safetensors` file or hub id.

    Raises:
        Problem: nothing of that name, an incomplete folder, or a model of a kind that cannot be trained here.
    """
    if name == "toybox":
        return _folder(TOYBOX, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name)
    if path.is_file():
        return _single_file(path)
    if path.suffix in (".safetensors", ".ckpt", ".pt") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise Problem(f"There is no base model at {name!r}.", "It is neither a folder, a file, nor a hub id of the form owner/name.",
                      "Give --model toybox, a diffusers folder, a .safetensors checkpoint or a hub id.")
    return _folder(_hub_folder(name), name)


def family_of(name: str) -> str:
    """toybox, sd1, sd2, or other for a width of no published model."""
    return "toybox" if name == "toybox" else locate(name).family


def _folder(path: Path, name: str) -> Location:
    missing = [part for part in COMPONENTS if not (path / part).is_dir()]
    if missing:
        raise Problem(f"The model folder {name!r} lacks {', '.join(missing)}.", "A diffusers folder has " + ", ".join(COMPONENTS) + ".",
                      "Name the folder that holds model_index.json, or a single .safetensors checkpoint.")
    config = json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))
    if config.get("in_channels", 4) != 4:
        raise Problem(f"The model {name!r} takes {config['in_channels']} latent channels, not 4.",
                      "It is an inpainting or depth model, whose training needs masks or depth maps.", "Train on its plain text-to-image base.")
    family = _family(config.get("cross_attention_dim"), name)
    toybox = (config.get("cross_attention_dim"), config.get("block_out_channels")) == TOYBOX_SHAPE  # it, or a DreamBooth of it
    return Location("folder", path, "toybox" if toybox else family)


def _single_file(path: Path) -> Location:
    if path.suffix != ".safetensors":
        raise Problem(f"The checkpoint {path} is not a .safetensors file.", "Pickled checkpoints can run code when opened.",
                      "Convert it to .safetensors first.")
    tensors = header.read_header(path).tensors
    width = next((tensors[key].shape[-1] for key in map(WIDTH_KEY.format, (1, 2, 4)) if key in tensors), None)
    if width is None:
        raise Problem(f"{path} is not a Stable Diffusion checkpoint.", "It has no model.diffusion_model.* cross-attention weights.",
                      "`finetune inspect` says what the file is.")
    return Location("single-file", path, _family(width, str(path)))


def _family(width: int | list[int] | None, name: str) -> str:
    if width == 2048:
        raise Problem(f"The model {name!r} is of the SDXL family.", "This version trains Stable Diffusion 1.x and 2.x.",
                      "Use an SD 1.x or 2.x base, or toybox.")
    return {768: "sd1", 1024: "sd2"}.get(width, "other")  # type: ignore[arg-type]


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
