"""Findings about a LoRA from its header alone, with the readers' known quirks. Torch-free."""

from __future__ import annotations

from collections import Counter

from finetune.errors import Problem
from finetune.formats import lora_names
from finetune.formats.families import family_of_width
from finetune.formats.header import Header, TensorInfo, read_scalar
from finetune.formats.inspection import Report
from finetune.formats.lora_keys import NUMBERED, adapter_alphas, kind_of, layout_of, missing_part, sort_keys


def describe_lora(report: Report, header: Header) -> None:
    """Fill in a report on a LoRA file.

    Raises:
        Problem: for other adapter types.
    """
    path = report.path
    groups, ignored = sort_keys(path.name, header.tensors, header.metadata)
    layouts = {layout_of(key)[0] for key in header.tensors if key not in ignored}
    report.kind, report.layout = "lora", " and ".join(sorted(layouts))
    names = {key: _name(report, key) for key in groups}
    counts = Counter(name.partition(".")[0] for name in names.values())
    report.modules = {part: counts[part] for part in lora_names.COMPONENTS if part in counts}
    report.ranks = sorted({parts["down"].shape[0] for parts in groups.values() if "down" in parts})
    _alphas(report, header, groups)
    report.family = family_of_width(_context_width(names, groups), header.metadata)
    halves = [key for key, parts in groups.items() if missing_part(parts) is not None]
    if halves:
        report.warnings.append(f"{len(halves)} modules lack one half, such as {halves[0]}: the file is incomplete.")
    kinds = sorted({kind_of(parts) for parts in groups.values()})
    if kinds != ["LoRA"]:
        report.layout += f", {' and '.join(kinds)}"
        _others(report, kinds)
    elif layouts == {"cloneofsimo"}:
        report.warnings.append("Modules are numbered by their place in the model: convert it with its base before use.")
        report.readers += [(program, "does not read it: convert it") for program in ("A1111 web UI", "Forge", "ComfyUI", "diffusers")]
    elif layouts == {"kohya"}:
        _kohya(report, header, groups, ignored)
    else:
        _peft(report, header, groups)
    report.readers.append(("finetune", "reads it" if not halves else "refuses it"))


def _others(report: Report, kinds: list[str]) -> None:
    """Who reads what LyCORIS made. Established from the sources of ComfyUI, Forge and A1111 (docs/formats.md)."""
    if "DoRA" in kinds:
        report.warnings.append("DoRA: A1111 takes lengths of columns only, so a file with lengths of rows is garbage there.")
    if "OFT of inputs" in kinds:
        report.readers += [(program, "does not read it: PEFT's OFT") for program in ("A1111 web UI", "Forge", "ComfyUI", "diffusers")]
        return
    report.readers += [
        ("A1111 web UI", "reads it" if "DoRA" not in kinds else "reads it if its lengths are of columns"),
        ("Forge", "reads it"),
        ("ComfyUI", "reads it: Load LoRA node"),
        ("diffusers", "leaves the lengths out" if kinds in (["DoRA"], ["DoRA", "LoRA"]) else "refuses it"),
    ]


def _name(report: Report, key: str) -> str:
    """Canonical module name; a name no grammar resolves becomes a warning and keeps its key."""
    if NUMBERED.fullmatch(f"{key}:up"):
        return key.replace(":", ".")
    try:
        return lora_names.canonical(key) if "." in key else lora_names.from_kohya(key)
    except Problem as problem:
        report.warnings.append(problem.what)
        return key


def _alphas(report: Report, header: Header, groups: dict[str, dict[str, TensorInfo]]) -> None:
    keys = [key for key in header.tensors if key.endswith(".alpha") and not key.startswith("bundle_emb.")]
    if keys:
        report.alphas = sorted({read_scalar(report.path, header, key) for key in keys})
    elif "lora_adapter_metadata" in header.metadata:
        declared = adapter_alphas(header.metadata)
        report.alphas = sorted({declared(key, parts["down"].shape[0]) for key, parts in groups.items() if "down" in parts})


def _context_width(names: dict[str, str], groups: dict[str, dict[str, TensorInfo]]) -> int | None:
    """Input width of a cross-attention key or value module; else the first text encoder's width."""
    for ends in ("attn2.to_k", "attn2.to_v"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
        for key, name in names.items():
            if name.endswith(ends) and "down" in groups[key]:
                return groups[key]["down"].shape[1]
    return None


def _kohya(
    report: Report, header: Header, groups: dict[str, dict[str, TensorInfo]], ignored: list[str]
) -> None:
    warn = report.warnings.append
    text = [key for key in groups if key.startswith("lora_te")]
    levelless = [key for key in text if key.split("_", 2)[2].startswith("encoder_")]
    without = [key for key, parts in groups.items() if "alpha" not in parts]
    diffusers = "reads it"
    if len(report.ranks) > 1:
        warn(f"Ranks differ between modules ({report.ranks}): diffusers 0.35 misreads that.")
    if len(report.alphas) > 1 or 0 < len(without) < len(groups):
        warn("Alphas differ between modules or are partly missing: diffusers applies one alpha to all of them.")
        diffusers = "reads it with wrong strengths"
    if 0.0 in report.alphas:
        warn("Some alpha is 0, which some programs read as 'off' and others as 'equal to the rank'.")
    if levelless:
        warn(f"{len(levelless)} text modules lack `text_model_` in their names: ComfyUI and Forge do not apply them.")
    if ignored:
        warn(f"{len(ignored)} tensors of an embedding are bundled in: diffusers refuses such a file.")
        diffusers = "refuses it"
    if "lora_adapter_metadata" in header.metadata:
        warn("A kohya file with PEFT metadata: diffusers refuses the combination.")
        diffusers = "refuses it"
    stated = (header.metadata.get("ss_network_dim"), header.metadata.get("ss_network_alpha"))
    for label, text_value, found in zip(("rank", "alpha"), stated, (report.ranks, report.alphas), strict=True):
        if text_value not in (None, "None", "Dynamic") and len(found) == 1 and _number(text_value) != found[0]:
            warn(f"Metadata says {label} {text_value}, the tensors say {found[0]:g}.")
    verdict = "applies only the UNet part" if levelless else "reads it"
    tag = f"<lora:{header.metadata.get('ss_output_name') or report.path.stem}:1>"
    report.readers += [
        ("A1111 web UI", f"reads it: {tag}"),
        ("Forge", "drops the whole file" if len(levelless) > 12 else f"{verdict}: {tag}"),
        ("ComfyUI", f"{verdict}: Load LoRA node"),
        ("diffusers", f"{diffusers}: pipe.load_lora_weights(file)"),
    ]


def _peft(report: Report, header: Header, groups: dict[str, dict[str, TensorInfo]]) -> None:
    warn = report.warnings.append
    if not report.alphas and not {"lora_adapter_metadata", "finetune.scale"} & set(header.metadata):
        warn("No alpha is stored: every reader takes alpha = rank, right only if the scale was baked in.")
    text = [key for key in groups if key.startswith("text_encoder")]
    if any(".text_model." not in key for key in text):
        warn("Text modules lack the `text_model.` level: diffusers with transformers 4 and the web UIs cannot place them.")
    report.readers += [
        ("A1111 web UI", "finds nothing in it (needs the kohya layout)"),
        ("Forge", "refuses it (needs the kohya layout)"),
        ("ComfyUI", "loses its attention modules (needs the kohya layout)"),
        ("diffusers", "reads it: pipe.load_lora_weights(file)"),
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_lora(header: Header) -> bool:
    """Whether any key belongs to a LoRA layout or is of a LoRA-like adapter."""
    return any(layout_of(key) is not None or key.startswith(("lora_unet_", "lora_te", "unet:")) for key in header.tensors)
