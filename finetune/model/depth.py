"""A depth map from a picture, by an estimator that lies on this machine (transformers' depth models)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import Problem

if TYPE_CHECKING:
    from PIL.Image import Image

METRIC = ("glpn", "zoedepth")  # answer in metres, where near is small


def estimate(folder: Path, picture: Image) -> Image:
    """Depth of a picture as a map of its size (mode F), near things large, as depth models read it.

    Estimators of the MiDaS kind answer with disparity already; of those that answer with distance the reciprocal is taken.

    Args:
        folder: a transformers model for depth estimation with its preprocessor (DPT, Depth Anything, ZoeDepth, ...).

    Raises:
        Problem: no such model there.
    """
    import torch
    from PIL import Image as pillow
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    if not (folder / "config.json").is_file():
        raise Problem(f"There is no depth model at {folder}.", "A transformers folder holds config.json, weights and preprocessor_config.json.",
                      "Give such a folder with --depth-model, or a depth map with --depth.")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise Problem(f"The depth model {folder} cannot be loaded.", str(error).splitlines()[0], "Check that the folder is complete.") from None
    with torch.no_grad():
        found = model(**processor(images=picture.convert("RGB"), return_tensors="pt")).predicted_depth.float()
    if model.config.model_type in METRIC or getattr(model.config, "depth_estimation_type", "") == "metric":
        found = 1 / found.clamp(min=1e-3)
    large = torch.nn.functional.interpolate(found[:, None], size=(picture.height, picture.width), mode="bicubic", align_corners=False)
    return pillow.fromarray(large[0, 0].numpy())
