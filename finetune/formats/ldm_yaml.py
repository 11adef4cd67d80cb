"""The `.yaml` beside a v-prediction checkpoint: AUTOMATIC1111's web UI learns from it, and from nothing else surely, that the model predicts v.

The web UI builds whatever classes a yaml names. It is therefore always written from the text below, with numbers filled in; nothing
of a file that was read ever gets into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import Problem

_OPEN_CLIP = """
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params:
        freeze: true
        layer: penultimate"""
_CLIP = """
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder"""

_TEMPLATE = """model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: v
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: {size}
    channels: 4
    cond_stage_trainable: false
    conditioning_key: {key}
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: false
        image_size: 32
        in_channels: {channels}
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        {heads}
        use_spatial_transformer: true
        use_linear_in_transformer: {linear}
        transformer_depth: 1
        context_dim: {context}
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:{text}
"""


def text(unet: Mapping[str, Any], encoder: Mapping[str, Any], layout: str) -> str:
    """The yaml of a v-prediction checkpoint of SD 1.x ("sd1") or SD 2.x ("sd2").

    Args:
        unet, encoder: diffusers' configurations; only numbers are taken from them.

    Raises:
        Problem: a number is none.
    """
    numbers = {"size": unet.get("sample_size") or 64, "channels": unet.get("in_channels", 4), "context": encoder.get("hidden_size")}
    if not all(type(number) is int for number in numbers.values()):
        raise Problem(f"The model's configuration gives {numbers} where whole numbers belong.", "They go into the .yaml for the web UI.",
                      "Correct unet/config.json and text_encoder/config.json.")
    second = layout == "sd2"
    keys = {4: "crossattn", 9: "hybrid", 5: "hybrid"}
    return _TEMPLATE.format(**numbers, key=keys.get(numbers["channels"], "crossattn"), text=_OPEN_CLIP if second else _CLIP,
                            heads="num_head_channels: 64" if second else "num_heads: 8", linear="true" if second else "false")
