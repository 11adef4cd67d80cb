"""Prompts of any length with weighted words, read as AUTOMATIC1111's web UI reads them by default.

A prompt is cut into chunks of the text encoder's length without its start and end tokens (75 in every published model),
each chunk is encoded alone, and their states are laid one after another. A weight multiplies the states of its words;
then the chunk is scaled so that its mean is what it was (the web UI's emphasis "Original").

B prompts, L tokens of one chunk with start and end, K chunks, D text width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.errors import Problem
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import check_text

ROUND, SQUARE = 1.1, 1 / 1.1  # what one pair of brackets multiplies the weight by
BREAK = ("BREAK", -1.0)
BACKTRACK = 20  # tokens after a comma that move to the next chunk with what overflows, as the web UI's default
NO_MEAN = 1e-5  # a mean this small beside the states is rounding; to restore it would multiply by noise
_WORD = 0xF0000  # first of the private characters that stand for learned words while brackets are read
_PIECE = re.compile(r"""\\(?P<escaped>[()\[\]\\]?) | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\) |
                        (?P<bracket>[()\[\]]) | [^\\()\[\]:]+ | :""", re.VERBOSE)
_BREAK = re.compile(r"\bBREAK\b")
DEEPEST = 200  # brackets open at once; each one more touches every word in it again


def parse(text: str) -> list[tuple[str, float]]:
    """Attention syntax as (text, weight) in order, neighbours of equal weight merged, each BREAK as ("BREAK", -1).

    `(x)` multiplies by 1.1, `[x]` by 1/1.1, `(x:1.3)` by 1.3, nested brackets multiply; a backslash before a bracket or a
    backslash makes it plain. A bracket that is never closed reaches to the end; one that was never opened is text.
    An empty text is [("", 1.0)].

    Raises:
        Problem: more than DEEPEST brackets within one another; any other text can be read.
    """
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        found[start:] = [piece if piece == BREAK else (piece[0], piece[1] * factor) for piece in found[start:]]

    for match in _PIECE.finditer(text):
        bracket = match["bracket"]
        if match["escaped"] is not None:
            found.append((match["escaped"], 1.0))
        elif bracket in opened:
            opened[bracket].append(len(found))
            if len(opened["("]) + len(opened["["]) > DEEPEST:
                raise Problem(f"The prompt opens more than {DEEPEST} brackets within one another.", "Each multiplies the weight of all within.",
                              "Close them, or write (word:1.5).")
        elif match["weight"] and opened["("]:
            scale(opened["("].pop(), float(match["weight"]))
        elif bracket == ")" and opened["("]:
            scale(opened["("].pop(), ROUND)
        elif bracket == "]" and opened["["]:
            scale(opened["["].pop(), SQUARE)
        else:
            parts = _BREAK.split(match[0])
            for place, part in enumerate(parts):  # white space goes beside a BREAK
                part = part.lstrip() if place else part
                part = part.rstrip() if place < len(parts) - 1 else part
                found += [BREAK, (part, 1.0)] if place else [(part, 1.0)]
    for start in opened["("]:
        scale(start, ROUND)
    for start in opened["["]:
        scale(start, SQUARE)
    return _merged(found) or [("", 1.0)]


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight as one, then without empty ones."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight and BREAK not in ((text, weight), joined[-1]):
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return [piece for piece in joined if piece[0]]


def count(base: Base, prompt: str) -> tuple[int, int]:
    """Tokens of a prompt (without start, end and padding) and chunks they are read in, by the first tokenizer."""
    chunks = _chunks(base, base.tokenizer, prompt)
    return sum(len(chunk.ids) for chunk in chunks), len(chunks)


def chunk_length(base: Base) -> int:
    """Tokens of one chunk without start and end: 75 in every published model."""
    return base.tokenizer.model_max_length - 2


@torch.no_grad()
def encode_weighted(base: Base, prompts: list[str], negatives: list[str], *, clip_skip: int = 1) -> tuple[Cond, Cond]:
    """Text states (B, K L, D) of prompts and of negative prompts, all in the number of chunks that the longest needs.

    Shorter ones are filled up with empty chunks. A short prompt without weights is encoded to the bit as
    `finetune.model.text.encode` does.

    Args:
        clip_skip: take the states of the Nth layer from the end, after the final norm; 1 is the last. SDXL was trained
            on the second to last without the norm: there 1 and 2 are the same, 3 is one layer earlier.

    Raises:
        Problem: more layers skipped than there are, or brackets nested beyond numbers.
    """
    _check_skip(base, clip_skip)
    read = {name: [_chunks(base, tokenizer, text) for text in [*prompts, *negatives]] for name, _, tokenizer in base.encoders()}
    most = max(len(chunks) for texts in read.values() for chunks in texts)
    sides = []
    for rows in (slice(0, len(prompts)), slice(len(prompts), None)):
        parts = [_encode_chunks(base, encoder, tokenizer, read[name][rows], most, clip_skip) for name, encoder, tokenizer in base.encoders()]
        sides.append(Cond(torch.cat([states for states, _ in parts], dim=-1) if len(parts) > 1 else parts[0][0], parts[-1][1]))
    return sides[0], sides[1]


@dataclass
class _Chunk:
    """Token ids of one chunk and the weight of each, without start, end and padding."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def split(self, place: int) -> _Chunk:
        """Cut off and return what lies from `place` on."""
        rest = _Chunk(self.ids[place:], self.weights[place:])
        del self.ids[place:], self.weights[place:]
        return rest


def _segments(base: Base, prompt: str) -> list[tuple[str, float]]:
    """`parse` with learned words whole (a bracket in one is no bracket), each then spelled as all its tokens.

    Raises:
        Problem: a weight that is no finite number.
    """
    check_text(prompt)
    signs = {trigger: chr(_WORD + place) for place, trigger in enumerate(sorted(base.placeholders, key=len, reverse=True))}
    if signs:
        prompt = re.sub("|".join(map(re.escape, signs)), lambda found: signs[found[0]], prompt)
    pieces = parse(prompt)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise Problem("The prompt weighs a word beyond any number.", "Brackets multiply, and so many of them overflow.", "Use fewer brackets.")
    spelled = str.maketrans({sign: " ".join(base.placeholders[trigger]) for trigger, sign in signs.items()})
    return [(text.translate(spelled), weight) for text, weight in pieces]


def _chunks(base: Base, tokenizer: Any, prompt: str) -> list[_Chunk]:
    """At least one chunk; overflowing text breaks after a comma where one is near, never inside a learned word."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    comma = None if comma == tokenizer.unk_token_id else comma
    done: list[_Chunk] = []
    chunk, after_comma = _Chunk(), None  # place after the last comma of this chunk, where it may be cut
    for text, weight in _segments(base, prompt):
        if (text, weight) == BREAK:
            done.append(chunk)
            chunk, after_comma = _Chunk(), None
            continue
        for ids in _units(base, tokenizer, text, room):
            full = len(chunk.ids) == room
            if ids[0] == comma:
                after_comma = len(chunk.ids) + 1
            if len(chunk.ids) + len(ids) > room:
                # A comma moves alone; words within reach of the last one move with what overflows (the web UI's counting).
                near = full and ids[0] != comma and after_comma is not None and room - after_comma < BACKTRACK
                rest = chunk.split(after_comma) if near else _Chunk()
                done.append(chunk)
                chunk, after_comma = rest, None
                if len(chunk.ids) + len(ids) > room:
                    done.append(chunk)
                    chunk = _Chunk()
            chunk.add(ids, weight)
    return [*done, chunk] if chunk.ids or not done else done


def _units(base: Base, tokenizer: Any, text: str, room: int) -> Iterator[list[int]]:
    """Token ids of a text, one by one; those of a learned word together, if they fit into one chunk at all."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    words = [word for names in base.placeholders.values() if len(word := tokenizer.convert_tokens_to_ids(names)) <= room]
    place = 0
    while place < len(ids):
        unit = next((word for word in words if ids[place:place + len(word)] == word), ids[place:place + 1])
        yield unit
        place += len(unit)


def _check_skip(base: Base, clip_skip: int) -> None:
    layers = min(encoder.config.num_hidden_layers for _, encoder, _ in base.encoders())
    if not 1 <= clip_skip <= layers:
        raise Problem(f"CLIP skip {clip_skip} cannot be used with {base.name!r}.", f"Its text encoder has {layers} layers, and 1 is the last of them.",
                      f"Use a number from 1 to {layers}.")


def _encode_chunks(base: Base, encoder: Any, tokenizer: Any, texts: list[list[_Chunk]], most: int, clip_skip: int) -> tuple[Tensor, Tensor | None]:
    """States (B, most L, D) of one encoder, and of SDXL's second the pooled state (B, P) of the first chunk."""
    found, pooled = [], None
    for place in range(most):
        chunks = [chunks[place] if place < len(chunks) else _Chunk() for chunks in texts]
        states, first = _states(base, encoder, _ids(tokenizer, chunks).to(base.device), clip_skip)
        pooled = first if place == 0 else pooled
        found.append(_emphasize(states, _weights(tokenizer, chunks).to(base.device)))
    return torch.cat(found, dim=1) if most > 1 else found[0], pooled


def _ids(tokenizer: Any, chunks: list[_Chunk]) -> Tensor:
    """(B, L) ids: start, chunk, end, then padding as the tokenizer itself pads (SD 1: end again; OpenCLIP: "!")."""
    length = tokenizer.model_max_length
    rows = [[tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id] for chunk in chunks]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def _weights(tokenizer: Any, chunks: list[_Chunk]) -> Tensor:
    """(B, L) weights; start, end and padding have 1."""
    rows = [[1.0, *chunk.weights] for chunk in chunks]
    return torch.tensor([row + [1.0] * (tokenizer.model_max_length - len(row)) for row in rows])


def _states(base: Base, encoder: Any, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
    """Hidden states (B, L, D) of the wanted layer, and the pooled state (B, P) where the encoder projects one."""
    if base.text_encoder_2 is not None:
        found = encoder(ids, output_hidden_states=True)
        return found.hidden_states[-max(2, clip_skip)], getattr(found, "text_embeds", None)
    if clip_skip == 1:
        return encoder(ids)[0], None
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm(encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]), None


def _emphasize(states: Tensor, weights: Tensor) -> Tensor:
    """states (B, L, D) times weights (B, L), each prompt's mean over its whole chunk restored.

    The mean is each prompt's own: the web UI takes it over whatever is encoded together, which is one prompt at a time.
    """
    if bool((weights == 1).all()):
        return states
    wide = states.float()
    scaled = wide * weights.unsqueeze(-1)
    before, after = wide.mean((1, 2), keepdim=True), scaled.mean((1, 2), keepdim=True)
    told = torch.minimum(before.abs(), after.abs()) > NO_MEAN * wide.pow(2).mean((1, 2), keepdim=True).sqrt()
    scaled = torch.where(told, scaled * (before / after), scaled)
    return torch.where((weights == 1).all(1)[:, None, None], wide, scaled).to(states.dtype)
