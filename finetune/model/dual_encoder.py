"""A small CLIP: a convolutional image tower and a CLIP text tower that meet in one space (Radford et al., 2021).

The judge of the embedded toybox is one of these. A ResNet stands where CLIP usually has a vision transformer,
because on a few ten thousand small pictures a convolution learns shapes many times faster than patches do.

Shapes: B batch, H W picture height and width, L tokens, D projection width.

On disk a dual encoder is a folder of `config.json`, `model.safetensors` and, beside them, the tokenizer's files.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# Written by transformers for its own bookkeeping; they would only tie the file to one version of it.
_BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


class DualEncoder(nn.Module):
    """Picture and caption encoders with a shared, normalised feature space.

    Args:
        vision: configuration of the image tower.
        text: configuration of the text tower.
        projection_dim: width D of the shared space.
        image_size: height and width of the pictures the image tower was trained on, in pixels.
        mean, std: per-channel statistics that normalise pictures in [0, 1].
    """

    def __init__(
        self,
        vision: ResNetConfig,
        text: CLIPTextConfig,
        projection_dim: int,
        image_size: int = 64,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.vision = ResNetModel(vision)
        self.text = CLIPTextModel(text)
        self.visual_projection = nn.Linear(vision.hidden_sizes[-1], projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), where CLIP starts
        self.projection_dim = projection_dim
        self.image_size = image_size
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Bring pictures (B, 3, H, W) in [0, 1] to the size and the statistics the image tower was trained on."""
        size = (self.image_size, self.image_size)
        if pictures.shape[-2:] != size:
            smaller = min(pictures.shape[-2:]) > self.image_size
            pictures = F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=smaller)
        mean = pictures.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pictures.new_tensor(self.std).view(1, 3, 1, 1)
        return (pictures.clamp(0, 1) - mean) / std

    def pooled_pictures(self, pixel_values: Tensor) -> Tensor:
        """Image tower before the projection, (B, C), for pictures already normalised."""
        return self.vision(pixel_values=pixel_values).pooler_output.flatten(1)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-length features (B, D) of pictures (B, 3, H, W) already normalised (see `normalise`)."""
        return F.normalize(self.visual_projection(self.pooled_pictures(pixel_values)), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit-length features (B, D) of token ids (B, L), read at each caption's end-of-text token."""
        pooled = self.text(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return F.normalize(self.text_projection(pooled), dim=-1)

    def save_folder(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write configuration and weights under `folder`; `dtype` (say torch.float16) halves the file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "vision": _plain(self.vision.config),
            "text": _plain(self.text.config),
            "projection_dim": self.projection_dim,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensor = tensor.detach().cpu().contiguous()
            tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path) -> "DualEncoder":
        """Read what `save_folder` wrote, as float32 and in evaluation mode.

        Raises:
            FileNotFoundError: the folder lacks the configuration or the weights.
        """
        folder = Path(folder)
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        model = cls(
            ResNetConfig(**config["vision"]),
            CLIPTextConfig(**config["text"]),
            config["projection_dim"],
            config["image_size"],
            tuple(config["mean"]),
            tuple(config["std"]),
        )
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))  # copies into float32, whatever the file holds
        return model.eval()


def _plain(config: ResNetConfig | CLIPTextConfig) -> dict:
    """Only what differs from the library's defaults, and nothing about the library itself."""
    return {key: value for key, value in config.to_diff_dict().items() if key not in _BOOKKEEPING}
