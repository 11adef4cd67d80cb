"""Findings about `.pt`, `.bin` and `.ckpt` files without executing anything in them."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

from finetune.errors import Problem
from finetune.formats.families import SDXL, family_of_width
from finetune.formats.inspection import Report, trained_on

# Members of a torch zip the web UI accepts (its `modules/safe.py`); current torch adds others.
_WEBUI_MEMBER = re.compile(r"[^/]+/(data/\d+|version|byteorder|\.data/serialization_id|data\.pkl)")
LARGEST_LOADED = 2**29
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}


def webui_refusals(path: Path) -> list[str]:
    """Members of the zip container that the A1111 web UI refuses; none for the legacy container."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not _WEBUI_MEMBER.fullmatch(name)]


def describe_pickle(report: Report) -> None:
    """Fill in a report on a torch pickle: an embedding, a hypernetwork, or what its globals tell."""
    from finetune.formats.pickles import ALLOWED_GLOBALS, globals_in  # torch takes a second: only for pickles

    path = report.path
    try:
        names = globals_in(path)
    except Problem as problem:
        report.warnings.append(str(problem))
        return
    container = "torch zip" if zipfile.is_zipfile(path) else "legacy torch container"
    report.layout = f"pickle, {container}"
    foreign = sorted(set(names) - ALLOWED_GLOBALS)
    if foreign:
        report.warnings.append(f"Its pickle asks for {', '.join(foreign[:6])}: not opened, since that could run code.")
        return
    if report.bytes > LARGEST_LOADED:
        report.kind = "single-file-checkpoint"
        report.warnings.append("Too large to open in passing; convert it to .safetensors to see inside.")
        return
    refused = webui_refusals(path)
    webui = f"refuses it (container member {refused[0]!r})" if refused else "reads it"
    for describe in (_embedding, _hypernetwork):
        try:
            describe(report, webui)
        except Problem:
            continue
        if refused:
            report.warnings.append("Written by a current torch.save: the A1111 web UI refuses its container.")
        return
    report.warnings.append("It holds neither an embedding nor a hypernetwork.")


def _embedding(report: Report, webui: str) -> None:
    from finetune.formats import embedding

    found = embedding.read(report.path)
    report.kind = "embedding"
    describe_embedding(report, found.vectors.shape, found.token, found.second is not None)
    report.parameters = found.vectors.numel() + (0 if found.second is None else found.second.numel())
    report.trained_on = trained_on(found.metadata)
    report.readers[0] = ("A1111 web UI, Forge", f"{webui}: type {report.path.stem}")


def describe_embedding(report: Report, shape: tuple[int, ...], token: str | None, pair: bool) -> None:
    """Findings shared by pickled and safetensors embeddings.

    Args:
        shape: (vectors, width).
        token: the name inside, or None.
        pair: whether it holds vectors for SDXL's two encoders.
    """
    report.vectors, report.width = shape
    report.family = SDXL if pair else family_of_width(shape[1])
    stem = report.path.stem
    report.trigger = token or stem
    argument = "" if token else f', token="{stem}"'
    report.readers += [
        ("A1111 web UI, Forge", f"reads it: type {stem}"),
        ("ComfyUI", f"reads it: type embedding:{stem}"),
        ("diffusers", "refuses it" if pair else f"reads it: pipe.load_textual_inversion(file{argument})"),
        ("finetune", "reads it"),
    ]
    if token and token != stem:
        report.warnings.append(f"The file is named {stem!r} but its word is {token!r}: web UIs go by the file name.")


def _hypernetwork(report: Report, webui: str) -> None:
    from finetune.formats import hypernetwork

    found = hypernetwork.read(report.path)
    report.kind = "hypernetwork"
    report.parameters = found.parameters
    tensors = [tensor for state in found.networks.values() for tensor in state.values()]
    report.dtypes = dict(Counter(_DTYPES.get(str(tensor.dtype), str(tensor.dtype)) for tensor in tensors))
    report.family = family_of_width(hypernetwork.context_width(found))
    report.settings = {
        "widths": ", ".join(map(str, found.widths)),
        "structure": str(found.layer_structure),
        "activation": found.activation + (", on the output too" if found.activate_output else ""),
        "layer norm": "yes" if found.layer_norm else "no",
        "transforms": ", ".join(found.transform),
    }
    report.trained_on = {"steps": str(found.step)} | ({"base": found.base_name} if found.base_name else {})
    comfy = "reads it"
    try:
        hypernetwork.refuse_for_webui(found, report.path)
    except Problem as problem:
        report.warnings.append(problem.what + " " + problem.why)
        comfy = "may compute something else"
    report.readers += [
        ("A1111 web UI", f"{webui}: <hypernet:{report.path.stem}:1>"),
        ("ComfyUI", f"{comfy}: Hypernetwork Loader node"),
        ("Forge", "loads it and applies nothing"),
        ("diffusers", "has no hypernetworks"),
        ("finetune", "reads it"),
    ]
