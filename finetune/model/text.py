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
        table: the frozen token embedding, V x D, or another overlay of it.
        rows: own rows, n x D, float32.
    """

    def __init__(self, table: nn.Embedding | TokenOverlay, rows: nn.Parameter):
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


def add_tokens(base: Base, trigger: str, *rows: Tensor) -> list[nn.Parameter]:
    """Teach tokenizers and text encoders a trigger that stands for `rows`; returns the rows as parameters.

    Several rows become the tokens T, T_1, ... as in diffusers' loader. More triggers may follow: their rows are laid over
    the table with the first ones' rows on it.

    Args:
        rows: n x D for each text encoder, in the order of `Base.encoders`.

    Raises:
        Problem: the trigger is a word already, or the model's tokenizer and table do not agree.
    """
    names = [trigger, *(f"{trigger}_{number}" for number in range(1, len(rows[0])))]
    for part, encoder, tokenizer in base.encoders():
        if encoder.get_input_embeddings().num_embeddings < len(tokenizer):
            raise Problem(f"The placeholder {trigger!r} cannot be added.", f"The tokenizer has more words than the {part} has rows.",
                          "The model's folder is damaged: its tokenizer belongs to another encoder.")
        vocabulary = tokenizer.get_vocab()
        if any(name in vocabulary or f"{name.lower()}</w>" in vocabulary for name in names):
            raise Problem(f"The placeholder {trigger!r} is already a word of this model.", "Its meaning would be overwritten.",
                          f"Choose another, such as '<{re.sub('[^A-Za-z0-9]+', '-', trigger).strip('-') or 'thing'}-new>'.")
    found = [_add(encoder, tokenizer, names, own.to(base.device)) for (_, encoder, tokenizer), own in zip(base.encoders(), rows, strict=True)]
    base.placeholders[trigger] = names
    base.states.clear()
    return found


def _add(encoder: nn.Module, tokenizer: Any, names: list[str], rows: Tensor) -> nn.Parameter:
    """One text encoder's share of `add_tokens`."""
    parameter = nn.Parameter(rows.detach().clone().float())
    table = encoder.get_input_embeddings()
    tokenizer.add_tokens(names)
    first = tokenizer.convert_tokens_to_ids(names[0])
    if first != table.num_embeddings:  # rows unused by the tokenizer would shift the ids
        table = _trimmed(table, first)
    embeddings = encoder.text_model.embeddings if hasattr(encoder, "text_model") else encoder.embeddings
    embeddings.token_embedding = TokenOverlay(table, parameter)
    return parameter


def _trimmed(table: nn.Embedding, count: int) -> nn.Embedding:
    """The first `count` rows as a frozen table."""
    return nn.Embedding.from_pretrained(table.weight[:count].detach(), freeze=True)


def check_text(prompt: str) -> None:
    """A prompt is text: bytes of a command line or a file that are no UTF-8 arrive as halves of signs, which no tokenizer reads.

    Raises:
        Problem: it is not.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Problem(f"The prompt {prompt.encode(errors='replace').decode()!r} is not Unicode text.", f"Sign {error.start + 1} of it is half a sign.",
                      "Type it again, in a terminal or a file that is UTF-8.") from None


def expand(base: Base, prompt: str) -> str:
    """Replace each own trigger by all the tokens it stands for, the longest one where several begin alike."""
    check_text(prompt)
    if not base.placeholders:
        return prompt
    triggers = sorted(base.placeholders, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, triggers)), lambda found: " ".join(base.placeholders[found[0]]), prompt)


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
    base.recall(*(name for name, _, _ in base.encoders()))
    if base.text_encoder_2 is None:
        return Cond(base.text_encoder(token_ids(base, prompts).to(base.device, non_blocking=True))[0])
    found = [encoder(token_ids(base, prompts, tokenizer).to(base.device, non_blocking=True), output_hidden_states=True) for _, encoder, tokenizer in base.encoders()]
    return Cond(torch.cat([states.hidden_states[-2] for states in found], dim=-1), found[-1].text_embeds)


@torch.no_grad()
def encode_cached(base: Base, prompts: list[str]) -> Cond:
    """The same from a cache per prompt: right only while the text encoders are frozen."""
    for prompt in prompts:
        if prompt not in base.states:
            base.states[prompt] = encode(base, [prompt])
    return Cond.cat([base.states[prompt] for prompt in prompts])
