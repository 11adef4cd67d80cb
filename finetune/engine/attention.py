"""Attention of the UNet: torch's fused kernel, or plain products over chunks of queries where that is faster.

B rows, N heads, L queries, M keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.engine.table import fastest

CHUNK = 128  # queries at a time: their scores stay in the cache of a core
TOLERANCE = 0.03  # of the largest value, between two ways of bf16


def attend(unet: nn.Module, kind: str) -> None:
    """Give a UNet's plain attention layers a processor without the checks they do not need.

    Args:
        kind: "sdpa", "chunked", or "auto": chunked in bf16 on a CPU where it is faster for a layer's shape.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    for layer in unet.modules():
        if type(getattr(layer, "processor", None)) is AttnProcessor2_0 and _is_plain(layer):
            layer.processor = Plain(kind)


def _is_plain(layer: Any) -> bool:
    """What Stable Diffusion's layers are: no norms inside, no residual, no scaling of the output."""
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_cross, getattr(layer, "norm_q", None), getattr(layer, "norm_k", None))
    return not any(norms) and not layer.residual_connection and layer.rescale_output_factor == 1 and not getattr(layer, "added_kv_proj_dim", None)


class Plain:
    """Queries from the picture, keys and values from the picture or the text; AttnProcessor2_0 without its questions."""

    def __init__(self, kind: str):
        self.kind = kind
        self._chosen: dict[tuple[int, ...], bool] = {}

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                 temb: Tensor | None = None, **ignored: Any) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (self._heads(projected, attn.heads) for projected in (
            attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        if attention_mask is None and self._in_chunks(query, key, value):
            found = Chunked.apply(query, key, value)
        else:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        found = found.transpose(1, 2).reshape(len(found), -1, query.shape[1] * query.shape[3])
        return attn.to_out[1](attn.to_out[0](found))

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:  # (B, L, N D) -> (B, N, L, D)
        return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)

    def _in_chunks(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        if self.kind != "auto":
            return self.kind == "chunked"
        if query.dtype != torch.bfloat16 or query.device.type != "cpu":
            return False
        shape = (*query.shape, key.shape[2])
        if shape not in self._chosen:
            self._chosen[shape] = _chunks_win(query, key, value, shape)
        return self._chosen[shape]


def _chunks_win(query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether chunks are right and faster, forward and backward, for these shapes."""
    parts = [part.detach().clone().requires_grad_() for part in (query, key, value)]

    def work(way: Any) -> Tensor:
        with torch.enable_grad():
            found = way(*parts)
            torch.autograd.grad(found, parts, torch.ones_like(found))
        return found.detach()

    ways = {"sdpa": lambda: work(F.scaled_dot_product_attention), "chunked": lambda: work(Chunked.apply)}
    return fastest(f"attention bf16 {shape}", ways, TOLERANCE) == "chunked"


class Chunked(torch.autograd.Function):
    """softmax(q k' / sqrt(D)) v for some queries at a time; scores are computed again in the backward pass (as Rabe & Staats 2021,
    2112.05682), so only q, k and v are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, N, L, D), (B, N, M, D) twice -> (B, N, L, D)
        ctx.save_for_backward(query, key, value)
        return torch.cat([_shares(part, key) @ value for part in query.split(CHUNK, dim=2)], dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        scale, queries = query.shape[-1] ** -0.5, []
        wide_type = torch.promote_types(query.dtype, torch.float32)
        keys, values = (torch.zeros_like(part, dtype=wide_type) for part in (key, value))
        for part, wanted in zip(query.split(CHUNK, dim=2), grad.split(CHUNK, dim=2), strict=True):
            shares = _shares(part, key)  # (B, N, chunk, M)
            values += shares.transpose(2, 3) @ wanted
            slope, wide = (wanted @ value.transpose(2, 3)).to(wide_type), shares.to(wide_type)
            scores = (wide * (slope - (wide * slope).sum(-1, keepdim=True)) * scale).to(query.dtype)
            queries.append(scores @ key)
            keys += scores.transpose(2, 3) @ part
        return torch.cat(queries, dim=2), keys.to(key.dtype), values.to(value.dtype)


def _shares(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)), taken in float32 or wider, in the dtype of q."""
    scores = query @ key.transpose(2, 3)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.to(wide) * query.shape[-1] ** -0.5).softmax(-1).to(query.dtype)
