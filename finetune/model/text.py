"""From prompts to text states, with own tokens laid over a frozen vocabulary.

B prompts, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.model.base import Base
from finetune.model.conditioning import Cond


class TokenOverlay(nn.Module):
    """Own embedding rows laid over a frozen table (Gal et al. 2023; the idea of PEFT's trainable tokens).

    Ids below the table's size read the table, ids from there on read `rows`; so no other row can change by one bit
    and the optimizer holds n x D numbers instead of the whole table.

    Args:
        table: the frozen token embedding, V x D.
        rows: own rows, n x D, float32.
    """

    def __init__(self, table: nn.Embedding, rows: nn.Parameter):
        super().__init__()
        self.table, self.rows = table, rows
        self.num_embeddings, self.embedding_dim = table.num_embeddings + len(rows), table.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The frozen table (what libraries look at for dtype and device)."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        own = ids - self.table.num_embeddings
        found = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        rows = self.rows.to(found.dtype)[own.clamp(min=0)]
        return torch.where((own >= 0).unsqueeze(-1), rows, found)


def add_tokens(base: Base, trigger: str, rows: Tensor) -> nn.Parameter:
    """Teach tokenizer and text encoder a trigger that stands for `rows` (n x D); returns the rows as a parameter.

    Several rows become the tokens T, T_1, ... as in diffusers' loader.

    Raises:
        Problem: the trigger is a word already, or tokens were added before.
    """
    embeddings = base.text_encoder.embeddings if hasattr(base.text_encoder, "embeddings") else base.text_encoder.text_model.embeddings
    table = embeddings.token_embedding
    if isinstance(table, TokenOverlay):
        raise Problem(f"The placeholder {trigger!r} cannot be added.", "One learned embedding is loaded already.", "Load one at a time.")
    if not isinstance(table, nn.Embedding) or table.num_embeddings < len(base.tokenizer):
        raise Problem(f"The placeholder {trigger!r} cannot be added.", "The tokenizer has more words than the text encoder has rows.")
    names = [trigger, *(f"{trigger}_{number}" for number in range(1, len(rows)))]
    vocabulary = base.tokenizer.get_vocab()
    known = [name for name in names if name in vocabulary or f"{name.lower()}</w>" in vocabulary]
    if known or base.tokenizer.add_tokens(names) != len(names):
        raise Problem(f"The placeholder {trigger!r} is already a word of this model.", "Its meaning would be overwritten.",
                      f"Choose another, such as '<{re.sub('[^A-Za-z0-9]+', '-', trigger).strip('-') or 'thing'}-new>'.")
    parameter = nn.Parameter(rows.detach().clone().float().to(base.device))
    overlay = TokenOverlay(table, parameter)
    first = base.tokenizer.convert_tokens_to_ids(trigger)
    if first != table.num_embeddings:  # rows unused by the tokenizer would shift the ids
        overlay.table = _trimmed(table, first)
    embeddings.token_embedding = overlay
    base.placeholders[trigger] = names
    base.states.clear()
    return parameter


def _trimmed(table: nn.Embedding, count: int) -> nn.Embedding:
    """The first `count` rows as a frozen table."""
    return nn.Embedding.from_pretrained(table.weight[:count].detach(), freeze=True)


def expand(base: Base, prompt: str) -> str:
    """Replace each own trigger by all the tokens it stands for."""
    for trigger, names in base.placeholders.items():
        prompt = prompt.replace(trigger, " ".join(names))
    return prompt


def token_ids(base: Base, prompts: list[str], tokenizer: Any = None) -> Tensor:
    """(B, L) ids, padded to the model's length, cut where longer (see `too_long`); by the first tokenizer unless told."""
    texts, tokenizer = [expand(base, prompt) for prompt in prompts], tokenizer or base.tokenizer
    return tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids


def too_long(base: Base, prompts: list[str]) -> list[str]:
    """The prompts of which the model will not read the end."""
    limit = base.tokenizer.model_max_length
    return [prompt for prompt in dict.fromkeys(prompts) if len(base.tokenizer(expand(base, prompt)).input_ids) > limit]


def encode(base: Base, prompts: list[str]) -> Cond:
    """Text states as diffusers' pipelines take them, differentiable.

    One encoder: its last hidden state after the final norm, (B, L, D). SDXL: the second to last of both, without a final
    norm, side by side (Podell et al. 2023, sec. 2.1), and the second encoder's projected end-of-text state, (B, P).
    """
    if base.text_encoder_2 is None:
        return Cond(base.text_encoder(token_ids(base, prompts).to(base.device))[0])
    found = [encoder(token_ids(base, prompts, tokenizer).to(base.device), output_hidden_states=True) for _, encoder, tokenizer in base.encoders()]
    return Cond(torch.cat([states.hidden_states[-2] for states in found], dim=-1), found[-1].text_embeds)


@torch.no_grad()
def encode_cached(base: Base, prompts: list[str]) -> Cond:
    """The same from a cache per prompt: right only while the text encoders are frozen."""
    for prompt in prompts:
        if prompt not in base.states:
            base.states[prompt] = encode(base, [prompt])
    return Cond.cat([base.states[prompt] for prompt in prompts])
