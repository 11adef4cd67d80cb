"""Findings about folders: models, PEFT's adapters, our artifacts and runs; from headers and small JSON files alone. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.formats import acceptance, readers
from finetune.formats.families import family_of_width
from finetune.formats.header import parameter_count, read_header, tensor_bytes
from finetune.formats.inspection import (
    Report,
    convert,
    file_name,
    grouped,
    trained_on,
    trigger_of,
)
from finetune.formats.readers import CARE, NO

_PEFT_VARIANTS = {"use_dora": "with DoRA", "use_rslora": "with rank-stabilised scale"}


def describe_pipeline(report: Report) -> None:
    """Fill in a report on a diffusers pipeline folder."""
    folder = report.path
    index = _json(folder / "model_index.json")
    report.kind, report.layout = "diffusers-folder", str(index.get("_class_name", ""))
    unet = _json(folder / "unet" / "config.json")
    schedule = _json(folder / "scheduler" / "scheduler_config.json")
    if "cross_attention_dim" in unet:
        hints = {"finetune.prediction_type": str(schedule.get("prediction_type", "epsilon"))}
        width = unet["cross_attention_dim"]
        report.family = family_of_width(width if isinstance(width, int) else width[0], hints)
    if "prediction_type" in schedule:
        report.settings["predicts"] = str(schedule["prediction_type"])
    if unet.get("in_channels") in (9, 5):
        report.settings["variant"] = "inpainting" if unet["in_channels"] == 9 else "depth"
    for weights in sorted(folder.glob("*/*.safetensors")):
        header = read_header(weights)
        part = weights.parent.name
        report.modules[part] = report.modules.get(part, 0) + parameter_count(header)
        report.part_bytes[part] = report.part_bytes.get(part, 0) + tensor_bytes(header)
        for info in header.tensors.values():
            report.dtypes[info.dtype] = report.dtypes.get(info.dtype, 0) + 1
    report.parameters = sum(report.modules.values())
    ours = _json(folder / "finetune.json")
    report.trigger, report.trained_on = trigger_of(ours), trained_on(ours)
    _verdicts(report, index)


def _verdicts(report: Report, index: Mapping[str, Any]) -> None:
    """Who reads a pipeline folder, by what the acceptance list finds wrong in it."""
    folder, found = report.path, readers.folder(str(report.path))
    wrong = grouped(acceptance.of_folder(folder))
    report.warnings += wrong
    if any("text_model." in text for text in wrong):
        found["diffusers"] = (CARE, "only with transformers 5.6 or newer; older ones load a text encoder of random weights")
        found["kohya"] = (NO, "its transformers loads a text encoder of random weights")
    elif any("tokenizer" in text for text in wrong):
        found["diffusers"] = (CARE, "its tokenizer is not read by every version")
        found["kohya"] = (CARE, "its tokenizer is not read by every version")
    if any(isinstance(entry, list) and len(entry) == 2 and entry[0] is not None and not (folder / name).is_dir() for name, entry in index.items()):
        found |= {program: (NO, "refuses it: a part is missing") for program in ("finetune", "diffusers", "kohya")}
    elif wrong:
        report.remedies.append(convert(folder, "diffusers", f"{folder.resolve().name}-fixed/", "readable by old and new versions alike"))
    if "variant" in report.settings and found["finetune"][0] == "yes":
        found["finetune"] = (readers.YES, f"generate --model {folder}; it cannot be trained on")
    report.remedies.append(convert(folder, "single-file", f"{file_name(report.trigger or folder.resolve().name)}.safetensors", "for AUTOMATIC1111, Forge and ComfyUI"))
    report.readers = readers.table(found)


def describe_adapter(report: Report) -> None:
    """Fill in a report on PEFT's own folder: adapter_config.json and adapter_model.safetensors."""
    config = _json(report.path / "adapter_config.json")
    variant = next((name for key, name in _PEFT_VARIANTS.items() if config.get(key)), "")
    report.kind = "lora" if config.get("peft_type") == "LORA" else "unknown"
    report.layout = " ".join(filter(None, ("PEFT adapter folder:", str(config.get("peft_type")), variant)))
    for key, values in (("r", report.ranks), ("lora_alpha", report.alphas)):
        if isinstance(config.get(key), int | float):
            values.append(config[key])
    weights = report.path / "adapter_model.safetensors"
    if weights.is_file():
        header = read_header(weights)
        report.parameters = parameter_count(header)
        report.dtypes = dict(Counter(info.dtype for info in header.tensors.values()))
        report.trigger, report.trained_on = trigger_of(header.metadata), trained_on(header.metadata)
    else:
        report.warnings.append("It has no adapter_model.safetensors.")
    report.readers = readers.table(readers.adapter_folder(report.path.name))


def describe_artifact(report: Report) -> None:
    """Fill in a report on an `artifact/` folder that finetune wrote; its files are children already.

    A file whose hash is no longer the recorded one is named.
    """
    report.kind = "finetune-artifact"
    content = _json(report.path / "artifact.json")
    _told(report, content)
    if isinstance(content.get("metadata"), dict):
        report.trained_on = trained_on(content["metadata"])
        report.settings = {name: text for name, text in report.settings.items() if name not in ("method", "class noun", "step")}
    found = {child.path: child.sha256 for child in report.children}
    listed = content.get("files", [])
    for entry in (entry for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, dict)):
        path = _inside(report.path, str(entry.get("file")))
        if path is None:
            report.warnings.append(f"artifact.json names {entry.get('file')!r}, which leads out of its folder.")
        elif not path.is_file():
            report.warnings.append(f"artifact.json names {entry.get('file')}, which is not there.")
        elif found.get(path) not in (None, entry.get("sha256")):
            report.warnings.append(f"{entry.get('file')} was changed after finetune wrote it.")


def _inside(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder or below; None for one that is elsewhere."""
    try:
        return folder / name if (folder / name).resolve().is_relative_to(folder.resolve()) else None
    except (ValueError, OSError, RuntimeError):  # a NUL sign, a link to itself
        return None


def describe_run(report: Report) -> None:
    """Fill in a report on a run folder."""
    report.kind = "finetune-run"
    _told(report, _json(report.path / "manifest.json"))
    settings = _json(report.path / "settings.json")
    for name in ("method", "model", "steps", "seed"):
        if name in settings:
            report.trained_on.setdefault({"model": "base"}.get(name, name), str(settings[name]))
    checkpoints = sorted(entry.name for entry in report.path.glob("checkpoints/*") if (entry / "manifest.json").is_file())
    if checkpoints:
        report.settings["checkpoints"] = ", ".join(checkpoints)
    if not (report.path / "artifact").is_dir():
        report.warnings.append("It has no artifact yet: the run did not finish. `finetune METHOD --resume` goes on.")


def _told(report: Report, content: Mapping[str, Any]) -> None:
    """Plain entries of a JSON file finetune wrote: texts and numbers, one level deep."""
    for key, value in content.items():
        name = key.removeprefix("finetune.").replace("_", " ")
        if name == "trigger":
            report.trigger = str(value) or None
        elif isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            report.settings[name] = str(value)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
