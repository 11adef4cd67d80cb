"""A small file that turns a base into its inpainting or depth variant: a wider first convolution and low-rank changes.

    conv_in.weight, conv_in.bias          whole, with the new input channels after the four latent ones
    MODULE.down (r, IN), MODULE.up (OUT, r)   added to MODULE.weight as up @ down; convolutions flattened to (OUT, IN)

Everything is fp16. The metadata say which base the change belongs to: on another one it would be noise.
Low-rank changes: Hu et al. 2021 (2106.09685). Wider first convolutions: Rombach et al. 2022 (2112.10752), section 4.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import runs
from finetune.errors import Problem
from finetune.formats import header

CHANNELS = {"inpainting": 9, "depth": 5}
FORMAT = "finetune-delta-1"


def apply(unet: Any, path: Path, base_hash: str) -> None:
    """Turn a base's UNet into the variant that a file holds, in place.

    Args:
        unet: of the plain base, four latent channels.
        path: what `write` wrote.
        base_hash: of the base the UNet belongs to (`Base.hash`); must be the one the file was made on.

    Raises:
        Problem: no such file, another base, or modules that the UNet lacks.
    """
    from safetensors.torch import load_file

    found = facts(path)
    if found["base"] != base_hash:
        raise Problem(f"The delta {path} belongs to another base.", f"It was made on the weights {found['base']}, and these are {base_hash}.",
                      f"Make it anew: finetune toybox variant {found['variant']}.")
    tensors, modules = load_file(path), dict(unet.named_modules())
    names = sorted({name.rpartition(".")[0] for name in tensors})
    unknown = [name for name in names if name not in modules]
    if unknown or tensors["conv_in.weight"].shape[1] != CHANNELS[found["variant"]]:
        raise Problem(f"The delta {path} does not fit this UNet.", f"It changes {unknown[0] if unknown else 'conv_in'}, which is not there in this shape.",
                      "Use it on the base it was made on.")
    widen(unet, CHANNELS[found["variant"]])
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(unet.conv_in, part).copy_(tensors[f"conv_in.{part}"])
        for name in names:
            if name != "conv_in":
                weight = modules[name].weight
                weight += (tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()).reshape(weight.shape).to(weight)


def widen(unet: Any, channels: int) -> None:
    """Give the first convolution more input channels whose weights are zero: whatever they hold, the output is as before."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new.requires_grad_(False)
    unet.register_to_config(in_channels=channels)


def write(path: Path, conv_in: nn.Conv2d, pairs: Mapping[str, tuple[Tensor, Tensor]], *, variant: str, base: str, facts: Mapping[str, Any]) -> None:
    """Write a delta in fp16, whole or not at all.

    Args:
        conv_in: the trained first convolution.
        pairs: down (r, IN) and up (OUT, r) by dotted module path, any scale folded in.
        variant: of CHANNELS. base: hash of the base it belongs to.
        facts: what else the metadata shall say (steps, command, ...); becomes text.
    """
    from safetensors.torch import save_file

    tensors = {f"conv_in.{part}": getattr(conv_in, part) for part in ("weight", "bias")}
    for name, (down, up) in pairs.items():
        tensors |= {f"{name}.down": down, f"{name}.up": up}
    metadata = {"format": "pt", "finetune": FORMAT, "variant": variant, "base": base, **{key: str(value) for key, value in facts.items()}}
    with runs.atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        temporary.chmod(0o644)  # safetensors writes for the owner alone; a package is for everyone


def facts(path: Path) -> dict[str, str]:
    """The metadata of a delta: variant, base, and how it was made. Reads the header only.

    Raises:
        Problem: no such file, or it is no delta.
    """
    if not Path(path).is_file():
        raise Problem(f"There is no delta at {path}.", "The package carries those of toybox-inpainting and toybox-depth.", "Install it whole.")
    found = header.read_header(Path(path)).metadata or {}
    if found.get("finetune") != FORMAT or found.get("variant") not in CHANNELS:
        raise Problem(f"{path} is no delta of a variant.", f"Its metadata do not say {FORMAT}.", "`finetune inspect` says what it is.")
    return found
