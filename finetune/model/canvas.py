"""What a picture is sampled over besides noise: a picture to begin from, a mask to keep to, a depth map to follow.

B pictures, H and W latent height and width. Everything here has one row, which stands for every picture of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import Problem

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from finetune.model.base import Base

VARIANTS = {4: "plain", 9: "inpainting", 5: "depth"}  # by the channels the UNet takes


@dataclass(frozen=True)
class Canvas:
    """The pictures of one sampling, made ready.

    Attributes:
        size: (height, width) in pixels.
        start: latents of the init picture, (1, 4, H, W): the mean of the autoencoder's posterior, so that no draw is spent on it.
        paint: 1 where the mask asks for something new, (1, 1, H, W), where an ordinary model must be kept to it.
        extra: channels the network reads after the latents, (1, C, H, W).
        original, stencil: the init picture and the mask at `size`, to put the kept pixels back.
    """

    size: tuple[int, int]
    start: Tensor | None = None
    paint: Tensor | None = None
    extra: Tensor | None = None
    original: Image | None = None
    stencil: Image | None = None


def check(variant: str, model: str, *, init: bool, mask: bool, depth: bool, strength: float = 1.0) -> None:
    """Refuse pictures that do not go together or that the model cannot use. Needs no weights.

    Args:
        variant: plain, inpainting (9 channels) or depth (5). model: its name, for the message.

    Raises:
        Problem: one sentence on what does not fit.
    """
    if mask and not init:
        raise Problem("--mask was given without --init-image.", "A mask says which part of a picture to paint anew.", "Add --init-image PICTURE.")
    if strength != 1 and not init:
        raise Problem(f"--denoising-strength {strength:g} was given without --init-image.", "It says how far to go from a picture.",
                      "Add --init-image PICTURE, or leave it out.")
    if not 0 <= strength <= 1:
        raise Problem(f"--denoising-strength {strength:g} is not between 0 and 1.", "0 keeps the picture, 1 keeps nothing of it.")
    if depth and variant != "depth":
        raise Problem(f"--depth cannot be used with the model {model!r}.", "Its network reads no depth map (4 or 9 channels, not 5).",
                      "Use a depth model, such as --model toybox-depth, or leave --depth out.")
    if variant == "depth" and not depth:
        raise Problem(f"The model {model!r} is a depth model, and no depth map was given.", "Its network reads one beside the latents.",
                      "Add --depth MAP, or --depth-model FOLDER with a picture.")
    if variant == "depth" and mask:
        raise Problem(f"--mask cannot be used with the depth model {model!r}.", "Keeping a part of a picture and its depth are two different tasks.",
                      "Use a plain or an inpainting model for masks.")


def size_of(resolution: int, step: int, size: int | tuple[int, int] | None, init: Image | None) -> tuple[int, int]:
    """(height, width) in pixels: what was asked, else the init picture's shape at the model's scale, else the model's own square.

    Args:
        resolution: the model's native side. step: pixels a latent stands for, 8 in published models.

    Raises:
        Problem: a side that is no multiple of `step`.
    """
    if size is None:
        if init is None:
            return resolution, resolution
        width, height = init.size
        scale = resolution / min(width, height)
        return tuple(max(step, round(side * scale / step) * step) for side in (height, width))  # type: ignore[return-value]
    height, width = (size, size) if isinstance(size, int) else size
    for side in (width, height):
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            raise Problem(f"The size {width}x{height} cannot be rendered.", f"{side} is no multiple of {step}, the pixels one latent stands for.",
                          f"Use {near} instead.")
    return height, width


def prepare(base: Base, size: int | tuple[int, int] | None = None, *, init: Image | None = None, mask: Image | None = None,
            depth: Image | None = None, strength: float = 1.0) -> Canvas:
    """Bring pictures to the size asked for and into the form the network reads.

    Args:
        init: any picture; cut about its centre where its shape is another. mask: as large as `init`; white is painted anew.
        depth: a map of one channel, near things bright (as MiDaS writes them); its range does not matter.

    Raises:
        Problem: pictures that do not fit one another or the model.
    """
    channels = base.unet.config.in_channels
    if channels not in VARIANTS:
        raise Problem(f"The model {base.name!r} takes {channels} channels.", "Known are 4 (plain), 9 (inpainting) and 5 (depth).")
    variant = VARIANTS[channels]
    check(variant, base.name, init=init is not None, mask=mask is not None, depth=depth is not None, strength=strength)
    if mask is not None and init is not None and mask.size != init.size:
        raise Problem(f"The mask is {mask.width}x{mask.height} pixels, the init picture {init.width}x{init.height}.",
                      "Which pixel belongs to which cannot be told.", "Make the mask as large as the picture.")
    height, width = size_of(base.resolution, base.pixels_per_latent, size, init)
    original = fitted(init.convert("RGB"), width, height) if init is not None else None
    stencil = fitted(mask.convert("L"), width, height).point(lambda value: 255 * (value >= 128)) if mask is not None else None
    start = encode_picture(base, original) if original is not None else None
    paint, extra = None, None
    if variant == "inpainting":
        extra = _inpainting(base, original, stencil, (height, width))
    elif stencil is not None:
        paint = _small(base, _unit(stencil))
    if variant == "depth":
        extra = _depth(base, depth, (height, width))
    return Canvas((height, width), start, paint, extra, original, stencil)


def fitted(picture: Image, width: int, height: int) -> Image:
    """The picture at exactly this size; of another shape it loses its edges, not its proportions."""
    from PIL import Image as pillow
    from PIL import ImageOps

    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), pillow.Resampling.LANCZOS)


def encode_picture(base: Base, picture: Image | Tensor) -> Tensor:
    """A picture (or pixels in [-1, 1], (1, 3, height, width)) as scaled latents, (1, 4, H, W).

    SDXL's autoencoder overflows in half precision (its configuration says force_upcast) and then works in float32.
    """
    import torch

    pixels = picture if isinstance(picture, torch.Tensor) else 2 * _unit(picture) - 1
    mode = through(base.vae, lambda dtype: base.vae.encode(pixels.to(base.device, dtype)).latent_dist.mode())
    return (mode * base.vae.config.scaling_factor).to(base.unet.dtype)


def through(vae: Any, run: Any) -> Tensor:
    """What an autoencoder makes, in float32 where fp16 is too small for it.

    Activations of SDXL's autoencoder pass 65,504, the largest number of fp16, and the picture comes out black. Where its
    configuration says so (`force_upcast`) it runs in float32 at once; where it does not, a result with numbers that are
    not finite is made again in float32, and the autoencoder stays there.

    Args:
        run: called with the autoencoder's number format, returns a tensor.
    """
    import torch

    half = vae.dtype == torch.float16
    if not (half and vae.config.get("force_upcast", False)):
        found = run(vae.dtype)
        if not half or torch.isfinite(found).all():
            return found
        vae.register_to_config(force_upcast=True)
    vae.to(torch.float32)
    try:
        return run(torch.float32)
    finally:
        vae.to(torch.float16)


def _unit(picture: Image) -> Tensor:
    """Pixels in [0, 1], (1, C, height, width)."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return (values[None, None] if values.ndim == 2 else values.permute(2, 0, 1)[None]).contiguous()


def _small(base: Base, mask: Tensor) -> Tensor:
    """A mask of pixels as one of latents, by the pixel at each square's corner (as the inpainting models were trained)."""
    import torch

    side = base.pixels_per_latent
    return torch.nn.functional.interpolate(mask, size=(mask.shape[-2] // side, mask.shape[-1] // side)).to(base.device, base.unet.dtype)


def _inpainting(base: Base, original: Image | None, stencil: Image | None, size: tuple[int, int]) -> Tensor:
    """Mask and latents of the picture with the masked part grey, (1, 5, H, W); without a mask all is to be painted."""
    import torch

    mask = _unit(stencil) if stencil is not None else torch.ones(1, 1, *size)
    pixels = 2 * _unit(original) - 1 if original is not None else torch.zeros(1, 3, *size)
    return torch.cat([_small(base, mask), encode_picture(base, pixels * (mask < 0.5))], dim=1)


def _depth(base: Base, depth: Image, size: tuple[int, int]) -> Tensor:
    """A depth map of latent size in [-1, 1], (1, 1, H, W), as the depth models were trained (bicubic, then its own range)."""
    import numpy as np
    import torch

    values = np.array(fitted(depth.convert("F"), size[1], size[0]), dtype=np.float32)
    side = base.pixels_per_latent
    small = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size=(size[0] // side, size[1] // side), mode="bicubic",
                                            align_corners=False)
    low, high = small.amin(), small.amax()
    if high - low < 1e-6 * max(1.0, float(high.abs())):
        raise Problem("The depth map is the same everywhere.", "It says nothing of what is near and what is far.", "Check that it is the file you meant.")
    return (2 * (small - low) / (high - low) - 1).to(base.device, base.unet.dtype)
