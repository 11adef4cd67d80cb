"""Which tensors of which shape a Stable Diffusion of given configuration has, in diffusers' names. Torch-free arithmetic.

UNet: Rombach et al. 2022 (arXiv:2112.10752), appendix E; SDXL: Podell et al. 2023 (arXiv:2307.01952). And the way back: the
configuration that the shapes in a single file imply (all but the number of heads, which no shape shows).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


Shapes = dict[str, tuple[int, ...]]


def _affine(found: Shapes, name: str, weight: tuple[int, ...], bias: bool = True) -> None:
    found[f"{name}.weight"] = weight
    if bias:
        found[f"{name}.bias"] = weight[:1]


def _resnet(found: Shapes, name: str, inner: int, outer: int, time: int | None) -> None:
    _affine(found, f"{name}.norm1", (inner,))
    _affine(found, f"{name}.conv1", (outer, inner, 3, 3))
    if time is not None:
        _affine(found, f"{name}.time_emb_proj", (outer, time))
    _affine(found, f"{name}.norm2", (outer,))
    _affine(found, f"{name}.conv2", (outer, outer, 3, 3))
    if inner != outer:
        _affine(found, f"{name}.conv_shortcut", (outer, inner, 1, 1))


def _transformer(found: Shapes, name: str, width: int, depth: int, context: int, linear: bool) -> None:
    _affine(found, f"{name}.norm", (width,))
    for side in ("proj_in", "proj_out"):
        _affine(found, f"{name}.{side}", (width, width) if linear else (width, width, 1, 1))
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for norm in ("norm1", "norm2", "norm3"):
            _affine(found, f"{block}.{norm}", (width,))
        for attention, source in (("attn1", width), ("attn2", context)):
            _affine(found, f"{block}.{attention}.to_q", (width, width), bias=False)
            _affine(found, f"{block}.{attention}.to_k", (width, source), bias=False)
            _affine(found, f"{block}.{attention}.to_v", (width, source), bias=False)
            _affine(found, f"{block}.{attention}.to_out.0", (width, width))
        _affine(found, f"{block}.ff.net.0.proj", (8 * width, width))
        _affine(found, f"{block}.ff.net.2", (width, 4 * width))


def unet_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensor name to shape of a UNet2DConditionModel with diffusers' configuration `config`."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    context, linear, time = config["cross_attention_dim"], bool(config.get("use_linear_projection")), 4 * widths[0]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    found: Shapes = {}
    _affine(found, "conv_in", (widths[0], config.get("in_channels", 4), 3, 3))
    _affine(found, "time_embedding.linear_1", (time, widths[0]))
    _affine(found, "time_embedding.linear_2", (time, time))
    if config.get("addition_embed_type") == "text_time":
        _affine(found, "add_embedding.linear_1", (time, config["projection_class_embeddings_input_dim"]))
        _affine(found, "add_embedding.linear_2", (time, time))
    for block, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for layer in range(layers):
            before = widths[max(block - 1, 0)] if layer == 0 else width
            _resnet(found, f"down_blocks.{block}.resnets.{layer}", before, width, time)
            if "CrossAttn" in kind:
                _transformer(found, f"down_blocks.{block}.attentions.{layer}", width, depths[block], context, linear)
        if block < len(widths) - 1:
            _affine(found, f"down_blocks.{block}.downsamplers.0.conv", (width, width, 3, 3))
    for number in (0, 1):
        _resnet(found, f"mid_block.resnets.{number}", widths[-1], widths[-1], time)
    _transformer(found, "mid_block.attentions.0", widths[-1], depths[-1], context, linear)
    back = widths[::-1]
    for block, (kind, width) in enumerate(zip(config["up_block_types"], back, strict=True)):
        for layer in range(layers + 1):
            before = back[max(block - 1, 0)] if layer == 0 else width
            skip = back[min(block + 1, len(back) - 1)] if layer == layers else width
            _resnet(found, f"up_blocks.{block}.resnets.{layer}", before + skip, width, time)
            if "CrossAttn" in kind:
                _transformer(found, f"up_blocks.{block}.attentions.{layer}", width, depths[::-1][block], context, linear)
        if block < len(widths) - 1:
            _affine(found, f"up_blocks.{block}.upsamplers.0.conv", (width, width, 3, 3))
    _affine(found, "conv_norm_out", (widths[0],))
    _affine(found, "conv_out", (config.get("out_channels", 4), widths[0], 3, 3))
    return found


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """The same of an AutoencoderKL."""
    widths, layers, latent = list(config["block_out_channels"]), config["layers_per_block"], config["latent_channels"]
    found: Shapes = {}
    _affine(found, "encoder.conv_in", (widths[0], config.get("in_channels", 3), 3, 3))
    _affine(found, "decoder.conv_in", (widths[-1], latent, 3, 3))
    for side, order, count, sampler in (("encoder.down", widths, layers, "downsamplers"), ("decoder.up", widths[::-1], layers + 1, "upsamplers")):
        for block, width in enumerate(order):
            for layer in range(count):
                _resnet(found, f"{side}_blocks.{block}.resnets.{layer}", order[max(block - 1, 0)] if layer == 0 else width, width, None)
            if block < len(widths) - 1:
                _affine(found, f"{side}_blocks.{block}.{sampler}.0.conv", (width, width, 3, 3))
    for side, last, out in (("encoder", widths[-1], 2 * latent), ("decoder", widths[0], config.get("out_channels", 3))):
        for number in (0, 1):
            _resnet(found, f"{side}.mid_block.resnets.{number}", widths[-1], widths[-1], None)
        _affine(found, f"{side}.mid_block.attentions.0.group_norm", (widths[-1],))
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            _affine(found, f"{side}.mid_block.attentions.0.{part}", (widths[-1], widths[-1]))
        _affine(found, f"{side}.conv_norm_out", (last,))
        _affine(found, f"{side}.conv_out", (out, last, 3, 3))
    _affine(found, "quant_conv", (2 * latent, 2 * latent, 1, 1))
    _affine(found, "post_quant_conv", (latent, latent, 1, 1))
    return found


def clip_shapes(config: Mapping[str, Any], projection: bool = False) -> Shapes:
    """The same of CLIP's text encoder, without the `text_model.` level.

    Args:
        projection: with the text projection, as SDXL's second encoder has it.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: Shapes = {"embeddings.token_embedding.weight": (config["vocab_size"], width),
                     "embeddings.position_embedding.weight": (config.get("max_position_embeddings", 77), width)}
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _affine(found, f"{layer}.self_attn.{part}", (width, width))
        _affine(found, f"{layer}.layer_norm1", (width,))
        _affine(found, f"{layer}.layer_norm2", (width,))
        _affine(found, f"{layer}.mlp.fc1", (inner, width))
        _affine(found, f"{layer}.mlp.fc2", (width, inner))
    _affine(found, "final_layer_norm", (width,))
    if projection:
        found["text_projection.weight"] = (config["projection_dim"], width)
    return found


def shapes_of(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Shapes]:
    """All parts of a model by component, from its configurations."""
    found = {"unet": unet_shapes(configs["unet"]), "vae": vae_shapes(configs["vae"]), "text_encoder": clip_shapes(configs["text_encoder"])}
    if "text_encoder_2" in configs:
        found["text_encoder_2"] = clip_shapes(configs["text_encoder_2"], projection=True)
    return found


def configs_of(parts: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, dict[str, Any]]:
    """The configurations that a checkpoint's shapes imply (parts in diffusers' names); heads and activations are not in them.

    Raises:
        KeyError: a tensor every such model has is missing.
    """
    configs = {"unet": _unet_config(parts["unet"]), "vae": _vae_config(parts["vae"])}
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            shapes = parts[name]
            vocabulary, width = shapes["embeddings.token_embedding.weight"]
            configs[name] = {"vocab_size": vocabulary, "hidden_size": width,
                             "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
                             "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
                             "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
                             "projection_dim": shapes.get("text_projection.weight", (width,))[0]}
    return configs


def _unet_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    count = _count(shapes, r"down_blocks\.(\d+)\.")
    down = [any(name.startswith(f"down_blocks.{block}.attentions.") for name in shapes) for block in range(count)]
    up = [any(name.startswith(f"up_blocks.{block}.attentions.") for name in shapes) for block in range(count)]
    middle = _count(shapes, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    depths = [_count(shapes, rf"down_blocks\.{block}\.attentions\.0\.transformer_blocks\.(\d+)\.") or middle for block in range(count)]
    config = {"block_out_channels": [shapes[f"down_blocks.{block}.resnets.0.conv2.weight"][0] for block in range(count)],
              "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."), "in_channels": shapes["conv_in.weight"][1],
              "out_channels": shapes["conv_out.weight"][0],
              "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down],
              "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up],
              "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
              "transformer_layers_per_block": depths, "use_linear_projection": len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2}
    if "add_embedding.linear_1.weight" in shapes:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1]}
    return config


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    count = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return {"block_out_channels": [shapes[f"encoder.down_blocks.{block}.resnets.0.conv2.weight"][0] for block in range(count)],
            "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."), "latent_channels": shapes["post_quant_conv.weight"][0],
            "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0]}


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})
