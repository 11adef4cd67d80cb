"""A base model in memory: the parts every method works on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import diffusion, runs
from finetune.errors import Problem
from finetune.model.completeness import check_fit, check_width
from finetune.model.conditioning import Cond
from finetune.model.families import WEIGHTS, Location, locate
from finetune.model.parts import load_part, load_parts


@dataclass
class Base:
    """A loaded base model. All parts frozen and in evaluation mode until a method attaches.

    Attributes:
        schedule: alpha-bar per training timestep, (T,) float32.
        prediction: what the network says: "epsilon" or "v_prediction".
        hash: 16 hex digits over the weights files (see `runs.fingerprint`): other weights, other hash.
        resolution: native side of a picture in pixels.
        states: cache of text states per prompt, valid while the text encoders are frozen.
        placeholders: own tokens laid over the vocabulary: trigger -> list of tokens it expands to.
        text_encoder_2, tokenizer_2: SDXL's second pair, None elsewhere.
        dtype, unet_dtype: of the weights as they were loaded (see `load`).
    """

    name: str
    location: Location
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler_config: dict[str, Any]
    schedule: Tensor
    prediction: str
    hash: str
    device: torch.device
    resolution: int
    states: dict[str, Cond] = field(default_factory=dict)
    placeholders: dict[str, list[str]] = field(default_factory=dict)
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    dtype: torch.dtype = torch.float32
    unet_dtype: torch.dtype | None = None

    @property
    def known_as(self) -> str:
        """What files that leave this machine call it: its name or hub id, and of a local path only the last part."""
        place = Path(self.name).expanduser()
        return (place.resolve().name or self.name) if place.exists() else self.name

    @property
    def family(self) -> str:
        return self.location.family

    @property
    def context_width(self) -> int:
        """Width of the text states the UNet attends to."""
        return self.unet.config.cross_attention_dim

    def modules(self) -> dict[str, Any]:
        """The networks by name; SDXL has a second text encoder."""
        found = {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2, "vae": self.vae}
        return {name: module for name, module in found.items() if module is not None}

    def encoders(self) -> list[tuple[str, Any, Any]]:
        """(name, text encoder, its tokenizer) of each text encoder, in the order their states are joined."""
        pairs = [("text_encoder", self.text_encoder, self.tokenizer), ("text_encoder_2", self.text_encoder_2, self.tokenizer_2)]
        return [pair for pair in pairs if pair[1] is not None]

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for: 8 in every published model."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def ask(self, noisy: Tensor, timesteps: Tensor, cond: Cond, *, size: int | tuple[int, int] | None = None, extra: Tensor | None = None) -> Tensor:
        """The network's word on noisy latents, epsilon or v, (B, 4, H, W). Arguments as `question`."""
        return self.unet(**self.question(noisy, timesteps, cond, size=size, extra=extra)).sample

    def question(self, noisy: Tensor, timesteps: Tensor, cond: Cond, *, size: int | tuple[int, int] | None = None,
                 extra: Tensor | None = None) -> dict[str, Any]:
        """The UNet's arguments, for whoever asks another UNet of the same kind (a frozen teacher, say).

        SDXL is told the picture's size besides (micro-conditioning, Podell et al. 2023, sec. 2.2): original size, crop
        and target size, here the same size twice and no crop.

        Args:
            noisy: (B, 4, H, W). timesteps: (B,) or a scalar, on any device.
            size: side or (height, width) in pixels; None takes that of the latents.
            extra: (B, C, H, W), channels after the latents: mask and masked latents for inpainting (5), a depth map (1).
        """
        check_width(self, cond.states.shape[-1])
        found = {"sample": noisy if extra is None else torch.cat([noisy, extra.to(noisy)], dim=1),
                 "timestep": timesteps.to(noisy.device, non_blocking=True), "encoder_hidden_states": cond.states}
        if cond.pooled is not None:
            scale = self.pixels_per_latent
            height, width = (size, size) if isinstance(size, int) else size or (scale * noisy.shape[-2], scale * noisy.shape[-1])
            ids = torch.tensor([[height, width, 0, 0, height, width]]).to(noisy.device, cond.pooled.dtype, non_blocking=True)
            found["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": ids.expand(len(noisy), -1)}
        return found

    def free(self, *names: str) -> None:
        """Let the weights of networks go whose work is done; shapes and configuration stay. Only frozen ones may go."""
        for name in names:
            network = self.modules()[name]
            for module in network.modules():
                for leaf, value in module._parameters.items():
                    if value is not None:
                        module._parameters[leaf] = torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)

    def freed(self) -> list[str]:
        """Names of the networks whose weights were let go."""
        return [name for name, module in self.modules().items() if next(module.parameters()).is_meta]

    def recall(self, *names: str) -> list[str]:
        """Read the weights of networks again that were let go; returns which they were."""
        wanted = [name for name in names if name in self.modules() and next(self.modules()[name].parameters()).is_meta]
        for name in wanted:
            live = dict(load_part(self.location, name, self.dtype, self.unet_dtype).named_parameters())
            for path, module in self.modules()[name].named_modules():
                for leaf, value in module._parameters.items():
                    if value is not None:
                        there = live[f"{path}.{leaf}" if path else leaf].detach().to(self.device)
                        module._parameters[leaf] = torch.nn.Parameter(there, requires_grad=False)
        return wanted

    @contextlib.contextmanager
    def recalled(self, *names: str) -> Iterator[None]:
        """The networks have their weights while the context lasts; without names all have."""
        woken = self.recall(*(names or self.modules()))
        try:
            yield
        finally:
            self.free(*woken)

    def freeze(self) -> None:
        """No tensor of any network asks for a gradient."""
        for module in self.modules().values():
            module.requires_grad_(False).eval()

    def pipeline(self) -> Any:
        """The parts as diffusers' own text-to-image, inpainting or depth pipeline, sharing the modules."""
        import diffusers

        parts = {"vae": self.vae, "unet": self.unet, "scheduler": diffusers.DDIMScheduler.from_config(self.scheduler_config), "feature_extractor": None}
        for name, encoder, tokenizer in self.encoders():
            parts |= {name: encoder, name.replace("text_encoder", "tokenizer"): tokenizer}
        if self.location.variant == "depth":
            return diffusers.StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None)
        painting = self.location.variant == "inpainting"
        if self.text_encoder_2 is not None:
            return (diffusers.StableDiffusionXLInpaintPipeline if painting else diffusers.StableDiffusionXLPipeline)(**parts, add_watermarker=False)
        return (diffusers.StableDiffusionInpaintPipeline if painting else diffusers.StableDiffusionPipeline)(
            **parts, safety_checker=None, requires_safety_checker=False)


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N -> a device that exists.

    Raises:
        Problem: the machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Problem(f"There is no device {name!r} here.", "Known are auto, cpu, cuda and cuda:N.", "Use --device auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Problem(f"The device {name!r} is not on this machine.", "torch sees no CUDA GPU.", "Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Problem(f"The device {name!r} is not on this machine.", f"torch sees {torch.cuda.device_count()} GPU(s), counted from 0.", "Use --device cuda.")
    return device


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, unet_dtype: torch.dtype | None = None,
         unet_later: bool = False) -> Base:
    """Load a base model by name (see `locate`), frozen, in evaluation mode.

    Args:
        dtype: of all weights.
        unet_dtype: of the UNet's linear and convolution weights, where they are to be kept in another format.
        unet_later: leave the UNet's weights where they are until `recall`: what is done before needs no room for them.

    Raises:
        Problem: not found, incomplete, or its weights do not fit its configuration.
    """
    location = locate(name)
    parts = load_parts(location, dtype, unet_dtype, weights_hash(replace(location, variant="plain", delta=None)) if location.delta else "", unet_later)
    config = parts.pop("scheduler_config")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise Problem(f"The model {name!r} predicts {prediction!r}.", "Only epsilon and v_prediction are known.")
    device = torch.device(device)
    try:
        share = diffusion.alphas_cumprod(config.get("num_train_timesteps", 1000), config["beta_start"], config["beta_end"], config["beta_schedule"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise Problem(f"The noise schedule of the model {name!r} cannot be used.", f"{error}.", "Use a model with a scaled_linear or linear schedule.") from error
    if config.get("rescale_betas_zero_snr"):
        share = diffusion.zero_terminal_snr(share)
    base = Base(name=name, location=location, **parts, scheduler_config=config, schedule=share, prediction=prediction, hash=weights_hash(location),
                device=device, resolution=0, dtype=dtype, unet_dtype=unet_dtype)
    check_fit(base)
    base.resolution = base.unet.config.sample_size * base.pixels_per_latent
    if base.text_encoder_2 is not None:  # older configurations name no end-of-text id; then a learned word, whose id is higher, is taken for it
        base.text_encoder_2.text_model.eos_token_id = base.tokenizer_2.eos_token_id
    for name in base.modules().keys() - set(base.freed()):
        base.modules()[name].to(device)
    base.freeze()
    return base


def weights_hash(location: Location) -> str:
    """What `Base.hash` will be, from the files alone."""
    if location.kind == "single-file":
        return runs.fingerprint([location.path])
    weights = [path for part in WEIGHTS for path in sorted((location.path / part).glob("*.safetensors"))]
    return runs.fingerprint([*weights, *([location.delta] if location.delta else [])])
