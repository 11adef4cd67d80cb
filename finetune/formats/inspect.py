"""Say what a file or folder is, who can read it and what is wrong with it, without running anything inside it.

safetensors files cost one read of their header; torch is imported only for pickles.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from finetune.errors import Problem
from finetune.formats import inspect_folder, inspect_lora
from finetune.formats.embedding_keys import ANONYMOUS_KEYS
from finetune.formats.families import family_of_width
from finetune.formats.header import Header, parameter_count, read_header
from finetune.formats.hypernetwork_layers import expected_shapes
from finetune.formats.inspect_pickle import describe_embedding, describe_pickle
from finetune.formats.inspection import Report, lines, trained_on, trigger_of
from finetune.runs import folder_bytes, sha256

LARGEST_HASHED = 2**29  # a hash reads the whole file; beyond this it would no longer be instant
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

__all__ = ["Report", "inspect", "lines"]


def inspect(path: Path | str) -> Report:
    """Report on a file or folder.

    Raises:
        Problem: when there is nothing at `path`, or a safetensors header lies.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise Problem(f"There is nothing at {path}.", fix="Check the path.")
    size = path.stat().st_size
    report = Report(path, bytes=size, sha256=sha256(path) if size <= LARGEST_HASHED else None)
    if path.suffix == ".safetensors":
        _safetensors(report, read_header(path))
    elif path.suffix in PICKLES:
        describe_pickle(report)
    else:
        report.warnings.append("Neither .safetensors nor a torch pickle.")
    _fits_nothing(report)
    return report


def _fits_nothing(report: Report) -> None:
    """The layout may be every program's and the width still no published model's, as with toybox."""
    if report.family is not None and report.family.key == "other" and report.family.context_width:
        width = report.family.context_width
        report.warnings.append(f"No published Stable Diffusion has text width {width}: it fits only the base it came from.")


def _folder(path: Path) -> Report:
    report = Report(path, bytes=folder_bytes(path))
    if (path / "artifact.json").is_file():
        report.children = [inspect(part) for part in sorted(path.iterdir()) if _is_part(part)]
        inspect_folder.describe_artifact(report)
        if (path / "model_index.json").is_file():
            pipeline = Report(path, bytes=report.bytes)
            inspect_folder.describe_pipeline(pipeline)
            report.children.append(pipeline)
    elif (path / "manifest.json").is_file() and (path / "settings.json").is_file():
        inspect_folder.describe_run(report)
        report.children = [inspect(path / "artifact")] if (path / "artifact").is_dir() else []
    elif (path / "model_index.json").is_file():
        inspect_folder.describe_pipeline(report)
    elif (path / "adapter_config.json").is_file():
        inspect_folder.describe_adapter(report)
    else:
        report.children = [inspect(part) for part in sorted(path.iterdir()) if _is_part(part)]
        if not report.children:
            report.warnings.append("It holds no model, artifact or run.")
    for child in report.children:  # said once, by the folder
        child.trained_on = {label: text for label, text in child.trained_on.items() if report.trained_on.get(label) != text}
    return report


def _is_part(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in ("model_index.json", "adapter_config.json"))
    return path.suffix == ".safetensors" or path.suffix in PICKLES


def _safetensors(report: Report, header: Header) -> None:
    report.parameters = parameter_count(header)
    report.dtypes = dict(Counter(info.dtype for info in header.tensors.values()))
    report.trigger = trigger_of(header.metadata)
    report.trained_on = trained_on(header.metadata)
    if header.metadata.get("finetune.format") == "hypernetwork":
        _hypernetwork(report, header)
    elif inspect_folder.is_checkpoint(header):
        inspect_folder.describe_checkpoint(report, header)
    elif inspect_lora.is_lora(header):
        try:
            inspect_lora.describe_lora(report, header)
        except Problem as problem:
            report.warnings.append(f"{problem.what} {problem.fix}")
    else:
        _embedding(report, header)


def _embedding(report: Report, header: Header) -> None:
    tensors = {name: info for name, info in header.tensors.items() if name != "emp_params_out"}
    stated = report.trigger
    if set(tensors) == {"clip_l", "clip_g"}:
        report.kind, report.layout = "embedding", "SDXL pair"
        describe_embedding(report, tensors["clip_l"].shape, None, pair=True)
    elif len(tensors) == 1:
        ((name, info),) = tensors.items()
        report.kind, anonymous = "embedding", name in ANONYMOUS_KEYS
        report.layout = "anonymous tensor" if anonymous else "diffusers: tensor under its token"
        shape = info.shape if len(info.shape) == 2 else (1, info.parameters)
        describe_embedding(report, shape, None if anonymous else name, pair=False)
    else:
        report.warnings.append("Its tensor names belong to no adapter or single-file checkpoint known here.")
    report.trigger = stated or report.trigger


def _hypernetwork(report: Report, header: Header) -> None:
    report.kind = "hypernetwork"
    report.layout = f"finetune safetensors, version {header.metadata.get('finetune.format_version', '?')}"
    config = json.loads(header.metadata.get("hypernetwork_config", "{}"))
    report.settings = {
        "widths": ", ".join(map(str, config.get("sizes", []))),
        "structure": str(config.get("layer_structure")),
        "activation": f"{config.get('activation_func')}" + (", on the output too" if config.get("activate_output") else ""),
        "layer norm": "yes" if config.get("is_layer_norm") else "no",
        "transforms": ", ".join(config.get("transform", [])),
        "scope": {"cross": "cross-attention", "all": "every attention"}.get(config.get("scope", ""), "every attention"),
    }
    shape = [config.get(key) for key in ("activation_func", "is_layer_norm", "activate_output")]
    contexts = []
    for prefix in sorted({name.partition("linear.")[0] for name in header.tensors}):
        place = re.fullmatch(r"hypernet\.(\d+)\.([kvq])\.", prefix)
        found = {name.removeprefix(prefix): info.shape for name, info in header.tensors.items() if name.startswith(prefix)}
        if place is None or found != expected_shapes(int(place[1]), config.get("layer_structure") or [1, 2, 1], *shape):
            report.warnings.append(f"The tensors {prefix}* do not fit the file's own settings.")
        elif place[2] != "q":
            contexts.append(int(place[1]))
    report.family = family_of_width(next((width for width in contexts if width in (768, 1024, 2048)), None))
    if len(set(contexts)) == 1:
        report.family = family_of_width(contexts[0])
    report.readers += [
        ("A1111 web UI, Forge", "do not list it (use the .pt)"),
        ("ComfyUI", "lists it and silently does nothing (use the .pt)"),
        ("diffusers", "has no hypernetworks"),
        ("finetune", "reads it"),
    ]
