"""How a safetensors file is known for an embedding. Torch-free, so that finding out opens no weights."""

from collections.abc import Mapping

# Names of the single tensor that say nothing about its token; `emp_params` is one trainer's established misspelling.
ANONYMOUS_KEYS = ("emb_params", "emp_params")
PAIR = frozenset({"clip_l", "clip_g"})  # SDXL's tables, one for each text encoder


def holds_embedding(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bool:
    """Whether tensors of these names and shapes are an embedding: a name of its own, SDXL's pair, or a lone table of nobody's."""
    lone = len(shapes) == 1 and len(next(iter(shapes.values()))) <= 2
    return bool(shapes.keys() & set(ANONYMOUS_KEYS)) or shapes.keys() == PAIR or lone and "finetune.format" not in metadata
