"""Findings about a LoRA from its header alone, with the readers' known quirks. Torch-free."""

from __future__ import annotations

import shlex
from collections import Counter

from finetune.errors import Problem
from finetune.formats import acceptance, lora_names, readers
from finetune.formats.families import SDXL, family_of_width
from finetune.formats.header import Header, TensorInfo, read_scalar
from finetune.formats.inspection import Report, convert, file_name, grouped
from finetune.formats.lora_keys import (
    NUMBERED,
    adapter_alphas,
    kind_of,
    layout_of,
    missing_part,
    sort_keys,
)
from finetune.formats.readers import CARE, NO, Verdict

Groups = dict[str, dict[str, TensorInfo]]
FORGE_PATIENCE = 12  # names it does not know, above which it drops the file


def is_lora(header: Header) -> bool:
    """Whether any key belongs to a LoRA layout or is of a LoRA-like adapter."""
    return any(layout_of(key) is not None or key.startswith(("lora_unet_", "lora_te", "unet:")) for key in header.tensors)


def describe_lora(report: Report, header: Header) -> None:
    """Fill in a report on a LoRA file.

    Raises:
        Problem: for other adapter types.
    """
    path = report.path
    report.kind = "lora"
    groups, ignored = sort_keys(path.name, header.tensors, header.metadata)
    layouts = {layout_of(key)[0] for key in header.tensors if key not in ignored}
    names = {key: _name(report, key) for key in groups}
    _sizes(report, names, groups)
    _alphas(report, header, groups)
    report.family = family_of_width(_context_width(names, groups), header.metadata)
    kinds = sorted({kind_of(parts) for parts in groups.values()})
    report.layout = _layout(layouts, kinds)
    if any(key.endswith(".oft_R.weight") for key in header.tensors):
        found = readers.lycoris(path.name, path.stem, kinds)
    elif layouts == {"cloneofsimo"}:
        found = _numbered(report)
    elif kinds == ["LoRA"] and "kohya" not in layouts:
        found = _peft(report, header)
    else:
        found = _kohya(report, header, groups, ignored, kinds)
    halves = [key for key, parts in groups.items() if missing_part(parts) is not None]
    if halves:
        report.warnings.append(f"{len(halves)} modules lack a part, such as {halves[0]}: the file is incomplete.")
        found["finetune"] = (NO, "refuses it: a module lacks a part")
    report.readers = readers.table(found)


def _layout(layouts: set[str], kinds: list[str]) -> str:
    """Kind of adapter and spelling, as in "LoHa, LyCORIS layout"."""
    spelling = {"kohya": "kohya", "peft": "PEFT", "lycoris": "LyCORIS", "cloneofsimo": "cloneofsimo's"}
    named = " and ".join(sorted(spelling.get(layout, layout) for layout in layouts))
    return f"{named} layout" + ("" if kinds == ["LoRA"] else f": {' and '.join(kinds)}")


def _sizes(report: Report, names: dict[str, str], groups: Groups) -> None:
    """Modules and bytes by component, and the ranks."""
    counts = Counter(name.partition(".")[0] for name in names.values())
    report.modules = {part: counts[part] for part in lora_names.COMPONENTS if part in counts}
    for key, parts in groups.items():
        component = names[key].partition(".")[0]
        if component in report.modules:
            report.part_bytes[component] = report.part_bytes.get(component, 0) + sum(info.end - info.start for info in parts.values())
    report.ranks = sorted({parts["down"].shape[0] for parts in groups.values() if "down" in parts})


def _name(report: Report, key: str) -> str:
    """Canonical module name; a name no grammar resolves keeps its key (the acceptance list names it)."""
    if NUMBERED.fullmatch(f"{key}:up"):
        return key.replace(":", ".")
    try:
        return lora_names.canonical(key) if "." in key else lora_names.from_kohya(key)
    except Problem as problem:
        if "." in key:
            report.warnings.append(problem.what)
        return key


def _alphas(report: Report, header: Header, groups: Groups) -> None:
    keys = [key for key in header.tensors if key.endswith(".alpha") and not key.startswith("bundle_emb.")]
    if keys:
        report.alphas = sorted({read_scalar(report.path, header, key) for key in keys})
    elif "lora_adapter_metadata" in header.metadata:
        declared = adapter_alphas(header.metadata)
        report.alphas = sorted({declared(key, parts["down"].shape[0]) for key, parts in groups.items() if "down" in parts})


def _context_width(names: dict[str, str], groups: Groups) -> int | None:
    """Input width of a cross-attention key or value module; else the first text encoder's width."""
    inputs = {"down": 1, "hada_w1_b": 1, "diff": 1}  # part of a module whose axis shows the layer's inputs
    for ends in ("attn2.to_k", "attn2.to_v"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
        for key, name in names.items():
            if name.endswith(ends):
                for part, axis in inputs.items():
                    if part in groups[key]:
                        return groups[key][part].shape[axis]
    return None


def _numbered(report: Report) -> dict[str, Verdict]:
    report.warnings.append("Modules are numbered by their place in the model: only with its base can anyone tell which is which.")
    report.remedies.append(convert(report.path, "kohya", f"{report.path.stem}-kohya.safetensors", "for every program, with its base", "--base MODEL"))
    return readers.numbered_lora(report.path.name)


def _peft(report: Report, header: Header) -> dict[str, Verdict]:
    if ".lora_A." in next(iter(header.tensors)):
        report.warnings += grouped(acceptance.of_header(report.path, header))
    if not report.alphas and not {"lora_adapter_metadata", "finetune.scale"} & set(header.metadata):
        report.warnings.append("No alpha is stored: every reader takes alpha = rank, right only if the scale was baked in.")
    named = report.trigger or "lora" if report.path.stem in ("pytorch_lora_weights", "adapter_model") else f"{report.path.stem}-kohya"
    report.remedies.append(convert(report.path, "kohya", f"{file_name(named)}.safetensors", "for AUTOMATIC1111, Forge, ComfyUI and kohya"))
    found = readers.peft_lora(report.path.name)
    if any(key.startswith("text_encoder") and ".text_model." not in key for key in header.tensors):
        found["diffusers"] = (CARE, "current versions only: older ones cannot place its text modules")
    return found


def _kohya(report: Report, header: Header, groups: Groups, ignored: list[str], kinds: list[str]) -> dict[str, Verdict]:
    """A file under kohya's prefixes, whatever kinds of modules it holds."""
    path, told = report.path, header.metadata
    name = told.get("ss_output_name") or path.stem
    plain = kinds == ["LoRA"]
    found = readers.kohya_lora(path.name, name) if plain else readers.lycoris(path.name, name, kinds, _of_rows(groups))
    wrong = grouped(finding for finding in acceptance.of_header(path, header) if _matters(finding.text, plain))
    _alphas_wrong(report, groups, found)
    levelless = [key for key in groups if key.startswith("lora_te") and key.split("_", 2)[2].startswith("encoder_")]
    if levelless:
        keys = sum(len(groups[key]) for key in levelless)
        found["Forge"] = (NO, "drops the whole file") if keys > FORGE_PATIENCE else (CARE, "applies only the UNet part")
        found["ComfyUI"] = found["AUTOMATIC1111"] = found["kohya"] = (CARE, "applies only the UNet part")
    if any(key.startswith("lora_te1_") for key in groups) and report.family is not SDXL:
        wrong.append("lora_te1_ is SDXL's prefix: kohya's scripts look for lora_te_ in other models, the others take both.")
        found["kohya"] = (CARE, "passes over its text encoder part")
    if ignored:
        wrong.append(f"{len(ignored)} tensors of a learned word are bundled in: diffusers refuses such a file.")
    if ignored or "lora_adapter_metadata" in told and report.alphas:
        found["diffusers"] = (NO, "refuses it")
    if "DoRA" in kinds and _of_rows(groups):
        norm = "the base's" if told.get("finetune.dora_norm") == "base" else "the merged weight's"
        wrong.append(f"DoRA with a length for each output, over {norm} norm: ComfyUI divides by the base's, LyCORIS by the merged weight's, "
                     "A1111 and the older Forge take them for lengths of inputs.")
    report.warnings += wrong
    if wrong and plain and 0.0 not in report.alphas:
        report.remedies.append(convert(path, "kohya", f"{path.stem}-fixed.safetensors", "one rank, one alpha, names every reader knows"))
    if not plain:
        report.remedies.append(("plain pairs that every program reads, by approximation",
                                f"finetune merge {shlex.quote(str(path))} --base {shlex.quote(report.trained_on.get('base', 'MODEL'))} --rank 16 "
                                f"--output {shlex.quote(path.stem)}-lora.safetensors"))
    return found


def _of_rows(groups: Groups) -> bool:
    """Whether a DoRA's lengths are of outputs: (out, 1) or (out, 1, 1, 1)."""
    lengths = [parts["magnitude"].shape for parts in groups.values() if "magnitude" in parts]
    return any(shape[0] > 1 for shape in lengths)


def _matters(text: str, plain: bool) -> bool:
    """A finding someone would notice: kohya's own metadata may be absent from others' files, and LyCORIS' have no one rank."""
    return " says None, " not in text and not text.endswith("lacks a half.") and (plain or not text.startswith("ss_network_"))


def _alphas_wrong(report: Report, groups: Groups, found: dict[str, Verdict]) -> None:
    """Mixed alphas: diffusers applies one to all modules."""
    without = [key for key, parts in groups.items() if "alpha" not in parts]
    if found["diffusers"][0] == "yes" and (len(report.alphas) > 1 or 0 < len(without) < len(groups)):
        found["diffusers"] = (CARE, "with wrong strengths: it applies one alpha to all modules")
    elif found["diffusers"][0] == "yes" and len(report.ranks) > 1:
        found["diffusers"] = (CARE, "0.35 and older read mixed ranks wrongly")
    if 0.0 in report.alphas:
        found["finetune"] = (NO, "refuses an alpha of 0, which is 'off' to some readers and 'the rank' to others")
