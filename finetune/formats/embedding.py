"""Textual Inversion files (Gal et al. 2022, arXiv:2208.01618): new word vectors in the three common layouts.

    TRIGGER.safetensors           one tensor `emb_params` (vectors, width) float32
    TRIGGER.pt                    A1111's dict, legacy container
    learned_embeds.safetensors    the same tensor under the placeholder token, for diffusers

SDXL has two encoders and so two tables, `clip_l` and `clip_g` in TRIGGER.safetensors, which all web UIs read; A1111's dict has
no place for a second table, and diffusers takes one file for each encoder (`learned_embeds_2.safetensors` for the second).

The web UIs take the trigger word from the file's stem, so stem, inner name and trigger must be one word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem
from finetune.formats.embedding_keys import ANONYMOUS_KEYS
from finetune.formats.families import SDXL, family_of_width, modelspec
from finetune.formats.pickles import load_restricted, save_legacy
from finetune.formats.tensors import load_tensors, save_tensors

FILE_WORD = re.compile(r"[A-Za-z0-9._-]+")
STAR_TOKEN_ID = 265  # CLIP's id of "*"; every A1111 embedding carries it


@dataclass(frozen=True)
class Embedding:
    """Learned word vectors.

    Attributes:
        token: the placeholder or name the file states; None when it states none (then the file's stem is the trigger).
        vectors: (n, width) float32.
        metadata: text to text, whatever the file says about itself.
        second: SDXL only: (n, 1280) for the second encoder.
    """

    token: str | None
    vectors: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)
    second: torch.Tensor | None = None


def write_safetensors(path: Path | str, vectors: torch.Tensor, metadata: Mapping[str, str], second: torch.Tensor | None = None) -> None:
    """Write TRIGGER.safetensors for A1111, Forge and ComfyUI.

    Args:
        vectors: (n, width).
        second: SDXL: (n, 1280) for the second encoder; the file then holds the pair `clip_l` and `clip_g`.

    Raises:
        Problem: a stem that cannot be typed, or tables of unequal length.
    """
    path = Path(path)
    check_word(path.stem)
    tensors = {"emb_params": _table(vectors)} if second is None else {"clip_l": _table(vectors), "clip_g": _table(second)}
    if len({len(table) for table in tensors.values()}) > 1:
        raise Problem(f"{path.name} was not written: its tables have {len(tensors['clip_l'])} and {len(tensors['clip_g'])} vectors.",
                      "The word stands for the same number of tokens in both encoders.", "Export it again from its run.")
    family = SDXL if second is not None else family_of_width(_table(vectors).shape[1], metadata)
    spec = modelspec(family, "textual-inversion", path.stem, metadata)
    if family is SDXL:
        spec["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
    save_tensors(path, tensors, {"format": "pt", **spec, **metadata}, {"modelspec.hash_sha256": "0x"})


def write_webui(
    path: Path | str,
    vectors: torch.Tensor,
    name: str,
    step: int = 0,
    base_name: str | None = None,
    base_hash: str | None = None,
) -> None:
    """Write TRIGGER.pt in A1111's layout.

    Args:
        vectors: (n, width).
        name: the trigger word; must equal the file's stem.
        step: optimizer steps trained.
        base_name: name of the checkpoint it was trained on.
        base_hash: its short hash.
    """
    path = Path(path)
    check_word(name)
    if path.stem != name:
        raise Problem(
            f"The embedding is named {name!r} but its file {path.name!r}.",
            "The web UI takes the trigger from the file name and keeps the inner name for pictures: they must agree.",
            f"Write it to {name}.pt.",
        )
    content = {
        "string_to_token": {"*": STAR_TOKEN_ID},
        "string_to_param": {"*": _table(vectors)},
        "name": name,
        "step": int(step),
        "sd_checkpoint": base_hash,
        "sd_checkpoint_name": base_name,
    }
    save_legacy(content, path)


def write_diffusers(path: Path | str, vectors: torch.Tensor, token: str, metadata: Mapping[str, str]) -> None:
    """Write learned_embeds.safetensors: one tensor (n, width) under the placeholder token (one file for each encoder)."""
    if not token or any(letter.isspace() for letter in token):
        raise Problem(
            f"The placeholder {token!r} is not one word.",
            "diffusers adds it to the tokenizer as a single token.",
            'Use something like "<toy>".',
        )
    save_tensors(path, {token: _table(vectors)}, {"format": "pt", **metadata})


def safe_word(text: str) -> str:
    """The letters of a trigger that can stand in a file name everywhere: `<my-dog>` gives `my-dog`."""
    return "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in text.strip("<>*{}[]() ")).strip("-.") or "embedding"


def check_word(word: str) -> None:
    """Raise a Problem for a trigger that cannot be a file name everywhere."""
    if FILE_WORD.fullmatch(word) is None:
        raise Problem(
            f"The trigger {word!r} cannot be a file name everywhere.",
            "The web UIs use the file name as the word to type, and some end a word at other signs.",
            "Use letters, digits, '.', '_' and '-' only.",
        )


def _table(vectors: torch.Tensor) -> torch.Tensor:
    """(n, width) float32 on the CPU; a lone vector becomes one row."""
    table = vectors.detach().to("cpu", torch.float32).contiguous()
    table = table.unsqueeze(0) if table.ndim == 1 else table
    if table.ndim != 2 or 0 in table.shape:
        raise Problem(
            f"Embedding vectors have shape {list(vectors.shape)}.",
            "They should be (vectors, width).",
            "The file is damaged or of another kind.",
        )
    return table


def read(path: Path | str) -> Embedding:
    """Read an embedding in any common layout; tensors become (n, width) float32.

    Accepts one tensor under any name (1-D too), A1111's dict with a plain dict or an nn.ParameterDict inside, and
    SDXL's clip_l / clip_g pair, as .safetensors, .pt or .bin.

    Raises:
        Problem: for anything else; pickles that need code are refused.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        content, metadata = load_tensors(path)
        return _from_dict(path, dict(content), metadata)
    content = load_restricted(path)
    if not isinstance(content, Mapping):
        raise _not_one(path, f"it holds a {type(content).__name__}")
    return _from_dict(path, dict(content), {})


def _from_dict(path: Path, content: dict[Any, Any], metadata: dict[str, str]) -> Embedding:
    if "string_to_param" in content:
        return _from_webui(path, content)
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if set(tensors) == {"clip_l", "clip_g"}:
        return Embedding(None, _table(tensors["clip_l"]), metadata, _table(tensors["clip_g"]))
    tensors.pop("emp_params_out", None)
    if len(tensors) != 1:
        raise _not_one(path, f"it holds {len(tensors)} tensors ({', '.join(map(str, list(tensors)[:3]))}, ...)")
    ((key, value),) = tensors.items()
    return Embedding(None if key in ANONYMOUS_KEYS else str(key), _table(value), metadata)


def _from_webui(path: Path, content: dict[Any, Any]) -> Embedding:
    """A1111's dict. CompVis and old A1111 put an nn.ParameterDict inside, whose own keys changed with torch 1.12."""
    table = content["string_to_param"]
    if isinstance(table, torch.nn.ParameterDict):
        table = dict(table.named_parameters(recurse=False))
    if not isinstance(table, Mapping) or len(table) != 1:
        raise _not_one(path, "its string_to_param does not hold exactly one entry")
    ((_, vectors),) = table.items()
    told = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
    metadata = {key: str(content[key]) for key in told if content.get(key) is not None}
    return Embedding(content.get("name"), _table(vectors), metadata)


def _not_one(path: Path, finding: str) -> Problem:
    return Problem(
        f"{path} is not a Textual Inversion embedding: {finding}.",
        "One tensor (vectors, width), A1111's dict, or the SDXL pair clip_l and clip_g is expected.",
        "Run `finetune inspect` on it to see what it is.",
    )
