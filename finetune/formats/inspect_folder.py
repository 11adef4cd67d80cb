"""Findings about checkpoints and pipeline folders, from headers and small JSON files alone. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.formats.families import SD1, SD2, SDXL, Family, family_of_width
from finetune.formats.folder import CLIP_PARTS
from finetune.formats.header import Header, parameter_count, read_header
from finetune.formats.inspection import Report, trained_on, trigger_of

UNET_PREFIX = "model.diffusion_model."
_PARTS = {
    "UNet": (UNET_PREFIX,),
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner."),
    "EMA copy": ("model_ema.",),
}
_PEFT_VARIANTS = {"use_dora": "with DoRA", "use_rslora": "with rank-stabilised scale"}
_SD2_KEY = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
_SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def is_checkpoint(header: Header) -> bool:
    """Whether it is a whole model in the original single-file layout."""
    return any(name.startswith(UNET_PREFIX) for name in header.tensors)


def checkpoint_family(header: Header) -> Family | None:
    """Family of a single-file checkpoint by the keys the readers themselves go by; None without cross-attention."""
    if _SDXL_KEY in header.tensors:
        return SDXL
    if _SD2_KEY in header.tensors and header.tensors[_SD2_KEY].shape[-1] == SD2.context_width:
        return SD2
    for name, info in header.tensors.items():
        if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight"):
            return family_of_width(info.shape[1], header.metadata)
    return None


def describe_checkpoint(report: Report, header: Header) -> None:
    """Fill in a report on a single-file checkpoint (`.safetensors`)."""
    report.kind, report.layout = "single-file-checkpoint", "original Stable Diffusion names"
    report.family = checkpoint_family(header)
    counts = {
        part: sum(info.parameters for name, info in header.tensors.items() if name.startswith(prefixes))
        for part, prefixes in _PARTS.items()
    }
    report.modules = {part: count for part, count in counts.items() if count}
    for part in ("VAE", "text encoder"):
        if part not in report.modules:
            report.warnings.append(f"It has no {part}: diffusers refuses it, ComfyUI leaves those outputs out.")
    channels = header.tensors.get(UNET_PREFIX + "input_blocks.0.0.weight")
    if channels is not None and channels.shape[1] != 4:
        kind = {9: "inpainting", 8: "instruct-pix2pix"}.get(channels.shape[1], "another kind of")
        report.warnings.append(f"Its UNet takes {channels.shape[1]} channels: {kind} model.")
    if "EMA copy" in report.modules:
        report.warnings.append("It carries an EMA copy that no reader uses by default.")
    if report.family is SD2:
        report.warnings.append("Nothing in the file says epsilon or v: SD 2 at 768 needs a .yaml beside it (A1111).")
    if any("transformer.encoder.layers" in name for name in header.tensors if name.startswith("cond_stage_model")):
        report.warnings.append("Its text encoder lacks the `text_model.` level: diffusers reports it as missing.")
    report.readers += [
        ("A1111 web UI, Forge", "reads it"),
        ("ComfyUI", "reads it: Load Checkpoint node"),
        ("diffusers", "reads it; offline: from_single_file(file, config=FOLDER, local_files_only=True)"),
        ("finetune", "takes it as --model" if report.family in (SD1, SD2) else "cannot train it"),
    ]


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
    for weights in sorted(folder.glob("*/*.safetensors")):
        header = read_header(weights)
        part = weights.parent.name
        report.modules[part] = report.modules.get(part, 0) + parameter_count(header)
        for info in header.tensors.values():
            report.dtypes[info.dtype] = report.dtypes.get(info.dtype, 0) + 1
        if part == "text_encoder" and any(name.startswith(CLIP_PARTS) for name in header.tensors):
            report.warnings.append(
                "The text encoder lacks the `text_model.` level: transformers before 5.6 loads random weights instead."
            )
    report.parameters = sum(report.modules.values())
    ours = _json(folder / "finetune.json")
    report.trigger, report.trained_on = trigger_of(ours), trained_on(ours)
    _tokenizer(report, folder / "tokenizer")
    missing = [name for name, entry in index.items() if _present(entry) and not (folder / name).is_dir()]
    if missing:
        report.warnings.append(f"model_index.json names {', '.join(missing)}, but there is no such folder.")
    report.readers += [
        ("diffusers", "reads it: from_pretrained(folder)" if not missing else "refuses it"),
        ("A1111 web UI, Forge, ComfyUI", "need a single file instead"),
        ("finetune", "reads it: --model FOLDER" if not missing else "refuses it"),
    ]


def _present(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _tokenizer(report: Report, folder: Path) -> None:
    if not folder.is_dir():
        return
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        report.warnings.append("The tokenizer has no vocab.json and merges.txt: transformers 4 cannot open it.")
    if _json(folder / "tokenizer_config.json").get("model_max_length", 10**30) > 10**6:
        report.warnings.append("The tokenizer states no prompt length: older diffusers fails on generating.")


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
    report.readers += [
        ("peft, finetune", "read it, for the one network it was made for"),
        ("A1111 web UI, Forge, ComfyUI", "do not read it (plain LoRA in the kohya layout would do)"),
    ]


def describe_artifact(report: Report) -> None:
    """Fill in a report on an `artifact/` folder that finetune wrote; its files are children already.

    A file whose hash is no longer the recorded one is named.
    """
    report.kind = "finetune-artifact"
    content = _json(report.path / "artifact.json")
    _told(report, content)
    if isinstance(content.get("metadata"), dict):
        report.trained_on = trained_on(content["metadata"])
    found = {child.path: child.sha256 for child in report.children}
    for entry in content.get("files", []):
        path = report.path / str(entry.get("file"))
        if not path.is_file():
            report.warnings.append(f"artifact.json names {entry.get('file')}, which is not there.")
        elif found.get(path) not in (None, entry.get("sha256")):
            report.warnings.append(f"{entry.get('file')} was changed after finetune wrote it.")


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
        name = key.removeprefix("finetune.")
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
