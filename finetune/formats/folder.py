"""A diffusers pipeline folder made readable for older transformers as well. Torch-free.

transformers >= 5.6 dropped the `text_model.` level of CLIPTextModel and the tokenizer's vocab.json and merges.txt. A folder
written by it gives older versions a text encoder of random weights, with no more than a warning. The newer versions
read the older spelling without complaint, so that is what leaves this program.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.errors import Problem
from finetune.formats.header import header_text, read_header
from finetune.runs import atomic_path, read_json, write_json, write_text

TEXT_LEVEL = "text_model."
CLIP_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
CLIP_TOKENS = 77  # length of CLIP's position table; a tokenizer that does not say it lets prompts overflow


def finish_diffusers_folder(folder: Path | str) -> None:
    """Give a saved pipeline folder the names and files that transformers 4 expects. Running it twice changes nothing.

    Args:
        folder: holds model_index.json, text_encoder/, tokenizer/, ...

    Raises:
        Problem: when text encoder weights or tokenizer are not CLIP's.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise Problem(
            f"{folder} is not a diffusers folder.",
            "It has no model_index.json.",
            "Give the folder that holds unet, vae and text_encoder.",
        )
    for config in sorted(folder.glob("*/config.json")):
        told = read_json(config)
        if told.pop("_name_or_path", None) is not None:  # the folder's place on the machine that wrote it: nobody else's business
            write_json(config, told)
    for number in ("", "_2"):
        weights = folder / f"text_encoder{number}" / "model.safetensors"
        if weights.is_file():
            add_text_level(weights)
        tokenizer = folder / f"tokenizer{number}"
        if (tokenizer / "tokenizer.json").is_file():
            config = folder / f"text_encoder{number}" / "config.json"
            positions = read_json(config).get("max_position_embeddings", CLIP_TOKENS) if config.is_file() else CLIP_TOKENS
            finish_tokenizer(tokenizer, positions)


def add_text_level(weights: Path | str) -> None:
    """Put `text_model.` before the names in a text encoder's model.safetensors, by rewriting its header alone."""
    weights = Path(weights)
    header = read_header(weights)
    if all(name.startswith((TEXT_LEVEL, "text_projection.")) for name in header.tensors):
        return
    strange = [name for name in header.tensors if not name.startswith((*CLIP_PARTS, TEXT_LEVEL, "text_projection."))]
    if strange:
        raise Problem(
            f"{weights} has the tensor {strange[0]!r}, which a CLIP text encoder does not.",
            "Stable Diffusion 1, 2 and XL condition on CLIP.",
            "Check that it is the folder you meant.",
        )
    in_order = sorted(header.tensors.items(), key=lambda item: item[1].start)
    entries = {
        TEXT_LEVEL + name if name.startswith(CLIP_PARTS) else name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
        for name, info in in_order
    }
    with atomic_path(weights) as temporary, open(temporary, "wb") as target, open(weights, "rb") as source:
        target.write(header_text(entries, {"format": "pt", **header.metadata}))
        source.seek(header.data_start)
        shutil.copyfileobj(source, target, 2**24)


def finish_tokenizer(folder: Path | str, positions: int = CLIP_TOKENS) -> None:
    """Write vocab.json, merges.txt (and added_tokens.json) from tokenizer.json, and state the prompt's length.

    Args:
        positions: rows of the text encoder's position table, 77 for CLIP.
    """
    folder = Path(folder)
    whole = read_json(folder / "tokenizer.json")
    model = whole["model"]
    if model.get("type") != "BPE":
        raise Problem(
            f"{folder} holds a {model.get('type')} tokenizer.",
            "CLIP's is a byte-pair (BPE) tokenizer; the old file layout can hold no other.",
            "Check that it is the folder you meant.",
        )
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_json(folder / "vocab.json", vocabulary)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    added = {token["content"]: token["id"] for token in whole["added_tokens"] if token["content"] not in vocabulary}
    if added:
        write_json(folder / "added_tokens.json", added)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {"tokenizer_class": "CLIPTokenizer"}
    if not 0 < config.get("model_max_length", 0) <= positions:
        config["model_max_length"] = positions
        write_json(config_path, config)
