"""Findings about `.pt`, `.bin` and `.ckpt` files without executing anything in them."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.errors import Problem
from finetune.formats import readers
from finetune.formats.families import SDXL, family_of_width
from finetune.formats.header import Header, TensorInfo
from finetune.formats.inspect_checkpoint import describe_checkpoint, is_checkpoint
from finetune.formats.inspection import Report, convert, trained_on, trigger_of
from finetune.formats.readers import CARE, NO, Verdict

# Members of a torch zip the web UI accepts (its `modules/safe.py`); current torch adds others.
_WEBUI_MEMBER = re.compile(r"[^/]+/(data/\d+|version|byteorder|\.data/serialization_id|data\.pkl)")
LARGEST_LOADED = 2**29
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64", "torch.int64": "I64"}


def webui_refusals(path: Path) -> list[str]:
    """Members of the zip container that the A1111 web UI refuses; none for the legacy container."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not _WEBUI_MEMBER.fullmatch(name)]


def describe_pickle(report: Report) -> None:
    """Fill in a report on a torch pickle: an embedding, a hypernetwork, a checkpoint, or what its globals tell."""
    from finetune.formats.pickles import (  # torch takes a second: only for pickles
        ALLOWED_GLOBALS,
        globals_in,
        load_restricted,
    )

    path = report.path
    try:
        names = globals_in(path)
    except Problem as problem:
        report.warnings.append(str(problem))
        return
    zipped = zipfile.is_zipfile(path)
    container = "torch zip" if zipped else "legacy torch container"
    report.layout = f"pickle, {container}"
    foreign = sorted(set(names) - ALLOWED_GLOBALS)
    if foreign:
        report.warnings.append(f"Its pickle asks for {', '.join(foreign[:6])}: not opened, since that could run code.")
        report.warnings.append("Open it once in the program it came from and save it there as .safetensors.")
        return
    if report.bytes > LARGEST_LOADED and not zipped:
        report.kind = "single-file-checkpoint"
        report.warnings.append("Too large to open in passing.")
        report.remedies.append(convert(path, "single-file", f"{path.stem}.safetensors", "to see inside"))
        return
    try:
        content = load_restricted(path, mmap=True)
    except Problem as problem:
        report.warnings.append(str(problem))
        return
    _content(report, content, names)
    refused = webui_refusals(path)
    if refused and report.readers:
        _refused(report, refused[0])


def _content(report: Report, content: Any, names: list[str]) -> None:
    """Tell the kinds apart by what the pickle holds."""
    import torch

    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if isinstance(state, dict) and is_checkpoint({str(key): 0 for key in state}):
        describe_checkpoint(report, header_of(state, report.path))
        report.layout += f"; {'.ckpt pickle' if report.path.suffix == '.ckpt' else 'pickle'}"
        report.readers = [reader if reader.program != "finetune" else
                          readers.Reader("finetune", CARE, "after finetune convert: whole models are read as .safetensors") for reader in report.readers]
        report.remedies.append(convert(report.path, "single-file", f"{report.path.stem}.safetensors", "the same model without a pickle"))
        return
    if isinstance(content, list) and len(content) > 1 and all(isinstance(item, torch.Tensor) for item in content):
        report.kind, report.layout = "lora", "cloneofsimo's bare list, pickle"
        report.warnings.append("A list of matrices in the order of one model's modules, without names: save it as .safetensors with the program that made it.")
        report.readers = readers.table(readers.everyone_else((NO, "reads cloneofsimo's .safetensors only"), (NO, "does not read it")))
        return
    for describe in (_embedding, _hypernetwork):
        try:
            describe(report, content, names)
        except Problem:
            continue
        return
    report.warnings.append("It holds neither an embedding, nor a hypernetwork, nor a whole model.")


def header_of(state: dict[Any, Any], path: Path) -> Header:
    """Names, shapes and dtypes of a pickle's tensors, as a safetensors header would state them."""
    import torch

    tensors, place = {}, 0
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            end = place + value.numel() * value.element_size()
            tensors[str(key)] = TensorInfo(_DTYPES.get(str(value.dtype), str(value.dtype)), tuple(value.shape), place, end)
            place = end
    return Header(tensors, {}, 0, path.stat().st_size)


def _refused(report: Report, member: str) -> None:
    report.warnings.append(f"Written by a current torch.save: the A1111 web UI refuses its container (member {member!r}). Forge has that check switched off.")
    report.readers = [reader if reader.program != "AUTOMATIC1111" else readers.Reader("AUTOMATIC1111", NO, "refuses its container: 'bad file inside'")
                      for reader in report.readers]
    if report.kind in ("embedding", "hypernetwork") and not any("--to webui" in command for _, command in report.remedies):
        report.remedies.append(convert(report.path, "webui", f"{report.path.stem}-webui/", "in the container every program takes"))


def _embedding(report: Report, content: Any, names: list[str]) -> None:
    from finetune.formats import embedding

    found = embedding.read(report.path)
    form = "dict" if isinstance(content, dict) and "string_to_param" in content else "token"
    form = "pair" if found.second is not None else "table" if form == "token" and found.token is None else form
    report.layout = {"dict": "A1111's dict", "token": "tensor under its word", "table": "anonymous tensor", "pair": "SDXL pair"}[form] + f"; {report.layout}"
    describe_embedding(report, found.vectors.shape, found.token, form)
    report.parameters = found.vectors.numel() + (0 if found.second is None else found.second.numel())
    report.dtypes = {_DTYPES.get(str(found.vectors.dtype), str(found.vectors.dtype)): 1 if found.second is None else 2}
    report.trained_on = trained_on(found.metadata)
    if any("ParameterDict" in name for name in names):
        report.warnings.append("Its table lies in an nn.ParameterDict: ComfyUI cannot open it as it should and guesses the numbers from the raw bytes.")
        report.readers = [reader if reader.program != "ComfyUI" else readers.Reader("ComfyUI", CARE, "reads raw bytes as float32: garbage for fp16")
                          for reader in report.readers]
        report.remedies.append(convert(report.path, "webui", f"{report.path.stem}-webui/", "as a plain dict"))


def describe_embedding(report: Report, shape: tuple[int, ...], token: str | None, form: str, word: str | None = None) -> None:
    """Findings shared by pickled and safetensors embeddings.

    Args:
        shape: (vectors, width).
        token: the name inside, or None.
        form: as for `readers.embedding`.
        word: the trigger its metadata state, for a table without a name.
    """
    report.kind = "embedding"
    report.vectors, report.width = shape[0], shape[1]
    report.family = SDXL if form == "pair" else family_of_width(shape[1])
    stem = report.path.stem
    report.trigger = token or stem
    found = readers.embedding(report.path.name, stem, form, token or word)
    if token and token != stem:
        report.warnings.append(f"The file is named {stem!r} but its word is {token!r}: the web UIs, ComfyUI and kohya's scripts go by the file name.")
        for program in ("AUTOMATIC1111", "Forge", "ComfyUI", "kohya"):
            found[program] = (CARE, found[program][1] + ", the file's name")
        report.remedies.append(convert(report.path, "safetensors", "embeddings/", "named after its word"))
    report.readers = readers.table(found)


def _hypernetwork(report: Report, content: Any, names: list[str]) -> None:
    from finetune.formats import acceptance, hypernetwork

    found = hypernetwork.read(report.path)
    report.kind, report.layout = "hypernetwork", f"A1111's .pt; {report.layout}"
    report.parameters = found.parameters
    report.trigger = trigger_of(found.metadata) or report.path.stem
    tensors = [tensor for state in found.networks.values() for tensor in state.values()]
    report.dtypes = dict(Counter(_DTYPES.get(str(tensor.dtype), str(tensor.dtype)) for tensor in tensors))
    report.family = family_of_width(hypernetwork.context_width(found))
    report.settings = {
        "widths": ", ".join(map(str, found.widths)),
        "structure": ", ".join(f"{size:g}" for size in found.layer_structure),
        "activation": found.activation + (", on the output too" if found.activate_output else ""),
        "layer norm": "yes" if found.layer_norm else "no",
        "transforms": ", ".join(found.transform),
    }
    report.trained_on = {"steps": str(found.step)} | ({"base": found.base_name} if found.base_name else {}) | trained_on(found.metadata)
    verdicts = readers.hypernetwork_pt(report.path.name, report.path.stem)
    verdicts["ComfyUI"] = _comfyui(content, verdicts["ComfyUI"])
    if content.get("name") not in (None, report.path.stem):
        verdicts["AUTOMATIC1111"] = (CARE, verdicts["AUTOMATIC1111"][1] + "; it keeps networks under the inner name")
    report.readers = readers.table(verdicts)
    wrong = [text for text in acceptance.of_hypernetwork(report.path, content) if not text.startswith("The keys, shapes or order")]
    report.warnings += wrong
    if any(old in key for pair in content.values() if isinstance(pair, (tuple, list)) for state in pair if isinstance(state, dict)
           for key in state for old in ("linear1.", "linear2.")):
        report.warnings.append("Its layers have the first names, linear1 and linear2.")
    if report.warnings:
        report.remedies.append(convert(report.path, "webui", f"{report.path.stem}-webui/", "as A1111 and ComfyUI read alike"))


def _comfyui(content: dict[Any, Any], as_it_is: Verdict) -> Verdict:
    """ComfyUI's node reads fewer settings than the web UI, and with other defaults."""
    from finetune.formats.hypernetwork_layers import ACTIVATIONS

    if content.get("activation_func") not in ACTIVATIONS:
        return NO, f"refuses the activation {content.get('activation_func')!r}"
    if content.get("use_dropout") or any(content.get("dropout_structure") or []):
        return CARE, "dropout stays active: every picture differs"
    if "activate_output" not in content:
        return CARE, "takes activate_output for False, A1111 for True"
    if content.get("is_layer_norm") and content["activation_func"] != "linear" and not content["activate_output"]:
        return CARE, "activates the last layer, A1111 does not"
    return as_it_is


