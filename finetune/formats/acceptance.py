"""The acceptance list: what a file must be so that every program it is meant for reads it as it was meant. docs/formats.md, "Acceptance".

Seven points: 1 safetensors; 2 kohya LoRA; 3 PEFT LoRA; 4 hypernetwork .pt; 5 embedding; 6 whole checkpoint; 7 diffusers folder.
The checks read the file alone and know nothing of what wrote it. torch is imported only where values or pickles are read.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem
from finetune.formats.embedding_keys import ANONYMOUS_KEYS
from finetune.formats.folder import CLIP_TOKENS, TEXT_LEVEL
from finetune.formats.header import Header, read_header, read_scalar, told_json
from finetune.formats.hypernetwork_layers import ACTIVATIONS, expected_shapes
from finetune.formats.inspect_pickle import webui_refusals
from finetune.formats.lora_names import from_kohya
from finetune.runs import read_json

STORAGES = {f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16")}
GLOBALS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
PLAIN_TYPES = (str, int, float, bool, type(None))
MINIMUM = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}  # of lora_adapter_metadata, for all versions of peft
KOHYA_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
LYCORIS = re.compile(r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|rescale|dora_scale|diff|diff_b")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        point: of the acceptance list, 1 to 7.
        text: one sentence.
    """

    point: int
    text: str


def check(path: Path | str) -> list[Finding]:
    """Everything that is wrong with a file or folder; an empty list when it meets the list.

    Raises:
        Problem: there is nothing at `path`, or it is of no kind the list speaks of.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return list(of_folder(path))
    if path.suffix == ".safetensors":
        return list(_safetensors(path))
    if path.suffix in (".pt", ".bin") and path.is_file():
        return list(_pickle(path))
    raise Problem(f"The acceptance list says nothing of {path}.", "It speaks of .safetensors, .pt and .bin files and of diffusers folders.", "Name one of these.")


def _safetensors(path: Path) -> Iterator[Finding]:
    import torch
    from safetensors import SafetensorError, safe_open

    from finetune.formats import acceptance_checkpoint

    try:
        header = read_header(path)
    except Problem as problem:
        yield Finding(1, str(problem))
        return
    try:
        with safe_open(str(path), "pt") as file:
            for name, info in header.tensors.items():
                if info.dtype in ("F16", "BF16", "F32", "F64") and info.parameters and not torch.isfinite(file.get_tensor(name)).all():
                    yield Finding(1, f"{name} holds values that are not finite.")
    except SafetensorError as error:
        yield Finding(1, f"The safetensors library does not read it: {error}.")
        return
    if any(key.startswith("model.diffusion_model.") for key in header.tensors):
        yield from (Finding(6, text) for text in acceptance_checkpoint.findings(header))
    else:
        yield from of_header(path, header)


def of_header(path: Path, header: Header) -> Iterator[Finding]:
    """What the header of an adapter's safetensors file shows to be wrong, for points 2, 3 and 5; no torch is needed."""
    keys = list(header.tensors)
    if any(key.startswith("lora_") for key in keys):
        yield from (Finding(2, text) for text in _kohya(path, header))
    elif any(".lora_A." in key for key in keys):
        yield from (Finding(3, text) for text in _peft(header))
    elif not any(key.startswith("hypernet.") for key in keys):
        yield from (Finding(5, text) for text in _embedding(path, header))


def _kohya(path: Path, header: Header) -> Iterator[str]:
    modules: dict[str, set[str]] = {}
    for key in header.tensors:
        module, _, part = key.partition(".")
        modules.setdefault(module, set()).add(part)
        if part not in KOHYA_PARTS and not LYCORIS.fullmatch(part):
            yield f"{key} is no part of a LoRA or of one of LyCORIS' kinds."
    pairs = {module for module, parts in modules.items() if parts & set(KOHYA_PARTS[:2])}
    for module, parts in modules.items():
        if module in pairs and not {"lora_down.weight", "lora_up.weight"} <= parts:
            yield f"{module} lacks a half."
        try:
            from_kohya(module)
        except Problem as problem:
            yield problem.what
        if module.startswith("lora_te") and not re.match(r"lora_te[12]?_text_(model|projection)", module):
            yield f"{module} lacks text_model_, without which ComfyUI and Forge do not find it."
    ranks = {info.shape[0] for key, info in header.tensors.items() if key.endswith(".lora_down.weight")}
    if len(ranks) > 1:
        yield f"It has the ranks {sorted(ranks)}; old diffusers reads mixed ranks wrongly."
    with_alpha = [module for module in pairs if "alpha" in modules[module]]
    alphas = {read_scalar(path, header, f"{module}.alpha") for module in with_alpha}
    if with_alpha and len(with_alpha) != len(pairs):
        yield f"Alpha is there for {len(with_alpha)} of {len(pairs)} modules; readers disagree about the others."
    if len(alphas) > 1 or 0.0 in alphas:
        yield f"It has the alphas {sorted(alphas)}; one, and not 0, is read alike everywhere."
    told = header.metadata
    if ranks and told.get("ss_network_dim") != str(max(ranks)):
        yield f"ss_network_dim says {told.get('ss_network_dim')}, the tensors have rank {max(ranks)}."
    if alphas and not _near(told.get("ss_network_alpha"), max(alphas)):
        yield f"ss_network_alpha says {told.get('ss_network_alpha')}, the tensors {max(alphas):g}."
    if "lora_adapter_metadata" in told:
        yield "lora_adapter_metadata stands beside alphas, which makes diffusers refuse the file."


def _near(text: str | None, value: float) -> bool:
    try:
        return math.isclose(float(text or "nan"), value, rel_tol=1e-3)
    except ValueError:
        return False


def _peft(header: Header) -> Iterator[str]:
    halves: dict[str, set[str]] = {}
    for key in header.tensors:
        found = re.fullmatch(r"((?:unet|text_encoder|text_encoder_2)\..+)\.lora_([AB])\.weight", key)
        if found is None:
            yield f"{key} is no PEFT name with a component in front."
            continue
        halves.setdefault(found[1], set()).add(found[2])
        if key.startswith("text_encoder") and ".text_model." not in key and "text_projection" not in key:
            yield f"{key} lacks text_model., which older diffusers and ComfyUI need."
    yield from (f"{module} lacks a half." for module, found in halves.items() if found != {"A", "B"})
    if "lora_adapter_metadata" in header.metadata:
        fields: dict[str, set[str]] = {}
        for name in told_json("the LoRA", header.metadata, "lora_adapter_metadata"):
            component, _, field = name.partition(".")
            fields.setdefault(component, set()).add(field)
        for component, names in fields.items():
            if names != MINIMUM:
                yield f"lora_adapter_metadata of {component} has not exactly the five fields all versions of peft take."


def _embedding(path: Path, header: Header) -> Iterator[str]:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    if set(shapes) == {"clip_l", "clip_g"}:
        if [len(shape) for shape in shapes.values()] != [2, 2] or shapes["clip_l"][0] != shapes["clip_g"][0]:
            yield f"clip_l and clip_g have the shapes {shapes}; two tables of equal length are read."
    elif len(shapes) != 1:
        yield f"It holds {len(shapes)} tensors; an embedding is one table, or the pair clip_l and clip_g."
    elif len(next(iter(shapes.values()))) != 2:
        yield f"The table has shape {next(iter(shapes.values()))}, not (vectors, width)."
    if any(info.dtype != "F32" for info in header.tensors.values()):
        yield "It is not float32."
    if set(shapes) & {*ANONYMOUS_KEYS, "clip_l"} and re.fullmatch(r"[A-Za-z0-9._-]+", path.stem) is None:
        yield f"The file name {path.stem!r} is the word to type, and cannot be typed everywhere."


def _pickle(path: Path) -> Iterator[Finding]:
    from finetune.formats.pickles import globals_in, load_restricted

    try:
        names = set(globals_in(path))
        content = load_restricted(path)
    except Problem as problem:
        yield Finding(4, str(problem))
        return
    paired = isinstance(content, dict) and any(isinstance(key, int) for key in content)
    point = 4 if paired else 5
    if refused := webui_refusals(path):
        yield Finding(point, f"Its container has {refused[0]!r}, for which the web UI refuses it.")
    if names - GLOBALS - STORAGES or len(names & STORAGES) > 1:
        yield Finding(point, f"Its pickle asks for {', '.join(sorted(names))}: more than OrderedDict, _rebuild_tensor_v2 and one storage type.")
    if not zipfile.is_zipfile(path) and path.read_bytes()[:2] != b"\x80\x02":
        yield Finding(point, "It is neither a torch zip nor the legacy container.")
    checks = of_hypernetwork(path, content) if paired else _webui_embedding(path, content)
    yield from (Finding(point, text) for text in checks)


def of_hypernetwork(path: Path, content: dict[Any, Any]) -> Iterator[str]:
    """What is wrong with the content of a hypernetwork's `.pt`, in sentences (point 4)."""
    told = {key: value for key, value in content.items() if isinstance(key, str)}
    structure, activation = told.get("layer_structure") or [1, 2, 1], told.get("activation_func")
    if activation not in ACTIVATIONS:
        yield f"activation_func is {activation!r}; both A1111 and ComfyUI know only {', '.join(ACTIVATIONS)}."
    if type(told.get("activate_output")) is not bool:
        yield "activate_output is not said, and A1111 and ComfyUI take different defaults."
    if told.get("use_dropout") or told.get("last_layer_dropout") or any(told.get("dropout_structure") or []):
        yield "It has dropout, which ComfyUI leaves on while generating."
    if told.get("name") != path.stem:
        yield f"Its name is {told.get('name')!r} and its file {path.name!r}; A1111 looks it up by both."
    if told.get("is_layer_norm") and activation != "linear" and not told.get("activate_output"):
        yield "Layer norm with an activation and without activate_output is computed differently by ComfyUI."
    for width, pair in ((key, value) for key, value in content.items() if type(key) is int):
        if type(pair) is not tuple or len(pair) != 2:
            yield f"Width {width} holds no pair of networks."
            continue
        for state in pair:
            wanted = expected_shapes(width, structure, activation, bool(told.get("is_layer_norm")), bool(told.get("activate_output")))
            if list(state) != list(wanted) or any(tuple(state[key].shape) != shape for key, shape in wanted.items() if key in state):
                yield f"The keys, shapes or order of width {width} are not those of its settings."
    for key, value in told.items():
        if not _is_plain(value):
            yield f"{key} is a {type(value).__name__}, no plain value."


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return type(value) in PLAIN_TYPES


def _webui_embedding(path: Path, content: Any) -> Iterator[str]:
    import torch

    table = content.get("string_to_param") if isinstance(content, dict) else None
    if type(table) is not dict or list(table) != ["*"]:
        yield 'string_to_param is not a plain dict with the one key "*".'
        return
    if table["*"].dtype != torch.float32 or table["*"].ndim != 2:
        yield f"The table is {table['*'].dtype} of shape {tuple(table['*'].shape)}, not float32 (vectors, width)."
    elif not torch.isfinite(table["*"]).all():
        yield "The table holds values that are not finite."
    if content.get("name") != path.stem:
        yield f"Its name is {content.get('name')!r} and its file {path.name!r}; diffusers goes by one, the web UIs by the other."


def of_folder(folder: Path) -> Iterator[Finding]:
    """What is wrong with a diffusers folder (point 7), from headers and JSON files."""
    for weights in sorted(folder.glob("*/*.safetensors")):
        header = read_header(weights)
        if header.metadata.get("format") != "pt":
            yield Finding(7, f"{weights.relative_to(folder)} does not say format=pt.")
        if weights.parent.name.startswith("text_encoder") and not all(name.startswith((TEXT_LEVEL, "text_projection.")) for name in header.tensors):
            yield Finding(7, f"{weights.relative_to(folder)} lacks the text_model. level: older transformers load random weights.")
    for tokenizer in sorted(folder.glob("tokenizer*")):
        if not (tokenizer / "vocab.json").is_file() or not (tokenizer / "merges.txt").is_file():
            yield Finding(7, f"{tokenizer.name} has no vocab.json and merges.txt, which transformers 4 needs.")
        file = tokenizer / "tokenizer_config.json"
        encoder = folder / tokenizer.name.replace("tokenizer", "text_encoder") / "config.json"
        positions = read_json(encoder).get("max_position_embeddings", CLIP_TOKENS) if encoder.is_file() else CLIP_TOKENS
        if not file.is_file() or read_json(file).get("model_max_length") != positions:
            yield Finding(7, f"{tokenizer.name} does not say that prompts have {positions} tokens.")
    for name, entry in read_json(folder / "model_index.json").items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None and not (folder / name).is_dir():
            yield Finding(7, f"model_index.json names {name}, which is not there.")
