"""Say what a file or folder is, who can read it and what is wrong with it, without running anything inside it.

safetensors files cost one read of their header; torch is imported only for pickles.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.errors import Problem
from finetune.formats import acceptance, inspect_folder, inspect_lora, readers
from finetune.formats.embedding_keys import ANONYMOUS_KEYS
from finetune.formats.families import family_of_width
from finetune.formats.header import Header, parameter_count, read_header, told_json
from finetune.formats.hypernetwork_layers import expected_shapes
from finetune.formats.inspect_checkpoint import describe_checkpoint, is_checkpoint
from finetune.formats.inspect_pickle import describe_embedding, describe_pickle
from finetune.formats.inspect_picture import PICTURES, describe_picture
from finetune.formats.inspection import (
    Report,
    convert,
    facts,
    grouped,
    trained_on,
    trigger_of,
)
from finetune.runs import folder_bytes, sha256

LARGEST_HASHED = 2**29  # a hash reads the whole file; beyond this it would no longer be instant
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

DELTAS = ("finetune-delta-1",)

__all__ = ["Report", "facts", "inspect"]


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
    elif path.suffix.lower() in PICTURES:
        describe_picture(report)
    else:
        report.warnings.append("Neither .safetensors nor a torch pickle nor a picture.")
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
            _fits_nothing(pipeline)
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
    if any(reader.verdict == readers.YES for child in report.children for reader in child.readers if reader.program != "finetune"):
        for child in report.children if report.kind == "finetune-artifact" else []:  # what it would be converted to lies beside it
            if child.kind != "diffusers-folder":
                child.remedies = [remedy for remedy in child.remedies if "finetune convert" not in remedy[1]]
    if report.kind == "diffusers-folder":
        _fits_nothing(report)
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
        try:
            _hypernetwork(report, header)
        except Problem as problem:
            report.warnings.append(f"{problem.what} {problem.fix}")
        except (TypeError, ValueError, AttributeError) as error:
            report.warnings.append(f"Its settings are damaged ({error}).")
    elif header.metadata.get("finetune") in DELTAS:
        _delta(report, header)
    elif is_checkpoint(header.tensors):
        describe_checkpoint(report, header)
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
        report.layout = "SDXL pair"
        describe_embedding(report, tensors["clip_l"].shape, None, "pair")
    elif len(tensors) == 1:
        ((name, info),) = tensors.items()
        token = None if name in ANONYMOUS_KEYS else name
        report.layout = "tensor under its word" if token else f"tensor without a word ({name})"
        describe_embedding(report, info.shape if len(info.shape) == 2 else (1, info.parameters), token, "token" if token else "table",
                           stated if stated and not set(stated) & set(" \t") else None)
    else:
        report.warnings.append("Its tensor names belong to no adapter or single-file checkpoint known here.")
        return
    report.trigger = stated or report.trigger
    wrong = [finding for finding in acceptance.of_header(report.path, header) if finding.text != "It is not float32."]
    report.warnings += grouped(wrong)
    if len(header.tensors) > len(tensors):
        refused = (readers.NO, "refuses it: two tensors")
        report.readers = [readers.Reader(one.program, *refused) if one.program in ("AUTOMATIC1111", "Forge", "diffusers") else one for one in report.readers]
        report.remedies.append(convert(report.path, "safetensors", f"{report.path.stem}-table/", "one table, as every program reads it"))


def _delta(report: Report, header: Header) -> None:
    """A variant of the embedded base, kept as what differs."""
    told = header.metadata
    report.kind = "variant-delta"
    report.layout = f"{told.get('variant', 'unknown')} variant of toybox"
    report.settings["changes"] = f"{len({name.rpartition('.')[0] for name in header.tensors})} modules"
    report.trained_on = {label: told[key] for key, label in (("base", "base hash"), ("steps", "steps"), ("command", "command")) if told.get(key)}
    name = f"toybox-{told.get('variant', 'VARIANT')}"
    report.readers = readers.table(readers.everyone_else((readers.YES, f"generate --model {name} where it is the one shipped"),
                                                         (readers.NO, "it is no model of its own")))
    report.remedies.append(convert(Path(name), "single-file", f"{name}.safetensors", "as a whole model"))


def _hypernetwork(report: Report, header: Header) -> None:
    report.kind = "hypernetwork"
    report.layout = f"finetune safetensors, version {header.metadata.get('finetune.format_version', '?')}"
    config = told_json(report.path.name, header.metadata, "hypernetwork_config")
    report.settings = {
        "widths": ", ".join(map(str, config.get("sizes", []))),
        "structure": ", ".join(map(str, config.get("layer_structure") or [])),
        "activation": f"{config.get('activation_func')}" + (", on the output too" if config.get("activate_output") else ""),
        "layer norm": "yes" if config.get("is_layer_norm") else "no",
        "transforms": ", ".join(config.get("transform", [])),
        "scope": {"cross": "cross-attention", "all": "every attention"}.get(config.get("scope", ""), "every attention"),
    }
    _networks(report, header, config)
    report.readers = readers.table(readers.hypernetwork_safetensors(report.path.name))
    if set(config.get("transform", ["key", "value"])) == {"key", "value"}:
        report.remedies.append(convert(report.path, "webui", f"{report.path.stem}.pt", "for AUTOMATIC1111 and ComfyUI"))
    else:
        report.warnings.append("It transforms queries, or not both key and value: no other program has a file for that. Key and value would load elsewhere.")


def _networks(report: Report, header: Header, config: dict[str, Any]) -> None:
    """Shapes against settings, and the base the widths fit."""
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
